"""Check that the state in a checkpoint fits a model, its optimizer, EMA and loss scaler, before any of it is loaded.

Loading checks only a part: the kernels of fused optimizers read beyond the end of a state tensor that is too small.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from engine.state import TrainState
from models.checkpoints.reader import CheckpointError

# State of a parameter in each optimizer: names of tensors with the parameter's shape, and of counters with a single value.
_ADAMW_TENSORS, _ADAMW_COUNTERS = ("exp_avg", "exp_avg_sq"), ("step",)
_SGD_TENSORS = ("momentum_buffer",)
_SCALER_ENTRIES = ("scale", "growth_factor", "backoff_factor", "growth_interval", "_growth_tracker")


class ParameterGroupsError(CheckpointError):
    """The parameter groups of the optimizer differ from those of the checkpoint."""


def check_state(state: TrainState, saved: Mapping) -> None:
    """Check the structure, the shapes and the data types of a checkpoint; values such as NaN are not checked.

    Args:
        state: the state of the run, to which the checkpoint will be loaded.
        saved: contents of the checkpoint.

    Raises:
        CheckpointError: an entry does not fit; the message names it, without the path of the file.
    """
    check_weights("model", saved["model"], state.model)
    if state.ema is not None and saved.get("state_dict_ema"):
        check_weights("state_dict_ema", saved["state_dict_ema"], state.ema.module)
    check_optimizer(state.optimizer, saved["optimizer"])
    if state.scaler.is_enabled() and saved["scaler"]:
        check_scaler(saved["scaler"])


def check_weights(entry: str, stored: object, model: nn.Module) -> None:
    """Check the weights of a checkpoint against those of a model.

    Args:
        entry: name of the weights in the checkpoint, for messages.
    """
    expected = model.state_dict()
    if not isinstance(stored, Mapping):
        raise CheckpointError(f"{entry} is not a dictionary of tensors")
    if difference := sorted(map(str, expected.keys() ^ stored.keys())):
        raise CheckpointError(f"{entry}: {difference[0]} is {'missing' if difference[0] in expected else 'not in the model'}")
    for name, tensor in expected.items():
        _check_tensor(f"{entry}.{name}", stored[name], tensor)


def compare_groups(optimizer: Optimizer, stored: Mapping) -> str:
    """Describe the first difference between the parameter groups of an optimizer and of its stored state; "" if there is none.

    Parameters are compared by name. Checkpoints of earlier versions have no names; only the sizes of their groups are compared.
    """
    groups = stored.get("param_groups")
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        return "optimizer.param_groups is not a list of dictionaries"
    if len(groups) != len(optimizer.param_groups):
        return f"the optimizer has {len(groups)} parameter groups in the checkpoint, but {len(optimizer.param_groups)} now"
    first = 0
    for number, (group, current) in enumerate(zip(groups, optimizer.param_groups, strict=True)):
        count = len(current["params"])
        if group.get("params") != list(range(first, first + count)):
            return f"optimizer.param_groups[{number}] does not have the parameters {first} to {first + count - 1}"
        first += count
        names, expected = group.get("param_names"), current.get("param_names")
        if names is not None and expected is not None and names != expected:
            pairs = zip(names if isinstance(names, list) else [], expected, strict=False)
            name, other = next((pair for pair in pairs if pair[0] != pair[1]), ("another list", "a list"))
            return f"optimizer.param_groups[{number}] has the parameter {name} in the checkpoint where it has {other} now"
    return ""


def check_optimizer(optimizer: Optimizer, stored: Mapping) -> None:
    """Check the stored state of every parameter."""
    if difference := compare_groups(optimizer, stored):
        raise ParameterGroupsError(difference)
    states = stored.get("state")
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    names = [name for group in optimizer.param_groups for name in group.get("param_names", ())] or range(len(parameters))
    if not isinstance(states, Mapping) or not all(number in range(len(parameters)) for number in states):
        raise CheckpointError("optimizer.state is not a dictionary of the parameters' states")
    is_sgd = isinstance(optimizer, SGD)
    tensors, counters = (_SGD_TENSORS, ()) if is_sgd else (_ADAMW_TENSORS, _ADAMW_COUNTERS)
    for number, entries in states.items():
        where = f"optimizer.state[{names[number]}]"
        if not isinstance(entries, Mapping) or not set(entries) <= {*tensors, *counters}:
            raise CheckpointError(f"{where} is not a state of {type(optimizer).__name__}")
        for name in tensors:
            if is_sgd and entries.get(name) is None:  # without momentum
                continue
            _check_tensor(f"{where}.{name}", entries.get(name), parameters[number])
        for name in counters:
            counter = entries.get(name)
            if not isinstance(counter, Tensor) or counter.shape != () or not counter.is_floating_point():
                raise CheckpointError(f"{where}.{name} is not a single floating-point value")


def check_scaler(stored: object) -> None:
    """Check the stored state of the loss scaler."""
    if not isinstance(stored, Mapping) or set(stored) != set(_SCALER_ENTRIES):
        raise CheckpointError(f"scaler does not have the entries {', '.join(_SCALER_ENTRIES)}")
    for name, value in stored.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise CheckpointError(f"scaler.{name} is {value!r}, not a finite number of at least 0")


def _check_tensor(name: str, stored: object, expected: Tensor) -> None:
    if not isinstance(stored, Tensor):
        raise CheckpointError(f"{name} is {'missing' if stored is None else 'not a tensor'}")
    if stored.shape != expected.shape or stored.dtype != expected.dtype or stored.layout != torch.strided:
        raise CheckpointError(
            f"{name} has shape {list(stored.shape)}, {stored.dtype} and {stored.layout}, instead of {list(expected.shape)}, "
            f"{expected.dtype} and {torch.strided}"
        )
