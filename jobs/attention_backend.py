"""Choose how models compute focused linear attention: with the Triton kernels or with torch operations."""

import logging
from collections.abc import Iterable

import torch
from torch import nn
from yacs.config import CfgNode

from models.kernel_selection import choose_backend, set_backend
from utils.config.loading import ConfigError
from utils.distributed import World, gather_on_main, on_main

logger = logging.getLogger(__name__)


def choose_attention(models: Iterable[nn.Module], dtypes: Iterable[torch.dtype], cfg: CfgNode, world: World) -> str:
    """Choose the backend of the models, which have the same architecture, according to MODEL.LA.BACKEND, and log it.

    The kernels are used only if they pass the self-check in every process, so that all processes compute the same.

    Args:
        dtypes: precisions of the forward passes of this job.

    Returns:
        ``triton kernels``, or ``torch, because ...``.

    Raises:
        ConfigError: MODEL.LA.BACKEND is ``triton``, but a process cannot use the kernels.
    """
    models, requested = list(models), cfg.MODEL.LA.BACKEND
    reasons = gather_on_main(world, choose_backend(models[0], world.device, sorted(set(dtypes), key=str), requested))
    reason = on_main(world, lambda: next(filter(None, reasons), ""))
    if reason and requested == "triton":
        raise ConfigError(f"MODEL.LA.BACKEND=triton: {reason}; to use torch operations, set --opts MODEL.LA.BACKEND auto")
    for model in models:
        set_backend(model, "torch" if reason else "triton")
    description = f"torch, because {reason}" if reason else "triton kernels"
    logger.info("attention: %s", description)
    return description
