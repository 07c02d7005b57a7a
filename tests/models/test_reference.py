"""Models reproduce values recorded from the reference implementation (tests/reference)."""

import pytest
import torch
from torch import nn

from engine.optim import build_ema, build_optimizer, build_scaler
from engine.step import train_step
from models import build_model
from tests.conftest import CONFIGS, REFERENCE, fill_with_seeded_weights, reference, seeded_image
from tests.runs import load_weights
from utils.config.loading import load_config
from utils.distributed import World, wrap

CASES = sorted(path.stem for path in REFERENCE.glob("flatten_*.json"))
TRAININGS = sorted(path.stem for path in REFERENCE.glob("train-*.json"))
FINE_TUNINGS = sorted(path.stem for path in REFERENCE.glob("finetune-*.json"))
# State-dict entries of a norm that the reference's PVT v1 creates but does not use.
UNUSED_NORM = ("norm.weight", "norm.bias")


def build(config, opts):
    return build_model(load_config(CONFIGS / f"{config}.yaml", opts))


@pytest.mark.parametrize("case", CASES)
def test_each_config_builds_the_same_model_as_the_reference(case):
    recorded = reference(case)
    model = fill_with_seeded_weights(build(recorded["config"], recorded["opts"])).eval()
    expected = {name: shape for name, shape, kind in recorded["state_dict"] if kind == "param"}
    num_parameters = recorded["params"]
    if "pvt_" in case and "v2" not in case:
        num_parameters -= sum(expected.pop(name)[0] for name in UNUSED_NORM)
    assert {name: list(parameter.shape) for name, parameter in model.named_parameters()} == expected
    assert sum(parameter.numel() for parameter in model.parameters()) == num_parameters
    # PVT v1 has no final norm layer here (removed from ``expected`` above), so its entries are not expected. Other models have
    # a final layer named ``norm``.
    assert model.no_weight_decay() == set(recorded["no_weight_decay"]) - (set(UNUSED_NORM) - set(expected))
    side = recorded["img_size"]
    with torch.no_grad():
        logits = model(seeded_image(0, (recorded["batch"], 3, side, side)))
    torch.testing.assert_close(logits[:, :8], torch.tensor(recorded["logits_first8"]), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits.mean(dim=1), torch.tensor(recorded["logits_mean"]), atol=1e-4, rtol=0)
    torch.testing.assert_close(logits.std(dim=1), torch.tensor(recorded["logits_std"]), atol=1e-4, rtol=0)
    assert logits.argmax(dim=1).tolist() == recorded["argmax"]


@pytest.mark.parametrize("case", TRAININGS)
def test_eight_training_steps_give_the_losses_gradient_norms_and_weight_norms_of_the_reference(case):
    recorded = reference(case)
    opts = [*recorded["opts"], "MODEL.DROP_PATH_RATE", 0.0, "EMA.ENABLED", True, "EMA.DECAY", recorded["ema_decay"]]
    cfg = load_config(CONFIGS / f"{recorded['config']}.yaml", [*opts, "TRAIN.WEIGHT_DECAY", recorded["weight_decay"]])
    model = fill_with_seeded_weights(build_model(cfg))
    optimizer, ema = build_optimizer(cfg, model), build_ema(cfg, model)
    criterion = nn.CrossEntropyLoss(label_smoothing=recorded["label_smoothing"])
    wrapped = wrap(model, World(0, 0, 1, torch.device("cpu")))
    side = cfg.DATA.IMG_SIZE
    for step in range(recorded["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = recorded["lr_used"][step]
        images = seeded_image(100 + step, (recorded["batch"], 3, side, side))
        labels = torch.from_numpy(labels_of(step, recorded["batch"]))
        report = train_step(
            wrapped,
            criterion,
            optimizer,
            build_scaler(cfg, torch.device("cpu")),
            [(images, labels)],
            seeds=[0],
            amp_dtype=torch.float32,
            max_grad_norm=recorded["clip_grad"],
        )
        ema.update(model)
        assert report.loss.item() == pytest.approx(recorded["loss"][step], rel=1e-3)
        assert report.grad_norm.item() == pytest.approx(recorded["grad_norm"][step], rel=1e-3)
    for state, norms in ((model.state_dict(), recorded["final"]), (ema.module.state_dict(), recorded["final_ema"])):
        for name, norm in norms.items():
            assert state[name].norm().item() == pytest.approx(norm, rel=1e-3)


def labels_of(step, batch_size):
    import numpy as np

    return np.random.RandomState(200 + step).randint(0, 1000, batch_size)


@pytest.mark.parametrize("case", FINE_TUNINGS)
def test_loading_at_a_higher_resolution_resizes_position_embeddings_and_bias_tables_as_the_reference_does(case, tmp_path):
    recorded = reference(case)
    source = fill_with_seeded_weights(build(recorded["source"], recorded["source_opts"]))
    torch.save({"model": source.state_dict()}, tmp_path / "source.pth")
    target = build(recorded["target"], recorded["target_opts"]).eval()
    report = load_weights(target, tmp_path / "source.pth")
    assert set(report.resized) == set(recorded["resized"])
    assert report.missing == report.unused == report.reinitialised == []
    state = target.state_dict()
    for name, expected in recorded["resized"].items():
        table = state[name]
        assert list(table.shape) == expected["shape"]
        assert table.norm().item() == pytest.approx(expected["norm"], rel=1e-4)
        assert table.double().sum().item() == pytest.approx(expected["sum"], rel=1e-3, abs=1e-2)
        torch.testing.assert_close(table.flatten()[:8], torch.tensor(expected["first8"]), atol=1e-5, rtol=1e-4)
    side = recorded["img_size"]
    with torch.no_grad():
        logits = target(seeded_image(0, (1, 3, side, side)))
    torch.testing.assert_close(logits[:, :8], torch.tensor(recorded["logits_first8"]), atol=1e-4, rtol=0)
    assert logits.argmax(dim=1).tolist() == recorded["argmax"]
