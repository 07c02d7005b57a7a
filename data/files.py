"""Rules for all readers of data: which files are images, which are left out, and how what is left out is reported."""

import logging
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import TypeVar

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
OTHER_IMAGE_EXTENSIONS = {
    *(".gif", ".apng", ".jfif", ".jif", ".jpe", ".jp2", ".j2k", ".jxl", ".avif", ".heic", ".heif"),
    *(".pbm", ".pnm", ".tga", ".exr", ".hdr", ".dcm", ".dng", ".cr2", ".nef", ".arw"),
}
# Files and directories that operating systems, file managers and network disks create, often with copies of images.
SYSTEM_NAMES = {
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@tmp", "$recycle.bin", "system volume information", "lost+found"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini", ".ds_store", ".appledouble", ".apdisk", ".spotlight-v100", "__macosx"),
    *(".trashes", ".fseventsd", ".thumbnails", ".snapshot", ".git", ".directory", ".ipynb_checkpoints"),
}
MAX_PROBES = 20  # files per unknown extension whose content is tested
HEAD = 32  # bytes that ``is_image_content`` needs
_SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM.{4}\0{4}|II\*\0|MM\0\*|RIFF.{4}WEBP|P[1-6]\s[\d\s#]"
    rb"|.{4}ftyp(avif|avis|hei[cxfs]|mif1|msf1)|\0\0\0\x0cJXL |\xff\x0a|\0\0\0\x0cjP  ",
    re.DOTALL,
)
# Words in the names of directories and archives that identify the split.
_SPLIT_WORDS = {
    "train": {"train", "training"},
    "val": {"val", "valid", "validation", "test", "testing", "dev", "eval"},
}

T = TypeVar("T")
Note = tuple[int, str]  # level of the log line, and its text


class DataError(ValueError):
    """Unusable data. The message includes the path and the remedy."""


def is_system_name(name: str) -> bool:
    """Whether the operating system or a file manager creates files or directories of this name, see ``SYSTEM_NAMES``."""
    return name.startswith("._") or name.lower() in SYSTEM_NAMES  # macOS stores metadata of each file in a ._ file


def is_system_path(path: str) -> bool:
    """``is_system_name`` of a path in an archive or of one of its directories."""
    return any(map(is_system_name, path.split("/")))


def has_image_extension(name: str) -> bool:
    return name.lower().endswith(IMAGE_EXTENSIONS)


def is_image_content(head: bytes) -> bool:
    """Whether the first ``HEAD`` bytes of a file are those of an image format, supported or not."""
    return _SIGNATURES.match(head) is not None


def read_head(path: str | Path, num_bytes: int = HEAD, *, offset: int = 0) -> bytes:
    """The ``num_bytes`` bytes of a regular file after ``offset``; fewer at its end, none if it cannot be read."""
    try:
        if not os.path.isfile(path):  # reading a pipe would block
            return b""
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            return file.read(num_bytes)
    except OSError:
        return b""


class LeftOut:
    """Files and directories that a scan does not read, counted by kind, with an example of each.

    Files that could be images lead to warnings: they have the extension of an image format that is not read, or an unknown
    extension and the content of an image. Everything else leads to an informational line.
    """

    def __init__(self) -> None:
        self.images: Counter[str] = Counter()  # files that could be images, by extension ("" for none)
        self.other: Counter[str] = Counter()  # other files, by extension
        self._probes: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def add(self, name: str, read: Callable[[], bytes]) -> None:
        """Count a file that is not read because of its extension.

        Args:
            read: returns the first ``HEAD`` bytes of the file.
        """
        extension = PurePosixPath(name).suffix.lower()
        self._examples.setdefault(extension, name)
        if extension in OTHER_IMAGE_EXTENSIONS or extension in self.images:
            self.images[extension] += 1
            return
        self.other[extension] += 1
        if self._probes[extension] < MAX_PROBES:
            self._probes[extension] += 1
            if is_image_content(read()):
                self.images[extension] = self.other.pop(extension)

    def add_kind(self, kind: str, name: str) -> None:
        """Count an entry that is not read for another reason.

        Args:
            kind: ``system`` (see ``SYSTEM_NAMES``), or the predicate of a warning, as in "are hidden".
        """
        self._counts[kind] += 1
        self._examples.setdefault(f"kind {kind}", name)

    def extensions(self) -> str:
        """Number of files that could be images, by extension, as in "12 .gif, 3 without extension"; "" if there are none."""
        return ", ".join(f"{count} {extension or 'without extension'}" for extension, count in self.images.most_common())

    def notes(self, source: str | Path) -> list[Note]:
        """Log lines that account for everything that was left out."""
        notes: list[Note] = []
        if self.images:
            example = self._examples[self.images.most_common(1)[0][0]]
            text = (
                f"{source}: left out, but images by extension or content: {self.extensions()}, such as {example}; convert "
                f"them, or rename them if their format is supported (extensions: {', '.join(IMAGE_EXTENSIONS)})"
            )
            notes.append((logging.WARNING, text))
        for kind, count in self._counts.items():
            example = self._examples[f"kind {kind}"]
            if kind == "system":
                notes.append((logging.INFO, f"{source}: ignored {count} files of the operating system, such as {example}"))
            else:
                notes.append((logging.WARNING, f"{source}: left out, since they {kind}: {count}, such as {example}"))
        if self.other:
            example = self._examples[self.other.most_common(1)[0][0]]
            notes.append((logging.INFO, f"{source}: ignored {self.other.total()} files that are not images, such as {example}"))
        return notes


