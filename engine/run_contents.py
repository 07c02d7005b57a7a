"""What the output directory of a run contains: its checkpoints, the run to which they belong, and the remains of a run."""

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from engine.checkpoint_writer import check_format
from engine.metrics_writer import read_records
from engine.run_directory import RunRecord, read_record
from engine.state import NO_BEST
from models.checkpoints.reader import CheckpointError, read_checkpoint, verify
from utils.config.keys import BEST_METRICS
from utils.errors import ConfigError
from utils.run_files import (
    BEST,
    CHECKPOINT_PREFIXES,
    FILES_OF_A_RUN,
    INCOMPLETE,
    METRICS,
    RECORD,
    is_numbered,
    list_checkpoints,
    num_updates_of,
)

logger = logging.getLogger(__name__)


class NotResumableError(CheckpointError):
    """A readable file that is not the complete state of a run."""


class Candidate(NamedTuple):
    """A checkpoint with the complete state of a run.

    Attributes:
        run_id: id of the run; "" if the checkpoint was written by a version without ids.
    """

    path: Path
    num_updates: int
    run_id: str


@dataclass(frozen=True)
class Contents:
    """What a run directory contains.

    Args:
        usable: numbered checkpoints and ``best.pth`` that can be resumed from, newest first.
        unusable: numbered checkpoints and ``best.pth`` that cannot be resumed from, with the reason.
        record: contents of ``run.json``; None if there is none.
        remains: names of files of a run whose checkpoints are missing; () if a run may start as if the directory were empty.
        stamps: names, sizes and times of the files that the decision depends on.
    """

    output: Path
    usable: tuple[Candidate, ...] = ()
    unusable: Mapping[Path, str] = field(default_factory=dict)
    record: RunRecord | None = None
    remains: tuple[str, ...] = ()
    stamps: tuple = ()

    @property
    def run_id(self) -> str:
        """Id of the run that wrote the checkpoints of the directory; "" if unknown."""
        if self.record is not None and self.record.has_saved:
            return self.record.run_id
        return next((candidate.run_id for candidate in self.usable if candidate.run_id), "")

    def name_files(self) -> str:
        """Names of the first files of the run, for error messages."""
        names = [candidate.path.name for candidate in self.usable] or list(self.remains)
        return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def survey(output: Path) -> Contents:
    """Read the contents of a run directory, which may not exist. Nothing is written.

    Only the newest usable checkpoint is read completely: a run resumes from no other one, and checkpoints are large.

    Raises:
        ConfigError: the directory or a checkpoint cannot be opened, or a later version of this project wrote a file.
    """
    stamps = list_stamps(output)
    if not os.path.isdir(output):
        return Contents(output)
    usable: list[Candidate] = []
    unusable = {}
    best = [output / BEST] if os.path.lexists(output / BEST) else []
    for path in [*list_checkpoints(output), *best]:  # damaged files and directories with such names included
        try:
            usable.append(read_candidate(path))
        except NotResumableError as error:
            unusable[path] = str(error).removeprefix(f"{path} ").partition("; ")[0]
        except CheckpointError as error:
            logger.warning("%s; it is not used", error)
            unusable[path] = "damaged"
    usable.sort(key=lambda one: (one.num_updates, one.path.name != BEST), reverse=True)
    while usable:
        try:
            verify(usable[0].path)
            break
        except CheckpointError as error:
            logger.warning("%s; it is not used", error)
            unusable[usable.pop(0).path] = "damaged"
    record = read_record(output)
    remains = () if usable else find_remains(output, record)
    return Contents(output, tuple(usable), unusable, record, remains, stamps)


def read_candidate(path: Path) -> Candidate:
    """Read which run and update a checkpoint belongs to. The values of its tensors are neither read nor verified.

    Raises:
        ConfigError: the file cannot be opened, or was written by a later version of this project.
        CheckpointError: the file is damaged.
        NotResumableError: the file is not the complete state of a run.
    """
    if os.path.isfile(path):
        try:
            with open(path, "rb"):
                pass
        except OSError as error:  # not damaged: it must neither be renamed nor ignored
            raise ConfigError(
                f"{path} cannot be opened ({error.strerror}); make it readable, or choose another --tag"
            ) from None
    state = read_checkpoint(path, with_data=False)
    check_training_state(state, path)
    if is_numbered(path) and state["num_updates"] != num_updates_of(path):
        raise NotResumableError(f"{path} is the state after update {state['num_updates']}, unlike its name")
    return Candidate(path, state["num_updates"], state.get("run_id", ""))


