"""Match the classes of a dataset with those of a model."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from timm.data import ImageNetInfo, infer_imagenet_subset

from data.index import DataError, is_class_id

_VALIDATION_NUMBER = re.compile(r"ILSVRC2012_val_(\d{8})\.")


def check_classes(train: Sequence[str] | None, val: Sequence[str], num_classes: int, root: str) -> None:
    """Refuse splits that do not fit each other or the model, before anything is built.

    Raises:
        DataError: a class that one split lacks, or another number of classes than the model's.
    """
    if train is not None and list(train) != list(val):
        parts = []
        if lacking := sorted(set(train) - set(val)):
            parts.append(f"val/ lacks {_shorten(lacking)}")
        if extra := sorted(set(val) - set(train)):
            parts.append(f"val/ has {_shorten(extra)} besides")
        raise DataError(f"{root}: {' and '.join(parts)}; train/ and val/ need the same classes")
    if len(val) != num_classes:
        remedy = (
            f"add --opts MODEL.NUM_CLASSES {len(val)}"
            if train is not None
            else "add --opts TEST.CLASS_MAP with the class id of each folder (imagenet for WordNet ids)"
        )
        raise DataError(
            f"{root}: holds {len(val)} classes, but MODEL.NUM_CLASSES={num_classes}; {remedy}, or check --data-path"
        )


def check_class_names(names: Sequence[str], model_classes: Sequence[str], root: str) -> None:
    """Refuse to evaluate a model on other classes than it was trained with, even if their number is the same.

    Names that are mere numbers say nothing, and are not compared.

    Raises:
        DataError: class names that differ.
    """
    unknown = len(model_classes) != len(names) or any(list(given) == numbered(len(given)) for given in (names, model_classes))
    if unknown or list(names) == list(model_classes):
        return
    first = next(position for position, pair in enumerate(zip(names, model_classes, strict=True)) if pair[0] != pair[1])
    raise DataError(
        f"{root}: its classes are not those that the checkpoint was trained with: class {first} is {names[first]!r} here and "
        f"{model_classes[first]!r} there; check --data-path, or add --opts TEST.CLASS_MAP with the class id of each folder"
    )


def numbered(count: int) -> list[str]:
    """Names of classes without names, as archives without ``classes.txt`` have."""
    return [str(number) for number in range(count)]


def read_class_map(class_map: str, classes: Sequence[str], num_classes: int) -> list[int]:
    """The model's class for each of a dataset's, whose accuracy is then among those classes alone.

    Args:
        class_map: ``imagenet`` for folders named by WordNet id (n01440764: ImageNet-A, -R, -Sketch) or by class number
            (ImageNet-V2), else a file with a line for each folder: its name, white space, the model's class id.
        classes: names by the dataset's class id.

    Raises:
        DataError: a folder without a class, a class the model does not have, or two folders of one class.
    """
    if class_map == "imagenet":
        if len(classes) < num_classes and set(classes) == {str(number) for number in range(len(classes))}:
            raise DataError(
                f"TEST.CLASS_MAP=imagenet: the {len(classes)} classes are numbered from 0, which does not say which of the "
                f"{num_classes} they are; name them by WordNet id, in folders or in classes.txt, or give a file"
            )
        subset = infer_imagenet_subset({"num_classes": num_classes})
        names = ImageNetInfo(subset).label_names() if subset else []
        ids = {name: number for number, name in enumerate(names)} | {str(number): number for number in range(num_classes)}
        source = f"TEST.CLASS_MAP=imagenet with MODEL.NUM_CLASSES={num_classes}"
    else:
        ids, source = _read_ids(Path(class_map)), class_map
    if lacking := [name for name in classes if name not in ids]:
        raise DataError(f"{source}: knows no class of the folder {_shorten(lacking)}; add a line for it, or remove the folder")
    if len(classes) < 2:
        raise DataError(
            f"{source}: maps a single folder, {classes[0]!r}, among whose one class every prediction is correct; check "
            "--data-path, whose val/ needs a folder per class"
        )
    chosen = [ids[name] for name in classes]
    if max(chosen) >= num_classes:
        raise DataError(f"{source}: gives class {max(chosen)}, but MODEL.NUM_CLASSES={num_classes}; class ids start at 0")
    if len(set(chosen)) < len(chosen):
        twice = next(name for name, number in zip(classes, chosen, strict=True) if chosen.count(number) > 1)
        raise DataError(f"{source}: gives the class of {twice} to another folder too; put their images into one folder")
    return chosen


def read_real_labels(path: str | Path, names: Sequence[str]) -> list[list[int]]:
    """Every label that people saw in each validation image (ReaL, https://arxiv.org/abs/2006.07159); none for some.

    Args:
        path: ``real.json``, a list of class ids for each of ILSVRC2012_val_00000001.JPEG, ..._00000002.JPEG, ...
        names: of the images to look up.

    Raises:
        DataError: a file that is no such list, or an image that it does not number.
    """
    try:
        labels = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"TEST.REAL_LABELS={path}: cannot be read ({error}); it is real.json of the ReaL labels") from None
    if not isinstance(labels, list) or not all(isinstance(entry, list) for entry in labels):
        raise DataError(f"TEST.REAL_LABELS={path}: is no list of lists of class ids; use real.json of the ReaL labels")
    found = []
    for name in names:
        number = _VALIDATION_NUMBER.search(name)
        if number is None or not 1 <= int(number[1]) <= len(labels):
            raise DataError(f"TEST.REAL_LABELS={path}: has no labels of {name}; it is for ImageNet's own validation images")
        found.append(labels[int(number[1]) - 1])
    return found


def _read_ids(path: Path) -> dict[str, int]:
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise DataError(f"TEST.CLASS_MAP={path}: cannot be read ({error.strerror}); name a file, or imagenet") from None
    ids = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name, _, label = line.strip().replace("\t", " ").rpartition(" ")
        if not name or not is_class_id(label):
            raise DataError(f"{path}:{number}: {line!r} is not a folder's name, white space and a class id")
        if ids.setdefault(name.strip(), int(label)) != int(label):
            raise DataError(f"{path}:{number}: gives {name.strip()} another class id than an earlier line; remove one of them")
    return ids


def _shorten(names: list[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
