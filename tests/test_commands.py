"""Commands from the README of the reference implementation (the paper's code) select the expected job, model and config.

The commands are listed without their launcher, and with ``configs/`` instead of ``cfgs/``. The other tests in
this file cover training on toy data, fine-tuning recipes, and the precedence of flags, --opts and config files.
"""

import ast
import json
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

import main
import main_ema
from engine.schedule import global_batch_size
from engine.state import NO_BEST
from jobs.initialization import choose_initialization
from jobs.model import check_model
from models import build_model
from models.checkpoints.reader import read_checkpoint
from tests.conftest import CONFIGS
from tests.launch import run_main
from utils.config.arguments import FLAGS, check_usage, overrides, parse_arguments
from utils.config.loading import flatten, load_config, to_dict
from utils.distributed import World
from utils.run_files import list_checkpoints

ROOT = Path(__file__).parent.parent
EIGHT_PROCESSES = World(0, 0, 8, torch.device("cpu"))  # rank 0 of 8 processes

TRAIN = "main.py --cfg ./configs/{}.yaml --data-path IMAGENET --output OUT"
TRAIN_EMA = TRAIN.replace("main.py", "main_ema.py")
PLAIN = {"EMA.ENABLED": False, "AMP": False}  # config values of a command without flags for EMA and AMP
# (command without its launcher, model parameters in millions, job, expected config values). The job is "evaluate" or, for
# training, how the run is initialised: "scratch", "pretrained" or "resume".
COMMANDS = [
    *(
        (f"{TRAIN.format(name)} --find-unused-params", millions, "scratch", PLAIN)
        for name, millions in {
            "flatten_pvt_t": 12.2,
            "flatten_pvt_s": 21.7,
            "flatten_pvt_m": 37.2,
            "flatten_pvt_b": 50.6,
        }.items()
    ),
    *(
        (TRAIN.format(name), millions, "scratch", PLAIN)
        for name, millions in {
            "flatten_pvt_v2_b0": 3.6,
            "flatten_pvt_v2_b1": 12.9,
            "flatten_pvt_v2_b2": 22.6,
            "flatten_pvt_v2_b3": 38.3,
            "flatten_pvt_v2_b4": 51.8,
            "flatten_swin_t": 29,
            "flatten_swin_s": 51,
            "flatten_swin_b": 89,
        }.items()
    ),
    *(
        (
            f"{TRAIN_EMA.format(name)} --model-ema --model-ema-decay {decay}",
            millions,
            "scratch",
            {"EMA.ENABLED": True, "EMA.DECAY": decay, "EMA.FORCE_CPU": False},
        )
        for name, millions, decay in (
            ("flatten_cswin_t", 21, 0.99984),
            ("flatten_cswin_s", 35, 0.99984),
            ("flatten_cswin_b", 75, 0.99982),
        )
    ),
    (f"{TRAIN.format('flatten_swin_b_384')} --pretrained WEIGHTS", 91, "pretrained", {"DATA.IMG_SIZE": 384} | PLAIN),
    (
        f"{TRAIN_EMA.format('flatten_cswin_b_384')} --pretrained WEIGHTS --model-ema --model-ema-decay 0.99982",
        78,
        "pretrained",
        {"DATA.IMG_SIZE": 384, "EMA.ENABLED": True, "EMA.DECAY": 0.99982, "TEST.CROP": True},
    ),
    # main_ema.py enables EMA by default, with the decay of the config.
    (TRAIN_EMA.format("flatten_swin_t"), 29, "scratch", {"EMA.ENABLED": True, "EMA.DECAY": 0.9999}),
    (f"{TRAIN_EMA.format('flatten_cswin_t')} --no-model-ema", 21, "scratch", {"EMA.ENABLED": False}),
    (f"{TRAIN_EMA.format('flatten_cswin_t')} --opts EMA.ENABLED False", 21, "scratch", {"EMA.ENABLED": False}),
    # Older launchers pass the local rank as a flag.
    (f"{TRAIN.format('flatten_swin_t')} --local-rank 0", 29, "scratch", PLAIN),
    (f"{TRAIN.format('flatten_swin_t')} --local_rank=1", 29, "scratch", PLAIN),
    (f"{TRAIN.format('flatten_swin_t')} --eval --resume WEIGHTS", 29, "evaluate", {"TEST.CROP": True}),
    (f"{TRAIN.format('flatten_swin_t')} --resume WEIGHTS", 29, "resume", {}),
    (f"{TRAIN.format('flatten_swin_t')} --amp --use-checkpoint", 29, "scratch", {"AMP": True, "TRAIN.USE_CHECKPOINT": True}),
    (
        f"{TRAIN.format('flatten_swin_t')} --batch-size 64 --tag mine --zip --cache-mode full",
        29,
        "scratch",
        {"DATA.BATCH_SIZE": 64, "TAG": "mine", "DATA.ZIP_MODE": True, "DATA.CACHE_MODE": "full"},
    ),
    (
        f"{TRAIN_EMA.format('flatten_cswin_t')} --model-ema --model-ema-force-cpu",
        21,
        "scratch",
        {"EMA.ENABLED": True, "EMA.FORCE_CPU": True},
    ),
    (
        f"{TRAIN.format('flatten_swin_t')} --opts TRAIN.EPOCHS 400 MODEL.DROP_PATH_RATE 0.3",
        29,
        "scratch",
        {"TRAIN.EPOCHS": 400, "MODEL.DROP_PATH_RATE": 0.3},
    ),
]


