"""Evaluation: counts of correct predictions, checkpoints of the paper's code (the reference), class maps, and result files."""

import argparse
import csv
import json
import math
import sys
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import precision_recall_fscore_support
from torch import nn
from yacs.config import CfgNode

import engine.report
import jobs.evaluate
from data.samplers import EvalBatches
from engine.checkpoint_writer import save_checkpoint
from engine.evaluation import EvalResult, Predictions, evaluate
from engine.report import confusion_matrix, draw_confusion, write_evaluation
from engine.significance import mcnemar_test, paired_interval, wilson_interval
from jobs.averaging import average
from jobs.locate_checkpoint import Location
from models.checkpoints.reader import CheckpointError, read_checkpoint
from scripts import average_checkpoints
from scripts.compare_evals import compare, read
from tests.conftest import write_images
from tests.launch import run_in_processes, run_main
from utils.config.loading import load_config, to_dict
from utils.distributed import World

CPU_WORLD = World(0, 0, 1, torch.device("cpu"))


class Batch:
    def __init__(self, indices, images, targets):
        self.indices = indices
        self.images = images[indices]
        self.targets = targets[indices]


def create_data(num_images):
    generator = torch.Generator().manual_seed(num_images)
    images = torch.randn(num_images, 6, generator=generator)
    return images, torch.randint(0, 10, (num_images,), generator=generator)


def linear_model():
    torch.manual_seed(0)
    return nn.Linear(6, 10)


def evaluate_batches(world, num_images, batch_size):
    images, targets = create_data(num_images)
    batches = EvalBatches(num_images, batch_size, rank=world.rank, world_size=world.size)
    loader = [Batch([index for _, index in keys], images, targets) for keys in batches]
    return evaluate({"raw": linear_model()}, loader, amp_dtype=torch.float32, world=world, keep_predictions=True)["raw"]


def save_counts(world, folder):
    """Write a file per rank: counts, predictions (None except on rank 0) and loss for each dataset size and batch size."""
    results = {}
    for num_images in (1, 2, 5, 127, 128, 129, 1025):
        for batch_size in (1, 7, 128):
            result = evaluate_batches(world, num_images, batch_size)
            predictions = None if result.predictions is None else result.predictions.ranked.tolist()
            counts = [result.correct1, result.correct5, result.num_images]
            metrics = [result.balanced_accuracy, result.macro_f1, result.calibration_error]
            results[f"{num_images}-{batch_size}"] = [*counts, predictions, result.loss, metrics]
    (folder / f"{world.size}-{world.rank}.json").write_text(json.dumps(results))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_counts_and_predictions_equal_those_of_one_forward_pass_for_any_world_size(world_size, tmp_path):
    run_in_processes(save_counts, tmp_path, processes=world_size)
    for num_images in (1, 2, 5, 127, 128, 129, 1025):
        images, targets = create_data(num_images)
        with torch.no_grad():
            logits = linear_model()(images)
        ranked = logits.topk(5, dim=1).indices
        loss = nn.functional.cross_entropy(logits, targets).item()
        correct = ranked == targets.unsqueeze(1)
        expected = [correct[:, 0].sum().item(), correct.sum().item(), num_images]
        recalls, f1_scores = precision_recall_fscore_support(targets, ranked[:, 0], labels=np.unique(targets), zero_division=0)[
            1:3
        ]
        confidences = logits.softmax(dim=1).amax(dim=1).numpy()
        gaps = np.bincount(np.ceil(15 * confidences).astype(int), weights=correct[:, 0].numpy() - confidences)  # per bin
        metrics = [100 * recalls.mean(), 100 * f1_scores.mean(), 100 * np.abs(gaps).sum() / num_images]
        for rank in range(world_size):
            results = json.loads((tmp_path / f"{world_size}-{rank}.json").read_text())
            for batch_size in (1, 7, 128):
                *counts, predictions, mean_loss, found = results[f"{num_images}-{batch_size}"]
                assert counts == expected
                assert mean_loss == pytest.approx(loss, rel=1e-5)
                assert found == pytest.approx(metrics, rel=1e-5)
                assert predictions == (ranked.tolist() if rank == 0 else None)


