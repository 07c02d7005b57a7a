"""Evaluate checkpoints on one or more data sets; print a table, and write a CSV with one row per checkpoint and data set.

Unless --cfg is set, each checkpoint is evaluated with its own config: input size, crop, classes. A data set is a directory with
a validation split, or with class directories, such as those of ImageNet-A; --opts applies to all of them. The CSV is rewritten
after every evaluation, so an interrupted run loses no results. Evaluations that fail are reported and skipped.
"""

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
from scripts.command_line import check_outputs, check_positive, create_parser, reporting_errors
from utils.config.loading import load_config, option_keys
from utils.errors import USAGE_ERROR, ConfigError, TrainingError
from utils.files import write_csv
from utils.text import markdown_code, markdown_table, printable

logger = logging.getLogger(__name__)

WARMUP_BATCHES, MEASURED_BATCHES = 3, 10  # forward passes in the measurement of throughput


def read_data_sets(values: Sequence[str]) -> dict[str, Path]:
    """The name and the directory of each data set, from PATH or NAME=PATH.

    Raises:
        ConfigError: a directory does not exist, or two data sets have the same name.
    """
    data_sets: dict[str, Path] = {}
    for value in values:
        name, _, text = value.partition("=")
        if not (name and text) or os.path.isdir(value):
            name, text = os.path.basename(os.path.abspath(value)), value
        path = Path(os.path.expanduser(text))
        if not text or not path.is_dir():
            raise ConfigError(f"--data-path {value}: no such directory; correct the path")
        if name in data_sets:
            remedy = f"give --data-path {shlex.quote(f'NAME={text}')} with a name of its own"
            raise ConfigError(f"--data-path {value}: another data set has the name {name}; {remedy}")
        data_sets[name] = path
    return data_sets


def open_checkpoint(reference: str, world) -> Any:
    from jobs import locate_checkpoint

    checkpoint = locate_checkpoint.open_checkpoint(reference)
    locate_checkpoint.check_same_file(world, checkpoint.path, lambda: checkpoint.digest)
    return checkpoint


def evaluate_on(path: Path, checkpoint, models: dict | None, args: argparse.Namespace, world) -> tuple:
    """Evaluate a checkpoint on the data set in ``path``. Returns its config and the ``jobs.evaluate.Evaluation``.

    Args:
        models: those of the checkpoint, if they are already loaded.
    """
    from data.splits import lacks_splits
    from jobs.evaluate import evaluate_weights
    from jobs.locate_checkpoint import choose_config

    opts = ["DATA.DATA_PATH", str(path), *args.opts]
    cfg = choose_config(checkpoint, load_config(args.cfg, opts) if args.cfg else None, opts)
    if not (cfg.DATA.VAL_SPLIT or cfg.DATA.VAL_FRACTION or cfg.DATA.ZIP_MODE) and lacks_splits(path):
        cfg = cfg.clone()
        cfg.defrost()
        cfg.DATA.VAL_SPLIT = "."
        cfg.freeze()
    logger.info("evaluating %s on %s", checkpoint.path, path)
    return cfg, evaluate_weights(checkpoint, cfg, world, models)


def measure_speed(cfg, evaluation, batch_size: int, world) -> float:
    """Images per second with test-time augmentation, if there is any."""
    import torch

    from engine.evaluation import augmented
    from engine.optim import eval_dtype
    from jobs.throughput import images_per_second
    from utils.config.loading import image_size

    model = augmented(evaluation.models[evaluation.preferred].eval(), cfg.TEST.TTA)
    images = torch.randn(batch_size, 3, *image_size(cfg), device=world.device)
    batches = {"warmup_batches": WARMUP_BATCHES, "measured_batches": MEASURED_BATCHES}
    return images_per_second(model, images, eval_dtype(cfg), **batches)


def build_row(data_set: str, cfg, checkpoint, evaluation, speed: float) -> dict[str, Any]:
    """The CSV row of an evaluation."""
    from data.build import build_preprocessing
    from engine.optim import eval_dtype
    from engine.significance import wilson_interval

    result, model = evaluation.result, evaluation.models[evaluation.preferred]
    low, high = wilson_interval(result.correct1, result.num_images)
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
        "images_per_second": f"{speed:.1f}",
        **{key: preprocessing[key] for key in ("img_size", "crop_mode", "crop_pct", "interpolation")},
        "precision": str(eval_dtype(cfg)).removeprefix("torch."),
        "checkpoint": str(checkpoint.path),
        "sha256": checkpoint.digest,
        "data_set": data_set,
        "data": cfg.DATA.DATA_PATH,
        "tta": cfg.TEST.TTA,
    }


