"""Remedies for a missing split: what lies in its place, and the option with which the next command reads it."""

import os
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import islice
from pathlib import Path

from data.files import has_image_extension
from data.sources.layout import DEFAULT_NAMES, Layout, has_class_directories, run_option, split_of

MAX_SHOWN = 5  # names that a message lists
MAX_PROBED = 20  # directories below the data path in which splits are looked for
MIN_SIMILARITY = 0.8  # of a requested name and an existing one


def suggest(root: Path, name: str, layouts: Mapping[str, type[Layout]], *, zip_mode: bool, option: str = "") -> str:
    """Suggest, as the end of an error message, what to do about a missing split.

    Only files and directories whose name contains a word for this split, or is similar to a requested one, are suggested:
    validation must never use training images. If there are none, the names in ``root`` are listed.

    Args:
        name: name of the missing split, or what the user requested instead.
        zip_mode: whether --zip is set.
        option: command-line option that selects the split; by default, the one for the split that ``name`` identifies.
    """
    split = next((split for split in DEFAULT_NAMES if option == run_option(split)), split_of(name))
    option = option or run_option(split or "train")
    try:
        entries = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
        inside = sorted(f"{name}/{path.name}" for path in (root / name).iterdir()) if os.path.isdir(root / name) else []
    except FileNotFoundError:
        return f". {root} does not exist"
    except OSError as error:
        return f". {root} cannot be listed ({error.strerror}); check its permissions"
    missing = _MissingSplit(root, name, split, option, zip_mode, layouts, entries)
    # Without --opts, the message is one of scripts/pack_dataset.py, which has no --zip and holds out no images.
    is_run = option.startswith("--opts")
    advice = (is_run and (missing.find_with_other_flag() or missing.find_class_directories())) or missing.find_renamed(inside)
    # A directory of this name has no class directories, which the message already says.
    if not advice and not inside:
        advice = missing.find_elsewhere() or missing.find_unnamed_archives() if is_run else missing.find_classes_to_pack()
    others = missing.advise_holding_out() if is_run else missing.advise_packing_alone()
    return advice or f"{'' if inside else missing.list_entries()}{others}"


