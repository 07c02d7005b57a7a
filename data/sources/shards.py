"""Splits that are divided into numbered archives, such as ``train-00000-of-00294.parquet`` or ``train-000000.tar``."""

import contextlib
import fnmatch
import glob
import itertools
import logging
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from data.files import DataError, Note
from data.sources.class_list import class_lists, list_classes
from data.sources.layout import Layout, split_of

# The hub's older parquet shards have a hash after the total.
_NUMBERED = re.compile(
    r"(?P<prefix>.*?)(?P<number>[0-9]+)(?P<end>(-of-(?P<total>[0-9]+)(-[0-9a-f]{16})?)?\.[a-z]+)", re.IGNORECASE | re.DOTALL
)


class Shards(Layout):
    """A split in shards.

    The shards of the split "train" are ``train-*<extension>``, or else, as on the Hugging Face hub,
    ``<data set>-train-<number><extension>``.

    Attributes:
        extension: of the names of the shards.
        other_extensions: regular expression of the extensions of files that could be further shards.
        class_lists: see ``data.sources.class_list.class_lists``.
    """

    extension: ClassVar[str]
    other_extensions: ClassVar[str]

    def __init__(self, root: Path, split: str):
        self.split = split
        self.is_pattern = split.lower().endswith(self.extension)
        self.source = (root / split).parent
        names = []
        with contextlib.suppress(OSError):  # the directory does not exist, or cannot be listed
            names = os.listdir(self.source)
        self.data_sets = [] if self.is_pattern else _find_data_sets(names, Path(split).name, self.extension)
        prefix = "".join(f"{name}-" for name in [*self.data_sets[:1], Path(split).name])
        self.path = root / split if self.is_pattern else self.source / f"{glob.escape(prefix)}*{self.extension}"
        self.class_lists = class_lists(self.source, root)
        self.archives = sorted(self.source / name for name in fnmatch.filter(names, self.path.name))

    def files(self) -> list[Path]:
        return self.archives

    def list_classes(self) -> list[str] | None:
        return list_classes(self.class_lists)

    def check_shards(self) -> None:
        """Check that the shards belong to one split, that no shard is a link to another one, and that none is missing from a
        numbered sequence.

        Raises:
            DataError: a shard is missing, occurs twice, or belongs to another split.
        """
        if len(self.data_sets) > 1:
            first, second = (f"{data_set}-{Path(self.split).name}-*{self.extension}" for data_set in self.data_sets[:2])
            raise DataError(
                f"{self.source} has shards of several data sets, {first} and {second}; choose with --opts DATA.TRAIN_SPLIT and "
                f"DATA.VAL_SPLIT, for example '{first}'"
            )
        files: dict[tuple[int, int], Path] = {}
        sequences: dict[str, dict[int, Path]] = {}
        splits: dict[str, Path] = {}
        for shard in self.archives:
            status = os.stat(shard) if os.path.exists(shard) else None
            if status and (other := files.setdefault((status.st_dev, status.st_ino), shard)) != shard:
                raise DataError(
                    f"{shard} and {other} are links to the same file, which would be counted twice; remove one of them"
                )
            if split := split_of(shard.name):
                splits.setdefault(split, shard)
            if match := _NUMBERED.fullmatch(shard.name):
                numbered = sequences.setdefault(match["prefix"], {})
                if (other := numbered.setdefault(int(match["number"]), shard)) != shard:
                    raise DataError(f"{shard} and {other.name} have the same number; remove or rename one of them")
        if len(splits) > 1:
            one_split, other_split = (path.name for path in splits.values())
            raise DataError(
                f"{self.path} matches shards of two splits, {one_split} and {other_split}; use a pattern that matches only one"
            )
        for prefix, numbered in sequences.items():
            if self.is_pattern or f"{glob.escape(prefix)}*{self.extension}" == self.path.name:
                self._check_sequence(numbered)

    def _check_sequence(self, numbered: dict[int, Path]) -> None:
        """Check that numbered shards form a sequence that starts at 0 or 1. If the names state the total, as in
        ``<prefix><number>-of-<total>``, all shards must exist. Shards that a requested pattern leaves out may be missing.

        Raises:
            DataError: a shard is missing.
        """
        matches = {number: _NUMBERED.fullmatch(shard.name) for number, shard in numbered.items()}
        total = max(int(match["total"] or 0) for match in matches.values() if match)
        first, last = min(numbered), max(numbered)
        if first > 1:
            if self.is_pattern and not total:
                return  # a requested pattern may select shards from the middle, or files that are numbered by year
            first = 0
        match = matches[last]
        assert match is not None  # all shards in ``numbered`` matched before
        width = min(len(match["number"]) for match in matches.values() if match)
        for number in itertools.count(first):
            if number > max(last, first + total - 1):
                return
            name = f"{match['prefix']}{number:0{width}d}{match['end']}"
            if number not in numbered and fnmatch.fnmatchcase(name, self.path.name):
                raise DataError(
                    f"{self.source / name}: shard {number} is missing, but there are shards {min(numbered)} to "
                    f"{last}{f' of {total}' if total else ''}; download or pack it again. To use only the others, "
                    "renumber them without gaps, from 0"
                )

    def unread_files(self) -> list[Note]:
        """A warning about files that could be further shards, such as ``val-001.tar.gz`` or ``val_001.tar``."""
        name = re.split(r"[*?[]", self.path.name)[0].rstrip("-_.") if self.is_pattern else Path(self.split).name
        stem = re.escape(name) if self.is_pattern else f"(.+-)?{re.escape(name)}"
        pattern = re.compile(rf"{stem}([^a-z].*)?{self.other_extensions}", re.IGNORECASE | re.DOTALL)
        unread = sorted(path for path in self.source.iterdir() if path not in self.archives and pattern.fullmatch(path.name))
        unread = [path for path in unread if split_of(path.name) in (None, split_of(name))]
        if not unread:
            return []
        more = f" (and {len(unread) - 1} more)" if len(unread) > 1 else ""
        text = f"{unread[0]} is not read{more}; shards must be uncompressed and named {self.path.name}"
        return [(logging.WARNING, text)]


def _find_data_sets(names: Sequence[str], split: str, extension: str) -> list[str]:
    """Names of the data sets that have shards ``<data set>-<split>-<number><extension>``.

    Returns:
        [] if there are shards ``<split>-*<extension>``.
    """
    if not split or any(fnmatch.fnmatchcase(name, f"{glob.escape(split)}-*{extension}") for name in names):
        return []
    pattern = re.compile(rf"(.+)-{re.escape(split)}-[0-9]+(-of-[0-9]+)?{re.escape(extension)}", re.DOTALL)
    return sorted({match[1] for name in names if (match := pattern.fullmatch(name)) and split_of(match[1]) is None})
