"""Starts of runs, given a command and the contents of the output directory, and the files that change (docs/training.md)."""

import fcntl
import json
import os
import resource
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import engine.saver
import jobs.train
from engine.checkpoint_writer import FORMAT
from engine.run_contents import survey
from engine.run_directory import RunDirectory, RunLock, RunRecord, read_record, write_record
from jobs.initialization import Initialization, choose_initialization
from models.checkpoints.reader import CheckpointError, read_checkpoint
from tests.conftest import write_images
from tests.launch import run_main
from tests.reliability.test_signals import call_before
from tests.runs import assert_equal, read_state, run_state, toy_arguments
from utils.config.loading import load_config
from utils.distributed import World
from utils.errors import ConfigError
from utils.run_files import BEST, RECORD, checkpoint_path, list_checkpoints

WORLD = World(0, 0, 1, torch.device("cpu"))


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of a directory and of all files in it, by name."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in (folder, *folder.rglob("*"))}


# --- The decision table. Each builder creates the contents of a run directory.


def save(folder: Path, num_updates: int, run_id: str = "a", *, name: str = "", **entries) -> None:
    torch.save(
        run_state(num_updates=num_updates, run_id=run_id) | entries,
        folder / (name or checkpoint_path(folder, num_updates).name),
    )


def build_killed_at_start(folder: Path) -> None:
    """The files of a run that was killed before its first checkpoint."""
    write_record(folder, RunRecord("a", has_saved=False))
    for name in ("log_rank0.txt", "config.yaml", "events.out.tfevents.1", "checkpoint_000000005.pth.incomplete"):
        (folder / name).write_text("")
    (folder / "metrics.jsonl").write_text('{"step": 40, "kind": "train", "epoch": 3}\n')


def build_killed_at_start_by_an_earlier_version(folder: Path) -> None:
    build_killed_at_start(folder)
    (folder / RECORD).unlink()
    (folder / "metrics.jsonl").write_text('{"step": 4, "kind": "train", "epoch": 0}\n{"step": 5, "ki')


def build_results_of_an_evaluation(folder: Path) -> None:
    for name in ("eval.json", "eval_classes.csv", "confusion.png", "predictions_raw.csv", "notes.txt", ".lock"):
        (folder / name).write_text("")


def build_numbered(folder: Path) -> None:
    save(folder, 4)
    save(folder, 7)
    save(folder, 4, name=BEST)
    write_record(folder, RunRecord("a", has_saved=True))


def build_numbered_of_an_earlier_version(folder: Path) -> None:
    for num_updates in (4, 7):
        save(folder, num_updates, "")
    (folder / "metrics.jsonl").write_text("")


def build_damaged_newest(folder: Path) -> None:
    build_numbered(folder)
    (folder / "checkpoint_000000009.pth").write_bytes(b"PK")


def build_no_run_state_newest(folder: Path) -> None:
    build_numbered(folder)
    torch.save({"model": {}}, folder / "checkpoint_000000099.pth")


def build_wrong_number(folder: Path) -> None:
    build_numbered(folder)
    save(folder, 7, name="checkpoint_000000099.pth")


def build_best_alone(folder: Path) -> None:
    save(folder, 7, name=BEST)
    write_record(folder, RunRecord("a", has_saved=True))


def build_best_and_damaged(folder: Path) -> None:
    build_best_alone(folder)
    for number in (7, 9):
        checkpoint_path(folder, number).write_bytes(b"")


def build_only_damaged(folder: Path) -> None:
    checkpoint_path(folder, 7).write_bytes(b"")


def build_renamed_damaged(folder: Path) -> None:
    (folder / "checkpoint_000000007.pth.damaged").write_bytes(b"")


def build_damaged_best(folder: Path) -> None:
    (folder / BEST).write_bytes(b"PK")


def build_best_of_another_kind(folder: Path) -> None:
    torch.save({"model": {}}, folder / BEST)


def build_deleted_checkpoints(folder: Path) -> None:
    build_killed_at_start(folder)
    write_record(folder, RunRecord("a", has_saved=True))


