"""Class order: one function compares the class ids of data and weights, for evaluation, --pretrained and averaging."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

from data.build import build_datasets
from data.classes import ClassMatch, check_classes, compare_classes
from jobs.locate_checkpoint import Location, open_checkpoint
from jobs.model import load_pretrained
from models import build_model
from models.checkpoints.released import RELEASED
from scripts import average_checkpoints, export, predict
from tests.launch import run_main, run_script
from tests.runs import toy_arguments
from utils.config.loading import load_config, to_dict
from utils.distributed import World

NUM_CLASSES = 12
AS_NUMBERS = [str(number) for number in range(NUM_CLASSES)]
AS_TEXT = ["0", "1", "10", "11", "2", "3", "4", "5", "6", "7", "8", "9"]
NAMED = [f"class {letter}" for letter in "abcdefghijkl"]
WORDNET = ImageNetInfo().label_names()
CPU_WORLD = World(0, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("names", "model_classes", "match"),
    [
        (NAMED, NAMED, ClassMatch.EQUAL),
        (AS_TEXT, AS_TEXT, ClassMatch.EQUAL),
        (NAMED[::-1], NAMED, ClassMatch.REORDERED),
        (AS_TEXT, AS_NUMBERS, ClassMatch.REORDERED),  # directories against an archive without names
        (AS_NUMBERS, AS_TEXT, ClassMatch.REORDERED),
        (AS_TEXT, [], ClassMatch.REORDERED),  # a bare state dict: both orders are plausible
        ([str(number) for number in range(1, 13)], [], ClassMatch.UNVERIFIED),
        (sorted(str(number) for number in range(1, 13)), [], ClassMatch.REORDERED),
        ([f"{number:02d}" for number in range(12)], [], ClassMatch.UNVERIFIED),  # both orders are the same
        (AS_NUMBERS, [], ClassMatch.UNVERIFIED),
        (AS_NUMBERS, NAMED, ClassMatch.UNVERIFIED),
        (NAMED, AS_NUMBERS, ClassMatch.UNVERIFIED),
        (AS_TEXT, NAMED, ClassMatch.DIFFERENT),
        (NAMED, AS_TEXT, ClassMatch.DIFFERENT),
        (NAMED[:-1], NAMED, ClassMatch.DIFFERENT),
        ([*NAMED[:-1], "other"], NAMED, ClassMatch.DIFFERENT),
        (WORDNET, [], ClassMatch.EQUAL),
        (WORDNET[::-1], WORDNET, ClassMatch.REORDERED),
        (sorted(str(number) for number in range(1000)), WORDNET, ClassMatch.DIFFERENT),
        ([str(number) for number in range(1000)], WORDNET, ClassMatch.UNVERIFIED),
    ],
)
def test_class_lists_are_equal_reordered_different_or_cannot_be_verified(names, model_classes, match):
    found, difference = compare_classes(names, model_classes)
    assert found is match
    assert bool(difference) == (match is not ClassMatch.EQUAL)


def test_class_names_that_differ_only_in_unicode_normalisation_are_reported_as_such():
    composed, decomposed = "caf\N{LATIN SMALL LETTER E WITH ACUTE}", "cafe\N{COMBINING ACUTE ACCENT}"
    with pytest.raises(ValueError, match="differ only in Unicode normalisation"):
        check_classes([composed, "tea"], [decomposed, "tea"], 2, "root")
    assert "Unicode normalisation" in compare_classes([composed, "tea"], [decomposed, "tea"])[1]


def write_grey(root, names, *, start=0):
    """Write two images per class; the class with number n, by its name, has brightness 20 * n."""
    for name in names:
        for number in range(2):
            (root / name).mkdir(parents=True, exist_ok=True)
            pixels = np.full((40, 40, 3), 20 * int(name) + number, np.uint8)
            Image.fromarray(pixels).save(root / name / f"{start + number}.png")


def write_shard(root, split):
    """Write the images of ``root/<split>/<number>/`` as a tar shard whose class ids are the numbers."""
    import io
    import tarfile

    with tarfile.open(root / f"{split}-0.tar", "w") as archive:
        for path in sorted((root / "folders" / split).glob("*/*.png")):
            key = f"{path.parent.name}_{path.stem}"
            for name, data in ((f"{key}.png", path.read_bytes()), (f"{key}.cls", path.parent.name.encode())):
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))


@pytest.fixture(scope="module")
def numbered_data(tmp_path_factory):
    """Directory with the same images of 12 numbered classes as a tar shard, and in ``folders``."""
    root = tmp_path_factory.mktemp("numbered")
    for split in ("train", "val"):
        write_grey(root / "folders" / split, AS_NUMBERS, start=0 if split == "train" else 5)
        write_shard(root, split)
    return root


@pytest.fixture(scope="module")
def trained_on_shards(numbered_data, toy_config, tmp_path_factory):
    """Best checkpoint of a run on the tar shard."""
    output = tmp_path_factory.mktemp("shards")
    options = ["MODEL.NUM_CLASSES", NUM_CLASSES, "TRAIN.EPOCHS", 1, "DATA.NUM_WORKERS", 2]
    outcome = run_main(toy_arguments(toy_config, numbered_data, output, *options), output / "log")
    assert outcome.exit_codes == [0], outcome.output
    return output / "toy/default/best.pth"


def count_correct(outcome, folder):
    assert outcome.exit_codes == [0], outcome.output
    results = json.loads((folder / "eval.json").read_text())["results"]
    return {label: (result["correct1"], result["num_images"]) for label, result in results.items()}


def test_numbered_directories_in_another_order_are_refused_and_the_printed_remedy_gives_the_right_counts(
    trained_on_shards, numbered_data, toy_config, tmp_path
):
    folder = tmp_path / "toy/default"

    def evaluate(data, *opts):
        arguments = ["--cfg", toy_config, "--eval", "--resume", trained_on_shards, "--data-path", data, "--output", tmp_path]
        options = ["--opts", "MODEL.NUM_CLASSES", NUM_CLASSES, *opts]
        return run_main([*arguments, *options], tmp_path / "log")

    expected = count_correct(evaluate(numbered_data), folder)
    outcome = evaluate(numbered_data / "folders")
    assert outcome.exit_codes == [2], outcome.output
    assert "class 2 is '10'" in outcome.output
    assert "TEST.CLASS_MAP" in outcome.output
    (tmp_path / "map.txt").write_text("".join(f"{number} {number}\n" for number in range(NUM_CLASSES)))
    assert count_correct(evaluate(numbered_data / "folders", "TEST.CLASS_MAP", tmp_path / "map.txt"), folder) == expected


def test_numbered_directories_are_refused_for_weights_without_class_names(numbered_data, toy_config):
    cfg = load_config(toy_config, ["DATA.DATA_PATH", str(numbered_data / "folders"), "MODEL.NUM_CLASSES", NUM_CLASSES])
    with pytest.raises(ValueError, match=r"class 2 is '10' if they are sorted as text.*TEST\.CLASS_MAP"):
        build_datasets(cfg, training=False, model_classes=[])


def test_a_class_map_that_contradicts_the_class_names_of_the_checkpoint_is_refused_or_named(
    numbered_data, toy_config, tmp_path, caplog
):
    """TEST.CLASS_MAP=imagenet takes numbers for class ids, so the weights must have this order of classes."""
    opts = ["DATA.DATA_PATH", str(numbered_data / "folders"), "MODEL.NUM_CLASSES", NUM_CLASSES, "TEST.CLASS_MAP"]
    cfg = load_config(toy_config, [*opts, "imagenet"])
    for model_classes in ([], AS_NUMBERS, NAMED):
        assert build_datasets(cfg, training=False, model_classes=model_classes).class_ids == [int(name) for name in AS_TEXT]
    with pytest.raises(ValueError, match=r"another order of classes: its class 2 is '10' instead of '2'.*one line per class"):
        build_datasets(cfg, training=False, model_classes=AS_TEXT)
    (tmp_path / "map.txt").write_text("".join(f"{name} {number}\n" for number, name in enumerate(AS_TEXT)))
    cfg = load_config(toy_config, [*opts, str(tmp_path / "map.txt")])
    assert build_datasets(cfg, training=False, model_classes=AS_TEXT).class_ids == list(range(NUM_CLASSES))
    assert "is mapped to" not in caplog.text
    build_datasets(cfg, training=False, model_classes=AS_NUMBERS)
    assert "class 10 is mapped to class id 2, but in the checkpoint, this class id is 2, and 10 has class id 10" in caplog.text


@pytest.mark.parametrize("names", [AS_NUMBERS, None, NAMED], ids=["same classes", "unknown", "other classes"])
def test_a_pretrained_head_is_matched_with_the_order_of_the_training_data(names, toy_config, tmp_path, caplog):
    cfg = load_config(toy_config, ["MODEL.NUM_CLASSES", NUM_CLASSES])
    torch.manual_seed(0)
    stored = build_model(cfg)
    stored.head.bias.data = torch.arange(float(NUM_CLASSES))  # the class id that each row was trained for
    torch.save({"model": stored.state_dict(), "class_names": names}, tmp_path / "pretrained.pth")
    model = build_model(cfg)
    load_pretrained(model, str(tmp_path / "pretrained.pth"), AS_TEXT, cfg, CPU_WORLD)
    order = [int(name) for name in AS_TEXT] if names == AS_NUMBERS else list(range(NUM_CLASSES))
    assert model.head.bias.tolist() == order
    assert torch.equal(model.head.weight, stored.head.weight[order])
    expected = "trained with other classes" if names == NAMED else "may have another order of classes"
    assert expected in caplog.text


def save(path, cfg, names):
    torch.manual_seed(1)
    state = {"model": build_model(cfg).state_dict(), "config": to_dict(cfg)}
    torch.save(state | ({"class_names": names} if names else {}), path)
    return path


def test_averaging_export_and_prediction_follow_the_class_order_of_the_checkpoints(toy_config, tmp_path):
    cfg = load_config(toy_config, ["MODEL.NUM_CLASSES", NUM_CLASSES])
    files = {
        name: save(tmp_path / f"{name}.pth", cfg, names)
        for name, names in {"text": AS_TEXT, "numbers": AS_NUMBERS, "none": None, "short": NAMED[:3]}.items()
    }

    def run_average(*names):
        arguments = [*(files[name] for name in names), "--output", tmp_path / "-".join(names)]
        return run_script(average_checkpoints, arguments, tmp_path / "log")

    outcome = run_average("text", "numbers")
    assert outcome.exit_codes == [2]
    assert "has different classes than" in outcome.output
    for names in (("none", "text"), ("text", "none")):
        outcome = run_average(*names)
        assert outcome.exit_codes == [0]
        assert f"{files['none']} has no class names" in outcome.output
        assert open_checkpoint(tmp_path / "-".join(names)).class_names == tuple(AS_TEXT)
    assert run_script(export, [files["text"], tmp_path / "exported"], tmp_path / "log").exit_codes == [0]
    assert json.loads((tmp_path / "exported/config.json").read_text())["label_names"] == AS_TEXT
    outcome = run_script(export, [files["short"], tmp_path / "other"], tmp_path / "log")
    assert outcome.exit_codes == [2]
    assert "has 3 class names, but 12 classes" in outcome.output
    Image.new("RGB", (40, 40)).save(tmp_path / "x.png")
    for name, classes in (("text", AS_TEXT), ("none", AS_NUMBERS)):
        arguments = [tmp_path / "x.png", "--resume", files[name], "--output", tmp_path / f"predicted {name}", "--top-k", 12]
        outcome = run_script(predict, arguments, tmp_path / "log")
        assert outcome.exit_codes == [0], outcome.output
        assert ("has no names for its 12 classes" in outcome.output) == (name == "none")
        (entry,) = json.loads((tmp_path / f"predicted {name}/predictions.json").read_text())["images"]
        assert all(row["class"] == classes[row["class_id"]] for row in entry["predictions"])


def test_released_weights_have_the_wordnet_ids_of_imagenet(tmp_path, monkeypatch):
    torch.save({"model": {}}, tmp_path / "released.pth")
    location = Location(tmp_path / "released.pth", RELEASED["flatten_swin_t"])
    monkeypatch.setattr("jobs.locate_checkpoint.locate", lambda reference: location)
    classes = open_checkpoint("flatten_swin_t").class_names
    assert (classes[0], classes[207], len(classes)) == ("n01440764", "n02099601", 1000)
