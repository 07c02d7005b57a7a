import pytest
import torch
from torch.optim.lr_scheduler import ConstantLR, MultiStepLR, PolynomialLR

from engine.schedule import Schedule, accumulation_steps, build_schedule, global_batch_size
from tests.conftest import CONFIGS, reference
from utils.config.loading import load_config
from utils.errors import ConfigError

REFERENCE_SCHEDULES = [recorded for recorded in reference("lr_schedule") if (CONFIGS / f"{recorded['config']}.yaml").exists()]


@pytest.mark.parametrize("recorded", REFERENCE_SCHEDULES, ids=lambda recorded: recorded["config"])
def test_learning_rates_equal_the_reference_values(recorded):
    cfg = load_config(CONFIGS / f"{recorded['config']}.yaml", ["DATA.BATCH_SIZE", recorded["batch_size_per_gpu"]])
    schedule = build_schedule(cfg, updates_per_epoch=recorded["iters_per_epoch"], world_size=recorded["world_size"])
    assert [schedule(update) for update in recorded["updates"]] == pytest.approx(recorded["lr"], rel=1e-6)


def test_accumulation_scales_the_learning_rate_like_a_larger_batch():
    path = CONFIGS / "flatten_swin_t.yaml"
    expected = build_schedule(load_config(path, ["DATA.BATCH_SIZE", 128]), updates_per_epoch=10, world_size=8)
    cfg = load_config(path, ["DATA.BATCH_SIZE", 64, "TRAIN.ACCUMULATION_STEPS", 4])
    assert build_schedule(cfg, updates_per_epoch=10, world_size=4) == expected


@pytest.mark.parametrize(("processes", "batch_size", "steps"), [(8, 128, 1), (4, 256, 1), (2, 128, 4)])
def test_a_global_batch_size_gives_the_same_schedule_for_any_number_of_processes(processes, batch_size, steps):
    cfg = load_config(CONFIGS / "flatten_swin_t.yaml", ["DATA.GLOBAL_BATCH_SIZE", 1024, "DATA.BATCH_SIZE", batch_size])
    assert accumulation_steps(cfg, processes) == steps
    assert global_batch_size(cfg, processes) == 1024
    expected = build_schedule(load_config(CONFIGS / "flatten_swin_t.yaml"), updates_per_epoch=10, world_size=8)
    assert build_schedule(cfg, updates_per_epoch=10, world_size=processes) == expected


def test_a_global_batch_size_that_is_not_a_multiple_of_processes_times_batch_size_is_rejected():
    cfg = load_config(CONFIGS / "flatten_swin_t.yaml", ["DATA.GLOBAL_BATCH_SIZE", 1024, "DATA.BATCH_SIZE", 100])
    with pytest.raises(ConfigError, match="is not a multiple of 300"):
        accumulation_steps(cfg, 3)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # Warm-up: 0, 5, 10. Linear decay reaches 5.05 halfway (after 4 of 8 updates) and ends at 1 % of base_lr.
        ("linear", {0: 0.0, 1: 5.0, 2: 10.0, 6: 5.05, 10: 0.1, 99: 0.1}),
        # Step decay ignores min_lr, and continues during the cooldown, after the 10 updates.
        ("step", {0: 0.0, 1: 5.0, 2: 10.0, 3: 5.0, 6: 2.5, 9: 1.25, 10: 1.25, 12: 0.625}),
        # The cosine starts at update 0, not after the warm-up: it is halfway between base_lr and min_lr after 5 of 10 updates.
        ("cosine", {0: 0.0, 1: 5.0, 5: 6.0, 10: 2.0}),
    ],
)
def test_schedules_equal_hand_computed_learning_rates(name, expected):
    schedule = Schedule(
        name=name, base_lr=10, warmup_lr=0, min_lr=2, num_updates=10, warmup_updates=2, decay_updates=3, decay_rate=0.5
    )
    assert {update: schedule(update) for update in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("multistep", lambda optimizer: MultiStepLR(optimizer, [3, 7], gamma=0.5)),
        ("poly", lambda optimizer: PolynomialLR(optimizer, total_iters=10, power=2.0)),
        ("constant", lambda optimizer: ConstantLR(optimizer, factor=1.0)),
    ],
)
def test_schedules_equal_those_of_torch(name, reference):
    options = {"milestones": (3, 7), "decay_rate": 0.5, "power": 2.0}
    schedule = Schedule(name=name, base_lr=10, warmup_lr=0, min_lr=0, num_updates=10, **options)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=10)
    scheduler = reference(optimizer)
    for update in range(13):
        assert schedule(update) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
