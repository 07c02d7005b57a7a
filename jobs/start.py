"""Decide how a run starts, given its command and the contents of its output directory."""

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from engine.checkpoint_writer import BEST, check_format, is_numbered, list_checkpoints, num_updates_of
from engine.metrics_writer import read_records
from engine.run_directory import RECORD, RunRecord, read_record
from engine.trainer import NO_BEST
from models.checkpoints.reader import CheckpointError, read_checkpoint, verify
from utils.config.loading import ConfigError
from utils.urls import is_url, without_secrets

logger = logging.getLogger(__name__)

# Names of the files that only a training run writes. Results of --eval and files of the user are not among them.
FILES_OF_A_RUN = (
    f"checkpoint_{'[0-9]' * 9}*.pth*",
    "best.pth*",
    "best_[0-9]*.pth",
    "replay_[0-9]*.pth",
    "config.yaml",
    "metrics.jsonl",
    "log_rank*.txt",
    "events.out.tfevents.*",
    RECORD,
)
# Entries that a checkpoint must have to be resumed, and their types.
STATE_TYPES = {
    "model": dict,
    "optimizer": dict,
    "scaler": dict,
    "num_updates": int,
    "best": dict,
    "config": dict,
    "updates_per_epoch": int,
    "global_batch_size": int,
}


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


def choose_start(contents: Contents, *, requested: Candidate | None, auto_resume: bool) -> Candidate | None:
    """The checkpoint from which a run resumes; None if it starts with random or pretrained weights.

    | the directory contains | same command | --resume FILE of the directory | --resume FILE elsewhere | AUTO_RESUME False |
    |---|---|---|---|---|
    | no file of a run | new run | | resume FILE here | new run |
    | files of a run that was killed before its first checkpoint | new run | resume FILE | resume FILE here | new run |
    | numbered checkpoints, best.pth | resume the newest | resume FILE if it is the newest | refuse | refuse |
    | only best.pth | resume best.pth | resume FILE | refuse | refuse |
    | no usable checkpoint, but damaged ones, metrics or others | refuse | resume FILE | refuse | refuse |
    | checkpoints of several runs | refuse | refuse | refuse | refuse |

    Each row also applies if there are unusable files with the names of checkpoints: they are renamed once the run starts.
    --pretrained selects the weights of a new run, without effect if the run resumes. A finished run resumes, and ends at once.
    Repeating a command with --resume FILE counts as "same command" once the run that it started has saved a checkpoint, see
    ``is_repeated``.

    Args:
        requested: the checkpoint of --resume; None without --resume, or if the command is repeated.
        auto_resume: TRAIN.AUTO_RESUME.

    Raises:
        ConfigError: the start is refused, since files of the directory would be lost or mixed with those of another run.
    """
    output, usable = contents.output, contents.usable
    inside = requested is not None and is_inside(requested.path, output)
    check_single_run(contents, requested if inside else None)
    if requested is not None:
        if not inside and (usable or contents.remains):
            raise ConfigError(
                f"--resume {requested.path}: {output} already contains files of a run ({describe(contents)}), so the directory "
                "would then contain files of two runs. Choose another --tag to continue from this checkpoint in a new directory"
                f"{', or leave out --resume to resume the run of this directory' if usable else ''}"
            )
        if inside and usable and usable[0].num_updates > requested.num_updates:
            raise ConfigError(
                f"{output} contains {usable[0].path.name}, but this run starts from the earlier update "
                f"{requested.num_updates}, so the directory would then contain checkpoints of two runs. Leave out --resume to "
                "resume from that checkpoint, or choose another --tag to continue from the earlier one in a new directory"
            )
        return requested
    if not auto_resume and (usable or contents.remains):
        raise ConfigError(
            f"TRAIN.AUTO_RESUME=False: {output} contains files of a run ({describe(contents)}), so the directory would then "
            "contain files of two runs. Choose another --tag, or move the directory away"
            f"{', or resume that run with TRAIN.AUTO_RESUME True' if usable else ''}"
        )
    if usable:
        return usable[0]
    if contents.remains:
        reasons = "".join(f"; {path.name}: {reason}" for path, reason in contents.unusable.items())
        raise ConfigError(
            f"{output} contains files of a run ({describe(contents)}), but no checkpoint from which it could resume{reasons}. "
            "Choose another --tag to start a new run, or move the directory away; to resume, copy an intact checkpoint of the "
            "run into the directory"
        )
    return None


def is_repeated(contents: Contents, reference: str) -> bool:
    """Whether the run of the directory was started with the same --resume, and can be resumed.

    The file of --resume is then not needed and may be missing: the run that wrote it may have deleted it since.

    Args:
        reference: the value of --resume.
    """
    record = contents.record
    same = record is not None and record.has_saved and record.resumed_from == normalise(reference)
    return same and bool(contents.usable)


def normalise(reference: str) -> str:
    """Form of a value of --resume that does not depend on the working directory: an absolute path, or a URL without secrets."""
    return without_secrets(reference) if is_url(reference) else os.path.abspath(os.path.expanduser(reference))


