"""Locate and open checkpoints, with their config and class names."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from yacs.config import CfgNode

from data.classes import imagenet_classes
from models.checkpoints.download import fetch
from models.checkpoints.reader import CheckpointError, read_checkpoint, sha256
from models.checkpoints.released import RELEASED, Released
from utils.config.keys import PREDICTION_KEY_PREFIXES, STORED_KEY_PREFIXES
from utils.config.loading import CONFIGS, flatten, load_config, load_stored_config, show
from utils.distributed import World, on_all, on_main
from utils.errors import ConfigError
from utils.run_files import BEST
from utils.urls import is_url, reveal, without_secrets

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Location:
    """A weight file on disk.

    Args:
        released: the released model whose name or URL was requested; None for other files.
        in_cache: whether the file is in the download cache.
    """

    path: Path
    released: Released | None = None
    in_cache: bool = False

    @property
    def name(self) -> str:
        """Name of the model in output paths. It comes from the location, never from the contents of the file.

        It is the name of the released model; for a checkpoint in the directory of a run, ``<OUTPUT>/<MODEL.NAME>/<TAG>``, its
        MODEL.NAME; else the name of the file, or of the directory of a ``best.pth``.
        """
        if self.released is not None:
            return self.released.name
        folder = self.path.resolve().parent
        if self.tag:
            return folder.parent.name or folder.name
        return folder.name if self.path.name == BEST else self.path.stem

    @property
    def tag(self) -> str:
        """Name of the directory of the run that the checkpoint is in, which is its TAG; "" for other files."""
        folder = self.path.resolve().parent
        return folder.name if not self.in_cache and (folder / "config.yaml").is_file() else ""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A weight file in memory.

    Args:
        state: contents of the file, see ``read_checkpoint``.
        digest: SHA-256 of the file.
        class_names: class names by class id: those of the file, ImageNet's WordNet ids for a released model, else ().
    """

    location: Location
    state: dict
    digest: str
    class_names: tuple[str, ...]

    @property
    def path(self) -> Path:
        return self.location.path


def locate(reference: str | Path) -> Location:
    """Resolve a path, URL or model name to a weight file. Weight files of URLs and released models are downloaded to the cache.

    Args:
        reference: a file, a run directory (for its ``best.pth``), a URL, or the name of a released model. An existing path
            takes precedence over a model name.

    Raises:
        CheckpointError: there is no such file or model, or the download failed.
    """
    text, path = str(reference), Path(os.path.expanduser(reference))
    if is_url(text):
        # A stored config has the URL without its query string.
        released = next((file for file in RELEASED.values() if without_secrets(file.url) == without_secrets(text)), None)
        path = fetch(released.url, released.name) if released else fetch(reveal(text))
        return Location(path, released, in_cache=True)
    if os.path.isfile(path):
        return Location(path)
    if os.path.isdir(path):
        return Location(path / BEST)
    if text in RELEASED:
        return Location(fetch(RELEASED[text].url, text), RELEASED[text], in_cache=True)
    raise CheckpointError(f"{text}: no such file or released model; released models are {', '.join(RELEASED)}")


def check_same_file(world: World, path: Path | str, digest: Callable[[], str]) -> None:
    """Check that every process reads the same weight file: on directories that the nodes do not share, the files may differ.

    The processes would otherwise start from different states, and wait for each other at different updates.

    Args:
        path: path of the file, for the message.
        digest: returns the SHA-256 of the file that this process reads; not called in a single process.

    Raises:
        CheckpointError: in the processes whose file differs from that of rank 0.
        OtherRankError: in the other processes.
    """
    if world.size == 1:
        return
    expected = on_main(world, digest)

    def check() -> None:
        if digest() != expected:
            raise CheckpointError(f"{path} differs between processes; use a copy on a file system that all nodes share")

    on_all(world, check)


