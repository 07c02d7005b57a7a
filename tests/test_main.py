"""Runs of main.py: training, resuming after SIGKILL, evaluation, fine-tuning, and rejected arguments."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine.run_directory import RunRecord, write_record
from jobs.evaluate import choose_reference
from jobs.initialization import choose_initialization
from models.checkpoints.reader import read_checkpoint
from tests.conftest import write_images
from tests.launch import run_main
from tests.parquet import write_parquet, write_parquet_copy
from tests.runs import assert_equal, newest_update, read_state, run_state, toy_arguments
from utils.config.arguments import check_usage, overrides, parse_arguments
from utils.config.loading import load_config
from utils.distributed import World
from utils.errors import ConfigError
from utils.run_files import LOCK, list_checkpoints

ROOT = Path(__file__).parent.parent
CLASSES = ["class0", "class1", "class2"]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_in_mid_epoch_ends_bit_equal_to_an_uninterrupted_run(
    processes, workers, uninterrupted, toy_config, toy_data, tmp_path
):
    expected = uninterrupted(processes)
    options = ["SAVE_STEPS", 2, "DATA.BATCH_SIZE", 8 // processes, "DATA.NUM_WORKERS", workers]
    arguments = toy_arguments(toy_config, toy_data, tmp_path, *options)
    folder = tmp_path / "toy" / "default"

    def in_mid_epoch() -> bool:  # an epoch has 12 updates
        newest = list_checkpoints(folder)
        return bool(newest) and int(newest[0].stem.split("_")[1]) in (14, 16, 18, 20)

    killed = run_main(arguments, tmp_path / "log", processes=processes, kill_when=in_mid_epoch)
    assert killed.exit_codes == [-9] * processes
    resumed = run_main(arguments, tmp_path / "log", processes=processes)
    assert set(resumed.exit_codes) == {0}, resumed.output
    assert "resumed after update" in resumed.output
    assert_equal(read_state(folder), read_state(expected))
    assert read_metrics(folder) == read_metrics(expected)


def test_a_run_with_other_optimizer_schedule_loss_and_sampling_killed_in_mid_epoch_ends_bit_equal(toy_config, tmp_path):
    data, states = tmp_path / "data", []
    for split, per_class in (("train", 34), ("val", 4)):
        write_images(data, split, classes=3, per_class=per_class)
    for position in range(6, 34):
        (data / f"train/class1/{position:03d}.png").unlink()
    options = ["TRAIN.OPTIMIZER.NAME", "lamb", "TRAIN.LOSS", "bce", "TRAIN.CLASS_WEIGHTS", "[1.0, 2.0, 0.5]"]
    options += ["DATA.SAMPLING", "balanced", "TRAIN.LR_SCHEDULER.NAME", "multistep", "TRAIN.LR_SCHEDULER.MILESTONES", "[1]"]
    options += ["SAVE_STEPS", 2, "DATA.NUM_WORKERS", 2, "TRAIN.EPOCHS", 2]
    for name in ("whole", "killed"):
        folder = tmp_path / name / "toy/default"
        arguments = toy_arguments(toy_config, data, tmp_path / name, *options)

        def in_mid_epoch(folder=folder) -> bool:  # an epoch has 9 updates
            return newest_update(folder) in (11, 13, 15)

        if name == "killed":
            killed = run_main(arguments, tmp_path / "log", kill_when=in_mid_epoch)
            assert killed.exit_codes == [-9]
        outcome = run_main(arguments, tmp_path / "log")
        assert outcome.exit_codes == [0], outcome.output
        assert "DATA.SAMPLING=balanced: an image of the rarest class occurs up to 5 times per epoch" in outcome.output
        assert "images used per epoch: about 54 of 74" in outcome.output  # 72 / 3 of two classes, and all 6 of the third
        states.append(read_state(folder))
    assert "resumed after update" in outcome.output
    assert_equal(*states)


def test_a_run_on_parquet_shards_resumed_after_sigkill_ends_with_the_state_of_a_run_on_directories(
    uninterrupted, toy_config, toy_data, tmp_path
):
    """The shards have the same images in the same order. After the run, changed shards are refused."""
    root, folder = write_parquet_copy(toy_data, tmp_path / "hub"), tmp_path / "toy/default"
    options = ["SAVE_STEPS", 2, "DATA.BATCH_SIZE", 8, "DATA.NUM_WORKERS", 2]
    arguments = toy_arguments(toy_config, root, tmp_path, *options)
    killed = run_main(arguments, tmp_path / "log", kill_when=lambda: len(list_checkpoints(folder)) == 2)
    assert killed.exit_codes == [-9]
    shard = root / "data/train-00001-of-00002.parquet"
    shard.rename(tmp_path / "shard")
    write_parquet(shard, [(b"x", f"{number % 34:03d}.png", number // 34) for number in range(51, 102)], CLASSES)
    changed = run_main(arguments, tmp_path / "log")
    assert changed.exit_codes == [2]
    assert "class class1 has the same number of images, but" in changed.output
    (tmp_path / "shard").rename(shard)
    resumed = run_main(arguments, tmp_path / "log")
    assert resumed.exit_codes == [0], resumed.output
    assert "resumed after update" in resumed.output
    state, expected = (read_state(path) for path in (folder, uninterrupted(1)))
    assert_equal(state | {"data": None}, expected | {"data": None})
    assert read_metrics(folder) == read_metrics(uninterrupted(1))


def read_metrics(folder: Path) -> list[tuple]:
    """Metrics of a run, except times, in the order of the file."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "kind", "epoch", "loss", "lr", "grad_norm", "correct1", "correct5", "num_images")
    return [tuple(record.get(name) for name in names) for record in records]


