"""Parquet shards as on the Hugging Face hub: what is listed, read and refused."""

import builtins
import io
import os
import random
import shlex
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

import data.rows
from data.build import build_datasets
from data.classes import read_real_labels
from data.datasets import ImageDataset
from data.files import DataError
from data.index import compare_descriptions, describe_index
from data.sources.class_list import write_class_names
from data.splits import build_indices
from scripts.pack_dataset import pack
from tests.indices import index_parquet
from tests.parquet import write_parquet, write_parquet_copy
from utils.config.loading import load_config

pytest.importorskip("pyarrow")
SHARDS = tuple(f"data/train-0000{number}-of-00003.parquet" for number in range(3))


def random_rows(count: int, *, classes: int = 3, seed: int = 0, size: int = 2000) -> list:
    rng = random.Random(seed)
    return [(rng.randbytes(rng.randrange(1, size)), f"{number}.jpg", number % classes) for number in range(count)]


@pytest.fixture
def shards(tmp_path):
    """Three shards of 30 images each, in row groups of 10, and all their rows."""
    rows = random_rows(90)
    for number, name in enumerate(SHARDS):
        write_parquet(tmp_path / name, rows[30 * number : 30 * number + 30], ["a", "b", "c"])
    return tmp_path, rows


@pytest.mark.parametrize("order", ["forwards", "shuffled"])
def test_images_labels_and_names_are_those_of_the_rows(shards, order, monkeypatch):
    root, rows = shards
    monkeypatch.setattr(data.rows, "CACHE_SIZE", 25_000)  # two or three row groups
    monkeypatch.setattr(data.rows, "MAX_OPEN_FILES", 2)
    index = index_parquet(root, "train")
    positions = list(range(90))
    if order == "shuffled":
        random.Random(1).shuffle(positions)
    dataset = ImageDataset(index, None)
    assert [dataset.read(position) for position in positions] == [rows[position][0] for position in positions]
    assert index.labels.tolist() == [label for *_, label in rows]
    assert index.classes == ["a", "b", "c"]
    assert [index.path(position) for position in (0, 59)] == [
        f"{root}/data/train-00000-of-00003.parquet/00000/0.jpg",
        f"{root}/data/train-00001-of-00003.parquet/00029/59.jpg",
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "none", "use_dictionary": False},
        {"compression": "zstd", "write_page_index": True, "data_page_version": "2.0"},
        {"group_size": 1000, "data_page_size": 1000},
        {"group_size": 7, "write_page_checksum": True},
        {"image": "img", "label": "fine_label"},
    ],
    ids=["plain", "zstd", "one row group", "checksums", "other names"],
)
def test_other_encodings_and_column_names_give_the_same_images(tmp_path, options):
    rows = [*random_rows(40), *[(b"the same image", None, 1)] * 3]
    write_parquet(tmp_path / "train-00000-of-00001.parquet", rows, ["a", "b", "c"], **options)
    index = index_parquet(tmp_path, "train")
    dataset = ImageDataset(index, None)
    assert [dataset.read(position) for position in range(43)] == [data for data, *_ in rows]
    assert index.name(42) == "train-00000-of-00001.parquet/00042"


def test_a_binary_column_is_read_and_classes_come_from_classes_txt_or_are_numbered(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"photo": [b"one", b"two", b"three"], "label": [0, 1, 0]})
    pyarrow.parquet.write_table(table, tmp_path / "val-0.parquet")
    index = index_parquet(tmp_path, "val")
    assert index.classes == ["0", "1"]
    assert ImageDataset(index, None).read(2) == b"three"
    write_class_names(tmp_path / "classes.txt", ["cat", "dog"])
    assert index_parquet(tmp_path, "val").classes == ["cat", "dog"]


def test_four_workers_read_the_rows_that_the_main_process_has_read_too(shards, monkeypatch):
    root, rows = shards
    monkeypatch.setattr(data.rows, "CACHE_SIZE", 0)
    dataset = ImageDataset(index_parquet(root, "train"), None)
    assert dataset.read(7) == rows[7][0]  # opened before the fork
    positions = [random.Random(5).randrange(90) for _ in range(800)]
    loader = torch.utils.data.DataLoader(
        [partial(dataset.read, position) for position in positions], batch_size=20, num_workers=4, collate_fn=call_all
    )
    for number, batch in enumerate(loader):
        assert dataset.read(number) == rows[number][0]
        assert batch == [rows[position][0] for position in positions[20 * number : 20 * number + 20]]


