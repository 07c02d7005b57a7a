"""Match the classes of a dataset with those of a model."""

import json
import logging
import re
from collections.abc import Sequence
from enum import Enum
from pathlib import Path

from timm.data import ImageNetInfo, infer_imagenet_subset

from data.files import DataError
from data.sources.class_list import first_duplicate, first_twins, is_class_id, normalise, numbered, read_listing

logger = logging.getLogger(__name__)

MIN_REAL_AGREEMENT = 0.5  # minimum fraction of images whose ReaL labels include their original class
_VALIDATION_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\.")


def check_classes(train: Sequence[str] | None, val: Sequence[str], num_classes: int, root: str) -> None:
    """Check that the classes of the splits match each other, and that their number matches the model.

    Raises:
        DataError: a class missing from one split, or a number of classes that differs from the model's.
    """
    if train is not None and list(train) != list(val):
        parts = []
        if missing := sorted(set(train) - set(val)):
            parts.append(f"val/ lacks {_shorten(missing)}")
        if extra := sorted(set(val) - set(train)):
            parts.append(f"val/ also has {_shorten(extra)}")
        if not parts:
            parts.append("val/ has the classes of train/ in another order")
        if twins := first_twins([*missing, *extra]):
            parts.append(f"{twins[0]!a} and {twins[1]!a} differ only in Unicode normalisation (NFC and NFD): rename one")
        raise DataError(f"{root}: {' and '.join(parts)}; train/ and val/ need the same classes")
    _check_two_classes(val, root)
    if len(val) != num_classes:
        remedy = (
            f"add --opts MODEL.NUM_CLASSES {len(val)}"
            if train is not None
            else "set TEST.CLASS_MAP with --opts: to imagenet if directories are named by WordNet id, otherwise to a file with "
            "the class id of each directory"
        )
        raise DataError(
            f"{root} contains {len(val)} classes, but the model has {num_classes} (MODEL.NUM_CLASSES). Check --data-path, "
            f"or {remedy}"
        )


class ClassMatch(Enum):
    """Relation of the class ids of two class lists, see ``compare_classes``."""

    EQUAL = "the same classes in the same order"
    UNVERIFIED = "the names do not show whether the order is the same"
    REORDERED = "the same classes in another order, or possibly so"
    DIFFERENT = "different classes"


def compare_classes(names: Sequence[str], model_classes: Sequence[str]) -> tuple[ClassMatch, str]:
    """Decide whether the class ids of a dataset are those of a model.

    Evaluation, --pretrained and averaging use this function, so that they agree about the order of classes.

    Args:
        names: class names of the dataset, by class id.
        model_classes: class names with which the weights were trained, by class id; () if unknown.

    Returns:
        The relation of the lists, and its description; "" if they are equal.
    """
    names, model_classes = list(names), list(model_classes)
    if names == model_classes:
        return ClassMatch.EQUAL, ""
    if not model_classes:
        return _compare_with_unknown(names)
    if len(names) != len(model_classes):
        return ClassMatch.DIFFERENT, f"{len(names)} classes in the data, but {len(model_classes)} in the checkpoint"
    position = next(i for i, (name, other) in enumerate(zip(names, model_classes, strict=True)) if name != other)
    difference = f"class {position} is {names[position]!r} in the data, but {model_classes[position]!r} in the checkpoint"
    if set(names) == set(model_classes):
        return ClassMatch.REORDERED, f"{difference}, which has the same classes in another order"
    if names == numbered(len(names)) and not _is_ambiguous(model_classes):
        return ClassMatch.UNVERIFIED, "the data number their classes"
    if model_classes == numbered(len(names)) and not _is_ambiguous(names):
        return ClassMatch.UNVERIFIED, "the checkpoint numbers its classes"
    if twins := first_twins([*names, *model_classes]):
        difference += f" ({twins[0]!a} and {twins[1]!a} differ only in Unicode normalisation)"
    return ClassMatch.DIFFERENT, difference


def _compare_with_unknown(names: list[str]) -> tuple[ClassMatch, str]:
    """Relation to weights whose class names are unknown: most have ImageNet's classes, or those of sorted directories."""
    if names == imagenet_classes(len(names)):
        return ClassMatch.EQUAL, ""
    if _is_ambiguous(names):
        as_numbers = sorted(names, key=int)
        position = next(i for i, (name, other) in enumerate(zip(names, as_numbers, strict=True)) if name != other)
        return ClassMatch.REORDERED, (
            f"the checkpoint has no class names, and the directories are numbered: class {position} is {names[position]!r} if "
            f"they are sorted as text, but {as_numbers[position]!r} if they are sorted as numbers"
        )
    return ClassMatch.UNVERIFIED, "the checkpoint has no class names"


