"""Describe software and hardware of a run, for its log and checkpoints, and apply the numerical settings of its config."""

import logging
import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
from yacs.config import CfgNode

from utils.urls import without_secrets

logger = logging.getLogger(__name__)

ROOT = Path(__file__).parent.parent


def describe_environment(device: torch.device, world_size: int) -> dict[str, str | int]:
    """Software versions, device, number of processes, command line without secrets of URLs, and commit, as plain data."""
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # includes the CUDA version
        **{package: version(package) for package in ("torchvision", "timm", "numpy")},
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine(),
        "cuda": torch.version.cuda or "" if device.type == "cuda" else "",
        "processes": world_size,
        "threads": torch.get_num_threads(),  # per process; it changes the order of additions, and thus their rounding
        "command": without_secrets(shlex.join(sys.argv)),
        "commit": find_commit(),
    }


def find_commit() -> str:
    """Git commit of this project, with ``+changes`` if tracked files differ from it; "" without a git repository or git."""
    if not (ROOT / ".git").exists():
        return ""
    try:
        commit = _git("rev-parse", "HEAD")
        return commit + ("+changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):  # git is not installed, or failed
        return ""


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "--no-optional-locks", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()


def apply_numerical_settings(cfg: CfgNode) -> None:
    """Apply DETERMINISTIC, TF32 and CUDNN_BENCHMARK to this process, and warn if AMP_DTYPE has no effect or is slow."""
    if cfg.DETERMINISTIC != "off":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # required by deterministic cuBLAS; read at its first call
        torch.use_deterministic_algorithms(True, warn_only=cfg.DETERMINISTIC == "warn")
        # The default, True, would fill every new tensor, which only helps to find reads of uninitialised memory.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # set by its module
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = cfg.TF32
    torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK and cfg.DETERMINISTIC == "off"
    torch.backends.cudnn.deterministic = cfg.DETERMINISTIC != "off"
    if cfg.AMP_DTYPE == "fp16" and not cfg.AMP:
        logger.warning("AMP_DTYPE=fp16 has no effect without --amp; add --amp, or remove AMP_DTYPE")
    uses_bf16 = cfg.AMP and cfg.AMP_DTYPE == "bf16"
    if uses_bf16 and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        logger.warning("AMP_DTYPE=bf16: this GPU emulates bf16, which is slow; use fp16 (--opts AMP_DTYPE fp16)")


def peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: what torch allocated on a GPU, or the resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
