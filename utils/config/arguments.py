"""Command-line flags and the config keys that they set.

This module does not import torch or timm: their import takes seconds, and usage errors should be reported immediately.
"""

import argparse
import contextlib
import os
from collections.abc import Collection
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from yacs.config import CfgNode

from utils.config.keys import CLASS_MAPS, KEYS
from utils.config.loading import CONFIGS, option_keys, similar_name
from utils.config.training_keys import TIMM_PREFIX
from utils.errors import USAGE_ERROR, ConfigError
from utils.run_files import BEST, build_output_path, has_checkpoints
from utils.text import printable
from utils.urls import is_url


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line with the remedy, instead of the usage of all arguments.

    The ~ of arguments of type ``Path`` is expanded.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.register("type", Path, expand)

    def error(self, message: str) -> NoReturn:
        self.report(f"{message}; see --help")

    def report(self, message: str) -> NoReturn:
        self.exit(USAGE_ERROR, f"{self.prog}: error: {printable(message)}\n")

    def parse_args(self, *args: Any) -> Any:  # type: ignore[override]  # argparse's has overloads
        """Parse the command line; exit with a suggestion on an unknown argument."""
        found, unknown = self.parse_known_args(*args)
        if unknown:
            self.report(f"unknown argument {unknown[0]}{self._hint(*unknown[:2])}")
        return found

    def _hint(self, unknown: str, value: str = "") -> str:
        """End of the error message for an unknown argument: the config key with this name, else a similar argument.

        Args:
            value: the argument after it, if any.
        """
        flag, _, assigned = unknown.partition("=")
        flags = self._option_string_actions
        key = similar_name(flag.lstrip("-").replace("-", "_")) if flag.startswith("-") and "--opts" in flags else None
        if key:
            return f": set it with --opts {key} {assigned or ('' if value.startswith('--') else value) or 'VALUE'}"
        near = [known for known in flags if len(flag) > 3 and known.startswith(flag)] or get_close_matches(flag, flags, n=1)
        return f": did you mean {near[0]}?" if near else "; see --help"


def parse_arguments(description: str, flags: Collection[str] | None = None) -> argparse.Namespace:
    """Parse the command line; exit with a suggestion on an unknown flag.

    Args:
        flags: names of the flags to accept, from ``FLAGS``; None accepts all.
    """
    parser = OneLineParser(description=description, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    for name, (_, options) in FLAGS.items():
        if flags is None or name in flags:
            parser.add_argument(name, **options)
    return parser.parse_args()


def expand(text: str | Path) -> Path:
    """A path whose ~ is expanded, as a shell does not for ``--flag=~/path``. The ~ of an unknown user remains."""
    return Path(os.path.expanduser(text))


# Flag -> (config key that it sets, or None; arguments of ``add_argument``). Flags override --opts.
FLAGS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "--cfg": (
        None,
        {
            "nargs": "+",
            "action": "extend",  # a repeated flag adds values
            "metavar": "FILE",
            "help": "one or more YAML configs, see configs/; optional with --eval, not used with --replay",
        },
    ),
    "--opts": (
        None,
        {
            "nargs": "+",
            "action": "extend",
            "default": [],
            "metavar": "KEY VALUE",
            "help": "override config keys: KEY VALUE or KEY=VALUE",
        },
    ),
    "--batch-size": ("DATA.BATCH_SIZE", {"type": int, "help": "images per process and forward pass"}),
    "--data-path": ("DATA.DATA_PATH", {"help": "directory with train/ and val/"}),
    "--zip": ("DATA.ZIP_MODE", {"action": "store_true", "help": "read <split>.zip and <split>_map.txt"}),
    "--cache-mode": (
        "DATA.CACHE_MODE",
        {
            "choices": ("no", "full", "part"),
            "help": "with --zip: images that each process keeps in memory: none (no), all (full) or an equal share (part)",
        },
    ),
    "--resume": (
        "MODEL.RESUME",
        {"metavar": "FILE", "help": "checkpoint to resume or evaluate: file, run directory, URL or released model"},
    ),
    "--pretrained": ("MODEL.PRETRAINED", {"metavar": "FILE", "help": "initial weights, in any form that --resume accepts"}),
    "--use-checkpoint": (
        "TRAIN.USE_CHECKPOINT",
        {"action": "store_true", "help": "activation checkpointing, to save memory"},
    ),
    "--amp": ("AMP", {"action": "store_true", "help": "mixed precision; AMP_DTYPE selects bf16 or fp16"}),
    "--output": ("OUTPUT", {"metavar": "DIR", "help": "output directory; a run is written to DIR/<MODEL.NAME>/<TAG>"}),
    "--tag": ("TAG", {"help": "name of the run"}),
    "--eval": (None, {"action": "store_true", "help": "evaluate the checkpoint given by --resume"}),
    "--check": (
        None,
        {"action": "store_true", "help": "run each part of training once; report errors, the largest batch and the bottleneck"},
    ),
    "--profile": (
        None,
        {
            "type": Path,
            "metavar": "DIR",
            "help": "with --check: write a trace of some updates, and list the slowest operations",
        },
    ),
    "--replay": (
        None,
        {
            "type": os.path.expanduser,
            "metavar": "FILE",
            "help": "repeat an update whose loss or gradient was not finite, from replay_*.pth",
        },
    ),
    "--throughput": (None, {"action": "store_true", "help": "measure images/s of the forward pass"}),
    "--find-unused-params": (
        None,
        {"action": "store_true", "help": "set find_unused_parameters in DDP; no model of this project needs it"},
    ),
    "--local-rank": (None, {"type": int, "help": argparse.SUPPRESS}),  # ignored; set by older launchers
    "--local_rank": (None, {"type": int, "help": argparse.SUPPRESS}),
    "--model-ema": ("EMA.ENABLED", {"action": "store_true", "help": "maintain an EMA of the weights"}),
    "--no-model-ema": ("EMA.ENABLED", {"action": "store_true", "help": "disable the EMA"}),
    "--model-ema-force-cpu": ("EMA.FORCE_CPU", {"action": "store_true", "help": "keep the EMA in host memory"}),
    "--model-ema-decay": ("EMA.DECAY", {"type": float, "help": "EMA decay per update"}),
}