@cache
def count_parameters(config: str) -> int:
    with torch.device("meta"):
        model = build_model(load_config(config))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("command", "millions", "job", "expected"), COMMANDS, ids=[command for command, *_ in COMMANDS])
def test_commands_of_the_reference_resolve_to_the_expected_job_model_and_config(
    command, millions, job, expected, tmp_path, monkeypatch
):
    state = {key: {} for key in ("model", "optimizer", "scaler")} | {"num_updates": 1, "best": NO_BEST, "updates_per_epoch": 1}
    config = to_dict(load_config(CONFIGS / "flatten_swin_t.yaml"))
    torch.save(state | {"config": config, "global_batch_size": 1024}, tmp_path / "WEIGHTS")
    (tmp_path / "IMAGENET").mkdir()
    script, *arguments = (
        command.replace("OUT", str(tmp_path / "out"))
        .replace("WEIGHTS", str(tmp_path / "WEIGHTS"))
        .replace("IMAGENET", str(tmp_path / "IMAGENET"))
        .split()
    )
    assert (ROOT / script).is_file()
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    args = parse_arguments("")
    cfg = load_config(args.cfg, overrides(args, ema=script == "main_ema.py"))
    check_usage(args, cfg)
    check_model(cfg)
    assert ("evaluate" if args.eval else choose_initialization(cfg, EIGHT_PROCESSES).kind) == job
    assert tmp_path / "IMAGENET" == Path(cfg.DATA.DATA_PATH)
    assert args.find_unused_params == ("--find-unused-params" in command)
    config = flatten(cfg)
    assert {key: config[key] for key in expected} == expected
    assert global_batch_size(cfg, EIGHT_PROCESSES.size) == cfg.TRAIN.RECIPE_BATCH_SIZE or "--batch-size" in command
    assert count_parameters(*args.cfg) / 1e6 == pytest.approx(millions, rel=0.02)


def test_the_commands_of_the_reference_run_in_sequence_on_toy_data(toy_config, toy_data, tmp_path):
    """Train with EMA, evaluate, resume, fine-tune at a higher resolution, evaluate again, and measure throughput."""
    common = ["--cfg", toy_config, "--data-path", toy_data, "--output", tmp_path]
    short = ["--opts", "TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0"]
    larger = ["DATA.IMG_SIZE", "56", "TRAIN.BASE_LR", "1e-3"]
    trained = tmp_path / "toy/first/best.pth"
    tuned = tmp_path / "toy/tuned/best.pth"
    for arguments, message in (
        (
            ["--model-ema", "--model-ema-decay", "0.9", "--find-unused-params", "--tag", "first", *short],
            "done; training in this process took",
        ),
        (["--eval", "--resume", trained, "--tag", "first", *short], " * Acc@1 "),
        (["--resume", trained, "--tag", "second", "--opts", "TRAIN.EPOCHS", "2"], "resumed after update 6"),
        (["--pretrained", trained, "--tag", "tuned", "--amp", "--use-checkpoint", *short, *larger], "start: pretrained"),
        (["--eval", "--resume", tuned, "--tag", "tuned", *short, *larger], " * Acc@1 "),
        (["--throughput", *short], "throughput"),
    ):
        outcome = run_main([*common, *arguments], tmp_path / "log", processes=1 if "--throughput" in arguments else 2)
        assert set(outcome.exit_codes) == {0}, outcome.output
        assert message in outcome.output
    assert set(json.loads((tmp_path / "toy/tuned/eval.json").read_text())["results"]) == {"raw", "ema"}
    assert read_checkpoint(list_checkpoints(tmp_path / "toy/second")[0])["num_updates"] == 12


