"""The teacher of a run with TRAIN.TEACHER: a checkpoint of this project, or a model of timm."""

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from typing import Any, NamedTuple, TypeVar

import timm
import torch
from torch import nn
from yacs.config import CfgNode

from data.classes import ClassMatch, compare_classes, imagenet_classes, read_class_map
from data.files import DataError
from engine.distillation import Teacher
from engine.optim import amp_dtype
from jobs.locate_checkpoint import check_same_file, open_checkpoint, stored_config
from jobs.model import check_finite_weights, choose_attention, load_models
from models.checkpoints.reader import CheckpointError, choose_weights
from utils.config.loading import flatten, image_size
from utils.config.training_keys import TIMM_PREFIX
from utils.distributed import World, on_all
from utils.errors import ConfigError, one_line

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class Source(NamedTuple):
    """A trained model with its preprocessing.

    Attributes:
        size: height and width of its images.
        classes: class names by class id; () if they are unknown.
        cfg: the model's own config; None for a model of timm.
    """

    model: nn.Module
    size: tuple[int, int]
    mean: Sequence[float]
    std: Sequence[float]
    classes: Sequence[str]
    cfg: CfgNode | None = None

    def digest(self) -> str:
        """SHA-256 of the weights and the preprocessing."""
        digest = hashlib.sha256(repr((tuple(self.size), tuple(self.mean), tuple(self.std))).encode())
        for name, value in self.model.state_dict().items():
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


def build_teacher(
    cfg: CfgNode, world: World, classes: Sequence[str], saved: Mapping | None = None, path: str = ""
) -> tuple[Teacher | None, str]:
    """Build the teacher of TRAIN.TEACHER, and check its prediction for a grey image.

    Args:
        classes: class names of the training data, by class id.
        saved: contents of the checkpoint or replay file at ``path``, whose run is continued or repeated; None for a new run.

    Returns:
        The teacher, and the SHA-256 of its weights and preprocessing; None and "" without TRAIN.TEACHER.

    Raises:
        CheckpointError: the weights cannot be read, or weights or logits are not finite.
        ConfigError, DataError: the teacher has other classes than the data, or other weights than in ``saved``.
    """
    reference = cfg.TRAIN.TEACHER
    if not reference:
        return None, ""

    def open_teacher() -> tuple[Source, Teacher, str]:
        source = open_timm(reference) if reference.startswith(TIMM_PREFIX) else open_trained(cfg, world)
        check_finite_weights(source.model, reference, "teacher's")
        digest = source.digest()
        if saved is not None:
            check_same_teacher(saved, reference, digest, path)
        teacher = Teacher(
            source.model.to(world.device),
            size=source.size,
            mean=source.mean,
            std=source.std,
            student_mean=cfg.DATA.MEAN,
            student_std=cfg.DATA.STD,
            order=match_classes(classes, source, is_main=world.is_main),
            amp_dtype=amp_dtype(cfg),
            device=world.device,
        )
        return source, teacher, digest

    source, teacher, digest = on_all(world, partial(name_key, reference, open_teacher))
    check_same_file(world, reference, lambda: digest)
    num_parameters = sum(parameter.numel() for parameter in source.model.parameters())
    logger.info("teacher: %s, %.2fM parameters, images of %d x %d", reference, num_parameters / 1e6, *source.size)
    if source.cfg is not None:
        choose_attention([source.model], [amp_dtype(cfg)], source.cfg, world)
    on_all(world, partial(name_key, reference, partial(check_prediction, teacher, cfg, world.device)))
    return teacher, digest


def name_key(reference: str, task: Callable[[], Result]) -> Result:
    """Run a task; its errors then begin with the key."""
    try:
        return task()
    except (CheckpointError, ConfigError, DataError) as error:
        raise type(error)(f"TRAIN.TEACHER={reference}: {error}") from None


def open_trained(cfg: CfgNode, world: World) -> Source:
    """Open the checkpoint of TRAIN.TEACHER, with its EMA weights under the same condition as in a prediction.

    Raises:
        ConfigError, CheckpointError: the file is not a checkpoint of a model of this project with its config.
    """
    checkpoint = open_checkpoint(cfg.TRAIN.TEACHER)
    backend = "torch" if cfg.MODEL.LA.BACKEND == "torch" else "auto"  # triton may be impossible for the teacher only
    own = stored_config(checkpoint, ["MODEL.LA.BACKEND", backend])
    if own is None:
        raise ConfigError("the file has weights but no config; give a checkpoint that a run of this project has written")
    label, _ = choose_weights(checkpoint.state, "auto", checkpoint.path)
    logger.info("teacher: %s weights of %s", label, checkpoint.path)
    model = load_models(checkpoint, own, labels=(label,), device=torch.device("cpu"), is_main=world.is_main)[label]
    return Source(model, image_size(own), own.DATA.MEAN, own.DATA.STD, checkpoint.class_names, own)


