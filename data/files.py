"""Rules for all readers of data: which files are images, which are left out, and how what is left out is reported."""

import logging
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePosixPath

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
MAX_FILE_SIZE = 2**28  # bytes; larger image files are rejected
MAX_COMPRESSION_RATIO = 1000  # maximum ratio of decompressed to compressed size of an archive entry
MAX_PROBES = 20  # files per unknown extension whose content is tested
HEAD = 32  # bytes that ``is_image_content`` needs
_SIGNATURES = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM.{4}\0{4}|II\*\0|MM\0\*|RIFF.{4}WEBP|P[1-6]\s[\d\s#]"
    rb"|.{4}ftyp(avif|avis|hei[cxfs]|mif1|msf1)|\0\0\0\x0cJXL |\xff\x0a|\0\0\0\x0cjP  ",
    re.DOTALL,
)
# Extension of an image format by the first bytes of a file.
_EXTENSIONS = {
    **{b"\x89PNG": ".png", b"BM": ".bmp", b"II*\0": ".tiff", b"MM\0*": ".tiff", b"RIFF": ".webp"},
    **{b"P2": ".pgm", b"P5": ".pgm", b"P3": ".ppm", b"P6": ".ppm"},
}

SYSTEM = "system"  # reason of ``LeftOut`` for files of the operating system

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


def check_member_name(archive: Path, name: str) -> None:
    """Check that the name of an archive's entry is a path inside the archive.

    Raises:
        DataError: it points outside.
    """
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
        raise DataError(f"{archive}: {name!r} points outside the archive; pack it again without such names")


def is_image_content(head: bytes) -> bool:
    """Whether the first ``HEAD`` bytes of a file are those of an image format, supported or not."""
    return _SIGNATURES.match(head) is not None


def image_extension(content: bytes) -> str:
    """Extension for an image file without one; ".jpg" if its format is not recognised."""
    return next((extension for start, extension in _EXTENSIONS.items() if content.startswith(start)), ".jpg")


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


def file_stamp(status: os.stat_result) -> tuple[int, int]:
    """Size and mtime of an archive. Unlike its ctime, they do not change if an open archive is deleted or renamed."""
    return status.st_size, status.st_mtime_ns


def check_unchanged(path: str | Path, status: os.stat_result, stamp: tuple[int, int] | None) -> None:
    """Check that an archive is the one whose images were listed.

    Args:
        stamp: its ``file_stamp`` at that time; None if it did not exist.

    Raises:
        ValueError: the archive was changed or replaced, so that other images may be at the indexed positions.
    """
    if file_stamp(status) != stamp:
        raise ValueError(f"{path} was changed after its images were listed; start the command again")


class LeftOut:
    """Files and directories that a scan does not read, counted by extension or by reason, with an example of each.

    Files that could be images lead to warnings: they have the extension of an image format that is not read, or an unknown
    extension and the content of an image. Everything else leads to an informational line.
    """

    def __init__(self) -> None:
        self._extensions: Counter[str] = Counter()  # files that are not read because of their extension ("" for none)
        self._image_extensions: set[str] = set()  # extensions of files that could be images
        self._reasons: Counter[str] = Counter()
        self._examples: dict[str, str] = {}  # by extension or reason

    def add(self, name: str, read: Callable[[], bytes]) -> None:
        """Count a file that is not read because of its extension.

        Args:
            read: returns the first ``HEAD`` bytes of the file.
        """
        extension = PurePosixPath(name).suffix.lower()
        self._extensions[extension] += 1
        self._examples.setdefault(extension, name)
        if extension in OTHER_IMAGE_EXTENSIONS or (
            extension not in self._image_extensions and self._extensions[extension] <= MAX_PROBES and is_image_content(read())
        ):
            self._image_extensions.add(extension)

    def add_reason(self, reason: str, name: str) -> None:
        """Count an entry that is not read for another reason.

        Args:
            reason: ``SYSTEM``, or the predicate of a warning, as in "are hidden".
        """
        self._reasons[reason] += 1
        self._examples.setdefault(reason, name)

    def extensions(self) -> str:
        """Number of files that could be images, by extension, as in "12 .gif, 3 without extension"; "" if there are none."""
        images = [(name, count) for name, count in self._extensions.most_common() if name in self._image_extensions]
        return ", ".join(f"{count} {extension or 'without extension'}" for extension, count in images)

    def notes(self, source: str | Path) -> list[Note]:
        """Log lines that account for everything that was left out."""
        notes: list[Note] = []
        by_count = [extension for extension, _ in self._extensions.most_common()]
        if images := [extension for extension in by_count if extension in self._image_extensions]:
            text = (
                f"{source}: left out, but images by extension or content: {self.extensions()}, such as "
                f"{self._examples[images[0]]}; convert them, or rename them if their format is supported (extensions: "
                f"{', '.join(IMAGE_EXTENSIONS)})"
            )
            notes.append((logging.WARNING, text))
        for reason, count in self._reasons.items():
            example = self._examples[reason]
            if reason == SYSTEM:
                notes.append((logging.INFO, f"{source}: ignored files of the operating system: {count}, such as {example}"))
            else:
                notes.append((logging.WARNING, f"{source}: left out, since they {reason}: {count}, such as {example}"))
        if other := [extension for extension in by_count if extension not in self._image_extensions]:
            count = sum(self._extensions[extension] for extension in other)
            example = self._examples[other[0]]
            notes.append((logging.INFO, f"{source}: ignored files that are not images: {count}, such as {example}"))
        return notes
