"""Match the classes of a dataset with those of a model."""

import json
import logging
import re
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path

from data.files import DataError
from data.sources.class_list import first_duplicate, first_twins, is_class_id, normalise, numbered, read_listing
from utils.config.keys import CLASS_MAPS

logger = logging.getLogger(__name__)

MIN_REAL_AGREEMENT = 0.5  # minimum fraction of images whose ReaL labels include their original class
_NUMBERED = re.compile(r"(.*?)([0-9]{1,18})", re.DOTALL)
_VALIDATION_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})[._]")  # the hub's names go on with the WordNet id


def check_classes(
    train: Sequence[str] | None, val: Sequence[str], num_classes: int, root: str, model_classes: Sequence[str] = ()
) -> None:
    """Check that the classes of the splits match each other, and that their number matches the model.

    Args:
        train: None in an evaluation.
        model_classes: class names with which the evaluated weights were trained, by class id; () if unknown.

    Raises:
        DataError: a class missing from one split, or a number of classes that differs from the model's.
    """
    if train is not None and list(train) != list(val):
        parts = []
        if missing := sorted(set(train) - set(val)):
            parts.append(f"the validation split lacks {_shorten(missing)}")
        if extra := sorted(set(val) - set(train)):
            parts.append(f"the validation split also has {_shorten(extra)}")
        if not parts:
            position = next(i for i, (name, other) in enumerate(zip(val, train, strict=True)) if name != other)
            raise DataError(
                f"{root}: the validation split has the classes of the training split in another order: class {position} is "
                f"{val[position]!r} instead of {train[position]!r}. Store both splits in the same layout, or list the classes "
                "of an archive in classes.txt, by class id"
            )
        if twins := first_twins([*missing, *extra]):
            parts.append(f"{twins[0]!a} and {twins[1]!a} differ only in Unicode normalisation (NFC and NFD): rename one")
        raise DataError(f"{root}: {' and '.join(parts)}; both splits need the same classes")
    _check_two_classes(val, root)
    if len(val) != num_classes:
        remedy = f", or add --opts MODEL.NUM_CLASSES {len(val)}"
        if train is None:
            remedy = f". {propose_class_map(val, num_classes, model_classes)}"
        raise DataError(
            f"{root} contains {len(val)} classes, but the model has {num_classes} (MODEL.NUM_CLASSES). Check "
            f"--data-path{remedy}"
        )


class ClassMatch(Enum):
    """Relation of the class ids of two class lists, see ``compare_classes``."""

    EQUAL = "the same classes in the same order"
    UNVERIFIED = "the names do not show whether the order is the same"
    REORDERED = "the same classes in another order"
    AMBIGUOUS = "numbered classes, possibly in another order"
    DIFFERENT = "different classes"


def compare_classes(
    names: Sequence[str], model_classes: Sequence[str], where: tuple[str, str] = ("the data", "the checkpoint")
) -> tuple[ClassMatch, str]:
    """Decide whether the class ids of a dataset are those of a model.

    Evaluation, --pretrained and averaging use this function, so that they agree about the order of classes. Archives without
    ``classes.txt`` have the class names 0, 1, ..., which may be numbers of directories or their positions, so an equal set of
    numbers in another order is ambiguous.

    Args:
        names: class names of the dataset, by class id.
        model_classes: class names with which the weights were trained, by class id; () if unknown.
        where: what has these names, for the description.

    Returns:
        The relation of the lists, and its description; "" if they are equal.
    """
    names, model_classes = list(names), list(model_classes)
    if names == model_classes:
        return ClassMatch.EQUAL, ""
    if not model_classes:
        return _compare_with_unknown(names, where)
    if len(names) != len(model_classes):
        return ClassMatch.DIFFERENT, f"{len(names)} classes in {where[0]}, but {len(model_classes)} in {where[1]}"
    position = next(i for i, (name, other) in enumerate(zip(names, model_classes, strict=True)) if name != other)
    difference = f"class {position} is {names[position]!r} in {where[0]}, but {model_classes[position]!r} in {where[1]}"
    if set(names) == set(model_classes):
        match = ClassMatch.AMBIGUOUS if all(map(is_class_id, names)) else ClassMatch.REORDERED
        return match, f"{difference}, which has the same classes in another order"
    if _is_ambiguous(names) and not _is_ambiguous(model_classes):
        return ClassMatch.AMBIGUOUS, f"{_describe_orders(names, where[0])}; {difference}"
    if _is_ambiguous(model_classes) and names == numbered(len(names)):
        return ClassMatch.AMBIGUOUS, f"{_describe_orders(model_classes, where[1])}; {difference}"
    if names == numbered(len(names)):
        return ClassMatch.UNVERIFIED, f"the classes of {where[0]} have numbers as names"
    if model_classes == numbered(len(names)):
        return ClassMatch.UNVERIFIED, f"the classes of {where[1]} have numbers as names"
    if twins := first_twins([*names, *model_classes]):
        difference += f" ({twins[0]!a} and {twins[1]!a} differ only in Unicode normalisation)"
    return ClassMatch.DIFFERENT, difference


