"""Load weights from checkpoints into models, with a report of every entry."""

import logging
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn

from ..registry import nearest_model
from .reader import WEIGHTS, CheckpointError, choose_weights, with_metadata

logger = logging.getLogger(__name__)

# A file is rejected if it fills less than this fraction of the model, or if the model uses less than this fraction of the file.
MIN_COVERAGE = 0.8


@dataclass
class LoadReport:
    """Result of loading weights: names of the state-dict entries, grouped by outcome.

    Args:
        weights: label of the loaded weights, ``raw`` or ``ema``.
        mapped: head entries copied from the rows of the ImageNet-1k classes in a larger head, such as one for ImageNet-22k.
        head: numbers of classes in the file and in the model, if they differ.
        prefix: prefix of the model's names in the file, such as ``model.``; entries without it are not used.
        coverage: fraction of the model's parameters that the file filled.
    """

    path: str
    weights: str
    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)
    mapped: list[str] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    head: tuple[int, int] | None = None
    prefix: str = ""
    coverage: float = 0.0

    def __str__(self) -> str:
        percent = math.floor(1000 * self.coverage) / 10  # rounded down, so that only a complete file is reported as 100 %
        parts = [f"{self.path}: {self.weights} weights, {len(self.loaded)} entries loaded ({percent}% of the model)"]
        for name in ("resized", "mapped", "reinitialised", "missing", "unused"):
            if names := getattr(self, name):
                shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
                parts.append(f"{len(names)} {name} ({shown})")
        if self.prefix:
            parts.append(f"the file's names have the prefix {self.prefix!r}")
        if self.head is not None:
            parts.append(f"head: {self.head[0]} classes in the file, {self.head[1]} in the model")
        return "; ".join(parts)


