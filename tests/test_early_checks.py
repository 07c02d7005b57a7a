"""Mistakes in the command are reported before torch is imported, in one line with a remedy that the next command accepts."""

import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from data.sources.folder import Folder
from jobs import throughput
from jobs.early_checks import check_data
from tests.conftest import CONFIGS
from tests.launch import ROOT
from utils.config.arguments import parse_arguments
from utils.config.loading import find_config, load_config
from utils.errors import ConfigError

# Run commands of main.py, separated by lines, in a process that cannot import torch.
WITHOUT_TORCH = """
import shlex, sys
sys.modules["torch"] = sys.modules["mlflow"] = None
import main
for command in sys.stdin.read().splitlines():
    sys.argv = ["main.py", *shlex.split(command)]
    try:
        main.main()
    except SystemExit as end:
        print(f"status {end.code}", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Directories with data: 15 training images of 3 classes, no validation split, and images without class directories."""
    root = tmp_path_factory.mktemp("data")
    for name in (
        "few/train/a",
        "few/train/b",
        "few/train/c",
        "few/val/a",
        "few/val/b",
        "few/val/c",
        "no_val/train/a",
        "flat/val",
    ):
        (root / name).mkdir(parents=True)
        for number in range(5):
            Image.new("RGB", (8, 8)).save(root / name / f"{number}.png")
    return root


def test_mistakes_are_reported_in_one_line_without_importing_torch(data, tmp_path):
    config = f"--cfg quickstart --output {tmp_path}"
    expected = {
        f"{config} --data-path {data}/nowhere": "no such directory",
        f"{config} --data-path {data}/no_val": "no validation split",
        f"--eval --resume flatten_swin_t --data-path {data}/no_val": "no validation split",
        f"{config} --data-path {data}/flat --opts DATA.TRAIN_SPLIT=val": "no class directories",
        f"{config} --data-path {data}/few": "contains 3 classes, but the model has 10 .* add --opts MODEL.NUM_CLASSES 3",
        f"{config} --data-path {data}/few --opts MODEL.NUM_CLASSES 3": "has at most 15 images, .*; add --batch-size 2",
        f"{config} --data-path {data}/few --batch-size 4 --opts DATA.GLOBAL_BATCH_SIZE 6": "is not a multiple of 4",
        f"{config} --data-path {data}/few --opts TRACKER mlflow": "the package is not installed; run pip install mlflow, or",
        f"{config} --opts TRACKER wandby": "TRACKER='wandby': choose one of .*; did you mean 'wandb'",
        f"{config} --opts TRAIN.OPTIMIZER.NAME AdamW": "TRAIN.OPTIMIZER.NAME='AdamW': choose one of .*; did you mean 'adamw'",
        "--cfg quickstrat": "no config has this name; .*quickstart.yaml",
        f"{config} --data-path {data}/few --resume nope": "--resume=nope: no such file",
        "--resume nope": "--resume=nope: no such file",
        "--cfg quickstart --epochs 3": "unknown argument --epochs: set it with --opts TRAIN.EPOCHS 3",
        "--cfg quickstart --lr=1e-3": "unknown argument --lr=1e-3: set it with --opts TRAIN.BASE_LR 1e-3",
        "--cfg quickstart --batch-size x": "argument --batch-size: invalid int value: 'x'; see --help",
        "--batchsize 3": r"did you mean --batch-size\?",
        "--data photos": r"did you mean --data-path\?",
        "--cfg small --data-path tets": r"DATA\.DATA_PATH=tets: no such directory; did you mean tests\?",
        "--cfg small --data-path README.md": r"README\.md: a file, not a directory; give",
        "--cfg configs/none.yaml": "cannot be read",
        "--cfg configs/smalls.yaml": "configs/small.yaml",
        "--cfg configs/smal": "small.yaml",
        "--cfg ''": r"give a config whose name ends in \.yaml or \.yml$",
        "--cfg configs": r"give a config whose name ends in \.yaml or \.yml$",
        "--cfg quickstart --data-path . --pretrained x.pth": "x.pth: no such file",
        "--eval --pretrained x.pth --data-path .": "--pretrained=x.pth: no such file",
        "--eval --resume flaten_swin_t": "did you mean the model flatten_swin_t",
        "--cfg quickstart --data-path . --opts TRAIN.TEACHER regnety_160": "TRAIN.TEACHER=regnety_160: no such .* as timm:NAME",
        "--eval": "no weights to evaluate",
        "--cfg quickstart --opts TRAIN.EPOCHS DATA.DATA_PATH x": "has no value",
        "--cfg quickstart --data-path . --opts TRAIN.EPOCHS": "'TRAIN.EPOCHS' has no value; give KEY",
    }
    commands = "\n".join(map(str, expected))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    options = {"input": commands, "capture_output": True, "text": True, "timeout": 120, "cwd": ROOT, "env": environment}
    process = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], check=False, **options)
    lines = process.stderr.splitlines()
    assert len(lines) == 2 * len(expected), process.stderr
    for (command, message), line, status in zip(expected.items(), lines[::2], lines[1::2], strict=True):
        assert re.search(f"main.py: error: .*{message}", line), f"{command}: {line}"
        assert status == "status 2"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("epochs", [1, 2, 3, 15])