def test_class_ids_restrict_predictions_to_the_classes_of_the_dataset():
    """Each logit equals its class id, so among classes 7, 2 and 9 the model predicts 9, the third class of the dataset."""
    model = nn.Linear(6, 10)
    with torch.no_grad():
        model.weight.zero_()
        model.bias.copy_(torch.arange(10.0))
    targets = torch.tensor([0, 1, 2, 2])
    loader = [Batch([0, 1, 2, 3], torch.zeros(4, 6), targets)]
    result = evaluate(
        {"raw": model}, loader, amp_dtype=torch.float32, world=CPU_WORLD, class_ids=[7, 2, 9], keep_predictions=True
    )["raw"]
    assert (result.correct1, result.correct5) == (2, 4)
    assert result.predictions.ranked.tolist() == [[2, 0, 1]] * 4
    assert result.predictions.model_classes.tolist() == [9] * 4


def test_confidence_intervals_and_mcnemar_test_match_textbook_values():
    assert wilson_interval(8, 10) == pytest.approx((49.02, 94.33), abs=0.005)  # a common textbook example
    assert wilson_interval(0, 10) == pytest.approx((0, 27.75), abs=0.005)
    assert wilson_interval(10, 10)[1] == pytest.approx(100)
    assert mcnemar_test(1, 9) == pytest.approx(22 / 1024)  # 2 (1 + 10) / 2^10
    assert mcnemar_test(5, 5) == 1
    assert mcnemar_test(0, 0) == 1
    # The expected value is the normal approximation with continuity correction.
    assert mcnemar_test(2000, 2200) == pytest.approx(math.erfc(199 / math.sqrt(2 * 4200)), rel=0.01)
    low, high = paired_interval(10, 30, 100)
    # The Clopper-Pearson interval of 30 out of 40 is 58.80 to 87.31 %.
    assert (low, high) == pytest.approx((100 * (2 * 0.5880 - 1) * 0.4, 100 * (2 * 0.8731 - 1) * 0.4), abs=0.01)
    assert paired_interval(0, 0, 100) == (0, 0)


def test_the_paired_interval_excludes_zero_if_and_only_if_mcnemars_test_is_significant():
    for total in range(1, 25):
        for second in range(total + 1):
            low, high = paired_interval(total - second, second, 100)
            assert (mcnemar_test(total - second, second) < 0.05) == (low > 0 or high < 0)


def create_result(targets, predictions, num_classes=3):
    """Result with the given top-1 predictions, in which every top-5 prediction counts as correct."""
    targets, top1 = np.array(targets), np.array(predictions)
    ranked = np.stack([top1, (top1 + 1) % num_classes], axis=1)
    correct = int((targets == top1).sum())
    predictions = Predictions(targets, ranked, np.full(len(targets), 0.5), top1)
    counts = [np.bincount(ids, minlength=num_classes) for ids in (targets, top1, targets[targets == top1])]
    bins = np.zeros((3, 15), dtype=np.int64)
    bins[:, 7] = len(targets), correct, len(targets) * 2**31  # confidence 0.5, in units of 2**-32
    return EvalResult("raw", correct, len(targets), len(targets), 1.0, num_classes, np.stack(counts), bins, predictions)


