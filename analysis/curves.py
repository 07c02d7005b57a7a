"""Curves of the arms of an ablation, with matplotlib."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator


def draw_means(axes: Axes, rows: Sequence, value: str, label: str, *, scale: float = 1, x: str = "epoch", **style: Any) -> None:
    """Plot the mean of a value over the seeds of an arm, and a band of one standard deviation on either side.

    Every point is a mean over the same seeds: those that have reached the last epoch, at the epochs that all of them have.
    The line has a gap where the value of a seed is not finite. There is no band with a single seed.

    Args:
        rows: named tuples with the fields ``seed``, ``epoch``, ``x`` and ``value``, one per seed and epoch; not empty.
        label: name of the line, to which the number of seeds is added.
        scale: multiplier of ``x``.
    """
    by_seed: dict[int, dict[int, Any]] = {}
    for row in rows:
        by_seed.setdefault(row.seed, {})[row.epoch] = row
    last = max(map(max, by_seed.values()))
    complete = [by_epoch for by_epoch in by_seed.values() if last in by_epoch]
    epochs = sorted(set.intersection(*map(set, complete)))
    xs = scale * np.mean([[getattr(by_epoch[epoch], x) for epoch in epochs] for by_epoch in complete], axis=0)
    values = np.array([[getattr(by_epoch[epoch], value) for epoch in epochs] for by_epoch in complete])
    values[~np.isfinite(values)] = np.nan
    means = values.mean(axis=0)
    (line,) = axes.plot(xs, means, label=f"{label} ({len(complete)} seed{'s' * (len(complete) > 1)})", **style)
    if len(complete) > 1:
        deviations = values.std(axis=0, ddof=1)
        axes.fill_between(xs, means - deviations, means + deviations, color=line.get_color(), alpha=0.15, linewidth=0)


def label_epochs(axes: Axes, label: str = "epoch") -> None:
    """Label a horizontal axis of epochs, with ticks at integers."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def label_log_axis(axis: Axis, number: str = "{x:g}") -> None:
    """Label the ticks 1, 2 and 5 times a power of ten of a logarithmic axis. number: format of the labels."""
    axis.set_minor_locator(LogLocator(subs=(2, 5)))
    axis.set_major_formatter(number)
    axis.set_minor_formatter(number)


def add_legend_below(figure: Figure, axes: Axes, *, num_columns: int = 2) -> None:
    """Add a legend of the lines of ``axes`` below all axes, where it covers no line."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=num_columns, fontsize=8)


def by_arm(rows: Sequence) -> dict[str, list]:
    """Arm -> its rows, in the order in which the arms first appear."""
    groups: dict[str, list] = {}
    for row in rows:
        groups.setdefault(row.arm, []).append(row)
    return groups
