"""Optimizer, gradient scaler, EMA of the weights, and loss."""

import logging
from inspect import signature
from typing import Any

import numpy as np
import torch
from timm.loss import BinaryCrossEntropy
from timm.models import group_parameters
from timm.optim import create_optimizer_v2, get_optimizer_class
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from yacs.config import CfgNode

from engine.distillation import DistillationLoss
from utils.config.optimizers import OPTIMIZERS
from utils.errors import ConfigError

logger = logging.getLogger(__name__)

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def amp_dtype(cfg: CfgNode) -> torch.dtype:
    """Precision of the forward passes in training; float32 without mixed precision."""
    return PRECISIONS[cfg.AMP_DTYPE if cfg.AMP else "fp32"]


def eval_dtype(cfg: CfgNode) -> torch.dtype:
    """Precision of evaluation."""
    return amp_dtype(cfg) if cfg.TEST.PRECISION == "train" else torch.float32


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """Build the optimizer that timm knows as TRAIN.OPTIMIZER.NAME, with the options that it takes."""
    options, groups = cfg.TRAIN.OPTIMIZER, build_parameter_groups(cfg, model)
    name = "momentum" if options.NAME == "sgd" and options.MOMENTUM == 0 else options.NAME  # timm's SGD without Nesterov
    parameters = [parameter for group in groups for _, parameter in group["params"]]
    # Fused optimizers update many parameters in one kernel. This code uses them on CUDA devices and CPUs only.
    has_fused = "fused" in signature(get_optimizer_class(name, bind_defaults=False)).parameters
    is_fused = all(parameter.device.type in ("cuda", "cpu") for parameter in parameters)
    fused: dict[str, Any] = {"fused": is_fused} if has_fused else {}
    if not has_fused and parameters[0].device.type == "cuda":
        logger.info("%s is not fused: at each update, the host waits for the device to check loss and gradient", name)
    values = {"EPS": options.EPS, "BETAS": tuple(options.BETAS), "MOMENTUM": options.MOMENTUM}
    taken: dict[str, Any] = {option.lower(): values[option] for option in OPTIMIZERS[options.NAME]}
    optimizer = create_optimizer_v2(groups, opt=name, lr=cfg.TRAIN.BASE_LR, **taken, **fused)
    if isinstance(optimizer, SGD) and options.MOMENTUM > 0:
        # Without these zeros, fused SGD would leave the momentum uninitialised if the first step is skipped.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def build_parameter_groups(cfg: CfgNode, model: nn.Module) -> list[dict]:
    """Group the trainable parameters by weight decay (none for ``model.no_weight_decay()``) and learning rate.

    Every group has an ``lr_scale``, its learning-rate multiplier, and the names of its parameters, so that the state of the
    optimizer contains them. The multiplier is the product of layer-wise decay (https://arxiv.org/abs/2106.08254), over the
    layers of the model's ``group_matcher`` from the stem to the head, and of TRAIN.HEAD_LR_SCALE for the classifier. With
    ``muon``, groups also have ``use_fallback``: the classifier and the parameters without weight decay, among them position
    tables with the shape of a weight matrix, are trained with AdamW. timm sends others to AdamW by their shape.

    timm's functions give the same decays and multipliers, but not the groups of stored checkpoints: they merge groups if
    TRAIN.WEIGHT_DECAY is 0, and have another order.
    """
    methods: Any = model  # torch types the methods of our models as tensors or modules
    exempt, head = methods.no_weight_decay(), {id(parameter) for parameter in methods.get_classifier().parameters()}
    decays_by_layer = cfg.TRAIN.LAYER_DECAY < 1
    layers = group_parameters(model, methods.group_matcher(coarse=False), reverse=True) if decays_by_layer else {}
    is_muon = cfg.TRAIN.OPTIMIZER.NAME == "muon"
    groups: dict[tuple[bool, float, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            scale = cfg.TRAIN.LAYER_DECAY ** (max(layers.values()) - layers[name]) if decays_by_layer else 1.0
            scale *= cfg.TRAIN.HEAD_LR_SCALE if id(parameter) in head else 1.0
            uses_fallback = is_muon and (name in exempt or id(parameter) in head)
            groups.setdefault((name in exempt, scale, uses_fallback), []).append((name, parameter))
    return [
        {"params": groups[key], "weight_decay": 0.0 if key[0] else cfg.TRAIN.WEIGHT_DECAY, "lr_scale": key[1]}
        | ({"use_fallback": key[2]} if is_muon else {})
        for key in sorted(groups)
    ]


def build_scaler(cfg: CfgNode, device: torch.device) -> torch.amp.GradScaler:
    """Build the loss scaler of fp16; in other precisions it has no effect."""
    return torch.amp.GradScaler(device.type, enabled=amp_dtype(cfg) == torch.float16)


def build_ema(cfg: CfgNode, model: nn.Module) -> ModelEmaV3 | None:
    """EMA of the weights, e = decay * e + (1 - decay) * w after each update; None if disabled.

    With EMA.WARMUP, the decay depends on the number of updates of the average, see ``TrainState.update_ema``.
    """
    if not cfg.EMA.ENABLED:
        return None
    device = torch.device("cpu") if cfg.EMA.FORCE_CPU else None
    # The models have no buffers. Without this option, each update would list both state dicts, which takes 4.6 times as long.
    return ModelEmaV3(model, decay=cfg.EMA.DECAY, use_warmup=cfg.EMA.WARMUP, device=device, exclude_buffers=True)


class WeightedCrossEntropy(nn.CrossEntropyLoss):
    """Cross entropy with a weight per class, averaged over the images.

    torch divides by the sum of the weights of a batch. Then, the loss of an update would depend on how its images are divided
    among processes and forward passes.
    """

    def __init__(self, weight: Tensor, label_smoothing: float):
        super().__init__(weight, reduction="none", label_smoothing=label_smoothing)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target).mean()


def build_criterion(
    cfg: CfgNode, *, mixed: bool, labels: np.ndarray | None = None, device: torch.device | None = None
) -> nn.Module:
    """Build the training loss, for class ids or probabilities; with TRAIN.TEACHER, for ``DistillationTargets``.

    Args, Raises: see ``build_base_criterion``.
    """
    base, options = build_base_criterion(cfg, mixed=mixed, labels=labels, device=device), cfg.TRAIN.DISTILLATION
    if not cfg.TRAIN.TEACHER:
        return base
    return DistillationLoss(base, kind=options.KIND, weight=options.WEIGHT, temperature=options.TEMPERATURE)


def build_base_criterion(cfg: CfgNode, *, mixed: bool, labels: np.ndarray | None, device: torch.device | None) -> nn.Module:
    """Build the loss of TRAIN.LOSS, for class ids or probabilities.

    With TRAIN.CLASS_WEIGHTS, the term of class c is multiplied by its weight: target * log(softmax) of ``ce``, and
    target * log(sigmoid) of ``bce``.

    Args:
        mixed: whether mixup or CutMix is used; the targets then already include label smoothing.
        labels: class id of each training image, for balanced weights.
        device: where the weights are needed.

    Raises:
        ConfigError: a class without images has no balanced weight.
    """
    smoothing = 0.0 if mixed else cfg.MODEL.LABEL_SMOOTHING
    weights = build_class_weights(cfg, labels)
    if weights is not None:
        weights = weights.to(device)
    if cfg.TRAIN.LOSS == "bce":
        return BinaryCrossEntropy(smoothing, target_threshold=cfg.TRAIN.BCE_THRESHOLD or None, pos_weight=weights)
    if weights is not None:
        return WeightedCrossEntropy(weights, smoothing)
    return nn.CrossEntropyLoss(label_smoothing=smoothing)


def build_class_weights(cfg: CfgNode, labels: np.ndarray | None) -> Tensor | None:
    """Weight of each class, (num_classes,); None without TRAIN.CLASS_WEIGHTS. Args, Raises: see ``build_base_criterion``."""
    weights = cfg.TRAIN.CLASS_WEIGHTS
    if weights == "none":
        return None
    if weights == "balanced":
        assert labels is not None
        counts = np.bincount(labels, minlength=cfg.MODEL.NUM_CLASSES)
        if counts.min() == 0:
            raise ConfigError(
                f"TRAIN.CLASS_WEIGHTS=balanced: the class with id {counts.argmin()} has no training images; add images, or set "
                "TRAIN.CLASS_WEIGHTS none"
            )
        weights = len(labels) / (len(counts) * counts)
        logger.info(
            "class weights: from %.3g (class id %d, %d images) to %.3g (class id %d, %d images)",
            *(weights.min(), counts.argmax(), counts.max(), weights.max(), counts.argmin(), counts.min()),
        )
    return torch.tensor(weights, dtype=torch.float32)
