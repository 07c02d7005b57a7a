"""Curves of the arms of an ablation, with matplotlib."""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator


def draw_means(axes: Axes, rows: Iterable, arm: str, value: str, *, scale: float = 1, x: str = "epoch", **style: Any) -> None:
    """Plot the mean of a value over the seeds of an arm, and a band of one standard deviation on either side.

    Every point is a mean over the same seeds: those that have reached the last epoch of the arm. There is no band with a single
    seed.

    Args:
        rows: named tuples with the fields ``arm``, ``seed``, ``epoch``, ``x`` and ``value``, one per run and epoch; rows whose
            value is not finite are omitted.
        scale: multiplier of ``x``.
    """
    by_seed: dict[int, dict[int, Any]] = {}
    for row in rows:
        if row.arm == arm and math.isfinite(getattr(row, value)):
            by_seed.setdefault(row.seed, {})[row.epoch] = row
    if not by_seed:
        axes.plot([], [], label=f"{arm} (no values)", **style)
        return
    last = max(map(max, by_seed.values()))
    complete = [by_epoch for by_epoch in by_seed.values() if last in by_epoch]
    epochs = sorted(set.intersection(*map(set, complete)))
    groups = [[by_epoch[epoch] for by_epoch in complete] for epoch in epochs]
    xs = [scale * statistics.mean(getattr(row, x) for row in group) for group in groups]
    means = [statistics.mean(getattr(row, value) for row in group) for group in groups]
    (line,) = axes.plot(xs, means, label=f"{arm} ({len(complete)} seed{'s' * (len(complete) > 1)})", **style)
    if len(complete) > 1:
        deviations = [statistics.stdev(getattr(row, value) for row in group) for group in groups]
        low, high = ([mean + sign * d for mean, d in zip(means, deviations, strict=True)] for sign in (-1, 1))
        axes.fill_between(xs, low, high, color=line.get_color(), alpha=0.15, linewidth=0)


def label_epochs(axes: Axes, label: str = "epoch") -> None:
    """Label a horizontal axis of epochs, with ticks at integers."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def label_log_axis(axis: Axis, number: str = "{x:g}") -> None:
    """Label the ticks 1, 2 and 5 times a power of ten of a logarithmic axis. number: format of the labels."""
    axis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.set_major_formatter(number)
    axis.set_minor_formatter(number)


def add_legend_below(figure: Figure, axes: Axes, *, num_columns: int = 2) -> None:
    """Add a legend of the lines of ``axes`` below all axes, where it covers no line."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=num_columns, fontsize=8)


def arms_of(rows: Sequence) -> list[str]:
    """Names of the arms, in the order in which they first appear."""
    return list(dict.fromkeys(row.arm for row in rows))
