"""Checkpoints and resume after kills, full disks and damaged files (rows E3, G1 and most R rows of docs/reliability.md)."""

import builtins
import json
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import engine.checkpoint_writer
import engine.evaluation
import engine.saver
import engine.trainer
from data.datasets import ImageDataset
from engine.checkpoint_writer import link_best, link_top, remove_surplus, save_checkpoint
from engine.run_contents import survey
from models.checkpoints.reader import CheckpointError, read_checkpoint, sha256
from tests.conftest import write_images
from tests.engine.test_checkpoint import toy
from tests.launch import run_main
from tests.reliability.test_signals import call_before
from tests.runs import assert_equal, read_state, run_state, toy_arguments
from utils.run_files import BEST, checkpoint_path, list_checkpoints

pytestmark = pytest.mark.reliability


# --- Kills


@pytest.mark.parametrize("num_kills", [pytest.param(3, id="3 kills"), pytest.param(25, id="25 kills", marks=pytest.mark.slow)])
def test_r1_run_killed_at_random_times_equals_an_uninterrupted_run(num_kills, uninterrupted, toy_config, toy_data, tmp_path):
    expected = uninterrupted(2)
    arguments = toy_arguments(toy_config, toy_data, tmp_path, "SAVE_STEPS", 2, "DATA.BATCH_SIZE", 4)
    seed = int.from_bytes(os.urandom(4), "little")
    rng, kills = random.Random(seed), 0
    while kills < num_kills:
        kill_time = time.monotonic() + rng.uniform(0, 3)
        outcome = run_main(
            arguments,
            tmp_path / "log",
            processes=2,
            kill_when=lambda kill_time=kill_time: time.monotonic() > kill_time,
            timeout=60,
        )
        if -9 in outcome.exit_codes:
            kills += 1
        elif outcome.exit_codes == [0, 0]:  # the run finished before it was killed; the next iteration starts a new run
            assert_equal(read_state(tmp_path / "toy/default"), read_state(expected), f"seed {seed}")
            shutil.rmtree(tmp_path / "toy")
    outcome = run_main(arguments, tmp_path / "log", processes=2, timeout=60)
    assert outcome.exit_codes == [0, 0], f"seed {seed}: {outcome.output}"
    assert_equal(read_state(tmp_path / "toy/default"), read_state(expected), f"seed {seed}")


# Functions that save_and_kill counts as file operations.
FILE_OPERATIONS = [
    (builtins, "open"),
    (os, "fsync"),
    (os, "replace"),
    (os, "link"),
    (os, "open"),
    (os, "close"),
    (os, "unlink"),
    (Path, "unlink"),
]


def save_and_kill(folder: Path, number: int, state: dict, *, best: bool) -> bool:
    """Save ``state`` in a child process that is killed before its file operation ``number``, counted from 1.

    Args:
        best: also link the checkpoint as ``best.pth``, and as the only one of the KEEP_BEST best.

    Returns:
        True if the process was not killed, because it performed fewer than ``number`` file operations.
    """
    process = os.fork()
    if process == 0:
        count = 0

        def count_and_kill(original):
            def call(*arguments, **options):
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*arguments, **options)

            return call

        for module, name in FILE_OPERATIONS:
            setattr(module, name, count_and_kill(getattr(module, name)))
        path = checkpoint_path(folder, state["num_updates"])
        save_checkpoint(state, path)
        if best:
            link_best(path, folder / BEST)
            link_top(folder, [state["num_updates"]], newest=path)
        remove_surplus(folder, keep=1, newest=path)
        os._exit(0)
    _, status = os.waitpid(process, 0)
    return os.WIFEXITED(status)


def create_state(num_updates: int) -> dict:
    return run_state(num_updates=num_updates, best=num_updates) | {"model": toy().state_dict()}


def newest_usable(folder: Path) -> Path | None:
    """The checkpoint from which a run in this directory would resume; None if there is none."""
    return next((candidate.path for candidate in survey(folder).usable), None)


