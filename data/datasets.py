"""Images in folders, read by position: what comes back depends on (seed, epoch, index) alone."""

import os
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

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


class FolderDataset(Dataset):
    """``root/<class>/<image>``, classes in the order of their names.

    A key is (epoch, index), so that a worker needs to know nothing of the run: the transform's draws are seeded from
    (seed, epoch, index), whichever of ``random``, ``numpy`` and ``torch`` they come from.

    Args:
        root: the split's folder.
        transform: PIL image to (3, H, W) uint8.
        seed: of the run.

    Raises:
        DataError: no such folder, no class folders, or a class without images.
    """

    def __init__(self, root: str | Path, transform: Callable[[Image.Image], Tensor], *, seed: int = 0):
        self.root, self.transform, self.seed = Path(root), transform, seed
        self.classes = _list_classes(self.root)
        names = [(label, name) for label, folder in enumerate(self.classes) for name in _list_images(self.root / folder)]
        self.labels = np.array([label for label, _ in names], dtype=np.int32)
        # One buffer rather than a million strings: workers share its memory, since nothing counts references to it.
        encoded = [name.encode(errors="surrogateescape") for _, name in names]
        self._ends = np.cumsum([len(name) for name in encoded])
        self._names = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        start = self._ends[index - 1] if index else 0
        name = self._names[start : self._ends[index]].tobytes().decode(errors="surrogateescape")
        return self.root / self.classes[self.labels[index]] / name

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int, int]:
        """(3, H, W) uint8, class id, index."""
        epoch, index = key
        path = self.path(index)
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
        except _UNREADABLE as error:
            raise DataError(f"{path}: is no readable image ({error}); repair or remove it") from error
        with kept_generators():
            seed_generators(draw_seed(self.seed, epoch, index))
            return self.transform(image), int(self.labels[index]), index


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
