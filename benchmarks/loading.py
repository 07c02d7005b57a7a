"""Benchmark decoding, augmentation and loading of images. The baseline is torchvision's reader with timm's transform."""

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from timm.data import create_transform
from torch.utils.data import Dataset
from torchvision.datasets.folder import default_loader
from yacs.config import CfgNode

from benchmarks.timing import Timing, speedup
from data.build import build_index, build_train_transform
from data.datasets import ImageDataset, decode_pixels, read_file
from data.files import DataError
from data.workers import create_loader


class TimmDataset(Dataset):
    """Images from torchvision's reader and timm's training transform: normalised, float32."""

    def __init__(self, paths: Sequence[Path], cfg: CfgNode):
        self.paths = list(paths)
        self.transform = create_transform(
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

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: int) -> torch.Tensor:
        return self.transform(default_loader(str(self.paths[position])))


class OurDataset(Dataset):
    """Images from the reader and training transform of this project: not normalised, uint8."""

    def __init__(self, paths: Sequence[Path], cfg: CfgNode):
        self.paths = list(paths)
        self.transform = build_train_transform(cfg)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, position: int) -> torch.Tensor:
        return self.transform(decode_pixels(read_file(self.paths[position])))


def measure_per_cpu_second(tasks: dict[str, Callable[[int], object]], num_images: int, rounds: int) -> list[dict]:
    """Images per CPU second of each task, and the speed-up over the first task. Each round runs every task on all images."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for round_number in range(rounds + 1):
        for name, task in tasks.items():
            started = time.process_time()
            for position in range(num_images):
                task(position)
            if round_number:  # the first round warms up
                seconds[name].append(time.process_time() - started)
    timings = {name: Timing(tuple(values)) for name, values in seconds.items()}
    baseline = next(iter(timings.values()))
    records = []
    for name, timing in timings.items():
        ratio, per_second = speedup(timing, baseline), num_images / timing.median
        records.append({"task": name, "images_per_cpu_second": per_second, "ratio": [ratio.median, ratio.low, ratio.high]})
    return records


def measure_loading(paths: Sequence[Path], cfg: CfgNode, *, rounds: int, packed: Path | None = None) -> list[dict]:
    """Images per CPU second of decoding and augmentation. The first record is the baseline.

    Args:
        packed: data set packed from the same images, with at least as many training images as ``paths``.
    """
    torch.set_num_threads(1)
    baseline, ours = TimmDataset(paths, cfg), OurDataset(paths, cfg)
    tasks = {
        "torchvision and timm": baseline.__getitem__,
        "this project": ours.__getitem__,
        **({"this project, packed": create_packed_reader(packed, cfg, len(paths))} if packed else {}),
        "decoding alone": lambda position: decode_pixels(read_file(paths[position])),
    }
    return measure_per_cpu_second(tasks, len(paths), rounds)


def create_packed_reader(packed: Path, cfg: CfgNode, num_images: int) -> Callable[[int], object]:
    """Create a function that takes an index and returns that training image of a packed data set, decoded and augmented.

    Raises:
        DataError: the data set cannot be read, or has fewer than ``num_images`` training images.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATA.DATA_PATH = str(packed)
    index = build_index(cfg, "train")
    if len(index) < num_images:
        raise DataError(f"{packed} has {len(index)} training images, fewer than the {num_images} files given by --images")
    dataset = ImageDataset(index, build_train_transform(cfg), decoder=decode_pixels, seed=cfg.SEED)
    return lambda position: dataset[0, position]


def measure_workers(paths: Sequence[Path], cfg: CfgNode, *, batch_size: int, max_workers: int) -> list[dict]:
    """Images per second of each ``Dataset`` in a data loader with 0 to ``max_workers`` workers."""
    datasets = {"torchvision and timm": TimmDataset(paths, cfg), "this project": OurDataset(paths, cfg)}
    records = []
    for (name, dataset), num_workers in itertools.product(datasets.items(), range(max_workers + 1)):
        loader = create_loader(dataset, num_workers=num_workers, batch_size=batch_size, collate_fn=list)
        started = time.perf_counter()
        num_images = sum(len(batch) for batch in loader)
        records.append(
            {"task": name, "workers": num_workers, "images_per_second": num_images / (time.perf_counter() - started)}
        )
    return records