def overrides(args: argparse.Namespace, *, ema: bool = False) -> list:
    """Config overrides from the command line, as a list KEY, VALUE, ...; later pairs override earlier ones.

    Args:
        ema: enable the EMA unless the command line disables it.
    """
    values = {flag: getattr(args, flag.removeprefix("--").replace("-", "_"), None) for flag in FLAGS}
    if values["--model-ema"] and values["--no-model-ema"]:
        raise ConfigError("--model-ema and --no-model-ema: give only one of them")
    option_keys(args.opts)  # raises an error for a key without a value, before other pairs follow it
    pairs = [*(["EMA.ENABLED", True] if ema else []), *args.opts]
    if values["--eval"] and values["--resume"] and not values["--pretrained"]:
        pairs += ["MODEL.PRETRAINED", ""]  # --cfg may set it, which would conflict with --resume
    for flag, (key, _) in FLAGS.items():
        value = values[flag]
        if key is not None and value is not None and value is not False:
            pairs += [key, flag != "--no-model-ema" if value is True else value]
    return pairs


def check_usage(args: argparse.Namespace, cfg: CfgNode | None) -> None:
    """Reject conflicting flags and missing files.

    Args:
        cfg: None if --cfg is not given: with --replay, or with --eval to use the config stored in the checkpoint.

    Raises:
        ConfigError: a conflict or a missing file; the message includes the flag or key, and the remedy.
    """
    jobs = [f"--{job}" for job in ("throughput", "eval", "check", "replay") if getattr(args, job)]
    if len(jobs) > 1:
        raise ConfigError(f"{' and '.join(jobs)}: give only one of them")
    if args.profile and not args.check:
        raise ConfigError(f"--profile {args.profile}: applies only to a dry run; add --check, or remove --profile")
    if args.replay:
        if cfg is not None:
            raise ConfigError("--replay: uses the config stored in the replay file; leave out --cfg")
        if not Path(args.replay).is_file():
            raise ConfigError(f"--replay {args.replay}: no such file")
        _check_data_option(args)
        return
    if cfg is None:
        if not args.eval:
            if checkpoint := args.resume or args.pretrained:
                check_weights("--resume=" if args.resume else "--pretrained=", checkpoint)
            evaluate = "; to evaluate the checkpoint, add --eval" if args.resume else ""
            raise ConfigError(f"--cfg is missing: give a config, such as configs/flatten_swin_t.yaml{evaluate}")
        if args.resume and args.pretrained:
            raise ConfigError("--resume and --pretrained: give only one of them")
        if not (args.resume or args.pretrained):
            raise ConfigError("--eval: no weights to evaluate; give a checkpoint with --resume")
        check_weights("--pretrained=" if args.pretrained else "--resume=", args.resume or args.pretrained)
        _check_data_option(args)
        return
    if args.cache_mode and not cfg.DATA.ZIP_MODE:
        raise ConfigError(f"--cache-mode {args.cache_mode}: applies only to zip archives; add --zip, or remove --cache-mode")
    _check_evaluation_keys(args, cfg)
    if args.eval and not (cfg.MODEL.RESUME or cfg.MODEL.PRETRAINED):
        raise ConfigError("--eval: no weights to evaluate; give a checkpoint with --resume")
    # A run that resumes from its output directory reads neither the file of MODEL.PRETRAINED nor, if the command is repeated,
    # that of MODEL.RESUME. These files may be missing; ``jobs.initialization`` finds out whether they are needed.
    resumes = cfg.TRAIN.AUTO_RESUME and has_checkpoints(build_output_path(cfg))
    for key in ("RESUME", "PRETRAINED"):
        if cfg.MODEL[key] and not (resumes and not args.eval):
            check_weights(f"--{key.lower()}=" if getattr(args, key.lower()) else f"MODEL.{key}=", cfg.MODEL[key])
    if not args.eval and not args.throughput:
        check_teacher(cfg.TRAIN.TEACHER, build_output_path(cfg), exists=not resumes)  # a finished run needs none
    if not args.throughput:
        check_data_path(cfg)
        _check_folder("DATA.DATA_PATH", cfg.DATA.DATA_PATH)