def test_result_files_contain_class_counts_predictions_and_accuracy_on_imagenet_real_labels(tmp_path):
    result = create_result([0, 0, 1, 2], [0, 1, 1, 0])
    assert confusion_matrix(result, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]
    # ReaL labels (reassessed ImageNet labels): an image may have several, or none.
    names, real = ["d.png", "c.png", "b.png", "a.png"], [[0], [1, 2], [], [2]]
    options = {"about": {"model": "x"}, "classes": ["cat", "dog", "a, b"], "names": names, "real_labels": real}
    write_evaluation(tmp_path, {"raw": result}, preferred="raw", predictions=True, **options)
    record = json.loads((tmp_path / "eval.json").read_text())
    assert record["model"] == "x"
    assert record["results"]["raw"]["real"] == {"correct1": 2, "num_images": 3, "acc1": pytest.approx(200 / 3)}
    assert record["results"]["raw"]["acc1_interval_95"] == pytest.approx([15.0, 85.0], abs=0.05)  # 2 of 4 correct
    assert record["results"]["raw"]["acc5_interval_95"] == pytest.approx([51.01, 100.0], abs=0.05)  # 4 of 4 correct
    with open(tmp_path / "eval_classes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = ("class", "num_images", "correct1_raw", "precision_raw", "f1_raw")
    assert [tuple(row[column] for column in columns) for row in rows] == [
        ("cat", "2", "1", "50.000", "50.000"),
        ("dog", "1", "1", "50.000", "66.667"),
        ("a, b", "1", "0", "0.000", "0.000"),
    ]
    metrics = [record["results"]["raw"][name] for name in ("balanced_accuracy", "macro_f1", "calibration_error")]
    assert metrics == pytest.approx([50.0, 350 / 9, 0.0])  # recalls 1/2, 1, 0; every confidence is the accuracy, 0.5
    with open(tmp_path / "predictions_raw.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == sorted(names)
    assert rows[0] == {
        **{"image": "a.png", "target": "a, b", "prediction": "cat", "second": "dog", "confidence": "0.5000"},
        **dict.fromkeys(("third", "fourth", "fifth"), ""),
    }
    assert (tmp_path / "confusion.png").stat().st_size > 5000
    assert not list(tmp_path.glob(".*incomplete*"))


def test_results_for_20000_classes_need_little_memory(tmp_path):
    """A matrix of all pairs of classes would need 3.2 GB."""
    num_classes, rng = 20_000, np.random.default_rng(0)
    targets = rng.integers(0, num_classes, 1000)
    predictions = np.where(rng.random(1000) < 0.5, targets, rng.integers(0, num_classes, 1000))
    result = create_result(targets, predictions, num_classes)
    options = {"classes": [f"class{number}" for number in range(num_classes)], "names": [str(number) for number in range(1000)]}
    tracemalloc.start()
    write_evaluation(
        tmp_path, {"raw": result, "ema": result}, preferred="raw", about={}, real_labels=None, predictions=True, **options
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6
    with open(tmp_path / "eval_classes.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    counts = np.bincount(targets)
    assert [int(row["num_images"]) for row in rows] == counts[counts > 0].tolist()
    correct = [int(row["correct1_ema"]) for row in rows]
    assert correct == [int(((targets == number) & (predictions == number)).sum()) for number in np.flatnonzero(counts)]
    assert sum(correct) == result.correct1
    assert not (tmp_path / "confusion.png").exists()


def test_the_confusion_matrix_is_drawn_with_classes_counts_and_percentages(tmp_path, monkeypatch):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **options: figures.append(figure) or save(figure, *args, **options)
    )
    draw_confusion(np.array([[3, 1], [0, 2]]), ["cat", "$dog"], "a title", tmp_path / "confusion.png")
    axes = figures[0].axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cat", r"\$dog"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["cat", r"\$dog"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("prediction", "class", "a title")
    assert axes.images[0].get_array().tolist() == [[75.0, 25.0], [0.0, 100.0]]
    assert {(text.get_position(), text.get_text()) for text in axes.texts} == {((0, 0), "3"), ((1, 0), "1"), ((1, 1), "2")}


def test_imagenet_real_labels_are_class_ids_of_the_model(tmp_path):
    """With a class map, ReaL (reassessed ImageNet) labels are compared with the class ids of the model.

    The model predicts its classes 7 and 9. The ReaL labels are 7 and 3, so one prediction is correct.
    """
    predictions = Predictions(np.array([0, 1]), np.array([[0, 1], [1, 0]]), np.array([0.5, 0.5]), np.array([7, 9]))
    result = replace(create_result([0, 1], [0, 1], num_classes=2), predictions=predictions)
    options = {"about": {}, "classes": ["a", "b"], "names": ["1", "2"], "real_labels": [[7], [3]]}
    write_evaluation(tmp_path, {"raw": result}, preferred="raw", predictions=False, **options)
    real = json.loads((tmp_path / "eval.json").read_text())["results"]["raw"]["real"]
    assert real == {"correct1": 1, "num_images": 2, "acc1": 50.0}


def test_the_most_confident_mistakes_are_drawn_in_their_order(tmp_path, monkeypatch):
    result = create_result([0, 0, 1, 2, 2], [1, 0, 2, 0, 1])
    predictions = replace(result.predictions, confidence=np.array([0.6, 0.99, 0.9, 0.5, 0.7]))
    drawn = []
    monkeypatch.setattr(engine.report, "draw_predictions", lambda images, captions, path: drawn.append((images, captions)))
    options = {"classes": ["cat", "dog", "owl"], "names": [f"val/{number}.png" for number in range(5)], "path": tmp_path / "x"}
    load = lambda position: Image.new("RGB", (600, 300), (position, 0, 0))  # noqa: E731
    engine.report.draw_mistakes(replace(result, predictions=predictions), 3, load=load, **options)
    ((pictures, captions),) = drawn
    assert [picture.getpixel((0, 0))[0] for picture in pictures] == [2, 4, 0]
    assert [picture.size for picture in pictures] == [(256, 128)] * 3
    texts = [(caption.name, caption.prediction, caption.truth) for caption in captions]
    assert texts == [("2.png", "owl: 90.0%", "dog"), ("4.png", "dog: 70.0%", "owl"), ("0.png", "dog: 60.0%", "cat")]
    assert captions[0].lines()[-1] == "class: dog"
    engine.report.draw_mistakes(create_result([0, 1], [0, 1]), 3, load=load, **options)
    assert len(drawn) == 1  # nothing is drawn without mistakes


def test_an_evaluation_deletes_prediction_files_of_the_previous_evaluation(tmp_path):
    options = {"about": {}, "classes": ["a", "$x_$", "c"], "names": ["1", "2", "3"], "real_labels": None}
    results = {"raw": create_result([0, 1, 2], [0, 1, 2]), "ema": create_result([0, 1, 2], [1, 2, 0])}
    write_evaluation(tmp_path, results, preferred="ema", predictions=True, **options)
    assert [prediction == target for prediction, target in read(tmp_path, None)[1].values()] == [False, False, False]
    write_evaluation(tmp_path, {"raw": results["raw"]}, preferred="raw", predictions=True, **options)
    assert [prediction == target for prediction, target in read(tmp_path, None)[1].values()] == [True, True, True]
    write_evaluation(tmp_path, {"raw": results["raw"]}, preferred="raw", predictions=False, **options)
    assert not list(tmp_path.glob("predictions*"))


def test_two_evaluations_are_compared_on_the_same_images():
    first = {f"{number}": ("cat" if number < 60 else "dog", "cat") for number in range(100)}
    second = {f"{number}": ("cat" if 10 <= number < 85 else "dog", "cat") for number in range(100)}
    text = compare(first, second)
    assert "correct only in the first: 10, only in the second: 25" in text
    assert "second minus first: +15.00 points" in text
    assert f"p = {mcnemar_test(10, 25):.3g}; at the 5 % level, the two models differ significantly" in text
    with pytest.raises(ValueError, match="images in only one of the files: 1 "):
        compare(first, {name: pair for name, pair in second.items() if name != "7"})
    with pytest.raises(ValueError, match="3 has target cat in the first file and dog in the second"):
        compare(first, second | {"3": ("cat", "dog")})
    as_shards = {f"val-000000.tar/{name}.png": pair for name, pair in second.items()}
    assert compare({f"{name}.jpg": pair for name, pair in first.items()}, as_shards) == text


def test_predictions_for_an_image_file_and_for_its_copy_in_a_shard_are_paired():
    # In tar shards, pack_dataset.py replaces dots in image names by underscores.
    folder = {f"a/x.{number}.png": ("cat", "cat") for number in range(3)}
    shards = {f"val-000000.tar/a/x_{number}.png": ("cat", "cat") for number in range(3)}
    assert compare(folder, shards).startswith("3 images")


def test_a_predictions_file_with_truncated_or_duplicate_rows_is_rejected(tmp_path):
    for rows in ("0.png,cat\n", "0.png,cat,0.9,cat\n0.png,cat,0.9,dog\n"):
        (tmp_path / "predictions_raw.csv").write_text(f"image,target,confidence,prediction\n{rows}")
        (tmp_path / "eval.json").write_text("[]")  # not a dictionary, so read() falls back to the raw weights
        with pytest.raises(ValueError, match="truncated row or duplicate image"):
            read(tmp_path, None)


def test_weights_that_give_non_finite_outputs_are_rejected(trained, toy_config, toy_data, tmp_path):
    state = read_checkpoint(trained)
    state["model"]["head.bias"][0] = float("nan")
    save_checkpoint(state, tmp_path / "nan.pth")
    command = ["--cfg", toy_config, "--data-path", toy_data, "--output", tmp_path, "--eval", "--resume", tmp_path / "nan.pth"]
    outcome = run_main(command, tmp_path / "log")
    assert outcome.exit_codes == [1], outcome.output
    assert "the raw weights give outputs that are not finite for 33 of 33 images" in outcome.output
    assert not (tmp_path / "toy/default/eval.json").exists()


def test_a_non_finite_loss_is_written_as_null_in_valid_json(trained, toy_config, toy_data, tmp_path):
    state = read_checkpoint(trained)
    for weights in ("model", "state_dict_ema"):
        state[weights]["head.bias"] = torch.tensor([3e38, -3e38, 0])
    save_checkpoint(state, tmp_path / "huge.pth")
    folder, _ = run_evaluation(tmp_path / "huge.pth", toy_config, toy_data, tmp_path)

    def reject_constant(text: str):
        raise AssertionError(text)

    results = json.loads((folder / "eval.json").read_text(), parse_constant=reject_constant)["results"]
    assert results["raw"]["loss"] is None
    assert results["raw"]["correct1"] == 11


def test_an_empty_predictions_file_is_rejected(tmp_path):
    (tmp_path / "predictions_raw.csv").write_text("image,target,confidence,prediction\n")
    with pytest.raises(ValueError, match="has no predictions"):
        read(tmp_path / "predictions_raw.csv", None)


def run_evaluation(checkpoint, toy_config, data, output, *arguments, processes=1):
    """Evaluate a checkpoint. Return the directory with the results, and the output of the processes."""
    command = ["--cfg", toy_config, "--data-path", data, "--output", output, "--eval", "--resume", checkpoint, *arguments]
    outcome = run_main(command, output / "log", processes=processes)
    assert set(outcome.exit_codes) == {0}, outcome.output
    return output / "toy/default", outcome.output


def read_counts(folder):
    results = json.loads((folder / "eval.json").read_text())["results"]
    return {label: [result[key] for key in ("correct1", "correct5", "num_images")] for label, result in results.items()}


def write_reference_checkpoint(path, state, file_format):
    """Write a checkpoint in the format of the reference.

    Args:
        file_format: "main", the format of its main.py; "main_ema", which adds the EMA weights; or "wrapped", main.py's format
            with DDP's prefix in the parameter names.
    """
    config = CfgNode({"MODEL": CfgNode({"TYPE": "flatten_swin", "NUM_CLASSES": 3}), "TRAIN": CfgNode({"BASE_LR": 5e-4})})
    content = {
        "model": {f"module.{name}" if file_format == "wrapped" else name: value for name, value in state["model"].items()},
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(1e-3)}]},
        "lr_scheduler": {"t_initial": 300, "args": argparse.Namespace(cosine=True)},
        "max_accuracy": np.float64(82.1),
        "epoch": 299,
        "config": config,
    }
    if file_format == "main_ema":
        content |= {"state_dict_ema": state["state_dict_ema"], "max_accuracy_ema": 82.2}
    torch.save(content, path)
    return path


