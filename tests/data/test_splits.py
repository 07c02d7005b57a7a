"""Where the training and validation images of a run are found, and what an error about a missing split proposes."""

import gzip
import io
import json
import re
import shlex
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import scripts.pack_dataset
from data.build import build_datasets
from data.files import DataError
from data.index import create_index, describe_index
from data.splits import build_index, build_indices, find_split, hold_out
from jobs.evaluate import warn_about_held_out, warn_about_split
from jobs.locate_checkpoint import Checkpoint, Location, open_checkpoint
from models.checkpoints.reader import read_checkpoint
from tests.launch import run_main, run_script
from tests.runs import assert_equal, newest_update, read_state
from utils.config.loading import load_config, to_dict
from utils.errors import ConfigError

CLASSES = ("cat", "dog", "fox")


@pytest.fixture
def create_cfg(toy_config, tmp_path):
    def create(*opts, root=tmp_path):
        return load_config(toy_config, ["DATA.DATA_PATH", str(root), "DATA.INDEX_CACHE", "", *opts])

    return create


def image_bytes(*key: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(key).integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def images(seed: int, per_class: int = 4) -> list[tuple[int, str, bytes]]:
    """Class id, name and content of the images of a split."""
    return [
        (label, f"{seed}_{label}_{number:03d}.png", image_bytes(seed, label, number))
        for label in range(len(CLASSES))
        for number in range(per_class)
    ]


def write_folder(path: Path, seed: int = 0, per_class: int = 4) -> None:
    for label, name, data in images(seed, per_class):
        (path / CLASSES[label]).mkdir(parents=True, exist_ok=True)
        (path / CLASSES[label] / name).write_bytes(data)


def write_shards(pattern: Path, seed: int = 0, per_class: int = 4, shards: int = 2, compression: str = "") -> None:
    """Write the images in turn to shards as ``timm`` writes them. The pattern's * stands for the number."""
    pattern.parent.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with tarfile.open(str(pattern).replace("*", f"{shard:04d}"), f"w:{compression}") as archive:
            for label, name, data in images(seed, per_class)[shard::shards]:
                key = name.removesuffix(".png")
                files = {f"{key}.png": data, f"{key}.cls": str(label).encode(), f"{key}.json": b'{"width": 8}'}
                for member, content in files.items():
                    entry = tarfile.TarInfo(member)
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))


def write_zip(path: Path, seed: int = 0, per_class: int = 4) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for _, name, data in images(seed, per_class):
            archive.writestr(name, data)
    lines = (f"{name}\t{label}\n" for label, name, _ in images(seed, per_class))
    path.with_name(f"{path.stem}_map.txt").write_text("".join(lines))


def keys(index) -> set[tuple[int, str]]:
    """Class id and name without directory or shard of every image."""
    return {(int(index.labels[i]), index.name(i).rpartition("/")[2]) for i in range(len(index))}


def expected(seed: int, per_class: int = 4) -> set[tuple[int, str]]:
    return {(label, name) for label, name, _ in images(seed, per_class)}


# --- Names of splits


@pytest.mark.parametrize("others", [(), ("test",), ("validation", "test"), ("valid", "validation", "test")])
@pytest.mark.parametrize("layout", ["folder", "tar", "zip"])
def test_the_first_validation_split_that_exists_is_read_and_the_log_says_which(layout, others, create_cfg, tmp_path, caplog):
    caplog.set_level("INFO")
    names = others or ("val", "valid", "validation", "test")
    for seed, name in enumerate(names):
        if layout == "tar":
            write_shards(tmp_path / f"{name}-*.tar", seed)
        else:
            write_zip(tmp_path / f"{name}.zip", seed) if layout == "zip" else write_folder(tmp_path / name, seed)
    assert keys(build_index(create_cfg("DATA.ZIP_MODE", layout == "zip"), "val")) == expected(0)
    levels = {record.levelname for record in caplog.records if "is read for validation" in record.message}
    # A test set beside a validation set is usual; two validation sets are not.
    assert levels == ({"WARNING"} if len(set(names) - {"test"}) > 1 else {"INFO"})
    assert f"{names[0]}{ {'folder': '', 'tar': '-*.tar', 'zip': '.zip'}[layout] } is read for validation" in caplog.text