def build_deleted_checkpoints_of_an_earlier_version(folder: Path) -> None:
    build_killed_at_start_by_an_earlier_version(folder)
    (folder / "metrics.jsonl").write_text('{"step": 12, "kind": "eval_raw", "epoch": 0}\n')


def build_config_of_the_user(folder: Path) -> None:
    (folder / "config.yaml").write_text("")


def build_foreign_newest(folder: Path) -> None:
    build_numbered(folder)
    save(folder, 99, "b")


def build_foreign_oldest(folder: Path) -> None:
    build_numbered(folder)
    save(folder, 1, "b")


def build_foreign_best(folder: Path) -> None:
    build_numbered(folder)
    save(folder, 4, "b", name=BEST)


def build_foreign_all(folder: Path) -> None:
    save(folder, 7, "b")
    write_record(folder, RunRecord("a", has_saved=True))


SCRATCH, REFUSED, NEWEST = "scratch", "refused", "checkpoint_000000007.pth"
# Builder -> outcome of the same command, of --resume of a file elsewhere, and of TRAIN.AUTO_RESUME False.
NEW_RUN = (SCRATCH, "elsewhere.pth", SCRATCH)
OWN_RUN = (NEWEST, REFUSED, REFUSED)
NOTHING_USABLE = TWO_RUNS = (REFUSED, REFUSED, REFUSED)
TABLE = {
    os.mkdir: NEW_RUN,
    build_results_of_an_evaluation: NEW_RUN,
    build_killed_at_start: NEW_RUN,
    build_killed_at_start_by_an_earlier_version: NEW_RUN,
    build_numbered: OWN_RUN,
    build_numbered_of_an_earlier_version: OWN_RUN,
    build_damaged_newest: OWN_RUN,
    build_no_run_state_newest: OWN_RUN,
    build_wrong_number: OWN_RUN,
    build_best_alone: (BEST, REFUSED, REFUSED),
    build_best_and_damaged: (BEST, REFUSED, REFUSED),
    build_only_damaged: NOTHING_USABLE,
    build_renamed_damaged: NOTHING_USABLE,
    build_damaged_best: NOTHING_USABLE,
    build_best_of_another_kind: NOTHING_USABLE,
    build_deleted_checkpoints: NOTHING_USABLE,
    build_deleted_checkpoints_of_an_earlier_version: NOTHING_USABLE,
    build_config_of_the_user: NOTHING_USABLE,
    build_foreign_newest: TWO_RUNS,
    build_foreign_oldest: TWO_RUNS,
    build_foreign_best: TWO_RUNS,
    build_foreign_all: TWO_RUNS,
}


def decide(toy_config: Path, tmp_path: Path, *opts) -> str:
    """Name of the checkpoint to resume from, "scratch", "pretrained" or "refused"."""
    try:
        init = choose_initialization(load_config(toy_config, ["OUTPUT", str(tmp_path), *opts]), WORLD)
    except ConfigError as error:
        return REFUSED if "another --tag" in str(error) else str(error)  # this remedy is always accepted
    return Path(init.checkpoint).name if init.kind == "resume" else init.kind


@pytest.mark.parametrize("build", TABLE, ids=lambda build: build.__name__.removeprefix("build_"))
def test_a_start_resumes_starts_anew_or_is_refused_as_the_table_says_and_changes_no_file(build, toy_config, tmp_path):
    folder = tmp_path / "toy/default"
    if build is os.mkdir:
        folder.parent.mkdir()
    else:
        folder.mkdir(parents=True)
    build(folder)
    save(tmp_path, 50, "c", name="elsewhere.pth")
    before = snapshot(folder)
    asked = ([], ["MODEL.RESUME", str(tmp_path / "elsewhere.pth")], ["TRAIN.AUTO_RESUME", "False"])
    assert tuple(decide(toy_config, tmp_path, *opts) for opts in asked) == TABLE[build]
    if TABLE[build] == NEW_RUN:
        pretrained = ["MODEL.PRETRAINED", str(tmp_path / "elsewhere.pth")]
        assert decide(toy_config, tmp_path, *pretrained) == "pretrained"
    assert snapshot(folder) == before
    # Every refusal is resolved by another tag, and by moving the directory away.
    assert decide(toy_config, tmp_path, "TAG", "other") == SCRATCH
    folder.rename(tmp_path / "moved")
    assert decide(toy_config, tmp_path) == SCRATCH


