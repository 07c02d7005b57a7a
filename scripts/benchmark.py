"""Measure speed, memory use and memory traffic of models, the attention operator, data loading and the training loop.

    model       complete models, compared with the same network with softmax attention, with timm's model, and with a naive
                implementation of the paper's formula
    attention   the attention operator at several numbers of tokens, and its memory traffic
    traffic     kernel launches and memory traffic of a training step, counted on the meta device
    data        decoding and augmentation, compared with torchvision's reader and timm's transform, and loading with different
                numbers of workers
    epoch       the training loop of a config, with and without data loader and EMA, compared with bare training steps
                (forward and backward pass, gradient clipping, optimizer)

Each mode prints its measurements as tables. --json also writes them to a file, with command, device, torch version and
number of threads. --png plots them (modes model and attention only). Except for loading with different numbers of workers, the
tasks that are compared run alternately in one process, so that drifts in the machine's speed do not affect the ratios.
"""

import argparse
import json
import platform
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from utils.config.loading import ConfigError, load_config
from utils.files import can_write, replacing
from utils.text import printable

PRECISIONS = ("fp32", "bf16", "fp16")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = parser.add_subparsers(dest="mode", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--rounds", type=int, default=5, help="measurements per task, after one warm-up")
    shared.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements to this file, as JSON")
    plotting = argparse.ArgumentParser(add_help=False)
    plotting.add_argument("--png", type=Path, metavar="FILE", help="plot the measurements to this file")

    model = modes.add_parser("model", parents=[shared, plotting], help="complete models")
    add_model_options(model)

    attention = modes.add_parser("attention", parents=[shared, plotting], help="the attention operator")
    add_attention_options(attention)

    traffic = modes.add_parser("traffic", parents=[shared], help="bytes moved by a training step, counted without a GPU")
    traffic.add_argument("models", nargs="+", metavar="NAME", help="such as flatten_swin_t")
    traffic.add_argument("--batch-size", type=int, default=128)
    traffic.add_argument("--img-size", type=int, default=224, help="side length in pixels")

    data = modes.add_parser("data", parents=[shared], help="decoding, augmentation and loading")
    add_data_options(data)

    epoch = modes.add_parser("epoch", parents=[shared], help="the training loop")
    epoch.add_argument("--cfg", nargs="+", action="extend", required=True, metavar="FILE")
    epoch.add_argument("--data-path", required=True, help="directory with train/ and val/")
    epoch.add_argument("--opts", nargs="+", action="extend", default=[], metavar="KEY VALUE", help="config keys to override")
    epoch.add_argument("--updates", type=int, default=10, help="optimizer updates per measurement")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds}: must be at least 1")
    for name in ("json", "png"):
        if (path := getattr(args, name, None)) and not can_write(path):
            parser.error(f"--{name} {path}: cannot be written; choose a file in an existing directory")
    return args


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("models", nargs="+", metavar="NAME", help="such as flatten_swin_t")
    parser.add_argument("--steps", choices=("inference", "training", "both"), default="both", help="steps to measure")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32"])
    parser.add_argument("--compile", action="store_true", help="compile all models with torch.compile")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[8])
    parser.add_argument("--img-size", type=int, default=224, help="side length in pixels")


def add_attention_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[196, 784, 3136, 16384, 65536],
        help="numbers of tokens; each must be a square number",
    )
    parser.add_argument("--dim", type=int, default=96, help="channels")
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument(
        "--batch-size", type=int, default=8, help="images per batch at 3136 tokens; scaled inversely with the number of tokens"
    )
    parser.add_argument(
        "--max-softmax-tokens", type=int, default=4096, help="skip softmax attention above this number of tokens"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")


def add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", nargs="+", action="extend", type=Path, required=True, metavar="PATH", help="image files or directories"
    )
    parser.add_argument(
        "--packed", type=Path, metavar="DIR", help="data set packed from the same images by scripts/pack_dataset.py"
    )
    parser.add_argument(
        "--cfg", nargs="+", default=["configs/flatten_swin_t.yaml"], metavar="FILE", help="config that sets the augmentation"
    )
    parser.add_argument("--workers", type=int, default=-1, help="maximum number of loader workers (default: number of cores)")


def check_names(names: list[str]) -> None:
    from models import list_models

    if unknown := [name for name in names if name not in list_models()]:
        raise ConfigError(f"{unknown[0]}: unknown model; choose among {', '.join(list_models())}")


def measure_models(args: argparse.Namespace, device) -> list[dict]:
    from benchmarks.networks import measure_model
    from engine.optim import PRECISIONS as DTYPES

    check_names(args.models)
    training_flags = {"inference": (False,), "training": (True,), "both": (False, True)}[args.steps]
    return [
        record
        for name in args.models
        for precision in args.precision
        for batch_size in args.batch_size
        for training in training_flags
        for record in measure_model(
            name,
            img_size=args.img_size,
            batch_size=batch_size,
            training=training,
            compiled=args.compile,
            dtype=DTYPES[precision],
            rounds=args.rounds,
            device=device,
        )
    ]


