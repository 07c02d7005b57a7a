"""Checks of the tracker, the data and an export before torch is imported, so that a mistake is reported at once.

This module does not import torch.
"""

import argparse
import importlib.util
import logging
import os
from collections.abc import Sequence
from pathlib import Path

from yacs.config import CfgNode

from data.classes import check_classes
from data.sources import missing_split
from data.sources.layout import MissingSplitError, run_option
from data.splits import build_split, build_too_few_images_error
from engine.schedule import accumulation_steps
from utils.config.loading import CONFIGS, load_config
from utils.errors import ConfigError
from utils.run_files import build_output_path, has_checkpoints

FORMATS = ("safetensors", "torch", "onnx")  # formats that ``jobs.export`` can write
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # required by the format onnx
INCOMPLETE = ".incomplete"  # suffix of the temporary directory of an export


def check_export(folder: Path, formats: Sequence[str]) -> None:
    """Check the output directory of an export, and that the packages for its formats are installed.

    Raises:
        ConfigError: the directory is not empty, or a package is missing.
    """
    target = Path(os.path.realpath(folder))
    if os.path.lexists(target) and (not target.is_dir() or any(path.suffix != INCOMPLETE for path in target.iterdir())):
        raise ConfigError(f"{folder} is not an empty directory; choose another directory")
    if "onnx" in formats and (missing := [name for name in ONNX_PACKAGES if not is_installed(name)]):
        raise ConfigError(f"--formats onnx: not installed: {', '.join(missing)}; run pip install {' '.join(ONNX_PACKAGES)}")


def is_installed(package: str) -> bool:
    """Whether a package can be imported. A directory of this name, such as that of a tracker's files, does not count."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a directory without code has no origin


def check_tracker(args: argparse.Namespace, cfg: CfgNode | None) -> None:
    """Check that the package of TRACKER is installed, if the job trains.

    Raises:
        ConfigError: the package is missing.
    """
    if cfg is None or cfg.TRACKER == "none" or args.eval or args.throughput:
        return
    if not is_installed(cfg.TRACKER):
        raise ConfigError(
            f"TRACKER={cfg.TRACKER}: the package is not installed; run pip install {cfg.TRACKER}, or add --opts TRACKER none"
        )


def check_data(args: argparse.Namespace, cfg: CfgNode | None, opts: Sequence, world_size: int) -> None:
    """Check the splits of a job and, in training, the classes and the number of images, as far as no list of images is needed.

    The job repeats these checks with all images. A run that resumes is not checked: if it is finished, it reads no data. An
    evaluation without --cfg is checked only for released models: the config of another checkpoint is known after it is read.

    Args:
        cfg, opts: see ``jobs.launch.launch``.

    Raises:
        DataError, ConfigError: what the job would raise after its start.
    """
    if cfg is None and args.eval:
        reference = args.resume or args.pretrained
        config = CONFIGS / f"{reference}.yaml"
        cfg = load_config(config, opts) if config.is_file() and not os.path.exists(reference) else None
    if cfg is None or args.throughput:
        return
    training = not args.eval
    if training and (cfg.MODEL.RESUME or (cfg.TRAIN.AUTO_RESUME and has_checkpoints(build_output_path(cfg)))):
        return
    accumulation = accumulation_steps(cfg, world_size) if training else 1  # errors of the config come before those of the data
    splits = ["train"] if cfg.DATA.VAL_FRACTION else ["train", "val"] if training else ["val"]
    logging.disable()  # the job logs which splits it reads
    try:
        layouts = {split: build_split(cfg, split) for split in splits}
    finally:
        logging.disable(logging.NOTSET)
    classes = {}
    for split, (name, layout) in layouts.items():
        try:
            classes[split] = layout.list_classes()
        except MissingSplitError as error:
            root, zip_mode = Path(cfg.DATA.DATA_PATH), cfg.DATA.ZIP_MODE
            raise missing_split(str(error), root, name, zip_mode=zip_mode, option=run_option(split)) from None
    if not training:
        return
    train, val = classes["train"], classes.get("val", classes["train"])
    if train is not None and val is not None:
        check_classes(train, val, cfg.MODEL.NUM_CLASSES, cfg.DATA.DATA_PATH)
    layout = layouts["train"][1]
    num_files = layout.count_files(cfg.DATA.BATCH_SIZE * accumulation * world_size)
    if num_files is not None:
        raise build_too_few_images_error(cfg, layout.source, num_files, accumulation, world_size, bound="at most ")