@pytest.mark.parametrize(
    ("build", "name", "run_id", "expected"),
    [
        (build_numbered, NEWEST, None, NEWEST),
        (build_numbered, "checkpoint_000000004.pth", None, REFUSED),
        (build_numbered, BEST, None, REFUSED),
        (build_damaged_newest, NEWEST, None, NEWEST),
        (build_best_alone, BEST, None, BEST),
        (build_deleted_checkpoints, "copy.pth", "a", "copy.pth"),
        (build_deleted_checkpoints, "copy.pth", "b", REFUSED),
        (build_killed_at_start, "copy.pth", "b", "copy.pth"),
    ],
)
def test_resume_accepts_a_file_of_the_directory_if_it_is_the_newest_of_its_run(
    build, name, run_id, expected, toy_config, tmp_path
):
    folder = tmp_path / "toy/default"
    folder.mkdir(parents=True)
    build(folder)
    if run_id is not None:
        save(folder, 9, run_id, name=name)
    assert decide(toy_config, tmp_path, "MODEL.RESUME", str(folder / name)) == expected


def test_a_repeated_command_with_resume_continues_the_run_that_it_has_started(toy_config, tmp_path, monkeypatch):
    folder = tmp_path / "toy/default"
    folder.mkdir(parents=True)
    build_numbered(folder)
    for name in ("origin.pth", "other.pth"):
        save(tmp_path, 2, "a", name=name)
    write_record(folder, RunRecord("a", has_saved=True, resumed_from=str(tmp_path / "origin.pth")))
    assert decide(toy_config, tmp_path, "MODEL.RESUME", str(tmp_path / "origin.pth")) == NEWEST
    assert decide(toy_config, tmp_path, "MODEL.RESUME", str(tmp_path / "other.pth")) == REFUSED
    monkeypatch.chdir(folder)
    assert decide(toy_config, tmp_path, "MODEL.RESUME", "../../origin.pth") == NEWEST
    (tmp_path / "origin.pth").unlink()  # for example by the run that wrote it
    assert decide(toy_config, tmp_path, "MODEL.RESUME", str(tmp_path / "origin.pth")) == NEWEST
    with pytest.raises(CheckpointError, match="no such file"):
        decide(toy_config, tmp_path, "MODEL.RESUME", str(tmp_path / "gone.pth"))


@pytest.mark.parametrize("build", [build_numbered, build_only_damaged], ids=["usable", "damaged"])
def test_a_refused_start_proposes_to_resume_the_run_of_the_directory_only_if_that_is_possible(build, toy_config, tmp_path):
    folder = tmp_path / "toy/default"
    folder.mkdir(parents=True)
    build(folder)
    save(tmp_path, 2, "a", name="elsewhere.pth")
    for opts, remedy in (
        (["MODEL.RESUME", str(tmp_path / "elsewhere.pth")], "leave out --resume"),
        (["TRAIN.AUTO_RESUME", "False"], "resume that run with TRAIN.AUTO_RESUME True"),
    ):
        with pytest.raises(ConfigError) as refused:
            choose_initialization(load_config(toy_config, ["OUTPUT", str(tmp_path), *opts]), WORLD)
        assert (remedy in str(refused.value)) == (build is build_numbered)


def test_a_checkpoint_of_a_later_format_is_rejected_by_its_number_and_not_renamed(toy_config, tmp_path):
    folder = tmp_path / "toy/default"
    folder.mkdir(parents=True)
    build_numbered(folder)
    save(folder, 9, "a", format=FORMAT + 1)
    before = snapshot(folder)
    with pytest.raises(ConfigError, match=rf"has checkpoint format {FORMAT + 1}, but .* reads formats up to {FORMAT}. Update"):
        choose_initialization(load_config(toy_config, ["OUTPUT", str(tmp_path)]), WORLD)
    assert snapshot(folder) == before


