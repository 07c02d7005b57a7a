"""Optimizer, gradient scaler, EMA of the weights, and loss."""

import torch
from timm.models import group_parameters
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from yacs.config import CfgNode

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def amp_dtype(cfg: CfgNode) -> torch.dtype:
    """Precision of the forward passes in training; float32 without mixed precision."""
    return PRECISIONS[cfg.AMP_DTYPE if cfg.AMP else "fp32"]


def eval_dtype(cfg: CfgNode) -> torch.dtype:
    """Precision of evaluation."""
    return amp_dtype(cfg) if cfg.TEST.PRECISION == "train" else torch.float32


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """Build AdamW or SGD (Nesterov), without weight decay for the parameters in ``model.no_weight_decay()``.

    Every parameter group has an ``lr_scale``, its learning-rate multiplier, and the names of its parameters, so that the state
    of the optimizer contains them.
    """
    no_decay, scales = model.no_weight_decay(), build_lr_scales(cfg, model)  # type: ignore[operator]  # a method of our models
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    groups = [
        {"params": named, "weight_decay": 0.0 if is_exempt else cfg.TRAIN.WEIGHT_DECAY, "lr_scale": scale}
        for is_exempt in (False, True)
        for scale in sorted({scales[name] for name in trainable})
        if (named := [(name, p) for name, p in trainable.items() if (name in no_decay) == is_exempt and scales[name] == scale])
    ]
    options = cfg.TRAIN.OPTIMIZER
    # Fused optimizers update many parameters in one kernel. This code uses them on CUDA devices and CPUs only.
    fused = all(parameter.device.type in ("cuda", "cpu") for parameter in trainable.values())
    if options.NAME == "sgd":
        sgd = SGD(groups, lr=cfg.TRAIN.BASE_LR, momentum=options.MOMENTUM, nesterov=options.MOMENTUM > 0, fused=fused)
        if options.MOMENTUM > 0:
            # Without these zeros, fused SGD would leave the momentum uninitialised if the scaler skips the first step.
            for parameter in trainable.values():
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    return AdamW(groups, lr=cfg.TRAIN.BASE_LR, betas=tuple(options.BETAS), eps=options.EPS, fused=fused)


def build_lr_scales(cfg: CfgNode, model: nn.Module) -> dict[str, float]:
    """Learning-rate multiplier of each parameter: layer-wise decay times the multiplier of the classification head.

    Layer-wise decay (https://arxiv.org/abs/2106.08254) uses the layers of the model's ``group_matcher``, from the stem
    to the head.
    """
    scales = dict.fromkeys((name for name, _ in model.named_parameters()), 1.0)
    if cfg.TRAIN.LAYER_DECAY < 1:
        layers = group_parameters(model, model.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]  # as above
        scales = {name: cfg.TRAIN.LAYER_DECAY ** (max(layers.values()) - layers[name]) for name in scales}
    head = {id(parameter) for parameter in model.get_classifier().parameters()}  # type: ignore[operator]  # as above
    for name, parameter in model.named_parameters():
        if id(parameter) in head:
            scales[name] *= cfg.TRAIN.HEAD_LR_SCALE
    return scales


def build_scaler(cfg: CfgNode, device: torch.device) -> torch.amp.GradScaler:
    """Build the loss scaler of fp16; in other precisions it has no effect."""
    return torch.amp.GradScaler(device.type, enabled=amp_dtype(cfg) == torch.float16)


def build_ema(cfg: CfgNode, model: nn.Module) -> ModelEmaV3 | None:
    """EMA of the weights, e = decay * e + (1 - decay) * w after each update; None if disabled."""
    if not cfg.EMA.ENABLED:
        return None
    return ModelEmaV3(model, decay=cfg.EMA.DECAY, device=torch.device("cpu") if cfg.EMA.FORCE_CPU else None)


def build_criterion(cfg: CfgNode, *, mixed: bool) -> nn.Module:
    """Cross entropy for class ids or probabilities.

    Args:
        mixed: whether mixup or CutMix is used; the targets then already include label smoothing.
    """
    return nn.CrossEntropyLoss(label_smoothing=0.0 if mixed else cfg.MODEL.LABEL_SMOOTHING)
