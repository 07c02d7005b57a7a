"""Data sets as other programs write them: remedies that the next command accepts, and images held out after copies."""

import re
import shlex
import unicodedata

import numpy as np
import pytest

import scripts.pack_dataset
from data.datasets import ImageDataset
from data.files import DataError
from data.index import create_index
from data.splits import build_indices, hold_out
from tests.data.test_splits import expected, image_bytes, images, keys, write_folder, write_shards
from tests.launch import run_script
from tests.parquet import write_parquet
from utils.config.loading import load_config


@pytest.fixture
def read(toy_config, tmp_path):
    """Return a function that lists both splits of a data set."""

    def read(*opts, root=tmp_path):
        return build_indices(
            load_config(toy_config, ["DATA.DATA_PATH", str(root), "DATA.INDEX_CACHE", "", *opts]), ("train", "val")
        )

    return read


def remedy(message: str) -> list[str]:
    """Keys and values that a message proposes first."""
    options = re.search(r"--opts ((?:DATA\.[A-Z_]+ (?:'[^']*'|[^\s,:;]+) ?)+)", message)
    assert options, message
    return shlex.split(options[1])


def obey(read, *opts) -> dict:
    """Read a data set with the options that up to two errors propose."""
    for _ in range(2):
        try:
            return read(*opts)
        except DataError as error:
            opts = (*opts, *remedy(str(error)))
    return read(*opts)


@pytest.mark.parametrize("classes", [("bus", "car", "train"), ("bullet train", "car", "test tube"), ("bus", "car", "test")])
@pytest.mark.parametrize("opts", [(), ("DATA.VAL_FRACTION", 0.2)])
def test_class_directories_with_names_of_splits_are_read_after_one_remedy(classes, opts, read, tmp_path):
    for label, name in enumerate(classes):
        (tmp_path / name).mkdir()
        for number in range(5):
            (tmp_path / name / f"{number}.png").write_bytes(image_bytes(label, number))
    with pytest.raises(DataError) as error:
        read(*opts)
    indices = read(*remedy(str(error.value)))
    assert indices["train"].classes == list(classes)
    assert (len(indices["train"]), len(indices["val"])) == (12, 3)


def test_directories_of_splits_without_classes_are_not_called_classes(read, tmp_path):
    for name in ("train", "test1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(image_bytes(1))
    with pytest.raises(DataError, match="put every image into a directory named after its class") as error:
        read("DATA.VAL_FRACTION", 0.2)
    assert "--opts" not in str(error.value)


@pytest.mark.parametrize("fraction", [0, 0.25])
def test_shards_with_numbers_as_names_are_proposed_for_training(fraction, read, tmp_path):
    write_shards(tmp_path / "*.tar", per_class=10)
    with pytest.raises(DataError, match=r"If 0000\.tar has training images") as error:
        read("DATA.VAL_FRACTION", fraction)
    assert remedy(str(error.value)) == ["DATA.TRAIN_SPLIT", "*.tar"]
    assert "also DATA.VAL_FRACTION 0.1" in str(error.value)
    indices = read("DATA.TRAIN_SPLIT", "*.tar", "DATA.VAL_FRACTION", 0.1)
    assert keys(indices["train"]) | keys(indices["val"]) == expected(0, 10)


@pytest.mark.parametrize("train", ["train", "sets/train"])
def test_the_remedy_for_validation_images_in_another_directory_keeps_the_training_images(train, read, tmp_path):
    write_folder(tmp_path / train, 0)
    write_folder(tmp_path / "sets/validation", 1)
    indices = obey(read, *(("DATA.TRAIN_SPLIT", train) if "/" in train else ()))
    assert {split: keys(index) for split, index in indices.items()} == {"train": expected(0), "val": expected(1)}


def test_packing_proposes_class_directories_and_training_images_alone(tmp_path):
    write_folder(tmp_path / "photos")
    write_folder(tmp_path / "data/train")
    for name, option in (("photos", "--splits ."), ("data", "--splits train")):
        arguments = [tmp_path / name, tmp_path / f"packed {name}"]
        failed = run_script(scripts.pack_dataset, arguments, tmp_path / "log")
        assert failed.output.strip().endswith(f"add {option}")
        assert "12 images" in run_script(scripts.pack_dataset, [*arguments, *option.split()], tmp_path / "log").output


def test_rows_without_images_are_counted_in_all_row_groups(read, tmp_path):
    rows = [(None if number < 15 else b"x", f"{number}.png", 0) for number in range(30)]
    write_parquet(tmp_path / "train-0.parquet", rows, ["one"])
    with pytest.raises(DataError, match="15 rows have no image; remove these rows"):
        read("DATA.VAL_FRACTION", 0.1)
    write_parquet(tmp_path / "train-0.parquet", [(None, name, label) for _, name, label in rows], ["one"])
    with pytest.raises(DataError, match=r"30 rows have no image; store the content of the image files in image\.bytes"):
        read("DATA.VAL_FRACTION", 0.1)


# --- Held-out images


def test_both_unicode_forms_of_a_file_name_are_held_out_alike():
    names = [f"one/Grün é {number}.jpg" for number in range(50)]
    chosen = []
    for form in ("NFC", "NFD"):
        changed = [unicodedata.normalize(form, name) for name in names]
        chosen.append(hold_out(create_index("data", ["one"], changed, [0] * 50), 0.3)["val"])
    assert np.array_equal(*chosen)


@pytest.mark.parametrize("archive", ["tar", "zip"])
@pytest.mark.parametrize("kind", ["two formats", "no extension", "unnamed rows"])
def test_packing_does_not_change_which_images_are_held_out(kind, archive, read, tmp_path):
    root, per_class = tmp_path / "data", 20
    if kind == "unnamed rows":
        rows = [(data, None, label) for label, _, data in images(0, per_class)]
        for shard in range(2):
            write_parquet(root / f"data/train-0000{shard}-of-00002.parquet", rows[shard::2], ["a", "b", "c"])
    else:
        write_folder(root / "train", per_class=per_class)
        for number, path in enumerate(sorted(root.glob("train/*/*.png"))[::2]):
            if kind == "no extension":
                path.rename(path.with_suffix(""))
            else:
                path.with_suffix(".jpg").write_bytes(image_bytes(9, number))
    run_script(scripts.pack_dataset, [root, tmp_path / "packed", "--splits", "train", "--format", archive], tmp_path / "log")
    chosen = []
    for opts in ({"root": root}, {"root": tmp_path / "packed"}):
        zip_mode = archive == "zip" and opts["root"] != root
        index = read("DATA.VAL_FRACTION", 0.3, "DATA.ZIP_MODE", zip_mode, **opts)["val"]
        dataset = ImageDataset(index, None)
        chosen.append({dataset.read(position) for position in range(len(index))})
    assert len(chosen[0]) in (18, 27)
    assert chosen[0] == chosen[1]
