"""Class names of a split: the list beside archives, and checks of the names."""

import itertools
import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from data.files import DataError, Note

CLASS_NAMES_FILE = "classes.txt"  # next to archives: one class name per line
T = TypeVar("T")


def is_class_id(text: str) -> bool:
    """Whether a text is a decimal number of at most 18 digits."""
    return re.fullmatch(r"[0-9]{1,18}", text) is not None


def numbered(count: int) -> list[str]:
    """Class names "0", "1", ..., as used for archives without ``classes.txt``."""
    return [str(number) for number in range(count)]


def read_listing(path: Path, remedy: str) -> str:
    """Read a text file of names, which need not be UTF-8.

    Split it with ``split("\\n")``: ``splitlines`` would also split at characters that names may contain.

    Args:
        remedy: end of the error message.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig", errors="surrogateescape")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); {remedy}") from None


def read_class_names(path: Path) -> list[str]:
    """Read the lines of ``classes.txt``.

    Raises:
        DataError: the file cannot be read.
    """
    return read_listing(path, "it must list the class names").removesuffix("\n").split("\n")


def write_class_names(path: Path, classes: Sequence[str]) -> None:
    """Write ``classes.txt``.

    Raises:
        DataError: a class name contains a line break.
        OSError: the file cannot be written.
    """
    if invalid := next((name for name in classes if re.search(r"[\n\r]", name)), None):
        raise DataError(f"{invalid!r}: {CLASS_NAMES_FILE} cannot contain a class with a line break; rename it")
    path.write_text("".join(f"{name}\n" for name in classes), encoding="utf-8", errors="surrogateescape")


def class_lists(folder: Path, root: Path) -> list[Path]:
    """Paths at which ``classes.txt`` is looked for: next to the archives in ``folder``, then in ``root``."""
    return list(dict.fromkeys((folder / CLASS_NAMES_FILE, root / CLASS_NAMES_FILE)))


def find_listing(listings: Sequence[Path]) -> Path | None:
    """The first file of ``listings`` that exists; None if there is none."""
    return next((path for path in listings if path.is_file()), None)


def list_classes(listings: Sequence[Path]) -> list[str] | None:
    """Class names in the file that ``find_listing`` returns; None if there is none."""
    listing = find_listing(listings)
    return read_class_names(listing) if listing else None


def class_names(listings: Sequence[Path], labels: Sequence[int], source: Path) -> list[str]:
    """Class names by class id: the lines of ``classes.txt`` if it exists, else numbers.

    Args:
        listings: result of ``class_lists``; the first file that exists is read.
        source: what contains the labels, for messages.

    Raises:
        DataError: there are no images, a class without images, or a list of classes that does not match the labels.
    """
    if not labels:
        raise DataError(f"{source} has no images; pack the data again")
    used_ids = set(labels)
    first_unused = next(class_id for class_id in itertools.count() if class_id not in used_ids)
    gap = (
        f"{source} has no image of class {first_unused}; class ids must start at 0, without gaps: pack both splits with or "
        "without this class"
    )
    if first_unused < max(used_ids):  # checked first: the lists below grow with the largest class id
        raise DataError(gap)
    listing = find_listing(listings)
    classes = read_class_names(listing) if listing else numbered(first_unused)
    if (duplicate := first_duplicate(classes)) is not None:
        raise DataError(f"{listing}: duplicate class name {duplicate}; give every class a unique name")
    if first_unused > len(classes):
        raise DataError(
            f"{source} has class id {first_unused - 1}, but {listing} has {len(classes)} class names; add the missing ones"
        )
    if first_unused < len(classes):
        raise DataError(gap)
    return classes


def first_duplicate(values: Iterable[T]) -> T | None:
    """The first value that occurred before; None if all differ. Linear in the number of values, which may be 10^6."""
    seen = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return None


def normalise(name: str) -> str:
    """Unicode normalisation form C: copies from macOS often have form D."""
    return unicodedata.normalize("NFC", name)


def first_twins(names: Iterable[str], form: Callable[[str], str] = normalise) -> tuple[str, str] | None:
    """The first two different names of the same normal form; None if there are none."""
    seen: dict[str, str] = {}
    for name in names:
        if (other := seen.setdefault(form(name), name)) != name:
            return other, name
    return None


def check_distinct_names(classes: Sequence[str], source: str | Path) -> list[Note]:
    """Check that no two classes have names that look the same.

    Returns:
        A warning if two names differ only in upper and lower case.

    Raises:
        DataError: two names differ only in Unicode normalisation, as when a directory was copied from macOS.
    """
    if twins := first_twins(classes):
        raise DataError(
            f"{source}: the classes {twins[0]!a} and {twins[1]!a} differ only in Unicode normalisation; merge them, or "
            "rename one"
        )
    if twins := first_twins(classes, str.casefold):
        return [(logging.WARNING, f"{source}: the classes {twins[0]} and {twins[1]} differ only in upper and lower case")]
    return []