def test_val_in_any_layout_precedes_the_other_names(create_cfg, tmp_path):
    write_shards(tmp_path / "val-*.tar", 1)
    write_folder(tmp_path / "validation", 2)
    assert keys(build_index(create_cfg(), "val")) == expected(1)


@pytest.mark.parametrize(
    ("value", "zip_mode"),
    [
        ("photos", False),
        ("sets/photos", False),
        ("{root}/sets/photos", False),
        ("photos-*.tar", False),
        ("sets/photos-*.tar", False),
        ("{root}/sets/photos", True),
        ("sets/photos.zip", True),
    ],
)
def test_a_split_may_have_any_name(value, zip_mode, create_cfg, tmp_path):
    write_folder(tmp_path / "val", 1)
    write_folder(tmp_path / "photos", 2)
    write_folder(tmp_path / "sets/photos", 2)
    write_shards(tmp_path / "photos-*.tar", 2)
    write_shards(tmp_path / "sets/photos-*.tar", 2)
    write_zip(tmp_path / "sets/photos.zip", 2)
    cfg = create_cfg("DATA.VAL_SPLIT", value.format(root=tmp_path), "DATA.ZIP_MODE", zip_mode)
    assert keys(build_index(cfg, "val")) == expected(2)


def test_shards_with_the_names_of_the_hub_are_read_as_they_are(create_cfg, tmp_path):
    write_shards(tmp_path / "imagenet1k-train-*.tar", 0)
    write_shards(tmp_path / "imagenet1k-validation-*.tar", 1)
    indices = build_indices(create_cfg(), ("train", "val"))
    assert {split: keys(index) for split, index in indices.items()} == {"train": expected(0), "val": expected(1)}
    assert indices["train"].classes == ["0", "1", "2"]
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    assert build_index(create_cfg(), "train").classes == list(CLASSES)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_shard_with_a_name_of_the_hub_is_detected(split, create_cfg, tmp_path):
    write_shards(tmp_path / "imagenet1k-train-*.tar", 0, shards=3)
    write_shards(tmp_path / "imagenet1k-validation-*.tar", 1, shards=3)
    pattern = f"imagenet1k-{'train' if split == 'train' else 'validation'}-*.tar"
    for number, opts in ((1, ()), (1, (f"DATA.{split.upper()}_SPLIT", pattern)), (0, ())):
        missing = tmp_path / pattern.replace("*", f"000{number}")
        content = missing.read_bytes()
        missing.unlink()
        if number:
            with pytest.raises(DataError, match=f"{missing.name}: shard {number} is missing"):
                build_index(create_cfg(*opts), split)
        missing.write_bytes(content)
    (tmp_path / pattern.replace("*", "0000")).unlink()
    (tmp_path / pattern.replace("*", "0001")).unlink()
    with pytest.raises(DataError, match="shard 0 is missing"):
        build_index(create_cfg(), split)


def test_a_pattern_may_select_shards_but_gaps_among_them_are_detected(create_cfg, tmp_path):
    write_shards(tmp_path / "train-*.tar", per_class=12, shards=12)
    part = build_index(create_cfg("DATA.TRAIN_SPLIT", "train-000*.tar"), "train")
    one = build_index(create_cfg("DATA.TRAIN_SPLIT", "train-0011.tar"), "train")
    even = build_index(create_cfg("DATA.TRAIN_SPLIT", "train-???[02468].tar"), "train")
    assert (len(part), len(one), len(even)) == (30, 3, 18)
    (tmp_path / "train-0004.tar").unlink()
    with pytest.raises(DataError, match=r"train-0004\.tar: shard 4 is missing"):
        build_index(create_cfg("DATA.TRAIN_SPLIT", "train-???[02468].tar"), "train")


def test_a_pattern_that_matches_shards_of_two_splits_is_refused(create_cfg, tmp_path):
    write_shards(tmp_path / "imagenet1k-train-*.tar", 0)
    write_shards(tmp_path / "imagenet1k-validation-*.tar", 1)
    with pytest.raises(
        DataError, match=r"matches shards of two splits, imagenet1k-train-0000\.tar and imagenet1k-validation-0"
    ):
        build_index(create_cfg("DATA.TRAIN_SPLIT", "imagenet1k-*.tar"), "train")


