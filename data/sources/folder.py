"""Listing of the images in directories, for training, evaluation, packing and prediction."""

import contextlib
import errno
import logging
import os
from array import array
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data.files import (
    IMAGE_EXTENSIONS,
    DataError,
    LeftOut,
    Note,
    check_distinct_names,
    has_image_extension,
    is_system_name,
    read_head,
    suggest_split,
)

MAX_DEPTH = 100  # maximum number of nested directories
UNKNOWN_SIZE = -1  # stands for a size that cannot be determined, such as that of a link to a missing file


@dataclass
class Listing:
    """Images found below a directory, in the order in which they are counted.

    Args:
        root: directory to which names are relative.
        names: paths of the images, relative to ``root``.
        sizes: size of each image file in bytes; ``UNKNOWN_SIZE`` if it cannot be determined.
        directories: path of every directory that was read, by device and inode.
        left_out: what was not read.
        notes: log lines about what was found.
    """

    root: Path
    names: list[str] = field(default_factory=list)
    sizes: array = field(default_factory=lambda: array("q"))
    directories: dict[tuple[int, int], Path] = field(default_factory=dict)
    left_out: LeftOut = field(default_factory=LeftOut)
    notes: list[Note] = field(default_factory=list)
    _inodes: array = field(default_factory=lambda: array("Q"))  # hash of device and inode; 0 if unknown

    def add_directory(self, folder: str) -> list[str]:
        """Add all images below ``root/<folder>``, sorted by name. Links to directories are followed.

        Files and directories that are hidden or created by the operating system are left out, and links to an ancestor
        directory too, since following them would never end.

        Returns:
            The directories below ``folder`` that were read, relative to it.

        Raises:
            DataError: a directory cannot be listed, is nested too deeply, or was already read under another name.
        """
        found: list[tuple[str, int, int]] = []
        nested: list[str] = []

        def walk(parent: Path, name: str, ancestors: frozenset) -> None:
            identity = _identity(parent)
            if identity in ancestors:
                self.left_out.add_kind("are links to a directory that contains them", str(parent))
                return
            if len(ancestors) > MAX_DEPTH:
                raise DataError(f"{parent}: directories are nested more than {MAX_DEPTH} levels deep; move the images up")
            if (other := self.directories.setdefault(identity, parent)) != parent:
                raise DataError(
                    f"{parent} and {other} are the same directory, which would be counted twice; remove one of the links"
                )
            if name != folder:
                nested.append(name[len(folder) :].lstrip("/"))
            for entry in list_directory(parent):
                path = f"{name}/{entry.name}" if name else entry.name
                if is_system_name(entry.name):
                    self.left_out.add_kind("system", path)
                elif is_directory(entry):
                    if entry.name.startswith("."):
                        self.left_out.add_kind("are hidden", path)
                    else:
                        walk(parent / entry.name, path, ancestors | {identity})
                elif not has_image_extension(entry.name):
                    self.left_out.add(path, lambda entry=entry: read_head(entry.path))
                elif entry.name.startswith("."):
                    self.left_out.add_kind("are hidden", path)
                else:
                    found.append((path, *_size_and_inode(entry)))

        root_identity = {_identity(self.root)} if folder else set()
        walk(self.root / folder, folder, frozenset(root_identity))
        for name, size, inode in sorted(found):
            self.names.append(name)
            self.sizes.append(size)
            self._inodes.append(inode)
        return nested

    def check_links(self) -> None:
        """Check that no two images are links to the same file.

        Raises:
            DataError: an image would be counted twice.
        """
        inodes = np.frombuffer(self._inodes, dtype=np.uint64)
        order = np.argsort(inodes, kind="stable")
        equal = (inodes[order][1:] == inodes[order][:-1]) & (inodes[order][1:] > 0)
        for position in np.flatnonzero(equal):
            one, other = (self.root / self.names[order[position + step]] for step in (0, 1))
            if _same_file(one, other):
                raise DataError(
                    f"{other} and {one} are links to the same image, which would be counted twice; remove one of them"
                )


def list_images(root: Path) -> Listing:
    """List the images below a directory without classes.

    Raises:
        DataError: the directory cannot be listed, or an image would be listed twice.
    """
    listing = Listing(root)
    listing.add_directory("")
    listing.check_links()
    listing.notes = listing.left_out.notes(root)
    return listing


