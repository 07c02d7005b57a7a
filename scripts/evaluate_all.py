"""Evaluate many checkpoints on one data set, and write a CSV with one row per checkpoint, sorted by accuracy.

Unless --cfg is set, each checkpoint is evaluated with its own config: input size, crop, classes. The CSV is rewritten after
every checkpoint, so an interrupted run loses no results. A checkpoint that cannot be evaluated is reported and skipped.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from scripts.command_line import check_outputs, create_parser, reporting_errors
from utils.errors import USAGE_ERROR, ConfigError
from utils.files import write_csv
from utils.text import printable

WARMUP_BATCHES, MEASURED_BATCHES = 3, 10  # forward passes in the measurement of throughput


def evaluate_one(reference: str, args: argparse.Namespace, world) -> dict:
    """Evaluate one checkpoint. Returns its CSV row."""
    import torch

    from data.build import build_preprocessing
    from engine.optim import eval_dtype
    from engine.significance import wilson_interval
    from jobs.evaluate import evaluate_weights
    from jobs.locate_checkpoint import check_same_file, choose_config, open_checkpoint
    from jobs.throughput import images_per_second
    from utils.config.loading import image_size, load_config

    opts = ["DATA.DATA_PATH", str(args.data_path), *args.opts]
    checkpoint = open_checkpoint(reference)
    check_same_file(world, checkpoint.path, lambda: checkpoint.digest)
    cfg = choose_config(checkpoint, load_config(args.cfg, opts) if args.cfg else None, opts)
    evaluation = evaluate_weights(checkpoint, cfg, world)
    result, model = evaluation.result, evaluation.models[evaluation.preferred].eval()
    low, high = wilson_interval(result.correct1, result.num_images)
    images = torch.randn(args.batch_size, 3, *image_size(cfg), device=world.device)
    batches = {"warmup_batches": WARMUP_BATCHES, "measured_batches": MEASURED_BATCHES}
    preprocessing = build_preprocessing(cfg).to_dict()
    return {
        "acc1": f"{result.acc1:.3f}",
        "acc1_low_95": f"{low:.3f}",
        "acc1_high_95": f"{high:.3f}",
        "acc5": f"{result.acc5:.3f}",
        "correct1": result.correct1,
        "num_images": result.num_images,
        "restriction": evaluation.datasets.restriction,
        "model": cfg.MODEL.NAME,
        "weights": evaluation.preferred,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "images_per_second": f"{images_per_second(model, images, eval_dtype(cfg), **batches):.1f}",
        **{key: preprocessing[key] for key in ("img_size", "crop_mode", "crop_pct", "interpolation")},
        "precision": str(eval_dtype(cfg)).removeprefix("torch."),
        "checkpoint": str(checkpoint.path),
        "sha256": checkpoint.digest,
    }


def evaluate_all(args: argparse.Namespace, world) -> list[str]:
    """Evaluate all checkpoints and write the CSV. Returns the reason for each checkpoint that cannot be evaluated.

    Raises:
        ConfigError, DataError, CheckpointError: a checkpoint cannot be evaluated, and there are several processes, which would
            not stay synchronised if the error occurred in only one of them.
    """
    rows, failed = [], []
    for reference in args.checkpoints:
        try:
            rows.append(evaluate_one(reference, args, world))
        except ValueError as error:  # ConfigError, DataError or CheckpointError
            if world.size > 1:
                raise
            failed.append(f"{reference}: {error}")  # printable removes the secrets of a URL
            continue
        rows.sort(key=lambda row: -float(row["acc1"]))
        if world.is_main:
            write_csv(args.csv, list(rows[0]), [row.values() for row in rows])
    if world.is_main:
        for row in rows:
            print(printable(f"{row['acc1']:>8} % {row['model']:<24}{row['img_size']!s:>10} px {row['checkpoint']}"))
        for reason in failed:
            print(f"evaluate_all.py: error: {printable(reason)}", file=sys.stderr)
    return failed


def main() -> None:
    parser = create_parser(__doc__, "checkpoints", "--data-path", "--cfg", "--opts")
    parser.add_argument("--csv", type=Path, required=True, help="file to write")
    parser.add_argument("--batch-size", type=int, default=16, help="batch size of the throughput measurement (default: 16)")
    args = parser.parse_args()
    with reporting_errors(parser):
        if not args.data_path.is_dir():
            raise ConfigError(f"--data-path {args.data_path}: no such directory")
        check_outputs(args, "csv")

    # Imported after the arguments are checked, because importing torch is slow.
    from jobs.launch import leave
    from utils.distributed import cleanup, setup
    from utils.log import setup_logging

    world = None
    try:
        world = setup()
        setup_logging(world.rank)
        failed = evaluate_all(args, world)
        cleanup()
    except BaseException as error:  # loader workers and other processes must end too
        leave(error, world)
    sys.exit(USAGE_ERROR if failed else 0)


if __name__ == "__main__":
    main()