@pytest.mark.parametrize("file_format", ["main", "main_ema", "wrapped"])
def test_checkpoints_in_formats_of_the_reference_give_the_same_counts_as_ours(
    file_format, trained, toy_config, toy_data, tmp_path
):
    (tmp_path / "ours").mkdir()
    ours = read_counts(run_evaluation(trained, toy_config, toy_data, tmp_path / "ours")[0])
    path = write_reference_checkpoint(tmp_path / "released.pth", read_checkpoint(trained), file_format)
    folder, output = run_evaluation(path, toy_config, toy_data, tmp_path)
    labels = ["raw", "ema"] if file_format == "main_ema" else ["raw"]
    assert read_counts(folder) == {label: ours[label] for label in labels}
    for label in labels:
        assert f"{label} weights: {ours[label][0]} of 33 correct" in output


def test_predictions_are_the_same_for_any_number_of_processes_and_workers(trained, toy_config, toy_data, tmp_path):
    tables = []
    for number, (processes, workers) in enumerate([(1, 0), (1, 2), (2, 1)]):
        output = tmp_path / str(number)
        output.mkdir()
        opts = ["--opts", "TEST.PREDICTIONS", "True", "DATA.NUM_WORKERS", workers]
        folder, _ = run_evaluation(trained, toy_config, toy_data, output, *opts, processes=processes)
        rows = list(csv.reader((folder / "predictions_ema.csv").read_text().splitlines()))
        tables.append([[*row[:2], *row[3:]] for row in rows])  # without the confidence, which may differ by rounding
    assert tables[0] == tables[1] == tables[2]
    assert len(tables[0]) == 34
    file, pairs = read(folder, None)
    preferred = read_checkpoint(trained)["best"]["weights"]
    assert file.name == f"predictions_{preferred}.csv"
    assert sum(prediction == target for prediction, target in pairs.values()) == read_counts(folder)[preferred][0]