def list_classes(root: Path, left_out: LeftOut) -> list[str]:
    """Names of the class directories in ``root``, sorted.

    Args:
        left_out: receives the files beside the class directories, and hidden directories.

    Raises:
        DataError: there is no such directory, or it has no class directories.
    """
    if not os.path.isdir(root):
        raise DataError(f"{root}: no such directory; set --data-path to the parent of train/ and val/{suggest_split(root)}")
    classes = []
    for entry in list_directory(root):
        if is_system_name(entry.name):
            left_out.add_kind("system", entry.name)
        elif is_directory(entry):
            if entry.name.startswith("."):
                left_out.add_kind("are hidden", entry.name)
            else:
                classes.append(entry.name)
        elif has_image_extension(entry.name):
            left_out.add_kind("lie beside the class directories", entry.name)
        else:
            left_out.add(entry.name, lambda entry=entry: read_head(entry.path))
    if not classes:
        raise DataError(
            f"{root}: no class directories; put every image into a directory named after its class, {root.name}/<class>/"
            f"{suggest_split(root)}"
        )
    return sorted(classes)


def list_class(listing: Listing, name: str, classes: frozenset[str]) -> int:
    """Add the images of one class to a listing. Returns their number.

    Raises:
        DataError: the class has no images.
    """
    count, others = len(listing.names), listing.left_out.images.total()
    nested = listing.add_directory(name)
    if twins := [folder for folder in nested if folder.rpartition("/")[2] in classes]:
        text = f"{name}/{twins[0]} has the name of a class, but its images count as {name}"
        listing.notes.append((logging.WARNING, f"{listing.root}: {text}"))
    if len(listing.names) == count:
        left_out = listing.left_out.extensions() if listing.left_out.images.total() > others else ""
        raise DataError(
            f"{listing.root / name} has no images ({', '.join(IMAGE_EXTENSIONS)}); add some, or remove the directory"
            f"{f'. Left out so far: {left_out}' if left_out else ''}"
        )
    return len(listing.names) - count


def list_directory(folder: Path) -> list[os.DirEntry]:
    """List a directory.

    Raises:
        DataError: the directory cannot be listed completely.
    """
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise _listing_error(folder, error) from None


def is_directory(entry: os.DirEntry) -> bool:
    """Whether an entry is a directory, or a link to one.

    Raises:
        DataError: the entry cannot be accessed.
    """
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a symbolic link that refers to itself
            return False
        raise _listing_error(entry.path, error) from None


def find_linked_class(one: Path, other: Path, classes: list[str]) -> str:
    """First class whose directory is the same in two splits; "" if there is none."""
    for name in classes:
        with contextlib.suppress(OSError):
            if os.path.samefile(one / name, other / name):
                return name
    return ""


def _identity(folder: Path) -> tuple[int, int]:
    """Device and inode number of a directory, which are the same for every link to it.

    Raises:
        DataError: the directory cannot be accessed.
    """
    try:
        status = os.stat(folder)
    except OSError as error:
        raise _listing_error(folder, error) from None
    return status.st_dev, status.st_ino


def _size_and_inode(entry: os.DirEntry) -> tuple[int, int]:
    """Size of a file in bytes, and a hash of its device and inode, which is the same for every link to it.

    Raises:
        DataError: the file cannot be accessed, unless it is a link to a missing file.
    """
    try:
        status = entry.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return UNKNOWN_SIZE, 0
        raise _listing_error(entry.path, error) from None
    return status.st_size, (status.st_ino ^ status.st_dev << 40) & (2**64 - 1)


def _same_file(one: Path, other: Path) -> bool:
    """Whether two paths are links to one file. Inode numbers alone may be equal by chance on network file systems."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    return os.path.samefile(one, other) and os.stat(one).st_nlink > 1


def _listing_error(path: str | Path, error: OSError) -> DataError:
    return DataError(f"{path} cannot be listed ({error.strerror}); check its permissions and the disk")


def class_notes(listing: Listing, classes: list[str]) -> list[Note]:
    """Log lines about the classes of a listing and about what was left out."""
    return [*check_distinct_names(classes, listing.root), *listing.notes, *listing.left_out.notes(listing.root)]
