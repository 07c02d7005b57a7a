"""The search of the largest batch, with a lack of memory that is injected into the training step."""

import itertools
import re
import sys

import pytest
import torch

import engine.dry_run
import engine.largest_batch
import engine.profiler
from engine.checkpoint_writer import to_host
from engine.largest_batch import search_largest
from jobs.launch import describe_known_error
from tests.engine.test_profiler import read_own_times, read_table
from tests.engine.test_trainer import create_trainer
from tests.launch import run_main
from tests.runs import assert_equal, toy_arguments
from utils.config.loading import load_config
from utils.errors import ConfigError


def limit_memory(*limits: int, in_backward: bool = False):
    """Return a function that lets the classifier of rank r run out of memory on batches of more than ``limits[r]`` images.

    Args:
        in_backward: raise the error in the backward pass instead of the forward pass.
    """

    def prepare(rank: int) -> None:
        forward = torch.nn.Linear.forward
        error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

        def fail(*_: object) -> None:
            raise error

        def limited(self, images):
            logits = forward(self, images)
            if images.dim() == 2 and len(images) > limits[rank] and logits.requires_grad:
                logits.register_hook(fail) if in_backward else fail()
            return logits

        torch.nn.Linear.forward = limited
        engine.largest_batch.can_measure = lambda device: True
        engine.dry_run.MEASUREMENT_SECONDS = 0

    return prepare


@pytest.mark.parametrize("limit", [8, 64, 100, 1000])
def test_the_search_finds_the_largest_batch_that_fits_within_an_eighth(limit):
    for capacity in range(limit + 20):
        tried = []

        def fits(size, capacity=capacity, tried=tried):
            tried.append(size)
            return size <= capacity

        found = search_largest(fits, 8, limit)
        assert found <= min(capacity, limit) <= found + max(found // 8, 1) - (capacity < limit)
        assert tried[0] == 8
        assert max(tried) <= limit
        assert len(tried) <= 12


def test_a_check_reports_the_largest_batch_of_all_processes_and_restores_the_state(toy_config, toy_data, tmp_path):
    """13 images fit in rank 1, 20 in rank 0. The same run writes a profile, of rank 0 only."""

    def prepare(rank):
        limit_memory(20, 13, in_backward=True)(rank)
        check_batch_size = engine.dry_run.check_batch_size

        def compare(trainer, batch):
            before = to_host(trainer.state.to_dict(), copy=True)
            check_batch_size(trainer, batch)
            assert_equal(to_host(trainer.state.to_dict()), before)
            assert trainer.collect_reports(max_pending=0) == []
            sys.stdout.write("the state is equal\n")

        engine.dry_run.check_batch_size = compare
        engine.profiler.NUM_UPDATES = 1

    folder = tmp_path / "new/profile"
    arguments = [*toy_arguments(toy_config, toy_data, tmp_path / "out"), "--profile", folder]
    outcome = run_main([*arguments, "--check"], tmp_path / "log", processes=2, prepare=prepare)
    assert outcome.exit_codes == [0, 0], outcome.output
    assert outcome.output.count("the largest batch size per process that fits is 13; the run uses 8") == 1
    assert outcome.output.count("the state is equal") == 2
    assert [path.name for path in folder.iterdir()] == ["toy.pt.trace.json.gz"]
    assert "_FocusedAttention" in read_own_times(folder / "toy.pt.trace.json.gz")
    assert len(read_table(outcome.output)) == 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log", "new"]


def test_the_options_of_a_batch_that_does_not_fit_are_accepted_and_keep_the_global_batch(toy_config, toy_data, tmp_path):
    arguments = [*toy_arguments(toy_config, toy_data, tmp_path / "out", "TRAIN.ACCUMULATION_STEPS", 2), "--check"]
    outcome = run_main(arguments, tmp_path / "log", processes=2, prepare=limit_memory(8, 7))
    assert outcome.exit_codes == [2, 2], outcome.output
    message = "DATA.BATCH_SIZE=8: a training step runs out of GPU memory; the largest batch size per process that fits is 7."
    assert outcome.output.count(message) == 1
    options = re.search(r"add (--batch-size 4 --opts DATA.GLOBAL_BATCH_SIZE 32 TRAIN.ACCUMULATION_STEPS 0);", outcome.output)
    assert options, outcome.output
    outcome = run_main([*arguments, *options[1].split()], tmp_path / "log", processes=2, prepare=limit_memory(8, 7))
    assert outcome.exit_codes == [0, 0], outcome.output
    assert "global batch size 32 (batch size 4" in outcome.output
    assert "the largest batch size per process that fits is 7; the run uses 4" in outcome.output


OUT_OF_MEMORY_ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY_ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("amp", [[], ["AMP", True, "AMP_DTYPE", "fp16"]], ids=["fp32", "fp16"])
def test_an_update_that_runs_out_of_memory_in_the_optimizer_leaves_no_part_of_its_state(amp, error, tmp_path, monkeypatch):
    optimizer = ["TRAIN.OPTIMIZER.NAME", "adamw", "TRAIN.OPTIMIZER.MOMENTUM", 0.9]
    trainer = create_trainer(tmp_path, "DATA.BATCH_SIZE", 8, *optimizer, *amp)
    trainer.train_loader.dataset = range(16)
    trainer.train_loader.set_position(0)
    trainer.model.train()
    allocate, num_calls = torch.zeros_like, itertools.count()

    def fail_once(*args, **options):
        if next(num_calls) == 1:  # the second average of the first parameter
            raise error
        return allocate(*args, **options)

    monkeypatch.setattr(torch, "zeros_like", fail_once)
    monkeypatch.setattr(engine.largest_batch, "can_measure", lambda device: True)
    before = to_host(trainer.state.to_dict(), copy=True)
    with pytest.raises(ConfigError, match="the largest batch size per process that fits is 7"):
        engine.largest_batch.check_batch_size(trainer, next(iter(trainer.train_loader)))
    assert next(num_calls) > 2
    assert_equal(to_host(trainer.state.to_dict()), before)


def test_a_model_that_does_not_fit_with_one_image_needs_another_remedy(toy_config):
    with pytest.raises(ConfigError, match="even with one image; add --use-checkpoint, or choose a smaller model"):
        engine.largest_batch._refuse(load_config(toy_config, ["AMP", True]), 2, 0)


def test_a_lack_of_memory_in_any_job_refers_to_the_check():
    with pytest.raises(RuntimeError) as of_cpu:
        torch.empty(2**60)
    for error in [*OUT_OF_MEMORY_ERRORS, of_cpu.value]:
        message = describe_known_error(error, None)
        assert message is not None, error
        assert "a training command with --check reports the values that fit" in message