def test_a_class_map_evaluates_a_dataset_with_a_subset_of_the_classes(trained, toy_config, toy_data, tmp_path):
    """Evaluate on classes 2 and 0: the counts equal those of a model whose head has only the rows of these two classes."""
    data = tmp_path / "subset"
    for name, label in (("a", 2), ("b", 0)):
        (data / "val").mkdir(parents=True, exist_ok=True)
        (data / "val" / name).symlink_to(toy_data / f"val/class{label}")
    (tmp_path / "map.txt").write_text("a 2\nb 0\n")
    folder, _ = run_evaluation(trained, toy_config, data, tmp_path, "--opts", "TEST.CLASS_MAP", tmp_path / "map.txt")
    counts = read_counts(folder)
    assert counts["raw"][2] == 22
    assert counts["raw"][1] == 22  # with two classes, the top 5 always contain the target
    state = read_checkpoint(trained)
    two_class_weights = {
        name: {entry: value[[2, 0]] if entry.startswith("head.") else value for entry, value in state[name].items()}
        for name in ("model", "state_dict_ema")
    }
    torch.save(two_class_weights, tmp_path / "two.pth")
    (tmp_path / "two").mkdir()
    options = ["--opts", "MODEL.NUM_CLASSES", "2"]
    assert read_counts(run_evaluation(tmp_path / "two.pth", toy_config, data, tmp_path / "two", *options)[0]) == counts
    assert json.loads((folder / "eval.json").read_text())["class_map"] == str(tmp_path / "map.txt")