def test_shards_of_two_data_sets_are_refused_and_the_remedy_chooses_one(create_cfg, tmp_path):
    write_shards(tmp_path / "imagenet1k-train-*.tar", 0)
    write_shards(tmp_path / "imagenet22k-train-*.tar", 1)
    with pytest.raises(DataError, match=r"example 'imagenet1k-train-\*\.tar'"):
        build_index(create_cfg(), "train")
    assert keys(build_index(create_cfg("DATA.TRAIN_SPLIT", "imagenet1k-train-*.tar"), "train")) == expected(0)


@pytest.mark.parametrize(
    ("train", "val"), [("train", "train"), ("photos-*.tar", "photos-*.tar"), ("photos-*.tar", "photos-0001.tar")]
)
def test_a_warning_names_images_that_are_in_both_splits(train, val, create_cfg, tmp_path, caplog):
    write_folder(tmp_path / "train")
    write_shards(tmp_path / "photos-*.tar")
    build_datasets(create_cfg("DATA.TRAIN_SPLIT", train, "DATA.VAL_SPLIT", val), training=True)
    assert "the validation accuracy does not measure generalisation" in caplog.text


# --- Remedies


def obey(message: str) -> tuple[list[str], list[str]]:
    """Values for --opts, and other arguments, that an error message proposes."""
    quoted = r"'[^']*'|[^\s,:;]+"
    options = [*re.findall(rf"--opts (DATA\.[A-Z_]+ (?:{quoted}))", message)[:1]]
    options += [f"DATA.DATA_PATH {path}" for path in re.findall(rf"set --data-path ({quoted})", message)]
    options += ["DATA.ZIP_MODE True"] if "add --zip" in message else []
    options += ["DATA.ZIP_MODE False"] if "leave out --zip" in message else []
    return [word for option in options for word in shlex.split(option)]


def error_of(cfg) -> str:
    """Message of the error if there are no validation images; "" if there are."""
    try:
        build_index(cfg, "val")
    except DataError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("zip_mode", [False, True], ids=["", "with --zip"])
@pytest.mark.parametrize(
    "name",
    [
        *("VAL", "Valid", "testing", "dev", "my-validation", "data/val", "data/validation"),
        *("validation_*.tar", "val*.tar", "dev-*.tar", "val/*.tar", "data/val-*.tar", "imagenet1k-dev-*.tar", "val-*.TAR"),
        *("val.zip", "dev.zip", "my_validation.zip", "data/val.zip"),
        *("val-*.tar.gz", "validation-*.tgz"),
        "..",
    ],
)
def test_the_remedy_for_missing_validation_images_leads_to_them(name, zip_mode, create_cfg, tmp_path):
    root = tmp_path / "root"
    write_folder(root / "train", 0)
    if name == "..":
        write_folder(tmp_path / "root/val", 1)
        root /= "train"
    elif name.endswith(".zip"):
        (root / name).parent.mkdir(exist_ok=True)
        write_zip(root / name, 1)
    elif "tar" in name or "tgz" in name:
        write_shards(root / name, 1, compression="gz" if "gz" in name else "")
    else:
        write_folder(root / name, 1)
    opts = ["DATA.ZIP_MODE", zip_mode]
    cfg = create_cfg(*opts, root=root)
    for _ in range(2):  # --zip and the place of the split may be proposed one after the other
        if message := error_of(cfg):
            for path in root.glob("*gz") if "decompress" in message else ():
                path.with_name(f"{path.name.split('.')[0]}.tar").write_bytes(gzip.decompress(path.read_bytes()))
                path.unlink()
            opts += obey(message)
            assert "train" not in " ".join(obey(message)).replace(str(tmp_path), "")
            cfg = create_cfg(*opts, root=root)
    assert keys(build_index(cfg, "val")) == expected(1)