@pytest.mark.parametrize("first", [True, False], ids=["first save", "later save"])
def test_r2_r12_kill_at_any_file_operation_leaves_an_intact_checkpoint(first, tmp_path):
    """With KEEP_CHECKPOINTS 1, an intact checkpoint exists at every moment after the first save is complete.

    After a kill in a later save, the newest intact checkpoint is either the one being saved or the previous one.
    """
    for number in range(1, 100):
        folder = tmp_path / str(number)
        folder.mkdir()
        if not first:
            save_checkpoint(create_state(1), checkpoint_path(folder, 1))
        finished = save_and_kill(folder, number, create_state(2), best=False)
        newest = newest_usable(folder)
        if first and newest is None:
            assert not list_checkpoints(folder)  # killed before the first checkpoint was complete
        else:
            assert read_checkpoint(newest)["num_updates"] in (1, 2)
        if finished:
            break
        # The next save of the same run succeeds and removes incomplete files.
        save_checkpoint(create_state(3), checkpoint_path(folder, 3))
        remove_surplus(folder, keep=1, newest=checkpoint_path(folder, 3))
        assert [path.name for path in folder.iterdir()] == ["checkpoint_000000003.pth"]
    assert finished
    assert number > 6  # a kill was tested at 6 or more file operations


def test_r14_best_checkpoint_is_repaired_after_a_kill_at_any_file_operation(tmp_path):
    """After the repair, ``best.pth`` and ``top_<updates>.pth`` are the state that the newest checkpoint records as the best."""
    for number in range(1, 100):
        folder = tmp_path / str(number)
        folder.mkdir()
        save_checkpoint(create_state(1), checkpoint_path(folder, 1))
        link_best(checkpoint_path(folder, 1), folder / BEST)
        link_top(folder, [1], newest=checkpoint_path(folder, 1))
        finished = save_and_kill(folder, number, create_state(2), best=True)
        newest = newest_usable(folder)
        state = read_checkpoint(newest)
        found = engine.checkpoint_writer.find_best(folder, state, newest)
        if found != folder / BEST:
            engine.checkpoint_writer.restore_best(found, folder)
        best = read_checkpoint(folder / BEST)
        assert best["num_updates"] == best["best"]["num_updates"] == state["best"]["num_updates"]
        assert len(list(folder.glob("top_*.pth"))) > 0  # at any time, also before the repair
        link_top(folder, [state["num_updates"]], newest=newest)
        (top,) = folder.glob("top_*.pth")
        assert read_checkpoint(top)["num_updates"] == int(top.stem[4:]) == state["num_updates"]
        if finished:
            break
    assert finished
    assert number > 10  # a kill was tested at 10 or more file operations


