"""The optimizers that TRAIN.OPTIMIZER.NAME selects, by their names in timm. This module does not import timm."""

# Optimizer -> the keys of TRAIN.OPTIMIZER that it takes, and their defaults in ``timm.optim.create_optimizer_v2``.
_ADAM: dict[str, object] = {"EPS": 1e-8, "BETAS": [0.9, 0.999]}
OPTIMIZERS: dict[str, dict[str, object]] = {
    "adamw": _ADAM,
    "sgd": {"MOMENTUM": 0.9},
    "momentum": {"MOMENTUM": 0.9},
    "adam": _ADAM,
    "nadamw": _ADAM,
    "radamw": _ADAM,
    "cadamw": _ADAM,
    "adan": {"EPS": 1e-8, "BETAS": [0.98, 0.92, 0.99]},
    "adoptw": {"EPS": 1e-6, "BETAS": [0.9, 0.9999]},
    "lamb": {"EPS": 1e-6, "BETAS": [0.9, 0.999]},
    "lars": {"EPS": 1e-8, "MOMENTUM": 0.9},
    "lion": {"BETAS": [0.9, 0.99]},
    "clion": {"BETAS": [0.9, 0.99]},
    "laprop": {"EPS": 1e-15, "BETAS": [0.9, 0.999]},
    "mars": {"EPS": 1e-8, "BETAS": [0.9, 0.99]},
    "muon": {"EPS": 1e-7, "BETAS": [0.9, 0.95], "MOMENTUM": 0.9},
    "rmsproptf": {"EPS": 1e-10, "MOMENTUM": 0.9},
}
OPTIONS = ("EPS", "BETAS", "MOMENTUM")


def default_option(optimizer: str, option: str) -> object:
    """Default of an option; None if the optimizer does not take it or is unknown."""
    default = OPTIMIZERS.get(optimizer, {}).get(option)
    return list(default) if isinstance(default, list) else default