@pytest.mark.parametrize("layout", ["folder", "tar", "zip"])
def test_validation_is_never_told_to_use_training_images(layout, create_cfg, tmp_path):
    writers = {
        "folder": lambda: write_folder(tmp_path / "Training"),
        "tar": lambda: write_shards(tmp_path / "my-training_*.tar"),
        "zip": lambda: write_zip(tmp_path / "training.zip"),
    }
    writers[layout]()
    for zip_mode in (False, True):
        message = error_of(create_cfg("DATA.ZIP_MODE", zip_mode))
        assert "raining" in message.partition("contains")[2]  # the names that exist are listed
        assert obey(message) == []
    cfg = create_cfg("DATA.ZIP_MODE", layout == "zip")
    with pytest.raises(DataError) as error:
        build_index(cfg, "train")
    assert keys(build_index(create_cfg(*obey(str(error.value)), "DATA.ZIP_MODE", layout == "zip"), "train")) == expected(0)


@pytest.mark.parametrize("requested", ["vaI", "validation-{00..63}.tar", "validation-*"])
def test_the_error_for_a_misspelt_split_names_what_exists(requested, create_cfg, tmp_path):
    write_folder(tmp_path / "train")
    write_shards(tmp_path / "validation-*.tar", 1)
    message = error_of(create_cfg("DATA.VAL_SPLIT", requested))
    assert requested in message
    assert obey(message) == ["DATA.VAL_SPLIT", "validation-*.tar"]


@pytest.mark.parametrize("archive", ["tar", "zip"])
def test_packing_finds_the_splits_of_a_run_and_prints_the_options_that_read_them(archive, create_cfg, tmp_path):
    write_folder(tmp_path / "data/train", 0)
    write_folder(tmp_path / "data/Dev", 1)

    def pack(*arguments) -> str:
        arguments = [tmp_path / "data", tmp_path / "packed", "--format", archive, *arguments]
        return run_script(scripts.pack_dataset, arguments, tmp_path / "log").output

    remedy = re.search("add (--splits .*)", pack())
    options = pack(*remedy[1].split()).partition("options for main.py: ")[2].split()
    assert options[:2] == ["--data-path", str(tmp_path / "packed")]
    opts = ["DATA.ZIP_MODE", "--zip" in options, *options[options.index("--opts") + 1 :]]
    assert keys(build_index(create_cfg(*opts, root=tmp_path / "packed"), "val")) == expected(1)
    (tmp_path / "data/Dev").rename(tmp_path / "data/test")
    shutil.rmtree(tmp_path / "packed")
    assert "--opts" not in pack()
    indices = build_indices(create_cfg("DATA.ZIP_MODE", archive == "zip", root=tmp_path / "packed"), ("train", "val"))
    assert [keys(indices[split]) for split in ("train", "val")] == [expected(0), expected(1)]
    (tmp_path / "data/test").rename(tmp_path / "data/photos")
    shutil.rmtree(tmp_path / "packed")
    assert "to read photos: --opts DATA.TRAIN_SPLIT photos, or --opts DATA.VAL_SPLIT photos" in pack(
        "--splits", "train", "photos"
    )


@pytest.mark.parametrize(
    ("split", "name"),
    [
        ("data/val", "val"),
        ("imagenet1k-validation-*.tar", "val"),
        ("held-*.tar", "held"),
        ("photos-0001.tar", "photos"),
        ("train/*.parquet", "train"),
        ("00000.tar", "train"),
    ],
)
def test_packed_archives_are_named_after_their_split(split, name):
    assert scripts.pack_dataset.packed_name(split) == name


# --- Held-out images


@pytest.mark.parametrize(
    ("per_class", "fraction", "held_out"), [(10, 0.1, 1), (10, 0.25, 3), (10, 0.01, 1), (2, 0.9, 1), (7, 0.5, 4), (20, 0.9, 18)]
)
def test_every_class_is_divided_in_the_same_proportion_and_each_image_is_in_one_split(
    per_class, fraction, held_out, create_cfg, tmp_path
):
    write_folder(tmp_path / "train", per_class=per_class)
    indices = build_indices(create_cfg("DATA.VAL_FRACTION", fraction), ("train", "val"))
    assert np.bincount(indices["val"].labels).tolist() == [held_out] * 3
    assert keys(indices["train"]) | keys(indices["val"]) == expected(0, per_class)
    assert len(indices["train"]) + len(indices["val"]) == 3 * per_class
    assert keys(build_index(create_cfg("DATA.VAL_FRACTION", fraction), "val")) == keys(indices["val"])


