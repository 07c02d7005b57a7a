"""Evaluate a checkpoint on a dataset."""

import argparse
import logging
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from yacs.config import CfgNode

from data.build import Datasets, build_datasets, build_eval_loader, build_preprocessing
from engine.evaluation import EvalResult, evaluate, log_results
from engine.metrics import wilson_interval
from engine.optim import eval_dtype
from engine.report import write_evaluation
from engine.run_directory import build_output_path, create_output_directory
from jobs.attention_backend import choose_attention
from jobs.locate_checkpoint import Checkpoint, check_same_file, choose_config, open_checkpoint
from jobs.train import check_model, format_process_count
from models import build_model
from models.checkpoints.loading import fill_model
from models.checkpoints.reader import CheckpointError, choose_weights, preferred_weights, stored_weights
from models.checkpoints.released import Released
from utils.config.keys import STORED_KEY_PREFIXES
from utils.config.loading import load_config, option_keys
from utils.distributed import World, on_all, on_main
from utils.environment import apply_numerical_settings

logger = logging.getLogger(__name__)

# The maximum number of values in a model is MAX_GROWTH times the number of weights in its file, plus MAX_NEW_VALUES.
MAX_GROWTH = 4
MAX_NEW_VALUES = 100_000_000


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
    checkpoint = on_all(world, lambda: open_checkpoint(choose_checkpoint(args, cfg)))
    check_same_file(world, checkpoint.path, lambda: checkpoint.digest)
    own_config = cfg is None
    cfg = choose_config(checkpoint, cfg, opts)
    output = choose_output(cfg, checkpoint, opts, own_config=own_config)
    on_main(world, lambda: create_output_directory(output))
    logger.info(
        "%s on %s, output in %s; evaluating %s", format_process_count(world), world.device.type, output, checkpoint.path
    )
    evaluation = evaluate_weights(checkpoint, cfg, world)
    index = evaluation.datasets.val.index
    on_main(
        world,
        lambda: write_evaluation(
            output,
            evaluation.results,
            preferred=evaluation.preferred,
            about=describe_evaluation(cfg, checkpoint) | {"attention": evaluation.attention},
            classes=index.classes,
            names=[index.name(position) for position in range(len(index))],
            real_labels=evaluation.datasets.real_labels,
            predictions=cfg.TEST.PREDICTIONS,
        ),
    )
    if checkpoint.location.released is not None:
        log_published(checkpoint.location.released, evaluation.result)
    logger.info("%s", evaluation.result)


def choose_checkpoint(args: argparse.Namespace, cfg: CfgNode | None) -> str:
    """The checkpoint to evaluate: --resume, else --pretrained, else MODEL.RESUME, else MODEL.PRETRAINED.

    TRAIN.AUTO_RESUME has no effect on an evaluation.
    """
    return args.resume or args.pretrained or cfg.MODEL.RESUME or cfg.MODEL.PRETRAINED


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