def _compare_with_unknown(names: list[str], where: tuple[str, str]) -> tuple[ClassMatch, str]:
    """Relation to weights whose class names are unknown: most have ImageNet's classes, or those of sorted directories."""
    if names == imagenet_classes(len(names)):
        return ClassMatch.EQUAL, ""
    unknown = f"{where[1]} has no class names"
    if _is_ambiguous(names):
        return ClassMatch.AMBIGUOUS, f"{unknown}, and {_describe_orders(names, where[0])}"
    return ClassMatch.UNVERIFIED, unknown


def _numbers(names: Sequence[str]) -> list[int]:
    """The numbers in class names that otherwise are equal, such as 7 in ``7`` or ``class_7``; [] for other names."""
    parts = [_NUMBERED.fullmatch(name) for name in names]
    prefixes = {part[1] if part else None for part in parts}
    return [int(part[2]) for part in parts if part] if len(prefixes) == 1 else []


def _is_ambiguous(names: Sequence[str]) -> bool:
    """Whether class names are numbers that are sorted as text (0, 1, 10, 11, 2), so that there are two plausible orders."""
    return list(names) == sorted(names) and (numbers := _numbers(names)) != sorted(numbers)


def _describe_orders(names: Sequence[str], where: str) -> str:
    """The first difference between the two plausible orders of numbered classes."""
    as_numbers = [name for _, name in sorted(zip(_numbers(names), names, strict=True))]
    position = next(i for i, (name, other) in enumerate(zip(names, as_numbers, strict=True)) if name != other)
    return (
        f"the classes of {where} are numbered: class {position} is {names[position]!r} if they are sorted as text, but "
        f"{as_numbers[position]!r} if they are sorted as numbers"
    )


def check_class_names(names: Sequence[str], model_classes: Sequence[str], root: str) -> None:
    """Check that the classes of a dataset are those that the model was trained with, and warn if this cannot be verified.

    Raises:
        DataError: other classes, or another order (see ``compare_classes``).
    """
    match, difference = compare_classes(names, model_classes)
    if match is ClassMatch.UNVERIFIED:
        logger.warning(
            "%s: %s, so classes are matched by class id: class 0 is %r in the data. If the checkpoint has another order, set "
            "TEST.CLASS_MAP with --opts",
            root,
            difference,
            names[0],
        )
    elif match is not ClassMatch.EQUAL:
        raise DataError(
            f"{root}: the checkpoint was trained with {match.value}: {difference}. Check --data-path. "
            f"{propose_class_map(names, len(names), model_classes)}"
        )


def propose_class_map(names: Sequence[str], num_classes: int, model_classes: Sequence[str]) -> str:
    """Remedy for classes that cannot be matched by class id: values of TEST.CLASS_MAP that ``read_class_map`` accepts.

    Args: see ``read_class_map``.
    """
    file = "to a file with one line per class of the data: its name, a space, and the model's class id"
    for class_map in CLASS_MAPS:
        with suppress(DataError):
            _match_classes(class_map, names, num_classes, model_classes)
            condition = "classes with the same name are the same"
            if class_map == "names" and not set(names) <= set(model_classes):
                condition = "each class of the data is named by its class id in the model"
            return f"If {condition}, add --opts TEST.CLASS_MAP {class_map}; otherwise, set TEST.CLASS_MAP {file}"
    return f"Set TEST.CLASS_MAP with --opts {file}"


def imagenet_classes(count: int) -> list[str]:
    """WordNet ids of the classes of the ImageNet variant with this number of classes, by class id; [] if there is none."""
    # Imported here, since timm imports torch: early checks of the command compare classes, and rarely need ImageNet's.
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": count})
    return ImageNetInfo(subset).label_names() if subset else []


