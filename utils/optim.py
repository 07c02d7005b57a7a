"""Optimizers with and without weight decay, and what belongs to an update: scaler, average of weights, loss."""

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from yacs.config import CfgNode

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def amp_dtype(cfg: CfgNode) -> torch.dtype:
    """Precision of training's forward passes; float32 where mixed precision is off."""
    return PRECISIONS[cfg.AMP_DTYPE if cfg.AMP else "fp32"]


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """AdamW or SGD (Nesterov); ``model.no_weight_decay()`` names the parameters that are not decayed."""
    exempt = model.no_weight_decay()
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for name, p in trained if name not in exempt], "weight_decay": cfg.TRAIN.WEIGHT_DECAY},
        {"params": [p for name, p in trained if name in exempt], "weight_decay": 0.0},
    ]
    options = cfg.TRAIN.OPTIMIZER
    # One kernel for all parameters, where the device has it.
    fused = all(parameter.device.type in ("cuda", "cpu") for _, parameter in trained)
    if options.NAME == "sgd":
        return SGD(groups, lr=cfg.TRAIN.BASE_LR, momentum=options.MOMENTUM, nesterov=options.MOMENTUM > 0, fused=fused)
    return AdamW(groups, lr=cfg.TRAIN.BASE_LR, betas=tuple(options.BETAS), eps=options.EPS, fused=fused)


def build_scaler(cfg: CfgNode, device: torch.device) -> torch.amp.GradScaler:
    """Scales the loss in fp16; passes everything through otherwise."""
    return torch.amp.GradScaler(device.type, enabled=amp_dtype(cfg) == torch.float16)


def build_ema(cfg: CfgNode, model: nn.Module) -> ModelEmaV3 | None:
    """The average of the weights, e = decay * e + (1 - decay) * w after each update."""
    if not cfg.EMA.ENABLED:
        return None
    return ModelEmaV3(model, decay=cfg.EMA.DECAY, device=torch.device("cpu") if cfg.EMA.FORCE_CPU else None)


def build_criterion(cfg: CfgNode, *, mixed: bool) -> nn.Module:
    """Cross entropy with class ids or probabilities; mixed targets are smoothed where they are mixed."""
    return nn.CrossEntropyLoss(label_smoothing=0.0 if mixed else cfg.MODEL.LABEL_SMOOTHING)