def test_the_same_images_are_held_out_in_every_layout_and_for_every_seed(create_cfg, tmp_path):
    write_folder(tmp_path / "train", per_class=20)
    write_shards(tmp_path / "photos-*.tar", per_class=20, shards=3)
    write_zip(tmp_path / "train.zip", per_class=20)
    write_folder(tmp_path / "flat", per_class=20)
    run_script(scripts.pack_dataset, [tmp_path, tmp_path / "packed", "--splits", "train"], tmp_path / "log")
    fraction = ["DATA.VAL_FRACTION", 0.2]
    configs = [
        create_cfg(*fraction),
        create_cfg(*fraction, "DATA.TRAIN_SPLIT", "photos-*.tar"),
        create_cfg(*fraction, "DATA.ZIP_MODE", True),
        create_cfg(*fraction, root=tmp_path / "flat"),  # class directories without a split
        create_cfg(*fraction, root=tmp_path / "packed"),
        create_cfg(*fraction, "SEED", 1),
    ]
    chosen = [keys(build_index(cfg, "val")) for cfg in configs]
    assert len(chosen[0]) == 12
    assert all(images == chosen[0] for images in chosen)


@pytest.mark.parametrize("layout", ["folder", "tar", "zip"])
def test_held_out_images_have_the_content_of_their_files(layout, create_cfg, tmp_path):
    write_folder(tmp_path / "train", per_class=5)
    write_shards(tmp_path / "tar/train-*.tar", per_class=5)
    write_zip(tmp_path / "train.zip", per_class=5)
    root = tmp_path / "tar" if layout == "tar" else tmp_path
    datasets = build_datasets(create_cfg("DATA.VAL_FRACTION", 0.5, "DATA.ZIP_MODE", layout == "zip", root=root), training=True)
    contents = {name: data for _, name, data in images(0, 5)}
    for dataset in (datasets.train, datasets.val):
        for position in range(len(dataset)):
            assert dataset.read(position) == contents[dataset.index.name(position).rpartition("/")[2]]


def test_unnamed_images_are_held_out_from_all_shards_and_not_from_their_beginning():
    names = [f"train-{shard}.parquet/{row:05d}" for shard in range(4) for row in range(100)]
    held_out = hold_out(create_index(Path("data"), ["one"], names, [0] * 400), 0.5)["val"]
    assert len(held_out) == 200
    counts = np.histogram(held_out, bins=8, range=(0, 400))[0]
    assert counts.min() > 10
    assert counts.max() < 40
    assert len(set(held_out % 100)) > 60  # not the same rows of each shard


def test_a_class_of_one_image_cannot_be_divided(create_cfg, tmp_path):
    write_folder(tmp_path / "train", per_class=3)
    (tmp_path / "train/owl").mkdir()
    (tmp_path / "train/owl/1.png").write_bytes(image_bytes(9))
    with pytest.raises(DataError, match="class owl has only one image, but DATA"):
        build_index(create_cfg("DATA.VAL_FRACTION", 0.1), "train")


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_held_out_images_besides_a_validation_split_need_a_decision(name, create_cfg, tmp_path):
    write_folder(tmp_path / "train", 0, per_class=10)
    write_folder(tmp_path / name, 1)
    with pytest.raises(DataError, match=f"there is {tmp_path / name}: add") as error:
        build_index(create_cfg("DATA.VAL_FRACTION", 0.1), "val")
    remedies = re.findall(r"--opts (\S+ \S+?)[\s,]", str(error.value))
    assert len(remedies) == 2
    chosen = [keys(build_index(create_cfg("DATA.VAL_FRACTION", 0.1, *remedy.split()), "val")) for remedy in remedies]
    assert chosen[0] == expected(1)
    assert len(chosen[1] & expected(0, 10)) == 3
    with pytest.raises(ConfigError, match="conflicts with DATA"):
        create_cfg("DATA.VAL_FRACTION", 0.1, "DATA.VAL_SPLIT", name)


def test_a_test_split_does_not_prevent_held_out_images(create_cfg, tmp_path):
    write_folder(tmp_path / "train", 0)
    write_folder(tmp_path / "test", 1)
    assert len(keys(build_index(create_cfg("DATA.VAL_FRACTION", 0.3), "val")) & expected(0)) == 3


