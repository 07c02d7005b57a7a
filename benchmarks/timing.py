"""Time several tasks alternately, so that drifts in the speed of the machine do not affect their ratios."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of a task, one measurement per round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class Ratio:
    """Ratio of the times of two tasks: median, minimum and maximum over rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def time_in_turn(tasks: Mapping[str, Callable[[], object]], *, rounds: int, device: torch.device) -> dict[str, Timing]:
    """Run every task once to warm up, then time every task once in each of ``rounds`` rounds."""

    def run(task: Callable[[], object]) -> float:
        synchronise(device)
        started = time.perf_counter()
        task()
        synchronise(device)
        return time.perf_counter() - started

    for task in tasks.values():
        run(task)
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            seconds[name].append(run(task))
    return {name: Timing(tuple(values)) for name, values in seconds.items()}


def speedup(task: Timing, baseline: Timing) -> Ratio:
    """Speed-up of a task over the baseline, computed per round."""
    ratios = [
        baseline_seconds / task_seconds for task_seconds, baseline_seconds in zip(task.seconds, baseline.seconds, strict=True)
    ]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