# Kind of damage -> function that damages the checkpoint at the given path.
DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "changed byte": lambda path: path.write_bytes(path.read_bytes()[:-3000] + b"\xff" + path.read_bytes()[-2999:]),
    "empty": lambda path: path.write_bytes(b""),
    "directory": lambda path: (path.unlink(), path.mkdir()),
    "dangling link": lambda path: (path.unlink(), path.symlink_to("gone")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_with_a_damaged_newest_checkpoint_resumes_from_the_previous_one(
    damage, uninterrupted, toy_config, toy_data, tmp_path
):
    """The resumed run ends bit-equal to an uninterrupted run, and renames the damaged file (R13 in docs/reliability.md)."""
    folder, processes = tmp_path / "toy/default", 1
    arguments = toy_arguments(toy_config, toy_data, tmp_path, "SAVE_STEPS", 2, "DATA.BATCH_SIZE", 8)
    killed = run_main(arguments, tmp_path / "log", kill_when=lambda: len(list_checkpoints(folder)) == 2, processes=processes)
    assert killed.exit_codes == [-9]
    newest, previous = list_checkpoints(folder)[:2]
    DAMAGES[damage](newest)
    resumed = run_main(arguments, tmp_path / "log")
    assert resumed.exit_codes == [0], resumed.output
    assert f"{newest.name}: damaged, renamed to {newest.name}.damaged" in resumed.output
    assert f"start: resume {previous}" in resumed.output
    assert os.path.lexists(f"{newest}.damaged")
    assert_equal(read_state(folder), read_state(uninterrupted(1)))


def test_resuming_from_the_checkpoint_of_another_run_resets_the_best_accuracy(uninterrupted, toy_config, toy_data, tmp_path):
    newest = list_checkpoints(uninterrupted(1))[0]
    state = read_checkpoint(newest)
    torch.save(state | {"num_updates": 12, "best": state["best"] | {"acc1": 99.0, "num_updates": 6}}, tmp_path / "other.pth")
    arguments = toy_arguments(toy_config, toy_data, tmp_path, "SAVE_STEPS", 2, "DATA.BATCH_SIZE", 8)
    outcome = run_main([*arguments, "--resume", tmp_path / "other.pth"], tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    assert "the best accuracy is reset" in outcome.output
    assert "best Acc@1 99" not in outcome.output
    best = read_checkpoint(tmp_path / "toy/default/best.pth")
    assert best["best"]["num_updates"] == best["num_updates"]


def kill_processes_with_argument(folder: Path) -> None:
    """Send SIGKILL to every other process whose command line contains the path ``folder``."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (process / "cmdline").read_bytes() and int(process.name) != os.getpid():
                os.kill(int(process.name), 9)
        except (FileNotFoundError, ProcessLookupError):
            continue


def test_a_torchrun_job_resumed_after_sigkill_ends_bit_equal_to_an_uninterrupted_run(
    uninterrupted, toy_config, toy_data, tmp_path
):
    expected = uninterrupted(2)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "main.py"),
        *map(str, toy_arguments(toy_config, toy_data, tmp_path, "SAVE_STEPS", 2, "DATA.BATCH_SIZE", 4)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    folder = tmp_path / "toy" / "default"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True, stdin=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 120
        while process.poll() is None and len(list_checkpoints(folder)) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(process.pid, 9)  # kills only the launcher: each worker has its own session
        process.wait()
        kill_processes_with_argument(tmp_path)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed after update" in done.stdout
    assert "leaked" not in done.stdout + done.stderr  # by Triton, if Python's own exit destroys its objects
    assert_equal(read_state(folder), read_state(expected))


def test_rerunning_a_finished_run_changes_no_file(uninterrupted, toy_config, toy_data, tmp_path):
    shutil.copytree(uninterrupted(1), tmp_path / "toy" / "default")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in (tmp_path / "toy").rglob("*")}
    arguments = toy_arguments(toy_config, toy_data, tmp_path)
    outcome = run_main(arguments, tmp_path / "log")
    assert outcome.exit_codes == [0]
    assert "this run is finished" in outcome.output
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in (tmp_path / "toy").rglob("*")}


@pytest.fixture(scope="session")
def evaluation_counts(uninterrupted, toy_config, toy_data, tmp_path_factory):
    """Return a function that evaluates a checkpoint with a given number of processes and batch size, and returns the counts."""
    checkpoint = uninterrupted(1) / "best.pth"

    def run(processes: int, batch_size: int) -> dict:
        output = tmp_path_factory.mktemp("evaluated")
        arguments = [*toy_arguments(toy_config, toy_data, output), "--batch-size", batch_size]
        outcome = run_main([*arguments, "--eval", "--resume", checkpoint], output / "log", processes=processes)
        assert set(outcome.exit_codes) == {0}, outcome.output
        results = json.loads((output / "toy/default/eval.json").read_text())["results"]
        return {label: [result[key] for key in ("correct1", "correct5", "num_images")] for label, result in results.items()}

    return run


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_counts_are_the_same_for_any_number_of_processes_and_batch_size(
    processes, batch_size, evaluation_counts, uninterrupted
):
    records = [json.loads(line) for line in (uninterrupted(1) / "metrics.jsonl").read_text().splitlines()]
    best = max((r for r in records if r["kind"].startswith("eval")), key=lambda r: (r["acc1"], r["step"]))
    measured = evaluation_counts(processes, batch_size)
    assert set(measured) == {"raw", "ema"}
    for label, (correct1, correct5, num_images) in measured.items():
        reported = next(r for r in records if r["kind"] == f"eval_{label}" and r["step"] == best["step"])
        assert (correct1, correct5, num_images) == (reported["correct1"], reported["correct5"], 33)


def test_evaluation_writes_only_result_files_and_ends_with_the_accuracy_line(uninterrupted, toy_config, toy_data, tmp_path):
    folder = tmp_path / "toy" / "default"
    shutil.copytree(uninterrupted(1), folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    arguments = toy_arguments(toy_config, toy_data, tmp_path)
    outcome = run_main([*arguments, "--eval", "--resume", folder / "best.pth"], tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    written = {"eval.json", "eval_classes.csv", "confusion.png"}
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir() if path.name not in written} == before
    assert written <= {path.name for path in folder.iterdir()}
    last = outcome.output.strip().splitlines()[-1]
    assert last.split("] ")[-1].startswith(" * Acc@1 ")
    result = json.loads((folder / "eval.json").read_text())
    assert result["preprocessing"]["img_size"] == 40
    assert len(result["sha256"]) == 64


def test_fine_tuning_at_a_higher_resolution_resizes_the_pretrained_weights(uninterrupted, toy_config, toy_data, tmp_path):
    arguments = toy_arguments(toy_config, toy_data, tmp_path, "DATA.IMG_SIZE", 56, "TRAIN.EPOCHS", 1)
    outcome = run_main([*arguments, "--pretrained", uninterrupted(1) / "best.pth"], tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    assert "resized" in outcome.output
    assert "start: pretrained" in outcome.output


def test_a_non_finite_loss_ends_the_run_and_keeps_the_checkpoint_of_the_previous_update(toy_config, toy_data, tmp_path):
    options = ["TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0, "SAVE_STEPS", 1, "TRAIN.BASE_LR", 1e20, "TRAIN.CLIP_GRAD", 0]
    outcome = run_main(toy_arguments(toy_config, toy_data, tmp_path, *options), tmp_path / "log", processes=2)
    assert set(outcome.exit_codes) == {1}, outcome.output
    assert "at update" in outcome.output
    saved = [read_checkpoint(path)["num_updates"] for path in list_checkpoints(tmp_path / "toy" / "default")]
    assert saved == [1]  # the first update uses the initial weights; the loss of the second one is not finite


def test_a_non_finite_loss_is_reported_although_the_replay_file_cannot_be_written(toy_config, toy_data, tmp_path):
    """A directory at its path prevents that; it is beside the files of a run that was killed before its first checkpoint."""
    folder = tmp_path / "toy/default"
    (folder / "replay_000000001.pth").mkdir(parents=True)
    write_record(folder, RunRecord("a", has_saved=False))
    options = ["TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0, "TRAIN.BASE_LR", 1e20, "TRAIN.CLIP_GRAD", 0, "DATA.NUM_WORKERS", 2]
    outcome = run_main(toy_arguments(toy_config, toy_data, tmp_path, *options), tmp_path / "log", processes=2)
    assert set(outcome.exit_codes) == {1}, outcome.output
    assert "the loss is nan" in outcome.output
    assert "The file for --replay could not be written ([Errno 21] Is a directory" in outcome.output


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--data-pth", "x"], "did you mean --data-path"),
        (["--opts", "TRAIN.EPOCH", "3"], "did you mean TRAIN.EPOCHS"),
        (["--opts", "TRAIN.EPOCHS"], "has no value"),
        (["--eval"], "no weights to evaluate"),
        (
            ["--eval", "--resume", "flatten_swin_t", "--opts", "TEST.CLASS_MAP", "nowhere"],
            "TEST.CLASS_MAP=nowhere: no such file",
        ),
        (["--eval", "--resume", "flatten_swin_t", "--opts", "TEST.REAL_LABELS", "imagenet"], "imagenet: no such file"),
        (["--model-ema", "--no-model-ema"], "give only one of them"),
        (["--eval", "--check"], "--eval and --check: give only one of them"),
        (["--replay", "x.pth"], "--replay: uses the config stored in the replay file; leave out --cfg"),
        (["--opts", "TEST.PREDICTIONS", "True"], "has an effect only with --eval"),
        (["--opts", "TEST.TTA", "flip"], "TEST.TTA=flip has an effect only with --eval; add --eval, or remove the key"),
        (["--eval", "--resume", "."], "is a directory without best.pth"),
        (["--resume", "nowhere.pth"], "no such file"),
        (["--data-path", "nowhere"], "no such directory"),
        (["--data-path", "~nobody-of-this-name/data"], "no such directory"),
        (["--resume", "~nobody-of-this-name/x.pth"], "no such file"),
        (["--opts", "TRAIN.TEACHER", "~nobody-of-this-name/x.pth"], "no such file"),
        (["--opts", "MODEL.NUM_CLASSES", "4"], "add --opts MODEL.NUM_CLASSES 3"),
        (["--batch-size", "2000"], "add --batch-size 16"),
        (["--batch-size", "0"], "DATA.BATCH_SIZE=0"),
        (["--zip"], "no zip archive named train. Found train/: leave out --zip"),
        (["--cache-mode", "full"], "add --zip"),
        (["--pretrained", "nowhere.pth"], "no such file"),
        (["--opts", "MODEL.LA.ATTN_TYPE", "LLSS"], "each of the 3 stages"),
        (["--opts", "MODEL.LA.KIND", "fokused"], "choose one of focused"),
        (["--opts", "MODEL.TYPE", "flaten_swin"], "did you mean 'flatten_swin'"),
        (["--opts", "AUG.AUTO_AUGMENT", "foo"], "not a timm policy"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_arguments_are_rejected_with_exit_status_2_and_without_a_traceback(
    arguments, expected, toy_config, toy_data, tmp_path
):
    outcome = run_main([*toy_arguments(toy_config, toy_data, tmp_path), *arguments], tmp_path / "log")
    assert outcome.exit_codes == [2], outcome.output
    assert expected in outcome.output
    assert "Traceback" not in outcome.output


def test_losses_are_the_same_for_any_number_of_processes_and_accumulation_steps(toy_config, toy_data, tmp_path):
    """The global batch size is fixed and random operations are disabled, so the losses agree up to rounding."""
    no_randomness = ["TRAIN.EPOCHS", 1, "MODEL.DROP_PATH_RATE", 0, "MODEL.DROP_RATE", 0, "AUG.MIXUP", 0, "AUG.CUTMIX", 0]
    runs = {}
    for processes, batch_size in ((1, 8), (2, 4), (1, 4), (2, 2)):
        output = tmp_path / f"{processes} x {batch_size}"
        output.mkdir()
        opts = [*no_randomness, "DATA.BATCH_SIZE", batch_size, "DATA.GLOBAL_BATCH_SIZE", 8, "PRINT_FREQ", 1]
        outcome = run_main(toy_arguments(toy_config, toy_data, output, *opts), output / "log", processes=processes)
        assert set(outcome.exit_codes) == {0}, outcome.output
        records = [json.loads(line) for line in (output / "toy/default/metrics.jsonl").read_text().splitlines()]
        runs[output.name] = [value for r in records if r["kind"] == "train" for value in (r["loss"], r["lr"])]
    first, *others = runs.values()
    assert len(first) == 2 * 12
    for other in others:
        assert other == pytest.approx(first, rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--batch-size", "4"], "was saved with a global batch size of 8, but it is now 4"),
        (["--opts", "TRAIN.OPTIMIZER.NAME", "sgd"], "sgd cannot load this optimizer state"),
        (["--opts", "MODEL.NUM_CLASSES", "2"], "cannot change on resume"),
        (["--opts", "TRAIN.AUTO_RESUME", "False"], "would then contain files of two runs"),
        (["--opts", "TRAIN.LAYER_DECAY", "0.8", "TRAIN.EPOCHS", "9"], "TRAIN.LAYER_DECAY was 1.0 and is 0.8 now"),
    ],
    ids=["batch size", "optimizer", "classes", "auto-resume", "parameter groups"],
)
def test_arguments_that_conflict_with_the_existing_run_are_rejected_and_no_file_changes(
    arguments, expected, uninterrupted, toy_config, toy_data, tmp_path
):
    folder = tmp_path / "toy" / "default"
    shutil.copytree(uninterrupted(1), folder)
    (folder / LOCK).unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    outcome = run_main([*toy_arguments(toy_config, toy_data, tmp_path), *arguments], tmp_path / "log")
    assert outcome.exit_codes == [2], outcome.output
    assert expected in outcome.output
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_run_resumes_although_its_pretrained_file_is_missing(uninterrupted, toy_config, toy_data, tmp_path):
    shutil.copytree(uninterrupted(1), tmp_path / "toy" / "default")
    arguments = toy_arguments(toy_config, toy_data, tmp_path, "TRAIN.EPOCHS", 4, "SAVE_STEPS", 2)
    outcome = run_main([*arguments, "--pretrained", tmp_path / "gone.pth"], tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    assert "resumed after update 36" in outcome.output


def test_an_unreadable_training_image_ends_all_processes_and_the_error_contains_its_path(toy_config, tmp_path):
    for split in ("train", "val"):
        write_images(tmp_path, split, classes=3, per_class=10)
    (tmp_path / "train/class1/004.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    arguments = toy_arguments(toy_config, tmp_path, tmp_path / "output", "DATA.NUM_WORKERS", 1, "DATA.BATCH_SIZE", 2)
    outcome = run_main(arguments, tmp_path / "log", processes=2, timeout=60)
    assert 0 not in outcome.exit_codes
    assert "class1/004.png: not a readable image" in outcome.output


@pytest.mark.parametrize("policy", ["skip", "replace"])
def test_processes_stay_synchronised_when_one_of_them_reads_an_unreadable_image(policy, toy_config, tmp_path):
    for split in ("train", "val"):
        write_images(tmp_path, split, classes=3, per_class=8)
    (tmp_path / "train/class1/004.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    options = ["DATA.UNREADABLE", policy, "DATA.BATCH_SIZE", 4, "TRAIN.EPOCHS", 2, "DATA.NUM_WORKERS", 1]
    arguments = toy_arguments(toy_config, tmp_path, tmp_path / "output", *options)
    outcome = run_main(arguments, tmp_path / "log", processes=2, timeout=60)
    assert outcome.exit_codes == [0, 0], outcome.output
    assert "class1/004.png: not a readable image" in outcome.output
    assert "Unreadable images so far: 1" in outcome.output


# File names: the value of --resume, the value of --pretrained, and the newest checkpoint in the output directory.
RESUMED, WEIGHTS, NEWEST = "resumed.pth", "weights.pth", "checkpoint_000000007.pth"
TWO_RUNS = ("refused", "of two runs")
REFUSED = ("refused", "give only one of --resume and --pretrained")


@pytest.mark.parametrize(
    ("resume", "pretrained", "auto_resume", "evaluating", "expected"),
    [
        (False, False, False, False, TWO_RUNS),
        (False, False, False, True, ("refused", "no weights to evaluate")),
        (False, False, True, False, ("resume", NEWEST)),
        (False, False, True, True, ("refused", "no weights to evaluate")),
        (False, True, False, False, TWO_RUNS),
        (False, True, False, True, ("evaluate", WEIGHTS)),
        (False, True, True, False, ("resume", NEWEST)),
        (False, True, True, True, ("evaluate", WEIGHTS)),
        (True, False, False, False, TWO_RUNS),
        (True, False, False, True, ("evaluate", RESUMED)),
        (True, False, True, False, TWO_RUNS),
        (True, False, True, True, ("evaluate", RESUMED)),
        (True, True, False, False, REFUSED),
        (True, True, False, True, REFUSED),
        (True, True, True, False, REFUSED),
        (True, True, True, True, REFUSED),
    ],
)
def test_resume_precedes_auto_resume_which_precedes_pretrained(
    toy_config, tmp_path, monkeypatch, resume, pretrained, auto_resume, evaluating, expected
):
    """The output directory contains a checkpoint. The next test covers an output directory without checkpoints."""
    folder = tmp_path / "toy" / "default"
    folder.mkdir(parents=True)
    torch.save(run_state(num_updates=7), folder / NEWEST)
    for name in (RESUMED, WEIGHTS):
        torch.save(run_state(num_updates=9), tmp_path / name)
    arguments = ["--cfg", str(toy_config), "--output", str(tmp_path), "--data-path", str(tmp_path)]
    arguments += ["--resume", str(tmp_path / RESUMED)] * resume + ["--pretrained", str(tmp_path / WEIGHTS)] * pretrained
    arguments += ["--eval"] * evaluating + ["--opts", "TRAIN.AUTO_RESUME", str(auto_resume)]
    monkeypatch.setattr(sys, "argv", ["main.py", *arguments])

    def decide():
        args = parse_arguments("")
        cfg = load_config(args.cfg, overrides(args))
        check_usage(args, cfg)
        return ("evaluate", choose_reference(args, cfg)) if args.eval else choose_initialization(cfg, WORLD)

    if expected[0] == "refused":
        with pytest.raises(ConfigError, match=expected[1]):
            decide()
    else:
        kind, path, *_ = decide()
        assert (kind, Path(path).name) == expected


WORLD = World(0, 0, 1, torch.device("cpu"))


@pytest.mark.parametrize(("pretrained", "expected"), [(False, "scratch"), (True, "pretrained")])
def test_auto_resume_without_checkpoints_starts_from_scratch_or_pretrained_weights(toy_config, tmp_path, pretrained, expected):
    (tmp_path / WEIGHTS).write_bytes(b"")
    opts = ["OUTPUT", str(tmp_path), "MODEL.PRETRAINED", str(tmp_path / WEIGHTS) if pretrained else ""]
    assert choose_initialization(load_config(toy_config, opts), WORLD).kind == expected


def test_a_class_missing_in_val_is_rejected(toy_config, tmp_path):
    write_images(tmp_path, "train", classes=3, per_class=2)
    write_images(tmp_path, "val", classes=2, per_class=2)
    outcome = run_main(toy_arguments(toy_config, tmp_path, tmp_path / "output"), tmp_path / "log")
    assert outcome.exit_codes == [2]
    assert "the validation split lacks class2" in outcome.output


@pytest.mark.parametrize(
    "options", [["AMP", True, "AMP_DTYPE", "bf16"], ["AMP", True, "AMP_DTYPE", "fp16"]], ids=["bf16", "fp16"]
)
def test_weights_stay_finite_in_mixed_precision_with_accumulation_and_gradient_checkpointing(
    options, toy_config, toy_data, tmp_path
):
    arguments = toy_arguments(toy_config, toy_data, tmp_path, *options, "TRAIN.ACCUMULATION_STEPS", 2)
    outcome = run_main([*arguments, "TRAIN.USE_CHECKPOINT", True], tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    state = read_checkpoint(list_checkpoints(tmp_path / "toy/default")[0])
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    assert bool(state["scaler"]) == ("fp16" in options)


def test_repeated_cfg_and_opts_flags_add_values_and_later_values_take_precedence(toy_config, tmp_path, monkeypatch):
    other = tmp_path / "other.yaml"
    other.write_text("TRAIN: {EPOCHS: 7}\nPRINT_FREQ: 9\n")
    command = ["main.py", "--cfg", str(toy_config), "--cfg", str(other)]
    monkeypatch.setattr(sys, "argv", [*command, "--opts", "SAVE_FREQ", "5", "PRINT_FREQ", "3", "--opts", "PRINT_FREQ", "4"])
    args = parse_arguments("")
    cfg = load_config(args.cfg, overrides(args))
    assert (cfg.MODEL.NAME, cfg.TRAIN.EPOCHS, cfg.SAVE_FREQ, cfg.PRINT_FREQ) == ("toy", 7, 5, 4)
