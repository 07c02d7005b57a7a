"""Windows of Swin and stripes of CSwin when the image size changes: from YAML, from timm, and with weights of another size."""

import logging
import re

import pytest
import timm
import torch

import models.entrypoints  # noqa: F401 - registers the models with timm
from jobs.averaging import check_same_config
from jobs.model import attention_windows, check_model, check_windows
from jobs.resume import check_resumable
from models.checkpoints.reader import CheckpointError
from tests.conftest import CONFIGS
from utils.config.loading import load_config, to_dict
from utils.distributed import World
from utils.errors import ConfigError

WORLD = World(0, 0, 1, torch.device("cpu"))
FAMILIES = ["flatten_swin_t", "flatten_pvt_t", "flatten_pvt_v2_b0", "flatten_cswin_t", "flatten_deit_t"]
# Windows of the paper's configs, which older checkpoints contain.
NUMBERS = {
    "flatten_swin_t": ["MODEL.SWIN.WINDOW_SIZE", 56],
    "flatten_swin_b_384": ["MODEL.SWIN.WINDOW_SIZE", 96, "MODEL.SWIN.SOFTMAX_WINDOW", 0],
    "flatten_cswin_t": ["MODEL.LA.CSWIN_LA_SPLIT_SIZE", "56-28-14-7"],
}
SMALLER_SWIN = ["MODEL.SWIN.WINDOW_SIZE", 28]
SMALLER_CSWIN = ["MODEL.LA.CSWIN_LA_SPLIT_SIZE", "28-28-14-7"]


def config(name, *opts):
    return load_config(CONFIGS / f"{name}.yaml", opts)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        *((name, (160, 224, 256, 288, 384)) for name in FAMILIES),
        ("flatten_swin_b_384", (384, 448)),
        ("flatten_cswin_b_384", (384,)),
    ],
)
def test_yaml_and_timm_build_the_same_network_at_every_size_with_global_linear_attention(name, sizes):
    for size in sizes:
        from_yaml = check_model(config(name, "DATA.IMG_SIZE", size))
        with torch.device("meta"):
            from_timm = timm.create_model(name, img_size=size)
        shapes, others = ({entry: value.shape for entry, value in m.state_dict().items()} for m in (from_yaml, from_timm))
        assert shapes == others, size
        windows = attention_windows(from_yaml)
        assert windows == attention_windows(from_timm), size
        grids = from_yaml.stage_grids((size, size))
        for stage in {stage for stage, letter in windows if letter == "L"}:
            assert not any(windows[stage, "L"])
            tables = (m for m in from_yaml.stage_blocks()[stage].modules() if hasattr(m, "positional_encoding"))
            assert {table.grid for table in tables} == {grids[stage]}


@pytest.mark.parametrize("name", ["flatten_swin_b_384", "flatten_cswin_t"])
def test_a_run_with_the_numbers_of_the_paper_resumes_and_is_averaged_with_the_config_of_the_same_model(name):
    shallow = ["MODEL.SWIN.DEPTHS", [1, 1, 1, 1]] if name == "flatten_swin_b_384" else []
    current, saved = config(name, *shallow), {"config": to_dict(config(name, *shallow, *NUMBERS[name]))}
    del saved["config"]["MODEL"]["SWIN"]["SOFTMAX_WINDOW"]  # older versions lack it
    saved |= {"model": {}, "optimizer": {}, "scaler": {}, "updates_per_epoch": 5, "num_updates": 5}
    saved["best"] = {"acc1": 1.0, "weights": "raw", "epoch": 0, "num_updates": 5}
    saved["global_batch_size"] = current.DATA.BATCH_SIZE
    check_resumable(saved, current, WORLD, "checkpoint")
    check_same_config(saved["config"], to_dict(current), "first", "second")
    smaller = config(name, *shallow, *(SMALLER_CSWIN if "cswin" in name else SMALLER_SWIN))
    with pytest.raises(ConfigError, match="this key cannot change on resume"):
        check_resumable(saved, smaller, WORLD, "checkpoint")
    with pytest.raises(CheckpointError, match="all checkpoints must have the same"):
        check_same_config(saved["config"], to_dict(smaller), "first", "second")


@pytest.mark.parametrize(
    ("name", "opts", "size", "stages"),
    [
        ("flatten_swin_t", NUMBERS["flatten_swin_t"], 256, "1 (linear attention), 4 (softmax attention)"),
        ("flatten_swin_t", [], 384, "4 (softmax attention)"),
        (
            "flatten_swin_b_384",
            NUMBERS["flatten_swin_b_384"],
            448,
            "1 (linear attention), 4 (softmax attention)",
        ),
        ("small", ["MODEL.SWIN.WINDOW_SIZE", 24], 160, "1 (linear attention), 3 (softmax attention)"),
    ],
)
def test_a_warning_names_the_options_if_windows_no_longer_cover_the_map_of_the_weights(name, opts, size, stages, caplog):
    stored, opts = to_dict(config(name, *opts)), [*opts, "DATA.IMG_SIZE", size]
    cfg = config(name, *opts)
    check_windows(check_model(cfg), cfg, stored, "weights.pth")
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"cover the whole token map in stage {stages}; at DATA.IMG_SIZE={size}," in record.message
    options = re.search("--opts (.*)", record.message)[1].split()
    caplog.clear()
    cfg = config(name, *opts, *options)
    check_windows(check_model(cfg), cfg, stored, "weights.pth")
    assert not caplog.records


@pytest.mark.parametrize(
    ("source", "target", "size"),
    [
        ("flatten_swin_b", "flatten_swin_b_384", 384),  # as in the paper
        ("flatten_cswin_b", "flatten_cswin_b_384", 384),
        ("quickstart", "quickstart_64", 64),
        ("flatten_swin_t", "flatten_swin_t", 160),
        ("flatten_pvt_t", "flatten_pvt_t", 256),
    ],
)
def test_there_is_no_warning_if_the_windows_still_cover_the_map(source, target, size, caplog):
    cfg = config(target, "DATA.IMG_SIZE", size)
    check_windows(check_model(cfg), cfg, to_dict(config(source)), "weights.pth")
    assert not caplog.records


def test_stripes_of_cswin_that_would_no_longer_fit_the_weights_are_an_error_with_the_option():
    opts = [*NUMBERS["flatten_cswin_t"], "DATA.IMG_SIZE", 256]
    stored, cfg = to_dict(config("flatten_cswin_t", *opts[:2])), config("flatten_cswin_t", *opts)
    with pytest.raises(ConfigError, match=r"add --opts MODEL\.LA\.CSWIN_LA_SPLIT_SIZE 0-0-0-0"):
        check_windows(check_model(cfg), cfg, stored, "weights.pth")
    cfg = config("flatten_cswin_t", *opts, "MODEL.LA.CSWIN_LA_SPLIT_SIZE", "0-0-0-0")
    check_windows(check_model(cfg), cfg, stored, "weights.pth")


@pytest.mark.parametrize("stored", [None, "text", {}, {"MODEL": {"TYPE": "other"}}, {"DATA": {"IMG_SIZE": "wide"}}], ids=str)
def test_a_file_without_a_usable_config_causes_no_error(stored, caplog):
    cfg = config("flatten_swin_t", "DATA.IMG_SIZE", 256)
    check_windows(check_model(cfg), cfg, stored, "weights.pth")
    assert [record for record in caplog.records if "cover" not in record.message] == []
