"""Pictures of attention maps, and their logging to TensorBoard during training.

A form of attention is an entry of ``BlockMaps.maps`` (analysis/pages.py): the model's own attention, another attention function
of the same queries and keys, the convolution, or the sum of the model's attention and its convolution.
"""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

import engine.metrics_writer
import jobs.inspect
from analysis.pages import CONVOLUTION, SUM, BlockMaps
from analysis.pictures import draw_forms, draw_measures, draw_overlays
from analysis.summary import MEASURES, Row
from engine.checkpoint_writer import read_checkpoint
from tests.launch import run_main
from tests.runs import assert_equal, toy_arguments

IMAGE = Image.new("RGB", (30, 20), (10, 200, 30))


def make_block(*, is_linear: bool) -> BlockMaps:
    """Random maps of a block with 2 x 3 tokens and two heads, for all six queries."""
    torch.manual_seed(0)
    queries = torch.cartesian_prod(torch.arange(2), torch.arange(3))
    maps = {"model's linear attention" if is_linear else "model's softmax attention": torch.rand(2, 6, 2, 3)}
    if is_linear:
        maps |= {CONVOLUTION: torch.randn(1, 6, 2, 3), SUM: torch.randn(2, 6, 2, 3)}
    return BlockMaps("block", queries, (2, 3), maps)


def images_of(axis) -> list[np.ndarray]:
    return [np.asarray(image.get_array()) for image in axis.get_images()]


def test_draw_forms_shows_the_mean_over_heads_for_the_query_nearest_to_a_point():
    block = make_block(is_linear=True)
    figure = draw_forms(IMAGE, block, [(0.9, 0.1)])
    query_axis, *form_axes = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["query", *block.maps]
    (marker,) = query_axis.get_lines()
    # The query nearest to (0.9, 0.1) is the token in row 1 and column 0; the marker is at its centre (x, y), in pixels.
    np.testing.assert_allclose(marker.get_xydata(), [[4.5, 14.5]], rtol=1e-6)
    for form_axis, maps in zip(form_axes, block.maps.values(), strict=True):
        weights = maps[:, 3].mean(dim=0)
        np.testing.assert_allclose(images_of(form_axis)[0], weights, rtol=1e-6)
        largest = weights.abs().max().item()
        assert form_axis.get_images()[0].get_clim() == pytest.approx((-largest, largest))


def test_draw_forms_leaves_keys_outside_the_window_of_the_query_without_a_colour():
    """Grey is the background. Query 3, the one nearest to the point, cannot attend to the last column of keys."""
    visible = torch.ones(6, 2, 3, dtype=torch.bool)
    visible[3, :, 2] = False
    block = dataclasses.replace(make_block(is_linear=True), visible=visible)
    for form_axis in draw_forms(IMAGE, block, [(0.9, 0.1)]).axes[1:]:
        (image,) = form_axis.get_images()
        np.testing.assert_array_equal(np.ma.getmaskarray(image.get_array()), [[False, False, True]] * 2)
        np.testing.assert_allclose(image.cmap(0.5)[:3], 1, atol=0.01)  # a weight of 0 is white
        assert form_axis.get_facecolor()[:3] == (0.75, 0.75, 0.75)


def test_the_legend_of_the_measures_covers_no_curve_and_every_axis_has_a_unit():
    rows = [
        Row(block, True, form, 0, 8, 16, {name: [1.0] for name in MEASURES})
        for block in ("blocks.0.attn", "blocks.1.attn")
        for form in ("own", "softmax")
    ]
    figure = draw_measures(rows)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["own", "softmax"]
    assert all(axis.get_legend() is None and axis.get_ylabel() for axis in figure.axes)
    assert [axis.get_yscale() for axis in figure.axes] == ["linear", "linear", "linear", "log"]