def measure_attention(args: argparse.Namespace, device) -> list[dict]:
    from benchmarks.operator import count_traffic, measure_operator
    from engine.optim import PRECISIONS as DTYPES

    records = []
    for num_tokens in args.tokens:
        records += measure_operator(
            num_tokens,
            dim=args.dim,
            num_heads=args.heads,
            batch_size=max(1, args.batch_size * 3136 // num_tokens),
            max_softmax_tokens=args.max_softmax_tokens,
            rounds=args.rounds,
            dtype=DTYPES[args.precision],
            device=device,
        )
    return records + count_traffic(3136, dim=args.dim, num_heads=args.heads, batch_size=args.batch_size)


def measure_traffic(args: argparse.Namespace, _device) -> list[dict]:
    from benchmarks.networks import count_step_traffic

    check_names(args.models)
    options = {"img_size": args.img_size, "batch_size": args.batch_size}
    return [record for name in args.models for record in count_step_traffic(name, **options)]


def measure_data(args: argparse.Namespace, _device) -> list[dict]:
    from benchmarks.loading import measure_loading, measure_workers
    from data.build import count_cores
    from jobs.predict import find_images

    cfg, paths = load_config(args.cfg), find_images(args.images)
    max_workers = count_cores() if args.workers < 0 else args.workers
    records = measure_loading(paths, cfg, rounds=args.rounds, packed=args.packed)
    return records + measure_workers(paths, cfg, batch_size=16, max_workers=max_workers)


def measure_epoch(args: argparse.Namespace, device) -> list[dict]:
    from benchmarks.loop import measure_loop
    from utils.distributed import World
    from utils.log import setup_logging

    setup_logging(rank=0)
    cfg = load_config(args.cfg, [*args.opts, "DATA.DATA_PATH", args.data_path])
    return measure_loop(cfg, World(0, 0, 1, device), updates=args.updates, rounds=args.rounds)


MEASURES = {
    "model": measure_models,
    "attention": measure_attention,
    "traffic": measure_traffic,
    "data": measure_data,
    "epoch": measure_epoch,
}


def to_markdown(records: list[dict]) -> str:
    """Format the records as Markdown. Records with the same keys share a table, with one column per key."""
    tables: dict[tuple, list[dict]] = {}
    for record in records:
        tables.setdefault(tuple(record), []).append(record)
    lines = []
    for names, rows in tables.items():
        lines += ["| " + " | ".join(name.replace("_", " ") for name in names) + " |", "|---" * len(names) + "|"]
        lines += ["| " + " | ".join(format_cell(value) for value in row.values()) + " |" for row in rows] + [""]
    return "\n".join(lines)


def format_cell(value: object) -> str:
    if isinstance(value, list):  # [median, minimum, maximum] of a ratio
        return "{:.2f} ({:.2f} to {:.2f})".format(*value)
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)


def draw_attention(records: list[dict], figure) -> None:
    """Plot the time per token against the number of tokens."""
    from matplotlib.ticker import LogLocator

    axes = figure.subplots(1, 2, squeeze=True)
    for axis, pass_name in zip(axes, ("forward", "forward and backward"), strict=True):
        rows = [record for record in records if record["pass"] == pass_name and "tokens" in record]
        for name in dict.fromkeys(row["attention"] for row in rows):
            series = [row for row in rows if row["attention"] == name]
            axis.loglog([row["tokens"] for row in series], [row["ns_per_token"] for row in series], "o-", label=name)
        axis.set(title=pass_name, xlabel="tokens", ylabel="ns per token")
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_minor_locator(LogLocator(subs=(2, 5)))
            ticks.set_major_formatter("{x:,.0f}")
            ticks.set_minor_formatter("{x:,.0f}")
        axis.grid(alpha=0.3)
    axes[0].legend()


def draw_models(records: list[dict], figure) -> None:
    """Plot the speed-up over the naive implementation, one group of bars per model, mode, precision and batch size."""
    axis = figure.subplots()
    labels = [f"{row['model']}\n{row['mode']}, {row['precision']}\nbatch size {row['batch_size']}" for row in records]
    groups = list(dict.fromkeys(labels))
    names = list(dict.fromkeys(row["variant"].split()[0] for row in records))
    for position, name in enumerate(names):
        bars = {label: row for label, row in zip(labels, records, strict=True) if row["variant"].split()[0] == name}
        edges = [groups.index(label) + position * 0.8 / len(names) for label in bars]
        axis.bar(edges, [row["speedup_over_naive"][0] for row in bars.values()], 0.8 / len(names), align="edge", label=name)
    axis.set_xticks([group + 0.4 for group in range(len(groups))], groups, fontsize=8)
    axis.set_ylabel("speed-up over the naive implementation")
    axis.legend()


def main() -> None:
    args = parse()
    import torch

    from data.files import DataError

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        records = MEASURES[args.mode](args, device)
    except (ConfigError, DataError, ValueError) as error:
        print(f"benchmark.py: error: {printable(error)}", file=sys.stderr)
        sys.exit(2)
    device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    about = {
        "command": shlex.join(sys.argv),
        "torch": torch.__version__,
        "device": device_name,
        "threads": torch.get_num_threads(),
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()) + "\n")
    print(to_markdown(records))
    if args.json:
        with replacing(args.json) as temporary:
            temporary.write_text(json.dumps(about | {"records": records}, indent=1) + "\n")
    if getattr(args, "png", None):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(12, 5), layout="constrained", dpi=110)
        (draw_attention if args.mode == "attention" else draw_models)(records, figure)
        with replacing(args.png) as temporary:
            figure.savefig(temporary)


if __name__ == "__main__":
    main()
