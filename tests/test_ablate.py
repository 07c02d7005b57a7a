"""Ablations with scripts/ablate.py: validation of the ablation file, confidence intervals, resuming, and the result table.

An arm is one variant of the ablation, such as softmax attention; it is trained once per seed.
"""

import json

import pytest

import scripts.ablate
from scripts.ablate import Run, final_accuracy, paired_difference, read_ablation, tabulate, to_markdown
from tests.launch import run_script
from utils.errors import ConfigError

SPECIFICATION = """
cfg: [{config}]
opts: {{TRAIN.EPOCHS: 1, TRAIN.WARMUP_EPOCHS: 0, DATA.BATCH_SIZE: 34}}
seeds: [0, 1]
baseline: softmax
arms:
  softmax: {{MODEL.LA.KIND: softmax}}
  focused attention: {{}}
"""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "is of type list, not a mapping"),
        ("cfg: [a]", "unknown or missing keys arms, baseline, seeds; expected cfg"),
        ("{cfg: a, seeds: [0, 1], baseline: b, arms: {b: {}}}", "cfg='a': must be a list"),
        ("{cfg: [a], seeds: [0, 1], baseline: c, arms: {b: {}}}", "baseline='c': not an arm; choose one of b"),
        ("{cfg: [a], seeds: [0], baseline: b, arms: {b: {}}}", "give at least two integers, to compute the standard deviation"),
    ],
)
def test_the_error_for_an_invalid_ablation_file_mentions_the_affected_key(text, message, tmp_path):
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_ablation(tmp_path / "file.yaml")
    assert message in str(raised.value)


@pytest.mark.parametrize("path", sorted((scripts.ablate.ROOT / "experiments").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_experiment_file_defines_its_runs_in_distinct_directories(path, tmp_path):
    num_runs = {"focus_cifar10": 18, "focus_cifar10_long": 12, "focus_digits": 18, "tokens_cifar10": 12}
    runs = read_ablation(path).runs(tmp_path)
    assert len({run.folder for run in runs}) == len(runs) == num_runs[path.stem]  # arms times seeds


def test_an_arm_with_an_unknown_key_is_rejected_before_any_run_starts(toy_config, tmp_path):
    (tmp_path / "file.yaml").write_text(SPECIFICATION.format(config=toy_config).replace("LA.KIND", "LA.ATTENTION_KINDS"))
    with pytest.raises(ConfigError, match=r"unknown key MODEL\.LA\.ATTENTION_KINDS"):
        read_ablation(tmp_path / "file.yaml").runs(tmp_path)


def test_accuracy_differences_between_arms_are_paired_by_seed():
    """Hand-computed confidence interval: the differences 1, 2 and 3 have mean 2 and standard deviation 1.

    The 97.5 % quantile of Student's t with two degrees of freedom is 4.3027.
    """
    mean, half_width = paired_difference([10.0, 20.0, 30.0], [11.0, 22.0, 33.0])
    assert mean == pytest.approx(2)
    assert half_width == pytest.approx(4.3027 / 3**0.5, abs=1e-4)
    rows = tabulate({"a": [10.0, 20.0, 30.0], "b": [11.0, 22.0, 33.0], "c": [15.0, 25.1, 35.0]}, "a")
    assert [row["arm"] for row in rows] == ["c", "b", "a"]
    assert [row.get("significant") for row in rows] == [True, False, None]
    assert "| b | 22.00 ± 11.00 | +2.00 ± 2.48 | no |" in to_markdown(rows, "a")


def test_a_truncated_line_in_the_metrics_of_an_arm_does_not_end_the_ablation(tmp_path):
    """The last line of a run that was killed, or whose disk was full, may be incomplete; the run counts as unfinished."""
    run = Run("arm", 0, "arm_0", [], tmp_path)
    assert final_accuracy(run, 1) is None
    record = '{"step": 3, "kind": "eval_raw", "epoch": 0, "acc1": 50.0}\n'
    for content, expected in ((record[:30], None), ("[]\n", None), (record + record[:30], 50.0)):
        (tmp_path / "metrics.jsonl").write_text(content)
        assert final_accuracy(run, 1) == expected


@pytest.mark.slow
def test_an_interrupted_ablation_resumes_and_writes_the_same_table(toy_config, toy_data, tmp_path):
    (tmp_path / "file.yaml").write_text(SPECIFICATION.format(config=toy_config))
    arguments = [tmp_path / "file.yaml", "--data-path", toy_data, "--output", tmp_path / "out", "--parallel", 2]
    outcome = run_script(scripts.ablate, arguments, tmp_path / "log", timeout=300)
    assert outcome.exit_codes == [0], outcome.output
    assert "runs: 4, finished: 0, epochs per run: 1" in outcome.output
    rows = json.loads((tmp_path / "out/table.json").read_text())
    ablation = read_ablation(tmp_path / "file.yaml")
    expected = {
        arm: [final_accuracy(run, 1) for run in ablation.runs(tmp_path / "out") if run.arm == arm] for arm in ablation.arms
    }
    assert {row["arm"]: row["accuracies"] for row in rows} == expected
    mtime_before = (tmp_path / "out/toy/focused_attention_1/metrics.jsonl").stat().st_mtime_ns
    # Simulate an interruption: one run lacks its metrics and its last checkpoint.
    (tmp_path / "out/toy/softmax_0/metrics.jsonl").unlink()
    (tmp_path / "out/toy/softmax_0/checkpoint_000000003.pth").unlink()
    outcome = run_script(scripts.ablate, arguments, tmp_path / "log", timeout=300)
    assert "runs: 4, finished: 3, epochs per run: 1" in outcome.output
    assert json.loads((tmp_path / "out/table.json").read_text()) == rows
    assert (tmp_path / "out/toy/focused_attention_1/metrics.jsonl").stat().st_mtime_ns == mtime_before
