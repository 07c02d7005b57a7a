"""Experiment trackers: the points that they receive, and trackers that fail. Most tests use a small module as wandb."""

import importlib.util
import json
import logging
import sqlite3
import time
from pathlib import Path

import pytest

import engine.tracker
from engine.metrics_writer import MetricsWriter, read_records
from engine.tracker import Tracker, build_tracker
from tests.launch import run_main
from tests.runs import assert_equal, read_state, toy_arguments
from utils.config.loading import load_config
from utils.run_files import list_checkpoints

KEY = "0123456789abcdef-secret"
# Records its calls in FILE, and fails as the variable FAILURE says.
FAKE_WANDB = """
import json, os, sys, time

def record(entry):
    with open(os.environ["FILE"], "a") as file:
        file.write(json.dumps(entry) + "\\n")

def fail(when):
    failure = os.environ.get("FAILURE", "")
    if failure == f"{when} raises":
        raise RuntimeError(f"no access with {os.environ['WANDB_API_KEY']} to https://user:password@host/path")
    if failure == f"{when} exits":
        sys.exit("tracker")
    if failure == f"{when} is killed":
        os.kill(os.getpid(), 9)
    if failure == f"{when} hangs":
        time.sleep(1000)

def Settings(**options):
    return None

class Run:
    url = "https://host/run"
    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")
    def log(self, values):
        fail("log")
        record(values)
    def finish(self, exit_code):
        fail("finish")
        record({"exit_code": exit_code})

def init(**options):
    print("printed by the tracker")
    fail("init")
    record({"pid": os.getpid(), **{name: options[name] for name in ("id", "name", "group", "resume", "config")}})
    return Run()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Install the module in place of wandb. Returns a function that reads the entries recorded so far."""
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages/wandb.py").write_text(FAKE_WANDB)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("FILE", str(tmp_path / "calls"))
    return lambda: [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


def ends(pid: int) -> bool:
    """Whether a process ends within a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":  # ended, but the container has no process that collects its status
            return True
        time.sleep(0.05)
    return False


def test_a_resumed_run_continues_the_run_of_its_tracker_with_the_values_of_metrics_jsonl(
    fake, trained, toy_config, toy_data, tmp_path
):
    """The first process is killed, and the process of its tracker ends with it."""
    options = ["TRAIN.EPOCHS", 2, "SAVE_STEPS", 2, "TRACKER", "wandb"]
    arguments, folder = toy_arguments(toy_config, toy_data, tmp_path, *options), tmp_path / "toy/default"
    calls = tmp_path / "calls"
    run_main(arguments, tmp_path / "log", kill_when=lambda: calls.exists() and len(list_checkpoints(folder)) == 2)
    killed = fake()
    assert ends(killed[0]["pid"])
    calls.unlink()
    outcome = run_main(arguments, tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    assert_equal(read_state(folder), read_state(trained.parent))
    start, *points, end = fake()
    assert {**killed[0], "pid": 0} == {**start, "pid": 0}
    assert (start["name"], start["group"], start["resume"], end) == ("default", "toy", "allow", {"exit_code": 0})
    assert start["config"] | {"TRAIN.EPOCHS": 2, "DATA.BATCH_SIZE": 8} == start["config"]
    records = [record for record in read_records(folder / "metrics.jsonl") if record["step"] >= points[0]["step"]]
    assert [point["step"] for point in points] == [record["step"] for record in records]
    for point, record in zip(points, records, strict=True):
        for name, value in point.items():
            kind, _, rest = name.partition("/")
            assert name == "step" or (kind, value - (rest == "epoch")) == (record["kind"], record[rest])
    assert {"train/loss", "train/lr", "eval_raw/acc1", "eval_raw/loss"} <= {name for point in points for name in point}
    assert "printed by the tracker" not in outcome.output
    log = (folder / "log_rank0.txt").read_text()
    assert f"TRACKER=wandb: run {start['id']} of project flatten, https://host/run" in log
    assert KEY not in log
    assert all(KEY.encode() not in path.read_bytes() for path in folder.iterdir())


def create_tracker(folder) -> Tracker:
    tracker = build_tracker(load_config("quickstart", ["TRACKER", "wandb"]), "0" * 32, folder)
    assert tracker is not None
    return tracker


@pytest.mark.parametrize(
    ("failure", "warning"),
    [
        ("init raises", "no access with $WANDB_API_KEY to https://host/path; the run continues without the tracker"),
        ("init exits", "SystemExit: tracker; the run continues without the tracker"),
        ("log raises", "a point was not added (RuntimeError: no access with $WANDB_API_KEY to https://host/path)"),
        ("log is killed", "its process has ended (-9); the run continues without it"),
        ("log hangs", "not finished after 1 s, so its process is killed"),
        ("finish raises", "no access with $WANDB_API_KEY to https://host/path"),
        ("finish hangs", "not finished after 1 s, so its process is killed"),
    ],
)
def test_a_tracker_that_fails_causes_one_warning_without_secrets_and_ends(
    failure, warning, fake, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("FAILURE", failure)
    metrics, hangs = MetricsWriter(tmp_path, 0, tracker=create_tracker(tmp_path)), failure.endswith("hangs")
    tracker = metrics._tracker
    for step in range(2000 if hangs else 3):  # more than fit into the pipe
        tracker.scalars(step, {"train/loss": 0.5, "padding" * 10: 1.0})
    if failure == "log is killed":  # before the end of the run; else, there is nothing to warn about
        assert tracker._ended.wait(60)
    monkeypatch.setattr(engine.tracker, "SECONDS_AT_EXIT", 1.0 if hangs else 60.0)
    metrics.close(finished=True)
    assert tracker._ended.wait(60)
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(messages) == 1, messages
    assert warning in messages[0]
    assert KEY not in caplog.text


def test_a_process_that_cannot_be_started_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(engine.tracker.sys, "executable", str(tmp_path / "nothing"))
    tracker = create_tracker(tmp_path)
    tracker.scalars(1, {"train/loss": 0.5})
    started = time.monotonic()
    tracker.close(finished=True)
    assert time.monotonic() - started < 10
    assert caplog.text.count("TRACKER=wandb: not written (FileNotFoundError") == 1


def read_mlflow(folder) -> list:
    with sqlite3.connect(folder / "mlflow.db") as database:
        assert database.execute("SELECT name, status FROM runs").fetchall() == [("default", "FINISHED")]
        return database.execute("SELECT step, value FROM metrics WHERE key = 'train/loss' ORDER BY step").fetchall()


def read_trackio(folder) -> list:
    with sqlite3.connect(folder / "flatten.db") as database:
        rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    assert len({name for name, *_ in rows}) == 1
    return [(step, json.loads(values)["train/loss"]) for _, step, values in rows]


def read_wandb(folder) -> list:
    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2  # one for each process; "wandb sync" joins files with the same id
    assert len({path.name for path in files}) == 1
    content = b"".join(path.read_bytes() for path in files)
    assert b"train/loss" in content
    return [(step, value) for step, value in enumerate(LOSSES) if str(value).encode() in content]


LOSSES = [0.84375, 0.71875, 0.65625]  # exact in binary and in decimal digits
READERS = {"mlflow": read_mlflow, "trackio": read_trackio, "wandb": read_wandb}


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_two_processes_of_a_run_write_to_one_run_of_the_real_tracker(name, tmp_path, monkeypatch, caplog):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(engine.tracker, "SECONDS_AT_EXIT", 120.0)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    for steps in ([0, 1], [2]):
        tracker = build_tracker(load_config("quickstart", ["TRACKER", name]), "0" * 32, tmp_path)
        assert tracker is not None
        for step in steps:
            tracker.scalars(step, {"train/loss": LOSSES[step]})
        tracker.close(finished=True)
    assert READERS[name](tmp_path) == list(enumerate(LOSSES))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING], caplog.text