def open_timm(reference: str) -> Source:
    """Open a pretrained model of timm.

    Raises:
        CheckpointError: there is no such model, or its weights cannot be downloaded.
    """
    name = reference.removeprefix(TIMM_PREFIX)
    try:
        model: Any = timm.create_model(name, pretrained=True)
    except Exception as error:  # timm, the hub's client and the network raise errors of many types
        near = [] if timm.is_model(name) else get_close_matches(name, timm.list_models(pretrained=True), n=1)
        hint = f"; did you mean {TIMM_PREFIX}{near[0]}?" if near else "."
        raise CheckpointError(
            f"timm cannot load these weights ({type(error).__name__}: {one_line(error)}){hint} Without a connection to the "
            "hub, write the model to a directory on another machine, with timm.models.save_for_hf(model, DIRECTORY), and give "
            f"{TIMM_PREFIX}local-dir:DIRECTORY"
        ) from None
    data = model.pretrained_cfg
    channels, height, width = data["input_size"]
    if channels != 3:
        raise ConfigError(f"the model takes images with {channels} channels; choose a model for RGB images")
    classes = data.get("label_names") or imagenet_classes(model.num_classes)
    return Source(model, (height, width), data["mean"], data["std"], classes)


def match_classes(classes: Sequence[str], source: Source, *, is_main: bool) -> Sequence[int]:
    """The teacher's class id of each class of the data; () if they are the same.

    Raises:
        ConfigError: the teacher has other classes, or their order is ambiguous.
    """
    match, difference = compare_classes(classes, source.classes, ("the data", "the teacher"))
    if match is ClassMatch.REORDERED:
        return read_class_map("names", classes, len(classes), source.classes)
    if match is ClassMatch.UNVERIFIED and is_main:
        logger.warning("teacher: %s, so classes are matched by class id: class 0 is %r in the data", difference, classes[0])
    if match in (ClassMatch.AMBIGUOUS, ClassMatch.DIFFERENT):
        raise ConfigError(
            f"the teacher was trained with {match.value}: {difference}. Train a larger model on the classes of the data (for "
            "few images, with --pretrained), and give its directory as TRAIN.TEACHER"
        )
    return ()


def check_prediction(teacher: Teacher, cfg: CfgNode, device: torch.device) -> None:
    """Check the teacher's logits of one grey image of the run.

    Raises:
        ConfigError: the teacher has another number of classes than the model.
        CheckpointError: the logits are not finite.
    """
    logits = teacher(torch.zeros(1, 3, *image_size(cfg), device=device))
    if logits.shape != (1, cfg.MODEL.NUM_CLASSES):
        raise ConfigError(
            f"the teacher's output has shape {tuple(logits.shape[1:])}, but there are {cfg.MODEL.NUM_CLASSES} classes; give a "
            "model that was trained on the classes of the data"
        )
    if not logits.isfinite().all():
        remedy = "; set AMP_DTYPE bf16, or choose another teacher" if teacher.amp_dtype == torch.float16 else ""
        raise CheckpointError(f"the logits of a grey image are not finite{remedy or '; choose another teacher'}")


def check_same_teacher(saved: Mapping, reference: str, digest: str, path: str) -> None:
    """Check that a resumed or repeated run has the teacher that it had before, unless TRAIN.TEACHER has changed too.

    Args: see ``build_teacher``.

    Raises:
        ConfigError: the same TRAIN.TEACHER now has other weights.
    """
    former = saved.get("teacher_digest", "")
    if former in ("", digest):
        return
    if flatten(saved["config"]).get("TRAIN.TEACHER") == reference:
        raise ConfigError(
            f"the weights have changed since {path} was saved. Restore them; or, to continue with the new ones, copy them to "
            "another path and give that path as TRAIN.TEACHER"
        )
    logger.warning("%s: TRAIN.TEACHER has changed, and has other weights: %s", path, reference)
