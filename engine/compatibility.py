"""Check that the state in a checkpoint fits a model, its optimizer, EMA and loss scaler, before any of it is loaded.

Loading checks only a part: the kernels of fused optimizers read beyond the end of a state tensor that is too small.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from engine.state import TrainState
from models.checkpoints.reader import CheckpointError

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
    examples, created = example_states(optimizer)
    for number, entries in states.items():
        where, example = f"optimizer.state[{names[number]}]", examples[number]
        if not isinstance(entries, Mapping) or not set(entries) <= set(example):
            raise CheckpointError(f"{where} is not a state of {type(optimizer).__name__}")
        for name, expected in example.items():
            if isinstance(optimizer, SGD) and entries.get(name) is None:  # without momentum
                continue
            _check_entry(f"{where}.{name}", entries.get(name), expected)
    for number, group in enumerate(stored["param_groups"]):
        for name, expected in created.items() if states else ():
            _check_entry(f"optimizer.param_groups[{number}].{name}", group.get(name), expected)


def example_states(optimizer: Optimizer) -> tuple[list[Mapping], Mapping]:
    """State that an optimizer has after an update, as examples of names, shapes and types.

    The optimizer updates parameters of zeros on the CPU, one of each shape, with gradients of zero.

    Returns:
        State of each parameter, and the entries that an update adds to each parameter group.
    """
    example = copy.copy(optimizer)
    example.state = defaultdict(dict)
    example.param_groups, parameters = [], []
    for group in optimizer.param_groups:
        by_shape = {parameter.shape: nn.Parameter(torch.zeros_like(parameter, device="cpu")) for parameter in group["params"]}
        parameters += [by_shape[parameter.shape] for parameter in group["params"]]
        for parameter in by_shape.values():
            parameter.grad = torch.zeros_like(parameter)
        example.param_groups.append(group | {"params": list(by_shape.values())})
    if isinstance(optimizer, SGD):
        return [{"momentum_buffer": parameter} for parameter in parameters], {}
    example.step()
    first, updated = optimizer.param_groups[0], example.param_groups[0]
    created = {name: value for name, value in updated.items() if name not in first}
    return [example.state[parameter] for parameter in parameters], created


def check_scaler(stored: object) -> None:
    """Check the stored state of the loss scaler."""
    if not isinstance(stored, Mapping) or set(stored) != set(_SCALER_ENTRIES):
        raise CheckpointError(f"scaler does not have the entries {', '.join(_SCALER_ENTRIES)}")
    for name, value in stored.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value) or value < 0:
            raise CheckpointError(f"scaler.{name} is {value!r}, not a finite number of at least 0")


def _check_entry(name: str, stored: object, expected: object) -> None:
    if isinstance(expected, Tensor) and expected.shape:
        _check_tensor(name, stored, expected)
    elif isinstance(expected, Tensor):
        if not isinstance(stored, Tensor) or stored.shape != () or not stored.is_floating_point():
            raise CheckpointError(f"{name} is not a single floating-point value")
    elif type(stored) is not type(expected):
        raise CheckpointError(f"{name} is {'missing' if stored is None else f'not of type {type(expected).__name__}'}")


def _check_tensor(name: str, stored: object, expected: Tensor) -> None:
    if not isinstance(stored, Tensor):
        raise CheckpointError(f"{name} is {'missing' if stored is None else 'not a tensor'}")
    if stored.shape != expected.shape or stored.dtype != expected.dtype or stored.layout != torch.strided:
        raise CheckpointError(
            f"{name} has shape {list(stored.shape)}, {stored.dtype} and {stored.layout}, instead of {list(expected.shape)}, "
            f"{expected.dtype} and {torch.strided}"
        )