def check_single_run(contents: Contents, requested: Candidate | None) -> None:
    """Reject a directory with checkpoints of several runs: the rotation of one run would delete those of another one.

    Args:
        requested: the checkpoint of --resume, if it is in the directory.

    Raises:
        ConfigError: the message names a file of each run.
    """
    candidates = [*contents.usable, *([requested] if requested is not None else [])]
    other = next((one for one in candidates if contents.run_id and one.run_id not in ("", contents.run_id)), None)
    if other is None:
        return
    own = next((one.path.name for one in contents.usable if one.run_id == contents.run_id), RECORD)
    raise ConfigError(
        f"{contents.output} contains files of two runs: {other.path.name} is from another run than {own}. Move the files of "
        "one of the runs to another directory, or choose another --tag"
    )


def describe(contents: Contents) -> str:
    """Names of the first files of a run, for error messages."""
    names = [candidate.path.name for candidate in contents.usable] or list(contents.remains)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def is_inside(path: Path, output: Path) -> bool:
    """Whether a file is directly in a directory."""
    try:
        return os.path.samefile(path.absolute().parent, output)
    except OSError:  # the directory does not exist
        return False


def survey(output: Path) -> Contents:
    """Read the contents of a run directory, which may not exist. Nothing is written.

    Only the newest usable checkpoint is read completely: a run resumes from no other one, and checkpoints are large.

    Raises:
        ConfigError: the directory or a checkpoint cannot be opened, or a later version of this project wrote a checkpoint.
    """
    stamps = list_stamps(output)
    if not os.path.isdir(output):
        return Contents(output)
    usable: list[Candidate] = []
    unusable = {}
    for path in candidate_paths(output):
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


def candidate_paths(output: Path) -> Iterator[Path]:
    """Numbered checkpoints, newest first, then ``best.pth``; damaged ones and directories with such names included."""
    yield from list_checkpoints(output)
    if os.path.lexists(output / BEST):
        yield output / BEST


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
    try:
        check_format(state, path)
    except CheckpointError as error:
        raise ConfigError(str(error)) from None
    check_training_state(state, path)
    if is_numbered(path) and state["num_updates"] != num_updates_of(path):
        raise NotResumableError(f"{path} is the state after update {state['num_updates']}, unlike its name")
    return Candidate(path, state["num_updates"], state.get("run_id", ""))


def check_training_state(state: Mapping, path: Path | str) -> None:
    """Reject a file that does not contain the complete state of a run.

    Raises:
        NotResumableError: the message lists the missing or invalid entries.
    """
    if unusable := find_unusable_entries(state):
        raise NotResumableError(
            f"{path} is not a training checkpoint that can be resumed (missing or invalid: {', '.join(unusable)}); load only "
            "its weights with --pretrained"
        )


def find_unusable_entries(saved: Mapping) -> list[str]:
    """Names of the checkpoint entries that are missing or have an unexpected type or value."""
    names = [name for name, kind in STATE_TYPES.items() if not isinstance(saved.get(name), kind)]
    counts = {name: saved.get(name, 0) for name in ("num_updates", "num_skipped", "last_evaluation")}
    names += [name for name, count in counts.items() if not isinstance(count, int) or count < 0]
    if "updates_per_epoch" not in names and saved["updates_per_epoch"] < 1:
        names.append("updates_per_epoch")
    if "best" not in names and any(
        not isinstance(saved["best"].get(name), (int, type(value))) for name, value in NO_BEST.items()
    ):
        names.append("best")
    data = saved.get("data", {"train": {}, "val": {}})
    if not isinstance(data, dict) or not all(isinstance(data.get(split), dict) for split in ("train", "val")):
        names.append("data")
    evaluations = saved.get("evaluations", [])
    if not isinstance(evaluations, list) or not all(
        isinstance(one, dict) and isinstance(one.get("step"), int) and isinstance(one.get("kind"), str) for one in evaluations
    ):
        names.append("evaluations")
    if not isinstance(saved.get("run_id", ""), str):
        names.append("run_id")
    return sorted(set(names))


def find_remains(output: Path, record: RunRecord | None) -> tuple[str, ...]:
    """Names of the files of a run in a directory without usable checkpoints.

    A run that was killed before its first checkpoint has nothing to lose and starts again: the result is () in this case.
    """
    names = sorted({path.name for pattern in FILES_OF_A_RUN for path in output.glob(pattern)})
    names = [name for name in names if not name.endswith(".incomplete")]
    had_checkpoints = any(name.startswith(("checkpoint_", "best")) for name in names)
    if record is not None:
        lost = record.has_saved
    else:  # an earlier version wrote the files: it opened the log first, and saved a checkpoint after its first evaluation
        lost = "log_rank0.txt" not in names or has_finished_epoch(output / "metrics.jsonl")
    return tuple(names) if had_checkpoints or lost else ()


def has_finished_epoch(metrics: Path) -> bool:
    """Whether ``metrics.jsonl`` has records of an evaluation, or of an epoch after the first one."""
    try:
        records = read_records(metrics)
    except OSError:
        return False
    epochs = [record.get("epoch") for record in records]
    return any(record["kind"].startswith("eval") for record in records) or any(
        isinstance(epoch, int) and epoch > 0 for epoch in epochs
    )


def list_stamps(output: Path) -> tuple:
    """Name, size and time of every checkpoint and of ``run.json``, to detect changes between the decision and the start.

    Raises:
        ConfigError: the directory cannot be listed.
    """
    stamps = []
    try:
        for entry in os.scandir(output):
            if entry.name.startswith(("checkpoint_", "best")) or entry.name == RECORD:
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
