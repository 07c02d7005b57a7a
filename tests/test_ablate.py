"""Ablations with scripts/ablate.py: validation of the ablation file, confidence intervals, resuming, and the result table.

An arm is one variant of the ablation, such as softmax attention; it is trained once per seed.
"""

import json
import signal
import subprocess
import sys
import threading

import pytest
import torch

import scripts.ablate
from jobs.ablation import Run, check_same_recipe, final_accuracy, paired_difference, read_ablation, tabulate, to_markdown
from tests.launch import run_script, wait_for
from utils.config.loading import load_config
from utils.errors import ConfigError, Stopped
from utils.run_files import list_checkpoints

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
        ("{cfg: [1], seeds: [0, 1], baseline: b, arms: {b: {}}}", "cfg=[1]: give names or paths of config files"),
        ("{cfg: [a], seeds: [0], baseline: b, arms: {b: {}}}", "seeds=[0]: give at least two different integers"),
        ("{cfg: [a], seeds: [0, 1, 0], baseline: b, arms: {b: {}}}", "seeds=[0, 1, 0]: give at least two different integers"),
        ("{cfg: [a], seeds: [0, -1], baseline: b, arms: {b: {}}}", "seeds=[0, -1]: give at least two different integers"),
        ("{cfg: [a], seeds: [0, 1], baseline: b, arms: {b: [1]}}", "arm b: [1] must be a mapping, such as {TRAIN.EPOCHS: 12}"),
        (
            "{cfg: [a], seeds: [0, 1], baseline: b, arms: {b: {SEED: 1}}}",
            "arm b: SEED cannot be set in an ablation file; remove it, and list it in seeds",
        ),
        (
            "{cfg: [a], seeds: [0, 1], baseline: b, arms: {b: }, opts: {DATA.DATA_PATH: x}}",
            "opts: DATA.DATA_PATH cannot be set in an ablation file; remove it, and give --data-path",
        ),
        ("{cfg: [a], seeds: [0, 1], baseline: b, arms: {b: {AMP: }}}", "arm b: AMP has no value; give one, or ''"),
        ("{cfg: [a], seeds: [0, 1], baseline: b_c, arms: {b_c: {}}}", "arm 'b_c': use letters and digits"),
        ("{cfg: [a], seeds: [0, 1], baseline: a/b, arms: {a/b: {}}}", "arm 'a/b': use letters and digits"),
        ("{cfg: [a], seeds: [0, 1], baseline: +b, arms: {+b: {}}}", "arm '+b': use letters and digits"),
    ],
)
def test_the_error_for_an_invalid_ablation_file_mentions_the_affected_key(text, message, tmp_path):
    (tmp_path / "file.yaml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        read_ablation(tmp_path / "file.yaml")
    assert message in str(raised.value)


@pytest.mark.parametrize(
    "path", sorted((scripts.ablate.MAIN.parent / "experiments").glob("*.yaml")), ids=lambda path: path.stem
)
def test_every_experiment_file_defines_its_runs_in_distinct_directories(path, tmp_path):
    num_runs = {"focus_cifar10": 18, "focus_cifar10_long": 8, "focus_digits": 18, "tokens_cifar10": 12}
    runs = read_ablation(path).runs(tmp_path, tmp_path)
    assert len({run.folder for run in runs}) == len(runs) == num_runs[path.stem]  # arms times seeds


def test_an_arm_with_an_unknown_key_is_rejected_before_any_run_starts(toy_config, tmp_path):
    (tmp_path / "file.yaml").write_text(SPECIFICATION.format(config=toy_config).replace("LA.KIND", "LA.ATTENTION_KINDS"))
    with pytest.raises(ConfigError, match=r"arm softmax: unknown key MODEL\.LA\.ATTENTION_KINDS"):
        read_ablation(tmp_path / "file.yaml").runs(tmp_path, tmp_path)


def test_runs_that_may_end_early_are_rejected(toy_config, tmp_path):
    (tmp_path / "file.yaml").write_text(SPECIFICATION.format(config=toy_config).replace("{}", "{TRAIN.PATIENCE: 2}"))
    with pytest.raises(
        ConfigError, match=r"arm focused attention: TRAIN.PATIENCE=2: runs of different length; set TRAIN.PATIENCE: 0"
    ):
        read_ablation(tmp_path / "file.yaml").runs(tmp_path, tmp_path)


def runs_of(toy_config, folder, data, **changes):
    """Runs of the ablation of ``SPECIFICATION``, with further options of the arm with focused attention."""
    options = ", ".join(f"{key}: {value}" for key, value in changes.items())
    (folder / "file.yaml").write_text(
        SPECIFICATION.format(config=toy_config).replace("attention: {}", f"attention: {{{options}}}")
    )
    return read_ablation(folder / "file.yaml").runs(folder / "out", data)


def test_a_run_with_another_recipe_or_other_data_is_not_taken_for_the_run_of_an_arm(toy_config, toy_data, tmp_path):
    run = runs_of(toy_config, tmp_path, toy_data)[1]
    check_same_recipe(run)
    run.folder.mkdir(parents=True)
    run.folder.joinpath("config.yaml").write_text(run.cfg.dump())
    check_same_recipe(runs_of(toy_config, tmp_path, toy_data, **{"TRAIN.EPOCHS": 2})[1])  # a failed run without checkpoints
    run.folder.joinpath("metrics.jsonl").write_text('{"step": 3, "kind": "eval_raw", "epoch": 0, "acc1": 0.0}\n')
    check_same_recipe(run)
    check_same_recipe(runs_of(toy_config, tmp_path, toy_data, **{"KEEP_CHECKPOINTS": 7, "TRAIN.COMPILE": True})[1])
    check_same_recipe(runs_of(toy_config, tmp_path, tmp_path / "moved")[1])
    for changes, message in (
        ({"MODEL.LA.KERNEL_SIZE": 3}, "focused_attention_0 was trained with MODEL.LA.KERNEL_SIZE=5, and has 3 now; restore"),
        ({"TRAIN.EPOCHS": 2}, "focused_attention_0 was trained with TRAIN.EPOCHS=1, and has 2 now; restore"),
        ({"DATA.VAL_SPLIT": "val2"}, "focused_attention_0 was trained with DATA.VAL_SPLIT='', and has 'val2' now; restore"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_same_recipe(runs_of(toy_config, tmp_path, toy_data, **changes)[1])
    with pytest.raises(ConfigError, match=r"focused_attention_0 was trained on .*; give --data-path"):
        check_same_recipe(runs_of(toy_config, tmp_path, tmp_path)[1])
    run.folder.joinpath("config.yaml").write_text("")  # keys that an earlier version did not store
    check_same_recipe(run)
    run.folder.joinpath("config.yaml").unlink()
    with pytest.raises(ConfigError, match="has results, but no config"):
        check_same_recipe(run)


def test_the_files_of_an_arm_are_the_same_ones_in_every_working_directory(toy_config, toy_data, tmp_path, monkeypatch):
    (tmp_path / "weights.pth").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    expected = str(tmp_path / "weights.pth")
    for name, path in (
        ("weights.pth", expected),
        ("./weights.pth", expected),
        ("flatten_swin_t", "flatten_swin_t"),
        ("''", ""),
    ):
        run = runs_of(toy_config, tmp_path, toy_data, **{"MODEL.PRETRAINED": name})[1]
        assert f"MODEL.PRETRAINED={path}" in run.opts


def test_the_last_epoch_and_the_weights_of_the_result_are_those_of_the_arms_own_config(toy_config, toy_data, tmp_path):
    """The EMA weights count if they are enabled; a run that lacks their last evaluation is not finished."""
    records = [
        {"step": 1, "kind": "eval_raw", "epoch": 0, "acc1": 1.0},
        {"step": 2, "kind": "eval_raw", "epoch": 1, "acc1": 2.0},
        {"step": 2, "kind": "eval_ema", "epoch": 1, "acc1": 3.0},
    ]
    run = runs_of(toy_config, tmp_path, toy_data)[1]
    run.folder.mkdir(parents=True)
    for options, num_records, expected in (
        ({"EMA.ENABLED": False}, 2, 1.0),
        ({"EMA.ENABLED": False, "TRAIN.EPOCHS": 2}, 2, 2.0),
        ({"EMA.ENABLED": True, "TRAIN.EPOCHS": 2}, 2, None),
        ({"EMA.ENABLED": True, "TRAIN.EPOCHS": 2}, 3, 3.0),
    ):
        lines = [f"{json.dumps(record)}\n" for record in records[:num_records]]
        (run.folder / "metrics.jsonl").write_text("".join(lines))
        assert final_accuracy(runs_of(toy_config, tmp_path, toy_data, **options)[1]) == expected


def test_the_runs_share_the_gpus_of_the_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for visible, expected in (("", ["0", "1"]), ("2,3", ["2", "3"]), ("MIG-a, MIG-b,", ["MIG-a", "MIG-b"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert scripts.ablate.list_gpus() == expected


SLEEP = -1  # instead of an exit status


def write_result(run):
    """Write the last evaluation of a run of one epoch."""
    run.folder.mkdir(parents=True)
    kind = "eval_ema" if run.cfg.EMA.ENABLED else "eval_raw"
    run.folder.joinpath("metrics.jsonl").write_text(f'{{"step": 3, "kind": "{kind}", "epoch": 0, "acc1": 1.0}}\n')


def runs_of_statuses(folder, *statuses):
    """Runs of one epoch whose seed is the exit status of the program that replaces main.py."""
    options = ["OUTPUT", str(folder), "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0", "TAG"]
    return [Run("arm", status, [], load_config([], [*options, f"run_{status}"])) for status in statuses]


def test_a_failed_run_does_not_end_the_others_and_a_stopped_run_does(tmp_path, monkeypatch):
    """Programs with given exit statuses replace main.py; one waits until it is terminated."""
    processes = []

    def start(run, _cfg, **_):
        if run.seed == 0:
            write_result(run)
        program = "import time; time.sleep(600)" if run.seed == SLEEP else f"import sys; sys.exit({run.seed})"
        processes.append(subprocess.Popen([sys.executable, "-c", program]))
        return processes[-1]

    monkeypatch.setattr(scripts.ablate, "start", start)
    monkeypatch.setattr(scripts.ablate, "SIGNALS", ())  # this process keeps its handlers
    failed = scripts.ablate.train(runs_of_statuses(tmp_path, 1, 0), [], num_slots=1)
    assert len(failed) == 1
    assert "run_1 failed with exit status 1, see" in failed[0]
    with pytest.raises(Stopped, match="run_75 was stopped by a signal"):
        scripts.ablate.train(runs_of_statuses(tmp_path, SLEEP, 75, 0), [], num_slots=2)
    assert [process.poll() for process in processes[2:]] == [-signal.SIGTERM, 75]


def test_runs_that_the_same_signal_ends_have_not_failed(tmp_path, monkeypatch):
    """Ctrl-C goes to all processes of the terminal. A run that is still starting ends without status 75."""

    def start(*_, **__):
        process = subprocess.Popen([sys.executable, "-c", "import sys; sys.exit(130)"])
        process.wait()
        signal.raise_signal(signal.SIGTERM)
        return process

    monkeypatch.setattr(scripts.ablate, "start", start)
    previous = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        scripts.ablate.train(runs_of_statuses(tmp_path, 130), [], num_slots=1)
    assert signal.getsignal(signal.SIGTERM) == previous


def test_an_arm_with_an_unfinished_run_is_not_in_the_table(toy_config, toy_data, tmp_path, capsys):
    """Without the baseline there is no table, nor that of an earlier call."""
    runs = runs_of(toy_config, tmp_path, toy_data)
    for run in runs[:3]:  # both seeds of softmax, and the first one of the other arm
        write_result(run)
    scripts.ablate.write_table(tmp_path, runs, "softmax")
    assert [row["arm"] for row in json.loads((tmp_path / "table.json").read_text())] == ["softmax"]
    scripts.ablate.write_table(tmp_path, runs, "focused attention")
    assert not list(tmp_path.glob("table.*"))
    output = capsys.readouterr().out
    assert "not in the table, because some of their runs have not finished: focused attention" in output
    assert "no table: not all runs of the baseline focused attention have finished" in output


def test_a_signal_stops_all_runs_of_an_ablation_which_save_their_state(toy_config, toy_data, tmp_path):
    """Long runs with loader workers, in two slots."""
    text = SPECIFICATION.format(config=toy_config).replace("EPOCHS: 1", "EPOCHS: 999, DATA.NUM_WORKERS: 2", 1)
    (tmp_path / "file.yaml").write_text(text)
    command = [sys.executable, scripts.ablate.__file__, tmp_path / "file.yaml", "--data-path", toy_data]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen([*command, "--output", tmp_path / "out", "--parallel", "2"], stdout=log, stderr=log)
    folders = [tmp_path / f"out/toy/{arm}_0" for arm in ("softmax", "focused_attention")]
    metrics = [folder / "metrics.jsonl" for folder in folders]
    wait_for(lambda: all(path.is_file() and path.stat().st_size for path in metrics), process, tmp_path / "log")
    outcome = run_script(scripts.ablate, [*command[2:], "--output", tmp_path / "out"], tmp_path / "second")
    assert outcome.exit_codes == [2]
    assert f"--output {tmp_path / 'out'}: another ablate.py is writing to it; wait until it ends" in outcome.output
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 75
    assert (tmp_path / "log").read_text().endswith("stopped by SIGTERM; the same command resumes\n")
    for folder in folders:
        assert "is saved, and the same command resumes the run" in folder.with_name(f"{folder.name}.txt").read_text()
        assert list_checkpoints(folder)


@pytest.mark.parametrize("cause", [(), (signal.SIGTERM,)], ids=["a run was stopped", "a signal"])
@pytest.mark.parametrize(("num_ignored", "status"), [(1, 143), (9, -signal.SIGKILL)])
def test_each_further_signal_to_an_ablation_reaches_its_runs(cause, num_ignored, status):
    """A program that ignores its first SIGTERM, as main.py saves its state then; or one that ignores all of them."""
    handler = f"lambda *_: (received.append(1), os.write(1, b'.'), sys.exit(143) if len(received) > {num_ignored} else None)"
    program = f"import os, signal, sys, time; received = []; signal.signal(15, {handler}); os.write(1, b'.'); time.sleep(600)"
    signals = list(cause)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        process.stdout.read(1)
        thread = threading.Thread(target=scripts.ablate.end, args=([process], signals))
        thread.start()
        process.stdout.read(1)
        assert process.poll() is None
        try:
            signals.append(signal.SIGTERM)
            process.stdout.read(1)
            signals.append(signal.SIGTERM)
            thread.join(timeout=60)
            assert process.poll() == status
        finally:
            process.kill()


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
    assert tabulate({"a": [56.1, 57.2], "b": [58.47, 59.57]}, "a")[0]["significant"] is False  # equal differences are chance
    assert paired_difference([0.0, 0.0], [1.0, 3.0])[1] == pytest.approx(12.7062, abs=1e-4)  # one degree of freedom


def test_a_truncated_line_in_the_metrics_of_an_arm_does_not_end_the_ablation(tmp_path):
    """The last line of a run that was killed, or whose disk was full, may be incomplete; the run counts as unfinished."""
    cfg = load_config(
        [], ["OUTPUT", str(tmp_path), "MODEL.NAME", "model", "TAG", "arm_0", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0"]
    )
    run = Run("arm", 0, [], cfg)
    run.folder.mkdir(parents=True)
    assert final_accuracy(run) is None
    record = '{"step": 3, "kind": "eval_raw", "epoch": 0, "acc1": 50.0}\n'
    contents = {record[:30]: None, "[]\n": None, record.replace("50.0", "NaN"): None, record + record[:30]: 50.0}
    for content, expected in contents.items():
        (run.folder / "metrics.jsonl").write_text(content)
        assert final_accuracy(run) == expected


@pytest.mark.slow
def test_an_interrupted_ablation_resumes_and_writes_the_same_table(toy_config, toy_data, tmp_path):
    (tmp_path / "file.yaml").write_text(SPECIFICATION.format(config=toy_config))
    arguments = [tmp_path / "file.yaml", "--data-path", toy_data, "--output", tmp_path / "out", "--parallel", 2]
    outcome = run_script(scripts.ablate, arguments, tmp_path / "log", timeout=300)
    assert outcome.exit_codes == [0], outcome.output
    assert "runs: 4, finished: 0" in outcome.output
    rows = json.loads((tmp_path / "out/table.json").read_text())
    accuracies = {}
    for arm in ("softmax", "focused attention"):
        runs = [tmp_path / f"out/toy/{arm.replace(' ', '_')}_{seed}/metrics.jsonl" for seed in (0, 1)]
        accuracies[arm] = [json.loads(run.read_text().splitlines()[-1])["acc1"] for run in runs]
    assert {row["arm"]: row["accuracies"] for row in rows} == accuracies
    mtime_before = (tmp_path / "out/toy/focused_attention_1/metrics.jsonl").stat().st_mtime_ns
    # Simulate an interruption: one run lacks its metrics and its last checkpoint.
    (tmp_path / "out/toy/softmax_0/metrics.jsonl").unlink()
    (tmp_path / "out/toy/softmax_0/checkpoint_000000003.pth").unlink()
    outcome = run_script(scripts.ablate, [*arguments, "--baseline", "focused attention"], tmp_path / "log", timeout=300)
    assert outcome.exit_codes == [0], outcome.output
    assert "runs: 4, finished: 3" in outcome.output
    assert "difference from focused attention" in (tmp_path / "out/table.md").read_text()
    outcome = run_script(scripts.ablate, arguments, tmp_path / "log", timeout=300)
    assert outcome.exit_codes == [0], outcome.output
    assert json.loads((tmp_path / "out/table.json").read_text()) == rows
    assert (tmp_path / "out/toy/focused_attention_1/metrics.jsonl").stat().st_mtime_ns == mtime_before