def test_the_remedy_for_a_long_warm_up_is_accepted(epochs):
    opts = ["TRAIN.EPOCHS", epochs]
    with pytest.raises(ConfigError, match="add --opts") as error:
        load_config("flatten_swin_t", opts)
    remedy = re.search(r"add --opts (.*)", str(error.value))[1]
    cfg = load_config("flatten_swin_t", [*opts, *shlex.split(remedy)])
    assert 0 <= cfg.TRAIN.WARMUP_EPOCHS <= cfg.TRAIN.EPOCHS == epochs


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("flatten_swin_t", "flatten_swin_t.yaml"),
        ("flatten_swin_t.yaml", "flatten_swin_t.yaml"),
        ("finetune", "recipes/finetune.yaml"),
        ("recipes/finetune", "recipes/finetune.yaml"),
        (str(CONFIGS / "quickstart"), "quickstart"),
    ],
)
def test_configs_are_found_by_name(name, file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == CONFIGS / file
    (tmp_path / "finetune.yaml").write_text("")
    assert find_config("finetune") == Path("finetune.yaml")  # files of the user come first


def test_the_name_of_several_configs_or_of_none_is_refused_with_the_candidates(tmp_path, monkeypatch):
    monkeypatch.setattr("utils.config.loading.CONFIGS", tmp_path)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "tiny.yaml").write_text("")
    with pytest.raises(ConfigError, match=r"several configs have this name; there are .*one/tiny\.yaml, .*two/tiny\.yaml"):
        find_config("tiny")
    assert find_config("two/tiny") == tmp_path / "two/tiny.yaml"
    with pytest.raises(ConfigError, match=r"no config has this name; there are .*one/tiny\.yaml"):
        find_config("tinny")


def test_the_number_of_images_is_checked_by_reading_few_directory_entries(tmp_path, monkeypatch):
    for number in range(300):
        (tmp_path / "train" / str(number % 3)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / str(number % 3) / f"{number}.png").touch()
    num_read, scandir = 0, os.scandir

    class Counted:
        def __init__(self, path):
            self.entries = scandir(path)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.entries.close()

        def __iter__(self):
            nonlocal num_read
            for entry in self.entries:
                num_read += 1
                yield entry

    monkeypatch.setattr("data.sources.folder.os.scandir", Counted)
    assert Folder(tmp_path, "train").count_files(20) is None
    assert num_read < 30
    assert Folder(tmp_path, "train").count_files(300) is None
    assert Folder(tmp_path, "train").count_files(301) == 300


def test_a_run_that_resumes_is_not_checked_since_a_finished_run_reads_no_data(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["main.py", "--cfg", "quickstart"])
    args = parse_arguments("")
    cfg = load_config("quickstart", ["DATA.DATA_PATH", str(tmp_path), "OUTPUT", str(tmp_path)])
    with pytest.raises(ValueError, match="no training split"):
        check_data(args, cfg, [], 1)
    folder = tmp_path / cfg.MODEL.NAME / cfg.TAG
    folder.mkdir(parents=True)
    (folder / "checkpoint_000000001.pth").touch()
    check_data(args, cfg, [], 1)


def test_the_measurement_of_throughput_ends_after_a_maximum_time(monkeypatch):
    """A forward pass that takes 50 ms; 50 + 30 of them would take 4 s."""
    monkeypatch.setattr(throughput, "WARMUP_SECONDS", 0.08)
    monkeypatch.setattr(throughput, "MEASURED_SECONDS", 0.08)
    calls = []

    def model(images):
        calls.append(time.sleep(0.05))

    speed = throughput.images_per_second(model, torch.zeros(8, 1), torch.float32, warmup_batches=50, measured_batches=30)
    assert 2 <= len(calls) <= 4
    assert 8 <= speed <= 160


def test_throughput_is_measured_with_fewer_images_if_a_batch_takes_too_long(monkeypatch):
    """A forward pass that takes 20 ms per image, measured for 0.4 s: batches of about 10 images take the half of it."""
    monkeypatch.setattr(throughput, "MEASURED_SECONDS", 0.4)

    def model(images):
        time.sleep(0.02 * len(images))

    assert 1 <= throughput.fitting_batch_size(model, torch.zeros(1, 1), 128, torch.float32) <= 10
    assert throughput.fitting_batch_size(model, torch.zeros(1, 1), 1, torch.float32) == 1