def test_evaluation_is_rejected_if_two_processes_read_different_checkpoints(trained, toy_config, toy_data, tmp_path):
    """Nodes may have different files at the same path; the test simulates this with a different digest in each process."""

    def prepare(rank: int) -> None:
        original = jobs.evaluate.open_checkpoint
        jobs.evaluate.open_checkpoint = lambda path: replace(original(path), digest=f"digest {rank}")

    arguments = ["--cfg", toy_config, "--data-path", toy_data, "--output", tmp_path / "output", "--eval", "--resume", trained]
    outcome = run_main(arguments, tmp_path / "log", processes=2, prepare=prepare)
    assert outcome.exit_codes == [2, 2], outcome.output
    assert "differs between processes; use a copy on a file system that all nodes share" in outcome.output


def test_a_dry_run_runs_each_part_of_training_and_deletes_its_files(toy_config, toy_data, tmp_path):
    arguments = ["--cfg", toy_config, "--data-path", toy_data, "--output", tmp_path / "output", "--check"]
    outcome = run_main(arguments, tmp_path / "log", processes=2)
    assert outcome.exit_codes == [0, 0], outcome.output
    for message in ("first images", "first update", "checkpoint:", "is the bottleneck", "needs about", "no problem found"):
        assert message in outcome.output
    assert [path.name for path in tmp_path.iterdir()] == ["log"]


def test_a_dry_run_reports_an_unreadable_validation_image(toy_config, toy_data, tmp_path):
    for split in ("train", "val"):
        write_images(tmp_path, split, classes=3, per_class=8)
    (tmp_path / "val/class0/000.png").write_bytes(b"no image")
    arguments = ["--cfg", toy_config, "--data-path", tmp_path, "--output", tmp_path / "output", "--check"]
    outcome = run_main(arguments, tmp_path / "log")
    assert outcome.exit_codes == [2]
    assert "class0/000.png: not a readable image" in outcome.output
    assert not [path for path in tmp_path.iterdir() if "dry_run" in path.name]


