"""Fixtures and helpers for several test files: reference values with their weights and inputs, toy data, and toy runs."""

import json
import logging
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

if "FLATTEN_TEST_GPU" not in os.environ:
    # Hide the GPUs: the tests compare CPU results, and may start more processes than there are GPUs.
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"

REFERENCE = Path(__file__).parent / "reference"
CONFIGS = Path(__file__).parent.parent / "configs"


# Modules that ``-m fast`` selects: together they test every library package in less than a minute.
FAST = {
    "analysis.test_focus_experiment",
    "analysis.test_maps",
    "analysis.test_measures",
    "data.test_build",
    "data.test_erasing",
    "models.test_fused_attention",
    "models.test_linear_attention",
    "models.test_sizes",
    "models.test_swin",
    "reliability.test_table",
    "test_architecture",
    "test_documentation",
    "test_recipes",
    "utils.test_config",
    "engine.test_schedule",
    "engine.test_trainer",
    "models.test_download",
}


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(items):
    # Mark the tests before pytest applies -m, which would otherwise find no test with the marker.
    for item in items:
        if item.module.__name__.removeprefix("tests.") in FAST and item.get_closest_marker("slow") is None:
            item.add_marker("fast")
    yield
    # Tests that run main.py or scripts come first, also if a plugin shuffles the tests: the runs are forked from this process,
    # and take twice as long once large models have filled its memory.
    items.sort(key=lambda item: not (hasattr(item.module, "run_main") or hasattr(item.module, "run_script")))


@pytest.fixture(autouse=True)
def _restore_logging():
    """Begin each test with the default level of the root logger, and remove the handlers that its ``setup_logging`` added."""
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    handlers = list(root.handlers)
    yield
    for handler in set(root.handlers) - set(handlers):
        handler.close()
    root.handlers[:] = handlers
    logging.captureWarnings(False)


def reference(name: str):
    """Read a file of reference values, which were measured on the paper's code; see tests/reference/README.md."""
    return json.loads((REFERENCE / f"{name}.json").read_text())


def seeded_weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Random values of a parameter, as used for the reference values; the seed is the CRC-32 of the parameter name."""
    z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name.endswith(".weight") and len(shape) == 1:
        z = 1 + 0.1 * z
    elif name.endswith("bias"):
        z = 0.1 * z
    elif name.endswith(".scale"):
        z = 0.5 * z
    elif any(part in name for part in ("positional_encoding", "relative_position_bias_table", "pos_embed")):
        z = 0.2 * z
    else:
        z = z / np.sqrt(np.prod(shape[1:]))
    return torch.tensor(z, dtype=torch.float32)


def seeded_image(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Random model inputs, as used for the reference values: standard normal, drawn with the given seed."""
    return torch.tensor(np.random.RandomState(seed).standard_normal(shape).astype(np.float32))


def fill_with_seeded_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Set every parameter to the values that ``seeded_weight`` returns for it."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(seeded_weight(name, tuple(parameter.shape)))
    return model


def write_images(root: Path, split: str, *, classes: int, per_class: int, size: int = 40) -> None:
    """Write images of random noise whose brightness depends on the class, so that a model can learn the classes."""
    for label in range(classes):
        folder = root / split / f"class{label}"
        folder.mkdir(parents=True)
        for index in range(per_class):
            rng = np.random.default_rng([label, index, len(split)])
            pixels = rng.integers(0, 120, (size, size, 3)) + 30 * label
            Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:03d}.png")


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory) -> Path:
    """Directory with 102 training and 33 validation images of 3 classes."""
    root = tmp_path_factory.mktemp("toy data")
    write_images(root, "train", classes=3, per_class=34)
    write_images(root, "val", classes=3, per_class=11)
    return root


TOY_CONFIG = """
DATA: {IMG_SIZE: 40, BATCH_SIZE: 8, NUM_WORKERS: 0}
MODEL:
  TYPE: flatten_swin
  NAME: toy
  NUM_CLASSES: 3
  DROP_PATH_RATE: 0.2
  DROP_RATE: 0.1
  SWIN: {EMBED_DIM: 16, DEPTHS: [1, 2, 1], NUM_HEADS: [1, 2, 4], WINDOW_SIZE: 56}
  LA: {ATTN_TYPE: LLS}
TRAIN: {EPOCHS: 3, WARMUP_EPOCHS: 1, BASE_LR: 5.0e-2}
EMA: {ENABLED: True, DECAY: 0.9}
PRINT_FREQ: 2
"""


@pytest.fixture(scope="session")
def toy_config(tmp_path_factory) -> Path:
    """Config of a model that trains in seconds, with augmentation, mixup, dropout and drop path enabled."""
    path = tmp_path_factory.mktemp("config") / "toy.yaml"
    path.write_text(TOY_CONFIG)
    return path


@pytest.fixture(scope="session")
def trained(toy_config, toy_data, tmp_path_factory) -> Path:
    """Path of ``best.pth`` of a run of two epochs. Tests must not write to its directory."""
    from tests.launch import run_main

    output = tmp_path_factory.mktemp("trained")
    arguments = ["--cfg", toy_config, "--data-path", toy_data, "--output", output, "--opts", "TRAIN.EPOCHS", "2"]
    outcome = run_main(arguments, output / "log")
    assert outcome.exit_codes == [0], outcome.output
    return output / "toy/default/best.pth"


@pytest.fixture(scope="session")
def uninterrupted(toy_config, toy_data, tmp_path_factory):
    """Return a function that trains without interruption on a given number of processes and returns the output directory."""
    folders = {}

    from tests.launch import run_main
    from tests.runs import toy_arguments

    def run(processes: int) -> Path:
        if processes not in folders:
            output = tmp_path_factory.mktemp(f"uninterrupted{processes}")
            arguments = toy_arguments(toy_config, toy_data, output, "SAVE_STEPS", 2, "DATA.BATCH_SIZE", 8 // processes)
            outcome = run_main(arguments, output / "log", processes=processes)
            assert set(outcome.exit_codes) == {0}, outcome.output
            folders[processes] = output / "toy" / "default"
        return folders[processes]

    return run
