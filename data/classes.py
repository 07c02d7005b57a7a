"""Match the classes of a dataset with those of a model."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from timm.data import ImageNetInfo, infer_imagenet_subset

from data.index import DataError, is_class_id

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
        raise DataError(f"{root}: {' and '.join(parts)}; train/ and val/ need the same classes")
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


def check_class_names(names: Sequence[str], model_classes: Sequence[str], root: str) -> None:
    """Check that the class names of a dataset are those that the model was trained with (see ``compare_class_names``).

    Raises:
        DataError: different class names.
    """
    if difference := compare_class_names(names, model_classes):
        raise DataError(
            f"{root}: the checkpoint was trained with other classes: {difference}. Check --data-path, or set TEST.CLASS_MAP "
            "with --opts to a file with the class id of each directory"
        )


def compare_class_names(names: Sequence[str], model_classes: Sequence[str]) -> str:
    """Describe the first class whose name in a dataset differs from its name in a checkpoint; "" if there is none.

    The lists are not compared if they differ in length, or if one of them is "0", "1", ..., which does not identify classes.
    """
    if len(model_classes) != len(names) or numbered(len(names)) in (list(names), list(model_classes)):
        return ""
    pairs = enumerate(zip(names, model_classes, strict=True))
    class_id = next((class_id for class_id, (name, model_class) in pairs if name != model_class), None)
    if class_id is None:
        return ""
    return f"class {class_id} is {names[class_id]!r} in the data, but {model_classes[class_id]!r} in the checkpoint"


def numbered(count: int) -> list[str]:
    """Class names "0", "1", ..., as used for archives without ``classes.txt``."""
    return [str(number) for number in range(count)]


def read_class_map(class_map: str, classes: Sequence[str], num_classes: int) -> list[int]:
    """Read the model's class id for each class of a dataset; predictions are then restricted to these class ids.

    Args:
        class_map: ``imagenet`` for directories named by WordNet id such as n01440764 (ImageNet-A, -R, -Sketch) or by class
            number (ImageNet-V2); otherwise a file with one line per directory: its name, white space, the model's class id.
        classes: class names of the dataset, in the order of the dataset's class ids.

    Raises:
        DataError: a directory without a class id, a class id out of range, or the same class id for two directories.
    """
    if class_map == "imagenet":
        if len(classes) < num_classes and set(classes) == {str(number) for number in range(len(classes))}:
            raise DataError(
                f"TEST.CLASS_MAP=imagenet: the {len(classes)} classes are numbered from 0, so they cannot be matched with the "
                f"model's {num_classes} classes; name the directories by WordNet id (for archives: list the WordNet ids in "
                "classes.txt), or set TEST.CLASS_MAP to a file with the class id of each directory"
            )
        subset = infer_imagenet_subset({"num_classes": num_classes})
        names = ImageNetInfo(subset).label_names() if subset else []
        ids = {name: number for number, name in enumerate(names)} | {str(number): number for number in range(num_classes)}
        source = f"TEST.CLASS_MAP=imagenet with MODEL.NUM_CLASSES={num_classes}"
        remedy = "set TEST.CLASS_MAP to a file with the class id of each directory"
    else:
        ids, source, remedy = _read_ids(Path(class_map)), class_map, "add a line for each"
    if missing := [name for name in classes if name not in ids]:
        raise DataError(f"{source}: directories without a class id: {_shorten(missing)}; {remedy}, or remove them")
    if len(classes) < 2:
        raise DataError(
            f"{source}: val/ has only one class, {classes[0]!r}, so every prediction would be correct; check --data-path: val/ "
            "needs one directory per class"
        )
    class_ids = [ids[name] for name in classes]
    if max(class_ids) >= num_classes:
        raise DataError(f"{source} has class id {max(class_ids)}, but MODEL.NUM_CLASSES={num_classes}; class ids start at 0")
    if len(set(class_ids)) < len(class_ids):
        duplicate = next(name for name, number in zip(classes, class_ids, strict=True) if class_ids.count(number) > 1)
        raise DataError(f"{source}: {duplicate} and another directory have the same class id; merge these directories")
    return class_ids


def read_real_labels(path: str | Path, names: Sequence[str]) -> list[list[int]]:
    """Read the ReaL labels (https://arxiv.org/abs/2006.07159): all correct class ids of each validation image, possibly none.

    Args:
        path: ``real.json``, a list of class ids for each of ILSVRC2012_val_00000001.JPEG, ..._00000002.JPEG, ...
        names: image names to look up.

    Raises:
        DataError: an invalid file, or an image that has no entry in the file.
    """
    try:
        labels = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"TEST.REAL_LABELS={path} cannot be read ({error}); use real.json of the ReaL labels") from None
    if not isinstance(labels, list) or not all(isinstance(entry, list) for entry in labels):
        raise DataError(f"TEST.REAL_LABELS={path}: not a list of lists of class ids; use real.json of the ReaL labels")
    image_labels = []
    for name in names:
        number = _VALIDATION_NUMBER.search(name)
        if number is None or not 1 <= int(number[1]) <= len(labels):
            raise DataError(f"TEST.REAL_LABELS={path}: no labels for {name}; the file covers only ImageNet's validation images")
        image_labels.append(labels[int(number[1]) - 1])
    return image_labels


def _read_ids(path: Path) -> dict[str, int]:
    """Read the class id of each directory from the file that TEST.CLASS_MAP specifies."""
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise DataError(f"TEST.CLASS_MAP={path} cannot be read ({error.strerror}); set it to a file, or to imagenet") from None
    ids = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, _, label = line.strip().replace("\t", " ").rpartition(" ")
        if not name or not is_class_id(label):
            raise DataError(f"{path}:{number}: expected a directory name, white space and a class id, found {line!r}")
        if ids.setdefault(name.strip(), int(label)) != int(label):
            raise DataError(f"{path}:{number}: {name.strip()} has another class id in an earlier line; remove one of the lines")
    return ids


def _shorten(names: list[str]) -> str:
    """Join up to five names with commas, followed by the number of omitted names."""
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
