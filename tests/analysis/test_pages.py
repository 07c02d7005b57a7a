"""The HTML page with the attention maps of an image: its data, and its behaviour in a browser."""

import base64
import html
import io
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import scripts.visualize_attention
from analysis.maps import capture, token_positions
from analysis.pages import CONVOLUTION, HIDDEN, SUM, BlockMaps, encode_maps, module_names, sample_queries, trace, write_page
from models.checkpoints.reader import read_checkpoint
from models.cswin import CSwinTransformer
from tests.analysis.test_maps import CASES, SMALL_CSWIN
from tests.launch import run_script

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def create_case(case: str):
    model, size = CASES[case]()
    height, width = (size, size) if isinstance(size, int) else size
    return model.eval(), torch.randn(3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", ["swin global", "swin windows, shifted and padded", "pvt with reduction", "deit linear"])
def test_maps_are_the_rows_of_the_attention_matrices(case):
    """Compare all queries except the class token. Maps above 14 x 14 tokens are skipped, since their queries are sampled."""
    model, image = create_case(case)
    with torch.no_grad(), capture(model) as attentions:
        model(image.unsqueeze(0))
    num_compared = 0
    for attention, block in zip(attentions, trace(model, image), strict=True):
        form = next(iter(block.maps))
        maps, prefix = block.maps[form], attention.num_prefix_tokens
        assert form == ("model's linear attention" if attention.is_linear else "model's softmax attention")
        assert maps.shape[:2] == (attention.q.shape[1], len(block.queries))
        height, width = attention.map_grid
        if max(height, width) > 14:
            continue
        num_compared += 1
        matrix = attention.matrix()[:, :, prefix:, prefix:]
        if attention.key_grid != attention.grid:
            rows = matrix[0]
        else:  # copy the matrix of each window to the rows and columns of its tokens
            rows = matrix.new_zeros(matrix.shape[1], height * width, height * width)
            for window, positions in zip(matrix, token_positions(model, attention), strict=True):
                real = positions >= 0
                inside = positions[real]
                rows[:, inside[:, None], inside] = window[:, real][:, :, real]
        torch.testing.assert_close(maps.flatten(2), rows)
        if attention.is_linear and len(matrix) == 1:
            local = attention.convolution()[:, prefix:, prefix:].mean(dim=0)
            torch.testing.assert_close(block.maps[CONVOLUTION][0].flatten(1), local)
            torch.testing.assert_close(block.maps[SUM], maps + block.maps[CONVOLUTION])
    assert num_compared >= 2


def test_keys_outside_the_stripe_of_a_query_have_no_weight():
    torch.manual_seed(0)
    model = CSwinTransformer(img_size=64, attn_type="LLLL", linear_splits=(2, 2, 7, 7), **SMALL_CSWIN).eval()
    vertical = trace(model, torch.randn(3, 64, 64), ["stage1.0.attns.0"])[0]
    weights = vertical.maps["model's linear attention"][0].unflatten(0, (14, 14))  # 14 x 14 queries of a 16 x 16 map
    num_columns = (weights.abs().sum(dim=-2) > 0).sum(dim=-1)
    assert (num_columns == 2).all()
    assert vertical.visible.shape == (14 * 14, 16, 16)
    assert (vertical.visible.all(dim=-2).sum(dim=-1) == 2).all()  # two whole columns
    assert (vertical.visible.any(dim=-2).sum(dim=-1) == 2).all()
    maps = vertical.maps["model's linear attention"]
    steps = np.frombuffer(base64.b64decode(encode_maps(maps, vertical.visible)["steps"]), dtype=np.int8).reshape(maps.shape)
    np.testing.assert_array_equal(steps == HIDDEN, np.broadcast_to(~vertical.visible.numpy(), maps.shape))
    model, image = create_case("swin global")
    assert all(block.visible is None for block in trace(model, image))
    # The epsilon in the normaliser makes the total smaller than one if the similarities of a query to all keys are low.
    totals = weights.sum(dim=(-2, -1))
    assert totals.max() < 1.001
    assert totals.median() > 0.999


def test_large_maps_have_sampled_queries_and_averaged_keys():
    assert sample_queries((56, 7)).shape == (14 * 7, 2)
    assert sample_queries((56, 7))[-1].tolist() == [55, 6]
    maps = torch.arange(56.0 * 56).view(1, 1, 56, 56)
    encoded = encode_maps(maps)
    assert encoded["size"] == [28, 28]
    largest = np.frombuffer(base64.b64decode(encoded["largest"]), dtype=np.float32)
    assert largest == np.mean([54 * 56 + 54, 54 * 56 + 55, 55 * 56 + 54, 55 * 56 + 55])


def test_the_tokens_at_chosen_points_are_among_the_sampled_queries():
    """Row 31 and column 9 of 56 are not among the 14 evenly spaced rows and columns."""
    point = 31.2 / 56, 9.7 / 56
    queries = sample_queries((56, 56), [point, (1.0, 1.0)])
    assert len(queries) == 15 * 15
    assert queries.max() == 55
    block = BlockMaps("block", queries, (56, 56), {})
    query = block.query_at(point)
    assert queries[query].tolist() == [31, 9]
    assert block.centre(query) == pytest.approx((31.5 / 56, 9.5 / 56))


def test_the_error_of_encoded_maps_is_at_most_half_a_quantisation_step():
    maps = torch.randn(2, 3, 4, 5)
    encoded = encode_maps(maps)
    steps = np.frombuffer(base64.b64decode(encoded["steps"]), dtype=np.int8).reshape(maps.shape)
    largest = np.frombuffer(base64.b64decode(encoded["largest"]), dtype=np.float32).reshape(2, 3, 1, 1)
    error = np.abs(steps / 127 * largest - maps.numpy())
    assert (error <= largest / 127 / 2 + 1e-6).all()


def test_unknown_block_names_are_rejected():
    model, _ = create_case("deit linear")
    assert module_names(model, ["blocks.1"]) == ["blocks.1.attn"]
    with pytest.raises(ValueError, match=r"not the name or prefix of an attention module; choose among blocks\.0\.attn"):
        module_names(model, ["layers"])


RECORD_ERRORS = """
<script>
window.errors = [];
window.addEventListener("error", (event) => window.errors.push(event.message));
</script>
"""
ACTIONS = """
<script>
function checksum() {
  const pixels = element("map").getContext("2d").getImageData(0, 0, 448, 448).data;
  return pixels.reduce((total, value, index) => (total + value * (index % 97 + 1)) % 1000003, 0);
}
setTimeout(() => {
  const seen = [[checksum(), element("where").textContent]];
  const box = element("image").getBoundingClientRect();
  element("image").dispatchEvent(new MouseEvent("click", { clientX: box.left + 20, clientY: box.top + 20, bubbles: true }));
  seen.push([checksum(), element("where").textContent]);
  document.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
  seen.push([checksum(), element("where").textContent]);
  element("form").value = element("form").options[1].value;
  element("form").dispatchEvent(new Event("change"));
  seen.push([checksum(), element("form").value]);
  element("block").value = 1;
  element("block").dispatchEvent(new Event("change"));
  seen.push([checksum(), element("where").textContent]);
  document.body.innerHTML = "<pre id=report>" + JSON.stringify({ seen, errors: window.errors }) + "</pre>";
}, 500);
</script>
"""


@pytest.mark.skipif(BROWSER is None, reason="needs Chromium or Chrome")
def test_the_page_reacts_to_clicks_arrow_keys_and_menus_without_errors(tmp_path):
    model, image = create_case("swin global")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8))
    page = tmp_path / "page.html"
    write_page(page, picture, trace(model, image), "a </script> title <!--<script>")
    text = page.read_text()
    page.write_text(text.replace("<head>", f"<head>{RECORD_ERRORS}").replace("</body>", f"{ACTIONS}</body>"))
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=5000",
        "--dump-dom",
        page.as_uri(),
    ]
    completed = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    report = json.loads(html.unescape(re.search(r'<pre id="report">(.*?)</pre>', completed.stdout).group(1)))
    assert report["errors"] == []
    (initial, initial_text), (clicked, clicked_text), (moved, moved_text), (other_form, form), (other_block, _) = report["seen"]
    assert initial_text == "query: row 3, column 3 of the 8 x 8 map"
    assert clicked_text == "query: row 0, column 0 of the 8 x 8 map"
    assert moved_text == "query: row 0, column 1 of the 8 x 8 map"
    assert form == "softmax, same q and k"
    assert len({initial, clicked, moved, other_form, other_block}) == 5