def check_training_state(state: Mapping, path: Path | str) -> None:
    """Reject a file that does not contain the complete state of a run.

    Raises:
        ConfigError: a later version of the project wrote the file.
        NotResumableError: the message lists the missing or invalid entries.
    """
    check_format(state, path)
    if unusable := find_unusable_entries(state):
        raise NotResumableError(
            f"{path} is not a training checkpoint that can be resumed (missing or invalid: {', '.join(unusable)}); load only "
            "its weights with --pretrained"
        )


def find_unusable_entries(saved: Mapping) -> list[str]:
    """Names of the checkpoint entries that are missing or have an unexpected type or value."""
    missing = [name for name in _REQUIRED if name not in saved]
    checks = {**_REQUIRED, **_OPTIONAL}
    return sorted([*missing, *(name for name, is_valid in checks.items() if name in saved and not is_valid(saved[name]))])


def _is_dict(value: object) -> bool:
    return isinstance(value, dict)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 0


def _is_best(value: object) -> bool:
    if not isinstance(value, dict):
        return False
    valid = [isinstance(value.get(name), (int, type(default))) for name, default in NO_BEST.items()]
    if "metric" in value:  # BEST_METRIC is not the top-1 accuracy
        valid += [value["metric"] in list(BEST_METRICS), isinstance(value.get("value"), (int, float))]
    return all(valid)


def _is_data(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(value.get(split), dict) for split in ("train", "val"))


def _are_evaluations(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(one, dict) and isinstance(one.get("step"), int) and isinstance(one.get("kind"), str) for one in value
    )


# Entry of a checkpoint -> whether a value of it can be resumed from.
_REQUIRED: dict[str, Callable[[object], bool]] = {
    **dict.fromkeys(("model", "optimizer", "scaler", "config"), _is_dict),
    **dict.fromkeys(("num_updates", "global_batch_size"), _is_count),
    "updates_per_epoch": lambda value: _is_count(value) and value != 0,
    "best": _is_best,
}
_OPTIONAL: dict[str, Callable[[object], bool]] = {  # added by later versions
    **dict.fromkeys(("num_skipped", "ema_updates", "last_evaluation", "best_since"), _is_count),
    "data": _is_data,
    "evaluations": _are_evaluations,
    **dict.fromkeys(("run_id", "teacher_digest"), lambda value: isinstance(value, str)),
}


def find_remains(output: Path, record: RunRecord | None) -> tuple[str, ...]:
    """Names of the files of a run in a directory without usable checkpoints.

    A run that was killed before its first checkpoint has nothing to lose and starts again: the result is () in this case.
    """
    names = sorted({path.name for pattern in FILES_OF_A_RUN for path in output.glob(pattern)})
    names = [name for name in names if not name.endswith(INCOMPLETE)]
    had_checkpoints = any(name.startswith(CHECKPOINT_PREFIXES) for name in names)
    # Earlier versions wrote no record. They opened the log first, and saved a checkpoint after the first evaluation.
    has_saved = record.has_saved if record else "log_rank0.txt" not in names or has_finished_epoch(output / METRICS)
    return tuple(names) if had_checkpoints or has_saved else ()


def has_finished_epoch(metrics: Path) -> bool:
    """Whether ``metrics.jsonl`` has records of an evaluation, or of an epoch after the first one."""
    try:
        records = read_records(metrics)
    except OSError:
        return False
    return any(record["kind"].startswith("eval") or record.get("epoch") not in (None, 0) for record in records)


def list_stamps(output: Path) -> tuple:
    """Name, size and time of every checkpoint and of ``run.json``, to detect changes between the decision and the start.

    Raises:
        ConfigError: the directory cannot be listed.
    """
    stamps = []
    try:
        for entry in os.scandir(output):
            if entry.name.startswith(CHECKPOINT_PREFIXES) or entry.name == RECORD:
                status = entry.stat(follow_symlinks=False)
                stamps.append((entry.name, status.st_size, status.st_mtime_ns))
    except (FileNotFoundError, NotADirectoryError):  # no directory; or a file was just deleted, which also counts as a change
        return ()
    except OSError as error:
        raise ConfigError(f"{output} cannot be listed ({error.strerror}); choose another --output") from None
    return tuple(sorted(stamps))


def check_unchanged(contents: Contents) -> None:
    """Reject a start if another run has written to the directory since the decision.

    Raises:
        ConfigError: checkpoints were added, removed or replaced.
    """
    if list_stamps(contents.output) != contents.stamps:
        raise ConfigError(
            f"{contents.output}: checkpoints changed while this run was starting, probably because of another run; if no other "
            "run is active, repeat the command"
        )
