"""Class order: one function compares the class ids of data and weights, for evaluation, --pretrained and averaging.

Truths are the brightness of the images, by which each class is known, and hand-made logits.
"""

import csv
import json
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import nn

from data.build import build_datasets
from data.classes import ClassMatch, check_classes, compare_classes, predictable_classes
from engine.evaluation import evaluate
from jobs.locate_checkpoint import Location, open_checkpoint
from jobs.model import load_pretrained
from models import build_model
from models.checkpoints.released import RELEASED
from scripts import average_checkpoints, export, predict
from scripts.compare_evals import check_same_restriction
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
        (AS_TEXT, AS_NUMBERS, ClassMatch.AMBIGUOUS),  # directories against an archive without names
        (AS_NUMBERS, AS_TEXT, ClassMatch.AMBIGUOUS),
        (AS_TEXT, [], ClassMatch.AMBIGUOUS),  # a bare state dict: both orders are plausible
        ([str(number) for number in range(1, 13)], [], ClassMatch.UNVERIFIED),
        (sorted(str(number) for number in range(1, 13)), [], ClassMatch.AMBIGUOUS),
        ([f"class_{name}" for name in AS_TEXT], [], ClassMatch.AMBIGUOUS),
        ([f"class_{name}" for name in AS_TEXT], AS_NUMBERS, ClassMatch.AMBIGUOUS),
        (AS_NUMBERS, [f"class_{name}" for name in AS_TEXT], ClassMatch.AMBIGUOUS),
        ([f"class_{name}" for name in AS_TEXT], [f"class_{name}" for name in AS_NUMBERS], ClassMatch.REORDERED),
        ([f"{number:02d}" for number in range(12)], [], ClassMatch.UNVERIFIED),  # both orders are the same
        (AS_NUMBERS, [], ClassMatch.UNVERIFIED),
        (AS_NUMBERS, NAMED, ClassMatch.UNVERIFIED),
        (NAMED, AS_NUMBERS, ClassMatch.UNVERIFIED),
        (AS_TEXT, NAMED, ClassMatch.AMBIGUOUS),
        (NAMED, AS_TEXT, ClassMatch.DIFFERENT),
        (NAMED[:-1], NAMED, ClassMatch.DIFFERENT),
        ([*NAMED[:-1], "other"], NAMED, ClassMatch.DIFFERENT),
        (WORDNET, [], ClassMatch.EQUAL),
        (WORDNET[::-1], WORDNET, ClassMatch.REORDERED),
        (sorted(str(number) for number in range(1000)), WORDNET, ClassMatch.AMBIGUOUS),
        (WORDNET[:125], [], ClassMatch.UNVERIFIED),
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
    assert "add --opts TEST.CLASS_MAP names" in outcome.output
    assert count_correct(evaluate(numbered_data / "folders", "TEST.CLASS_MAP", "names"), folder) == expected


@pytest.mark.parametrize("flag", ["--pretrained", "--resume"])
def test_training_on_numbered_directories_from_a_run_on_numbered_archives_is_refused(
    flag, trained_on_shards, numbered_data, toy_config, tmp_path
):
    arguments = toy_arguments(
        toy_config, numbered_data / "folders", tmp_path, "MODEL.NUM_CLASSES", NUM_CLASSES, "TRAIN.EPOCHS", 2
    )
    outcome = run_main([*arguments, flag, trained_on_shards], tmp_path / "log")
    assert outcome.exit_codes == [2], outcome.output
    assert not (tmp_path / "toy").exists()
    if flag == "--resume":
        assert "the data have changed since it was saved" in outcome.output
    else:
        assert "class 2 is '10' in the data, but '2' in the checkpoint" in outcome.output
        outcome = run_main([*arguments, "TEST.CLASS_MAP", "names", flag, trained_on_shards, "--check"], tmp_path / "log")
        assert outcome.exit_codes == [0], outcome.output


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


def write_pretrained(path, cfg, names):
    """Write a checkpoint whose head has the class id as bias of each row."""
    torch.manual_seed(0)
    stored = build_model(cfg)
    stored.head.bias.data = torch.arange(float(cfg.MODEL.NUM_CLASSES))
    torch.save({"model": stored.state_dict(), "class_names": names}, path)
    return path


def test_a_pretrained_head_is_matched_by_name_if_the_names_are_no_numbers(toy_config, tmp_path, caplog):
    cfg = load_config(toy_config, ["MODEL.NUM_CLASSES", NUM_CLASSES])
    path = write_pretrained(tmp_path / "pretrained.pth", cfg, NAMED)
    model = build_model(cfg)
    load_pretrained(model, str(path), NAMED[::-1], cfg, CPU_WORLD)
    assert model.head.bias.tolist() == list(range(NUM_CLASSES))[::-1]
    assert "matched with the classes by name" in caplog.text
    load_pretrained(model, str(path), [f"other {name}" for name in NAMED], cfg, CPU_WORLD)
    assert model.head.bias.tolist() == list(range(NUM_CLASSES))
    assert "trained with other classes" in caplog.text


