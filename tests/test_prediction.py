"""Predictions for images without labels, evaluation of several checkpoints, and averaged checkpoints."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from data.files import DataError
from engine.report import Caption
from jobs.averaging import average
from jobs.locate_checkpoint import Checkpoint, Location, open_checkpoint
from jobs.predict import class_names, find_images, true_class
from models import build_model
from models.checkpoints.reader import CheckpointError, read_checkpoint
from scripts import analyze_focus, average_checkpoints, benchmark, evaluate_all, export, predict, visualize_attention
from tests.launch import run_script
from utils.config.loading import load_config


@pytest.fixture
def images(toy_data, tmp_path):
    """Directory with three subdirectories of readable images, three unreadable image files, and a text file.

    Paths contain spaces, non-ASCII characters and ``$``, which starts a formula in matplotlib.
    """
    folder = tmp_path / "images"
    for label in range(3):
        (folder / f"class {label}").mkdir(parents=True)
        for index in range(3):
            shutil.copy(toy_data / f"val/class{label}/{index:03d}.png", folder / f"class {label}/$été{index}.png")
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.jpg").write_text("no image")
    content = (folder / "class 0/$été0.png").read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "notes.txt").write_text("not an image")
    return folder


def predict_by_hand(checkpoint, toy_config, path, *, flip=False):
    """Confidence and class id of the top-1 prediction; with ``flip``, of the mean logits of the image and its mirror image.

    Pillow resizes the image to 45 x 45 pixels (40 / 0.875, rounded down), and crops 40 x 40.
    """
    state = read_checkpoint(checkpoint)
    model = build_model(load_config(toy_config)).eval()
    model.load_state_dict(state["model" if state["best"]["weights"] == "raw" else "state_dict_ema"])
    with Image.open(path) as file:
        image = file.convert("RGB").resize((45, 45), Image.Resampling.BICUBIC).crop((2, 2, 42, 42))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(40, 40, 3).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    batch = ((pixels - mean[:, None, None]) / std[:, None, None])[None]
    batch = torch.cat([batch, batch.flip(3)]) if flip else batch
    with torch.no_grad():
        probabilities = model(batch).mean(dim=0).softmax(dim=0)
    return probabilities.max().item(), probabilities.argmax().item()


def test_predictions_equal_an_independent_computation_and_unreadable_images_are_listed(trained, toy_config, images, tmp_path):
    output = tmp_path / "out"
    outcome = run_script(predict, [images, "--resume", trained, "--output", output, "--batch-size", 4], tmp_path / "log")
    assert outcome.exit_codes == [1], outcome.output  # because of the unreadable images
    assert "9 of 12 images classified, 3 unreadable" in outcome.output
    assert "Traceback" not in outcome.output
    record = json.loads((output / "predictions.json").read_text())
    entries = {entry["image"]: entry for entry in record["images"]}
    assert list(entries) == [str(path) for path in sorted(images.rglob("*")) if path.suffix in (".png", ".jpg")]
    for name in ("empty.png", "text.jpg"):
        assert entries[str(images / name)]["error"] == "not an image of a known format"
    assert entries[str(images / "cut.png")]["error"]
    for path in (images / "class 0/$été0.png", images / "class 2/$été2.png"):
        confidence, class_id = predict_by_hand(trained, toy_config, path)
        top = entries[str(path)]["predictions"]
        assert (top[0]["class_id"], top[0]["class"]) == (class_id, f"class{class_id}")
        assert top[0]["confidence"] == pytest.approx(confidence, abs=1e-4)
        # The predictions include all three classes, so their confidences sum to 1.
        assert sum(entry["confidence"] for entry in top) == pytest.approx(1)
        assert [entry["confidence"] for entry in top] == sorted((entry["confidence"] for entry in top), reverse=True)
    assert record["weights"] == read_checkpoint(trained)["best"]["weights"]
    with open(output / "predictions.csv", newline="", encoding="utf-8") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    assert rows.keys() == entries.keys()
    for name, entry in entries.items():
        assert rows[name]["error"] == entry.get("error", "")
        if "predictions" in entry:
            assert rows[name]["class_2"] == entry["predictions"][1]["class"]
            assert float(rows[name]["confidence_1"]) == pytest.approx(entry["predictions"][0]["confidence"], abs=1e-4)
    with Image.open(output / "predictions.png") as picture:
        assert min(picture.size) > 300
    assert "the directory of the image is named" not in outcome.output  # they are named "class 0", not "class0"


def test_a_caption_has_the_file_name_and_shows_whether_the_prediction_is_correct():
    assert true_class(Path("photos/dog/1.png"), ["cat", "dog"]) == 1
    assert true_class(Path("photos/1.png"), ["cat", "dog"]) is None
    correct, wrong = Caption("a$.png", "dog: 90%", "dog", is_correct=True), Caption("x" * 40 + ".png", "dog: 90%", "cat")
    assert (correct.color, correct.lines()) == ("green", [r"a\$.png", "\N{CHECK MARK} dog: 90%"])
    assert (wrong.color, wrong.lines()[1:]) == ("red", ["\N{BALLOT X} dog: 90%", "directory: cat"])
    assert len(wrong.lines()[0]) <= 28
    assert wrong.lines()[0].endswith("x.png")
    assert Caption("a.png", "dog: 90%").color == "black"
    assert Caption("a.png", "dog: 90%").lines() == ["a.png", "dog: 90%"]
    lines = Caption("a.png", f"{'w' * 500}: 90%", "v" * 500).lines()  # a longer caption would cover the image above
    assert len(lines) <= 7
    assert "\N{HORIZONTAL ELLIPSIS}" in "".join(lines[1:4])
    assert "w: 90%" in " ".join(lines)


def test_predict_accepts_a_single_file_top_k_and_test_time_augmentation(trained, toy_config, toy_data, tmp_path):
    path = toy_data / "val/class1/001.png"
    arguments = [path, "--resume", trained.parent, "--output", tmp_path / "out", "--top-k", 1, "--workers", 1]
    outcome = run_script(predict, [*arguments, "--opts", "TEST.TTA", "flip"], tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    record = json.loads((tmp_path / "out/predictions.json").read_text())
    (entry,) = record["images"]
    assert entry["image"] == str(path)
    assert len(entry["predictions"]) == 1
    assert record["tta"] == "flip"
    confidence, class_id = predict_by_hand(trained, toy_config, path, flip=True)
    assert confidence != pytest.approx(predict_by_hand(trained, toy_config, path)[0], abs=1e-4)
    assert entry["predictions"][0]["class_id"] == class_id
    assert entry["predictions"][0]["confidence"] == pytest.approx(confidence, abs=1e-5)
    correct = int(entry["predictions"][0]["class"] == "class1")
    assert f"{correct} of 1 predictions are correct according to the directory names" in outcome.output


def test_directories_are_searched_by_suffix_and_explicit_files_may_have_any_suffix(images, tmp_path):
    assert len(find_images([images])) == 12
    assert find_images([images / "notes.txt"]) == [images / "notes.txt"]
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="has no images"):
        find_images([tmp_path / "none"])
    with pytest.raises(DataError, match="no such file or directory"):
        find_images([tmp_path / "gone"])


def create_checkpoint(tmp_path, *names):
    return Checkpoint(Location(tmp_path / "x.pth"), {}, "", names)


def test_class_names_come_from_the_checkpoint_or_imagenet_and_default_to_class_ids(tmp_path):
    assert class_names(create_checkpoint(tmp_path, "cat", "dog"), 2) == ["cat", "dog"]
    assert class_names(create_checkpoint(tmp_path, "n01440764", "other"), 2) == ["tench, Tinca tinca", "other"]
    imagenet = class_names(create_checkpoint(tmp_path), 1000)
    assert (imagenet[0], imagenet[207], len(imagenet)) == ("tench, Tinca tinca", "golden retriever", 1000)
    assert class_names(create_checkpoint(tmp_path), 3) == ["0", "1", "2"]
    assert class_names(create_checkpoint(tmp_path, "cat"), 3) == ["0", "1", "2"]  # a single name for 3 classes is ignored


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_evaluate_all_writes_a_table_of_checkpoints_sorted_by_accuracy(trained, toy_data, tmp_path):
    """Evaluate a trained model, random weights at another image size, averaged weights, and an unreadable file."""
    state = read_checkpoint(trained)
    torch.manual_seed(1)
    random_weights = {
        key: torch.randn_like(value) if value.is_floating_point() else value for key, value in state["model"].items()
    }
    config = json.loads(json.dumps(state["config"]))
    config["DATA"]["IMG_SIZE"], config["MODEL"]["NAME"] = 48, "other"
    size_independent = {key: value for key, value in random_weights.items() if "positional" not in key}
    model = build_model(load_config([], ["DATA.IMG_SIZE", 48, *model_options(config)]))
    resized = model.state_dict() | size_independent
    torch.save({"model": resized, "config": config, "class_names": state["class_names"]}, tmp_path / "other.pth")
    average_arguments = [trained, sorted(trained.parent.glob("checkpoint_*"))[-1], "--output", tmp_path / "mean.pth"]
    assert run_script(average_checkpoints, average_arguments, tmp_path / "log").exit_codes == [0]
    (tmp_path / "broken.pth").write_bytes(b"none")
    state["model"]["head.bias"][0] = float("nan")
    torch.save(state, tmp_path / "nan.pth")
    files = [tmp_path / "other.pth", trained.parent, tmp_path / "broken.pth", tmp_path / "nan.pth", tmp_path / "mean.pth"]
    arguments = [*files, "--data-path", toy_data, "--csv", tmp_path / "table.csv", "--batch-size", 2]
    outcome = run_script(evaluate_all, arguments, tmp_path / "log")
    assert outcome.exit_codes == [2]
    assert f"evaluate_all.py: error: {tmp_path / 'broken.pth'}" in outcome.output
    assert f"evaluate_all.py: error: {tmp_path / 'nan.pth'}: the raw weights give outputs that are not finite" in outcome.output
    assert "Traceback" not in outcome.output
    rows = read_csv(tmp_path / "table.csv")
    assert len(rows) == 3
    assert [float(row["acc1"]) for row in rows] == sorted((float(row["acc1"]) for row in rows), reverse=True)
    by_file = {row["checkpoint"]: row for row in rows}
    row = by_file[str(trained)]
    assert float(row["acc1"]) == pytest.approx(state["best"]["acc1"], abs=1e-3)
    assert (row["weights"], row["num_images"], row["crop_mode"]) == (state["best"]["weights"], "33", "squash")
    assert int(row["parameters"]) == sum(value.numel() for name, value in state["model"].items() if "index" not in name)
    assert float(row["images_per_second"]) > 0
    assert (by_file[str(tmp_path / "other.pth")]["img_size"], by_file[str(tmp_path / "other.pth")]["model"]) == ("48", "other")


def test_an_output_that_cannot_be_written_is_an_error_before_anything_is_computed(trained, images, toy_data, tmp_path):
    (tmp_path / "file").write_text("")
    missing = tmp_path / "missing/table"
    cases = {
        predict: [images, "--resume", trained, "--output", tmp_path / "file/predictions"],
        analyze_focus: ["--resume", trained, "--images", images, "--output", tmp_path / "file"],
        visualize_attention: ["--resume", trained, "--images", images, "--output", tmp_path / "file"],
        evaluate_all: [trained, "--data-path", toy_data, "--csv", missing],
        benchmark: ["model", "flatten_swin_t", "--json", missing],
    }
    for script, arguments in cases.items():
        outcome = run_script(script, arguments, tmp_path / "log")
        assert outcome.exit_codes == [2], outcome.output
        last = outcome.output.strip().splitlines()[-1]
        expected = "is a file; choose another --output" if "--output" in arguments else "choose a file in an existing"
        assert f"{script.__name__.split('.')[-1]}.py: error: " in last
        assert expected in last
        assert "entries loaded" not in outcome.output  # weights


@pytest.mark.parametrize(
    ("value", "message"), [(torch.nan, "1 of 3 values of head.bias"), (3e38, "outputs of the model are not finite")]
)
def test_weights_or_outputs_that_are_not_finite_are_an_error_and_nothing_is_written(
    trained, images, tmp_path, monkeypatch, capsys, value, message
):
    """The value 3e38 is finite, but the logits overflow."""
    state, damaged = read_checkpoint(trained), tmp_path / "damaged.pth"
    for weights in ("model", "state_dict_ema"):
        state[weights]["head.bias"][1] = value
        if value == 3e38:
            state[weights]["head.weight"].fill_(value)
    torch.save(state, damaged)
    commands = {
        predict: [images, "--resume", damaged, "--output", tmp_path / "out"],
        export: [damaged, tmp_path / "out"],
    }
    for script, arguments in commands.items():
        monkeypatch.setattr("sys.argv", [script.__name__, *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            script.main()
        assert ended.value.code == 2
        error = capsys.readouterr().err
        assert message in error
        assert str(damaged) in error or str(images) in error
        assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_weights_that_are_not_finite_cannot_be_averaged(trained, tmp_path):
    state = read_checkpoint(trained)
    state["model"]["norm.weight"][0] = torch.inf
    torch.save(state, tmp_path / "damaged.pth")
    with pytest.raises(CheckpointError, match=r"damaged\.pth: values of norm\.weight are not finite"):
        average([Location(trained), Location(tmp_path / "damaged.pth")], "raw")


def model_options(config):
    """Config overrides [KEY, VALUE, ...] that select the model of a stored config."""
    return [word for key in ("TYPE", "NUM_CLASSES") for word in (f"MODEL.{key}", config["MODEL"][key])] + [
        word
        for section in ("SWIN", "LA")
        for key, value in config["MODEL"][section].items()
        for word in (f"MODEL.{section}.{key}", value)
    ]


def test_averaging_keeps_config_and_classes_and_rejects_different_classes(trained, tmp_path):
    state = read_checkpoint(trained)
    torch.save(state | {"class_names": ["a", "b", "c"]}, tmp_path / "other.pth")
    arguments = [trained, tmp_path / "other.pth", "--output", tmp_path / "mean.pth"]
    outcome = run_script(average_checkpoints, arguments, tmp_path / "log")
    assert outcome.exit_codes == [2]
    assert "has different classes than" in outcome.output
    shutil.copy(trained, tmp_path / "copy.pth")
    arguments = [trained, tmp_path / "copy.pth", "--output", tmp_path / "mean.pth"]
    assert run_script(average_checkpoints, arguments, tmp_path / "log").exit_codes == [0]
    mean = open_checkpoint(tmp_path / "mean.pth")
    assert mean.class_names == tuple(state["class_names"])
    assert mean.state["config"] == state["config"]
