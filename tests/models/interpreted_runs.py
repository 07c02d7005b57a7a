"""Whole runs with the Triton kernels, interpreted on the CPU; ``tests/models/test_kernels.py`` runs this file."""

import json

import pytest
import torch

from models import kernel_selection
from models.checkpoints.reader import read_checkpoint
from tests.conftest import write_images
from tests.launch import run_main

TINY = """
DATA: {IMG_SIZE: 16, BATCH_SIZE: 2, NUM_WORKERS: 0}
MODEL:
  TYPE: flatten_deit
  NAME: tiny
  NUM_CLASSES: 2
  DEIT: {PATCH_SIZE: 8, EMBED_DIM: 16, DEPTH: 1, NUM_HEADS: 1}
  LA: {ATTN_TYPE: L, KERNEL_SIZE: 3}
TRAIN: {EPOCHS: 1, WARMUP_EPOCHS: 0}
AUG: {MIXUP: 0.0, CUTMIX: 0.0, AUTO_AUGMENT: none}
"""


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory) -> list:
    """Arguments of ``main.py`` for a run of two updates on one process, or one update on two processes."""
    root = tmp_path_factory.mktemp("run")
    write_images(root / "data", "train", classes=2, per_class=2)
    write_images(root / "data", "val", classes=2, per_class=1)
    (root / "tiny.yaml").write_text(TINY)
    return ["--cfg", root / "tiny.yaml", "--data-path", root / "data"]


def accept_all(rank: int) -> None:
    kernel_selection._check = lambda variant: ""


def reject_on_rank_1(rank: int) -> None:
    kernel_selection._check = lambda variant: "the output differs" if rank == 1 else ""


def test_a_run_on_two_processes_uses_the_kernels_and_records_it(tiny_run, tmp_path):
    arguments = [*tiny_run, "--output", tmp_path]
    outcome = run_main(arguments, tmp_path / "log", processes=2, prepare=accept_all, timeout=600)
    assert outcome.exit_codes == [0, 0], outcome.output
    assert outcome.output.count("attention: triton kernels") == 1
    best = tmp_path / "tiny/default/best.pth"
    assert read_checkpoint(best)["environment"]["attention"] == "triton kernels"
    outcome = run_main(["--eval", *arguments, "--resume", best], tmp_path / "log", prepare=accept_all, timeout=600)
    assert outcome.exit_codes == [0], outcome.output
    assert json.loads((best.parent / "eval.json").read_text())["attention"] == "triton kernels"
    options = ["--opts", "TRAIN.EPOCHS", "2", "MODEL.LA.BACKEND", "torch"]  # another backend may resume the run
    outcome = run_main([*arguments, *options], tmp_path / "log", processes=2, timeout=600)
    assert outcome.exit_codes == [0, 0], outcome.output
    assert "attention: torch, because MODEL.LA.BACKEND is torch" in outcome.output


def test_all_processes_use_torch_if_one_of_them_cannot_use_the_kernels(tiny_run, tmp_path):
    arguments = [*tiny_run, "--output", tmp_path]
    outcome = run_main(arguments, tmp_path / "log", processes=2, prepare=reject_on_rank_1, timeout=600)
    assert outcome.exit_codes == [0, 0], outcome.output
    assert outcome.output.count("attention: torch, because the output differs") == 1
    arguments += ["--opts", "MODEL.LA.BACKEND", "triton", "TAG", "required"]
    outcome = run_main(arguments, tmp_path / "log", processes=2, prepare=reject_on_rank_1, timeout=600)
    assert outcome.exit_codes == [2, 2]
    assert (
        "MODEL.LA.BACKEND=triton: the output differs; to use torch operations, set --opts MODEL.LA.BACKEND auto"
        in outcome.output
    )


@pytest.mark.slow
def test_a_compiled_run_on_two_processes_has_the_weights_of_an_eager_run(tiny_run, tmp_path):
    weights = []
    for compiled in (False, True):
        arguments = [*tiny_run, "--output", tmp_path / str(compiled), "--opts", "TRAIN.COMPILE", compiled]
        outcome = run_main(arguments, tmp_path / "log", processes=2, prepare=accept_all, timeout=900)
        assert outcome.exit_codes == [0, 0], outcome.output
        assert "attention: triton kernels" in outcome.output
        weights.append(read_checkpoint(tmp_path / str(compiled) / "tiny/default/best.pth")["model"])
    for name, eager in weights[0].items():
        torch.testing.assert_close(weights[1][name], eager, rtol=1e-4, atol=1e-6)
