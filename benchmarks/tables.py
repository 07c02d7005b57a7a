"""Measurements as Markdown tables and as figures."""

from matplotlib.figure import Figure

from analysis.curves import label_log_axis
from utils.text import markdown_table


def to_markdown(records: list[dict]) -> str:
    """Format the records as Markdown. Records with the same keys share a table, with one column per key."""
    tables: dict[tuple, list[dict]] = {}
    for record in records:
        tables.setdefault(tuple(record), []).append(record)
    return "\n\n".join(
        markdown_table([name.replace("_", " ") for name in names], [map(format_cell, row.values()) for row in rows])
        for names, rows in tables.items()
    )


def format_cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def draw_attention(records: list[dict], figure: Figure) -> None:
    """Plot the time per token against the number of tokens."""
    axes = figure.subplots(1, 2)
    for axis, pass_name in zip(axes, ("forward", "forward and backward"), strict=True):
        rows = [record for record in records if record["pass"] == pass_name and "tokens" in record]
        for name in dict.fromkeys(row["attention"] for row in rows):
            series = [row for row in rows if row["attention"] == name]
            axis.loglog([row["tokens"] for row in series], [row["ns_per_token"] for row in series], "o-", label=name)
        axis.set(title=pass_name, xlabel="tokens", ylabel="ns per token")
        for ticks in (axis.xaxis, axis.yaxis):
            label_log_axis(ticks, "{x:,.0f}")
        axis.grid(alpha=0.3)
    axes[0].legend()


def draw_models(records: list[dict], figure: Figure) -> None:
    """Plot the speed-up over the naive implementation, one group of bars per model, mode, precision and batch size."""
    axis = figure.subplots()
    labels = [f"{row['model']}\n{row['mode']}, {row['precision']}\nbatch size {row['batch_size']}" for row in records]
    groups = list(dict.fromkeys(labels))
    names = list(dict.fromkeys(row["variant"].split()[0] for row in records))
    for position, name in enumerate(names):
        bars = {label: row for label, row in zip(labels, records, strict=True) if row["variant"].split()[0] == name}
        edges = [groups.index(label) + position * 0.8 / len(names) for label in bars]
        axis.bar(edges, [row["speedup_over_naive"].median for row in bars.values()], 0.8 / len(names), align="edge", label=name)
    axis.set_xticks([group + 0.4 for group in range(len(groups))], groups, fontsize=8)
    axis.set_ylabel("speed-up over the naive implementation")
    axis.legend()
