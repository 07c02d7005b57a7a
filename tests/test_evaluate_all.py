"""Evaluation of a model with ImageNet's 1000 classes on copies of ImageNet, -V2 and -A, against logits computed by hand."""

import csv
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

from jobs.export import describe_accuracy
from jobs.hub import Publication, card_header
from jobs.model import open_model
from models import build_model
from scripts import compare_evals, evaluate_all
from tests.launch import run_main, run_script
from utils.config.loading import load_config, to_dict
from utils.errors import ConfigError

NUM_IMAGES, SIZE = 60, 32
WORDNET_IDS = sorted(ImageNetInfo().label_names())  # ImageNet's class ids are positions in this order
CLASSES_OF_A = list(range(3, 1000, 5))  # ImageNet-A and -R have 200 classes


class Model(NamedTuple):
    """A checkpoint, images, and the logits (NUM_IMAGES, 1000) for these images and for their mirror images."""

    checkpoint: Path
    pixels: np.ndarray
    logits: np.ndarray
    mirrored: np.ndarray


@pytest.fixture(scope="module")
def model(toy_config, tmp_path_factory) -> Model:
    """The bias of the head is such that the mean of all logits is 0, so that the predictions of an untrained model differ."""
    shape = ["MODEL.SWIN.DEPTHS", [1, 1, 1], "MODEL.SWIN.NUM_HEADS", [1, 1, 1], "DATA.IMG_SIZE", SIZE]
    cfg = load_config(toy_config, ["MODEL.NUM_CLASSES", 1000, *shape])
    torch.manual_seed(0)
    network = build_model(cfg).eval()
    pixels = np.random.default_rng(0).integers(0, 256, (NUM_IMAGES, SIZE, SIZE, 3), dtype=np.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    head = network.get_classifier()
    with torch.no_grad():
        head.weight.normal_(std=100)
        head.bias.zero_()
        head.bias.copy_(-network(images).mean(dim=0))
        logits, mirrored = network(images), network(images.flip(3))
    path = tmp_path_factory.mktemp("imagenet") / "named.pth"
    contents = {"model": network.state_dict(), "config": to_dict(cfg)}
    torch.save(contents | {"class_names": WORDNET_IDS}, path)
    torch.save(contents, path.with_name("unnamed.pth"))
    return Model(path, pixels, logits.numpy(), mirrored.numpy())


def write_set(folder: Path, names: list[str], class_ids: list[int], pixels: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Write one image per class: one that is predicted as this class of ``class_ids``, if any. Returns their positions."""
    predicted = np.array(class_ids)[logits[:, class_ids].argmax(axis=1)].tolist()
    chosen = [predicted.index(class_id) if class_id in predicted else class_id % NUM_IMAGES for class_id in class_ids]
    files = [io.BytesIO() for _ in pixels]
    for file, image in zip(files, pixels, strict=True):
        Image.fromarray(image).save(file, "png")
    for name, position in zip(names, chosen, strict=True):
        (folder / name).mkdir(parents=True)
        (folder / name / "image.png").write_bytes(files[position].getvalue())
    return np.array(chosen)


def count_correct(logits: np.ndarray, class_ids: list[int], *, among: list[int]) -> int:
    """Number of rows whose largest logit among some classes is that of the row's class."""
    return int((np.array(among)[logits[:, among].argmax(axis=1)] == class_ids).sum())


def test_imagenet_and_its_variants_are_evaluated_in_one_table_with_their_own_classes(model, tmp_path):
    everything, numbers = list(range(1000)), [str(class_id) for class_id in range(1000)]
    classes = {"val": everything[::20], "v2": everything, "imagenet-a": CLASSES_OF_A}
    folders = {"val": "imagenet/val", "v2": "imagenetv2-matched-frequency-format-val", "imagenet-a": "imagenet-a"}
    images, correct = {}, {}
    for name, class_ids in classes.items():
        directories = numbers if name == "v2" else [WORDNET_IDS[class_id] for class_id in class_ids]
        images[name] = write_set(tmp_path / folders[name], directories, class_ids, model.pixels, model.logits)
        correct[name] = count_correct(model.logits[images[name]], class_ids, among=class_ids)
    (tmp_path / "imagenet-a/README.txt").write_text("text")
    as_text = [int(name) for name in sorted(numbers)]  # the wrong class ids, if sorted directories were numbered
    assert count_correct(model.logits[images["v2"]][as_text], everything, among=everything) < correct["v2"] / 2
    assert count_correct(model.logits[images["imagenet-a"]], CLASSES_OF_A, among=everything) < correct["imagenet-a"] / 2
    for name in ("one", "two"):
        (tmp_path / "other" / name).mkdir(parents=True)
        Image.fromarray(model.pixels[0]).save(tmp_path / "other" / name / "image.png")

    paths = [f"val={tmp_path}/imagenet", f"v2={tmp_path}/imagenetv2-matched-frequency-format-val"]
    paths += [f"{tmp_path}/other", f"{tmp_path}/imagenet-a"]
    checkpoints = [model.checkpoint.with_name("unnamed.pth"), model.checkpoint]
    arguments = [*checkpoints, *(word for path in paths for word in ("--data-path", path)), "--csv", tmp_path / "table.csv"]
    options = ["--batch-size", 2, "--opts", "TEST.CLASS_MAP", "imagenet", "DATA.NUM_WORKERS", 0, "DATA.BATCH_SIZE", 100]
    outcome = run_script(evaluate_all, [*arguments, *options], tmp_path / "log")
    assert outcome.exit_codes == [2], outcome.output
    for checkpoint in checkpoints:
        assert f"evaluate_all.py: error: {checkpoint} on other: TEST.CLASS_MAP=imagenet" in outcome.output
        assert outcome.output.count(f"{checkpoint}: raw weights, 59 entries loaded") == 1
    with open(tmp_path / "table.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["data_set"] for row in rows] == ["val", "val", "v2", "v2", "imagenet-a", "imagenet-a"]
    assert [int(row["correct1"]) for row in rows] == [count for count in correct.values() for _ in checkpoints]
    restrictions = [f"predictions restricted to {count} of 1000 classes" for count in (50, 200)]
    assert [row["restriction"] for row in rows] == [restrictions[0]] * 2 + [""] * 2 + [restrictions[1]] * 2
    cells = [f"{correct[name] / len(images[name]):.3%}".rstrip("%") for name in images]
    row = f"| 32 | {cells[0]} | {cells[1]} |  | {cells[2]} |"
    expected = [f"| `{checkpoint}` {row}" for checkpoint in checkpoints]
    assert "| top-1 accuracy in % | pixels | `val` | `v2` | `other` | `imagenet-a` |\n|---|" in outcome.output
    assert "\n".join([*expected, "", f"`val`: {restrictions[0]}", f"`imagenet-a`: {restrictions[1]}"]) in outcome.output


def test_predictions_with_flip_are_those_of_the_mean_logits_of_an_image_and_its_mirror_image(model, tmp_path):
    names = [WORDNET_IDS[class_id] for class_id in CLASSES_OF_A]
    mean = (model.logits + model.mirrored) / 2
    chosen = write_set(tmp_path / "imagenet-a", names, CLASSES_OF_A, model.pixels, mean)
    arguments = ["--eval", "--resume", model.checkpoint, "--data-path", tmp_path / "imagenet-a", "--output", tmp_path / "flip"]
    options = ["TEST.TTA", "flip", "TEST.PREDICTIONS", "True", "TEST.CLASS_MAP", "imagenet", "DATA.VAL_SPLIT", "."]
    outcome = run_main([*arguments, "--opts", *options, "DATA.NUM_WORKERS", 1], tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    restricted = torch.from_numpy(mean[chosen][:, CLASSES_OF_A])
    predicted = [names[position] for position in restricted.argmax(dim=1)]
    without = [names[position] for position in model.logits[chosen][:, CLASSES_OF_A].argmax(axis=1)]
    assert sum(one != other for one, other in zip(predicted, without, strict=True)) > 20
    record_path = next((tmp_path / "flip").rglob("eval.json"))
    with open(record_path.with_name("predictions_raw.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["target"] for row in rows] == names
    assert [row["prediction"] for row in rows] == predicted
    confidences = restricted.softmax(dim=1).amax(dim=1)
    torch.testing.assert_close(torch.tensor([float(row["confidence"]) for row in rows]), confidences, atol=1e-3, rtol=0)
    record = json.loads(record_path.read_text())
    assert record["tta"] == "flip"
    correct = count_correct(mean[chosen], CLASSES_OF_A, among=CLASSES_OF_A)
    assert record["results"]["raw"]["correct1"] == correct
    last = outcome.output.strip().splitlines()[-1]
    assert last.endswith("(predictions restricted to 200 of 1000 classes, mean of image and mirror image)")
    assert compare_evals.describe(record_path.with_name("predictions_raw.csv")).endswith(" (TEST.TTA flip)")
    assert "1000 classes, mean of image and mirror image, measured on" in describe_accuracy(record, "raw", 1000)
    header = card_header("name", Publication(), record, "raw", in_timm=True)
    assert "1000 classes, mean of image and mirror image" in " ".join(header.split())
    with pytest.raises(ConfigError, match=r"TEST\.TTA=flip has no effect on this command; add --opts TEST\.TTA none"):
        open_model(str(model.checkpoint), None, ["TEST.TTA", "flip"], weights="auto")


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (["{root}", "{root}/missing"], "missing: no such directory"),
        (["{root}/val", "{root}/a/val"], "another data set has the name val; give --data-path NAME={root}/a/val with a name"),
        (
            ["{root}/val", "{root}/b c/val"],
            "another data set has the name val; give --data-path 'NAME={root}/b c/val' with a name",
        ),
        ([""], "no such directory"),
    ],
)
def test_data_sets_must_exist_and_have_different_names(values, problem, tmp_path):
    for folder in ("val", "a/val", "b c/val", "a=b"):
        (tmp_path / folder).mkdir(parents=True)
    with pytest.raises(ValueError, match=problem.format(root=tmp_path)):
        evaluate_all.read_data_sets([value.format(root=tmp_path) for value in values])
    accepted = [str(tmp_path / "val"), f"other={tmp_path}/a/val", f"{tmp_path}/a=b"]
    assert list(evaluate_all.read_data_sets(accepted)) == ["val", "other", "a=b"]
