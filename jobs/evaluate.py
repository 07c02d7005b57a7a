"""Evaluate a checkpoint on a dataset."""

import argparse
import logging
import platform
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from yacs.config import CfgNode

from data.build import Datasets, build_datasets, build_eval_loader, build_preprocessing
from data.index import Index, compare_descriptions, describe_index
from data.splits import build_split, digest_held_out
from engine.evaluation import EvalResult, augmented, describe_conditions, evaluate, log_results
from engine.optim import eval_dtype
from engine.report import MISTAKES, draw_mistakes, write_evaluation
from engine.run_directory import create_output_directory
from engine.significance import wilson_interval
from jobs.locate_checkpoint import Checkpoint, check_same_file, choose_config, open_checkpoint
from jobs.model import check_model, choose_attention, load_models
from models.checkpoints.reader import preferred_weights, stored_weights
from models.checkpoints.released import Released
from utils.config.loading import flatten, option_keys
from utils.distributed import World, on_all, on_main
from utils.environment import apply_numerical_settings
from utils.run_files import build_output_path

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Results, models and datasets of an evaluation. Results and models are keyed by label of the weights (raw, ema).

    Args:
        preferred: label of the weights whose result is reported.
        attention: how linear attention was computed, see ``choose_attention``.
    """

    results: dict[str, EvalResult]
    models: dict[str, torch.nn.Module]
    preferred: str
    datasets: Datasets
    attention: str

    @property
    def result(self) -> EvalResult:
        return self.results[self.preferred]


def evaluate_checkpoint(args: argparse.Namespace, cfg: CfgNode | None, opts: Sequence, world: World) -> None:
    """Evaluate the raw and EMA weights of a checkpoint, and write the results to its directory (see ``choose_output``).

    Args:
        cfg: the config of --cfg; None for the checkpoint's own config.
        opts: KEY, VALUE, ... of the command line.
    """
    checkpoint = on_all(world, lambda: open_checkpoint(choose_reference(args, cfg)))
    check_same_file(world, checkpoint.path, lambda: checkpoint.digest)
    own_config = cfg is None
    cfg = choose_config(checkpoint, cfg, opts)
    output = choose_output(cfg, checkpoint, opts, own_config=own_config)
    on_main(world, lambda: create_output_directory(output))
    logger.info("%s, output in %s; evaluating %s", world, output, checkpoint.path)
    evaluation = evaluate_weights(checkpoint, cfg, world)
    on_main(world, lambda: write_results(cfg, checkpoint, evaluation, output))
    conditions = describe_conditions(evaluation.datasets.restriction, cfg.TEST.TTA)
    if checkpoint.location.released is not None:
        log_published(checkpoint.location.released, evaluation.result, conditions)
    logger.info("%s%s", evaluation.result, f" ({conditions})" if conditions else "")


def write_results(cfg: CfgNode, checkpoint: Checkpoint, evaluation: Evaluation, output: Path) -> None:
    """Write the files of an evaluation to ``output``, on rank 0."""
    data = evaluation.datasets.val
    names = [data.index.name(position) for position in range(len(data))]
    classes = name_classes(evaluation.datasets, checkpoint.class_names)
    write_evaluation(
        output,
        evaluation.results,
        preferred=evaluation.preferred,
        about=describe_evaluation(cfg, checkpoint) | {"split": Path(data.index.source).name, "attention": evaluation.attention},
        classes=classes,
        names=names,
        real_labels=evaluation.datasets.real_labels,
        predictions=cfg.TEST.PREDICTIONS,
        restriction=evaluation.datasets.restriction,
        tta=cfg.TEST.TTA,
    )
    if cfg.TEST.MISTAKES:
        options: dict[str, Any] = {"classes": classes, "names": names, "load": data.decode, "path": output / MISTAKES}
        draw_mistakes(evaluation.result, cfg.TEST.MISTAKES, **options)


def name_classes(datasets: Datasets, model_classes: Sequence[str]) -> list[str]:
    """Names of the classes that can be predicted: those of the dataset, followed by the others of the model, if any."""
    names = list(datasets.val.index.classes)
    for class_id in (datasets.class_ids or [])[len(names) :]:
        name = model_classes[class_id] if class_id < len(model_classes) else ""
        names.append(name if name and name not in names else f"class id {class_id}")
    return names


def choose_reference(args: argparse.Namespace, cfg: CfgNode | None) -> str:
    """The checkpoint to evaluate: --resume, else --pretrained, else MODEL.RESUME, else MODEL.PRETRAINED.

    TRAIN.AUTO_RESUME has no effect on an evaluation.
    """
    reference = args.resume or args.pretrained
    return reference or (cfg.MODEL.RESUME or cfg.MODEL.PRETRAINED if cfg is not None else "")


def choose_output(cfg: CfgNode, checkpoint: Checkpoint, opts: Sequence, *, own_config: bool) -> Path:
    """Directory of the results: by default, the directory of the checkpoint.

    If the command line sets OUTPUT or TAG, or if the checkpoint is in the download cache, the directory is
    ``<OUTPUT>/<NAME>/<TAG>``. NAME is MODEL.NAME of --cfg or of the command line, else ``Location.name``. Without --cfg and
    without TAG on the command line, TAG is ``Location.tag`` for a checkpoint of a run.

    Args:
        own_config: whether ``cfg`` is the checkpoint's own config.
    """
    keys = option_keys(opts)
    if not {"OUTPUT", "TAG"} & keys and not checkpoint.location.in_cache:
        return checkpoint.path.parent
    if own_config and "MODEL.NAME" not in keys:
        tag = cfg.TAG if "TAG" in keys else checkpoint.location.tag or cfg.TAG
        return Path(cfg.OUTPUT) / checkpoint.location.name / tag
    return build_output_path(cfg)


def evaluate_weights(
    checkpoint: Checkpoint, cfg: CfgNode, world: World, models: dict[str, torch.nn.Module] | None = None
) -> Evaluation:
    """Evaluate every set of weights of a checkpoint on the validation images of DATA.DATA_PATH.

    Args:
        models: those of an earlier evaluation of the checkpoint with the same model; None to load them.

    Raises:
        ConfigError, DataError, CheckpointError: config, data and checkpoint do not match.
    """
    check_model(cfg)
    apply_numerical_settings(cfg)
    datasets = build_datasets(
        cfg,
        training=False,
        rank=world.rank,
        world_size=world.size,
        run_once=partial(on_main, world, long_timeout=True),
        model_classes=checkpoint.class_names,
    )
    for warn in (warn_about_held_out, warn_about_split):
        on_main(world, partial(warn, checkpoint, cfg, datasets.val.index), long_timeout=True)
    loader = build_eval_loader(
        cfg, datasets.val, rank=world.rank, world_size=world.size, device=world.device, num_cores=world.num_cores
    )
    if models is None:
        labels = tuple(stored_weights(checkpoint.state)) or ("raw",)
        models = load_models(checkpoint, cfg, labels=labels, device=world.device, is_main=world.is_main)
    attention = choose_attention(models.values(), [eval_dtype(cfg)], cfg, world)
    predictors = {label: augmented(model, cfg.TEST.TTA) for label, model in models.items()}
    results = evaluate(
        predictors, loader, amp_dtype=eval_dtype(cfg), world=world, class_ids=datasets.class_ids, keep_predictions=True
    )
    log_results(results)
    return Evaluation(results, models, preferred_weights(checkpoint.state), datasets, attention)


def warn_about_held_out(checkpoint: Checkpoint, cfg: CfgNode, index: Index) -> None:
    """Warn if images that are evaluated may have been used in training, because DATA.VAL_FRACTION holds out other images.

    The evaluation of another split, such as ``test``, is only logged, unless it has as many images as the divided one.

    Args:
        index: the images that are evaluated.
    """
    config, data = checkpoint.state.get("config"), checkpoint.state.get("data")
    if not isinstance(config, Mapping) or not isinstance(data, Mapping):
        return
    stored, fraction = flatten(config).get("DATA.VAL_FRACTION", 0.0), cfg.DATA.VAL_FRACTION
    level, change = logging.WARNING, ""
    if stored != fraction:
        change = f"it was trained with DATA.VAL_FRACTION={stored}, but is evaluated with {fraction}"
        sizes = [split.get("num_images") for split in data.values() if isinstance(split, Mapping)]
        if not fraction and len(index) != sum(size for size in sizes if isinstance(size, int)):
            level = logging.INFO
    elif fraction and (change := _find_held_out_change(data.get("val"), index)):
        change += f"; to evaluate all images, add --opts DATA.VAL_FRACTION 0 DATA.VAL_SPLIT {build_split(cfg, 'train')[0]}"
    if change:
        logger.log(
            level,
            "%s: %s. If images of %s were used in training, the accuracy does not measure generalisation",
            checkpoint.path,
            change,
            index.source,
        )


def _find_held_out_change(stored: object, index: Index) -> str:
    """Whether other images are held out than in training; "" if they are the same.

    Args:
        stored: description of the held-out images in the checkpoint; those of earlier versions have no ``held_out``.
    """
    description = dict(stored) if isinstance(stored, Mapping) else {}
    if description.get("held_out") == digest_held_out(index):
        return ""
    difference = compare_descriptions(description, describe_index(index))
    if "held_out" in description:
        return f"other images than in training are held out by DATA.VAL_FRACTION: {difference}"
    # Packed copies have other names and positions of the same held-out images, so that the comparison cannot decide.
    return difference and (
        f"the images that DATA.VAL_FRACTION holds out may differ from those in training: {difference} (also if the images were "
        "only packed)"
    )


def warn_about_split(checkpoint: Checkpoint, cfg: CfgNode, index: Index) -> None:
    """Warn if the evaluated images are the training images, or if training has evaluated another split of the same data.

    Args:
        index: the images that are evaluated.
    """
    config, data = checkpoint.state.get("config"), checkpoint.state.get("data")
    if not isinstance(config, Mapping) or not isinstance(data, Mapping):
        return
    stored, train = flatten(config), data.get("train")
    if (
        isinstance(train, Mapping)
        and train.get("num_images") == len(index)
        and not compare_descriptions(dict(train), describe_index(index))
    ):
        logger.warning(
            "%s was trained on the images of %s: the accuracy does not measure generalisation", checkpoint.path, index.source
        )
    split = stored.get("DATA.VAL_SPLIT")
    if split and not cfg.DATA.VAL_SPLIT and not cfg.DATA.VAL_FRACTION and stored.get("DATA.DATA_PATH") == cfg.DATA.DATA_PATH:
        logger.warning(
            "%s: training evaluated the split %s, but this is an evaluation of %s; to evaluate the same images, add --opts "
            "DATA.VAL_SPLIT %s",
            checkpoint.path,
            split,
            index.source,
            shlex.quote(str(split)),
        )


def log_published(released: Released, result: EvalResult, conditions: str) -> None:
    """Log a measured accuracy, the published one, and whether the published one is in the confidence interval.

    Args:
        conditions: see ``describe_conditions``.
    """
    low, high = wilson_interval(result.correct1, result.num_images)
    verdict = "within" if low <= released.acc1 <= high else "outside"
    top5 = ""
    if released.acc5 is not None and result.shows_top5:
        top5 = f"; Acc@5 {result.acc5:.3f} measured, {released.acc5:.3f} published"
    logger.info(
        "%s: Acc@1 %.3f measured on %d images%s, %.3f published, which is %s the 95 %% confidence interval %.3f to %.3f%s",
        released.name,
        result.acc1,
        result.num_images,
        f" ({conditions})" if conditions else "",
        released.acc1,
        verdict,
        low,
        high,
        top5,
    )


def describe_evaluation(cfg: CfgNode, checkpoint: Checkpoint) -> dict:
    """Entries of ``eval.json`` that describe the evaluation; the results are added by ``write_evaluation``."""
    released = checkpoint.location.released
    return {
        "model": cfg.MODEL.NAME,
        "checkpoint": str(checkpoint.path),
        "sha256": checkpoint.digest,
        "published": None if released is None else {"acc1": released.acc1, "acc5": released.acc5, "url": released.url},
        "preprocessing": build_preprocessing(cfg).to_dict(),
        "data": cfg.DATA.DATA_PATH,
        "val_fraction": cfg.DATA.VAL_FRACTION,
        "class_map": cfg.TEST.CLASS_MAP,
        "precision": str(eval_dtype(cfg)).removeprefix("torch."),
        "tf32": cfg.TF32,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
    }