def test_flipped_bits_are_detected_in_the_newest_checkpoint_and_older_ones_are_not_read(toy_config, tmp_path):
    folder = tmp_path / "toy/default"
    folder.mkdir(parents=True)
    for number in (1, 2, 3):
        save(folder, number, model={"weight": torch.full((100,), 0.5)})
    save(folder, 3, name=BEST, model={"weight": torch.full((100,), 0.5)})
    for name, expected in (
        (checkpoint_path(folder, 1).name, checkpoint_path(folder, 3).name),
        (checkpoint_path(folder, 3).name, BEST),
        (BEST, checkpoint_path(folder, 2).name),
    ):
        content = bytearray((folder / name).read_bytes())
        content[content.index(torch.full((100,), 0.5).numpy().tobytes())] ^= 1
        (folder / name).write_bytes(content)
        assert decide(toy_config, tmp_path) == expected


@pytest.mark.parametrize("content", ["", "[]", '{"run_id": 3, "has_saved": true}', '{"run_id": "a"}', "[" * 5000])
def test_an_invalid_run_record_counts_as_missing(content, tmp_path):
    (tmp_path / RECORD).write_text(content)
    assert read_record(tmp_path) is None


def test_a_record_without_a_format_is_read_and_one_of_a_later_format_is_refused(toy_config, tmp_path):
    folder = tmp_path / "toy/default"
    folder.mkdir(parents=True)
    build_numbered(folder)
    write_record(folder, RunRecord("a", has_saved=True))
    written = json.loads((folder / RECORD).read_text())
    assert written.pop("format") == 1
    (folder / RECORD).write_text(json.dumps(written))  # as earlier versions wrote it
    assert read_record(folder) == RunRecord("a", has_saved=True)
    (folder / RECORD).write_text(json.dumps(written | {"format": 2, "new": 0}))
    with pytest.raises(ConfigError, match=r"run.json has format 2, but .* reads formats up to 1. Update .* another --tag"):
        choose_initialization(load_config(toy_config, ["OUTPUT", str(tmp_path)]), WORLD)


def test_the_record_of_a_run_that_has_saved_is_not_replaced_at_a_later_start(toy_config, tmp_path):
    """Even if its checkpoints are deleted, and it resumes from a copy of one of them."""
    build_deleted_checkpoints(tmp_path)
    save(tmp_path, 9, name="copy.pth")
    cfg = load_config(toy_config, ["MODEL.RESUME", str(tmp_path / "copy.pth")])
    init = Initialization("resume", str(tmp_path / "copy.pth"), survey(tmp_path))
    directory = RunDirectory(tmp_path)
    jobs.train.open_directory(directory, cfg, init, None, {})
    assert read_record(tmp_path) == RunRecord("a", has_saved=True)
    directory.close()


# --- Whole runs


def test_a_run_with_best_pth_alone_resumes_from_it(uninterrupted, toy_config, toy_data, tmp_path):
    """Once the numbered files are deleted, and once they are damaged."""
    expected, folder = uninterrupted(1), tmp_path / "toy/default"
    arguments = toy_arguments(toy_config, toy_data, tmp_path, "SAVE_STEPS", 2, "DATA.BATCH_SIZE", 8, "DATA.NUM_WORKERS", 2)
    stopped = read_checkpoint(expected / BEST)
    for damaged in (False, True):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(expected, folder)
        for path in list_checkpoints(folder):
            path.unlink()
            if damaged:
                path.write_bytes(b"PK\x03\x04")
        outcome = run_main(arguments, tmp_path / "log")
        assert outcome.exit_codes == [0], outcome.output
        assert f"start: resume {folder / BEST}" in outcome.output
        assert f"the run resumes from update {stopped['num_updates']}" in outcome.output
        if stopped["num_updates"] < 36:
            assert_equal(read_state(folder), read_state(expected))
        assert len(list(folder.glob("*.damaged"))) == (2 if damaged and stopped["num_updates"] < 36 else 0)
        assert_equal(read_checkpoint(folder / BEST)["best"], read_checkpoint(expected / BEST)["best"])


