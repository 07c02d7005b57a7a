"""Measure speed, memory use and memory traffic of models, the attention operator, data loading and the training loop.

    model       complete models, compared with the same network with softmax attention, with timm's model, and with a naive
                implementation of the paper's formula
    attention   the attention operator at several numbers of tokens, and its memory traffic
    traffic     kernel launches and memory traffic of a training step, counted on the meta device
    arms        forward and backward passes of the arms of an ablation (scripts/ablate.py)
    data        decoding and augmentation, compared with torchvision's reader and timm's transform, and loading with different
                numbers of workers
    epoch       the training loop of a config, with and without data loader and EMA, compared with bare training steps
                (forward and backward pass, gradient clipping, optimizer)

Each mode prints its measurements as tables. --json also writes them to a file, with command, device, torch version and
number of threads. --png plots them (modes model and attention only). Except for loading with different numbers of workers, the
tasks that are compared run alternately in one process, so that drifts in the machine's speed do not affect the ratios.
"""

import argparse
import itertools
import platform
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from scripts.command_line import ARGUMENTS, check_outputs, check_positive, create_parser, reporting_errors, save_figure
from utils.config.keys import KEYS
from utils.config.loading import flatten, image_size, load_config
from utils.errors import ConfigError
from utils.files import write_json

PRECISIONS = ("fp32", "bf16", "fp16")