def read_class_map(class_map: str, classes: Sequence[str], num_classes: int, model_classes: Sequence[str] = ()) -> list[int]:
    """Read the model's class id for each class of a dataset.

    Args:
        class_map: ``names`` to match classes by name with ``model_classes``, or, if they are named by number, by class id;
            ``imagenet`` for directories named by WordNet id such as n01440764 (ImageNet-A, -R, -Sketch) or by class number
            (ImageNet-V2); otherwise a file with one line per directory: its name, white space, the model's class id.
        classes: class names of the dataset, in the order of the dataset's class ids.
        model_classes: class names with which the weights were trained, by class id; () if unknown.

    Raises:
        DataError: a directory without a class id, a class id out of range, or the same class id for two directories; with
            ``names`` and ``imagenet``, also class names that do not determine the class ids.
    """
    class_ids = _match_classes(class_map, classes, num_classes, model_classes)
    stored_ids = {name: number for number, name in enumerate(model_classes)}
    for name, number in zip(classes, class_ids, strict=True):
        if (stored := stored_ids.get(name, number)) != number:
            logger.warning(
                "TEST.CLASS_MAP=%s: class %s is mapped to class id %d, but in the checkpoint, this class id is %s, and %s has "
                "class id %d",
                class_map,
                name,
                number,
                model_classes[number] if number < len(model_classes) else "unused",
                name,
                stored,
            )
            break
    return class_ids


def _match_classes(class_map: str, classes: Sequence[str], num_classes: int, model_classes: Sequence[str]) -> list[int]:
    """The result of ``read_class_map``, without its warning."""
    numbers = {str(number): number for number in range(num_classes)}
    remedy = "set TEST.CLASS_MAP to a file with the class id of each directory"
    source = f"TEST.CLASS_MAP={class_map}"
    if class_map not in CLASS_MAPS:
        ids, source, remedy = _read_ids(Path(class_map)), class_map, "add a line for each"
    elif class_map == "imagenet":
        names = imagenet_classes(num_classes)
        _check_imagenet_order(model_classes, names)
        ids = {name: number for number, name in enumerate(names)} | numbers
        source += f" with MODEL.NUM_CLASSES={num_classes}"
    else:
        if (duplicate := first_duplicate(map(_form, model_classes))) is not None:
            raise DataError(f"{source}: the checkpoint has two classes with the name {duplicate}; {remedy}")
        # Numbers are class ids, unless the checkpoint has classes with such names.
        ids = {} if model_classes and all(map(is_class_id, model_classes)) else numbers
        ids |= {_form(name): number for number, name in enumerate(model_classes)}
    for first in (0, 1) if class_map in CLASS_MAPS else ():
        if len(classes) < num_classes and set(classes) == {str(number + first) for number in range(len(classes))}:
            raise DataError(
                f"{source}: the {len(classes)} classes are numbered from {first}, so they cannot be matched with the model's "
                f"{num_classes} classes; name the directories as in training (for archives: list the names in classes.txt), or "
                f"{remedy}"
            )
    if missing := [name for name in classes if _form(name) not in ids]:
        raise DataError(f"{source}: directories without a class id: {_shorten(missing)}; {remedy}, or remove them")
    _check_two_classes(classes, source)
    class_ids = [ids[_form(name)] for name in classes]
    if max(class_ids) >= num_classes:
        raise DataError(f"{source} has class id {max(class_ids)}, but MODEL.NUM_CLASSES={num_classes}; class ids start at 0")
    if (repeated := first_duplicate(class_ids)) is not None:
        duplicate = classes[class_ids.index(repeated)]
        raise DataError(f"{source}: {duplicate} and another directory have the same class id; merge these directories")
    return class_ids


def predictable_classes(class_ids: Sequence[int], num_classes: int, *, restrict: bool) -> tuple[list[int], str]:
    """Class ids that can be predicted in an evaluation with a class map.

    Args:
        class_ids: the model's class id for each class of the dataset.
        num_classes: number of classes of the model.
        restrict: TEST.RESTRICT_CLASSES.

    Returns:
        ``class_ids``, followed by all other class ids of the model unless ``restrict``; and a description for logs and files,
        "" if the dataset has all classes of the model.
    """
    others = sorted(set(range(num_classes)) - set(class_ids))
    if not others:
        return list(class_ids), ""
    if restrict:
        return list(class_ids), f"predictions restricted to {len(class_ids)} of {num_classes} classes"
    return [*class_ids, *others], f"images of {len(class_ids)} of {num_classes} classes, predictions not restricted"


