"""Images in directories: the layout ``<split>/<class>/<image>``, and the images below any directory, for prediction."""

import contextlib
import errno
import logging
import os
import shlex
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from data.files import SYSTEM, DataError, FileKind, LeftOut, Note, classify, image_extensions, is_system_name, read_head
from data.index import UNKNOWN_SIZE, Index, Scan, create_index
from data.sources.class_list import check_distinct_names
from data.sources.layout import Layout, MissingSplitError
from utils.progress import progress

MAX_QUICK_ENTRIES = 10_000  # entries of directories that ``count_files`` reads beyond the number of files
MAX_DEPTH = 100  # maximum number of nested directories


class Folder(Layout):
    """Directories ``<split>/<class>/<image>``, with classes sorted by name."""

    title = "directories"

    def __init__(self, root: Path, split: str):
        self.source = self.path = root / split
        self.archives = []

    def files(self) -> list[Path]:
        return [self.path] if os.path.isdir(self.path) else []

    @staticmethod
    def hint(root: Path, name: str, option: str) -> str:
        if not os.path.isdir(root / name):
            return ""
        condition = "if it contains the validation images, " if "test" in name.lower() else ""
        return f"{condition}add {option} {shlex.quote(name)}"

    def list_classes(self) -> list[str]:
        with _listing_errors(self.path):
            return Listing(self.path).find_classes()

    def count_files(self, limit: int) -> int | None:
        num_files, num_entries, pending = 0, 0, [self.path]
        while pending:
            with _listing_errors(self.path), os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if _is_directory(entry):
                        pending.append(Path(entry.path))
                    else:
                        num_files += 1
                    num_entries += 1
                    if num_files >= limit or num_entries >= limit + MAX_QUICK_ENTRIES:
                        return None
        return num_files

    def scan(self) -> Scan:
        """List the images.

        Raises:
            DataError: no such directory, no class directories, a class without images, a directory that cannot be listed, an
                image or a directory that would be counted twice, or two classes whose names look the same.
        """
        if not self.files():
            raise MissingSplitError(f"{self.path}: no such directory")
        listing, labels = Listing(self.path), array("i")
        with _listing_errors(self.path):
            classes = listing.find_classes()
            names = frozenset(classes)
            for label, name in enumerate(progress(classes, len(classes), f"{self.path}: classes listed")):
                labels.extend([label] * listing.add_class(name, names))
            listing.check_links()
        index = create_index(self.path, classes, listing.names, labels, sizes=listing.sizes)
        notes = [*check_distinct_names(classes, self.path), *listing.notes()]
        return Scan(index, [self.path, *listing.directories.values()], notes)


