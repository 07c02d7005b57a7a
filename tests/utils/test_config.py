import re
import shlex
import time
from pathlib import Path

import pytest
import yaml

from models import build_model
from models.linear_attention import ATTENTION_KINDS
from models.registry import REGISTERED_NAMES
from tests.conftest import CONFIGS, reference
from utils.config.key import INFINITY
from utils.config.keys import KEYS
from utils.config.loading import flatten, image_size, load_config, load_stored_config, to_dict, train_sizes
from utils.errors import ConfigError

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("data", "engine", "jobs", "models", "utils")
SOURCES = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")] + [ROOT / "main.py"]


def write(folder, name="config.yaml", text=""):
    path = folder / name
    path.write_text(text)
    return path


RECIPES = sorted((CONFIGS / "recipes").iterdir())


def header_of(path):
    return "".join(line for line in path.read_text().splitlines() if line.startswith("#"))


@pytest.mark.parametrize("path", sorted({*CONFIGS.rglob("*.yaml")} - {*RECIPES}), ids=lambda path: path.stem)
def test_every_config_is_named_after_its_model_and_its_header_gives_the_training_command(path):
    cfg, header = load_config(path), header_of(path)
    assert path.stem == cfg.MODEL.NAME
    assert f"--cfg configs/{path.relative_to(CONFIGS)}" in header
    assert "Meant for" in header
    assert f"(global batch {cfg.TRAIN.RECIPE_BATCH_SIZE})" in header


@pytest.mark.parametrize("model", ["flatten_swin_t", "flatten_pvt_t", "flatten_pvt_v2_b0", "flatten_cswin_t", "flatten_deit_t"])
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_combined_with_every_model(path, model):
    model_cfg = load_config(CONFIGS / f"{model}.yaml")
    cfg = load_config([CONFIGS / f"{model}.yaml", path])
    assert {key: value for key, value in cfg.MODEL.items() if key != "LABEL_SMOOTHING"} == {
        key: value for key, value in model_cfg.MODEL.items() if key != "LABEL_SMOOTHING"
    }
    assert path.stem == cfg.TAG
    header = header_of(path)
    assert f"configs/recipes/{path.name}" in header
    assert f"(global batch {cfg.TRAIN.RECIPE_BATCH_SIZE})" in header
    # A recipe overrides the training settings of every model's config. Outside MODEL and DATA, only these two keys still depend
    # on the model.
    other = flatten(load_config([CONFIGS / "flatten_cswin_b_384.yaml", path]))
    assert {key for key, value in other.items() if value != flatten(cfg)[key] and not key.startswith(("MODEL", "DATA"))} <= {
        "EMA.DECAY",
        "TEST.CROP",
    }


def test_precedence_is_command_line_then_config_file_then_base_files_then_defaults(tmp_path):
    write(tmp_path, "base.yaml", "TRAIN: {EPOCHS: 1, WARMUP_EPOCHS: 1, BASE_LR: 1.0}\n")
    path = write(tmp_path, text="BASE: [base.yaml]\nTRAIN: {WARMUP_EPOCHS: 0, BASE_LR: 2.0}\n")
    cfg = load_config(path, ["TRAIN.BASE_LR", "3.0"])
    assert (cfg.TRAIN.EPOCHS, cfg.TRAIN.WARMUP_EPOCHS, cfg.TRAIN.BASE_LR, cfg.TRAIN.MIN_LR) == (1, 0, 3.0, 5e-6)


def test_a_dumped_config_loads_and_dumps_to_the_same_bytes(tmp_path):
    options = ["TRAIN.BASE_LR", "1e-3", "AUG.CUTMIX_MINMAX", "[0.2, 0.8]", "TAG", "7", "OUTPUT", "a b/ü"]
    first = load_config(CONFIGS / "flatten_swin_b_384.yaml", options).dump()
    second = load_config(write(tmp_path, text=first)).dump()
    assert first == second


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        ("TRAIN: {BASE_LR: 5e-4}", "TRAIN.BASE_LR", 5e-4),  # YAML reads 5e-4 as text
        ("TRAIN: {WEIGHT_DECAY: 1e-8}", "TRAIN.WEIGHT_DECAY", 1e-8),
        ("AUG: {MIXUP: 0}", "AUG.MIXUP", 0.0),
        ("AUG: {CUTMIX_MINMAX: None}", "AUG.CUTMIX_MINMAX", None),
        ("MODEL: {SWIN: {DEPTHS: '(1, 1, 2, 1)'}}", "MODEL.SWIN.DEPTHS", [1, 1, 2, 1]),
        ("TRAIN: {OPTIMIZER: {BETAS: [0, 0.99]}}", "TRAIN.OPTIMIZER.BETAS", [0.0, 0.99]),
        # Keys of the paper's code (the reference) that have no effect here are accepted at their default values.
        ("MODEL: {SWIN: {APE: False, QK_SCALE: None}}", "TAG", "default"),
    ],
)
def test_yaml_in_the_style_of_the_reference_is_read_with_the_intended_types(tmp_path, text, key, expected):
    value = flatten(load_config(write(tmp_path, text=text)))[key]
    assert value == expected
    assert type(value) is type(expected)


