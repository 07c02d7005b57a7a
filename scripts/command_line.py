"""What the scripts share: the parser, common arguments, checks of output files, and errors as exit status 2.

This module does not import torch: its import takes seconds, and usage errors should be reported immediately.
"""

import argparse
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from utils.config.arguments import OneLineParser, check_weights, expand
from utils.config.loading import load_config
from utils.errors import USAGE_ERROR, ConfigError, TrainingError
from utils.files import can_write, replacing
from utils.text import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Arguments of several scripts.
ARGUMENTS: dict[str, dict[str, Any]] = {
    "checkpoints": {"nargs": "+", "help": "files, run directories, URLs, or released models"},
    "--resume": {"required": True, "metavar": "FILE", "help": "checkpoint: file, run directory, URL, or released model"},
    "--cfg": {"nargs": "+", "action": "extend", "metavar": "FILE", "help": "config (default: the checkpoint's own)"},
    "--opts": {
        "nargs": "+",
        "action": "extend",
        "default": [],
        "metavar": "KEY VALUE",
        "help": "config keys to override",
    },
    "--images": {
        "nargs": "+",
        "action": "extend",
        "type": Path,
        "required": True,
        "metavar": "PATH",
        "help": "image files or directories",
    },
    "--blocks": {
        "nargs": "+",
        "action": "extend",
        "metavar": "NAME",
        "help": "names or prefixes of attention modules (default: all)",
    },
    "--weights": {
        "choices": ("raw", "ema", "auto"),
        "default": "auto",
        "help": "auto: raw or ema, whichever was more accurate in training",
    },
    "--data-path": {"type": Path, "required": True, "help": "directory with train/ and val/"},
}


def create_parser(description: str | None, *names: str) -> argparse.ArgumentParser:
    """Create a parser with some of ``ARGUMENTS``."""
    parser = OneLineParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in names:
        parser.add_argument(name, **ARGUMENTS[name])
    return parser


def check_positive(args: argparse.Namespace, *names: str) -> None:
    """Check that integer arguments, or all numbers of a list, are at least 1. Arguments that are not given are not checked.

    Raises:
        ConfigError: an argument is smaller.
    """
    for name in names:
        value = getattr(args, name.replace("-", "_"), None)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and number < 1:
                raise ConfigError(f"--{name} {number}: must be at least 1")


def check_inputs(args: argparse.Namespace) -> None:
    """Check checkpoints, configs and images, as far as they are given, before torch is imported.

    Raises:
        ConfigError: a file does not exist, or a config is invalid.
    """
    if missing := [path for path in getattr(args, "images", None) or () if not path.exists()]:
        raise ConfigError(f"{missing[0]}: no such file or directory; correct the path")
    if getattr(args, "resume", None):
        check_weights("--resume=", args.resume)
    for checkpoint in getattr(args, "checkpoints", None) or ():
        check_weights("", checkpoint)
    if getattr(args, "cfg", None):
        load_config(args.cfg, args.opts)


def paths_of(args: argparse.Namespace, *, excluding: str) -> list[Path]:
    """Paths among the arguments, except that of one argument. Text is a path if it exists, such as a checkpoint."""
    values = [value for name, value in vars(args).items() if name not in (excluding, "opts")]
    texts = [text for value in values for text in (value if isinstance(value, list) else [value])]
    existing = [expand(text) for text in texts if isinstance(text, str) and os.path.exists(expand(text))]
    return [path for path in texts if isinstance(path, Path)] + existing


def check_outputs(args: argparse.Namespace, *names: str) -> None:
    """Check, before anything is computed, that files can be written. Arguments that are not given are not checked.

    Raises:
        ConfigError: a file cannot be written, is also another argument, or is a picture of an unknown format.
    """
    for name in names:
        path = getattr(args, name, None)
        if path is not None and path.resolve() in map(Path.resolve, paths_of(args, excluding=name)):
            raise ConfigError(f"--{name} {path}: is also another argument, whose file would be lost; choose another file")
        if path is not None and not can_write(path):
            raise ConfigError(f"--{name} {path}: cannot be written; choose a file in an existing directory")
        if path is not None and name == "png" and path.suffix != ".png":
            from matplotlib.figure import Figure

            if path.suffix[1:].lower() not in Figure().canvas.get_supported_filetypes():
                raise ConfigError(f"--png {path}: matplotlib cannot write this format; give a name that ends with .png")


@contextmanager
def reporting_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """End the script with one line instead of a traceback: with exit status 2 if its input is unusable or a run failed."""
    try:
        yield
    except KeyboardInterrupt:
        parser.exit(128 + signal.SIGINT, f"{parser.prog}: interrupted\n")
    except (ValueError, OSError, TrainingError) as error:  # ConfigError, DataError and CheckpointError are ValueErrors
        for handler in logging.getLogger().handlers:
            handler.flush()  # the message follows the log lines, and replaces a progress bar
        parser.exit(USAGE_ERROR, f"{parser.prog}: error: {printable(error)}\n")


def save_figure(figure: "Figure", path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary)
