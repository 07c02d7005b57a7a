"""Comparison of the accuracies in training and in an evaluation (scripts/summarise.py)."""

import json

import pytest

from scripts import summarise
from tests.launch import run_script


def write_run(folder, checkpoint, correct, **results):
    """Files of a run with three evaluations: the second one has the lowest loss, the third one the highest accuracy."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("BEST_METRIC: loss\n")
    records = [
        {"step": step, "kind": "eval_raw", "epoch": 0, "loss": loss, "correct1": count, "num_images": 33, "acc1": count / 0.33}
        for step, loss, count in ((12, 0.9, 20), (24, 0.5, 22), (36, 0.7, 30))
    ]
    text = "".join(f"{json.dumps(record)}\n" for record in records)
    (folder / "metrics.jsonl").write_text(text + '{"step": 48, "kind": "tr')
    result = {"correct1": correct, "num_images": 33, "acc1": correct / 0.33, "acc1_interval_95": [0, 100]} | results
    evaluation = {"checkpoint": f"/data/{checkpoint}", "preprocessing": {"img_size": 40}, "results": {"raw": result}}
    (folder / "eval.json").write_text(json.dumps(evaluation))


@pytest.mark.parametrize(
    ("checkpoint", "correct", "results", "in_training", "status"),
    [
        ("best.pth", 22, {}, "22/33", 0),
        ("best.pth", 30, {}, "22/33", 1),
        ("top_000000012.pth", 20, {}, "20/33", 0),
        ("checkpoint_000000036.pth", 30, {}, "30/33", 0),
        ("soup.pth", 31, {}, "-", 0),
        ("best.pth", 4, {"num_images": 10}, "-", 0),
    ],
)
def test_an_evaluation_is_compared_with_that_of_the_same_checkpoint_in_training(
    checkpoint, correct, results, in_training, status, tmp_path
):
    write_run(tmp_path / "toy/run", checkpoint, correct, **results)
    outcome = run_script(summarise, [tmp_path / "toy/run"], tmp_path / "log")
    assert outcome.exit_codes == [status], outcome.output
    assert ["toy/run", "40", "raw", in_training] in [line.split()[:4] for line in outcome.output.splitlines()]


@pytest.mark.parametrize("content", ["{}", "[]", "{", '{"results": {"raw": 1}}'])
def test_a_file_of_another_program_is_an_error(content, tmp_path):
    (tmp_path / "eval.json").write_text(content)
    outcome = run_script(summarise, [tmp_path], tmp_path / "log")
    assert outcome.exit_codes == [2]
    assert "eval.json: not a result of main.py --eval; evaluate the run again" in outcome.output