def test_a_swin_config_in_the_reference_style_builds_its_model(tmp_path):
    text = """
MODEL:
  TYPE: flatten_swin
  NAME: mine
  DROP_PATH_RATE: 0.2
  SWIN:
    EMBED_DIM: 24
    DEPTHS: [ 1, 1, 2, 1 ]
    NUM_HEADS: [ 1, 2, 4, 8 ]
    WINDOW_SIZE: 56
  LA:
    FOCUSING_FACTOR: 3
    KERNEL_SIZE: 5
    ATTN_TYPE: LLMS1
"""
    model = build_model(load_config(write(tmp_path, text=text)))
    names = [type(block.attn).__name__ for stage in model.layers for block in stage.blocks]
    assert names == ["LinearWindowAttention"] * 3 + ["SoftmaxWindowAttention"] * 2


@pytest.mark.parametrize(
    ("text", "opts", "message"),
    [
        ("TRAINS: {EPOCHS: 3}", [], "unknown key TRAINS"),
        ("TRAIN: {EPOCH: 3}", [], "unknown key TRAIN.EPOCH: did you mean TRAIN.EPOCHS"),
        ("MODEL: {LA: {FOCUS_FACTOR: 3}}", [], "did you mean MODEL.LA.FOCUSING_FACTOR"),
        ("", ["EPOCHS", "3"], "did you mean TRAIN.EPOCHS"),
        ("TRAIN: 3", [], "TRAIN=3 assigns a value to a section"),
        ("", ["TRAIN", "3"], "TRAIN is a section"),
        ("TRAIN: {EPOCHS: many}", [], "TRAIN.EPOCHS='many' is of type str; expected int"),
        ("TRAIN: {BASE_LR: fast}", [], "TRAIN.BASE_LR='fast' is of type str; expected float"),
        ("TRAIN: {EPOCHS: 2.5}", [], "TRAIN.EPOCHS=2.5 is of type float; expected int"),
        ("AUG: {CUTMIX_MINMAX: wide}", [], "AUG.CUTMIX_MINMAX='wide' is of type str; expected list"),
        ("AMP: 1", [], "AMP=1 is of type int; expected bool"),
        ("", ["SEED"], "'SEED' has no value"),
        ("MODEL: {LA: {KERNEL_SIZE: 4}}", [], "MODEL.LA.KERNEL_SIZE=4: an even kernel"),
        ("MODEL: {LA: {ATTN_TYPE: LLMS}}", [], "MODEL.LA.ATTN_TYPE='LLMS'"),
        ("MODEL: {SWIN: {NUM_HEADS: [5, 6, 12, 24]}}", [], "5 heads do not divide the 96 channels of stage 1"),
        (
            "TRAIN: {LR_SCHEDULER: {NAME: cosin}}",
            [],
            "poly, constant; did you mean 'cosine'?",
        ),
        ("TAG: ../elsewhere", [], "without / and"),
        ("MODEL: {SWIN: {APE: True}}", [], "MODEL.SWIN.APE=True is not supported: only False"),
        ("MODEL: {RESUME: a, PRETRAINED: b}", [], "give only one of --resume and --pretrained"),
        ("DATA: {GLOBAL_BATCH_SIZE: 8}", ["TRAIN.ACCUMULATION_STEPS", 2], "TRAIN.ACCUMULATION_STEPS=2: conflicts with"),
        ("TRAIN: {FREEZE_BACKBONE: True, LAYER_DECAY: 0.5}", [], "TRAIN.LAYER_DECAY=0.5 has no effect"),
        ("", ["train.epochs", "3"], "unknown key train.epochs: did you mean TRAIN.EPOCHS"),
        ("", ["TRAIN.LR", "3"], "unknown key TRAIN.LR: did you mean TRAIN.BASE_LR"),
        ("", ["TRAIN.EPOCHS=many"], "TRAIN.EPOCHS='many' is of type str"),
        ("", ["TRAIN.EPOCHS=2", "SEED"], "'SEED' has no value"),
        ("TRAIN: {EPOCHS: 3}\nTRAIN: {EPOCHS: 4}", [], "the key TRAIN is given twice"),
        ("TRAIN: {EPOCHS: 3, EPOCHS: 4}", [], "the key EPOCHS is given twice"),
        ("MODEL: {SWIN: {DEPTHS: [0, 0, 0], NUM_HEADS: [1, 1, 1]}}", [], "MODEL.SWIN.DEPTHS=[0, 0, 0]"),
        ("MODEL: {LA: {KIND: fokused}}", [], "choose one of focused"),
        ("MODEL: {TYPE: flaten_swin}", [], "did you mean 'flatten_swin'"),
        ("MODEL: {TYPE: flatten_pvt_tiny, SWIN: {EMBED_DIM: 48}}", [], "has no effect with MODEL.TYPE=flatten_pvt_tiny"),
        ("MODEL: {LA: {CSWIN_LA_SPLIT_SIZE: 7-7-7-7}}", [], "has no effect with MODEL.TYPE=flatten_swin"),
        (
            "MODEL: {TYPE: flatten_deit_t, DEIT: {DEPTH: 6}}",
            [],
            "MODEL.DEIT.DEPTH=6 has no effect with MODEL.TYPE=flatten_deit_t",
        ),
        ("MODEL: {TYPE: flatten_deit, DEIT: {NUM_HEADS: 5}}", [], "does not divide MODEL.DEIT.EMBED_DIM=192"),
        ("MODEL: {TYPE: flatten_deit, DEIT: {NUM_HEADS: 0}}", [], "MODEL.DEIT.NUM_HEADS=0: give a number from 1 to 65536"),
        ("TRAIN: {LR_SCHEDULER: {DECAY_RATE: -1}}", [], "TRAIN.LR_SCHEDULER.DECAY_RATE=-1.0"),
        ("TRAIN: {OPTIMIZER: {EPS: -1}}", [], "TRAIN.OPTIMIZER.EPS=-1.0"),
        ("AUG: {CUTMIX_MINMAX: [0.5, 0.5]}", [], "AUG.CUTMIX_MINMAX=[0.5, 0.5]"),
        ("AUG: {CUTMIX_MINMAX: [1, 2]}", [], "AUG.CUTMIX_MINMAX=[1.0, 2.0]"),
        ("AUG: {CUTMIX_MINMAX: [0.8, 0.2]}", [], "AUG.CUTMIX_MINMAX=[0.8, 0.2]"),
        ("MODEL: {TYPE: flatten_pvt_tiny, LA: {PVT_LA_SR_RATIOS: '842'}}", [], "give one digit per stage, as in 8421"),
        (
            "MODEL: {TYPE: FLatten_CSWin_64_24181_tiny_224, LA: {CSWIN_LA_SPLIT_SIZE: 7-7}}",
            [],
            "one number per stage, as in 56",
        ),
        ("MODEL: {SWIN: {DEPTHS: [1, 1, 1]}}", [], "give lists of the same length"),
        ("DATA: {MEAN: [0.5, 0.5]}", [], "DATA.MEAN=[0.5, 0.5]: give three numbers"),
        ("DATA: {STD: [0.5, 0.5, 0]}", [], "STD must be above 0"),
        ("AUG: {SCALE: [0.5, 0.1]}", [], "AUG.SCALE=[0.5, 0.1]"),
        ("AUG: {RATIO: [1.0]}", [], "AUG.RATIO=[1.0]"),
        ("TRAIN: {OPTIMIZER: {BETAS: [0.9, 1.0]}}", [], "TRAIN.OPTIMIZER.BETAS=[0.9, 1.0]"),
        ("TRAIN: {OPTIMIZER: {NAME: lionn}}", [], "did you mean 'lion'?"),
        (
            "TRAIN: {OPTIMIZER: {NAME: lion, EPS: 0.001}}",
            [],
            "EPS=0.001 has no effect with TRAIN.OPTIMIZER.NAME=lion",
        ),
        ("TRAIN: {OPTIMIZER: {NAME: adan, BETAS: [0.9, 0.99]}}", [], "give three numbers, each at least 0 and below 1"),
        ("TRAIN: {OPTIMIZER: {NAME: muon, MOMENTUM: 1}}", [], "muon needs a number below 1"),
        ("TRAIN: {LR_SCHEDULER: {NAME: multistep}, EPOCHS: 60}", [], "give increasing epochs below TRAIN.EPOCHS=60"),
        ("TRAIN: {LR_SCHEDULER: {MILESTONES: [9]}}", [], "MILESTONES=[9] has no effect with TRAIN.LR_SCHEDULER.NAME=cosine"),
        ("TRAIN: {LR_SCHEDULER: {NAME: step, POWER: 2}}", [], "POWER=2.0 has no effect with TRAIN.LR_SCHEDULER.NAME=step"),
        ("TRAIN: {BCE_THRESHOLD: 0.2}", [], "BCE_THRESHOLD=0.2 has no effect with TRAIN.LOSS=ce"),
        ("TRAIN: {CLASS_WEIGHTS: balance}", [], "choose none or balanced"),
        ("{TRAIN: {CLASS_WEIGHTS: [1, 2]}, MODEL: {NUM_CLASSES: 3}}", [], "has 2 numbers; give one from 1e-09 to 1e+09"),
        (
            "{TRAIN: {CLASS_WEIGHTS: [1, 0, 4]}, MODEL: {NUM_CLASSES: 3}}",
            [],
            "the weight of the class with id 1 is 0; give numbers from 1e-09 to 1e+09",
        ),
        ("{TRAIN: {CLASS_WEIGHTS: [1, 1e39]}, MODEL: {NUM_CLASSES: 2}}", [], "the weight of the class with id 1 is 1e+39"),
        ("{TRAIN: {CLASS_WEIGHTS: balanced}, DATA: {SAMPLING: balanced}}", [], "correct the class frequencies twice"),
        ("TRAIN: {SIZE_SCHEDULE: 128}", [], "TRAIN.SIZE_SCHEDULE=128 is of type int; expected list, such as [[0, 224]]"),
        (
            "TRAIN: {SIZE_SCHEDULE: [0, 128]}",
            [],
            "TRAIN.SIZE_SCHEDULE=[0, 128]: 0 is of type int; give a value such as [[0, 224]]",
        ),
        (
            "TRAIN: {OPTIMIZER: {BETAS: [0.9, a]}}",
            [],
            "BETAS=[0.9, 'a']: 'a' is of type str; give a value such as [0.9, 0.999]",
        ),
        ("TRAIN: {OPTIMIZER: {EPS: 0}}", [], "TRAIN.OPTIMIZER.EPS=0.0: give a number of at least 1e-30"),
        ("TRAIN: {SIZE_SCHEDULE: [[0]]}", [], "[0] is not [epochs, size] or [epochs, height, width]"),
        ("TRAIN: {SIZE_SCHEDULE: [[0, 9000]]}", [], "with sizes from 1 to 8192 pixels"),
        ("TRAIN: {SIZE_SCHEDULE: [[1, 128]]}", [], "the epochs must begin with 0 and increase"),
        ("TRAIN: {SIZE_SCHEDULE: [[0, 128], [9, 160], [9, 224]]}", [], "the epochs must begin with 0 and increase"),
        ("AUG: {MIXUP: 0, CUTMIX: 0, MIXUP_OFF_EPOCH: 3}", [], "AUG.MIXUP_OFF_EPOCH=3 has no effect without mixup"),
        ("AUG: {MIXUP_OFF_EPOCH: -1}", [], "AUG.MIXUP_OFF_EPOCH=-1: give a number of at least 0"),
        ("TEST: {CROP: False, CROP_MODE: short}", [], "TEST.CROP_MODE=short; give only one of them"),
        ("TEST: {CROP_PCT: 1.2}", [], "TEST.CROP_PCT=1.2"),
        ("DATA: {IMG_SIZE: [224, 224, 3]}", [], "give one number of pixels, or [height, width]"),
        ("DATA: {IMG_SIZE: [[224], 224]}", [], "[[224], 224]: [224] is of type list; give a value such as [224, 224]"),
        ("DATA: {IMG_SIZE: [224, 0]}", [], "DATA.IMG_SIZE=[224, 0]: give numbers, each from 1 to 8192"),
        ("DATA: {IMG_SIZE: 1000000000}", [], "DATA.IMG_SIZE=1000000000: give a number from 1 to 8192"),
        ("MODEL: {NUM_CLASSES: 1}", [], "MODEL.NUM_CLASSES=1: give a number from 2 to 1000000"),
        ("DATA: {IMG_SIZE: big}", [], "DATA.IMG_SIZE='big' is of type str"),
        ("a: !!python/object/apply:os.system [echo]", [], "cannot be parsed as YAML"),
        ("- a", [], "is of type list, not a mapping"),
        ("BASE: 5", [], "BASE=5: give a file, or a list of files"),
        ("TRAIN: {EPOCHS: 3}\nTRAIN.EPOCHS: 4", [], "TRAIN.EPOCHS contains a dot; write TRAIN: {EPOCHS: ...} instead"),
        ("AUG: {MIXUP_PROB: 1.5}", [], "AUG.MIXUP_PROB=1.5: give a number from 0 to 1"),
        ("AUG: {REPROB: 1.5}", [], "AUG.REPROB=1.5: give a number from 0 to 1"),
        ("EMA: {DECAY: 1.01}", [], "EMA.DECAY=1.01: give a number from 0 to 1"),
        ("MODEL: {DROP_PATH_RATE: 1.0}", [], "MODEL.DROP_PATH_RATE=1.0: give a number from 0 to 0.999"),
        ("TRAIN: {EPOCHS: 5, WARMUP_EPOCHS: 6}", [], "TRAIN.WARMUP_EPOCHS=6: longer than TRAIN.EPOCHS=5; shorten the warm-up"),
        (f"TAG: {'x' * 256}", [], "give it at most 255 bytes"),
        (f"MODEL: {{NAME: {'ü' * 128}}}", [], "give it at most 255 bytes"),
    ],
)
def test_an_invalid_config_is_rejected_with_key_value_and_remedy(tmp_path, text, opts, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_config(write(tmp_path, text=text), opts)


@pytest.mark.parametrize(
    "opts",
    [
        ["TRAIN.EPOCHS", 100, "TRAIN.SIZE_SCHEDULE", "[[0, 128], [60, 160], [100, 224]]"],
        ["TRAIN.EPOCHS", 50, "AUG.MIXUP_OFF_EPOCH", 50],
        ["AUG.MIXUP", 0, "AUG.CUTMIX", 0, "AUG.MIXUP_OFF_EPOCH", 50],
    ],
    ids=str,
)
def test_the_options_that_the_refusal_of_a_phase_without_effect_proposes_are_accepted(opts):
    with pytest.raises(ConfigError, match=f"{opts[-2]}=") as refused:
        load_config("flatten_swin_t", opts)
    _, _, proposed = str(refused.value).partition("--opts ")
    cfg = load_config("flatten_swin_t", [*opts, *shlex.split(proposed)])
    assert train_sizes(cfg) == ([(0, (128, 128)), (60, (160, 160))] if "SIZE" in opts[-2] else [(0, (224, 224))])


def test_missing_files_and_cycles_of_base_files_are_rejected(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "nothing.yaml")
    write(tmp_path, "a.yaml", "BASE: [b.yaml]")
    write(tmp_path, "b.yaml", "BASE: [a.yaml]")
    with pytest.raises(ConfigError, match="cycle"):
        load_config(tmp_path / "a.yaml")
    with pytest.raises(ConfigError, match="is not a YAML file"):
        load_config(write(tmp_path, "config.py", "import os"))


def test_an_unknown_model_type_is_rejected_and_not_executed_as_code(tmp_path):
    expression = f"__import__('os').mkdir({str(tmp_path / 'evaluated')!r})"
    path = write(tmp_path, text=yaml.safe_dump({"MODEL": {"TYPE": expression}}))
    with pytest.raises(ConfigError, match=r"MODEL.TYPE=.*: choose one of flatten_swin"):
        load_config(path)
    assert not (tmp_path / "evaluated").exists()


def test_the_config_determines_the_size_of_deit(tmp_path):
    """The expected number of parameters is computed by hand, for linear attention with a 5 x 5 kernel."""
    text = """
DATA: {IMG_SIZE: 32}
MODEL: {TYPE: flatten_deit, NUM_CLASSES: 10, DEIT: {PATCH_SIZE: 8, EMBED_DIM: 24, DEPTH: 3, NUM_HEADS: 2}, LA: {ATTN_TYPE: L}}
"""
    model = build_model(load_config(write(tmp_path, text=text)))
    channels = 24
    patches = 16
    depth = 3
    heads = 2
    stem = 3 * 8 * 8 * channels + channels + channels + (1 + patches) * channels  # patch embedding, class token, positions
    # Projections of q, k, v and output; depthwise convolution; scale; positional encoding.
    attention = 4 * channels**2 + 4 * channels + channels // heads * 26 + channels + (1 + patches) * channels
    # Attention, MLP, and two norms.
    block = attention + 8 * channels**2 + 5 * channels + 4 * channels
    # Stem, blocks, final norm, and a head of (24 + 1) * 10 parameters.
    assert (
        sum(parameter.numel() for parameter in model.parameters()) == stem + depth * block + 2 * channels + (channels + 1) * 10
    )
    assert {block.attn.num_heads for block in model.blocks} == {heads}


def test_config_choices_equal_the_available_models_and_attention_kinds():
    assert set(KEYS["MODEL.TYPE"].choices) == set(REGISTERED_NAMES)
    assert set(KEYS["MODEL.LA.KIND"].choices) == set(ATTENTION_KINDS)


def test_options_may_be_written_with_an_equals_sign():
    cfg = load_config(CONFIGS / "flatten_swin_t.yaml", ["TRAIN.EPOCHS=30", "TAG", "a=b", "MODEL.SWIN.DEPTHS=[1, 1, 2, 1]"])
    assert (cfg.TRAIN.EPOCHS, cfg.TAG, cfg.MODEL.SWIN.DEPTHS) == (30, "a=b", [1, 1, 2, 1])


@pytest.mark.parametrize(
    ("value", "expected"),
    [(160, (160, 160)), ("160", (160, 160)), ([160, 320], (160, 320)), ("[160,320]", (160, 320)), ("(160, 320)", (160, 320))],
)
def test_an_image_size_is_a_number_or_height_and_width(value, expected, tmp_path):
    cfg = load_config(CONFIGS / "flatten_swin_t.yaml", ["DATA.IMG_SIZE", value])
    assert image_size(cfg) == expected
    reloaded = load_config(write(tmp_path, text=cfg.dump()))
    assert image_size(reloaded) == expected
    assert image_size(load_config(write(tmp_path, text=cfg.dump()), ["DATA.IMG_SIZE", 64])) == (64, 64)


def test_a_checkpoint_is_saved_every_15_minutes_by_default():
    assert load_config(CONFIGS / "flatten_swin_t.yaml").SAVE_MINUTES == 15


def test_a_base_file_may_be_in_the_home_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home/base.yaml").write_text("TAG: base")
    assert load_config(write(tmp_path, text="BASE: ['~/base.yaml']")).TAG == "base"


def test_a_tilde_in_a_path_is_expanded_to_the_home_directory(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    cfg = load_config(CONFIGS / "flatten_swin_t.yaml", ["DATA.DATA_PATH", "~/imagenet", "OUTPUT", "~/runs", "TAG", "~"])
    assert (cfg.DATA.DATA_PATH, cfg.OUTPUT, cfg.TAG) == ("/home/someone/imagenet", "/home/someone/runs", "~")


def test_the_recipe_batch_size_defaults_to_eight_times_the_batch_size_of_the_config_file(tmp_path):
    path = write(tmp_path, text="DATA: {BATCH_SIZE: 64}")
    assert load_config(path, ["DATA.BATCH_SIZE", 16]).TRAIN.RECIPE_BATCH_SIZE == 512
    assert load_config(write(tmp_path, text="TRAIN: {RECIPE_BATCH_SIZE: 96}")).TRAIN.RECIPE_BATCH_SIZE == 96


def test_loading_the_config_of_a_checkpoint_drops_unknown_keys_and_the_path_of_pretrained_weights():
    tree = to_dict(load_config(CONFIGS / "flatten_swin_t.yaml", ["MODEL.PRETRAINED", "x.pth", "TRAIN.EPOCHS", 70]))
    tree["MODEL"]["GONE"] = 1
    cfg = load_stored_config(tree, ["SEED", 3], source="x.pth")
    assert (cfg.TRAIN.EPOCHS, cfg.MODEL.PRETRAINED, cfg.SEED) == (70, "", 3)
    cfg = load_stored_config(tree, source="x.pth", sections=["MODEL."])
    assert (cfg.TRAIN.EPOCHS, cfg.MODEL.DROP_PATH_RATE) == (300, 0.2)


def test_every_config_key_is_read_outside_the_config_modules():
    """The code reads keys by full name (cfg.TRAIN.EPOCHS), but engine/optim.py reads those of two sections as options.EPS."""
    text = "\n".join(path.read_text() for path in SOURCES if path.parent.name != "config")
    read = set(re.findall(r"\bcfg\.([A-Z][A-Z_\d]*(?:\.[A-Z][A-Z_\d]*)*)", text))
    options = re.findall(r"\boptions\.([A-Z_]+)\b", (ROOT / "engine/optim.py").read_text())
    read |= {f"TRAIN.{section}.{name}" for section in ("OPTIMIZER", "DISTILLATION") for name in options}
    unread = flatten(load_config(CONFIGS / "flatten_swin_t.yaml")).keys() - read
    assert unread == {"BASE", "DATA.DATASET"}  # BASE is resolved by load_config; DATA.DATASET has only one choice


# Defaults of the keys that tests/reference/recipes.json does not contain; tests/test_recipes.py checks the other keys.
DEFAULTS = {
    "DATA.DATA_PATH": "",
    "DATA.DATASET": "imagenet",
    "DATA.ZIP_MODE": False,
    "DATA.CACHE_MODE": "part",
    "DATA.INDEX_CACHE": "~/.cache/flatten",
    "DATA.TRAIN_SPLIT": "",
    "DATA.VAL_SPLIT": "",
    "DATA.VAL_FRACTION": 0.0,
    "DATA.UNREADABLE": "error",
    "DATA.MAX_UNREADABLE": 100,
    "DATA.ACCEPT_CHANGES": False,
    "DATA.GLOBAL_BATCH_SIZE": 0,
    "DATA.DROP_LAST": True,
    "DATA.INTERPOLATION": "bicubic",
    "DATA.MEAN": [0.485, 0.456, 0.406],
    "DATA.STD": [0.229, 0.224, 0.225],
    "DATA.NUM_WORKERS": -1,
    "DATA.WORKER_TIMEOUT": 300.0,
    "DATA.PIN_MEMORY": True,
    "MODEL.NAME": "flatten_swin_t",
    "MODEL.NUM_CLASSES": 1000,
    "MODEL.RESUME": "",
    "MODEL.PRETRAINED": "",
    "MODEL.SWIN.PATCH_SIZE": 4,
    "MODEL.SWIN.SOFTMAX_WINDOW": 0,
    "MODEL.SWIN.MLP_RATIO": 4.0,
    "MODEL.SWIN.QKV_BIAS": True,
    "MODEL.SWIN.PATCH_NORM": True,
    "MODEL.DEIT.PATCH_SIZE": 16,
    "MODEL.DEIT.EMBED_DIM": 192,
    "MODEL.DEIT.DEPTH": 12,
    "MODEL.DEIT.NUM_HEADS": 3,
    "MODEL.LA.KIND": "focused",
    "MODEL.LA.FOCUSING": True,
    "MODEL.LA.RANK_RESTORATION": True,
    "MODEL.LA.BACKEND": "auto",
    "TRAIN.RECIPE_BATCH_SIZE": 0,
    "TRAIN.LAYER_DECAY": 1.0,
    "TRAIN.HEAD_LR_SCALE": 1.0,
    "TRAIN.FREEZE_BACKBONE": False,
    "TRAIN.ACCUMULATION_STEPS": 0,
    "TRAIN.USE_CHECKPOINT": False,
    "TRAIN.COMPILE": False,
    "TRAIN.AUTO_RESUME": True,
    "AUG.SCALE": [0.08, 1.0],
    "AUG.HFLIP": 0.5,
    "AUG.REPEATS": 1,
    "AUG.DEVICE_RANDAUGMENT": False,
    "EMA.ENABLED": False,
    "EMA.FORCE_CPU": False,
    "DATA.EXIF": False,
    "TEST.CROP_MODE": "squash",
    "TEST.CROP_PCT": 0.875,
    "TEST.INTERPOLATION": "",
    "TEST.BATCH_SIZE": 0,
    "TEST.CLASS_MAP": "",
    "TEST.REAL_LABELS": "",
    "TEST.TTA": "none",
    "TEST.RESTRICT_CLASSES": True,
    "TEST.PREDICTIONS": False,
    "TEST.MISTAKES": 0,
    "TEST.PRECISION": "fp32",
    "AMP": False,
    "AMP_DTYPE": "bf16",
    "OUTPUT": "output",
    "TAG": "default",
    "DETERMINISTIC": "off",
    "TF32": True,
    "CUDNN_BENCHMARK": True,
    "SEED": 0,
    "COLLECTIVE_TIMEOUT": 600.0,
    "PRINT_FREQ": 10,
    "SAVE_FREQ": 1,
    "SAVE_STEPS": 0,
    "SAVE_MINUTES": 15.0,
    "EVAL_FREQ": 1,
    "ATTENTION_IMAGE": "",
    "KEEP_CHECKPOINTS": 2,
    "AUG.RATIO": [3 / 4, 4 / 3],
    "BEST_METRIC": "acc1",
    "EMA.WARMUP": False,
    "KEEP_BEST": 1,
    "TRACKER": "none",
    "TRAIN.PATIENCE": 0,
    "DATA.SAMPLING": "natural",
    "TRAIN.LOSS": "ce",
    "TRAIN.BCE_THRESHOLD": 0.0,
    "TRAIN.CLASS_WEIGHTS": "none",
    "TRAIN.TEACHER": "",
    "TRAIN.DISTILLATION.KIND": "hard",
    "TRAIN.DISTILLATION.WEIGHT": 0.5,
    "TRAIN.DISTILLATION.TEMPERATURE": 3.0,
    "TRAIN.LR_SCHEDULER.MILESTONES": [30, 60, 90],
    "TRAIN.LR_SCHEDULER.POWER": 1.0,
    "TRAIN.SIZE_SCHEDULE": [],
    "AUG.MIXUP_OFF_EPOCH": 0,
}


def test_defaults_of_keys_outside_the_reference_recipes_equal_the_expected_values():
    recipe_keys = reference("recipes")["recipes"]["flatten_swin_t"].keys()
    assert {name: key.default for name, key in KEYS.items() if name not in recipe_keys and name != "BASE"} == DEFAULTS


def test_every_config_key_has_a_description_and_a_legal_default():
    for name, key in KEYS.items():
        assert key.meaning, name
        assert not key.choices or key.default in key.choices, name
        defaults = key.default if isinstance(key.default, list) else [key.default]
        assert key.minimum is None or all(key.minimum <= default <= key.maximum for default in defaults), name


# Smallest and largest legal values, listed independently of utils/config/keys.py.
BOUNDS = {
    (0, INFINITY): (
        "DATA.MAX_UNREADABLE DATA.GLOBAL_BATCH_SIZE DATA.WORKER_TIMEOUT TRAIN.WARMUP_EPOCHS "
        "TRAIN.COOLDOWN_EPOCHS TRAIN.BASE_LR TRAIN.WARMUP_LR TRAIN.MIN_LR TRAIN.RECIPE_BATCH_SIZE "
        "TRAIN.WEIGHT_DECAY TRAIN.HEAD_LR_SCALE TRAIN.CLIP_GRAD TRAIN.ACCUMULATION_STEPS "
        "TRAIN.PATIENCE AUG.COLOR_JITTER AUG.MIXUP AUG.CUTMIX AUG.MIXUP_OFF_EPOCH TEST.BATCH_SIZE SAVE_STEPS SAVE_MINUTES"
    ),
    (1, INFINITY): (
        "TRAIN.LR_SCHEDULER.DECAY_EPOCHS TRAIN.LR_SCHEDULER.MILESTONES AUG.REPEATS PRINT_FREQ SAVE_FREQ EVAL_FREQ "
        "KEEP_CHECKPOINTS KEEP_BEST"
    ),
    (1, 8192): ("DATA.IMG_SIZE MODEL.SWIN.PATCH_SIZE MODEL.DEIT.PATCH_SIZE MODEL.LA.KERNEL_SIZE"),
    (0, 8192): "MODEL.SWIN.WINDOW_SIZE MODEL.SWIN.SOFTMAX_WINDOW",
    (1, 65_536): "MODEL.SWIN.EMBED_DIM MODEL.SWIN.NUM_HEADS MODEL.DEIT.EMBED_DIM MODEL.DEIT.NUM_HEADS",
    (1, 1000): "MODEL.SWIN.DEPTHS MODEL.DEIT.DEPTH MODEL.LA.FOCUSING_FACTOR AUG.RECOUNT",
    (1, 1_000_000): "DATA.BATCH_SIZE TRAIN.EPOCHS",
    (2, 1_000_000): "MODEL.NUM_CLASSES",
    (0, 100): "TEST.MISTAKES",
    (0, 0.9): "DATA.VAL_FRACTION",
    (0, 0.999): "MODEL.DROP_RATE MODEL.DROP_PATH_RATE MODEL.LABEL_SMOOTHING TRAIN.BCE_THRESHOLD",
    (0.01, 100): "TRAIN.LR_SCHEDULER.POWER",
    (0.01, 1000): "MODEL.SWIN.MLP_RATIO TRAIN.DISTILLATION.TEMPERATURE",
    (1e-06, 1): "TRAIN.LAYER_DECAY TRAIN.DISTILLATION.WEIGHT",
    (1e-09, 1): "TRAIN.LR_SCHEDULER.DECAY_RATE",
    (0, 1): "TRAIN.OPTIMIZER.MOMENTUM AUG.HFLIP AUG.REPROB AUG.MIXUP_PROB AUG.MIXUP_SWITCH_PROB EMA.DECAY",
    (0.01, 1): "TEST.CROP_PCT",
    (0, 4294967295): "SEED",
    (-1, INFINITY): "DATA.NUM_WORKERS",
    (1e-30, INFINITY): "TRAIN.OPTIMIZER.EPS",
    (1, 86400): "COLLECTIVE_TIMEOUT",
}


def test_the_bounds_of_every_numeric_config_key_equal_the_expected_bounds():
    bounds = {name: (key.minimum, key.maximum) for name, key in KEYS.items() if key.minimum is not None}
    assert bounds == {name: pair for pair, names in BOUNDS.items() for name in names.split()}


ALIASES = "".join(f"a{level}: &a{level} [*a{level - 1}, *a{level - 1}]\n" for level in range(1, 60))
MERGES = "".join(f"b{level}: &b{level} {{<<: [*b{level - 1}, *b{level - 1}]}}\n" for level in range(1, 40))


@pytest.mark.parametrize(
    "content",
    [
        "TRAIN: &a {EPOCHS: *a}",
        "MODEL: &a {SWIN: {DEPTHS: [*a]}}",
        "&a [*a]",
        "MODEL: {SWIN: {DEPTHS: &a [*a]}}",
        "TRAIN: {EPOCHS: " + "[" * 1500 + "]" * 1500 + "}",
        "TRAIN: " + "{A: " * 3000 + "1" + "}" * 3000,
        f"a0: &a0 [1]\n{ALIASES}TRAIN: {{EPOCHS: *a59}}",
        f"b0: &b0 {{x: 1}}\n{MERGES}",
        "DATA: {MEAN: [1e400, 0, 0]}",
        "TRAIN: {BASE_LR: .inf}",
        "TRAIN: {BASE_LR: .nan}",
        "TRAIN: {CLIP_GRAD: -.inf}",
        "AUG: {CUTMIX_MINMAX: [.nan, 1]}",
        "TRAIN: {BASE_LR: 0x" + "f" * 400 + "}",
        "TRAIN: {EPOCHS: 0x" + "f" * 5000 + "}",
        "TAG: 0x" + "f" * 5000,
        "TRAIN: {EPOCHS: " + "9" * 5000 + "}",
        "TRAIN: {EPOCHS: true}",
        "SEED: 1.0e+0",
        "1: 2",
        "null: 2",
        "MODEL: {1.5: 2}",
        "? [a, b]\n: 1",
        "TAG: 2001-99-99",
        "TAG: !!binary =",
        "BASE: [[a]]",
        'BASE: "a\\0.yaml"',
        "BASE: " + "a" * 5000 + ".yaml",
        'TAG: "a\\nb"',
        'OUTPUT: "a\\0b"',
        "MODEL: {SWIN: {DEPTHS: [" + "1, " * 2000 + "1]}}",
        "MODEL: {LA: {ATTN_TYPE: " + "L" * 3000 + "1}}",
        "AUG: {AUTO_AUGMENT: " + "rand-m9-" * 90_000 + "}",
        "MODEL: {LA: {CSWIN_LA_SPLIT_SIZE: " + "1" * 3000 + "-1-1-1}, TYPE: FLatten_CSWin_64_24181_tiny_224}",
        "#" * 2_000_000,
        b"\xff\xfeT\x00A\x00G\x00",
        b"TAG: \xe9",
        b"TAG: a\x00b",
    ],
    ids=range(38),
)
def test_hostile_config_files_are_rejected_within_seconds_by_one_line_with_the_file(content, tmp_path):
    path, started = tmp_path / "config.yaml", time.process_time()
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    message = str(caught.value)
    assert len(message) < 1500
    assert "\n" not in message
    assert re.search(r"config\.yaml|[A-Z]+\.[A-Z]+|TAG|SEED", message)
    assert time.process_time() - started < 20


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("TRAIN.BASE_LR", "inf"),
        ("TRAIN.BASE_LR", "1e999"),
        ("TRAIN.BASE_LR", "nan"),
        ("TRAIN.CLIP_GRAD", "1e999"),
        ("TRAIN.EPOCHS", "9" * 5000),
        ("TRAIN.EPOCHS", "(" * 3000),
        ("TRAIN.EPOCHS", "[" * 4000 + "]" * 4000),
        ("TRAIN.EPOCHS", "True"),
        ("DATA.IMG_SIZE", "True"),
        ("DATA.IMG_SIZE", "[True, 32]"),
        ("DATA.MEAN", "[1e999, 0, 0]"),
        ("DATA.BATCH_SIZE", "0"),
        ("TRAIN.EPOCHS", "-1"),
        ("MODEL.NUM_CLASSES", "1"),
        ("MODEL.SWIN.DEPTHS", "[2, 1000000000]"),
        ("AUG.AUTO_AUGMENT", "rand\x1b[2J"),
        ("TAG", "a\nb"),
    ],
)
def test_hostile_values_on_the_command_line_are_rejected_with_the_key(key, value, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(key)) as caught:
        load_config(write(tmp_path), [key, value])
    assert len(str(caught.value)) < 1500
    assert "\n" not in str(caught.value)


def test_a_config_file_may_start_with_a_byte_order_mark(tmp_path):
    (tmp_path / "config.yaml").write_bytes("\ufeffTAG: été\n".encode())
    assert load_config(tmp_path / "config.yaml").TAG == "été"


def test_a_similar_config_is_proposed_by_its_shortest_path(monkeypatch, tmp_path):
    monkeypatch.chdir(CONFIGS.parent)
    with pytest.raises(ConfigError, match=r"did you mean configs/small\.yaml\?$"):
        load_config("smal")
    folder = tmp_path / "a/b/c/d/e/f/g/h/i/j"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=re.escape(f"did you mean {CONFIGS}/small.yaml")):
        load_config("smal")