def call_all(functions):
    return [function() for function in functions]


def test_listing_reads_no_image(shards):
    """The images of two row groups are overwritten: their labels and names can still be listed."""
    import pyarrow.parquet as pq

    root, _ = shards
    path = root / SHARDS[1]
    damaged = bytearray(path.read_bytes())
    for group in (0, 2):
        chunk = pq.read_metadata(path).row_group(group).column(1)
        assert chunk.path_in_schema == "image.bytes"
        start = chunk.dictionary_page_offset or chunk.data_page_offset
        damaged[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    path.write_bytes(damaged)
    index = index_parquet(root, "train")
    assert len(index) == 90
    dataset = ImageDataset(index, None, unreadable="skip")
    skipped = [position for position in range(90) if dataset[0, position].image is None]
    assert set(range(30, 40)) | set(range(50, 60)) <= set(skipped)
    with pytest.raises((OSError, ValueError)):
        dataset.read(30)
    dataset.read(45)


@pytest.mark.parametrize(
    ("rows", "classes", "message"),
    [
        ([(b"x", "x.jpg", 0), (b"x", "x.jpg", -1)], ["a", "b"], "label -1: test splits on the hub often have no labels"),
        ([(b"x", "x.jpg", 0), (b"x", "x.jpg", 2)], ["a", "b"], "label 2, but 2 class names"),
        ([(b"x", "x.jpg", 0), (b"x", "x.jpg", None)], ["a"], "1 rows have no label"),
        ([(b"x", "x.jpg", 0), (None, None, 0)], ["a"], "1 rows have no image"),
        ([(b"x", "x.jpg", 0), (None, "x.jpg", 0)], ["a"], "1 rows have no image"),
        ([(b"x", "x.jpg", 0), (b"x", "x.jpg", 2)], ["a", "b", "c"], "no image of class 1, b"),
        ([(b"x", "x.jpg", 0), (b"x", "x.jpg", 1)], ["a", "a"], "duplicate class name a"),
        ([], ["a"], "has no images"),
    ],
)
def test_rows_without_image_or_class_are_refused(tmp_path, rows, classes, message):
    write_parquet(tmp_path / "train-00000-of-00001.parquet", rows, classes)
    with pytest.raises(DataError, match=message):
        index_parquet(tmp_path, "train")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"text": ["x"], "label": [0]}, r"expected a column image .* the columns are text \(string\), label \(int64\)"),
        ({"one": [b"x"], "two": [b"x"], "label": [0]}, "expected a column image"),
        ({"image": [b"x"], "class": [0]}, "expected one column label with the class ids, but found image, class"),
        ({"image": [b"x"], "label": ["cat"]}, "label has the type string instead of class ids"),
    ],
)
def test_tables_without_images_or_class_ids_are_refused(tmp_path, columns, message):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "train-0.parquet")
    with pytest.raises(DataError, match=message):
        index_parquet(tmp_path, "train")


def test_shards_with_other_class_names_are_refused(shards):
    root, rows = shards
    write_parquet(root / SHARDS[2], rows[60:], ["a", "c", "b"])
    with pytest.raises(DataError, match=r"train-00002-of-00003\.parquet has other class names than train-00000"):
        index_parquet(root, "train")


def test_a_shard_damaged_at_any_of_100_positions_is_refused_or_its_images_are_unreadable(shards):
    """A truncated shard is refused. With a flipped bit, no image is read with other bytes, since the pages have checksums."""
    root, rows = shards
    path = write_parquet(root / SHARDS[0], rows[:30], ["a", "b", "c"], write_page_checksum=True)
    intact, rng = path.read_bytes(), random.Random(0)
    read = 0
    for trial in range(100):
        position = rng.randrange(len(intact))
        flipped = intact[:position] + bytes([intact[position] ^ 1 << rng.randrange(8)]) + intact[position + 1 :]
        path.write_bytes(flipped if trial % 2 else intact[:position])
        try:
            dataset = ImageDataset(index_parquet(root, "train"), None)
        except DataError:
            continue
        assert trial % 2, "a truncated shard was listed"
        for position in range(len(dataset)):
            try:
                assert dataset.read(position) == rows[position][0]
                read += 1
            except (OSError, ValueError):
                pass
    assert read > 1000


