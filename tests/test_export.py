"""Exported models compute the same logits as the original model, and include its config and class names."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

from data.build import build_preprocessing
from jobs import export
from jobs.early_checks import is_installed
from jobs.hub import Publication
from jobs.locate_checkpoint import open_checkpoint, stored_config
from models import build_model, create_model
from models.checkpoints.reader import sha256
from scripts import export as script
from tests.conftest import CONFIGS
from tests.launch import ROOT
from tests.runs import load_weights
from utils.config.keys import RECIPE_KEY_PREFIXES
from utils.config.loading import load_config, to_dict

# Ignore warnings that torch raises about its own code.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
    script.main()


NAMES = ["cat", "small dog", "été"]


@pytest.fixture
def checkpoint(toy_config, tmp_path):
    torch.manual_seed(0)
    raw_model, ema_model = (build_model(load_config(toy_config)) for _ in range(2))
    path = tmp_path / "best.pth"
    content = {"model": raw_model.state_dict(), "state_dict_ema": ema_model.state_dict(), "class_names": NAMES}
    torch.save(content | {"config": to_dict(load_config(toy_config))}, path)
    return path, ema_model


def write_evaluation(path, folder, digest=None):
    """Write ``eval.json`` for the checkpoint at ``path``, or for a checkpoint with another SHA-256 ``digest``."""
    result = {"correct1": 20, "correct5": 33, "num_images": 33, "acc1": 60.606, "acc5": 100.0, "acc1_interval_95": [43.7, 75.3]}
    record = {"sha256": digest or sha256(path), "results": {"ema": result}, "data": "/data/toy", "precision": "float32"}
    record |= {"split": "val", "val_fraction": 0.0}
    (folder / "eval.json").write_text(json.dumps(record | {"versions": {"torch": "2.11"}}))
    return folder / "eval.json"


def test_every_format_contains_the_ema_weights_and_the_model_card_describes_the_export(
    checkpoint, toy_config, tmp_path, monkeypatch
):
    path, ema_model = checkpoint
    folder = tmp_path / "out"
    write_evaluation(path, tmp_path)  # next to the checkpoint, where the export looks for it
    run(monkeypatch, path, folder, "--formats", "safetensors", "torch", "onnx")
    assert {file.name for file in folder.iterdir()} == {
        "README.md",
        "eval.json",
        "config.json",
        "config.yaml",
        "model.safetensors",
        "model.pt2",
        "model.onnx",
    }
    reloaded = build_model(load_config(folder / "config.yaml"))
    assert load_weights(reloaded, folder / "model.safetensors").coverage == 1
    assert all(torch.equal(value, ema_model.state_dict()[name]) for name, value in reloaded.state_dict().items())
    card = (folder / "README.md").read_text()
    assert "Top-1 60.606 % (95 % confidence interval 43.70 to 75.30; 20 of 33 images)" in card
    assert "of 33 images), measured on `toy` (val)" in card
    assert f"sha256 `{sha256(path)}`" in card
    assert "cat, small dog, été" in card
    assert "ignoring the aspect ratio (bicubic), centre crop of 40 x 40" in card
    onnx = pytest.importorskip("onnx")
    properties = {entry.key: entry.value for entry in onnx.load(folder / "model.onnx").metadata_props}
    assert json.loads(properties["class_names"]) == NAMES
    for name in ("model.safetensors", "model.pt2", "model.onnx"):
        assert sha256(folder / name) in card
    images = torch.randn(5, 3, 40, 40)  # a different batch size than in the export and its check
    with torch.no_grad():
        torch.testing.assert_close(torch.export.load(folder / "model.pt2").module()(images), ema_model.eval()(images))


def test_an_export_with_different_logits_is_rejected(tmp_path, monkeypatch):
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4)).eval()
    with pytest.raises(export.ExportError, match="of the logits exceeds"):
        export.largest_error(model, lambda images: model(images) + 0.01, torch.randn(3, 3, 2, 2), tmp_path / "model.onnx")
    with pytest.raises(export.ExportError, match="relative error nan"):
        export.largest_error(model, lambda images: model(images) * float("nan"), torch.randn(3, 3, 2, 2), tmp_path)


def test_the_model_card_does_not_use_an_evaluation_of_another_checkpoint(checkpoint, toy_config, tmp_path, monkeypatch, capsys):
    path, _ = checkpoint
    other_evaluation = write_evaluation(path, tmp_path, digest="0" * 64)
    with pytest.raises(SystemExit):
        run(monkeypatch, path, tmp_path / "out", "--cfg", toy_config, "--eval-json", other_evaluation)
    assert "belongs to another checkpoint or other weights" in capsys.readouterr().err
    run(monkeypatch, path, tmp_path / "bare", "--weights", "raw")  # finds the same eval.json next to the checkpoint
    assert "Not measured" in (tmp_path / "bare" / "README.md").read_text()
    with pytest.raises(SystemExit):
        run(monkeypatch, path, tmp_path / "bare", "--cfg", toy_config)
    assert "is not an empty directory" in capsys.readouterr().err


def test_exported_weights_contain_config_and_class_names(checkpoint, tmp_path, monkeypatch):
    """The exported file can be opened and exported again without --cfg."""
    run(monkeypatch, checkpoint[0], tmp_path / "out")
    opened = open_checkpoint(tmp_path / "out/model.safetensors")
    assert opened.class_names == tuple(NAMES)
    cfg = stored_config(opened, prefixes=RECIPE_KEY_PREFIXES)
    assert (cfg.MODEL.NAME, cfg.DATA.IMG_SIZE, cfg.TRAIN.EPOCHS) == ("toy", 40, 3)
    run(monkeypatch, tmp_path / "out/model.safetensors", tmp_path / "again")
    assert (tmp_path / "again/config.json").read_text() == (tmp_path / "out/config.json").read_text()


@pytest.mark.parametrize(
    ("teacher", "published"),
    [
        ("/home/ann/runs/large", "large"),
        ("timm:local-dir:/home/ann/large", "timm:local-dir:large"),
        ("timm:regnety_160", "timm:regnety_160"),
        ("timm:hf-hub:user/large", "timm:hf-hub:user/large"),
    ],
)
def test_the_exported_config_is_that_of_the_training_without_paths_of_this_machine(
    teacher, published, checkpoint, toy_config, tmp_path, monkeypatch
):
    options = ["TRAIN.TEACHER", teacher, "BEST_METRIC", "macro_f1", "EVAL_FREQ", 2, "DATA.INDEX_CACHE", "/home/ann/cache"]
    state = torch.load(checkpoint[0]) | {"config": to_dict(load_config(toy_config, options))}
    torch.save(state, checkpoint[0])
    run(monkeypatch, checkpoint[0], tmp_path / "out")
    cfg = load_config(tmp_path / "out/config.yaml")
    assert published == cfg.TRAIN.TEACHER
    assert cfg.BEST_METRIC == "macro_f1"
    assert cfg.EVAL_FREQ == 2
    for name in ("config.yaml", "README.md", "model.safetensors", "config.json"):
        content = (tmp_path / "out" / name).read_bytes()
        assert b"/home" not in content
        assert os.path.expanduser("~").encode() not in content


def test_an_exported_directory_loads_as_a_timm_model(checkpoint, tmp_path, monkeypatch):
    """Check the logits, the preprocessing settings, feature extraction, and the replacement of the head."""
    path, ema_model = checkpoint
    options = ["TEST.CROP_MODE=short", "TEST.CROP_PCT=0.8", "DATA.MEAN=[0.5, 0.4, 0.3]", "TEST.INTERPOLATION=bilinear"]
    run(monkeypatch, path, tmp_path / "out", "--opts", *options)
    name, images = f"local-dir:{tmp_path / 'out'}", torch.randn(2, 3, 40, 40)
    model = timm.create_model(name, pretrained=True).eval()
    data = timm.data.resolve_model_data_config(model)
    with torch.no_grad():
        torch.testing.assert_close(model(images), ema_model.eval()(images))
        assert len(timm.create_model(name, pretrained=True, features_only=True)(images)) == 3
        assert timm.create_model(name, pretrained=True, num_classes=7)(images).shape[1] == 7
    expected = {"input_size": (3, 40, 40), "crop_mode": "center", "crop_pct": 0.8, "interpolation": "bilinear"}
    assert {key: tuple(data[key]) if key == "input_size" else data[key] for key in expected} == expected
    assert tuple(data["mean"]) == (0.5, 0.4, 0.3)
    assert model.pretrained_cfg["label_names"] == NAMES


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("options", [[], ["TEST.CROP_MODE=short", "DATA.INTERPOLATION=random"]], ids=["squash", "short"])
def test_timm_resolves_the_preprocessing_of_the_config(path, options):
    cfg = load_config(path)
    if options and cfg.TEST.CROP:
        cfg = load_config(path, options)
    with torch.device("meta"):
        data = timm.data.resolve_model_data_config(build_model(cfg))
    ours = build_preprocessing(cfg)
    assert data == {
        "input_size": (3, *ours.img_size),
        "crop_pct": ours.effective_crop_pct,
        "crop_mode": ours.timm_crop_mode,
        "interpolation": ours.to_dict()["interpolation"],
        "mean": ours.mean,
        "std": ours.std,
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flatten_swin_t", "flatten_pvt_t", "flatten_pvt_v2_b0", "flatten_cswin_t", "flatten_deit_t"])
def test_every_model_family_can_be_exported_with_torch_export_and_to_onnx(name, tmp_path):
    torch.manual_seed(0)
    model = create_model(name, num_classes=10, img_size=96).eval()
    images = torch.randn(3, 3, 96, 96)
    assert export.export_torch(model, images, tmp_path / "model.pt2") < 1e-5
    assert export.export_onnx(model, images, tmp_path / "model.onnx") < 1e-4


@pytest.mark.parametrize(("num_classes", "shown"), [(10, False), (11, True)])
def test_the_model_card_gives_top_5_only_for_more_than_ten_classes(checkpoint, toy_config, tmp_path, num_classes, shown):
    path, _ = checkpoint
    evaluation = json.loads(write_evaluation(path, tmp_path).read_text())
    cfg = load_config(toy_config, ["MODEL.NUM_CLASSES", num_classes])
    card = export.model_card(cfg, open_checkpoint(path), "ema", {}, evaluation, in_timm=True, publication=Publication())
    assert ("top-5 100.000 % (33 images), measured on `toy` (val)" in card) is shown
    held_out = evaluation | {"split": "train", "val_fraction": 0.1}
    assert "measured on `toy` (a fraction of 0.1 of train, which is held out)" in export.describe_accuracy(
        held_out, "ema", num_classes
    )


def test_a_missing_onnx_package_is_reported_before_anything_is_written(checkpoint, toy_config, tmp_path, monkeypatch, capsys):
    path, _ = checkpoint
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name))
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, path, tmp_path / "out", "--cfg", toy_config, "--formats", "safetensors", "onnx")
    assert ended.value.code == 2
    assert "--formats onnx: not installed: onnxscript; run pip install" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_directory_named_like_a_package_does_not_count_as_installed(tmp_path, monkeypatch):
    (tmp_path / "onnx_directory").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert importlib.util.find_spec("onnx_directory") is not None
    assert not is_installed("onnx_directory")
    assert not is_installed("no_such_package")
    assert is_installed("numpy")


def test_options_of_an_export_are_checked_without_torch(tmp_path):
    code = "import sys; sys.modules |= dict.fromkeys(['torch', 'timm']); from scripts.export import main; main()"
    command = [sys.executable, "-c", code, "flatten_swin_t", tmp_path / "out", "--push-to-hub", "anna/to y"]
    outcome = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert outcome.returncode == 2, outcome.stderr
    assert "Repo id must use alphanumeric chars" in outcome.stderr
    assert "Traceback" not in outcome.stderr


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "3",
        "null",
        "{}",
        '{"sha256": 1}',
        "[" * 100_000,
        '{"sha256": "x", "results": [], "data": "", "precision": "", "versions": {"torch": ""}}',
        '{"sha256": "x", "results": {"ema": []}, "data": "", "precision": "", "versions": {"torch": ""}}',
        '{"sha256": "x", "results": {"ema": {"acc1_interval_95": [1, "2"]}}, "data": "", "precision": "", "versions": 3}',
        '{"sha256": "x", "results": {}, "data": "", "precision": "", "versions": null}',
        '{"sha256": "x", "results": {}, "data": "", "precision": "", "versions": {"torch": ""}, "split": 1}',
        b"\xff\xfe",
    ],
)
def test_an_odd_eval_json_is_reported_and_a_failed_export_leaves_nothing(content, checkpoint, tmp_path, monkeypatch, capsys):
    evaluation = tmp_path / "odd.json"
    evaluation.write_bytes(
        content if isinstance(content, bytes) else content.replace('"x"', f'"{sha256(checkpoint[0])}"').encode()
    )
    with pytest.raises(SystemExit) as caught:
        run(monkeypatch, checkpoint[0], tmp_path / "out", "--eval-json", evaluation)
    assert caught.value.code == 1
    assert "odd.json" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_export_that_fails_halfway_leaves_nothing_and_can_be_repeated(checkpoint, tmp_path, monkeypatch):
    def fail(*_):
        raise export.ExportError("wrong logits")

    monkeypatch.setattr(export, "export_torch", fail)
    (tmp_path / "parent/empty").mkdir(parents=True)
    for name in ("new", "empty"):
        with pytest.raises(SystemExit):
            run(monkeypatch, checkpoint[0], tmp_path / "parent" / name, "--formats", "safetensors", "torch")
        assert sorted(path.name for path in (tmp_path / "parent").rglob("*")) == ["empty"]
    (tmp_path / "parent/empty/.export.1.incomplete").mkdir()  # left by a killed export
    run(monkeypatch, checkpoint[0], tmp_path / "parent/empty")
    names = {path.name for path in (tmp_path / "parent/empty").iterdir()}
    assert names == {"README.md", "config.json", "config.yaml", "model.safetensors"}


HOSTILE_NAMES = ["<script>alert(1)</script>", "x\n# forged", "`|<!--\udc80"]


def test_names_with_markup_are_escaped_in_the_model_card_and_survive_in_the_other_files(checkpoint, tmp_path, monkeypatch):
    state = torch.load(checkpoint[0], weights_only=True)
    state["config"]["MODEL"]["NAME"] = "<b>`x`"
    state["config"]["AUG"]["AUTO_AUGMENT"] = "```"
    path = tmp_path / "a`b.pth"
    torch.save(state | {"class_names": HOSTILE_NAMES}, path)
    run(monkeypatch, path, tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text(encoding="utf-8")
    assert not re.search(r"(?<!\\)<(script|b>|!--)", card.partition("## Recipe")[0])
    assert "# forged" not in card.splitlines()
    assert re.search(r"^````yaml$", card, re.MULTILINE)
    assert json.loads((tmp_path / "out/config.json").read_text())["label_names"] == HOSTILE_NAMES
    assert open_checkpoint(tmp_path / "out/model.safetensors").class_names == tuple(HOSTILE_NAMES)
