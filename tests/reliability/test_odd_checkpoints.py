"""Checkpoints with unexpected or malicious values: paths, limits, structure, names, and secrets in URLs."""

import json
import logging
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.optim import build_ema, build_optimizer, build_scaler
from engine.state import TrainState
from jobs.locate_checkpoint import Checkpoint, choose_config, open_checkpoint, stored_config
from jobs.model import check_model, load_models
from jobs.resume import check_resumable, resume
from models import build_model
from models.checkpoints.reader import CheckpointError, choose_weights, read_checkpoint
from tests.launch import run_main
from tests.runs import toy_arguments
from tests.server import serve
from utils.config.keys import KEYS, RECIPE_KEY_PREFIXES
from utils.config.loading import flatten, load_config
from utils.distributed import World
from utils.errors import ConfigError
from utils.log import setup_logging

pytestmark = [pytest.mark.reliability, pytest.mark.filterwarnings("ignore")]
WORLD = World(0, 0, 1, torch.device("cpu"))


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of every file and directory below a directory."""
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


# Keys that a weight file determines, and those that it also determines for an export or a replay. All others come from the
# command line: above all paths, output directories, and limits of memory and time.
FROM_A_FILE = {
    *("MODEL.TYPE", "MODEL.NAME", "MODEL.NUM_CLASSES", "MODEL.DROP_RATE", "MODEL.DROP_PATH_RATE"),
    *(name for name in KEYS if name.startswith(("MODEL.SWIN.", "MODEL.DEIT.", "MODEL.LA."))),
    *("DATA.IMG_SIZE", "DATA.INTERPOLATION", "DATA.MEAN", "DATA.STD", "DATA.EXIF", "DATA.VAL_FRACTION"),
    *("TEST.CROP", "TEST.CROP_MODE", "TEST.CROP_PCT", "TEST.INTERPOLATION", "AMP", "AMP_DTYPE", "TF32"),
}
OF_A_RECIPE = {
    *FROM_A_FILE,
    *(name for name in KEYS if name.startswith(("TRAIN.", "AUG.", "EMA."))),
    *("MODEL.LABEL_SMOOTHING", "SEED", "DETERMINISTIC", "CUDNN_BENCHMARK", "EVAL_FREQ", "BEST_METRIC"),
    *("DATA.BATCH_SIZE", "DATA.GLOBAL_BATCH_SIZE", "DATA.DROP_LAST", "DATA.SAMPLING", "DATA.ZIP_MODE"),
}


def another_value(name: str, value: object) -> object:
    """A legal value of a config key other than ``value``."""
    key = KEYS[name]
    if key.choices:
        return next((choice for choice in key.choices if choice != value), value)
    if isinstance(value, bool):
        return not value
    if isinstance(value, str):
        return "LLLS" if name == "MODEL.LA.ATTN_TYPE" else f"other{value}"
    if isinstance(value, (int, float)):
        return next(number for number in (0.5, 0.25, 1, 2, 3) if number != value and type(number) is type(value))
    return value


def test_only_keys_of_model_and_preprocessing_are_read_from_a_weight_file(trained):
    checkpoint, names = open_checkpoint(trained), set()
    for prefixes, expected in (({}, FROM_A_FILE), ({"prefixes": RECIPE_KEY_PREFIXES}, OF_A_RECIPE)):
        for name, key in KEYS.items():
            *sections, leaf = name.split(".")
            config = {"MODEL": {"TYPE": "flatten_swin"}}
            node = config
            for section in sections:
                node = node.setdefault(section, {})
            node[leaf] = another_value(name, key.default)
            try:
                cfg = stored_config(replace(checkpoint, state=checkpoint.state | {"config": config}), **prefixes)
            except ConfigError:  # the key was read, and conflicts with the default of another key
                assert name in expected
                continue
            if flatten(cfg)[name] != (os.path.expanduser(key.default) if key.is_path else key.default):
                assert name in expected or name == "TRAIN.RECIPE_BATCH_SIZE", name  # derived from the default batch size
                names.add(name)
    assert {"MODEL.NAME", "DATA.IMG_SIZE", "TEST.CROP_PCT", "AUG.MIXUP", "TRAIN.BASE_LR"} <= names


def test_evaluating_a_downloaded_file_writes_no_path_that_the_file_names(trained, toy_data, tmp_path, monkeypatch):
    victim, work = tmp_path / "victim/toy/default", tmp_path / "work"
    victim.mkdir(parents=True)
    work.mkdir()
    for name in ("eval.json", "confusion.png", "predictions_raw.csv"):
        (victim / name).write_text("results")
    state = read_checkpoint(trained)
    config, outside = state["config"], str(tmp_path / "victim")
    config["OUTPUT"], config["MODEL"]["NAME"], config["TAG"] = outside, "toy", "default"
    config["DATA"]["INDEX_CACHE"], config["DATA"]["DATA_PATH"] = f"{outside}/cache", outside
    config["TEST"] |= {"CLASS_MAP": f"{outside}/map", "REAL_LABELS": f"{outside}/real", "PREDICTIONS": True}
    config["ATTENTION_IMAGE"] = f"{outside}/image.png"
    torch.save(state, tmp_path / "file.pth")
    before = snapshot(tmp_path / "victim")
    monkeypatch.chdir(work)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with serve({"file.pth": (tmp_path / "file.pth").read_bytes()}) as server:
        url = server.url.replace("http://", "http://user:PASSWORD@") + "/file.pth?signature=SECRET"
        outcome = run_main(["--eval", "--resume", url, "--data-path", toy_data], tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    assert snapshot(tmp_path / "victim") == before
    (results,) = work.rglob("eval.json")
    assert results.parent.parent.parent == work / "output"
    assert results.parent.parent.name.startswith("file-")
    assert sorted(path.name for path in results.parent.iterdir()) == ["confusion.png", "eval.json", "eval_classes.csv"]
    assert_no_secrets(tmp_path, outcome.output)


def assert_no_secrets(folder: Path, output: str) -> None:
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        assert not [secret for secret in (b"SECRET", b"PASSWORD") if secret in path.read_bytes()], path
    assert "SECRET" not in output
    assert "PASSWORD" not in output


@pytest.mark.parametrize("name", ["../up", "/absolute", "a/b", "a\\b", "..", "", "a\nb", "a\x1b[2J", "a\u202eb", "a\u2028b"])
def test_a_model_name_that_is_no_file_name_is_rejected_from_any_source(name, trained, toy_config, tmp_path):
    state = read_checkpoint(trained)
    state["config"]["MODEL"]["NAME"] = name
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(ConfigError, match=r"MODEL\.NAME="):
        stored_config(open_checkpoint(tmp_path / "file.pth"))
    for key in ("MODEL.NAME", "TAG"):
        with pytest.raises(ConfigError, match=key):
            load_config(toy_config, [key, name])


def test_a_run_stores_no_secrets_of_the_url_of_its_weights(trained, toy_config, toy_data, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    short = ["TRAIN.EPOCHS", 1, "TRAIN.WARMUP_EPOCHS", 0]
    with serve({"best.pth": trained.read_bytes()}) as server:
        host = server.url.replace("http://", "http://user:PASSWORD@")
        arguments = toy_arguments(toy_config, toy_data, tmp_path / "output", *short)
        arguments += [f"MODEL.PRETRAINED={host}/best.pth?X-Amz-Signature=SECRET#SECRET"]
        outcome = run_main(arguments, tmp_path / "log")
        assert outcome.exit_codes == [0], outcome.output
        assert server.requests == ["/f/best.pth?X-Amz-Signature=SECRET"]
        missing = run_main(
            ["--eval", "--resume", f"{host}/missing?k=SECRET", "--data-path", toy_data, "--opts", *short], tmp_path / "log2"
        )
        assert missing.exit_codes == [2]
        assert f"{server.url}/missing: the server answered 404" in missing.output
    cfg = read_checkpoint(tmp_path / "output/toy/default/best.pth")["config"]
    assert cfg["MODEL"]["PRETRAINED"] == f"{server.url}/best.pth"
    assert f"{server.url}/best.pth" == load_config(tmp_path / "output/toy/default/config.yaml").MODEL.PRETRAINED
    assert_no_secrets(tmp_path, outcome.output + missing.output)


def test_evaluation_of_pretrained_weights_needs_no_config(trained, toy_data, tmp_path):
    """--eval evaluates the file of --pretrained, and refuses two files."""
    shutil.copy(trained, tmp_path / "mine.pth")
    outcome = run_main(["--eval", "--pretrained", tmp_path / "mine.pth", "--data-path", toy_data], tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    assert json.loads((tmp_path / "eval.json").read_text())["checkpoint"] == str(tmp_path / "mine.pth")
    both = ["--eval", "--pretrained", tmp_path / "mine.pth", "--resume", trained, "--data-path", toy_data]
    outcome = run_main(both, tmp_path / "log")
    assert outcome.exit_codes == [2]
    assert "--resume and --pretrained: give only one of them" in outcome.output


# --- Random changes of a valid checkpoint

DEADLINE = 30  # seconds for all readers of one file
HOSTILE_TEXT = "x\n[2026-01-01 00:00:00] WARNING forged\x1b[2K\r\u202e\u2028<script>"


def shared_references(depth: int) -> object:
    value: object = [1]
    for _ in range(depth):
        value = {"a": value, "b": value}
    return value


def nested(depth: int) -> object:
    value: object = 1
    for _ in range(depth):
        value = [value]
    return value


def odd_value(rng: random.Random) -> object:
    """A value that a careless reader could not bear."""
    return rng.choice(
        [
            lambda: None,
            lambda: True,
            lambda: -1,
            lambda: 10**18,
            lambda: 2**62,
            lambda: float("nan"),
            lambda: float("-inf"),
            lambda: 1e308,
            lambda: "",
            lambda: HOSTILE_TEXT,
            lambda: "../../victim",
            lambda: "9" * 5000,
            lambda: "a" * 700_000,
            lambda: "rand-" + "m9-" * 300,
            lambda: [],
            lambda: {},
            lambda: [float("nan")] * 3,
            lambda: ["x"] * 300_000,
            lambda: [[1, [2]], "x"],
            lambda: {"x": torch.zeros(2)},
            lambda: {1: 2, "x": {"y": HOSTILE_TEXT}},
            lambda: shared_references(rng.choice([5, 24, 60])),
            lambda: nested(rng.choice([20, 200])),
            lambda: torch.zeros(3),
            lambda: torch.zeros(()),
            lambda: torch.zeros(0),
            lambda: torch.full((3,), float("nan")),
            lambda: torch.zeros(4, dtype=torch.int64),
            lambda: torch.zeros(2, dtype=torch.complex64),
            lambda: torch.zeros(1).expand(10**12),
            lambda: torch.zeros(2, device="meta"),
            lambda: torch.eye(3).to_sparse(),
            lambda: torch.zeros(2, dtype=torch.float8_e4m3fn),
            lambda: torch.nn.Parameter(torch.zeros(3)),
            lambda: torch.Size([2**40, 2**20]),
            lambda: torch.float16,
        ]
    )()


def containers(value: object, found: list, depth: int = 0) -> list:
    """All dictionaries and lists in a value."""
    if isinstance(value, (dict, list)) and depth < 8:
        found.append(value)
        for item in value.values() if isinstance(value, dict) else value:
            containers(item, found, depth + 1)
    return found


def change(state: dict, rng: random.Random) -> str:
    """Make one to three random changes to a checkpoint. Returns a description of the draw."""
    changes = []
    for _ in range(rng.choice([1, 1, 2, 3])):
        # Half of the changes affect entries at the top, and values of the config, which have the most readers.
        places = [state, *(containers(state["config"], []) if isinstance(state.get("config"), dict) else [])]
        container = rng.choice(places if rng.random() < 0.5 else [place for place in containers(state, []) if place])
        keys = list(container) if isinstance(container, dict) else list(range(len(container)))
        key = rng.choice(keys or [0])
        kind = rng.choice(["replace", "replace", "replace", "remove", "rename", "reshape"])
        changes.append(f"{kind} {str(key)[:40]!r}")
        if isinstance(container, list):
            container[key:] = [odd_value(rng)] if kind == "replace" else []
        elif kind == "remove":
            container.pop(key, None)
        elif kind == "rename":
            odd_key = rng.choice([HOSTILE_TEXT, None, 7, (1, 2), "x" * 2_000_000, b"bytes", 1.5, True])
            container[odd_key] = container.pop(key, None)
        elif kind == "reshape" and isinstance(container.get(key), torch.Tensor):
            tensor = container[key]
            container[key] = rng.choice([tensor[..., None], tensor.double(), tensor.flatten()[:1]])
        else:
            container[key] = odd_value(rng)
    return ", ".join(changes)


def read_everywhere(path: Path, toy_config: Path, folder: Path) -> None:
    """Read a checkpoint with all readers. Each either succeeds or raises an error for the user, which is logged."""

    def evaluate(checkpoint: Checkpoint) -> None:
        cfg = choose_config(checkpoint, None)
        check_model(cfg)
        label, _ = choose_weights(checkpoint.state, "auto", path)
        load_models(checkpoint, cfg, labels=(label,), device=torch.device("cpu"))

    def export(checkpoint: Checkpoint) -> None:
        cfg = stored_config(checkpoint, prefixes=RECIPE_KEY_PREFIXES)
        json.dumps(flatten(cfg) if cfg is not None else None, allow_nan=False)

    def resume_run(checkpoint: Checkpoint) -> None:
        cfg, saved = load_config(toy_config, ["TRAIN.EPOCHS", 2]), checkpoint.state
        choose_config(checkpoint, cfg)  # logs the differences
        check_resumable(saved, cfg, WORLD, str(path))
        model = build_model(cfg)
        state = TrainState(model, build_optimizer(cfg, model), build_scaler(cfg, WORLD.device), build_ema(cfg, model))
        resume(state, saved, cfg, saved["updates_per_epoch"], str(path))
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        state.optimizer.step()

    setup_logging(0, folder)
    try:
        checkpoint = open_checkpoint(path)
        for read in (evaluate, export, resume_run):
            try:
                read(checkpoint)
            except (CheckpointError, ConfigError) as error:
                logging.getLogger("test").error("%s", error)
    except CheckpointError as error:
        logging.getLogger("test").error("%s", error)
    logging.shutdown()


def read_in_child(path: Path, toy_config: Path, log: Path) -> None:
    signal.alarm(DEADLINE)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(1)
    try:
        read_everywhere(path, toy_config, log.parent)
    except BaseException:
        os.write(2, b"\nUNEXPECTED " + traceback.format_exc().encode(errors="replace"))
        os._exit(1)
    os._exit(0)


def examine_draw(seed: int, state: bytes, toy_config: Path, folder: Path) -> str:
    """Read a changed checkpoint in a child process. Returns a description of what went wrong, "" if nothing."""
    rng = random.Random(seed)
    changed = pickle.loads(state)
    what = change(changed, rng)
    work = folder / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    path, log = work / "file.pth", work / "log.txt"
    torch.save(changed, path)
    before = snapshot(folder / "victim")
    child = multiprocessing.get_context("fork").Process(target=read_in_child, args=(path, toy_config, log))
    started = time.monotonic()
    child.start()
    child.join(DEADLINE + 30)
    child.kill()
    child.join()
    output = log.read_text(errors="replace") if log.exists() else ""
    lines = [
        line
        for name in ("log.txt", "log_rank0.txt")
        if (work / name).exists()
        for line in (work / name).read_text().split("\n")
    ]
    forged = [line for line in lines if line.startswith("[2026-01-01") or "\x1b[2K" in line or "\u202e" in line]
    if child.exitcode != 0 or forged or snapshot(folder / "victim") != before:
        ending = "\n".join(output.splitlines()[-6:])[-1500:]
        return f"seed {seed} ({what}): status {child.exitcode} after {time.monotonic() - started:.0f} s, {forged[:1]}\n{ending}"
    return ""


def examine(seeds: range, trained: Path, toy_config: Path, folder: Path) -> None:
    (folder / "victim").mkdir()
    (folder / "victim/file").write_text("unchanged")
    state = pickle.dumps(read_checkpoint(trained))
    failures = [failure for seed in seeds if (failure := examine_draw(seed, state, toy_config, folder))]
    assert not failures, f"{len(failures)} of {len(seeds)} draws:\n" + "\n\n".join(failures[:40])


def test_x5_changed_checkpoints_are_read_or_rejected_with_one_error(trained, toy_config, tmp_path):
    examine(range(40), trained, toy_config, tmp_path)


@pytest.mark.slow
def test_x5_five_hundred_changed_checkpoints_are_read_or_rejected_with_one_error(trained, toy_config, tmp_path):
    examine(range(500), trained, toy_config, tmp_path)