def check_distinct_names(classes: Sequence[str], source: str | Path) -> list[Note]:
    """Check that no two classes have names that look the same.

    Returns:
        A warning if two names differ only in upper and lower case.

    Raises:
        DataError: two names differ only in Unicode normalisation, as when a directory was copied from macOS.
    """
    if twins := _first_twins(classes, lambda name: unicodedata.normalize("NFC", name)):
        raise DataError(
            f"{source}: the classes {twins[0]!a} and {twins[1]!a} differ only in Unicode normalisation; merge them, or "
            "rename one"
        )
    if twins := _first_twins(classes, str.casefold):
        return [(logging.WARNING, f"{source}: the classes {twins[0]} and {twins[1]} differ only in upper and lower case")]
    return []


def first_duplicate(values: Iterable[T]) -> T | None:
    """The first value that occurred before; None if all differ. Linear in the number of values, which may be 10^6."""
    seen = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None


def _first_twins(names: Iterable[str], normalise: Callable[[str], str]) -> tuple[str, str] | None:
    """The first two names with the same normal form; None if all differ."""
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(normalise(name), name)) != name:
            return other, name
    return None


def suggest_split(split: Path) -> str:
    """Suggest, as the end of an error message, what to do if ``root/<split>`` or its archive is missing.

    Only files and directories whose name contains a word for this split are suggested: validation must never use training
    images. If there are none, the names in ``root`` are listed.
    """
    root, name = split.parent, split.name
    try:
        entries = sorted(path for path in root.iterdir() if path != split and not path.name.startswith("."))
    except FileNotFoundError:
        return f". {root} does not exist"
    except OSError as error:
        return f". {root} cannot be listed ({error.strerror}); check its permissions"
    shards = sorted(split.glob("*.tar*")) if os.path.isdir(split) else []
    related = shards + [path for path in entries if _split_of(path.name) == name]
    if not related:
        shown = ", ".join(f"{path.name}{'/' if os.path.isdir(path) else ''}" for path in entries[:5])
        return f". {root} contains {shown or 'nothing else'}{f' and {len(entries) - 5} more' if len(entries) > 5 else ''}"
    found = related[0]
    if os.path.isdir(found):
        only_if = "" if "test" not in found.name.lower() else "if it contains the validation images, "
        remedy = f"{only_if}rename it to {name}/"
    elif found.suffix == ".zip":
        remedy = f"rename the archive to {name}.zip and its list to {name}_map.txt, and add --zip"
        if found.name == f"{name}.zip":
            remedy = f"add --zip, which needs {name}_map.txt too"
    elif found.match(f"{name}-*.tar"):  # shards are read without --zip
        remedy = "leave out --zip to read tar shards"
    elif ".tar" in found.suffixes or found.suffix == ".tgz":
        remedy = f"rename tar shards to {name}-*.tar (uncompressed) in {root}"
    else:
        remedy = "this format is not read"
    more = f" (and {len(related) - 1} more)" if len(related) > 1 else ""
    return f". Found {found.name}{'/' if os.path.isdir(found) else ''}{more}: {remedy}"


def _split_of(name: str) -> str | None:
    """Split that a word in a file name identifies; None if there is none, or words of several splits."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    splits = [split for split, known in _SPLIT_WORDS.items() if words & known]
    return splits[0] if len(splits) == 1 else None