def _check_two_classes(classes: Sequence[str], source: str) -> None:
    if len(classes) < 2:
        raise DataError(
            f"{source}: there is only one class, {classes[0]!r}, so every prediction would be correct; check --data-path: each "
            "split needs one directory per class, and at least two classes"
        )


def _check_imagenet_order(model_classes: Sequence[str], names: Sequence[str]) -> None:
    """Check that the weights do not have ImageNet's classes (``names``), or numbered classes, in another order."""
    for expected in (list(names), numbered(len(model_classes))):
        if sorted(model_classes) == sorted(expected) and list(model_classes) != expected:
            position = next(i for i, name in enumerate(expected) if model_classes[i] != name)
            raise DataError(
                f"TEST.CLASS_MAP=imagenet: the checkpoint was trained with another order of classes: its class {position} is "
                f"{model_classes[position]!r} instead of {expected[position]!r}. Set TEST.CLASS_MAP to a file with one line "
                "per class of the data: its name, a space, and the model's class id"
            )


def read_real_labels(path: str | Path, names: Sequence[str]) -> list[list[int]]:
    """Read the ReaL labels (https://arxiv.org/abs/2006.07159): all correct class ids of each validation image, possibly none.

    Args:
        path: ``real.json``, a list of class ids for each of ILSVRC2012_val_00000001.JPEG, ..._00000002.JPEG, ...
        names: image names to look up.

    Raises:
        DataError: an invalid file, or an image that has no entry in the file.
    """
    try:
        labels = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"TEST.REAL_LABELS={path} cannot be read ({error}); use real.json of the ReaL labels") from None
    if not isinstance(labels, list) or not all(
        isinstance(entry, list) and all(type(label) is int and label >= 0 for label in entry) for entry in labels
    ):
        raise DataError(f"TEST.REAL_LABELS={path}: not a list of lists of class ids; use real.json of the ReaL labels")
    image_labels = []
    for name in names:
        number = _VALIDATION_NUMBER.search(name)
        if number is None or not 1 <= int(number[1]) <= len(labels):
            raise DataError(f"TEST.REAL_LABELS={path}: no labels for {name}; the file covers only ImageNet's validation images")
        image_labels.append(labels[int(number[1]) - 1])
    return image_labels


def check_real_labels(real_labels: Sequence[Sequence[int]], class_ids: Sequence[int], path: str) -> None:
    """Check that the model has the class ids of ImageNet, to which the ReaL labels refer.

    Nine of ten images have their original class among their ReaL labels.

    Args:
        real_labels: result of ``read_real_labels``.
        class_ids: the model's class id of each image.

    Raises:
        DataError: most images have other labels.
    """
    labelled = [(class_id, labels) for class_id, labels in zip(class_ids, real_labels, strict=True) if labels]
    agreeing = sum(class_id in labels for class_id, labels in labelled)
    if agreeing < MIN_REAL_AGREEMENT * len(labelled):
        raise DataError(
            f"TEST.REAL_LABELS={path}: only {agreeing} of {len(labelled)} images have their own class id among their labels, "
            "so the class ids of the model are not ImageNet's; leave out TEST.REAL_LABELS, or use weights and data with "
            "ImageNet's 1000 classes, sorted by WordNet id"
        )


def _read_ids(path: Path) -> dict[str, int]:
    """Read the class id of each directory, by the ``_form`` of its name, from the file that TEST.CLASS_MAP specifies."""
    ids: dict[str, int] = {}
    for number, line in enumerate(read_listing(path, "set TEST.CLASS_MAP to a file, or to imagenet").split("\n"), start=1):
        if not line.strip():
            continue
        *names, label = line.rsplit(maxsplit=1)
        name = names[0].strip() if names else ""
        if not name or not is_class_id(label):
            raise DataError(f"{path}:{number}: expected a directory name, white space and a class id, found {line!r}")
        if ids.setdefault(_form(name), int(label)) != int(label):
            raise DataError(f"{path}:{number}: {name} has another class id in an earlier line; remove one of the lines")
    return ids


def _form(name: str) -> str:
    """Names in a file have no white space around them, and may have another Unicode normalisation than directories."""
    return normalise(name.strip())


def _shorten(names: list[str]) -> str:
    """Join up to five names with commas, followed by the number of omitted names."""
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
