"""Images in folders or zip archives, read by position: what comes back depends on (seed, epoch, index) alone."""

import io
import os
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS

# What Pillow raises on damaged files, by their kind.
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class DataError(ValueError):
    """Data that cannot be used as they are. The text names the folder or file and the remedy."""


class ImageDataset(Dataset):
    """Images by position; where they lie is a subclass's affair.

    A key is (epoch, index), so that a worker needs to know nothing of the run: the transform's draws are seeded from
    (seed, epoch, index), whichever of ``random``, ``numpy`` and ``torch`` they come from.

    Args:
        source: folder or archive, for messages.
        names: of the images, relative to the source.
        labels: class id of each.
        classes: names by class id.
        transform: PIL image to (3, H, W) uint8.
        seed: of the run.
    """

    def __init__(
        self,
        source: Path,
        names: Sequence[str],
        labels: Sequence[int],
        classes: Sequence[str],
        transform: Callable[[Image.Image], Tensor],
        seed: int,
    ):
        self.source, self.classes, self.transform, self.seed = source, list(classes), transform, seed
        self.labels = np.array(labels, dtype=np.int32)
        # One buffer rather than a million strings: workers share its memory, since nothing counts references to it.
        encoded = [name.encode(errors="surrogateescape") for name in names]
        self._ends = np.cumsum([len(name) for name in encoded])
        self._names = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        start = self._ends[index - 1] if index else 0
        return self._names[start : self._ends[index]].tobytes().decode(errors="surrogateescape")

    def open(self, index: int) -> str | Path | BinaryIO:
        """What Pillow reads the image from."""
        raise NotImplementedError

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        """(3, H, W) uint8, class id, index."""
        epoch, index = key
        try:
            with Image.open(self.open(index)) as file:
                image = file.convert("RGB")
        except _UNREADABLE as error:
            raise DataError(f"{self.source}/{self.name(index)}: is no readable image ({error}); repair or remove it") from error
        with kept_generators():
            seed_generators(draw_seed(self.seed, epoch, index))
            return self.transform(image), int(self.labels[index]), index


class FolderDataset(ImageDataset):
    """``root/<class>/<image>``, classes in the order of their names.

    Raises:
        DataError: no such folder, no class folders, or a class without images.
    """

    def __init__(self, root: str | Path, transform: Callable[[Image.Image], Tensor], *, seed: int = 0):
        root = Path(root)
        classes = _list_classes(root)
        found = [(f"{folder}/{name}", label) for label, folder in enumerate(classes) for name in _list_images(root / folder)]
        names, labels = zip(*found, strict=True)
        super().__init__(root, names, labels, classes, transform, seed)

    def open(self, index: int) -> Path:
        return self.source / self.name(index)