def test_a_shard_that_is_replaced_while_it_is_read_is_noticed(shards, monkeypatch):
    root, rows = shards
    monkeypatch.setattr(data.rows, "CACHE_SIZE", 0)
    dataset = ImageDataset(index_parquet(root, "train"), None)
    assert dataset.read(0) == rows[0][0]
    write_parquet(root / SHARDS[0], random_rows(30, seed=1), ["a", "b", "c"])
    for position in (15, 25):
        with pytest.raises(ValueError, match=r"train-00000-of-00003\.parquet was changed after its images were listed"):
            dataset.read(position)
    assert dataset.read(31) == rows[31][0]


def test_changed_images_change_the_fingerprint_and_copies_do_not(shards, tmp_path):
    root, rows = shards
    before = describe_index(index_parquet(root, "train"))
    (root / "data").rename(root / "elsewhere")
    (root / "copy").mkdir()
    (root / "elsewhere").rename(root / "copy/data")
    os.utime(root / "copy" / SHARDS[0], (1, 1))
    assert compare_descriptions(before, describe_index(index_parquet(root / "copy", "train"))) == ""
    data, name, label = rows[40]
    rows[40] = (data[:-1] + bytes([data[-1] ^ 1]), name, label)  # one bit of one image
    write_parquet(root / "copy" / SHARDS[1], rows[30:60], ["a", "b", "c"])
    assert "class" in compare_descriptions(before, describe_index(index_parquet(root / "copy", "train")))


def test_the_cached_index_reads_the_same_images_until_a_shard_changes(shards, monkeypatch, caplog):
    root, rows = shards
    monkeypatch.setattr("data.index.MIN_CACHED_IMAGES", 5)
    caplog.set_level("INFO")
    for path in (root / "data").iterdir():
        os.utime(path, (1e9, 1e9))
    read = partial(index_parquet, root, "train", cache=root / "cache")
    read()
    dataset = ImageDataset(read(), None)
    assert "90 images, from the index cached in" in caplog.text
    assert [dataset.read(position) for position in range(90)] == [row[0] for row in rows]
    write_parquet(root / SHARDS[2], rows[60:80], ["a", "b", "c"])
    assert len(read()) == 80


def test_without_pyarrow_the_error_gives_the_command_that_installs_it(shards, monkeypatch):
    root, _ = shards
    real = builtins.__import__

    def fail(name, *arguments):
        if name.startswith("pyarrow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *arguments)

    index = index_parquet(root, "train")
    monkeypatch.setattr(builtins, "__import__", fail)
    for read in (partial(index_parquet, root, "train"), partial(ImageDataset, index, None)):
        with pytest.raises(DataError, match=r"needs pyarrow .*; install it: pip install pyarrow$"):
            read()


def test_the_hubs_imagenet_has_the_class_names_of_directories_and_finds_its_real_labels(tmp_path):
    info = ImageNetInfo()
    names = [info.index_to_description(label) for label in range(1000)]
    names[517] = "crane2"  # as on the hub; the description of class 134 is crane, too
    rows = [(b"x", f"ILSVRC2012_val_{label + 1:08d}_{info.label_names()[label]}.JPEG", label) for label in range(1000)]
    write_parquet(tmp_path / "data/validation-00000-of-00001.parquet", rows, names)
    index = index_parquet(tmp_path, "validation")
    assert index.classes == info.label_names()
    (tmp_path / "real.json").write_text("[[3], [], [1, 2]]")
    assert read_real_labels(tmp_path / "real.json", [index.name(2), index.name(0)]) == [[1, 2], [3]]


@pytest.fixture
def create_cfg(toy_config, tmp_path):
    def create(*opts):
        return load_config(toy_config, ["DATA.DATA_PATH", str(tmp_path), "DATA.INDEX_CACHE", "", *opts])

    return create


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (["data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet"], []),
        (["train-00000-of-00001.parquet", "valid-00000-of-00001.parquet"], []),
        (["data/train-00000-of-00001-a09b74b3ef9c3b56.parquet", "data/test-00000-of-00001-b44f6a1d2a5c0e61.parquet"], []),
        (["a/0.parquet", "b.parquet"], ["DATA.TRAIN_SPLIT", "a/*.parquet", "DATA.VAL_SPLIT", "b.parquet"]),
    ],
)
def test_training_finds_the_shards_of_both_splits(tmp_path, create_cfg, names, options):
    for name, count in zip(names, (9, 6), strict=True):
        write_parquet(tmp_path / name, random_rows(count), ["a", "b", "c"])
    datasets = build_datasets(create_cfg(*options), training=True)
    assert (len(datasets.train), len(datasets.val)) == (9, 6)