def evaluate_all(args: argparse.Namespace, data_sets: Mapping[str, Path], world) -> list[str]:
    """Evaluate all checkpoints, write the CSV and print the table. Returns the reason for each evaluation that failed.

    Raises:
        ConfigError, DataError, CheckpointError, TrainingError: an evaluation failed, and there are several processes, which
            would not stay synchronised if the error occurred in only one of them.
    """
    rows: dict[tuple[int, str], dict] = {}  # position of the checkpoint in the arguments, and name of the data set -> CSV row
    failed = []

    def attempt(what: str, task: Callable[[], Any]) -> Any:
        try:
            return task()
        except (ValueError, TrainingError) as error:  # ConfigError, DataError and CheckpointError are ValueErrors
            if world.size > 1:
                raise
            failed.append(f"{what}: {error}")  # printable removes the secrets of a URL
            return None

    order = list(data_sets)
    for position, reference in enumerate(args.checkpoints):
        checkpoint = attempt(reference, partial(open_checkpoint, reference, world))
        models, speed = None, 0.0
        for name, path in data_sets.items() if checkpoint is not None else ():
            where = f"{reference} on {name}" if len(data_sets) > 1 else reference
            evaluated = attempt(where, partial(evaluate_on, path, checkpoint, models, args, world))
            if evaluated is None:
                continue
            cfg, evaluation = evaluated
            if models is None:
                models, speed = evaluation.models, measure_speed(cfg, evaluation, args.batch_size, world)
            rows[position, name] = build_row(name, cfg, checkpoint, evaluation, speed)
            ranked = sorted(rows.values(), key=lambda row: (order.index(row["data_set"]), -float(row["acc1"])))
            if world.is_main:
                write_csv(args.csv, list(ranked[0]), [row.values() for row in ranked])
    if world.is_main:
        if rows:
            print(build_table(rows, args.checkpoints, order))
        for reason in failed:
            print(f"evaluate_all.py: error: {printable(reason)}", file=sys.stderr)
    return failed


def build_table(rows: Mapping[tuple[int, str], dict], checkpoints: Sequence[str], data_sets: Sequence[str]) -> str:
    """Markdown table of the top-1 accuracies, with one row per checkpoint, sorted by the accuracy on the first data set.

    Below it, one line per data set gives how it was evaluated, if not by one prediction per image among all classes.

    Args:
        rows: CSV rows, by position of the checkpoint and name of the data set; those of failed evaluations are missing.
    """
    from engine.evaluation import describe_conditions

    table, conditions = [], {}
    for position, reference in enumerate(checkpoints):
        found = [rows.get((position, name), {}) for name in data_sets]
        size = next((row["img_size"] for row in found if row), None)
        if size is None:
            continue
        accuracies = [row.get("acc1", "") for row in found]
        key = tuple(-float(accuracy or -1) for accuracy in accuracies)
        table.append((key, [markdown_code(printable(reference)), size, *accuracies]))
        for row in filter(None, found):
            if text := describe_conditions(row["restriction"], row["tta"]):
                conditions[f"{markdown_code(row['data_set'])}: {text}"] = None
    header = ["top-1 accuracy in %", "pixels", *map(markdown_code, data_sets)]
    table.sort(key=lambda entry: entry[0])
    return "\n".join([markdown_table(header, [cells for _, cells in table]), *([""] if conditions else []), *conditions])


def main() -> None:
    parser = create_parser(__doc__, "checkpoints", "--cfg", "--opts")
    parser.add_argument(
        "--data-path",
        action="append",
        required=True,
        metavar="[NAME=]PATH",
        help="directory of a data set, optionally with its name in the table; repeat it for several data sets",
    )
    parser.add_argument("--csv", type=Path, required=True, help="file to write")
    parser.add_argument("--batch-size", type=int, default=16, help="batch size of the throughput measurement (default: 16)")
    args = parser.parse_args()
    with reporting_errors(parser):
        check_positive(args, "batch-size")
        data_sets = read_data_sets(args.data_path)
        if "DATA.DATA_PATH" in option_keys(args.opts):
            raise ConfigError("--opts DATA.DATA_PATH: would replace every data set; remove it, and give --data-path")
        if args.cfg:
            load_config(args.cfg, args.opts)
        check_outputs(args, "csv")

    # Imported after the arguments are checked, because importing torch is slow.
    from jobs.launch import leave
    from utils.distributed import cleanup, setup
    from utils.log import setup_logging

    world = None
    try:
        world = setup()
        setup_logging(world.rank)
        failed = evaluate_all(args, data_sets, world)
        cleanup()
    except BaseException as error:  # loader workers and other processes must end too
        leave(error, world)
    sys.exit(USAGE_ERROR if failed else 0)


if __name__ == "__main__":
    main()
