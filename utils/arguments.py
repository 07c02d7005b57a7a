"""The command line: every flag, the key that it sets, and what they come to."""

import argparse
from difflib import get_close_matches

from utils.config import ConfigError


def parse_arguments(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    for name, (_, options) in FLAGS.items():
        parser.add_argument(name, **options)
    args, unknown = parser.parse_known_args()
    if unknown:
        near = get_close_matches(unknown[0], FLAGS, n=1)
        parser.error(f"unknown argument {unknown[0]}" + (f": did you mean {near[0]}?" if near else "; see --help"))
    return args


# Flag -> (the config key that it sets, if any; how it is read). Flags override --opts.
FLAGS = {
    "--cfg": (None, {"required": True, "nargs": "+", "metavar": "FILE", "help": "YAML config, or several; see configs/"}),
    "--opts": (None, {"nargs": "+", "default": [], "metavar": "KEY VALUE", "help": "config keys to override"}),
    "--batch-size": ("DATA.BATCH_SIZE", {"type": int, "help": "images per process and forward pass"}),
    "--data-path": ("DATA.DATA_PATH", {"help": "folder that holds train/ and val/"}),
    "--zip": ("DATA.ZIP_MODE", {"action": "store_true", "help": "read <split>.zip and <split>_map.txt"}),
    "--cache-mode": ("DATA.CACHE_MODE", {"choices": ("no", "full", "part"), "help": "of --zip: bytes to keep in memory"}),
    "--resume": ("MODEL.RESUME", {"metavar": "FILE", "help": "checkpoint to go on from, or to evaluate"}),
    "--pretrained": ("MODEL.PRETRAINED", {"metavar": "FILE", "help": "checkpoint whose weights are the start"}),
    "--use-checkpoint": (
        "TRAIN.USE_CHECKPOINT",
        {"action": "store_true", "help": "gradient checkpointing, to save memory"},
    ),
    "--amp": ("AMP", {"action": "store_true", "help": "mixed precision, AMP_DTYPE bf16 or fp16"}),
    "--output": ("OUTPUT", {"metavar": "FOLDER", "help": "root of the output folders"}),
    "--tag": ("TAG", {"help": "names the run"}),
    "--eval": (None, {"action": "store_true", "help": "evaluate the checkpoint that --resume names"}),
    "--check": (None, {"action": "store_true", "help": "rehearse training in a minute: what would fail, what bounds it"}),
    "--throughput": (None, {"action": "store_true", "help": "measure images/s of the forward pass"}),
    "--find-unused-params": (
        None,
        {"action": "store_true", "help": "for DDP; no model here has any"},
    ),
    "--model-ema": ("EMA.ENABLED", {"action": "store_true", "help": "average the weights"}),
    "--no-model-ema": ("EMA.ENABLED", {"action": "store_true", "help": "do not average the weights"}),
    "--model-ema-force-cpu": ("EMA.FORCE_CPU", {"action": "store_true", "help": "keep the average in host memory"}),
    "--model-ema-decay": ("EMA.DECAY", {"type": float, "help": "per update"}),
}


def overrides(args: argparse.Namespace) -> list:
    """KEY, VALUE, ... of the command line, in the order in which they hold."""
    if args.model_ema and args.no_model_ema:
        raise ConfigError("--model-ema and --no-model-ema: give one of them")
    pairs = list(args.opts)
    for flag, (key, _) in FLAGS.items():
        value = getattr(args, flag.removeprefix("--").replace("-", "_"))
        if key is not None and value is not None and value is not False:
            pairs += [key, flag != "--no-model-ema" if value is True else value]
    return pairs
