"""Rules for all readers of data: which files are images, which are left out, and how what is left out is reported."""

import logging
import os
import re
from collections import Counter
from collections.abc import Callable
from enum import Enum
from functools import cache
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

# Extensions of files that are read as images; see ``image_extensions`` for those that need a package.
IMAGE_EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),
    *(".jpe", ".jfif", ".mpo", ".gif", ".pbm", ".pnm"),
)
AVIF_EXTENSIONS = (".avif",)
HEIC_EXTENSIONS = (".heic", ".heif", ".hif")
# Extensions of images that are not read, among them raw files of cameras, whose content may be that of a TIFF file.
OTHER_IMAGE_EXTENSIONS = {
    *AVIF_EXTENSIONS,
    *HEIC_EXTENSIONS,
    *(".jp2", ".j2k", ".jxl", ".tga", ".exr", ".hdr", ".dcm", ".svg", ".psd", ".ico", ".raw", ".dng", ".cr2", ".cr3"),
    *(".nef", ".nrw", ".arw", ".sr2", ".srw", ".orf", ".rw2", ".raf", ".pef", ".3fr", ".kdc", ".dcr", ".erf", ".mrw", ".mef"),
}
# Extensions of files whose content is not tested, since they accompany images and may be as many.
NO_IMAGE_EXTENSIONS = {
    *(".txt", ".json", ".jsonl", ".xml", ".csv", ".tsv", ".yaml", ".yml", ".md", ".html", ".htm", ".log", ".db", ".cls"),
    *(".npy", ".npz", ".mat", ".h5", ".pkl", ".pt", ".pth", ".parquet", ".arrow", ".zip", ".tar", ".gz", ".py", ".sh"),
    *(".xmp", ".aae", ".mov", ".mp4", ".avi"),
}
# Extensions of copies, and of files that are not yet complete. They are not read, even if their content is that of an image.
COPY_EXTENSIONS = {
    *(".bak", ".backup", ".old", ".orig", ".tmp", ".temp", ".part", ".partial", ".crdownload", ".download", ".swp"),
}
# Files and directories that operating systems, file managers and network disks create, often with copies of images.
SYSTEM_NAMES = {
    *("@eadir", "#recycle", "#snapshot", "@recycle", "@tmp", "$recycle.bin", "system volume information", "lost+found"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini", ".ds_store", ".appledouble", ".apdisk", ".spotlight-v100", "__macosx"),
    *(".trashes", ".fseventsd", ".thumbnails", ".snapshot", ".git", ".directory", ".ipynb_checkpoints"),
}
MAX_FILE_SIZE = 2**28  # bytes; larger image files are rejected
MAX_COMPRESSION_RATIO = 1000  # maximum ratio of decompressed to compressed size of an archive entry
HEAD = 32  # bytes of a file that identify the format of an image
# The beginning of files of the formats that are read, and of others.
_READ_CONTENT = re.compile(rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|BM.{4}\0{4}|II\*\0|MM\0\*|RIFF.{4}WEBP", re.DOTALL)
AVIF_CONTENT = re.compile(rb".{4}ftyp(?:avif|avis|(?:mif1|msf1).{0,16}avif)", re.DOTALL)
HEIC_CONTENT = re.compile(rb".{4}ftyp(?:hei[cxfms]|hev[cxms]|(?:mif1|msf1)(?!.{0,16}avif))", re.DOTALL)
_OTHER_CONTENT = re.compile(rb"\0\0\0\x0cJXL |\xff\x0a|\0\0\0\x0cjP  |P[1-6]\s[\d\s#]", re.DOTALL)  # text may start with P1
HEIC_REMEDY = "to read HEIC images, run pip install pillow-heif"
AVIF_REMEDY = "to read AVIF images, run pip install --upgrade 'pillow>=11.3'"
# Extension of an image format by the first bytes of a file.
_EXTENSIONS = {
    **{b"\x89PNG": ".png", b"BM": ".bmp", b"II*\0": ".tiff", b"MM\0*": ".tiff", b"RIFF": ".webp"},
    **{b"P2": ".pgm", b"P5": ".pgm", b"P3": ".ppm", b"P6": ".ppm", b"GIF8": ".gif"},
}

IMAGES_LEFT_OUT = "left out, but images by extension or content"
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


class FileKind(Enum):
    """What a file in a data set is; only images are read."""

    IMAGE = "an image in a format that is read"
    OTHER_IMAGE = "an image in another format, or a copy of an image"
    NO_IMAGE = "not an image"


@cache
def reads_avif() -> bool:
    """Whether the installed version of Pillow decodes AVIF images."""
    return find_spec("PIL._avif") is not None


@cache
def reads_heic() -> bool:
    """Whether pillow-heif, which decodes HEIC images, is installed."""
    return find_spec("pillow_heif") is not None


@cache
def image_extensions() -> tuple[str, ...]:
    """Extensions of the files that are read as images on this machine."""
    return IMAGE_EXTENSIONS + AVIF_EXTENSIONS * reads_avif() + HEIC_EXTENSIONS * reads_heic()


def has_image_extension(name: str) -> bool:
    return name.lower().endswith(image_extensions())


def classify(name: str, read: Callable[[], bytes]) -> FileKind:
    """Decide by the extension of a file whether it is an image; if the extension is unknown or missing, by its content.

    Args:
        read: returns the first ``HEAD`` bytes of the file.
    """
    if has_image_extension(name):
        return FileKind.IMAGE
    extension = PurePosixPath(name).suffix.lower()
    if extension in OTHER_IMAGE_EXTENSIONS:
        return FileKind.OTHER_IMAGE
    if extension in NO_IMAGE_EXTENSIONS:
        return FileKind.NO_IMAGE
    head = read()
    is_read = _READ_CONTENT.match(head)
    if is_read and not name.endswith("~") and extension not in COPY_EXTENSIONS:
        return FileKind.IMAGE
    formats = (AVIF_CONTENT, HEIC_CONTENT, _OTHER_CONTENT)
    return FileKind.OTHER_IMAGE if is_read or any(content.match(head) for content in formats) else FileKind.NO_IMAGE


def check_member_name(archive: Path, name: str) -> None:
    """Check that the name of an archive's entry is a path inside the archive.

    Raises:
        DataError: it points outside.
    """
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
        raise DataError(f"{archive}: {name!r} points outside the archive; pack it again without such names")


def image_extension(content: bytes) -> str:
    """Extension for an image file without one; ".jpg" if its format is not recognised."""
    if AVIF_CONTENT.match(content) or HEIC_CONTENT.match(content):
        return ".avif" if AVIF_CONTENT.match(content) else ".heic"
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

    Files that could be images lead to warnings, everything else to an informational line.
    """

    def __init__(self) -> None:
        self._images: Counter[str] = Counter()  # images, by extension ("" for none)
        self._num_others = 0  # files that are no images
        self._reasons: Counter[str] = Counter()
        self._examples: dict[str, str] = {}  # by reason, and by extension of images
        self._other_example = ""

    def add(self, name: str, kind: FileKind) -> None:
        """Count a file that is not read because of its format."""
        extension = PurePosixPath(name).suffix.lower()
        if kind is FileKind.NO_IMAGE:
            self._num_others += 1
            self._other_example = self._other_example or name
        else:
            self._images[extension] += 1
            self._examples.setdefault(extension, name)

    def add_reason(self, reason: str, name: str) -> None:
        """Count an entry that is not read for another reason.

        Args:
            reason: ``SYSTEM``, or the predicate of a warning, as in "are hidden".
        """
        self._reasons[reason] += 1
        self._examples.setdefault(reason, name)

    def extensions(self) -> str:
        """Number of files that could be images, by extension, as in "12 .jxl, 3 without extension"; "" if there are none."""
        return ", ".join(f"{count} {extension or 'without extension'}" for extension, count in self._images.most_common())

    def remedy(self) -> str:
        """What to do with the files that could be images."""
        remedies = []
        if not self._images.keys().isdisjoint(HEIC_EXTENSIONS):
            remedies.append(HEIC_REMEDY)
        if not self._images.keys().isdisjoint(AVIF_EXTENSIONS):
            remedies.append(AVIF_REMEDY)
        if self._images.keys() - {*HEIC_EXTENSIONS, *AVIF_EXTENSIONS}:
            extensions = ", ".join(image_extensions())
            remedies.append(f"convert them, or rename them if their format is supported (extensions: {extensions})")
        return "; ".join(remedies)

    def notes(self, source: str | Path) -> list[Note]:
        """Log lines that account for everything that was left out."""
        notes: list[Note] = []
        if self._images:
            example = self._examples[self._images.most_common(1)[0][0]]
            text = f"{IMAGES_LEFT_OUT}: {self.extensions()}, such as {example}; {self.remedy()}"
            notes.append((logging.WARNING, f"{source}: {text}"))
        for reason, count in self._reasons.items():
            example = self._examples[reason]
            if reason == SYSTEM:
                notes.append((logging.INFO, f"{source}: ignored files of the operating system: {count}, such as {example}"))
            else:
                notes.append((logging.WARNING, f"{source}: left out, since they {reason}: {count}, such as {example}"))
        if self._num_others:
            text = f"ignored files that are not images: {self._num_others}, such as {self._other_example}"
            notes.append((logging.INFO, f"{source}: {text}"))
        return notes