def parse() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    parser = create_parser(__doc__)
    modes = parser.add_subparsers(dest="mode", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--rounds", type=int, default=5, help="measurements per task, after one warm-up")
    shared.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements to this file, as JSON")
    plotting = argparse.ArgumentParser(add_help=False, parents=[shared])
    plotting.add_argument("--png", type=Path, metavar="FILE", help="plot the measurements to this file")

    model = modes.add_parser("model", parents=[plotting], help="complete models")
    model.add_argument("models", nargs="+", metavar="NAME", help="such as flatten_swin_t")
    model.add_argument("--steps", choices=("inference", "training", "both"), default="both", help="steps to measure")
    model.add_argument("--precision", nargs="+", choices=PRECISIONS, default=["fp32"])
    model.add_argument("--compile", action="store_true", help="compile all models with torch.compile")
    model.add_argument("--batch-size", type=int, nargs="+", default=[8])
    model.add_argument("--img-size", type=int, default=224, help="side length in pixels")

    attention = modes.add_parser("attention", parents=[plotting], help="the attention operator")
    counts = [196, 784, 3136, 16384, 65536]
    attention.add_argument("--tokens", type=int, nargs="+", default=counts, help="numbers of tokens; square numbers")
    attention.add_argument("--dim", type=int, default=96, help="channels")
    attention.add_argument("--heads", type=int, default=3)
    batch_size = "images per batch at 3136 tokens; scaled inversely with the number of tokens"
    attention.add_argument("--batch-size", type=int, default=8, help=batch_size)
    limit = "skip softmax attention above this number of tokens"
    attention.add_argument("--max-softmax-tokens", type=int, default=4096, help=limit)
    attention.add_argument("--precision", choices=PRECISIONS, default="fp32")

    traffic = modes.add_parser("traffic", parents=[shared], help="bytes moved by a training step, counted without a GPU")
    traffic.add_argument("models", nargs="+", metavar="NAME", help="such as flatten_swin_t")
    traffic.add_argument("--batch-size", type=int, default=128)
    traffic.add_argument("--img-size", type=int, default=224, help="side length in pixels")

    arms = modes.add_parser("arms", parents=[shared], help="forward and backward passes of the arms of an ablation")
    arms.add_argument("file", type=Path, help="YAML file of the ablation")

    data = modes.add_parser("data", parents=[shared], help="decoding, augmentation and loading")
    data.add_argument("--images", **ARGUMENTS["--images"])
    packed = "data set packed from the same images by scripts/pack_dataset.py"
    data.add_argument("--packed", type=Path, metavar="DIR", help=packed)
    config = "config that sets the augmentation"
    data.add_argument("--cfg", nargs="+", default=["configs/flatten_swin_t.yaml"], metavar="FILE", help=config)
    data.add_argument("--workers", type=int, help="maximum number of loader workers (default: number of cores)")

    epoch = modes.add_parser("epoch", parents=[shared], help="the training loop")
    epoch.add_argument("--cfg", nargs="+", action="extend", required=True, metavar="FILE")
    epoch.add_argument("--data-path", **ARGUMENTS["--data-path"])
    epoch.add_argument("--opts", **ARGUMENTS["--opts"])
    epoch.add_argument("--updates", type=int, default=10, help="optimizer updates per measurement")
    return parser, parser.parse_args()


def check_names(names: list[str]) -> None:
    from models import list_models

    if unknown := [name for name in names if name not in list_models()]:
        raise ConfigError(f"{unknown[0]}: unknown model; choose among {', '.join(list_models())}")


def measure_models(args: argparse.Namespace, device) -> list[dict]:
    from benchmarks.networks import measure_model
    from engine.optim import PRECISIONS as DTYPES

    check_names(args.models)
    training_flags = {"inference": (False,), "training": (True,), "both": (False, True)}[args.steps]
    records = []
    for name, precision, batch_size, training in itertools.product(
        args.models, args.precision, args.batch_size, training_flags
    ):
        options = {"img_size": args.img_size, "batch_size": batch_size, "training": training, "compiled": args.compile}
        records += measure_model(name, **options, dtype=DTYPES[precision], rounds=args.rounds, device=device)
    return records


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


# Keys that change the forward and backward passes, but have no effect in ``measure_ablation``.
UNMEASURED_KEYS = ("AMP", "TRAIN.COMPILE", "TRAIN.FREEZE_BACKBONE", "TRAIN.SIZE_SCHEDULE", "TRAIN.TEACHER")


def measure_ablation(args: argparse.Namespace, device) -> list[dict]:
    from benchmarks.networks import measure_arms
    from jobs.ablation import read_ablation
    from models import build_model

    ablation, arms = read_ablation(args.file), {}
    for name in ablation.arms:
        _, cfg = ablation.load(name, {})
        options = flatten(cfg)
        for key in UNMEASURED_KEYS:
            if options[key] != KEYS[key].default:
                advice = f"set it to {KEYS[key].default!r} in a copy of the file"
                raise ConfigError(f"{args.file}: arm {name}: {key}={options[key]!r} is not measured; {advice}")
        model = build_model(cfg)
        model.set_grad_checkpointing(cfg.TRAIN.USE_CHECKPOINT)
        arms[name] = model, (cfg.DATA.BATCH_SIZE, 3, *image_size(cfg))
    return measure_arms(arms, rounds=args.rounds, device=device)


def measure_data(args: argparse.Namespace, _device) -> list[dict]:
    from benchmarks.loading import measure_loading, measure_workers
    from jobs.predict import find_images
    from utils.devices import count_cores

    cfg, paths = load_config(args.cfg), find_images(args.images)
    max_workers = count_cores() if args.workers is None else args.workers
    records = measure_loading(paths, cfg, rounds=args.rounds, packed=args.packed)
    return records + measure_workers(paths, cfg, batch_size=16, max_workers=max_workers)


def measure_epoch(args: argparse.Namespace, device) -> list[dict]:
    from benchmarks.loop import measure_loop
    from utils.distributed import World
    from utils.log import setup_logging

    setup_logging(rank=0)
    cfg = load_config(args.cfg, [*args.opts, "DATA.DATA_PATH", str(args.data_path)])
    return measure_loop(cfg, World(0, 0, 1, device), updates=args.updates, rounds=args.rounds)


MEASURES = {
    "model": measure_models,
    "attention": measure_attention,
    "traffic": measure_traffic,
    "arms": measure_ablation,
    "data": measure_data,
    "epoch": measure_epoch,
}


def main() -> None:
    parser, args = parse()
    with reporting_errors(parser):
        check_positive(args, "rounds", "batch-size", "img-size", "tokens", "dim", "heads", "updates")
        check_outputs(args, "json", "png")
        import torch
        from matplotlib.figure import Figure

        from benchmarks.tables import draw_attention, draw_models, to_markdown

        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        records = MEASURES[args.mode](args, device)
        about = {
            "command": shlex.join(sys.argv),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        }
        print(", ".join(f"{key} {value}" for key, value in about.items()) + f"\n\n{to_markdown(records)}\n")
        if args.json:
            write_json(args.json, about | {"records": records})
        if getattr(args, "png", None):
            figure = Figure(figsize=(12, 5), layout="constrained", dpi=110)
            (draw_attention if args.mode == "attention" else draw_models)(records, figure)
            save_figure(figure, args.png)


if __name__ == "__main__":
    main()
