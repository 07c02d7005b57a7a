"""Released weights, selected by model name. A local server provides files in the format of the paper's code (the reference)."""

import argparse
import io
import json
from collections import OrderedDict

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from yacs.config import CfgNode

from data.build import build_preprocessing
from data.transforms import Normalize, create_eval_transform
from models import RELEASED, Released, create_model
from models.checkpoints.download import cached_path
from tests.conftest import CONFIGS
from tests.launch import run_main
from tests.server import serve
from utils.config.loading import load_config

CLASSES = {"n01440764": 0, "n01443537": 1, "n02091831": 176}  # class ids of ImageNet-1K
# Model -> image size in pixels. The released files are for 224 pixels; smaller sizes are faster. CSwin needs 224: its stripes
# would cover a smaller feature map completely, which changes the model.
SIZES = {"flatten_pvt_v2_b0": 64, "flatten_pvt_t": 64, "flatten_swin_t": 64, "flatten_cswin_t": 224}
# Model -> shapes of the state-dict entries that only the reference's model has: PVT's unused norm, Swin's constant buffers.
UNUSED_ENTRIES = {
    "flatten_pvt_t": {"norm.weight": (512,), "norm.bias": (512,)},
    "flatten_swin_t": {"layers.2.blocks.0.attn.relative_position_index": (49, 49), "layers.2.blocks.1.attn_mask": (4, 49, 49)},
}