@pytest.mark.parametrize("names", [AS_NUMBERS, None, NAMED], ids=["numbers", "unknown", "other classes"])
def test_a_pretrained_head_is_refused_for_numbered_classes_until_a_class_map_gives_their_order(names, toy_config, tmp_path):
    (tmp_path / "map.txt").write_text("".join(f"{name} {number}\n" for number, name in enumerate(AS_TEXT)))
    by_option = {
        class_map: load_config(toy_config, ["MODEL.NUM_CLASSES", NUM_CLASSES, "TEST.CLASS_MAP", class_map])
        for class_map in ("", "names", str(tmp_path / "map.txt"))
    }
    model = build_model(by_option[""])
    path = str(write_pretrained(tmp_path / "pretrained.pth", by_option[""], names))
    with pytest.raises(ValueError, match=r"class 2 is '10'.*add --opts TEST\.CLASS_MAP names"):
        load_pretrained(model, path, AS_TEXT, by_option[""], CPU_WORLD)
    load_pretrained(model, path, AS_TEXT, by_option["names"], CPU_WORLD)
    assert model.head.bias.tolist() == [int(name) for name in AS_TEXT]
    load_pretrained(model, path, AS_TEXT, by_option[str(tmp_path / "map.txt")], CPU_WORLD)
    assert model.head.bias.tolist() == list(range(NUM_CLASSES))


def test_released_weights_are_refused_for_numbered_classes_and_matched_by_wordnet_id(toy_config, tmp_path):
    """1000 directories named by class id are sorted as text: 0, 1, 10, 100, ..."""
    cfg = load_config(toy_config, ["MODEL.NUM_CLASSES", 1000])
    model, numbers = build_model(cfg), sorted(map(str, range(1000)))
    path = str(write_pretrained(tmp_path / "released.pth", cfg, None))
    load = partial(load_pretrained, model, path, world=CPU_WORLD, released=RELEASED["flatten_swin_t"])
    with pytest.raises(
        ValueError, match=r"class 2 is '10'.*named by its class id in the model, add --opts TEST\.CLASS_MAP names"
    ):
        load(classes=numbers, cfg=cfg)
    load(classes=numbers, cfg=load_config(toy_config, ["MODEL.NUM_CLASSES", 1000, "TEST.CLASS_MAP", "names"]))
    assert model.head.bias[:4].tolist() == [0, 1, 10, 100]
    load(classes=WORDNET[::-1], cfg=cfg)
    assert model.head.bias[:4].tolist() == [999, 998, 997, 996]


def save(path, cfg, names):
    torch.manual_seed(1)
    state = {"model": build_model(cfg).state_dict(), "config": to_dict(cfg)}
    torch.save(state | ({"class_names": names} if names else {}), path)
    return path


def test_averaging_export_and_prediction_follow_the_class_order_of_the_checkpoints(toy_config, tmp_path):
    cfg = load_config(toy_config, ["MODEL.NUM_CLASSES", NUM_CLASSES])
    files = {
        name: save(tmp_path / f"{name}.pth", cfg, names)
        for name, names in {"text": AS_TEXT, "numbers": AS_NUMBERS, "none": None, "named": NAMED, "short": NAMED[:3]}.items()
    }

    def run_average(*names):
        arguments = [*(files[name] for name in names), "--output", tmp_path / "-".join(names)]
        return run_script(average_checkpoints, arguments, tmp_path / "log")

    for names in (("text", "numbers"), ("none", "text"), ("text", "none"), ("none", "numbers", "text")):
        outcome = run_average(*names)
        assert outcome.exit_codes == [2]
        assert "has different classes than" in outcome.output
        assert "class 2 is " in outcome.output
    for names in (("none", "named"), ("named", "none")):
        outcome = run_average(*names)
        assert outcome.exit_codes == [0], outcome.output
        assert f"{files['none']} has no class names" in outcome.output
        assert open_checkpoint(tmp_path / "-".join(names)).class_names == tuple(NAMED)
    assert run_script(export, [files["text"], tmp_path / "exported"], tmp_path / "log").exit_codes == [0]
    assert json.loads((tmp_path / "exported/config.json").read_text())["label_names"] == AS_TEXT
    assert run_script(export, [files["none"], tmp_path / "unnamed"], tmp_path / "log").exit_codes == [0]
    assert "label_names" not in json.loads((tmp_path / "unnamed/config.json").read_text())
    assert "The checkpoint has no class names" in (tmp_path / "unnamed/README.md").read_text()
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


