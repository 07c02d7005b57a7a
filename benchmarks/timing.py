"""Time several tasks alternately, so that drifts in the speed of the machine do not affect their ratios."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch


class Ratio(NamedTuple):
    """Ratio of the times of two tasks: median, minimum and maximum over rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def time_in_turn(
    tasks: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Run every task once to warm up, then time every task once in each of ``rounds`` rounds.

    Returns:
        The seconds of each task, one measurement per round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for round_number in range(rounds + 1):
        for name, task in tasks.items():
            synchronise(device)
            started = clock()
            task()
            synchronise(device)
            if round_number:  # the first round warms up
                seconds[name].append(clock() - started)
    return seconds


def speedup(task: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Speed-up of a task over the baseline, computed per round from their seconds."""
    ratios = [slow / fast for fast, slow in zip(task, baseline, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
