"""Our configs have the values of the 17 YAML files of the reference implementation (the paper's code).

tests/reference/recipes.json lists these values, as one recipe per file.
"""

import pytest

from jobs.model import has_same_windows
from tests.conftest import CONFIGS, reference
from utils.config.keys import WINDOW_KEYS
from utils.config.loading import flatten, load_config, to_dict

RECIPES = reference("recipes")["recipes"]
IGNORED = {"MODEL.SWIN.DEPTHS_LR", "processes"}  # a key without effect, and an entry that is not a config key


def expected_values(recipe: dict) -> dict[str, object]:
    """Convert a recipe to our keys and types: EMA.DECAY=None becomes EMA.ENABLED=False, and the ratios become a string."""
    values = {key: value for key, value in recipe.items() if key not in IGNORED}
    decay = values.pop("EMA.DECAY")
    values["EMA.ENABLED"] = decay is not None
    if decay is not None:
        values["EMA.DECAY"] = decay
    values["MODEL.LA.PVT_LA_SR_RATIOS"] = str(values["MODEL.LA.PVT_LA_SR_RATIOS"])
    return values


def with_whole_map(values: dict[str, object]) -> dict[str, object]:
    """Replace windows that cover the whole token map by 0, as in our configs, and add Swin's softmax windows at 384 pixels."""
    side = values["DATA.IMG_SIZE"] // 4  # of the first stage's map
    if values["MODEL.SWIN.WINDOW_SIZE"] == side:
        softmax_window = {"MODEL.SWIN.SOFTMAX_WINDOW": 12} if side == 96 else {}
        return values | {"MODEL.SWIN.WINDOW_SIZE": 0} | softmax_window
    if "CSWin" in values["MODEL.TYPE"]:
        assert values["MODEL.LA.CSWIN_LA_SPLIT_SIZE"] == f"{side}-{side // 2}-{side // 4}-{side // 8}"
        return values | {"MODEL.LA.CSWIN_LA_SPLIT_SIZE": "0-0-0-0"}
    return values


def test_there_are_seventeen_recipes():
    assert len(RECIPES) == 17


@pytest.mark.parametrize("name", RECIPES)
def test_every_key_of_a_config_has_the_value_of_the_reference(name):
    config, expected = flatten(load_config(CONFIGS / f"{name}.yaml")), with_whole_map(expected_values(RECIPES[name]))
    assert {key: config[key] for key in expected} == expected
    assert config["TRAIN.RECIPE_BATCH_SIZE"] == RECIPES[name]["processes"] * RECIPES[name]["DATA.BATCH_SIZE"]
    assert 256 <= config["TRAIN.RECIPE_BATCH_SIZE"] <= 2048


def reference_spelling(key: str, value: object) -> str:
    """Format a value as in the reference's files, where YAML parses some numbers as strings."""
    if value is None:
        return "None"
    if isinstance(value, list):
        return f"[ {', '.join(map(str, value))} ]"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))  # 1.0 is written as 1
    if isinstance(value, float) and value < 1e-2:
        mantissa, exponent = f"{value:e}".split("e")
        return f"{float(mantissa):g}e{int(exponent)}"  # 5e-4 has no decimal point, so YAML parses it as a string
    return str(value)


def reference_yaml(recipe: dict) -> str:
    """Format a recipe as a YAML file of the reference."""
    lines, open_sections = [], ()
    for key, value in sorted(recipe.items()):
        if key in ("processes", "EMA.DECAY"):  # in the reference, EMA is a command-line option
            continue
        *sections, leaf = key.split(".")
        for depth in range(len(sections)):
            if open_sections[: depth + 1] != tuple(sections[: depth + 1]):
                lines.append(f"{'  ' * depth}{sections[depth]}:")
        open_sections = tuple(sections)
        lines.append(f"{'  ' * len(sections)}{leaf}: {reference_spelling(key, value)}")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", RECIPES)
def test_every_yaml_file_of_the_reference_loads_unchanged(name, tmp_path):
    path = tmp_path / f"{name}.yaml"
    path.write_text(reference_yaml(RECIPES[name]))
    assert "PVT_LA_SR_RATIOS: 1111\n" in path.read_text()
    config, ours = flatten(load_config(path)), flatten(load_config(CONFIGS / f"{name}.yaml"))
    expected = expected_values(RECIPES[name])
    assert {key: config[key] for key in expected if not key.startswith("EMA")} == {
        key: value for key, value in expected.items() if not key.startswith("EMA")
    }
    different = {key for key in config if config[key] != ours[key]}
    # Keys that the generated file lacks, and windows, which cover the whole token map in both configs.
    assert different <= {"MODEL.NAME", "EMA.ENABLED", "EMA.DECAY", *WINDOW_KEYS}
    if different & set(WINDOW_KEYS):
        assert has_same_windows(to_dict(load_config(path)), load_config(CONFIGS / f"{name}.yaml"), path)


def test_generated_yaml_uses_the_spelling_of_the_reference():
    text = reference_yaml(RECIPES["flatten_swin_t"] | {"TRAIN.CLIP_GRAD": None})
    for line in ("BASE_LR: 5e-4", "CLIP_GRAD: None", "DEPTHS: [ 2, 2, 6, 2 ]", "CUTMIX: 1", "EPS: 1e-8", "CUTMIX_MINMAX: None"):
        assert f" {line}\n" in text