def test_checkpoints_are_averaged_entry_by_entry(tmp_path):
    paths = []
    for number in range(3):
        state = {"w": torch.full((2,), float(number)), "h": torch.tensor([2.0 * number]).half(), "n": torch.tensor(5)}
        paths.append(Location(tmp_path / f"{number}.pth"))
        torch.save({"model": state, "state_dict_ema": {name: value + 10 for name, value in state.items()}}, paths[-1].path)
    for weights, offset in (("raw", 0), ("ema", 10), ("auto", 10)):
        mean = average(paths, weights)["model"]
        assert mean["w"].tolist() == [1 + offset] * 2
        assert mean["h"].dtype == torch.float16
        assert mean["h"].item() == 2 + offset
        assert mean["n"].item() == 5 + offset
    torch.save({"model": {"w": torch.zeros(3)}}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="contains a different model"):
        average([paths[0], Location(tmp_path / "other.pth")], "raw")


@pytest.mark.parametrize(
    ("key", "value"), [("MODEL.LA.FOCUSING_FACTOR", 5), ("DATA.MEAN", [0.5, 0.5, 0.5]), ("TEST.CROP_PCT", 0.9)]
)
def test_checkpoints_of_different_models_with_equal_shapes_are_not_averaged(key, value, toy_config, tmp_path):
    paths = []
    for number, opts in enumerate(([], [key, value])):
        paths.append(Location(tmp_path / f"{number}.pth"))
        torch.save({"model": {"w": torch.zeros(2)}, "config": to_dict(load_config(toy_config, opts))}, paths[-1].path)
    if key.startswith("TEST."):
        assert average(paths, "raw")["config"]["TEST"]["CROP_PCT"] == 0.875
        return
    with pytest.raises(CheckpointError, match=rf"1\.pth: {key} is .*same model, input size and normalisation"):
        average(paths, "raw")


def test_an_average_beyond_the_range_of_the_data_type_of_the_first_file_is_rejected(tmp_path):
    for name, values in (("half", torch.full((2,), 6e4).half()), ("float", torch.full((2,), 1e5))):
        torch.save({"model": {"w": values}}, tmp_path / f"{name}.pth")
    paths = [Location(tmp_path / "half.pth"), Location(tmp_path / "float.pth")]
    with pytest.raises(CheckpointError, match=r"average of w exceeds the range of its data type, torch\.float16"):
        average(paths, "raw")
    assert average(paths[::-1], "raw")["model"]["w"].tolist() == [8e4, 8e4]


def test_an_output_file_that_cannot_be_written_is_an_error_of_averaging(tmp_path, monkeypatch, capsys):
    torch.save({"model": {"w": torch.zeros(2)}}, tmp_path / "a.pth")
    files = [str(tmp_path / "a.pth")] * 2
    monkeypatch.setattr(sys, "argv", ["average_checkpoints.py", *files, "--output", str(tmp_path / "a.pth" / "mean.pth")])
    with pytest.raises(SystemExit) as caught:
        average_checkpoints.main()
    assert caught.value.code == 2
    assert "File exists" in capsys.readouterr().err


def test_averaged_checkpoints_of_a_run_can_be_evaluated(trained, toy_config, toy_data, tmp_path, monkeypatch):
    mean = tmp_path / "mean.pth"
    files = map(str, sorted(trained.parent.glob("checkpoint_*.pth")))
    monkeypatch.setattr(sys, "argv", ["average_checkpoints.py", *files, "--output", str(mean)])
    average_checkpoints.main()
    same = tmp_path / "same.pth"
    monkeypatch.setattr(sys, "argv", ["average_checkpoints.py", str(trained.parent), str(trained), "--output", str(same)])
    average_checkpoints.main()
    counts = []
    for checkpoint in (trained, same, mean):
        output = tmp_path / f"evaluation of {checkpoint.stem}"
        output.mkdir()
        counts.append(read_counts(run_evaluation(checkpoint, toy_config, toy_data, output)[0]))
    assert counts[1]["raw"] == counts[0]["ema"]  # averaging a checkpoint with itself gives its preferred weights, here EMA
    assert set(counts[2]) == {"raw"}
    assert counts[2]["raw"][0] > 11  # better than chance