def test_a_directory_with_remains_of_a_run_is_refused_and_another_tag_is_accepted(
    uninterrupted, toy_config, toy_data, tmp_path
):
    folder = tmp_path / "toy/default"
    shutil.copytree(uninterrupted(1), folder)
    for path in folder.glob("*.pth"):
        path.unlink()
    before = snapshot(folder)
    arguments = toy_arguments(toy_config, toy_data, tmp_path, "TRAIN.EPOCHS", 1)
    for flags in ([], ["--check"]):
        outcome = run_main([*arguments, *flags], tmp_path / "log")
        assert outcome.exit_codes == [2], outcome.output
        assert "no checkpoint from which it could resume" in outcome.output
        assert snapshot(folder) == before
    outcome = run_main([*arguments, "--tag", "other"], tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    assert snapshot(folder) == before


def test_resume_of_another_run_is_refused_in_a_used_directory_and_continues_in_an_empty_one(
    trained, uninterrupted, toy_config, toy_data, tmp_path
):
    folder = tmp_path / "toy/default"
    shutil.copytree(uninterrupted(1), folder)
    before = snapshot(tmp_path / "toy")
    arguments = toy_arguments(toy_config, toy_data, tmp_path, "TRAIN.EPOCHS", 4)
    for flags in ([], ["--check"]):
        outcome = run_main([*arguments, "--resume", trained, *flags], tmp_path / "log", processes=1)
        assert outcome.exit_codes == [2], outcome.output
        assert "would then contain files of two runs" in outcome.output
        assert snapshot(tmp_path / "toy") == before
    origin = tmp_path / "origin.pth"
    shutil.copy(trained, origin)
    command = [*arguments, "--resume", origin, "--tag", "other"]
    call = {"prepare": lambda rank: call_before(engine.saver, "save_checkpoint", 2, lambda: os.kill(os.getpid(), 9))}
    assert run_main(command, tmp_path / "log", **call).exit_codes == [-9]
    origin.unlink()
    outcome = run_main(command, tmp_path / "log")  # the same command resumes what it has started
    assert outcome.exit_codes == [0], outcome.output
    other = tmp_path / "toy/other"
    assert f"start: resume {other}" in outcome.output
    assert read_checkpoint(list_checkpoints(other)[0])["run_id"] == read_checkpoint(trained)["run_id"]
    assert before.items() <= snapshot(tmp_path / "toy").items() | {(str(tmp_path / "toy"), before[str(tmp_path / "toy")])}


@pytest.mark.parametrize("flag", ["--resume", "--pretrained"])
def test_a_start_is_refused_if_two_processes_read_different_files(flag, uninterrupted, toy_config, toy_data, tmp_path):
    """Nodes without a shared file system: each process reads relative paths in its own directory."""
    newest, older = list_checkpoints(uninterrupted(2))
    folders = tmp_path / "node0", tmp_path / "node1"
    for folder, path in zip(folders, (newest, older), strict=True):
        folder.mkdir()
        shutil.copy(path, folder / "file.pth")
    before = snapshot(tmp_path / "node0")
    arguments = toy_arguments(toy_config, toy_data, "output", "TRAIN.EPOCHS", 4, "DATA.BATCH_SIZE", 4, "DATA.NUM_WORKERS", 2)
    outcome = run_main(
        [*arguments, flag, "file.pth"], tmp_path / "log", processes=2, prepare=lambda rank: os.chdir(folders[rank]), timeout=60
    )
    assert outcome.exit_codes == [2, 2], outcome.output
    assert "file.pth differs between processes; use a copy on a file system that all nodes share" in outcome.output
    assert snapshot(tmp_path / "node0") == before


def test_resume_of_a_finished_run_elsewhere_names_what_continues_it(trained, toy_config, toy_data, tmp_path):
    saved = read_checkpoint(trained) | {"last_evaluation": 24, "num_updates": 24}
    torch.save(saved, tmp_path / "finished.pth")
    arguments = toy_arguments(toy_config, toy_data, tmp_path, "TRAIN.EPOCHS", 2)
    outcome = run_main([*arguments, "--resume", tmp_path / "finished.pth"], tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    assert f"nothing is written to {tmp_path / 'toy/default'}; raise TRAIN.EPOCHS to continue it there" in outcome.output
    assert not (tmp_path / "toy").exists()


def test_a_finished_run_restores_the_evaluations_that_its_metrics_lack(uninterrupted, toy_config, toy_data, tmp_path):
    """The state of a run that ended while the disk of its metrics was full or slow."""
    folder = tmp_path / "toy/default"
    shutil.copytree(uninterrupted(1), folder)
    metrics = folder / "metrics.jsonl"
    complete = metrics.read_text()
    lines = complete.splitlines(keepends=True)
    assert '"kind": "eval_ema"' in lines[-1]
    assert '"kind": "eval_raw"' in lines[-2]
    metrics.write_text("".join(lines[:-2]) + lines[-2][:20])
    outcome = run_main(toy_arguments(toy_config, toy_data, tmp_path), tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    assert "missing evaluations restored from the checkpoint" in outcome.output
    assert metrics.read_text() == complete


@pytest.mark.parametrize("case", ["missing", "stale", "lost"])
def test_a_finished_run_repairs_its_best_checkpoint_or_reports_that_it_is_lost(
    case, uninterrupted, toy_config, toy_data, tmp_path
):
    """The state of a run that was killed between the last checkpoint and its link, or whose best.pth was deleted later."""
    folder = tmp_path / "toy/default"
    shutil.copytree(uninterrupted(1), folder)
    newest, older = list_checkpoints(folder)
    state = read_checkpoint(newest)
    best_update = state["num_updates"] if case != "lost" else 12
    state["best"] = {"acc1": 99.0, "weights": "raw", "epoch": best_update // 12 - 1, "num_updates": best_update}
    torch.save(state, newest)
    (folder / BEST).unlink()
    if case == "stale":
        shutil.copy(older, folder / BEST)
    before = snapshot(folder)
    outcome = run_main(toy_arguments(toy_config, toy_data, tmp_path), tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    assert "this run is finished" in outcome.output
    if case == "lost":
        assert "the best checkpoint of this run (after update 12, Acc@1 99.000) is lost" in outcome.output
        assert not (folder / BEST).exists()
    else:
        assert "best.pth: restored from" in outcome.output
        assert read_checkpoint(folder / BEST)["best"] == state["best"]
    after = snapshot(folder)
    assert {name for name in before if before[name] != after[name]} <= {str(folder / name) for name in ("", ".lock", BEST)}


def test_nothing_is_written_before_the_last_check_has_passed_on_every_rank(uninterrupted, toy_config, tmp_path):
    """Data that changed, optimizer state of another shape, and a check that fails only on rank 1."""
    folder, data = tmp_path / "toy/default", tmp_path / "data"
    shutil.copytree(uninterrupted(2), folder)
    newest = list_checkpoints(folder)[0]
    newest.write_bytes(b"")  # would be renamed
    (folder / BEST).unlink()  # would be repaired
    write_images(data, "train", classes=3, per_class=33)
    write_images(data, "val", classes=3, per_class=11)
    before = snapshot(tmp_path / "toy")

    def fail_on_rank_1(rank: int) -> None:
        if rank == 1:
            jobs.train.resume = lambda *_: (_ for _ in ()).throw(CheckpointError("unreadable on this rank"))

    arguments = toy_arguments(toy_config, data, tmp_path, "DATA.BATCH_SIZE", 4)
    outcome = run_main(arguments, tmp_path / "log", processes=2)
    assert outcome.exit_codes == [2, 2], outcome.output
    assert "the data have changed since it was saved" in outcome.output
    assert snapshot(tmp_path / "toy") == before
    outcome = run_main([*arguments, "DATA.ACCEPT_CHANGES", True], tmp_path / "log", processes=2, prepare=fail_on_rank_1)
    assert outcome.exit_codes == [2, 2], outcome.output
    assert "unreadable on this rank" in outcome.output
    assert snapshot(tmp_path / "toy") == before


# --- The lock follows the path


@pytest.mark.parametrize("action", ["moved", "removed", "moved, and a new run started"])
def test_a_run_ends_if_its_directory_is_moved_or_removed_and_does_not_recreate_it(action, toy_config, toy_data, tmp_path):
    folder, moved, proceed = tmp_path / "toy/default", tmp_path / "moved", tmp_path / "proceed"
    arguments = toy_arguments(toy_config, toy_data, tmp_path, "SAVE_STEPS", 2, "TRAIN.EPOCHS", 1)

    def interfere() -> None:
        """Move or remove the directory before the second checkpoint is written, and wait for the other run."""
        folder.rename(moved)
        if action == "removed":
            shutil.rmtree(moved)
        deadline = time.monotonic() + 100
        while action.endswith("started") and not proceed.exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    call = {"prepare": lambda rank: call_before(engine.saver, "write_checkpoint", 2, interfere)}
    with ThreadPoolExecutor(1) as executor:
        first = executor.submit(run_main, arguments, tmp_path / "log", **call)
        if action.endswith("started"):
            while not moved.exists() and not first.done():
                time.sleep(0.01)
            assert run_main(arguments, tmp_path / "log of the new run").exit_codes == [0]
            before = snapshot(folder)
            proceed.touch()
        outcome = first.result()
    assert outcome.exit_codes == [2], outcome.output
    assert f"{folder} was moved or removed while the run was writing" in outcome.output
    assert "Traceback" not in outcome.output
    if action.endswith("started"):
        assert snapshot(folder) == before
    else:
        assert not folder.exists()
    if action == "moved":  # the remedy of the message
        assert [path.name for path in list_checkpoints(moved)] == ["checkpoint_000000002.pth"]
        moved.rename(folder)
        outcome = run_main(arguments, tmp_path / "log")
        assert outcome.exit_codes == [0], outcome.output
        assert "resumed after update 2" in outcome.output


def test_a_deleted_lock_file_is_created_again_unless_another_run_has_locked_the_directory(tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.open()
    os.unlink(tmp_path / "run/.lock")
    directory.check()
    assert (tmp_path / "run/.lock").exists()
    os.unlink(tmp_path / "run/.lock")
    (tmp_path / "run/.lock").write_text("")
    with pytest.raises(CheckpointError, match="was moved or removed while the run was writing"):
        directory.check()
    directory.close()


def test_a_run_ends_if_its_lock_file_is_deleted_and_another_run_locks_a_new_one(tmp_path, monkeypatch):
    def refuse(_file):
        raise ConfigError("another run is writing to this directory")

    directory = RunDirectory(tmp_path)
    directory.open()
    os.unlink(tmp_path / ".lock")
    monkeypatch.setattr(directory._lock, "_lock", refuse)
    with pytest.raises(CheckpointError, match="another run is writing"):
        directory.check()


def test_a_start_on_a_full_disk_is_refused_and_leaves_no_file(tmp_path):
    directory, (limit, maximum) = RunDirectory(tmp_path / "a/run"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, maximum))
    try:
        with pytest.raises(ConfigError, match=r"cannot be written to \(File too large\); free disk space"):
            directory.open()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, maximum))
    directory.discard()
    assert list(tmp_path.iterdir()) == []


def test_without_locks_a_warning_is_logged_and_the_run_that_started_first_ends(tmp_path, monkeypatch, caplog):
    def unsupported(*_arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    first, second = RunDirectory(tmp_path), RunDirectory(tmp_path)
    first.open()
    assert "this file system does not support locks" in caplog.text
    first.check()
    second.open()
    with pytest.raises(CheckpointError, match="another run has started in this directory"):
        first.check()
    second.check()
    first.close()
    second.close()


def test_discarding_a_directory_removes_it_while_its_lock_is_held(tmp_path, monkeypatch):
    directory, held = RunDirectory(tmp_path / "a/b"), []
    directory.open()
    original = Path.rmdir

    def rmdir(path: Path) -> None:
        held.append(directory._lock._file is not None)
        original(path)

    monkeypatch.setattr(Path, "rmdir", rmdir)
    directory.discard()
    assert held == [True, True]
    assert list(tmp_path.iterdir()) == []


def test_a_lock_file_that_is_deleted_between_opening_and_locking_is_not_used(tmp_path, monkeypatch):
    lock = RunLock(tmp_path)
    original, calls = lock._lock, []

    def delete_first(file):
        if not calls:
            os.unlink(lock.path)
        calls.append(file)
        return original(file)

    monkeypatch.setattr(lock, "_lock", delete_first)
    lock.acquire()
    assert len(calls) == 2
    lock.check_held()
    lock.release()