def test_a_page_loads_nothing_from_the_network(tmp_path):
    model, image = create_case("deit softmax")
    write_page(tmp_path / "page.html", Image.new("RGB", (48, 32)), trace(model, image), "title")
    text = (tmp_path / "page.html").read_text()
    assert not re.search(r"(src|href)=|https?://|import\(", text)


def test_images_with_equal_names_get_different_pages():
    paths = [Path("a/1.png"), Path("b/1.png"), Path("1_2.png"), Path("1.jpg"), Path("x.png")]
    assert scripts.visualize_attention.unique_stems(paths) == ["1", "1_2", "1_2_2", "1_3", "x"]


def test_visualize_attention_writes_pages_and_pictures(trained, toy_data, tmp_path):
    arguments = ["--resume", trained, "--images", toy_data / "val/class0/000.png", "--output", tmp_path, "--blocks", "layers.0"]
    outcome = run_script(scripts.visualize_attention, arguments, tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    preferred = read_checkpoint(trained)["best"]["weights"]
    assert f"toy, {preferred} weights of best.pth, 000.png" in (tmp_path / "000.html").read_text()
    for kind in ("", "_overlay"):
        assert (tmp_path / f"000_layers.0.blocks.0.attn{kind}.png").read_bytes().startswith(b"\x89PNG")


def read_content(page: Path) -> dict:
    return json.loads(re.search(r"const content = (.*);\n", page.read_text()).group(1))


def test_the_token_grid_sets_the_input_size(trained, toy_data, tmp_path):
    """The toy model has patches of 4 x 4 pixels, so a token grid of 14 x 8 needs an input of 56 x 32 pixels."""
    arguments = ["--resume", trained, "--images", toy_data / "val/class0/000.png", "--output", tmp_path, "--token-grid", 14, 8]
    outcome = run_script(scripts.visualize_attention, [*arguments, "--queries", "55,31"], tmp_path / "log")
    assert outcome.exit_codes == [0], outcome.output
    content = read_content(tmp_path / "000.html")
    assert [block["grid"] for block in content["blocks"]] == [[14, 8], [7, 4], [7, 4], [4, 2]]
    image = Image.open(io.BytesIO(base64.b64decode(content["image"].partition(",")[2])))
    assert image.size == (32, 56)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--images", "nothing.png"], "nothing.png: no such file or directory"),
        (["--queries", "40,0"], "--queries 40,0: outside the model's input of 40 x 40 pixels"),
        (["--queries", "4"], "'4': give ROW,COLUMN in pixels, such as 112,60"),
        (["--token-grid", "8", "0"], "--token-grid 8 0: give one or two numbers above 0"),
    ],
)
def test_invalid_arguments_of_visualize_attention_are_rejected(trained, toy_data, tmp_path, options, message):
    arguments = ["--resume", trained, "--images", toy_data / "val/class0/000.png", "--output", tmp_path, *options]
    outcome = run_script(scripts.visualize_attention, arguments, tmp_path / "log")
    assert outcome.exit_codes == [2]
    assert message in outcome.output
