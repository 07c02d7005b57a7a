"""Measure the speed of the forward pass."""

import contextlib
import logging
import platform
import time
from typing import Any

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from engine.optim import amp_dtype
from jobs.model import choose_attention
from models import build_model
from utils.config.loading import image_size
from utils.distributed import World
from utils.environment import apply_numerical_settings
from utils.progress import progress

logger = logging.getLogger(__name__)

WARMUP_BATCHES = 50  # as in the reference implementation
MEASURED_BATCHES = 30
# Each phase ends after this time too, but not before its first batch.
WARMUP_SECONDS = 15.0
MEASURED_SECONDS = 30.0


def images_per_second(
    model: nn.Module, images: Tensor, precision: torch.dtype, *, warmup_batches: int, measured_batches: int
) -> float:
    """Images per second of the forward pass, after a warm-up.

    Args:
        images: (B, 3, H, W), on the model's device.
        warmup_batches, measured_batches: maximum numbers of batches; see also ``WARMUP_SECONDS``.
    """
    device = images.device.type
    synchronise = torch.cuda.synchronize if device == "cuda" else lambda: None
    phases = (("warm-up", warmup_batches, WARMUP_SECONDS), ("measurement", measured_batches, MEASURED_SECONDS))
    with torch.inference_mode(), torch.autocast(device, precision, enabled=precision != torch.float32):
        for title, num_batches, seconds in phases:
            synchronise()
            started, done = time.perf_counter(), 0
            with contextlib.closing(progress(range(num_batches), num_batches, title, seconds_between_lines=5)) as batches:
                for _ in batches:
                    model(images)
                    done += 1
                    if time.perf_counter() - started > seconds:
                        break
            synchronise()
    return len(images) * done / (time.perf_counter() - started)


def fitting_batch_size(model: nn.Module, image: Tensor, batch_size: int, precision: torch.dtype) -> int:
    """The largest batch size up to ``batch_size`` whose forward pass probably takes less than the half of ``MEASURED_SECONDS``.

    Args:
        image: (1, 3, H, W), on the CPU.
    """
    speed = images_per_second(model, image, precision, warmup_batches=1, measured_batches=1)
    return min(batch_size, max(int(speed * MEASURED_SECONDS / 2), 1))


def measure_throughput(cfg: CfgNode, world: World) -> None:
    """Log the images per second of the forward pass on random images, with the model, device and precision."""
    apply_numerical_settings(cfg)
    model: Any = build_model(cfg).to(world.device).eval()
    choose_attention([model], [amp_dtype(cfg)], cfg, world)
    if cfg.TRAIN.COMPILE:
        model = torch.compile(model)
    height, width = image_size(cfg)
    images = torch.randn(cfg.DATA.BATCH_SIZE, 3, height, width, device=world.device)
    precision = amp_dtype(cfg)
    if world.device.type == "cpu" and not cfg.TRAIN.COMPILE:  # which compiles for one batch size
        images = images[: fitting_batch_size(model, images[:1], len(images), precision)]
        if len(images) < cfg.DATA.BATCH_SIZE:
            logger.warning("a forward pass with %d images takes too long on this CPU", cfg.DATA.BATCH_SIZE)
    logger.info(
        "throughput of %s on random images: forward passes with %d images of %d x %d; a warm-up of up to %d batches or %d s, "
        "then a measurement of up to %d batches or %d s; at least one batch each",
        cfg.MODEL.NAME,
        len(images),
        height,
        width,
        WARMUP_BATCHES,
        WARMUP_SECONDS,
        MEASURED_BATCHES,
        MEASURED_SECONDS,
    )
    speed = images_per_second(model, images, precision, warmup_batches=WARMUP_BATCHES, measured_batches=MEASURED_BATCHES)
    logger.info(
        "%s at %d x %d on %s: batch_size %d throughput %.1f images/s, %.2f ms per batch, %s, torch %s",
        cfg.MODEL.NAME,
        height,
        width,
        _device_name(world.device),
        len(images),
        speed,
        1000 * len(images) / speed,
        str(precision).removeprefix("torch."),
        torch.__version__,
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"