@pytest.mark.parametrize("split", ["train", "val"])
def test_the_remedy_for_class_directories_without_a_split_trains_and_evaluates(split, create_cfg, tmp_path):
    write_folder(tmp_path)
    with pytest.raises(DataError) as error:
        build_index(create_cfg(), split)
    opts = obey(str(error.value))
    assert opts == ["DATA.VAL_FRACTION", "0.1"]
    assert len(build_index(create_cfg(*opts), "train")) == 9
    assert len(build_index(create_cfg("DATA.VAL_SPLIT", "."), "val")) == 12


@pytest.mark.parametrize("name", ["", "val", "validation", "test"])
def test_the_remedy_for_missing_validation_images_can_hold_out_training_images(name, create_cfg, tmp_path):
    write_folder(tmp_path / "train", per_class=10)
    if name:  # a directory of images without class directories
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(image_bytes(1))
    with pytest.raises(DataError) as error:
        build_index(create_cfg(), "val")
    remedy = str(error.value).partition("add --opts ")[2].split()
    assert len(build_index(create_cfg(*remedy), "val")) == 3


# --- Whole runs


def train_killed_and_resumed(arguments: list, output: Path) -> Path:
    """Kill a run between two updates, resume it, and check that it ends bit-equal to a run that was not interrupted."""
    folders = [output / name / "toy/default" for name in ("whole", "killed")]
    commands = [[*map(str, arguments), "SAVE_STEPS", "2", "OUTPUT", str(folder.parents[1])] for folder in folders]
    whole = run_main(commands[0], output / "log")
    assert whole.exit_codes == [0], whole.output
    killed = run_main(commands[1], output / "log", kill_when=lambda: newest_update(folders[1]) >= 4)
    assert killed.exit_codes == [-9]
    resumed = run_main(commands[1], output / "log")
    assert resumed.exit_codes == [0], resumed.output
    assert "resumed after update" in resumed.output
    assert_equal(read_state(folders[1]), read_state(folders[0]))
    return folders[1]


def evaluate_run(folder: Path, *arguments) -> tuple[tuple[int, int], str]:
    """Numbers of correct predictions and of images of an evaluation, and its output."""
    outcome = run_main(["--eval", "--resume", str(folder), *map(str, arguments)], folder / "log")
    assert outcome.exit_codes == [0], outcome.output
    record = json.loads((folder / "eval.json").read_text())
    result = record["results"][record["preferred"]]
    return (result["correct1"], result["num_images"]), outcome.output


def test_a_run_on_the_shards_of_the_hub_resumes_bit_equal_and_evaluates_like_directories(toy_config, tmp_path):
    data, folders = tmp_path / "hub", tmp_path / "folders"
    write_shards(data / "imagenet1k-train-*.tar", 0, per_class=20, shards=3)
    write_shards(data / "imagenet1k-validation-*.tar", 1, per_class=10)
    write_folder(folders / "validation", 1, per_class=10)
    for number, name in enumerate(CLASSES):  # without classes.txt, shards have class ids, but no names
        (folders / "validation" / name).rename(folders / "validation" / str(number))
    options = ["DATA.NUM_WORKERS", 1, "TRAIN.EPOCHS", 1]
    run = train_killed_and_resumed(["--cfg", toy_config, "--data-path", data, "--opts", *options], tmp_path)
    counts, _ = evaluate_run(run, "--data-path", data)
    assert counts == evaluate_run(run, "--data-path", folders)[0]
    assert counts[1] == 30