def _is_ambiguous(names: Sequence[str]) -> bool:
    """Whether class names are numbers that are sorted as text (0, 1, 10, 11, 2), so that there are two plausible orders."""
    return all(map(is_class_id, names)) and list(names) == sorted(names) != sorted(names, key=int)


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
    if match in (ClassMatch.REORDERED, ClassMatch.DIFFERENT):
        what = "other classes" if match is ClassMatch.DIFFERENT else "the classes in another order"
        raise DataError(
            f"{root}: the checkpoint was trained with {what}: {difference}. Check --data-path, or set TEST.CLASS_MAP with "
            "--opts to a file with one line per class of the data: its name, a space, and the model's class id"
        )


def find_order(names: Sequence[str], model_classes: Sequence[str]) -> list[int]:
    """Class id in the model of each class of a dataset; both have the same classes."""
    ids = {name: number for number, name in enumerate(model_classes)}
    return [ids[name] for name in names]


def imagenet_classes(count: int) -> list[str]:
    """WordNet ids of the classes of the ImageNet variant with this number of classes, by class id; [] if there is none."""
    subset = infer_imagenet_subset({"num_classes": count})
    return ImageNetInfo(subset).label_names() if subset else []


def read_class_map(class_map: str, classes: Sequence[str], num_classes: int, model_classes: Sequence[str] = ()) -> list[int]:
    """Read the model's class id for each class of a dataset; predictions are then restricted to these class ids.

    Args:
        class_map: ``imagenet`` for directories named by WordNet id such as n01440764 (ImageNet-A, -R, -Sketch) or by class
            number (ImageNet-V2); otherwise a file with one line per directory: its name, white space, the model's class id.
        classes: class names of the dataset, in the order of the dataset's class ids.
        model_classes: class names with which the weights were trained, by class id; () if unknown.

    Raises:
        DataError: a directory without a class id, a class id out of range, or the same class id for two directories; with
            ``imagenet``, also weights with another order of classes.
    """
    if class_map == "imagenet":
        for first in (0, 1):
            if len(classes) < num_classes and set(classes) == {str(number + first) for number in range(len(classes))}:
                raise DataError(
                    f"TEST.CLASS_MAP=imagenet: the {len(classes)} classes are numbered from {first}, so they cannot be matched "
                    f"with the model's {num_classes} classes; name the directories by WordNet id (for archives: list the "
                    "WordNet ids in classes.txt), or set TEST.CLASS_MAP to a file with the class id of each directory"
                )
        names = imagenet_classes(num_classes)
        _check_imagenet_order(model_classes, names)
        ids = {name: number for number, name in enumerate(names)} | {str(number): number for number in range(num_classes)}
        source = f"TEST.CLASS_MAP=imagenet with MODEL.NUM_CLASSES={num_classes}"
        remedy = "set TEST.CLASS_MAP to a file with the class id of each directory"
    else:
        ids, source, remedy = _read_ids(Path(class_map)), class_map, "add a line for each"
    if missing := [name for name in classes if _form(name) not in ids]:
        raise DataError(f"{source}: directories without a class id: {_shorten(missing)}; {remedy}, or remove them")
    _check_two_classes(classes, source)
    class_ids = [ids[_form(name)] for name in classes]
    if max(class_ids) >= num_classes:
        raise DataError(f"{source} has class id {max(class_ids)}, but MODEL.NUM_CLASSES={num_classes}; class ids start at 0")
    if (repeated := first_duplicate(class_ids)) is not None:
        duplicate = classes[class_ids.index(repeated)]
        raise DataError(f"{source}: {duplicate} and another directory have the same class id; merge these directories")
    stored_ids = {name: number for number, name in enumerate(model_classes)}
    for name, number in zip(classes, class_ids, strict=True):
        if (stored := stored_ids.get(name, number)) != number:
            logger.warning(
                "%s: class %s is mapped to class id %d, but in the checkpoint, this class id is %s, and %s has class id %d",
                source,
                name,
                number,
                model_classes[number] if number < len(model_classes) else "unused",
                name,
                stored,
            )
            break
    return class_ids


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
