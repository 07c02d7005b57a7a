"""Average the weights of checkpoints, as in model soups (https://arxiv.org/abs/2203.05482)."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from data.classes import ClassMatch, compare_classes
from jobs.locate_checkpoint import Location, stored_class_names
from jobs.model import has_same_windows
from models.checkpoints.reader import CheckpointError, choose_weights, read_checkpoint
from utils.config.keys import STORED_KEY_PREFIXES, WINDOW_KEYS
from utils.config.loading import flatten, load_stored_config, show

logger = logging.getLogger(__name__)

# Prefixes of the keys that must be equal. Equal shapes do not imply this: the focusing factor, for example, is not a weight.
COMPARED_KEY_PREFIXES = (
    *("MODEL.TYPE", "MODEL.SWIN.", "MODEL.DEIT.", "MODEL.LA."),
    *("DATA.IMG_SIZE", "DATA.MEAN", "DATA.STD"),
)


def average(locations: Sequence[Location], weights: str) -> dict:
    """Average the weights of checkpoints in float64. State-dict entries that are not floating-point must be equal in all files.

    Args:
        weights: raw, ema or auto, see ``choose_weights``.

    Returns:
        A checkpoint: the averages as ``model``, the config of the first file, and the class names.

    Raises:
        CheckpointError: a file cannot be read, does not contain the requested weights, or differs from the first file in model,
            normalisation, classes or an entry that is not floating-point; weights or their averages are not finite.
    """
    first = locations[0].path
    total: dict[str, Tensor] = {}
    dtypes: dict[str, torch.dtype] = {}
    config: Mapping | None = None
    names: tuple[str, ...] = ()
    named, unnamed = first, []  # the file that ``names`` are from, and the files without class names
    for location in locations:  # one file is in memory at a time
        path, state = location.path, read_checkpoint(location.path)
        if path == first:
            config = state.get("config")
        check_same_config(config, state.get("config"), first, path)
        if own_names := stored_class_names(state, location.released):
            names, named = (names, named) if names else (own_names, path)
            check_same_classes(own_names, names, path, named)
        else:
            unnamed.append(path)
        _, state_dict = choose_weights(state, weights, path)
        if total and {name: value.shape for name, value in state_dict.items()} != {name: v.shape for name, v in total.items()}:
            raise CheckpointError(f"{path} contains a different model than {first}; all checkpoints must be of the same model")
        for name, value in state_dict.items():
            if not value.is_floating_point():
                if not torch.equal(total.setdefault(name, value), value):
                    raise CheckpointError(f"{path}: the non-floating-point entry {name} differs from the same entry of {first}")
                continue
            if not value.isfinite().all():
                raise CheckpointError(f"{path}: values of {name} are not finite; leave this checkpoint out of the average")
            dtypes.setdefault(name, value.dtype)
            total[name] = total.get(name, torch.zeros(())) + value.double()
    mean = {name: (value / len(locations)).to(dtypes[name]) if name in dtypes else value for name, value in total.items()}
    if overflown := next((name for name, value in mean.items() if not value.isfinite().all()), None):
        raise CheckpointError(
            f"{first}: the average of {overflown} exceeds the range of its data type, {dtypes[overflown]}; list a file with "
            "float32 weights first, or leave out the checkpoint with extreme weights"
        )
    if unnamed and names:
        check_same_classes(names, (), named, unnamed[0])
    return {"model": mean} | ({"config": config} if config else {}) | ({"class_names": list(names)} if names else {})


def check_same_classes(names: Sequence[str], others: Sequence[str], path: Path, other: Path) -> None:
    """Check that two files have the same classes in the same order, and warn if this cannot be verified.

    Args:
        names: class names of ``path``.
        others: class names of ``other``; () if it has none.

    Raises:
        CheckpointError: other classes, or another order, see ``compare_classes``.
    """
    match, difference = compare_classes(names, others, where=(str(path), str(other)))
    if match is ClassMatch.UNVERIFIED and not others:
        logger.warning("%s; its classes are assumed to be in the order of %s", difference, path)
    elif match is not ClassMatch.EQUAL:
        raise CheckpointError(
            f"{path} has different classes than {other}, or another order: {difference}. All checkpoints must have the same "
            "classes in the same order; leave one of these files out"
        )


def check_same_config(config: object, other: object, first: Path, path: Path) -> None:
    """Check that the keys that both stored configs have describe the same model and normalisation.

    Raises:
        CheckpointError: a key with one of the ``COMPARED_KEY_PREFIXES`` differs.
    """
    if not (isinstance(config, Mapping) and isinstance(other, Mapping)):
        return
    before, after = flatten(config), flatten(other)
    for key in sorted(before.keys() & after.keys()):
        if not key.startswith(COMPARED_KEY_PREFIXES) or show(before[key]) == show(after[key]):
            continue
        own = load_stored_config(other, source=str(path), sections=STORED_KEY_PREFIXES)
        if key not in WINDOW_KEYS or not has_same_windows(config, own, first):
            raise CheckpointError(
                f"{path}: {key} is {show(after[key])}, but {show(before[key])} in {first}; all checkpoints must have the same "
                "model, input size and normalisation"
            )
