"""Names of the files in the output directory of a run (docs/outputs.md). Without torch: checks of the command line use it."""

import os
import re
from pathlib import Path

from yacs.config import CfgNode

BEST = "best.pth"  # the checkpoint with the best accuracy
RECORD = "run.json"  # see engine.run_directory.RunRecord
LOCK = ".lock"
CONFIG = "config.yaml"
METRICS = "metrics.jsonl"
INCOMPLETE = ".incomplete"  # suffix of a file that is being written
DAMAGED = ".damaged"  # suffix of a former checkpoint that cannot be used
CHECKPOINT_PREFIXES = ("checkpoint_", "best", "top_")  # of all checkpoints, usable or not
# Patterns of the files that only a training run writes. Results of --eval and files of the user are not among them.
FILES_OF_A_RUN = (
    f"checkpoint_{'[0-9]' * 9}*.pth*",
    "best.pth*",
    "best_[0-9]*.pth",
    f"top_{'[0-9]' * 9}*.pth",
    "replay_[0-9]*.pth",
    CONFIG,
    METRICS,
    "log_rank*.txt",
    "events.out.tfevents.*",
    RECORD,
)
_NUMBERED = re.compile(r"checkpoint_(\d{9,})\.pth")


def build_output_path(cfg: CfgNode) -> Path:
    """Output directory of a run, ``<OUTPUT>/<MODEL.NAME>/<TAG>``."""
    return Path(cfg.OUTPUT) / cfg.MODEL.NAME / cfg.TAG


def checkpoint_path(folder: Path, num_updates: int) -> Path:
    """Path of the numbered checkpoint after ``num_updates`` updates."""
    return folder / f"checkpoint_{num_updates:09d}.pth"


def is_numbered(path: Path) -> bool:
    """Whether a file has the name of a numbered checkpoint."""
    return _NUMBERED.fullmatch(path.name) is not None


def top_path(folder: Path, num_updates: int) -> Path:
    """Path of one of the KEEP_BEST best checkpoints."""
    return folder / f"top_{num_updates:09d}.pth"


def is_top(path: Path) -> bool:
    """Whether a file, complete or not, has a name of ``top_path``."""
    return re.fullmatch(r"top_\d{9,}\.pth", path.name.removesuffix(INCOMPLETE)) is not None


def num_updates_of(path: Path) -> int:
    """Number of updates, from the name of a numbered checkpoint or of one of the best."""
    return int(path.stem.rpartition("_")[2])


def list_checkpoints(folder: Path) -> list[Path]:
    """Numbered checkpoints of a run, newest first."""
    try:
        numbered = [path for path in folder.glob("checkpoint_*.pth") if is_numbered(path)]
    except OSError:  # no permission: the first write to the directory reports it
        return []
    return sorted(numbered, key=num_updates_of, reverse=True)


def has_checkpoints(folder: Path) -> bool:
    """Whether a run directory has checkpoints from which a run may be able to resume."""
    return os.path.isfile(folder / BEST) or bool(list_checkpoints(folder))
