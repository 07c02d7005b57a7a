"""What leaves the project computes what the model computes."""

import json
import sys

import pytest
import torch
from torch import nn

from models import build_model, create_model
from scripts import export
from utils.checkpoint import load_weights
from utils.config import load_config
from weights.reader import sha256

# torch 2.11 warns of what it does itself.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    export.main()


@pytest.fixture
def checkpoint(toy_config, tmp_path):
    torch.manual_seed(0)
    raw, average = (build_model(load_config(toy_config)) for _ in range(2))
    path = tmp_path / "best.pth"
    torch.save({"model": raw.state_dict(), "state_dict_ema": average.state_dict()}, path)
    return path, average


def evaluation_of(path, folder, digest=None):
    result = {"correct1": 20, "correct5": 33, "num_images": 33, "acc1": 60.606, "acc5": 100.0, "acc1_interval_95": [43.7, 75.3]}
    record = {"sha256": digest or sha256(path), "results": {"ema": result}, "data": "/data/toy", "precision": "float32"}
    (folder / "eval.json").write_text(json.dumps(record | {"versions": {"torch": "2.11"}}))
    return folder / "eval.json"


def test_every_format_computes_the_average_and_the_card_says_what_it_is(checkpoint, toy_config, tmp_path, monkeypatch):
    path, average = checkpoint
    folder = tmp_path / "out"
    options = ["--cfg", toy_config, "--formats", "safetensors", "torch", "onnx"]
    run(monkeypatch, path, folder, *options, "--eval-json", evaluation_of(path, tmp_path))
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "config.yaml",
        "model.safetensors",
        "model.pt2",
        "model.onnx",
    }
    again = build_model(load_config(folder / "config.yaml"))
    assert load_weights(again, folder / "model.safetensors").coverage == 1
    assert all(torch.equal(value, average.state_dict()[name]) for name, value in again.state_dict().items())
    card = (folder / "README.md").read_text()
    assert "Top-1 60.606 % (95 %: 43.70 to 75.30)" in card
    assert "20 and 33 of 33 images of `toy`" in card
    assert f"sha256 `{sha256(path)}`" in card
    for name in ("model.safetensors", "model.pt2", "model.onnx"):
        assert sha256(folder / name) in card
    images = torch.randn(5, 3, 40, 40)  # another batch size than it was exported and tried with
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(folder / "model.pt2").module()(images), average.eval()(images))


def test_an_export_that_computes_something_else_is_refused(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    with pytest.raises(export.ExportError, match="its logits are off by"):
        export._largest_error(model, lambda images: model(images) + 0.01, torch.randn(3, 3, 2, 2), tmp_path / "model.onnx")
    with pytest.raises(export.ExportError, match="off by nan"):
        export._largest_error(model, lambda images: model(images) * float("nan"), torch.randn(3, 3, 2, 2), tmp_path)


def test_a_card_takes_no_figures_of_another_file(checkpoint, toy_config, tmp_path, monkeypatch, capsys):
    path, _ = checkpoint
    foreign = evaluation_of(path, tmp_path, digest="0" * 64)
    with pytest.raises(SystemExit):
        run(monkeypatch, path, tmp_path / "out", "--cfg", toy_config, "--eval-json", foreign)
    assert "is of another file" in capsys.readouterr().err
    run(monkeypatch, path, tmp_path / "bare", "--cfg", toy_config, "--weights", "raw")
    assert "Not measured" in (tmp_path / "bare" / "README.md").read_text()
    with pytest.raises(SystemExit):
        run(monkeypatch, path, tmp_path / "bare", "--cfg", toy_config)
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flatten_swin_t", "flatten_pvt_t", "flatten_pvt_v2_b0", "flatten_cswin_t", "flatten_deit_t"])
def test_every_family_leaves_as_a_program_and_as_onnx(name, tmp_path):
    torch.manual_seed(0)
    model = create_model(name, num_classes=10, img_size=96).eval()
    images = torch.randn(3, 3, 96, 96)
    assert export.export_torch(model, images, tmp_path / "model.pt2") < 1e-5
    assert export.export_onnx(model, images, tmp_path / "model.onnx") < 1e-4