def test_r14_resume_restores_best_pth_after_a_kill_between_save_and_link(uninterrupted, toy_config, toy_data, tmp_path):
    """The run is killed after the checkpoint is complete, but before ``best.pth`` is linked to it."""

    def prepare(rank: int) -> None:
        call_before(engine.saver, "link_best", 1, lambda: os.kill(os.getpid(), signal.SIGKILL))

    arguments = toy_arguments(toy_config, toy_data, tmp_path, "SAVE_STEPS", 2, "DATA.BATCH_SIZE", 8)
    folder = tmp_path / "toy/default"
    assert run_main(arguments, tmp_path / "log", prepare=prepare).exit_codes == [-9]
    assert not (folder / BEST).exists()
    outcome = run_main(arguments, tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    assert "best.pth: restored" in outcome.output
    expected = uninterrupted(1)
    assert_equal(read_state(folder), read_state(expected))
    assert read_checkpoint(folder / BEST)["num_updates"] == read_checkpoint(expected / BEST)["num_updates"]


# --- Errors and kills between two updates


def kill_when_saved(folder: Path) -> None:
    """Wait for the checkpoint of the first epoch, which is written in the background, and kill this process."""
    while not checkpoint_path(folder, 12).is_file():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def raise_error(_folder: Path) -> None:
    raise KeyError("injected")


R22_FAULTS = {"killed": kill_when_saved, "error": raise_error}


@pytest.mark.parametrize("fault", R22_FAULTS)
def test_r22_an_evaluation_that_fails_loses_no_update(fault, uninterrupted, toy_config, toy_data, tmp_path):
    """SAVE_STEPS and SAVE_MINUTES would save nothing before the first evaluation."""
    folder = tmp_path / "toy/default"

    def prepare(rank: int) -> None:
        call_before(engine.evaluation, "progress", 1, lambda: R22_FAULTS[fault](folder))

    arguments = toy_arguments(toy_config, toy_data, tmp_path, "DATA.BATCH_SIZE", 8, "DATA.NUM_WORKERS", 2)
    failed = run_main(arguments, tmp_path / "log", prepare=prepare)
    assert failed.exit_codes == [-9 if fault == "killed" else 1], failed.output
    (checkpoint,) = list_checkpoints(folder)
    state = read_checkpoint(checkpoint)
    assert (state["num_updates"], state["last_evaluation"]) == (12, 0)
    assert not (folder / BEST).exists()
    resumed = run_main(arguments, tmp_path / "log")
    assert resumed.exit_codes == [0], resumed.output
    assert_equal(read_state(folder), read_state(uninterrupted(1)))
    assert read_checkpoint(folder / BEST)["best"] == read_checkpoint(uninterrupted(1) / BEST)["best"]
    assert_one_point_per_step(folder)


def assert_one_point_per_step(folder: Path) -> None:
    """Metrics file and TensorBoard have every training step that was logged and every evaluation exactly once, in order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    points = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    for kind, tag, expected in (
        ("train", "Overview/training_loss", range(2, 37, 2)),
        ("eval_raw", "Overview/accuracy_raw", (12, 24, 36)),
        ("eval_ema", "eval_ema/loss", (12, 24, 36)),
    ):
        assert [point["step"] for point in points if point["kind"] == kind] == list(expected)
        assert [point.step for point in events.Scalars(tag)] == list(expected)


def test_r22_an_error_of_a_loader_worker_in_mid_epoch_loses_no_update(uninterrupted, toy_config, toy_data, tmp_path):
    """In the second epoch, the worker fails in its third batch, which is the fifth or sixth of the epoch."""
    folder = tmp_path / "toy/default"

    def prepare(rank: int) -> None:
        original, keys = ImageDataset.__getitem__, []

        def read(self, key):
            keys.extend([key] if key[0] == 1 else [])
            if len(keys) > 2 * 8:
                raise KeyError("injected")
            return original(self, key)

        ImageDataset.__getitem__ = read

    arguments = toy_arguments(toy_config, toy_data, tmp_path, "DATA.BATCH_SIZE", 8, "DATA.NUM_WORKERS", 2)
    failed = run_main(arguments, tmp_path / "log", prepare=prepare)
    assert failed.exit_codes == [1], failed.output
    assert read_checkpoint(list_checkpoints(folder)[0])["num_updates"] == 12 + 4
    resumed = run_main(arguments, tmp_path / "log")
    assert resumed.exit_codes == [0], resumed.output
    assert_equal(read_state(folder), read_state(uninterrupted(1)))


# --- Full disks and unusable output directories


def test_r3_disk_full_after_any_number_of_bytes_leaves_the_old_file_unchanged(tmp_path):
    path = checkpoint_path(tmp_path, 1)
    save_checkpoint(create_state(1), path)
    digest, size = sha256(path), path.stat().st_size
    for part in range(20):
        process = os.fork()
        if process == 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            # The limit simulates a full disk: writes beyond this file size fail.
            resource.setrlimit(resource.RLIMIT_FSIZE, (size * part // 20, resource.RLIM_INFINITY))
            try:
                save_checkpoint(create_state(2), path)
            except CheckpointError as error:
                has_reason = (
                    "checkpoints are untouched" in str(error) and "bytes needed, " in str(error) and " free)" in str(error)
                )
                os._exit(0 if has_reason else 1)
            os._exit(2)
        assert os.WEXITSTATUS(os.waitpid(process, 0)[1]) == 0
        assert sha256(path) == digest
        assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_r3_full_disk_ends_all_processes_and_the_error_gives_the_reason(toy_config, toy_data, tmp_path):
    def prepare(rank: int) -> None:
        def limit_file_size() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))

        if rank == 0:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            call_before(engine.saver, "save_checkpoint", 3, limit_file_size)

    arguments = toy_arguments(toy_config, toy_data, tmp_path, "SAVE_STEPS", 2, "DATA.BATCH_SIZE", 4)
    outcome = run_main(arguments, tmp_path / "log", processes=2, prepare=prepare, timeout=60)
    assert outcome.exit_codes == [2, 2], outcome.output
    assert "checkpoint not written; existing checkpoints are untouched" in outcome.output
    assert [read_checkpoint(path)["num_updates"] for path in list_checkpoints(tmp_path / "toy/default")] == [4, 2]
    assert not list((tmp_path / "toy/default").glob("*.incomplete"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root can write to every directory")
def test_r10_unwritable_output_directory_is_rejected_before_training(toy_config, toy_data, tmp_path):
    (tmp_path / "toy").mkdir(mode=0o500)
    outcome = run_main(toy_arguments(toy_config, toy_data, tmp_path), tmp_path / "log")
    assert outcome.exit_codes == [2], outcome.output
    assert "cannot be written to" in outcome.output


def test_r10_output_path_that_is_a_file_is_rejected_before_training_and_with_the_check_flag(toy_config, toy_data, tmp_path):
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy/default").write_text("")
    for flags in ([], ["--check"]):
        outcome = run_main([*toy_arguments(toy_config, toy_data, tmp_path), *flags], tmp_path / "log")
        assert outcome.exit_codes == [2], outcome.output
        assert "choose another --output" in outcome.output


# --- Damaged checkpoints


def damaged_versions(content: bytes):
    """Yield (description, damaged content) for 20 truncated copies (the first is empty) and 64 copies with a flipped bit."""
    rng = random.Random(0)
    for part in range(20):
        yield f"truncated {part}", content[: len(content) * part // 20]
    for number in range(64):
        position = rng.randrange(len(content))
        yield (
            f"flip {number}",
            content[:position] + bytes([content[position] ^ 1 << rng.randrange(8)]) + content[position + 1 :],
        )


def test_r4_damage_to_the_newest_checkpoint_is_detected_or_harmless(tmp_path):
    """A flipped bit is harmless if it is in a field of the zip archive that is never read: the loaded state is unchanged."""
    older, newer, state = checkpoint_path(tmp_path, 1), checkpoint_path(tmp_path, 2), create_state(2)
    save_checkpoint(create_state(1), older)
    save_checkpoint(state, newer)
    content, detected = newer.read_bytes(), 0
    expected = read_checkpoint(newer)
    for description, damaged in damaged_versions(content):
        newer.write_bytes(damaged)
        newest_intact = newest_usable(tmp_path)
        if newest_intact == newer:
            assert description.startswith("flip")
            assert_equal(read_checkpoint(newer), expected, description)
        else:
            assert newest_intact == older, description
            detected += 1
    assert detected >= 20 + 64 // 2  # all truncations, and at least half of the flipped bits


# --- Concurrent processes in one directory


def test_r15_two_evaluations_and_a_training_run_share_one_directory(trained, toy_config, toy_data, tmp_path):
    """Two evaluations write their results into one directory while a run trains in it."""
    from multiprocessing import get_context

    folder = tmp_path / "toy/default"
    folder.mkdir(parents=True)
    shutil.copy(trained, tmp_path / "weights.pth")
    evaluation = [*toy_arguments(toy_config, toy_data, tmp_path), "--eval", "--resume", tmp_path / "weights.pth"]
    training = toy_arguments(toy_config, toy_data, tmp_path, "TRAIN.EPOCHS", 2, "SAVE_STEPS", 2)
    codes = get_context("fork").SimpleQueue()

    def run(number: int, arguments: list) -> None:
        codes.put((number, run_main(arguments, tmp_path / f"log{number}").exit_codes))

    children = [
        get_context("fork").Process(target=run, args=(number, arguments))
        for number, arguments in enumerate((training, evaluation, evaluation))
    ]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert sorted(codes.get() for _ in children) == [(0, [0]), (1, [0]), (2, [0])]
    assert json.loads((folder / "eval.json").read_text())["results"]
    assert not list(folder.glob("*incomplete*"))


# --- Changed data


def add_image(root: Path) -> None:
    shutil.copy(root / "train/class1/000.png", root / "train/class1/extra.png")


R17_CHANGES = {
    "added image": (add_image, "class class1 had 34 images, now it has 35"),
    "overwritten images": (
        lambda root: [Image.new("RGB", (40, 40)).save(path) for path in (root / "train").rglob("*.png")],
        "in train/, class class0 has the same number of images, but files of other sizes or contents",
    ),
    "renamed class": (
        lambda root: [(root / split / "class0").rename(root / split / "class9") for split in ("train", "val")],
        "class class0 is missing, class class9 is new",
    ),
    "removed validation image": (
        lambda root: (root / "val/class1/003.png").unlink(),
        "in val/, class class1 had 11 images, now it has 10",
    ),
}


@pytest.mark.parametrize("change", R17_CHANGES)
def test_r17_resume_after_a_data_change_is_rejected_and_the_error_names_the_change(change, toy_config, tmp_path):
    data = tmp_path / "data"
    for split, per_class in (("train", 34), ("val", 11)):
        write_images(data, split, classes=3, per_class=per_class)
    arguments = toy_arguments(toy_config, data, tmp_path, "SAVE_STEPS", 2)
    folder = tmp_path / "toy/default"
    run_main(arguments, tmp_path / "log", kill_when=lambda: len(list_checkpoints(folder)) == 2)
    change_data, message = R17_CHANGES[change]
    change_data(data)
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pth")}
    outcome = run_main(arguments, tmp_path / "log")
    assert outcome.exit_codes == [2], outcome.output
    assert message in outcome.output
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.pth")} == times


# --- Resume with other numbers of workers and processes, and reproducibility


def test_r5_run_resumed_with_another_number_of_loader_workers_equals_an_uninterrupted_run(
    uninterrupted, toy_config, toy_data, tmp_path
):
    folder = tmp_path / "toy/default"

    def arguments(workers: int) -> list:
        return toy_arguments(toy_config, toy_data, tmp_path, "SAVE_STEPS", 2, "DATA.BATCH_SIZE", 8, "DATA.NUM_WORKERS", workers)

    for workers in (2, 1):
        start_update = len(list_checkpoints(folder)) and int(list_checkpoints(folder)[0].stem.split("_")[1])
        outcome = run_main(
            arguments(workers),
            tmp_path / "log",
            kill_when=lambda start_update=start_update: any(
                int(p.stem.split("_")[1]) > start_update + 3 for p in list_checkpoints(folder)
            ),
        )
        assert outcome.exit_codes == [-9], outcome.output
    assert run_main(arguments(0), tmp_path / "log").exit_codes == [0]
    assert_equal(read_state(folder), read_state(uninterrupted(1)))


def test_r6_run_resumed_with_other_numbers_of_processes_has_the_same_losses(toy_config, toy_data, tmp_path):
    """Compare a run on 2, then 4, then 1 processes with an uninterrupted run on 1 process.

    Drop path, dropout, mixup and CutMix are disabled, because their random numbers depend on the rank.
    """
    no_random_operations = ["MODEL.DROP_PATH_RATE", 0, "MODEL.DROP_RATE", 0, "AUG.MIXUP", 0, "AUG.CUTMIX", 0, "TRAIN.EPOCHS", 1]
    options = [
        *no_random_operations,
        "DATA.GLOBAL_BATCH_SIZE",
        8,
        "DATA.BATCH_SIZE",
        2,
        "PRINT_FREQ",
        1,
        "SAVE_STEPS",
        3,
        "EVAL_FREQ",
        9,
    ]
    losses = {}
    for name, process_counts in (("uninterrupted", (1,)), ("resumed", (2, 4, 1))):
        arguments = toy_arguments(toy_config, toy_data, tmp_path / name, *options)
        folder = tmp_path / name / "toy/default"
        for position, processes in enumerate(process_counts):
            last = position + 1 == len(process_counts)

            def stop_at_first_save(rank: int, last: bool = last) -> None:
                if not last and rank == 0:
                    call_before(engine.saver, "save_checkpoint", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))

            outcome = run_main(arguments, tmp_path / "log", processes=processes, prepare=stop_at_first_save)
            assert set(outcome.exit_codes) == ({0} if last else {75}), outcome.output
        records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses[name] = {record["step"]: record["loss"] for record in records if record["kind"] == "train"}
    assert losses["resumed"].keys() == losses["uninterrupted"].keys() == set(range(1, 13))
    assert list(losses["resumed"].values()) == pytest.approx(list(losses["uninterrupted"].values()), rel=1e-5)


def test_r9_parameter_names_in_checkpoints_have_no_prefix_of_ddp_or_compile(toy_config, toy_data, tmp_path):
    for name, options, processes in (("ddp", [], 2), ("compiled", ["TRAIN.COMPILE", True], 1)):
        arguments = toy_arguments(toy_config, toy_data, tmp_path / name, "TRAIN.EPOCHS", 1, "DATA.BATCH_SIZE", 8, *options)
        if name == "compiled":

            def prepare(rank: int) -> None:
                original = torch.compile
                torch.compile = lambda model, dynamic: original(model, backend="eager", dynamic=dynamic)

        else:
            prepare = None
        outcome = run_main(arguments, tmp_path / "log", processes=processes, prepare=prepare)
        assert set(outcome.exit_codes) == {0}, outcome.output
        state = read_checkpoint(list_checkpoints(tmp_path / name / "toy/default")[0])
        for weights in ("model", "state_dict_ema"):
            assert not any(key.startswith(("module.", "_orig_mod.", "model.")) for key in state[weights])
        assert not torch.equal(state["model"]["head.weight"], state["state_dict_ema"]["head.weight"])


def test_r8_run_stopped_during_accumulation_equals_an_uninterrupted_run_after_resume(toy_config, toy_data, tmp_path):
    options = ["TRAIN.EPOCHS", 1, "DATA.BATCH_SIZE", 2, "TRAIN.ACCUMULATION_STEPS", 4, "SAVE_STEPS", 5]

    def prepare(rank: int) -> None:
        # seed_device is called before every forward pass. Send the signal before the third pass of the eighth update.
        call_before(engine.step, "seed_device", 7 * 4 + 3, lambda: os.kill(os.getpid(), signal.SIGTERM))

    stopped = toy_arguments(toy_config, toy_data, tmp_path / "stopped", *options)
    assert run_main(stopped, tmp_path / "log", prepare=prepare).exit_codes == [75]
    folder = tmp_path / "stopped/toy/default"
    assert read_checkpoint(list_checkpoints(folder)[0])["num_updates"] == 8
    assert run_main(stopped, tmp_path / "log").exit_codes == [0]
    assert run_main(toy_arguments(toy_config, toy_data, tmp_path / "baseline", *options), tmp_path / "log").exit_codes == [0]
    assert_equal(read_state(folder), read_state(tmp_path / "baseline/toy/default"))


def test_g1_equal_seeds_give_equal_runs_and_another_seed_gives_a_different_run(uninterrupted, toy_config, toy_data, tmp_path):
    states = {}
    for seed in (0, 1):
        output = tmp_path / str(seed)
        arguments = toy_arguments(toy_config, toy_data, output, "SAVE_STEPS", 2, "DATA.BATCH_SIZE", 8, "SEED", seed)
        assert run_main(arguments, tmp_path / "log").exit_codes == [0]
        states[seed] = read_state(output / "toy/default")
    assert_equal(states[0], read_state(uninterrupted(1)))
    assert not torch.equal(states[0]["model"]["head.weight"], states[1]["model"]["head.weight"])


@pytest.mark.parametrize("precision", ["fp32", "train"])
def test_e3_evaluation_results_are_repeatable_and_labelled_with_weights_and_precision(
    precision, trained, toy_config, toy_data, tmp_path
):
    results = []
    for number in range(2):
        arguments = toy_arguments(toy_config, toy_data, tmp_path / str(number), "AMP", True, "TEST.PRECISION", precision)
        outcome = run_main([*arguments, "--eval", "--resume", trained], tmp_path / "log")
        assert outcome.exit_codes == [0], outcome.output
        assert "raw weights: " in outcome.output
        assert "ema weights: " in outcome.output
        result = json.loads((tmp_path / str(number) / "toy/default/eval.json").read_text())
        assert result["precision"] == {"fp32": "float32", "train": "bfloat16"}[precision]
        results.append(result["results"])
    assert results[0] == results[1]


@pytest.mark.parametrize("num_stops", [pytest.param(2, id="2 stops"), pytest.param(10, id="10 stops", marks=pytest.mark.slow)])
def test_r7_run_stopped_many_times_within_an_epoch_equals_an_uninterrupted_run(num_stops, toy_config, toy_data, tmp_path):
    def arguments(output: Path) -> list:
        return toy_arguments(toy_config, toy_data, output, "TRAIN.EPOCHS", 1, "DATA.BATCH_SIZE", 2)

    def stop_at_first_update(rank: int) -> None:
        call_before(engine.trainer, "train_step", 1, lambda: os.kill(os.getpid(), signal.SIGTERM))

    folder, num_updates = tmp_path / "stopped/toy/default", 0
    for _ in range(num_stops):
        outcome = run_main(arguments(tmp_path / "stopped"), tmp_path / "log", prepare=stop_at_first_update)
        assert outcome.exit_codes == [75], outcome.output
        previous, num_updates = num_updates, read_checkpoint(list_checkpoints(folder)[0])["num_updates"]
        assert previous < num_updates < 50
    for output in (tmp_path / "stopped", tmp_path / "baseline"):
        assert run_main(arguments(output), tmp_path / "log").exit_codes == [0]
    assert_equal(read_state(folder), read_state(tmp_path / "baseline/toy/default"))
