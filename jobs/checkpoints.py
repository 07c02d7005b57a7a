"""Locate and open checkpoints, with their config and class names."""

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from yacs.config import CfgNode

from models.released import RELEASED, Released
from utils.checkpoint import BEST
from utils.config import ConfigError, flatten, load_config, load_stored_config
from weights.download import fetch, is_url
from weights.reader import CheckpointError, read_checkpoint, sha256

logger = logging.getLogger(__name__)

CONFIGS = Path(__file__).parent.parent / "configs"
# Keys to read from a foreign config (the reference's checkpoints): its training keys have other meanings, and its learning
# rates are already scaled.
MODEL_SECTIONS = ("MODEL.", "DATA.IMG_SIZE", "DATA.INTERPOLATION", "TEST.CROP")
# Keys that change the result of an evaluation.
EVALUATION_SECTIONS = (
    "MODEL.TYPE",
    "MODEL.NUM_CLASSES",
    "MODEL.SWIN.",
    "MODEL.DEIT.",
    "MODEL.LA.",
    "DATA.IMG_SIZE",
    "DATA.INTERPOLATION",
)
EVALUATION_SECTIONS += ("DATA.MEAN", "DATA.STD", "TEST.CROP", "TEST.INTERPOLATION")


@dataclass(frozen=True)
class Location:
    """A weight file on disk.

    Args:
        released: the released model, if it was given by name or URL.
        in_cache: whether it was downloaded to the cache.
    """

    path: Path
    released: Released | None = None
    in_cache: bool = False


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A weight file in memory. ``digest``: its SHA-256; ``class_names``: by class id, () if it has none."""

    location: Location
    state: dict
    digest: str
    class_names: tuple[str, ...]

    @property
    def path(self) -> Path:
        return self.location.path


def locate(reference: str | Path) -> Location:
    """Resolve a reference to a file; a URL or a released model is downloaded to the cache.

    Args:
        reference: a file, a run directory (its ``best.pth``), a URL, or the name of a released model. Paths take precedence.

    Raises:
        CheckpointError: there is no such file, or the download failed.
    """
    text, path = str(reference), Path(reference).expanduser()
    if is_url(text):
        released = next((file for file in RELEASED.values() if file.url == text), None)
        return Location(fetch(text, released.name if released else ""), released, in_cache=True)
    if os.path.isfile(path):
        return Location(path)
    if os.path.isdir(path):
        return Location(path / BEST)
    if text in RELEASED:
        return Location(fetch(RELEASED[text].url, text), RELEASED[text], in_cache=True)
    raise CheckpointError(f"{text}: no such file or released model; released models are {', '.join(RELEASED)}")


def open_checkpoint(reference: str | Path) -> Checkpoint:
    """Locate and read a checkpoint.

    Raises:
        CheckpointError: see ``locate`` and ``read_checkpoint``; or the file was replaced while it was read.
    """
    location = locate(reference)
    digest = sha256(location.path) if os.path.isfile(location.path) else ""
    state = read_checkpoint(location.path)
    if digest != sha256(location.path):
        raise CheckpointError(f"{location.path}: was replaced while it was read; try again, or use a copy")
    names = state.get("class_names")
    class_names = tuple(map(str, names)) if isinstance(names, (list, tuple)) else ()
    return Checkpoint(location, state, digest, class_names)


def stored_config(checkpoint: Checkpoint, opts: Sequence = ()) -> CfgNode | None:
    """The config stored in a checkpoint, or that of its released model; None if there is neither.

    Args:
        opts: key, value, ... that override it.
    """
    tree = checkpoint.state.get("config")
    if checkpoint.location.released is not None:
        return load_config(CONFIGS / f"{checkpoint.location.released.name}.yaml", opts)
    if not isinstance(tree, Mapping):
        return None
    ours = "num_updates" in checkpoint.state or "class_names" in checkpoint.state
    return load_stored_config(tree, opts, source=str(checkpoint.path), sections=() if ours else MODEL_SECTIONS)


def choose_config(checkpoint: Checkpoint, given: CfgNode | None, opts: Sequence = ()) -> CfgNode:
    """Return the given config and log its differences from the checkpoint's; if None is given, return the checkpoint's.

    Raises:
        ConfigError: there is neither.
    """
    if given is None:
        cfg = stored_config(checkpoint, opts)
        if cfg is None:
            raise ConfigError(f"{checkpoint.path}: has weights but no config; give its training config with --cfg")
        return cfg
    try:
        stored = stored_config(checkpoint)
    except ConfigError as error:  # the given config takes precedence
        logger.warning("%s: its config cannot be read (%s)", checkpoint.path, error)
        return given
    if stored is not None:
        log_differences(stored, given, checkpoint.path, sections=EVALUATION_SECTIONS, level=logging.WARNING)
    return given


def log_differences(before: Mapping, now: Mapping, path: Path | str, *, sections: Sequence[str] = (), level: int) -> None:
    """Log every key whose value differs from that of a checkpoint.

    Args:
        sections: prefixes of the keys to compare; empty compares all.
    """
    before, now = flatten(before), flatten(now)
    for key in sorted(before.keys() | now.keys()):
        if key.startswith(tuple(sections) or "") and before.get(key) != now.get(key):
            logger.log(level, "%s: %s was %r in the checkpoint, now it is %r", path, key, before.get(key), now.get(key))
