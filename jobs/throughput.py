"""Measure the speed of the forward pass."""

import logging
import platform
import time

import torch
from yacs.config import CfgNode

from models import build_model
from utils.config import image_size
from utils.distributed import World
from utils.optim import amp_dtype

logger = logging.getLogger(__name__)

WARMUP_BATCHES = 50
MEASURED_BATCHES = 30


def measure_throughput(cfg: CfgNode, world: World) -> None:
    """Log images per second of the forward pass alone, on random images, after a warm-up."""
    model = build_model(cfg).to(world.device).eval()
    height, width = image_size(cfg)
    images = torch.randn(cfg.DATA.BATCH_SIZE, 3, height, width, device=world.device)
    precision = amp_dtype(cfg)
    synchronise = torch.cuda.synchronize if world.device.type == "cuda" else lambda: None
    with torch.inference_mode(), torch.autocast(world.device.type, precision, enabled=precision != torch.float32):
        for batches in (WARMUP_BATCHES, MEASURED_BATCHES):
            synchronise()
            started = time.perf_counter()
            for _ in range(batches):
                model(images)
            synchronise()
    seconds = (time.perf_counter() - started) / MEASURED_BATCHES
    logger.info(
        "%s at %d x %d on %s: batch_size %d throughput %.1f images/s, %s, torch %s",
        cfg.MODEL.NAME,
        height,
        width,
        _device_name(world.device),
        len(images),
        len(images) / seconds,
        str(precision).removeprefix("torch."),
        torch.__version__,
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.processor() or platform.machine()}, {torch.get_num_threads()} threads)"