def evaluate_fixed_logits(logits, classes, class_ids):
    """Evaluate a model that has the same logits for every image, on one image of each of ``classes``, the data's class ids."""
    model = nn.Linear(1, len(logits))
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.tensor(logits))
    count = len(classes)
    batch = SimpleNamespace(images=torch.zeros(count, 1), targets=torch.tensor(classes), indices=list(range(count)))
    options = {"amp_dtype": torch.float32, "world": CPU_WORLD, "keep_predictions": True}
    return evaluate({"raw": model}, [batch], class_ids=class_ids, **options)["raw"]


def test_predictions_on_a_part_of_the_classes_are_restricted_or_not():
    """Model classes by logit: 6, 0, 3, 5, 4, 2, 1. The data's classes 0, 1 and 2 are the model's 5, 3 and 1."""
    logits, mapped = [7.0, 0.0, 1.0, 6.0, 4.0, 5.0, 9.0], [5, 3, 1]
    class_ids, description = predictable_classes(mapped, 7, restrict=True)
    assert (class_ids, description) == (mapped, "predictions restricted to 3 of 7 classes")
    restricted = evaluate_fixed_logits(logits, [0, 1, 1, 2], class_ids)
    assert (restricted.correct1, restricted.correct5) == (2, 4)
    assert restricted.predictions.model_classes.tolist() == [3] * 4
    class_ids, description = predictable_classes(mapped, 7, restrict=False)
    assert description == "images of 3 of 7 classes, predictions not restricted"
    everything = evaluate_fixed_logits(logits, [0, 1, 1, 2], class_ids)
    assert (everything.correct1, everything.correct5) == (0, 3)
    assert everything.predictions.model_classes.tolist() == [6] * 4
    log_softmax = torch.tensor(logits).log_softmax(0)
    assert everything.loss == pytest.approx(-log_softmax[[5, 3, 3, 1]].mean().item(), rel=1e-5)
    assert predictable_classes([2, 0, 1], 3, restrict=True) == ([2, 0, 1], "")


def test_an_evaluation_on_a_part_of_the_classes_says_whether_predictions_are_restricted(trained, toy_data, tmp_path):
    """The unrestricted counts are those of the same images in an evaluation on all classes."""

    def evaluate_on(data, name, *opts):
        arguments = ["--eval", "--resume", trained, "--data-path", data, "--output", tmp_path / name, "--tag", "x"]
        options = ["--opts", "TEST.PREDICTIONS", "True", "MODEL.NAME", "toy", *opts]
        outcome = run_main([*arguments, *options], tmp_path / "log")
        return outcome, tmp_path / name / "toy/x"

    def rows(folder):
        return list(csv.DictReader((folder / "predictions_raw.csv").read_text().splitlines()))

    outcome, complete = evaluate_on(toy_data, "complete")
    assert outcome.exit_codes == [0], outcome.output
    assert json.loads((complete / "eval.json").read_text())["restriction"] is None
    assert "restriction" not in rows(complete)[0]
    for name in ("class0", "class2"):
        (tmp_path / "part/val").mkdir(parents=True, exist_ok=True)
        (tmp_path / "part/val" / name).symlink_to(toy_data / "val" / name)
    outcome, _ = evaluate_on(tmp_path / "part", "refused")
    assert outcome.exit_codes == [2]
    assert "contains 2 classes, but the model has 3" in outcome.output
    assert "If classes with the same name are the same, add --opts TEST.CLASS_MAP names" in outcome.output

    for restrict, text in (("True", "predictions restricted to 2 of 3 classes"), ("False", "predictions not restricted")):
        outcome, part = evaluate_on(tmp_path / "part", restrict, "TEST.CLASS_MAP", "names", "TEST.RESTRICT_CLASSES", restrict)
        assert outcome.exit_codes == [0], outcome.output
        assert outcome.output.strip().splitlines()[-1].endswith(f"{text})")
        record = json.loads((part / "eval.json").read_text())
        assert text in record["restriction"]
        assert text in rows(part)[0]["restriction"]
        assert {row["class"] for row in csv.DictReader((part / "eval_classes.csv").read_text().splitlines())} == {
            "class0",
            "class2",
        }
    expected = {row["image"]: row["prediction"] for row in rows(complete) if row["target"] != "class1"}
    assert {row["image"]: row["prediction"] for row in rows(part)} == expected
    correct = sum(row["prediction"] == row["target"] for row in rows(complete) if row["target"] != "class1")
    assert record["results"]["raw"]["correct1"] == correct
    with pytest.raises(ValueError, match=r"restricted to 2 of 3 classes.*not restricted.*TEST\.RESTRICT_CLASSES"):
        check_same_restriction(*(tmp_path / name / "toy/x/predictions_raw.csv" for name in ("True", "False")))