def test_training_and_evaluation_support_non_square_images(toy_config, toy_data, trained, tmp_path):
    """Fine-tune from square to wide images and from wide to tall ones, evaluate both models, and measure throughput."""
    common = ["--data-path", toy_data, "--output", tmp_path]
    short = ["TRAIN.EPOCHS=1", "TRAIN.WARMUP_EPOCHS=0", "TRAIN.BASE_LR=1e-3"]
    wide, tall = tmp_path / "toy/wide/best.pth", tmp_path / "toy/tall/best.pth"
    for arguments, message in (
        (
            ["--cfg", toy_config, "--tag", "wide", "--pretrained", trained, "--opts", "DATA.IMG_SIZE=[32,64]", *short],
            "done; training in this process took",
        ),
        (["--eval", "--resume", wide], " * Acc@1 "),
        (
            ["--cfg", toy_config, "--tag", "tall", "--pretrained", wide, "--opts", "DATA.IMG_SIZE=[56,32]", *short],
            "done; training in this process took",
        ),
        (["--eval", "--resume", tall], " * Acc@1 "),
        (["--cfg", toy_config, "--throughput", "--opts", "DATA.IMG_SIZE=[32,48]", "DATA.BATCH_SIZE=2"], "toy at 32 x 48"),
    ):
        outcome = run_main([*common, *arguments] if "--throughput" not in arguments else arguments, tmp_path / "log")
        assert outcome.exit_codes == [0], outcome.output
        assert message in outcome.output
    assert json.loads((wide.parent / "eval.json").read_text())["preprocessing"]["img_size"] == [32, 64]
    state = read_checkpoint(tall)["model"]
    assert state["layers.0.blocks.0.attn.positional_encoding"].shape[1] == 14 * 8  # 56 x 32 pixels in patches of 4 x 4
    encoding = read_checkpoint(wide)["model"]["layers.0.blocks.0.attn.positional_encoding"]
    assert encoding.shape[1] == 8 * 16  # 32 x 64 pixels


def test_main_ema_calls_main_with_ema_enabled():
    tree = ast.parse((ROOT / "main_ema.py").read_text())
    (call,) = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    assert ast.unparse(call) == "main(ema=True)"
    assert main_ema.main is main.main


def test_both_fine_tuning_recipes_train_on_a_different_number_of_classes(trained, toy_config, toy_data, tmp_path):
    """Fine-tune a model of three classes on two with the configs of the model and the recipe; evaluate with both configs."""
    for split in ("train", "val"):
        for label in (0, 2):
            (tmp_path / "two" / split).mkdir(parents=True, exist_ok=True)
            (tmp_path / "two" / split / f"new_class{label}").symlink_to(toy_data / split / f"class{label}")
    short = ["TRAIN.EPOCHS", "1", "TRAIN.WARMUP_EPOCHS", "0"]
    best = read_checkpoint(trained)
    weights = best["state_dict_ema" if best["best"]["weights"] == "ema" else "model"]
    for name in ("finetune", "linear_probe"):
        common = ["--cfg", toy_config, CONFIGS / f"recipes/{name}.yaml", "--data-path", tmp_path / "two"]
        common += ["--output", tmp_path, "--batch-size", "8", "--opts", "MODEL.NUM_CLASSES", "2"]
        common += ["DATA.GLOBAL_BATCH_SIZE", "16", *short]
        outcome = run_main([*common, "--pretrained", trained], tmp_path / "log")
        assert outcome.exit_codes == [0], outcome.output
        assert "2 reinitialised" in outcome.output
        assert "head: 3 classes in the file, 2 in the model" in outcome.output
        tuned = read_checkpoint(tmp_path / f"toy/{name}/best.pth")["model"]
        changed = {entry for entry, value in tuned.items() if not torch.equal(value, weights[entry])}
        assert changed == ({"head.weight", "head.bias"} if name == "linear_probe" else {*tuned})
        outcome = run_main([*common, "--eval", "--resume", tmp_path / f"toy/{name}/best.pth"], tmp_path / "log")
        assert outcome.exit_codes == [0], outcome.output
        assert " * Acc@1 " in outcome.output


def test_a_linear_probe_without_pretrained_weights_is_rejected(toy_config, toy_data, tmp_path):
    arguments = ["--cfg", toy_config, "--data-path", toy_data, "--output", tmp_path]
    outcome = run_main([*arguments, "--opts", "TRAIN.FREEZE_BACKBONE", "True"], tmp_path / "log")
    assert outcome.exit_codes == [2]
    assert "give weights with --pretrained" in outcome.output


# Flag -> (arguments of the flag, resulting config value, a different value for --opts). A flag that is not listed by name is
# looked up by its argparse action, or by its type if it has no action.
FLAG_VALUES = {
    "--no-model-ema": ([], False, "True"),
    "--cache-mode": (["full"], "full", "no"),
    int: (["7"], 7, "3"),
    float: (["0.5"], 0.5, "0.25"),
    str: (["other"], "other", "before"),
    "store_true": ([], True, "False"),
}


@pytest.mark.parametrize("flag", [flag for flag, (key, _) in FLAGS.items() if key is not None])
def test_flags_override_opts_and_opts_override_the_config_file(flag, tmp_path, monkeypatch):
    key, options = FLAGS[flag]
    words, expected, other = FLAG_VALUES.get(flag) or FLAG_VALUES[options.get("action") or options.get("type", str)]
    section = {key.split(".")[-1]: expected}
    for name in reversed(key.split(".")[:-1]):
        section = {name: section}
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(section))  # JSON is valid YAML

    def resolve(*arguments):
        monkeypatch.setattr(sys, "argv", ["main.py", "--cfg", str(config), *arguments])
        args = parse_arguments("")
        return flatten(load_config(args.cfg, overrides(args)))[key]

    assert resolve() == expected
    assert str(resolve("--opts", key, other)) == other
    assert resolve("--opts", key, other, flag, *words) == expected