def test_a_run_with_held_out_images_resumes_and_evaluates_on_the_same_images(toy_config, tmp_path, caplog):
    caplog.set_level("INFO")
    data = tmp_path / "photos"
    write_folder(data, per_class=20)
    options = ["DATA.NUM_WORKERS", 1, "TRAIN.EPOCHS", 1, "DATA.VAL_FRACTION", 0.25]
    arguments = ["--cfg", toy_config, "--data-path", data, "--opts", *options]
    run = train_killed_and_resumed(arguments, tmp_path)
    best = read_checkpoint(run / "best.pth")
    (correct, num_images), output = evaluate_run(run, "--data-path", data)
    assert num_images == best["data"]["val"]["num_images"] == 15
    assert 100 * correct / num_images == pytest.approx(best["best"]["acc1"])
    assert "generalisation" not in output
    write_folder(tmp_path / "test", 1)
    checkpoint = open_checkpoint(run / "best.pth")
    for opts, level in (
        (["DATA.VAL_FRACTION", 0.25], None),
        (["DATA.VAL_FRACTION", 0.5], "WARNING"),
        (["DATA.VAL_FRACTION", 0, "DATA.VAL_SPLIT", "."], "WARNING"),
        (["DATA.VAL_FRACTION", 0, "DATA.VAL_SPLIT", str(tmp_path / "test")], "INFO"),
    ):
        caplog.clear()
        cfg = load_config(toy_config, ["DATA.DATA_PATH", str(data), *opts])
        warn_about_held_out(checkpoint, cfg, build_index(cfg, "val"))
        levels = [record.levelname for record in caplog.records if "does not measure generalisation" in record.message]
        assert levels == [level] * (level is not None)
    run_script(scripts.pack_dataset, [data, tmp_path / "packed", "--splits", "."], tmp_path / "log")
    for split in (data, tmp_path / "packed"):  # copies in another layout hold out the same images
        cfg = load_config(toy_config, ["DATA.DATA_PATH", str(split), "DATA.VAL_FRACTION", 0.25])
        caplog.clear()
        warn_about_held_out(checkpoint, cfg, build_index(cfg, "val"))
        assert "generalisation" not in caplog.text
    cfg = load_config(toy_config, ["DATA.DATA_PATH", str(tmp_path / "test"), "DATA.VAL_FRACTION", 0.25])
    write_folder(tmp_path / "test", 4)
    warn_about_held_out(checkpoint, cfg, build_index(cfg, "val"))
    assert "other images than in training are held out by DATA.VAL_FRACTION: class cat had" in caplog.text
    assert "to evaluate all images, add --opts DATA.VAL_FRACTION 0 DATA.VAL_SPLIT ." in caplog.text
    del checkpoint.state["data"]["val"]["held_out"]  # as in checkpoints of earlier versions
    warn_about_held_out(checkpoint, cfg, build_index(cfg, "val"))
    assert "(also if the images were only packed)" in caplog.text
    refused = run_main([*map(str, arguments), "DATA.VAL_FRACTION", "0.5", "OUTPUT", str(run.parents[1])], tmp_path / "log")
    assert refused.exit_codes == [2]
    assert "Add --opts DATA.VAL_FRACTION 0.25" in refused.output


def test_an_evaluation_of_training_images_or_of_another_split_than_in_training_is_warned_about(create_cfg, tmp_path, caplog):
    write_folder(tmp_path / "train", 0)
    write_folder(tmp_path / "val", 1)
    write_folder(tmp_path / "holdout", 2)
    in_training = create_cfg("DATA.VAL_SPLIT", "holdout")
    data = {split: describe_index(build_index(in_training, split)) for split in ("train", "val")}
    checkpoint = Checkpoint(Location(tmp_path / "best.pth"), {"config": to_dict(in_training), "data": data}, "", ())
    for opts, warning in (
        (["DATA.VAL_SPLIT", "train"], f"was trained on the images of {tmp_path}/train: the accuracy does not measure"),
        ([], "training evaluated the split holdout, .*; to evaluate the same images, add --opts DATA.VAL_SPLIT holdout"),
        (["DATA.VAL_SPLIT", "holdout"], ""),
        (["DATA.VAL_SPLIT", "val"], ""),
    ):
        caplog.clear()
        cfg = create_cfg(*opts)
        warn_about_split(checkpoint, cfg, build_index(cfg, "val"))
        assert len(caplog.records) == bool(warning)
        assert re.search(warning, caplog.text)


def test_the_error_for_the_directory_of_one_class_names_the_directory_above(tmp_path):
    write_folder(tmp_path)
    folder = tmp_path / CLASSES[0]
    above = rf"{CLASSES[0]} contains .*set --data-path {re.escape(str(tmp_path))}; "
    with pytest.raises(DataError, match=f"{above}otherwise, put every image into a directory named after its class"):
        find_split(folder, "train", option="--opts DATA.TRAIN_SPLIT")
    with pytest.raises(DataError, match=f"{above}images without classes are classified by python scripts/predict.py {folder}"):
        find_split(folder, "val", option="--opts DATA.VAL_SPLIT")