def test_the_remedies_for_shards_in_a_directory_per_split_lead_to_them(tmp_path, create_cfg):
    """As in the branch refs/convert/parquet of the hub's data sets."""
    for name in ("train/0000", "validation/0000", "validation/0001"):
        write_parquet(tmp_path / f"{name}.parquet", random_rows(9), ["a", "b", "c"])
    options = []
    for _ in ("train", "val"):
        with pytest.raises(DataError) as caught:
            build_datasets(create_cfg(*options), training=True)
        options += shlex.split(str(caught.value).partition("--opts ")[2])
    datasets = build_datasets(create_cfg(*options), training=True)
    assert (len(datasets.train), len(datasets.val)) == (9, 18)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda root: (root / SHARDS[1]).unlink(),
            r"train-00001-of-00003\.parquet: shard 1 is missing, but there are shards 0 to 2",
        ),
        (lambda root: (root / SHARDS[2]).unlink(), r"train-00002-of-00003\.parquet: shard 2 is missing"),
        (lambda root: os.link(root / SHARDS[0], root / "data/train-x.parquet"), "are links to the same file"),
        (lambda root: shutil.copy(root / SHARDS[0], root / "train-0.parquet"), "are shards of the same split"),
        (lambda root: (root / SHARDS[0]).write_text("version https://git-lfs"), "cannot be read .* git lfs pull"),
    ],
    ids=["first missing", "last missing", "link", "two directories", "placeholder"],
)
def test_incomplete_and_repeated_shards_are_refused(shards, change, message):
    root, _ = shards
    change(root)
    with pytest.raises(DataError, match=message):
        index_parquet(root, "train")


def test_a_warning_names_files_that_are_no_shards(shards, caplog):
    root, _ = shards
    (root / "data/train_3.parquet").write_bytes(b"x")
    assert len(index_parquet(root, "train")) == 90
    assert "data/train_3.parquet is not read" in caplog.text


def test_the_images_held_out_are_those_of_directories_with_the_same_images(tmp_path, create_cfg, toy_data):
    def names(root):
        index = build_indices(create_cfg("DATA.DATA_PATH", str(root), "DATA.VAL_FRACTION", 0.2), ["val"])["val"]
        dataset = ImageDataset(index, None)
        return [(int(index.labels[position]), dataset.read(position)) for position in range(len(index))]

    shutil.copytree(toy_data / "train", tmp_path / "folder/train")
    write_parquet_copy(toy_data, tmp_path / "parquet", {"train": "train"})
    assert names(tmp_path / "parquet") == names(tmp_path / "folder")


@pytest.mark.parametrize("split", ["validation", "data/val*.parquet"])
def test_parquet_shards_are_packed_as_tar_shards_and_unnamed_images_get_the_extension_of_their_format(tmp_path, split):
    images = []
    for number, kind in enumerate(("PNG", "JPEG", "BMP", "WEBP", "TIFF", "PPM", "GIF")):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, kind)
        images.append(buffer.getvalue())
    rows = [(image, None if number else "first.png", number % 2) for number, image in enumerate(images)]
    write_parquet(tmp_path / "hub/data/validation-00000-of-00001.parquet", rows, ["a", "b"])
    packed = pack(tmp_path / "hub", tmp_path / "packed", split, archive="tar")
    shard = "validation-00000-of-00001.parquet"
    extensions = (".jpg", ".bmp", ".webp", ".tiff", ".ppm", ".gif")
    assert [packed.name(position).partition("/")[2] for position in range(7)] == [
        f"{shard}/00000/first.png",
        *[f"{shard}/{number:05d}{extension}" for number, extension in enumerate(extensions, start=1)],
    ]
    assert Path(packed.archives[0]).name == f"{'validation' if split == 'validation' else 'val'}-000000.tar"
    assert packed.classes == ["a", "b"]
    assert [ImageDataset(packed, None).read(position) for position in range(7)] == images


def test_a_warning_proposes_to_pack_shards_that_exceed_the_memory_of_a_worker(shards, create_cfg, monkeypatch, caplog):
    root, rows = shards
    write_parquet(root / "data/validation-00000-of-00001.parquet", rows[:30], ["a", "b", "c"])
    build_datasets(create_cfg(), training=True)
    monkeypatch.setattr("data.build.CACHE_SIZE", 50_000)
    build_datasets(create_cfg(), training=False)
    assert "pack" not in caplog.text
    build_datasets(create_cfg(), training=True)
    assert f"pack the images once: python scripts/pack_dataset.py {root} DIRECTORY" in caplog.text