class ZipDataset(ImageDataset):
    """``root/<split>.zip`` with ``root/<split>_map.txt``: a line for each image, its name in the archive, a tab, its class id.

    Nothing is unpacked to disk: whatever a name in the archive says, it is read from the archive.

    Args:
        cache_mode: which images' bytes to keep in memory: ``no``, ``full``, or ``part`` for those whose index is this
            process's rank modulo the number of processes.

    Raises:
        DataError: a missing file, a line that is none, class ids with gaps, or an image that the archive lacks.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        transform: Callable[[Image.Image], Tensor],
        *,
        seed: int = 0,
        cache_mode: str = "no",
        rank: int = 0,
        world_size: int = 1,
    ):
        archive = Path(root) / f"{split}.zip"
        names, labels = _read_map(Path(root) / f"{split}_map.txt")
        classes = [str(label) for label in range(max(labels) + 1)]
        super().__init__(archive, names, labels, classes, transform, seed)
        self._archives: dict[int, zipfile.ZipFile] = {}
        sizes = {entry.filename: entry.file_size for entry in self._archive().infolist()}
        for name in names:
            if name not in sizes:
                raise DataError(f"{archive}: lacks {name}, which {split}_map.txt lists; pack it again")
            if sizes[name] > LARGEST_FILE:
                raise DataError(f"{archive}: {name} unpacks to {sizes[name]} bytes, more than an image has; remove it")
        step = {"no": None, "part": world_size, "full": 1}[cache_mode]
        kept = range(rank if cache_mode == "part" else 0, len(names), step) if step else ()
        self._cache = {index: self._archive().read(names[index]) for index in kept}

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_archives": {}}  # open files do not travel to workers that are spawned

    def _archive(self) -> zipfile.ZipFile:
        """This process's own handle: workers that shared one would move each other's position."""
        if os.getpid() not in self._archives:
            try:
                self._archives[os.getpid()] = zipfile.ZipFile(self.source)
            except (OSError, zipfile.BadZipFile) as error:
                raise DataError(f"{self.source}: cannot be read ({error}); check --data-path, or leave out --zip") from None
        return self._archives[os.getpid()]

    def open(self, index: int) -> BinaryIO:
        data = self._cache.get(index)
        try:
            return io.BytesIO(self._archive().read(self.name(index)) if data is None else data)
        except (zipfile.BadZipFile, zlib.error) as error:
            raise ValueError(f"damaged in the archive: {error}") from error


LARGEST_FILE = 2**28  # bytes of one compressed image


def _read_map(path: Path) -> tuple[list[str], list[int]]:
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); it lists the images of the archive beside it") from None
    names, labels = [], []
    for number, line in enumerate(lines, start=1):
        name, tab, label = line.rpartition("\t")
        if not tab or not label.isdigit():
            raise DataError(f"{path}:{number}: {line!r} is not a name, a tab and a class id")
        names.append(name)
        labels.append(int(label))
    if missing := set(range(max(labels, default=0) + 1)) - set(labels):
        raise DataError(f"{path}: has no image of class {min(missing)}; class ids go from 0 without gaps")
    return names, labels


def draw_seed(*position: int) -> int:
    """A seed for one position of a run: (seed, epoch, index), (seed, step), ... well mixed, 32 bits."""
    return int(np.random.SeedSequence(position).generate_state(1)[0])


def seed_generators(seed: int, device: torch.device | None = None) -> None:
    """Seed all three generators that augmentation draws from, and torch's own of a GPU where one is named."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every backend, 300 times as long
    if device is not None and device.type == "cuda":
        torch.cuda.default_generators[device.index].manual_seed(seed)


@contextmanager
def kept_generators() -> Iterator[None]:
    """Let the host's generators go on afterwards as if nothing had been drawn meanwhile."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def check_classes(train: Sequence[str] | None, val: Sequence[str], num_classes: int, root: str) -> None:
    """Refuse splits that do not fit each other or the model, before anything is built.

    Raises:
        DataError: a class that one split lacks, or another number of classes than the model's.
    """
    if train is not None and list(train) != list(val):
        parts = []
        if lacking := sorted(set(train) - set(val)):
            parts.append(f"val/ lacks {_shorten(lacking)}")
        if extra := sorted(set(val) - set(train)):
            parts.append(f"val/ has {_shorten(extra)} besides")
        raise DataError(f"{root}: {' and '.join(parts)}; train/ and val/ need the same class folders")
    if len(val) != num_classes:
        raise DataError(
            f"{root}: holds {len(val)} classes, but MODEL.NUM_CLASSES={num_classes}; "
            f"add --opts MODEL.NUM_CLASSES {len(val)}, or check --data-path"
        )


def _list_classes(root: Path) -> list[str]:
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; --data-path names the folder that holds train/ and val/")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not classes:
        raise DataError(
            f"{root}: has no class folders; put every image into a folder named after its class, {root.name}/<class>/"
        )
    return classes


def _list_images(folder: Path) -> list[str]:
    names = []
    for parent, _, files in os.walk(folder, followlinks=True):
        below = os.path.relpath(parent, folder)
        names += [
            os.path.normpath(os.path.join(below, name))
            for name in files
            if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
        ]
    if not names:
        raise DataError(f"{folder}: has no images ({', '.join(IMG_EXTENSIONS)}); add some or remove the folder")
    return sorted(names)


def _shorten(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