def evaluate_weights(checkpoint: Checkpoint, cfg: CfgNode, world: World) -> Evaluation:
    """Evaluate every set of weights of a checkpoint on the validation images of DATA.DATA_PATH.

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
    loader = build_eval_loader(cfg, datasets.val, rank=world.rank, world_size=world.size, device=world.device)
    models = load_models(checkpoint, cfg, labels=tuple(stored_weights(checkpoint.state)) or ("raw",), device=world.device)
    attention = choose_attention(models.values(), [eval_dtype(cfg)], cfg, world)
    options = {"class_ids": datasets.class_ids, "keep_predictions": True}
    results = evaluate(models, loader, amp_dtype=eval_dtype(cfg), world=world, **options)
    log_results(results)
    return Evaluation(results, models, preferred_weights(checkpoint.state), datasets, attention)


def load_models(
    checkpoint: Checkpoint, cfg: CfgNode, *, labels: Sequence[str], device: torch.device
) -> dict[str, torch.nn.Module]:
    """Build one model per label, with the checkpoint's weights of that label.

    Args:
        labels: labels of the weights, each raw or ema.

    Raises:
        CheckpointError: a weight of the model is missing or has another shape, or a weight of the file is unused.
    """
    check_size(checkpoint, cfg)
    models = {}
    for label in labels:
        models[label] = build_model(cfg).to(device)
        report = fill_model(models[label], checkpoint.state, weights=label, path=checkpoint.path)
        if report.missing or report.reinitialised or report.unused:
            remedy = "choose the config that this file was trained with, or leave out --cfg if the file contains its config"
            if report.head is not None:
                remedy = f"set MODEL.NUM_CLASSES {report.head[0]}; data with other classes need TEST.CLASS_MAP"
            raise CheckpointError(f"{report}. Every weight is required: {remedy}")
    return models


def check_size(checkpoint: Checkpoint, cfg: CfgNode) -> None:
    """Check, before memory is allocated, that the config does not describe a much larger model than the one in the file.

    Raises:
        CheckpointError: the model is too large.
    """
    with torch.device("meta"):
        size = sum(value.numel() for value in build_model(cfg).state_dict().values())
    stored = [sum(value.numel() for value in weights.values()) for weights in stored_weights(checkpoint.state).values()]
    if size > MAX_GROWTH * max(stored, default=0) + MAX_NEW_VALUES:  # position tables grow with the input size
        raise CheckpointError(
            f"{checkpoint.path} contains {max(stored, default=0)} weights, but its config describes a model of {size}; choose "
            "the config that this file was trained with"
        )


class OpenedModel(NamedTuple):
    """A model in evaluation mode, its checkpoint, its config, and the label of its weights (raw or ema)."""

    model: torch.nn.Module
    checkpoint: Checkpoint
    cfg: CfgNode
    weights: str


def open_model(
    reference: str,
    config: Sequence[str] | None,
    opts: Sequence,
    *,
    weights: str,
    device: torch.device | str = "cpu",
    prefixes: Sequence[str] = STORED_KEY_PREFIXES,
) -> OpenedModel:
    """Open a model with the weights of a checkpoint, in evaluation mode.

    Args:
        reference: checkpoint, in any form that --resume accepts.
        config: paths of config files; None or empty for the checkpoint's own config.
        opts: KEY, VALUE, ... that override the config.
        weights: raw, ema or auto.
        prefixes: prefixes of the keys to read from the checkpoint's own config, see ``stored_config``.

    Raises:
        ConfigError: config and checkpoint do not match.
        CheckpointError: config and checkpoint do not match, or weights are not finite.
    """
    checkpoint = open_checkpoint(reference)
    cfg = choose_config(checkpoint, load_config(config, opts) if config else None, opts, prefixes=prefixes)
    check_model(cfg)
    label, _ = choose_weights(checkpoint.state, weights, checkpoint.path)
    model = load_models(checkpoint, cfg, labels=(label,), device=torch.device(device))[label]
    check_finite_weights(model, checkpoint.path, label)
    return OpenedModel(model.eval(), checkpoint, cfg, label)


def check_finite_weights(model: torch.nn.Module, path: Path, label: str) -> None:
    """Check that all weights of a model are finite.

    Raises:
        CheckpointError: a tensor has values that are not finite; the message names the file and the first such tensor.
    """
    for name, value in model.state_dict().items():
        if num_invalid := int((~value.isfinite()).sum()):
            raise CheckpointError(
                f"{path}: {num_invalid} of {value.numel()} values of {name} in the {label} weights are not finite; use an "
                "earlier checkpoint of the run, or other weights of this one (raw or ema)"
            )


def log_published(released: Released, result: EvalResult) -> None:
    """Log a measured accuracy, the published one, and whether the published one is in the confidence interval."""
    low, high = wilson_interval(result.correct1, result.num_images)
    verdict = "within" if low <= released.acc1 <= high else "outside"
    top5 = "" if released.acc5 is None else f"; Acc@5 {result.acc5:.3f} measured, {released.acc5:.3f} published"
    logger.info(
        "%s: Acc@1 %.3f measured on %d images, %.3f published, which is %s the 95 %% confidence interval %.3f to %.3f%s",
        released.name,
        result.acc1,
        result.num_images,
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
        "class_map": cfg.TEST.CLASS_MAP,
        "precision": str(eval_dtype(cfg)).removeprefix("torch."),
        "tf32": cfg.TF32,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "timm": timm.__version__},
    }