def fill_model(model: nn.Module, state: dict, *, weights: str, path: str | Path) -> LoadReport:
    """Load weights of the same model, trained at any input size and with any number of classes, from a checkpoint in memory.

    Entries are matched by name; a prefix that all names of the model have in the file, such as ``model.``, is ignored. Position
    tables (such as position embeddings) are resized (bicubic, as in the paper's code). If the file has the head of
    ImageNet-22k, or of another data set that timm identifies by its number of classes, a model with 1000 classes loads the rows
    of the ImageNet-1k classes. In all other cases, a head whose number of classes differs from the model's is not loaded.

    Args:
        state: contents of the file, see ``read_checkpoint``.
        weights: ``raw``, ``ema``, or ``auto``, which selects one of them (see ``models.checkpoints.reader.preferred_weights``).
        path: path of the file, for messages.

    Raises:
        ValueError: an unknown value of ``weights``.
        CheckpointError: the file belongs to another model, which the message identifies if possible.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r}: choose one of {', '.join(WEIGHTS)}")
    label, stored = choose_weights(state, weights, path)
    prefix = _name_prefix(stored, model, path)
    inside = {name.removeprefix(prefix): value for name, value in stored.items() if name.startswith(prefix)}
    report, origin = LoadReport(str(path), label, prefix=prefix), _stored_value(state, "MODEL", "NAME")
    fitting = _match(model, with_metadata(inside, stored), report, origin=origin, img_size=stored_img_size(state))
    report.unused += [name for name in stored if not name.startswith(prefix)]
    model.load_state_dict(model.with_grids(fitting), strict=False)
    logger.info("%s", report)
    return report


def stored_img_size(state: Mapping) -> int | list[int] | None:
    """DATA.IMG_SIZE in the config of a checkpoint; None if it is missing or invalid."""
    img_size = _stored_value(state, "DATA", "IMG_SIZE")
    if isinstance(img_size, (list, tuple)):
        return list(img_size) if len(img_size) == 2 and all(type(side) is int and side > 0 for side in img_size) else None
    return img_size if type(img_size) is int and img_size > 0 else None


def _name_prefix(stored: Mapping[str, Tensor], model: nn.Module, path: str | Path) -> str:
    """Prefix behind which the names of a file match those of the model, as in ``model.head.weight``; "" if there is none.

    A prefix must lead to at least half of the model's names: blocks of other models have a few names in common with it.

    Raises:
        CheckpointError: several prefixes match equally well.
    """
    own, counts = model.state_dict().keys(), Counter({"": 0})
    for name in stored:
        parts = name.split(".")
        counts.update(".".join([*parts[:index], ""]) for index in range(len(parts)) if ".".join(parts[index:]) in own)
    largest = max(counts.values())
    prefixes = [prefix for prefix, count in counts.items() if count == largest]
    if "" in prefixes or 2 * largest < len(own):
        return ""
    if len(prefixes) > 1:
        raise CheckpointError(
            f"{path}: the names match this model behind several prefixes ({', '.join(map(repr, prefixes))}); "
            "write the weights behind one of them to a separate file, without the prefix"
        )
    return prefixes[0]


def _stored_value(state: Mapping, section: str, key: str) -> object:
    """Value of a config key in a checkpoint; None if it is missing."""
    config = state.get("config")
    node = config.get(section) if isinstance(config, Mapping) else None
    return node.get(key) if isinstance(node, Mapping) else None


def _match(
    model: nn.Module, stored: dict[str, Tensor], report: LoadReport, *, origin: str | None, img_size: int | list[int] | None
) -> dict[str, Tensor]:
    """Return the entries of a file that match the model's names and shapes, and complete the report.

    Args:
        origin: model name in the file's config, for messages.
        img_size: input size in the file's config; it determines the layout of the position tables.
    """
    own, head = model.state_dict(), _head_names(model)

    def mismatch(reason: str) -> CheckpointError:
        hint = f"the file contains the config of {origin}" if origin else describe_nearest(stored)
        return CheckpointError(f"{report.path}: {reason}; choose the config that this file was trained with ({hint})")

    try:
        resized = model.resize_position_tables(stored, img_size=img_size)
    except ValueError as error:
        raise mismatch(str(error)) from None
    fitting, num_unfilled = {}, 0
    for name, value in (stored | resized).items():
        if name not in own:
            if not model.unused_entries.fullmatch(name):
                report.unused.append(name)
        elif value.shape == own[name].shape:
            fitting[name] = value
            (report.resized if name in resized else report.loaded).append(name)
        elif name in head and value.shape[1:] == own[name].shape[1:]:
            report.head = len(value), len(own[name])
            rows = _imagenet_rows(*report.head)
            if rows is None:
                report.reinitialised.append(name)
            else:
                fitting[name] = own[name].clone()
                fitting[name][list(rows)] = value[list(rows.values())].to(own[name])
                report.mapped.append(name)
                if num_new := len(own[name]) - len(rows):
                    report.reinitialised.append(f"{name} (new rows: {num_new})")
                    num_unfilled += num_new * own[name][0].numel()
        else:
            raise mismatch(f"{name} has shape {tuple(value.shape)}, but the model requires {tuple(own[name].shape)}")
    report.missing = [name for name in own if name not in fitting and name not in report.reinitialised]
    sizes = {name: value.numel() for name, value in own.items()}
    report.coverage = (sum(sizes[name] for name in fitting) - num_unfilled) / max(sum(sizes.values()), 1)
    num_unused = sum(stored[name].numel() for name in report.unused)
    fraction, reason = _smallest_coverage(sizes, head, set(fitting), num_unused)
    if fraction < MIN_COVERAGE:
        examples = ", ".join((report.missing + report.unused)[:5])
        raise mismatch(
            f"{reason} (missing tensors: {len(report.missing)}, unused tensors: {len(report.unused)}; for example {examples})"
        )
    return fitting


def _smallest_coverage(sizes: dict[str, int], head: set[str], filled: set[str], num_unused: int) -> tuple[float, str]:
    """Smallest of three fractions that measure how well a file matches the model.

    They are the fractions of the model's tensors and of its parameters that the file fills (both without the head), and the
    fraction of the file's parameters that the model uses.

    Args:
        sizes: name of each tensor of the model -> number of elements.
        head: names of the head's tensors.
        filled: names of the model's tensors that the file fills.
        num_unused: number of elements in the file that the model does not use.

    Returns:
        The fraction, and a description for the error.
    """
    body = [name for name in sizes if name not in head]
    tensors = sum(name in filled for name in body) / len(body)
    parameters = sum(sizes[name] for name in body if name in filled) / sum(sizes[name] for name in body)
    num_used = sum(sizes[name] for name in filled)
    used = num_used / max(num_used + num_unused, 1)
    return min(
        (tensors, f"the file fills only {tensors:.0%} of the model's tensors"),
        (parameters, f"the file fills only {parameters:.0%} of the model's parameters"),
        (used, f"the model uses only {used:.0%} of the file's parameters"),
    )


def _imagenet_rows(num_stored: int, num_classes: int) -> dict[int, int] | None:
    """Map each class of ImageNet-1k to its row in the head of a larger data set, identified by its number of classes.

    Some of these data sets lack one or two of the 1000 classes; the result omits these classes. Returns None if
    timm has no data set with ``num_stored`` classes, or if ``num_classes`` is not 1000.
    """
    subset = infer_imagenet_subset({"num_classes": num_stored})
    if num_classes != 1000 or subset is None:
        return None
    position = {name: row for row, name in enumerate(ImageNetInfo(subset).label_names())}
    names = ImageNetInfo("imagenet-1k").label_names()
    return {index: position[name] for index, name in enumerate(names) if name in position}


def _head_names(model: nn.Module) -> set[str]:
    head = model.get_classifier()
    parameters = {id(parameter) for parameter in head.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in parameters}


def describe_nearest(state_dict: Mapping[str, Tensor]) -> str:
    """Hint for an error about weights of another model: the known model with the most similar entries."""
    name = nearest_model(state_dict)
    return f"its entries are most similar to those of {name}" if name else "its entries are not similar to any known model"