@dataclass(frozen=True)
class _MissingSplit:
    """How a split was looked for, and the names in ``root``. Methods return the end of an error message, or ""."""

    root: Path
    name: str
    split: str | None
    option: str
    zip_mode: bool
    layouts: Mapping[str, type[Layout]]
    entries: list[str]

    def find_with_other_flag(self) -> str:
        """Advice on --zip if the split exists under a default name in a layout that is read only with or without it."""
        for name in DEFAULT_NAMES.get(self.split or "", ()):
            for layout in self.layouts.values():
                if layout.needs_flag != self.zip_mode and (files := layout(self.root, name).files()):
                    advice = f"add --zip, which needs {name}_map.txt too" if layout.needs_flag else "leave out --zip to read it"
                    return f". Found {self._show(files[0].name)}: {advice}"
        return ""

    def find_renamed(self, inside: list[str]) -> str:
        """The option that reads a file or directory whose name, or the name of whose directory, identifies the split.

        Args:
            inside: paths in the directory of the missing split, if there is one.
        """
        files = [path for path in inside if not os.path.isdir(self.root / path) and self._option_for(path)]
        named = [entry for entry in self.entries if self.split and split_of(entry) == self.split]
        similar = get_close_matches(self.name, self.entries, cutoff=MIN_SIMILARITY)
        found = [*files, *named, *(entry for entry in similar if split_of(entry) is None)]
        found = [path for path in found if not (path == self.name and os.path.isdir(self.root / path))]
        found.sort(key=lambda path: not self._option_for(path))
        if not found:
            return ""
        advice = f": {self._option_for(found[0])}" if self._option_for(found[0]) else ", but this format is not read"
        return f". Found {self._show(found[0])}{f' (and {len(found) - 1} more)' if len(found) > 1 else ''}{advice}"

    def _option_for(self, path: str) -> str:
        """Options that read a file or directory as the split; "" if no layout can read it."""
        for layout in self.layouts.values():
            is_read = not layout.needs_flag or self.option.startswith("--opts")
            hint = layout.hint(self.root, path, self.option) if is_read else ""
            if hint and layout.needs_flag == self.zip_mode:
                return hint
            if hint:
                flag = "add --zip" if layout.needs_flag else "leave out --zip"
                return flag if path == self.name else f"{flag}, and {hint}"
        return ""

    def find_elsewhere(self) -> str:
        """Advice if the data path is one level too deep or too high, or if it has class directories."""
        parent = self.root.absolute().parent
        folders = [self.root / entry for entry in self.entries if os.path.isdir(self.root / entry)]
        is_split = split_of(self.root.absolute().name) is not None
        for folder in [*([parent] if is_split else []), *folders[:MAX_PROBED]]:
            if found := dict(self._splits_in(folder)):
                flag = "" if self.zip_mode in found else f", and {'leave out' if self.zip_mode else 'add'} --zip"
                name = found.get(self.zip_mode, next(iter(found.values())))
                if folder != parent and self.split == "val":  # the training images may be elsewhere
                    return f". {folder} has this split: add {self.option} {shlex.quote(f'{folder.name}/{name}')}{flag}"
                reason = f"{self.root} is itself a split" if folder == parent else f"{folder} has this split"
                return f". {reason}: set --data-path {shlex.quote(str(folder))}{flag}"
        if not folders and any(map(has_image_extension, self.entries)):
            others = "otherwise, put every image into a directory named after its class, train/<class>/"
            if self.split == "val":
                command = f"python scripts/predict.py {shlex.quote(str(self.root))} --resume"
                others = f"images without classes are classified by {command} and a checkpoint"
            parent_option = f"set --data-path {shlex.quote(str(parent))}"
            return f"{self.list_entries()}; if it is the directory of a class, {parent_option}; {others}"
        if not has_class_directories(self.root):
            return ""
        return self._advise_dividing([folder.name for folder in folders], "DATA.VAL_FRACTION 0.1")

    def _splits_in(self, folder: Path) -> Iterator[tuple[bool, str]]:
        """Whether each layout in which another directory has the split needs --zip, and the name of the split."""
        names = DEFAULT_NAMES[self.split or "train"]
        for name in reversed(names if self.name == names[0] else (self.name,)):
            yield from ((layout.needs_flag, name) for layout in self.layouts.values() if layout(folder, name).files())

    def find_class_directories(self) -> str:
        """Advice if class directories have names like splits, as ``train`` or ``test tube`` beside ``bus`` and ``car``."""
        folders = [entry for entry in self.entries if os.path.isdir(self.root / entry)]
        named = [folder for folder in folders if split_of(folder)]
        if not named or len(named) == len(folders) or not all(map(self._has_only_images, folders)):
            return ""
        return self._advise_dividing(folders, "DATA.TRAIN_SPLIT . DATA.VAL_FRACTION 0.1")

    def find_classes_to_pack(self) -> str:
        folders = [entry for entry in self.entries if os.path.isdir(self.root / entry)]
        if self.split != "train" or not has_class_directories(self.root):
            return ""
        return f". If {_list_folders(folders)} are class directories, add {self.option} ."

    def _has_only_images(self, folder: str) -> bool:
        """Whether the first entries of a directory are image files, and no class directories or archives."""
        try:
            with os.scandir(self.root / folder) as entries:
                return all(has_image_extension(entry.name) for entry in islice(entries, MAX_PROBED))
        except OSError:
            return False

    def _advise_dividing(self, classes: list[str], keys: str) -> str:
        return (
            f". If {_list_folders(classes)} are class directories, add --opts {keys} to train on nine tenths of their images"
            f"{', or --opts DATA.VAL_SPLIT . to evaluate all of them' if self.split == 'val' else ''}"
        )

    def find_unnamed_archives(self) -> str:
        """Advice if there are archives whose names have no word for a split, such as ``00000.tar``."""
        if self.split != "train" or self.zip_mode:
            return ""
        names = [entry for entry in self.entries if split_of(entry) is None and not os.path.isdir(self.root / entry)]
        for layout in self.layouts.values():
            for name in names if not layout.needs_flag else []:
                if hint := layout.hint(self.root, name, self.option):
                    return f". If {name} has training images, {hint}; to hold out a tenth of them, also DATA.VAL_FRACTION 0.1"
        return ""

    def advise_holding_out(self) -> str:
        """Advice on DATA.VAL_FRACTION if validation images are missing, but there is a training split."""
        readable = [layout for layout in self.layouts.values() if layout.needs_flag == self.zip_mode]
        if self.split != "val" or not any(layout(self.root, "train").files() for layout in readable):
            return ""
        # Beside a validation split that cannot be read, the training split must be given too.
        names = [name for name in DEFAULT_NAMES["val"] if name != "test"]
        is_ambiguous = any(layout(self.root, name).files() for layout in readable for name in names)
        keys = f"{'DATA.TRAIN_SPLIT train ' if is_ambiguous else ''}DATA.VAL_FRACTION 0.1"
        return f". To hold out a tenth of the training images for validation, add --opts {keys}"

    def advise_packing_alone(self) -> str:
        """Advice for scripts/pack_dataset.py if validation images are missing: ``option`` then selects the training split."""
        return f". To pack the training images alone, add {self.option}" if self.split == "val" else ""

    def list_entries(self) -> str:
        if not self.entries:
            return f". {self.root} is empty"
        shown = ", ".join(map(self._show, self.entries[:MAX_SHOWN]))
        more = f" and {len(self.entries) - MAX_SHOWN} more" if len(self.entries) > MAX_SHOWN else ""
        return f". {self.root} contains {shown}{more}"

    def _show(self, name: str) -> str:
        return f"{name}/" if os.path.isdir(self.root / name) else name


def _list_folders(names: list[str]) -> str:
    more = " and the other directories" if len(names) > MAX_SHOWN else ""
    return ", ".join(f"{name}/" for name in names[:MAX_SHOWN]) + more