def open_checkpoint(reference: str | Path) -> Checkpoint:
    """Locate and read a checkpoint.

    Raises:
        CheckpointError: the file cannot be located (see ``locate``) or read (see ``read_checkpoint``), or it was replaced while
            it was being read.
    """
    location = locate(reference)
    digest = sha256(location.path) if os.path.isfile(location.path) else ""
    try:
        state = read_checkpoint(location.path)
    except CheckpointError as error:
        if location.in_cache:
            raise CheckpointError(f"{error}. Delete {location.path} to download it again") from None
        raise
    if digest != sha256(location.path):
        raise CheckpointError(f"{location.path} was replaced while it was being read; try again, or use a copy")
    return Checkpoint(location, state, digest, stored_class_names(state, location.released))


def stored_class_names(state: Mapping, released: Released | None) -> tuple[str, ...]:
    """Class names of a checkpoint, by class id; () if they are unknown.

    Args:
        released: the released model of which these are the weights, if any; released models were trained on ImageNet-1K.
    """
    names = state.get("class_names")
    if isinstance(names, (list, tuple)) and names:
        return tuple(map(str, names))
    return tuple(imagenet_classes(1000)) if released is not None else ()


def stored_config(
    checkpoint: Checkpoint, opts: Sequence = (), *, prefixes: Sequence[str] = STORED_KEY_PREFIXES
) -> CfgNode | None:
    """The config of a checkpoint: the file in ``configs/`` for a released model, else the stored config; None if there is none.

    Args:
        opts: KEY, VALUE, ... that override the config.
        prefixes: prefixes of the keys to read from the stored config; other keys have their default values. Checkpoints of
            other projects are read with ``STORED_KEY_PREFIXES``.
    """
    tree = checkpoint.state.get("config")
    if checkpoint.location.released is not None:
        return load_config(CONFIGS / f"{checkpoint.location.released.name}.yaml", opts)
    if not isinstance(tree, Mapping):
        return None
    from_this_project = "num_updates" in checkpoint.state or "class_names" in checkpoint.state
    sections = prefixes if from_this_project else STORED_KEY_PREFIXES
    return load_stored_config(tree, opts, source=str(checkpoint.path), sections=sections)


def choose_config(
    checkpoint: Checkpoint,
    requested: CfgNode | None,
    opts: Sequence = (),
    *,
    prefixes: Sequence[str] = STORED_KEY_PREFIXES,
) -> CfgNode:
    """Return ``requested``, or the checkpoint's config if ``requested`` is None.

    With a requested config, log where it differs from the checkpoint's config in keys that change the result of an evaluation.

    Args:
        requested: the config of --cfg; None for the checkpoint's own config.
        opts: KEY, VALUE, ... that override the checkpoint's config; they are already applied to ``requested``.
        prefixes: see ``stored_config``.

    Raises:
        ConfigError: no config is requested, and the checkpoint has none.
    """
    if requested is None:
        cfg = stored_config(checkpoint, opts, prefixes=prefixes)
        if cfg is None:
            raise ConfigError(f"{checkpoint.path} has weights but no config; give its training config with --cfg")
        return cfg
    try:
        stored = stored_config(checkpoint)
    except ConfigError as error:  # the stored config is only compared with the requested one
        logger.warning("%s: its config cannot be read (%s)", checkpoint.path, error)
        return requested
    if stored is not None:
        written = flatten(stored if checkpoint.location.released else checkpoint.state["config"])
        current = flatten(requested)
        # A key that the file lacks has its default in ``stored``: where this differs, the key is reported as not stored.
        known = {key: value for key, value in flatten(stored).items() if key in written or value == current[key]}
        log_differences(known, current, checkpoint.path, prefixes=PREDICTION_KEY_PREFIXES)
    return requested


def log_differences(stored: Mapping, current: Mapping, path: Path | str, *, prefixes: Sequence[str] = ("",)) -> None:
    """Log every key of the config ``current`` that the config of a checkpoint lacks, or whose value differs there.

    Args:
        path: path of the checkpoint, for the message.
        prefixes: prefixes of the keys to compare.
    """
    stored, current = flatten(stored), flatten(current)
    for key in sorted(key for key in current if key.startswith(tuple(prefixes))):
        if key not in stored:
            logger.info("%s: %s is not stored in the checkpoint, and is %s now", path, key, show(current[key]))
        elif stored[key] != current[key]:
            logger.info("%s: %s was %s in the checkpoint, but is %s now", path, key, show(stored[key]), show(current[key]))