def _check_evaluation_keys(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Reject keys of the evaluation that have no effect, and missing files."""
    for key in ("CLASS_MAP", "REAL_LABELS", "PREDICTIONS", "MISTAKES", "TTA"):
        default = KEYS[f"TEST.{key}"].default
        if cfg.TEST[key] != default and not args.eval and not (key == "CLASS_MAP" and cfg.MODEL.PRETRAINED):
            raise ConfigError(f"TEST.{key}={cfg.TEST[key]} has an effect only with --eval; add --eval, or remove the key")
    if not cfg.TEST.RESTRICT_CLASSES and not cfg.TEST.CLASS_MAP:
        raise ConfigError(
            "TEST.RESTRICT_CLASSES=False has an effect only with TEST.CLASS_MAP; remove it, or set TEST.CLASS_MAP"
        )
    for key in ("REAL_LABELS", "CLASS_MAP"):
        path = cfg.TEST[key]
        if path and not (key == "CLASS_MAP" and path in CLASS_MAPS) and not Path(path).is_file():
            raise ConfigError(f"TEST.{key}={path}: no such file")


def _check_data_option(args: argparse.Namespace) -> None:
    """Without --cfg, check that the command line gives the data: a weight file does not determine any path."""
    if args.data_path:
        _check_folder("--data-path", args.data_path)
    elif "DATA.DATA_PATH" not in option_keys(args.opts):
        raise ConfigError(f"{'--replay' if args.replay else '--eval'}: --data-path is missing; give the directory of the data")


def check_data_path(cfg: CfgNode) -> None:
    """Check that DATA.DATA_PATH is set.

    Raises:
        ConfigError: it is empty.
    """
    if not cfg.DATA.DATA_PATH:
        raise ConfigError("DATA.DATA_PATH is empty: set --data-path to the directory with train/ and val/")


def _check_folder(name: str, path: str) -> None:
    folder = expand(path)
    if os.path.isdir(folder):
        return
    with contextlib.suppress(OSError):  # the parent may not exist or not be readable
        names = [entry.name for entry in os.scandir(folder.parent) if entry.is_dir()]
        if near := get_close_matches(folder.name, names, n=1):
            raise ConfigError(f"{name}={path}: no such directory; did you mean {folder.parent / near[0]}?")
    problem = "a file, not a directory" if os.path.isfile(folder) else "no such directory"
    raise ConfigError(
        f"{name}={path}: {problem}; give the directory with train/ and val/, or the one with the class directories, with "
        "--opts DATA.VAL_FRACTION 0.1"
    )


def check_teacher(teacher: str, output: Path, *, exists: bool) -> None:
    """Reject a TRAIN.TEACHER that is neither a checkpoint nor a model of timm, nor empty.

    Args:
        output: output directory of the run. Its files change during training, and the run could then not resume.
        exists: whether the checkpoint must exist; a finished run does not read it.

    Raises:
        ConfigError: there is no such checkpoint, or it is in ``output``.
    """
    if not teacher or teacher.startswith(TIMM_PREFIX) or is_url(teacher):
        return
    if Path(os.path.realpath(output)) in (path := Path(os.path.realpath(teacher)), *path.parents):
        raise ConfigError(
            f"TRAIN.TEACHER={teacher} is in the output directory of this run, whose checkpoints change during training; copy "
            "the checkpoint to another directory and give that path, or choose another --tag"
        )
    try:
        if exists:
            check_weights("TRAIN.TEACHER=", teacher)
    except ConfigError as error:
        raise ConfigError(f"{error}; a model of timm is given as {TIMM_PREFIX}NAME") from None


def check_weights(name: str, checkpoint: str) -> None:
    """Reject a checkpoint that is not a URL, a file, a directory with ``best.pth``, or a model name.

    Args:
        name: flag or key that gives the checkpoint, with ``=``, for messages; "" for a positional argument.

    Raises:
        ConfigError: there is no such checkpoint.
    """
    path = expand(checkpoint)
    if is_url(checkpoint) or os.path.isfile(path):
        return
    if os.path.isdir(path):
        if not (path / BEST).is_file():
            raise ConfigError(f"{name}{checkpoint} is a directory without {BEST}; give a checkpoint file")
        return
    models = [file.stem for file in CONFIGS.glob("*.yaml")]
    if checkpoint not in models:
        near = get_close_matches(checkpoint, models, n=1) if not path.suffix else []
        hint = f"; did you mean the model {near[0]}?" if near else "; correct the path"
        raise ConfigError(f"{name}{checkpoint}: no such file, run directory or model{hint}")
