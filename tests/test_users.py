"""Defaults, log messages and error messages of main.py and the scripts."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from yacs.config import CfgNode

import jobs.evaluate
import jobs.train
from data.build import build_num_workers
from engine.run_directory import RunLock
from jobs.locate_checkpoint import choose_config, locate, open_checkpoint, stored_config
from jobs.train import _batch_advice, warn_about_ema
from models.checkpoints.reader import CheckpointError, preferred_weights, read_checkpoint
from tests.conftest import CONFIGS
from tests.launch import run_main, run_script
from utils.config.loading import load_config
from utils.devices import Cores, count_cores
from utils.distributed import World
from utils.errors import ConfigError

ROOT = Path(__file__).parent.parent


def run(*arguments, log_folder, **options):
    return run_main(list(arguments), log_folder / "log", **options)


def copy_run(trained: Path, folder: Path) -> Path:
    """Copy the directory of a run, so that the test may write to it. Returns the path of the copied best.pth."""
    shutil.copytree(trained.parent, folder)
    return folder / "best.pth"


def rename_classes(toy_data: Path, folder: Path, names: list[str]) -> Path:
    """Create a dataset in ``folder`` with the toy images of class0, class1, ... in directories with the given ``names``."""
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        for label, name in enumerate(names):
            (folder / split / name).symlink_to(toy_data / split / f"class{label}")
    return folder


# --- Evaluation with the config and classes of the checkpoint


def test_evaluation_prefers_the_weights_that_were_best_in_training(trained, toy_data, tmp_path):
    """Training, --eval and the scripts with ``--weights auto`` prefer the same weights."""
    state = read_checkpoint(trained)
    best = state["best"]
    assert preferred_weights(state) == best["weights"]
    assert preferred_weights(state | {"best": best | {"weights": "raw"}}) == "raw"
    assert preferred_weights(state | {"best": best | {"weights": "ema"}}) == "ema"
    assert preferred_weights({"model": state["model"], "state_dict_ema": state["state_dict_ema"]}) == "ema"
    path = copy_run(trained, tmp_path / "run")
    outcome = run("--eval", "--resume", path, "--data-path", toy_data, log_folder=tmp_path)
    assert outcome.exit_codes == [0], outcome.output
    assert outcome.output.splitlines()[-1].endswith(f" * Acc@1 {best['acc1']:.3f}")
    assert json.loads((tmp_path / "run/eval.json").read_text())["preferred"] == best["weights"]


def test_evaluation_needs_no_config_and_writes_results_next_to_the_checkpoint(trained, toy_data, tmp_path, monkeypatch):
    """Model, image size and classes come from the checkpoint; the path of the data does not."""
    path = copy_run(trained, tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path)
    outcome = run("--eval", "--resume", path, log_folder=tmp_path)
    assert (outcome.exit_codes, "--eval: --data-path is missing; give" in outcome.output) == ([2], True)
    outcome = run("--eval", "--resume", path, "--data-path", toy_data, log_folder=tmp_path, processes=2)
    assert outcome.exit_codes == [0, 0], outcome.output
    record = json.loads((tmp_path / "elsewhere/eval.json").read_text())
    assert record["preprocessing"]["img_size"] == 40
    assert record["model"] == "toy"
    assert not (tmp_path / "output").exists()


def test_a_config_key_that_a_checkpoint_lacks_is_reported_as_not_stored(trained, toy_config, tmp_path, caplog):
    caplog.set_level("INFO")
    state = read_checkpoint(trained)
    del state["config"]["DATA"]["IMG_SIZE"], state["config"]["TEST"]
    torch.save(state, tmp_path / "old.pth")
    choose_config(open_checkpoint(tmp_path / "old.pth"), load_config(toy_config))
    assert "DATA.IMG_SIZE is not stored in the checkpoint, and is 40 now" in caplog.text
    assert " was " not in caplog.text
    assert "TEST.CROP" not in caplog.text  # not stored, but the config has the default


def test_evaluation_with_a_different_config_logs_the_differences_and_writes_next_to_the_checkpoint(trained, toy_data, tmp_path):
    path = copy_run(trained, tmp_path / "run")
    other = tmp_path / "other.yaml"
    tree = yaml.safe_load((path.parent / "config.yaml").read_text())
    tree["MODEL"]["NAME"], tree["DATA"]["IMG_SIZE"] = "other", 32
    other.write_text(yaml.safe_dump(tree))
    outcome = run("--eval", "--cfg", other, "--resume", path, "--data-path", toy_data, log_folder=tmp_path)
    assert outcome.exit_codes == [0], outcome.output
    assert "DATA.IMG_SIZE was 40 in the checkpoint, but is 32 now" in outcome.output
    assert json.loads((tmp_path / "run/eval.json").read_text())["preprocessing"]["img_size"] == 32
    assert not (tmp_path / "output").exists()


def test_an_evaluation_with_a_tag_writes_to_the_directory_of_the_tag(trained, toy_data, tmp_path):
    """The directory above that of the checkpoint gives the name, as in the directory of a run, <OUTPUT>/<MODEL.NAME>/<TAG>."""
    path = copy_run(trained, tmp_path / "mine/run")
    arguments = ["--eval", "--resume", path, "--data-path", toy_data, "--output", tmp_path / "out", "--tag", "second"]
    outcome = run(*arguments, log_folder=tmp_path)
    assert outcome.exit_codes == [0], outcome.output
    assert (tmp_path / "out/mine/second/eval.json").is_file()
    assert not (tmp_path / "mine/run/eval.json").exists()


def test_evaluating_weights_without_a_config_requires_cfg(trained, toy_data, tmp_path):
    torch.save(read_checkpoint(trained)["model"], tmp_path / "bare.pth")
    outcome = run("--eval", "--resume", tmp_path / "bare.pth", "--data-path", toy_data, log_folder=tmp_path)
    assert outcome.exit_codes == [2]
    assert "has weights but no config; give its training config with --cfg" in outcome.output


def test_the_config_of_a_reference_checkpoint_provides_the_model_but_not_the_scaled_learning_rate(trained, tmp_path):
    swin = {"EMBED_DIM": 24, "APE": False}
    model = {"TYPE": "flatten_swin", "NAME": "theirs", "NUM_CLASSES": 3, "SWIN": CfgNode(swin)}
    tree = CfgNode({"MODEL": CfgNode(model), "TRAIN": CfgNode({"BASE_LR": 1e-3}), "DATA": CfgNode({"IMG_SIZE": 64})})
    torch.save({"model": read_checkpoint(trained)["model"], "epoch": 299, "config": tree}, tmp_path / "theirs.pth")
    # The reference stores the learning rate after scaling it by the batch size. The stored value is therefore ignored, and
    # BASE_LR keeps our default, 5e-4.
    cfg = stored_config(open_checkpoint(tmp_path / "theirs.pth"))
    assert (cfg.MODEL.NAME, cfg.MODEL.SWIN.EMBED_DIM, cfg.DATA.IMG_SIZE, cfg.TRAIN.BASE_LR) == ("theirs", 24, 64, 5e-4)


def test_evaluation_with_the_config_of_a_run_ignores_its_missing_pretrained_file(trained, toy_data, tmp_path):
    path = copy_run(trained, tmp_path / "run")
    config = path.parent / "config.yaml"
    config.write_text(config.read_text().replace("PRETRAINED: ''", "PRETRAINED: gone.pth"))
    assert load_config(config).MODEL.PRETRAINED == "gone.pth"
    outcome = run("--cfg", config, "--eval", "--resume", path, "--data-path", toy_data, log_folder=tmp_path)
    assert outcome.exit_codes == [0], outcome.output


def test_the_directory_of_a_run_resolves_to_its_best_checkpoint(trained, tmp_path):
    assert locate(trained.parent).path == trained
    outcome = run("--eval", "--resume", tmp_path, log_folder=tmp_path)
    assert outcome.exit_codes == [2]
    assert "is a directory without best.pth; give a checkpoint file" in outcome.output
    with pytest.raises(CheckpointError, match="no such file or released model; released models are flatten_pvt_t"):
        locate("flatten_swin")


# --- Classes


def test_class_names_are_stored_and_different_class_names_are_rejected(trained, toy_data, tmp_path):
    """An accuracy on other classes would be meaningless, even if the number of classes is the same."""
    assert read_checkpoint(trained)["class_names"] == ["class0", "class1", "class2"]
    path = copy_run(trained, tmp_path / "run")
    others = rename_classes(toy_data, tmp_path / "others", ["airplane", "deer", "dog"])
    outcome = run("--eval", "--resume", path, "--data-path", others, log_folder=tmp_path)
    assert outcome.exit_codes == [2]
    assert "class 0 is 'airplane' in the data, but 'class0' in the checkpoint" in outcome.output
    # Directories named by number are accepted, because numbers do not identify classes.
    numbers = rename_classes(toy_data, tmp_path / "numbers", ["0", "1", "2"])
    assert run("--eval", "--resume", path, "--data-path", numbers, log_folder=tmp_path).exit_codes == [0]


def test_a_run_does_not_resume_on_renamed_classes(trained, toy_config, toy_data, tmp_path):
    copy_run(trained, tmp_path / "toy/default")
    others = rename_classes(toy_data, tmp_path / "others", ["class0", "class1", "class3"])
    arguments = ["--cfg", toy_config, "--data-path", others, "--output", tmp_path]
    outcome = run(*arguments, log_folder=tmp_path)
    assert outcome.exit_codes == [2]
    assert "class class2 is missing, class class3 is new" in outcome.output


def test_the_error_for_a_different_number_of_classes_suggests_a_class_map_only_in_evaluation(
    trained, toy_config, toy_data, tmp_path
):
    path = copy_run(trained, tmp_path / "run")
    two = rename_classes(toy_data, tmp_path / "two", ["class0", "class1"])
    outcome = run("--eval", "--resume", path, "--data-path", two, log_folder=tmp_path)
    assert outcome.exit_codes == [2]
    assert "add --opts TEST.CLASS_MAP names" in outcome.output
    assert "MODEL.NUM_CLASSES 2" not in outcome.output
    outcome = run("--cfg", toy_config, "--output", tmp_path, "--data-path", two, log_folder=tmp_path)
    assert outcome.exit_codes == [2]
    assert "add --opts MODEL.NUM_CLASSES 2" in outcome.output


def test_a_class_map_with_a_single_class_is_rejected(trained, toy_data, tmp_path):
    path = copy_run(trained, tmp_path / "run")
    (tmp_path / "one/val").mkdir(parents=True)
    (tmp_path / "one/val/class1").symlink_to(toy_data / "val/class1")
    (tmp_path / "map.txt").write_text("class1 1\n")
    arguments = ["--eval", "--resume", path, "--data-path", tmp_path / "one", "--opts", "TEST.CLASS_MAP", tmp_path / "map.txt"]
    outcome = run(*arguments, log_folder=tmp_path)
    assert outcome.exit_codes == [2]
    assert "every prediction would be correct" in outcome.output


# --- Training and dry runs (--check)


def test_a_second_run_in_the_output_directory_of_an_active_run_is_rejected(toy_config, toy_data, tmp_path):
    folder = tmp_path / "toy/default"
    folder.mkdir(parents=True)
    lock = RunLock(folder)
    lock.acquire()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    outcome = run("--cfg", toy_config, "--data-path", toy_data, "--output", tmp_path, log_folder=tmp_path)
    assert outcome.exit_codes == [2]
    assert f"another run is writing to this directory (process {os.getpid()} on " in outcome.output
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    lock.release()
    short = ["--opts", "TRAIN.EPOCHS=1", "TRAIN.WARMUP_EPOCHS=0"]
    assert run("--cfg", toy_config, "--data-path", toy_data, "--output", tmp_path, *short, log_folder=tmp_path).exit_codes == [
        0
    ]


def test_sigint_and_sigterm_end_a_run_without_a_traceback(toy_config, toy_data, tmp_path):
    arguments = ["--cfg", toy_config, "--data-path", toy_data, "--output", tmp_path, "--opts", "SAVE_STEPS", "2"]
    folder = tmp_path / "toy/default"
    for kill_signal in (signal.SIGINT, signal.SIGTERM):
        shutil.rmtree(folder, ignore_errors=True)
        options = {"kill_when": lambda: any(folder.glob("checkpoint_*.pth")), "kill_signal": kill_signal}
        outcome = run(*arguments, log_folder=tmp_path, **options)
        assert outcome.exit_codes == [75], outcome.output
        assert "Traceback" not in outcome.output
        assert outcome.output.splitlines()[-1].endswith("is saved, and the same command resumes the run")


def test_sigint_ends_an_evaluation_without_a_traceback(trained, toy_data, tmp_path):
    def prepare(rank: int) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background jobs with SIGINT ignored
        jobs.evaluate.evaluate = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT)

    arguments = ["--eval", "--resume", trained, "--data-path", toy_data, "--output", tmp_path]
    outcome = run(*arguments, log_folder=tmp_path, prepare=prepare)
    assert outcome.exit_codes == [130], outcome.output
    assert "Traceback" not in outcome.output
    assert outcome.output.splitlines()[-1].endswith("WARNING stopped")


def test_sigterm_ends_a_check_immediately_and_the_next_check_deletes_its_directory(toy_config, toy_data, tmp_path):
    """--check restores the default handler of SIGTERM: a Python handler would not run while the process waits for a GPU."""

    def prepare(rank: int) -> None:
        jobs.train.dry_run = lambda *_: os.kill(os.getpid(), signal.SIGTERM)

    output = tmp_path / "output"
    arguments = ["--cfg", toy_config, "--data-path", toy_data, "--output", output, "--check"]
    outcome = run(*arguments, log_folder=tmp_path, prepare=prepare)
    assert outcome.exit_codes == [-signal.SIGTERM], outcome.output
    assert len(list(tmp_path.glob(".dry_run*"))) == 1
    outcome = run(*arguments, log_folder=tmp_path)
    assert outcome.exit_codes == [0], outcome.output
    assert not list(tmp_path.glob(".dry_run*"))


def test_a_check_does_not_delete_the_directory_of_another_running_check(toy_config, toy_data, tmp_path):
    running = tmp_path / ".dry_run-running"
    running.mkdir()
    lock = RunLock(running)
    lock.acquire()
    outcome = run("--cfg", toy_config, "--data-path", toy_data, "--output", tmp_path / "output", "--check", log_folder=tmp_path)
    assert outcome.exit_codes == [0], outcome.output
    assert [path.name for path in tmp_path.glob(".dry_run*")] == [running.name]
    lock.release()


def test_an_error_in_all_processes_ends_each_of_them_with_status_2(toy_config, toy_data, tmp_path):
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/train").symlink_to(toy_data / "train")
    for _ in range(3):
        outcome = run(
            "--cfg", toy_config, "--data-path", tmp_path / "bad", "--output", tmp_path / "out", log_folder=tmp_path, processes=2
        )
        assert outcome.exit_codes == [2, 2], outcome.output
        assert "terminate called" not in outcome.output
        assert "Traceback" not in outcome.output


def test_a_run_does_not_resume_with_a_different_image_size(trained, toy_config, toy_data, tmp_path):
    copy_run(trained, tmp_path / "toy/default")
    arguments = ["--cfg", toy_config, "--data-path", toy_data, "--output", tmp_path, "--opts", "DATA.IMG_SIZE", "48"]
    outcome = run(*arguments, log_folder=tmp_path)
    assert outcome.exit_codes == [2]
    assert "DATA.IMG_SIZE=40, but the config has 48; this key cannot change on resume" in outcome.output
    assert "Traceback" not in outcome.output


def test_the_error_for_a_config_of_a_different_model_mentions_the_model_of_the_checkpoint(trained, toy_data, tmp_path):
    path = copy_run(trained, tmp_path / "run")
    arguments = ["--cfg", CONFIGS / "flatten_pvt_v2_b0.yaml", "--eval", "--resume", path, "--data-path", toy_data]
    outcome = run(*arguments, "--opts", "MODEL.NUM_CLASSES", "3", log_folder=tmp_path)
    assert outcome.exit_codes == [2]
    assert "the file contains the config of toy" in outcome.output


def test_the_log_reports_processes_epochs_updates_and_used_images(toy_config, toy_data, tmp_path):
    options = ["TRAIN.EPOCHS=1", "TRAIN.WARMUP_EPOCHS=0", "TRAIN.COOLDOWN_EPOCHS=1", "EMA.ENABLED=True", "EMA.DECAY=0.9"]
    outcome = run("--cfg", toy_config, "--data-path", toy_data, "--output", tmp_path, "--opts", *options, log_folder=tmp_path)
    assert outcome.exit_codes == [0], outcome.output
    assert "1 process on cpu" in outcome.output
    assert f"\n  torch: {torch.__version__}\n" in outcome.output  # a block of short lines
    assert "epochs: 2 (1 + 1 cooldown), updates per epoch: 12, images used per epoch: 96 of 102" in outcome.output
    positions = re.findall(r"epoch (\d/\d) \[(\d+)/12\] loss", outcome.output)
    expected = [("1/2", 1)] + [(epoch, done) for epoch in ("1/2", "2/2") for done in range(2, 13, 2)]
    assert [(epoch, int(done)) for epoch, done in positions] == expected
    assert re.search(r"best Acc@1 [\d.]+ \((raw|ema) weights, epoch [12]/2\)", outcome.output)
    assert re.search(r"epoch 1/2 \[12/12\].* ETA 0:00:\d\d \+ 2 evaluations\n", outcome.output)
    assert re.search(r"epoch 2/2 \[12/12\].* ETA 0:00:\d\d\n", outcome.output)  # with the evaluation, of known duration
    assert not re.search(r"[\r\x1b]", outcome.output)  # no progress bar and no colours
    assert "Acc@5" not in outcome.output  # with three classes, every top-5 prediction is correct
    assert "sha256" not in outcome.output
    assert "ATTN_TYPE" not in outcome.output  # the config is only in the log file
    assert "averages over about" not in outcome.output  # no warning: the EMA averages over 10 of the 24 updates


def test_the_batch_size_warning_is_logged_once_and_its_advice_is_valid(toy_config, toy_data, tmp_path):
    arguments = ["--cfg", toy_config, "--data-path", toy_data, "--output", tmp_path, "--check", "--batch-size", "4"]
    outcome = run(*arguments, log_folder=tmp_path, processes=2)
    assert outcome.exit_codes == [0, 0], outcome.output
    assert outcome.output.count("recipe: global batch size 64") == 1
    assert "add --opts DATA.GLOBAL_BATCH_SIZE 64" in _batch_advice(64, 8, 102)
    assert "too few for the recipe's batch" in _batch_advice(1024, 8, 102)
    assert "--batch-size times the number of processes divides 64" in _batch_advice(64, 24, 1000)


def test_a_check_measures_data_loading_for_a_dataset_of_one_batch(toy_config, toy_data, tmp_path):
    arguments = ["--cfg", toy_config, "--data-path", toy_data, "--output", tmp_path, "--check", "--batch-size", "102"]
    outcome = run(*arguments, log_folder=tmp_path)
    assert outcome.exit_codes == [0], outcome.output
    assert "loading alone:" in outcome.output


def test_a_check_of_a_small_dataset_omits_eta_and_accuracy(toy_config, toy_data, tmp_path):
    arguments = ["--cfg", toy_config, "--data-path", toy_data, "--output", tmp_path, "--check"]
    outcome = run(*arguments, log_folder=tmp_path)
    assert outcome.exit_codes == [0], outcome.output
    assert "ETA" not in outcome.output
    assert "-1:" not in outcome.output  # no negative duration
    assert "Acc@1" not in outcome.output  # one batch is too small for an accuracy


@pytest.mark.parametrize(
    ("decay", "num_updates", "warned"), [(0.998, 72, True), (0.9, 72, False), (0.9999, 300 * 1251, False), (0.9999, 9999, True)]
)
def test_a_warning_is_logged_if_the_ema_averages_over_more_updates_than_the_run_has(
    decay, num_updates, warned, toy_config, caplog
):
    cfg = load_config(toy_config, ["EMA.DECAY", decay])
    with caplog.at_level(logging.WARNING):
        warn_about_ema(cfg, num_updates, World(0, 0, 1, torch.device("cpu")))
    assert bool(caplog.records) == warned


def test_the_number_of_loader_workers_is_limited_to_the_cores_of_the_process(toy_config):
    cfg = load_config(toy_config, ["DATA.NUM_WORKERS", 8])
    assert [build_num_workers(cfg, num_cores) for num_cores in (1, 6, 8, 64)] == [1, 6, 8, 8]
    assert build_num_workers(load_config(toy_config), 6) == 0  # NUM_WORKERS 0
    cfg = load_config(toy_config, ["DATA.NUM_WORKERS", -1])  # the default
    assert [build_num_workers(cfg, num_cores) for num_cores in (1, 2, 8, 64)] == [1, 1, 7, 16]


@pytest.mark.parametrize(
    ("processes", "expected"),
    [
        ([range(6)], [6]),
        ([range(64)] * 8, [8] * 8),  # torchrun: every process may use all cores
        ([range(8 * rank, 8 * rank + 8) for rank in range(8)], [8] * 8),  # srun --cpus-per-task=8
        ([range(32)] * 4 + [range(32, 64)] * 4, [8] * 8),  # bound to one of two sockets
        ([range(2)] * 8, [1] * 8),  # fewer cores than processes
        ([range(7)] * 3, [2] * 3),
        ([range(4), range(2, 6)], [3, 3]),  # two cores in common
    ],
)
def test_processes_share_the_cores_that_they_have_in_common(processes, expected):
    cores = [Cores("one", frozenset(numbers)) for numbers in processes]
    other_machine = [Cores("other", frozenset(range(64)))] * 5
    assert [count_cores(own, cores + other_machine) for own in cores] == expected


# --- The command line


def run_python(*arguments):
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--help"], 0, "usage: main.py"),
        ([], 2, "--cfg is missing"),
        (["--cfg", "configs/flatten_swin_t.yaml"], 2, "DATA.DATA_PATH is empty"),
    ],
)
def test_help_and_errors_of_the_command_line_import_neither_torch_nor_numpy(arguments, status, message):
    """``tests/test_early_checks.py`` has the other errors."""
    program = (
        "import sys, runpy; sys.argv = ['main.py', *{arguments!r}]\n"
        "try: runpy.run_path('main.py', run_name='__main__')\n"
        "finally: print('imported', [name for name in ('torch', 'timm', 'numpy') if name in sys.modules])"
    )
    done = run_python("-c", program.format(arguments=arguments))
    assert done.returncode == status, done.stderr
    assert message in done.stdout + done.stderr
    assert "imported []" in done.stdout


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("plot_curves docs --png x.png", "docs contains no runs <model>/<arm>_<seed>/metrics.jsonl"),
        ("plot_curves docs --png none/x.png", "--png none/x.png: cannot be written"),
        ("plot_curves docs docs --png x.png", "docs contains no metrics.jsonl"),
        ("plot_curves docs/focus.md --png x.png", "docs/focus.md: expected a CSV file with the columns arm,seed,epoch"),
        ("trace_focus docs --png x.png", "docs is a directory of runs, which needs --images and --csv"),
        ("summarise docs", "docs contains no eval.json"),
        ("benchmark", "the following arguments are required: mode"),
        ("benchmark attention --rounds 0", "--rounds 0: must be at least 1"),
        ("benchmark attention --tokens 49 0", "--tokens 0: must be at least 1"),
        ("benchmark traffic flatten_pvt_t --batch-size 0", "--batch-size 0: must be at least 1"),
        ("make_digits x --size 0", "--size 0: must be at least 1"),
        ("make_digits docs/focus.md", "Not a directory: 'docs/focus.md/val/0'"),
        ("plot_curves docs --png x.csv", "--png x.csv: matplotlib cannot write this format; give a name that ends with .png"),
        ("benchmark model flaten_swin_t", "flaten_swin_t: unknown model; choose among flatten_cswin_b"),
        ("benchmark attention --tokens 200", "--tokens 200: give a square number, such as 196"),
        ("benchmark data --images none.jpg", "none.jpg: no such file or directory"),
        ("benchmark epoch --cfg configs/small.yaml --data-path none", "no training split"),
        ("predict none.jpg --resume x", "none.jpg: no such file or directory"),
        ("predict docs --resume x --top-k 0", "--top-k 0: must be at least 1"),
        ("evaluate_all x.pth --data-path none --csv x.csv", "--data-path none: no such directory; correct the path"),
        ("evaluate_all x.pth --data-path docs --csv x.csv --batch-size 0", "--batch-size 0: must be at least 1"),
        ("evaluate_all x.pth --data-path docs --csv x.csv --opts DATA.DATA_PATH docs", "would replace every data set; remove"),
        ("evaluate_all x.pth --data-path docs --csv x.csv --cfg none.yaml", "none.yaml: no config has this name"),
        ("average_checkpoints x.pth --output y.pth", "x.pth: only one checkpoint; give two or more to average"),
    ],
)
def test_scripts_report_invalid_arguments_without_a_traceback(command, message, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, *arguments = command.split()
    outcome = run_script(import_module(f"scripts.{script}"), arguments, tmp_path / "log")
    assert outcome.exit_codes == [2]
    assert f"{script}.py: error: " in outcome.output
    assert message in outcome.output
    assert "Traceback" not in outcome.output


def test_scripts_can_be_started_by_their_path():
    done = run_python("scripts/plot_curves.py", "docs", "--png", "x.png")
    assert done.returncode == 2
    assert "docs contains no runs <model>/<arm>_<seed>/metrics.jsonl" in done.stderr


def test_a_warning_is_logged_if_a_gpu_run_keeps_its_ema_in_host_memory(toy_config, caplog):
    cfg = load_config(toy_config, ["EMA.FORCE_CPU", True])
    for device, expected in (("cpu", 0), ("cuda", 1)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            warn_about_ema(cfg, 10**6, World(0, 0, 1, torch.device(device)))
        assert sum("EMA.FORCE_CPU copies all weights" in record.message for record in caplog.records) == expected


def test_throughput_reports_the_model_and_the_device(toy_config, tmp_path):
    outcome = run("--cfg", toy_config, "--throughput", log_folder=tmp_path)
    assert outcome.exit_codes == [0], outcome.output
    assert "toy at 40 x 40 on CPU" in outcome.output
    assert re.search(r"images/s, [0-9.]+ ms per batch, float32", outcome.output)


def test_choose_config_requires_cfg_for_weights_without_a_config(tmp_path):
    torch.save({"weight": torch.ones(1)}, tmp_path / "bare.pth")
    with pytest.raises(ConfigError, match="give its training config with --cfg"):
        choose_config(open_checkpoint(tmp_path / "bare.pth"), None)
