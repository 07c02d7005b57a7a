"""Benchmark decoding, augmentation and loading of images. The baseline is torchvision's reader with timm's transform."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from timm.data import create_transform
from torch.utils.data import Dataset
from torchvision.datasets.folder import default_loader
from yacs.config import CfgNode

from benchmarks.timing import speedup, time_in_turn
from data.build import build_train_transform
from data.datasets import ImageDataset, read_file
from data.decoding import decode_pixels
from data.files import DataError
from data.samplers import epoch_order
from data.splits import build_index
from data.workers import create_loader


class Images(Dataset):
    """Image files, read and transformed."""

    def __init__(self, paths: Sequence[Path], read: Callable, transform: Callable):
        self.paths, self.read, self.transform = list(paths), read, transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: int) -> torch.Tensor:
        return self.transform(self.read(self.paths[position]))


def read_pixels(path: Path, *, exif: bool) -> object:
    return decode_pixels(read_file(path), exif=exif)


def create_datasets(paths: Sequence[Path], cfg: CfgNode) -> dict[str, Images]:
    """Images from torchvision's reader and timm's training transform (normalised, float32), and from this project's (uint8)."""
    timm_transform = create_transform(
        cfg.DATA.IMG_SIZE,
        is_training=True,
        auto_augment=cfg.AUG.AUTO_AUGMENT,
        color_jitter=cfg.AUG.COLOR_JITTER,
        interpolation=cfg.DATA.INTERPOLATION,
        scale=tuple(cfg.AUG.SCALE),
        re_prob=cfg.AUG.REPROB,
        mean=tuple(cfg.DATA.MEAN),
        std=tuple(cfg.DATA.STD),
    )
    return {
        "torchvision and timm": Images(paths, default_loader, timm_transform),
        "this project": Images(paths, partial(read_pixels, exif=cfg.DATA.EXIF), build_train_transform(cfg)),
    }


def measure_loading(paths: Sequence[Path], cfg: CfgNode, *, rounds: int, packed: Path | None = None) -> list[dict]:
    """Images per CPU second of decoding and augmentation, and the speed-up over the first record, which is the baseline.

    Args:
        packed: data set packed from the same images, with at least as many training images as ``paths``.
    """
    torch.set_num_threads(1)
    tasks: dict[str, Callable[[int], object]]
    tasks = {name: dataset.__getitem__ for name, dataset in create_datasets(paths, cfg).items()}
    if packed:
        tasks["this project, packed"] = create_packed_reader(packed, cfg, len(paths))
    tasks["decoding alone"] = lambda position: read_pixels(paths[position], exif=cfg.DATA.EXIF)
    loops = {name: partial(_run_on_all, task, len(paths)) for name, task in tasks.items()}
    seconds = time_in_turn(loops, rounds=rounds, device=torch.device("cpu"), clock=time.process_time)
    per_second = {name: len(paths) / statistics.median(values) for name, values in seconds.items()}
    return [
        {"task": name, "images_per_cpu_second": per_second[name], "ratio": speedup(seconds[name], seconds[next(iter(tasks))])}
        for name in tasks
    ]


def _run_on_all(task: Callable[[int], object], num_images: int) -> None:
    for position in range(num_images):
        task(position)


def create_packed_reader(packed: Path, cfg: CfgNode, num_images: int) -> Callable[[int], object]:
    """Create a function that takes a position in an epoch and returns the training image, decoded and augmented.

    Raises:
        DataError: the data set cannot be read, or has fewer than ``num_images`` training images.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATA.DATA_PATH = str(packed)
    index = build_index(cfg, "train")
    if len(index) < num_images:
        raise DataError(f"{packed} has {len(index)} training images, fewer than the {num_images} files given by --images")
    decoder = partial(decode_pixels, exif=cfg.DATA.EXIF)
    dataset = ImageDataset(index, build_train_transform(cfg), decoder=decoder, seed=cfg.SEED)
    order = epoch_order(num_images, cfg.SEED, epoch=0).tolist()
    return lambda position: dataset[0, order[position]]


def measure_workers(paths: Sequence[Path], cfg: CfgNode, *, batch_size: int, max_workers: int) -> list[dict]:
    """Images per second of each ``Dataset`` in a data loader with 0 to ``max_workers`` workers."""
    records = []
    for (name, dataset), num_workers in itertools.product(create_datasets(paths, cfg).items(), range(max_workers + 1)):
        loader = create_loader(dataset, num_workers=num_workers, batch_size=batch_size, collate_fn=list)
        started = time.perf_counter()
        num_images = sum(len(batch) for batch in loader)
        records.append(
            {"task": name, "workers": num_workers, "images_per_second": num_images / (time.perf_counter() - started)}
        )
    return records