def reference_file(name: str, state: dict) -> bytes:
    """Bytes of a checkpoint as written by the reference's main.py, or for CSwin by its main_ema.py, which adds EMA weights."""
    state = OrderedDict(state) | {entry: torch.ones(shape) for entry, shape in UNUSED_ENTRIES.get(name, {}).items()}
    content = {
        "model": state,
        "optimizer": {"state": {}, "param_groups": [{"lr": np.float64(1e-3)}]},
        "lr_scheduler": {"args": argparse.Namespace(cosine=True)},
        "max_accuracy": np.float64(82.1),
        "epoch": 299,
        "config": CfgNode({"MODEL": CfgNode({"TYPE": "another", "RESUME": ""}), "TRAIN": CfgNode({"BASE_LR": 1e-3})}),
    }
    if "cswin" in name:  # the raw weights are zeros, so that only the EMA weights give the expected result
        content |= {"model": {key: torch.zeros_like(value) for key, value in state.items()}, "state_dict_ema": state}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def noise_images(tmp_path_factory):
    """Directory with validation images of random noise in three ImageNet classes."""
    root = tmp_path_factory.mktemp("noise_images")
    for label, folder in enumerate(CLASSES):
        (root / "val" / folder).mkdir(parents=True)
        for index in range(4):
            pixels = np.random.default_rng([label, index]).integers(0, 256, (50, 70, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "val" / folder / f"{index}.png")
    return root


def count_correct(model: torch.nn.Module, name: str, root) -> int:
    """Count correct predictions, one image at a time. Predictions are restricted to the three classes of ``CLASSES``."""
    cfg = load_config(CONFIGS / f"{name}.yaml", ["DATA.IMG_SIZE", SIZES[name]])
    transform, normalize = create_eval_transform(build_preprocessing(cfg)), Normalize(cfg.DATA.MEAN, cfg.DATA.STD, "cpu")
    class_ids, correct = list(CLASSES.values()), 0
    for label, folder in enumerate(CLASSES):
        for file in sorted((root / "val" / folder).iterdir()):
            with torch.no_grad(), Image.open(file) as image:
                logits = model(normalize(transform(image)[None]))[0, class_ids]
            correct += int(logits.argmax() == label)
    return correct


@pytest.mark.parametrize("name", SIZES)
def test_a_released_model_is_evaluated_by_name_with_one_download_for_two_processes(name, noise_images, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    state = create_model(name).state_dict()
    with serve({name: reference_file(name, state)}) as server:
        monkeypatch.setitem(RELEASED, name, Released(name, f"{server.url}/{name}/?dl=1", 224, 30.0, None))
        options = ["TEST.CLASS_MAP=imagenet", f"DATA.IMG_SIZE={SIZES[name]}", "DATA.NUM_WORKERS=0"]
        arguments = ["--eval", "--resume", name, "--data-path", noise_images, "--output", tmp_path / "out", "--opts", *options]
        outcome = run_main(arguments, tmp_path / "log", processes=2)
        assert outcome.exit_codes == [0, 0], outcome.output
        assert len(server.requests) == 1
    record = json.loads((tmp_path / f"out/{name}/default/eval.json").read_text())
    model = create_model(name, img_size=SIZES[name]).eval()
    model.load_state_dict(state)  # resizes position embeddings and bias tables
    result = record["results"]["ema" if "cswin" in name else "raw"]
    assert (result["correct1"], result["num_images"]) == (count_correct(model, name, noise_images), 12)
    assert record["preferred"] == ("ema" if "cswin" in name else "raw")
    assert record["published"]["acc1"] == 30.0
    low, high = result["acc1_interval_95"]
    verdict = "within" if low <= 30 <= high else "outside"
    restriction = "predictions restricted to 3 of 1000 classes"
    assert f"on 12 images ({restriction}), 30.000 published, which is {verdict} the 95 % confidence interval" in outcome.output


def test_an_unreleased_model_name_is_rejected_with_the_list_of_released_models(noise_images, tmp_path):
    arguments = ["--eval", "--resume", "flatten_pvt_m", "--data-path", noise_images]
    outcome = run_main(arguments, tmp_path / "log")
    assert outcome.exit_codes == [2]
    assert "flatten_pvt_m: no such file or released model; released models are flatten_pvt_t" in outcome.output


def test_a_failed_download_reports_where_to_save_the_file(noise_images, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    name = "flatten_pvt_v2_b0"
    monkeypatch.setitem(RELEASED, name, Released(name, "http://127.0.0.1:9/f/?dl=1", 224, 71.098, 90.596))
    arguments = ["--eval", "--resume", name, "--data-path", noise_images, "--opts", "TEST.CLASS_MAP=imagenet"]
    outcome = run_main(arguments, tmp_path / "log", processes=2)
    assert outcome.exit_codes == [2, 2]
    assert f"save it as {cached_path(RELEASED[name].url, name)}" in outcome.output
    assert "Traceback" not in outcome.output


def test_pretrained_accepts_a_url_and_timm_downloads_released_weights_by_name(
    toy_config, toy_data, trained, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    name = "flatten_pvt_v2_b0"
    torch.manual_seed(0)
    state = create_model(name).state_dict()
    with serve({"toy.pth": trained.read_bytes(), name: reference_file(name, state)}) as server:
        arguments = ["--cfg", toy_config, "--data-path", toy_data, "--output", tmp_path, "--check"]
        outcome = run_main([*arguments, "--pretrained", f"{server.url}/toy.pth"], tmp_path / "log")
        assert outcome.exit_codes == [0], outcome.output
        assert "(100.0% of the model)" in outcome.output
        monkeypatch.setitem(RELEASED, name, Released(name, f"{server.url}/{name}", 224, 71.098, 90.596))
        cfg = {"url": f"{server.url}/{name}"}
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=cfg)
        assert all(torch.equal(value, state[entry]) for entry, value in model.state_dict().items())
        assert [path for path in server.requests if name in path] == [f"/f/{name}"]
        smaller = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=cfg, num_classes=7, in_chans=1)
        assert smaller(torch.randn(1, 1, 64, 64)).shape == (1, 7)


def test_released_models_match_the_readme_of_the_reference():
    """Compare the image size, top-1 and top-5 accuracy of every model.

    The number of correct predictions, which is the top-1 accuracy times 50,000 images, must be a whole number.
    """
    assert {file.name: (file.img_size, file.acc1, file.acc5) for file in RELEASED.values()} == {
        "flatten_pvt_t": (224, 77.758, 93.910),
        "flatten_pvt_v2_b0": (224, 71.098, 90.596),
        "flatten_swin_t": (224, 82.106, 95.900),
        "flatten_swin_s": (224, 83.5, None),
        "flatten_swin_b": (224, 83.8, None),
        "flatten_swin_b_384": (384, 85.0, None),
        "flatten_cswin_t": (224, 83.130, 96.376),
    }
    assert len({file.url for file in RELEASED.values()}) == 7
    for file in RELEASED.values():
        assert file.url.startswith("https://cloud.tsinghua.edu.cn/f/")
        assert file.acc1 * 500 == pytest.approx(round(file.acc1 * 500), abs=1e-6)