@pytest.mark.parametrize(
    ("is_linear", "titles"), [(True, ["model's linear attention", CONVOLUTION]), (False, ["model's softmax attention"])]
)
def test_overlays_cover_the_image_and_their_opacity_is_proportional_to_the_weights(is_linear, titles):
    block = make_block(is_linear=is_linear)
    figure = draw_overlays(IMAGE, block, [(0.1, 0.1), (0.9, 0.9)])
    assert [axis.get_title() for axis in figure.axes[: 1 + len(titles)]] == ["query", *titles]
    for overlay_axis, form in zip(figure.axes[-len(titles) :], titles, strict=True):
        image, overlay = overlay_axis.get_images()
        assert image.get_extent() == overlay.get_extent()
        weights = block.maps[form][:, 5].mean(dim=0)
        np.testing.assert_allclose(images_of(overlay_axis)[1], weights, rtol=1e-6)
        np.testing.assert_allclose(overlay.get_alpha(), 0.75 * weights.abs() / weights.abs().max(), rtol=1e-5)


def test_logging_attention_pictures_does_not_change_the_result_of_training(trained, toy_config, toy_data, tmp_path):
    image = toy_data / "val/class1/003.png"
    arguments = toy_arguments(toy_config, toy_data, tmp_path, "TRAIN.EPOCHS", 2, "ATTENTION_IMAGE", image)

    def wait_longer_at_exit(_rank: int) -> None:
        engine.metrics_writer.SECONDS_AT_EXIT = 60.0  # a loaded machine renders the figures slowly

    outcome = run_main(arguments, tmp_path / "log", prepare=wait_longer_at_exit)
    assert outcome.exit_codes == [0], outcome.output
    folder = tmp_path / "toy/default"
    with_pictures, without_pictures = read_checkpoint(folder / "best.pth"), read_checkpoint(trained)
    for part in ("model", "optimizer", "best"):
        assert_equal(with_pictures[part], without_pictures[part])
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    blocks = ["layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1", "layers.2.blocks.0"]
    assert [tag for tag in events.Tags()["images"] if tag.startswith("attention")] == [
        f"attention/{name}.attn" for name in blocks
    ]
    updates = with_pictures["updates_per_epoch"]
    for name in blocks:
        assert [event.step for event in events.Images(f"attention/{name}.attn")] == [updates, 2 * updates]


@pytest.mark.parametrize("content", [None, b"not an image"])
def test_an_unreadable_attention_image_is_rejected_before_training(toy_config, toy_data, tmp_path, content):
    image = tmp_path / "image.png"
    if content is not None:
        image.write_bytes(content)
    arguments = toy_arguments(toy_config, toy_data, tmp_path / "output", "ATTENTION_IMAGE", image)
    outcome = run_main(arguments, tmp_path / "log")
    assert outcome.exit_codes == [2]
    assert f"ATTENTION_IMAGE={image}: " in outcome.output
    assert "give an image file" in outcome.output
    assert not (tmp_path / "output/toy/default/config.yaml").exists()


def test_an_error_while_drawing_does_not_stop_training(toy_config, toy_data, tmp_path, monkeypatch):
    """The error is logged once, and every module returns to its previous mode (training or evaluation)."""

    def fail(*_arguments, **_options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(jobs.inspect, "trace", fail)
    image = toy_data / "val/class1/003.png"
    outcome = run_main(
        toy_arguments(toy_config, toy_data, tmp_path, "TRAIN.EPOCHS", 2, "ATTENTION_IMAGE", image), tmp_path / "log"
    )
    assert outcome.exit_codes == [0], outcome.output
    assert outcome.output.count("attention pictures are disabled after an error: out of memory") == 1
    model = nn.Sequential(nn.Linear(1, 1), nn.Dropout()).train()
    model[1].eval()
    pictures = object.__new__(jobs.inspect.AttentionPictures)
    pictures.image = torch.zeros(3, 4, 4)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(pictures(model))
    assert [module.training for module in model.modules()] == [True, True, False]