class Listing:
    """Images found below a directory, in the order in which they are counted. Names are relative to ``root``.

    Attributes:
        sizes: size of each image file in bytes; ``UNKNOWN_SIZE`` if it cannot be determined.
        directories: path of every directory that was read, by device and inode.
    """

    def __init__(self, root: Path):
        self.root = root
        self.names: list[str] = []
        self.sizes = array("q")
        self.directories: dict[tuple[int, int], Path] = {}
        self._inodes = array("Q")  # hash of device and inode; 0 if unknown
        self._left_out = LeftOut()
        self._nested_classes: list[Note] = []

    def notes(self) -> list[Note]:
        """Log lines about what was found, and about everything that was left out."""
        return [*self._nested_classes, *self._left_out.notes(self.root)]

    def find_classes(self) -> list[str]:
        """Names of the class directories in ``root``, sorted.

        Raises:
            DataError: there are none.
        """
        classes = []
        for _, name, is_folder in self._entries(self.root, ""):
            if is_folder:
                classes.append(name)
            else:
                self._left_out.add_reason("lie beside the class directories", name)
        if not classes:
            raise MissingSplitError(
                f"{self.root}: no class directories; put every image into a directory named after its class, "
                f"{self.root.name}/<class>/"
            )
        return sorted(classes)

    def add_class(self, name: str, classes: frozenset[str]) -> int:
        """Add the images of one class. Returns their number.

        Raises:
            DataError: the class has no images; see also ``add_directory``.
        """
        num_images, left_out = len(self.names), self._left_out.extensions()
        nested = self.add_directory(name)
        if len(self.names) == num_images:
            others = self._left_out.extensions()
            raise DataError(
                f"{self.root / name} has no images ({', '.join(image_extensions())}); add some, or remove the directory"
                f"{f'. Left out so far: {others}' if others != left_out else ''}"
            )
        if twins := [path for path in nested if path.rpartition("/")[2] in classes]:
            text = f"{twins[0]} has the name of a class, but its images count as {name}"
            self._nested_classes.append((logging.WARNING, f"{self.root}: {text}"))
        return len(self.names) - num_images

    def add_directory(self, folder: str) -> list[str]:
        """Add all images below ``root/<folder>``, sorted by name. Links to directories are followed.

        Files and directories that are hidden or created by the operating system are left out, and links to an ancestor
        directory too, since following them would never end.

        Returns:
            The directories below ``folder`` that were read, relative to ``root``.

        Raises:
            DataError: a directory is nested too deeply, or was already read under another name.
            OSError: a directory cannot be listed.
        """
        found: list[tuple[str, int, int]] = []
        nested: list[str] = []

        def walk(parent: Path, name: str, ancestors: frozenset) -> None:
            identity = _identity(parent)
            if identity in ancestors:
                self._left_out.add_reason("are links to a directory that contains them", str(parent))
                return
            if len(ancestors) > MAX_DEPTH:
                raise DataError(f"{parent}: directories are nested more than {MAX_DEPTH} levels deep; move the images up")
            if (other := self.directories.setdefault(identity, parent)) != parent:
                raise DataError(
                    f"{parent} and {other} are the same directory, which would be counted twice; remove one of the links"
                )
            if name != folder:
                nested.append(name)
            for entry, path, is_folder in self._entries(parent, name):
                if is_folder:
                    walk(parent / entry.name, path, ancestors | {identity})
                else:
                    found.append((path, *_size_and_inode(entry)))

        walk(self.root / folder, folder, frozenset({_identity(self.root)} if folder else ()))
        for name, size, inode in sorted(found):
            self.names.append(name)
            self.sizes.append(size)
            self._inodes.append(inode)
        return nested

    def _entries(self, folder: Path, name: str) -> Iterator[tuple[os.DirEntry, str, bool]]:
        """Yield the directories and images in ``folder``, which is ``root/<name>``; everything else is left out.

        Yields:
            An entry, its path relative to ``root``, and whether it is a directory.
        """
        with os.scandir(folder) as iterator:
            entries = list(iterator)
        for entry in entries:
            path = f"{name}/{entry.name}" if name else entry.name
            if is_system_name(entry.name):
                self._left_out.add_reason(SYSTEM, path)
                continue
            is_folder = _is_directory(entry)
            kind = FileKind.IMAGE if is_folder else classify(entry.name, partial(read_head, entry.path))
            if kind is not FileKind.IMAGE:
                self._left_out.add(path, kind)
            elif entry.name.startswith("."):
                self._left_out.add_reason("are hidden", path)
            else:
                yield entry, path, is_folder

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
    with _listing_errors(root):
        listing.add_directory("")
        listing.check_links()
    return listing


def find_linked_class(one: Index, other: Index) -> str:
    """First class whose directory is the same in two splits; "" if there is none."""
    for name in one.classes:
        with contextlib.suppress(OSError):
            if os.path.samefile(one.source / name, other.source / name):
                return name
    return ""


@contextlib.contextmanager
def _listing_errors(root: Path) -> Iterator[None]:
    """Raise DataError for any error of the file system: a directory is listed completely, or not at all."""
    try:
        yield
    except OSError as error:
        path = error.filename or root
        raise DataError(f"{path} cannot be listed ({error.strerror}); check its permissions and the disk") from None


def _is_directory(entry: os.DirEntry) -> bool:
    """Whether an entry is a directory, or a link to one."""
    try:
        return entry.is_dir()
    except OSError as error:
        if error.errno == errno.ELOOP:  # a symbolic link that refers to itself
            return False
        raise


def _identity(folder: Path) -> tuple[int, int]:
    """Device and inode number of a directory, which are the same for every link to it."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _size_and_inode(entry: os.DirEntry) -> tuple[int, int]:
    """Size of a file in bytes, and a hash of its device and inode, which is the same for every link to it."""
    try:
        status = entry.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):  # a link to a missing file
            return UNKNOWN_SIZE, 0
        raise
    return status.st_size, (status.st_ino ^ status.st_dev << 40) & (2**64 - 1)


def _same_file(one: Path, other: Path) -> bool:
    """Whether two paths are links to one file. Inode numbers alone may be equal by chance on network file systems."""
    return os.path.realpath(one) == os.path.realpath(other) or (os.path.samefile(one, other) and os.stat(one).st_nlink > 1)
