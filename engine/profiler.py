"""Profile of some updates: a trace for TensorBoard or Perfetto, and a table of the most expensive operations."""

import logging
import os
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from utils.distributed import World, on_main
from utils.errors import ConfigError
from utils.files import replacing

logger = logging.getLogger(__name__)

NUM_WARMUP = 1  # updates that are not recorded, while the profiler starts
NUM_UPDATES = 3  # recorded updates; they limit the size of the trace
NUM_OPERATIONS = 10  # rows of the table
SUFFIX = ".pt.trace.json.gz"  # TensorBoard's profiler plugin finds traces by this suffix


def check_directory(folder: Path) -> None:
    """Create the directory of --profile.

    Raises:
        ConfigError: it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK | os.X_OK) else "no write permission"
    except OSError as error:
        reason = error.strerror or type(error).__name__
    if reason:
        raise ConfigError(f"--profile {folder}: cannot be written to ({reason}); choose another directory")


def profile_updates(update: Callable[[], None], world: World, path: Path) -> None:
    """Run updates in all processes, write a trace of those of rank 0, and log its most expensive operations.

    Args:
        update: runs one update.
        path: file to write; its name ends with ``SUFFIX``.

    Raises:
        ConfigError, OtherRankError: the file cannot be written.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise, the profiler prints lines about its start on standard error
    uses_gpu = world.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if uses_gpu else [])]
    plan = schedule(wait=0, warmup=NUM_WARMUP, active=NUM_UPDATES, repeat=1)
    with profile(activities=activities, schedule=plan, acc_events=True) if world.is_main else nullcontext() as profiler:
        for _ in range(NUM_WARMUP + NUM_UPDATES):
            update()
            if profiler is not None:
                profiler.step()
    on_main(world, lambda: _write_trace(profiler, path))
    if profiler is not None:
        logger.info(
            "profile of %d updates written to %s, for ui.perfetto.dev or TensorBoard's profiler plugin. Operations with the "
            "longest %s time, without the operations that they call:\n%s",
            NUM_UPDATES,
            path,
            "GPU" if uses_gpu else "CPU",
            "\n".join(format_table(profiler.key_averages(), "self_device_time_total" if uses_gpu else "self_cpu_time_total")),
        )


def _write_trace(profiler: Any, path: Path) -> None:
    try:
        with replacing(path) as temporary:
            profiler.export_chrome_trace(str(temporary))
    except OSError as error:
        raise ConfigError(f"--profile {path}: cannot be written ({error.strerror}); choose another directory") from None


def format_table(averages: Iterable[Any], time: str) -> list[str]:
    """Lines of a table of the operations with the longest time: milliseconds and calls per update, share of all operations.

    Args:
        averages: as returned by ``torch.profiler.profile.key_averages``. Only operations are shown: kernels are counted as
            time of the operation that launched them.
        time: attribute with the microseconds of an operation.
    """
    on_cpu = [item for item in averages if item.device_type == torch.autograd.DeviceType.CPU]
    operations = [item for item in on_cpu if not item.is_user_annotation]
    total = sum(getattr(item, time) for item in operations) or 1
    lines = [f"{'ms/update':>9} {'share':>7} {'calls/update':>12}  operation"]
    for item in sorted(operations, key=lambda item: getattr(item, time), reverse=True)[:NUM_OPERATIONS]:
        microseconds = getattr(item, time)
        lines.append(
            f"{microseconds / NUM_UPDATES / 1000:9.3f} {microseconds / total:7.1%} {item.count / NUM_UPDATES:12.0f}  {item.key}"
        )
    return lines
