"""Remedies for a missing split: what lies in its place, and the option with which the next command reads it."""

import os
import shlex
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

from data.sources.layout import DEFAULT_NAMES, Layout, split_of

MAX_SHOWN = 5  # names that a message lists
MAX_PROBED = 20  # directories below the data path in which splits are looked for

Layouts = Mapping[str, type[Layout]]


def suggest(root: Path, name: str, layouts: Layouts, *, zip_mode: bool, option: str = "") -> str:
    """Suggest, as the end of an error message, what to do about a missing split.

    Only files and directories whose name contains a word for this split are suggested: validation must never use training
    images. If there are none, the names in ``root`` are listed.

    Args:
        name: name of the missing split, or what the user requested instead.
        zip_mode: whether --zip is set.
        option: command-line option that selects the split; by default, the one for the split that ``name`` identifies.
    """
    split = _split_of_option(option) or split_of(name)
    option = option or f"--opts DATA.{(split or 'train').upper()}_SPLIT"
    try:
        entries = sorted(path.name for path in root.iterdir() if not path.name.startswith("."))
        inside = sorted(f"{name}/{path.name}" for path in (root / name).iterdir()) if os.path.isdir(root / name) else []
    except FileNotFoundError:
        return f". {root} does not exist"
    except OSError as error:
        return f". {root} cannot be listed ({error.strerror}); check its permissions"
    is_run = option.startswith("--opts")  # of main.py; scripts/pack_dataset.py reads only directories
    if split and is_run and (other := _find_with_other_flag(root, split, layouts, zip_mode=zip_mode)):
        return other
    related = [entry for entry in inside if not os.path.isdir(root / entry)]
    if split:
        related += [entry for entry in entries if entry != name and split_of(entry) == split]
    related += [entry for entry in get_close_matches(name, entries, cutoff=0.8) if split_of(entry) in (None, split)]
    found = {entry: remedy for entry in related if (remedy := _remedy(root, entry, layouts, zip_mode=zip_mode, option=option))}
    if found:
        entry, remedy = next(iter(found.items()))
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        return f". Found {_show(root, entry)}{more}: {remedy}"
    unreadable = f". Found {_show(root, related[0])}, but this format is not read" if related else ""
    elsewhere = _find_elsewhere(root, entries, split, layouts, zip_mode=zip_mode) if is_run else ""
    return unreadable or elsewhere or _list_entries(root, entries)


def _split_of_option(option: str) -> str | None:
    return next((split for split in DEFAULT_NAMES if option.endswith(f"DATA.{split.upper()}_SPLIT")), None)


def _remedy(root: Path, name: str, layouts: Layouts, *, zip_mode: bool, option: str) -> str:
    """How to read a file or directory as the split; "" if no layout can read it."""
    for layout in layouts.values() if option.startswith("--opts") else [layouts["folder"]]:
        if hint := layout.hint(root, name, option):
            if layout.needs_flag == zip_mode:
                return hint
            return f"add --zip, and {hint}" if layout.needs_flag else f"leave out --zip, and {hint}"
    return ""


def _find_with_other_flag(root: Path, split: str, layouts: Layouts, *, zip_mode: bool) -> str:
    """Advice on --zip if the split exists under a default name in a layout that is read only with or without it; else ""."""
    for name in DEFAULT_NAMES[split]:
        for layout in layouts.values():
            if layout.needs_flag != zip_mode and (files := layout(root, name).files()):
                advice = f"add --zip, which needs {name}_map.txt too" if layout.needs_flag else "leave out --zip to read it"
                return f". Found {_show(root, files[0].name)}: {advice}"
    return ""


def _find_elsewhere(root: Path, entries: list[str], split: str | None, layouts: Layouts, *, zip_mode: bool) -> str:
    """Advice if the data path is one level too deep or too high, or if it has class directories; else ""."""
    folders = [entry for entry in entries if os.path.isdir(root / entry)]
    names = DEFAULT_NAMES[split or "train"]
    parent = root.absolute().parent
    for folder in [*([parent] if split_of(root.absolute().name) else []), *(root / entry for entry in folders[:MAX_PROBED])]:
        flags = {layout.needs_flag for layout in layouts.values() for name in names if layout(folder, name).files()}
        if flags:
            flag = "" if zip_mode in flags else f", and {'leave out' if zip_mode else 'add'} --zip"
            reason = f"{root} is itself a split" if folder == parent else f"{folder} has this split"
            return f". {reason}: set --data-path {shlex.quote(str(folder))}{flag}"
    if split == "val" and layouts["folder"](root, "train").files():
        return f"{_list_entries(root, entries)}. To hold out a tenth of the training images, add --opts DATA.VAL_FRACTION 0.1"
    if len(folders) > 1 and not any(map(split_of, entries)):
        shown = ", ".join(f"{entry}/" for entry in folders[:MAX_SHOWN])
        return (
            f". If {shown}{' and the other directories' if len(folders) > MAX_SHOWN else ''} are class directories, add "
            f"--opts DATA.VAL_FRACTION 0.1 to train on nine tenths of their images"
            f"{', or --opts DATA.VAL_SPLIT . to evaluate all images' if split == 'val' else ''}"
        )
    return ""


def _list_entries(root: Path, entries: list[str]) -> str:
    shown = ", ".join(_show(root, entry) for entry in entries[:MAX_SHOWN])
    more = f" and {len(entries) - MAX_SHOWN} more" if len(entries) > MAX_SHOWN else ""
    return f". {root} contains {shown or 'nothing else'}{more}"


def _show(root: Path, name: str) -> str:
    return f"{name}/" if os.path.isdir(root / name) else name
