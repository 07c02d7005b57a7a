"""Decide how a run starts, given its command and the contents of its output directory: resume > pretrained > scratch."""

import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

from yacs.config import CfgNode

from engine.run_contents import Candidate, Contents, read_candidate, survey
from engine.run_directory import check_available
from jobs.locate_checkpoint import locate
from models.checkpoints.released import Released
from utils.distributed import World, on_all, on_main
from utils.errors import ConfigError
from utils.run_files import RECORD, build_output_path
from utils.urls import is_url, without_secrets


class Initialization(NamedTuple):
    """Where the initial state of a run comes from.

    Attributes:
        kind: resume, pretrained or scratch.
        checkpoint: path of the checkpoint to resume from, or of the pretrained weights; "" for scratch.
        contents: contents of the output directory on which the choice depends.
        released: the released model whose weights are loaded, if any.
    """

    kind: str
    checkpoint: str
    contents: Contents
    released: Released | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.checkpoint}".rstrip()

    @property
    def is_inside(self) -> bool:
        """Whether the checkpoint is in the output directory of the run."""
        return is_inside(Path(self.checkpoint), self.contents.output)


def choose_initialization(cfg: CfgNode, world: World) -> Initialization:
    """Choose the initial state of training, in this order of precedence.

    1. ``resume``: the checkpoint of --resume.
    2. ``resume``: the newest usable checkpoint of the output directory, if TRAIN.AUTO_RESUME is True. Repeating the
       command of an interrupted run thus resumes the run, even with --pretrained.
    3. ``pretrained``: the weights of --pretrained.
    4. ``scratch``: random weights.

    ``choose_checkpoint`` has the table of all cases. Nothing is written. --resume and --pretrained together are rejected, see
    ``utils.config.rules``. --eval does not use this function, see ``jobs.evaluate.choose_reference``.

    Raises:
        ConfigError: the start is refused because of the contents of the output directory, or TRAIN.FREEZE_BACKBONE without
            weights to start from.
        CheckpointError: the file of --resume is not a checkpoint of a run.
    """
    contents, repeated = on_main(world, partial(survey_output, cfg), long_timeout=True)
    requested = on_all(world, partial(locate, cfg.MODEL.RESUME)).path if cfg.MODEL.RESUME and not repeated else None

    def choose() -> Candidate | None:
        candidate = read_candidate(requested) if requested is not None else None
        return choose_checkpoint(contents, requested=candidate, auto_resume=cfg.TRAIN.AUTO_RESUME)

    start = on_main(world, choose)
    if start is not None:
        return Initialization("resume", str(start.path), contents)
    if cfg.MODEL.PRETRAINED:
        location = on_all(world, partial(locate, cfg.MODEL.PRETRAINED))
        return Initialization("pretrained", str(location.path), contents, location.released)
    if cfg.TRAIN.FREEZE_BACKBONE:
        raise ConfigError(
            "TRAIN.FREEZE_BACKBONE=True: a head trained on random features has a low accuracy; give weights with --pretrained"
        )
    return Initialization("scratch", "", contents)


def survey_output(cfg: CfgNode) -> tuple[Contents, bool]:
    """Contents of the output directory, and whether the command repeats the one that started the run of the directory.

    A command with --resume FILE is repeated once its run has saved a checkpoint: the run then resumes from the directory. FILE
    is no longer needed, and the run that wrote it may have deleted it.
    """
    output = build_output_path(cfg)
    check_available(output)
    contents = survey(output)
    record = contents.record
    repeated = (
        bool(cfg.TRAIN.AUTO_RESUME and cfg.MODEL.RESUME and contents.usable)
        and record is not None
        and record.has_saved
        and record.resumed_from == normalise(cfg.MODEL.RESUME)
    )
    return contents, repeated


def normalise(reference: str) -> str:
    """Form of a value of --resume that does not depend on the working directory: an absolute path, or a URL without secrets."""
    return without_secrets(reference) if is_url(reference) else os.path.abspath(os.path.expanduser(reference))


def choose_checkpoint(contents: Contents, *, requested: Candidate | None, auto_resume: bool) -> Candidate | None:
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
    A repeated command with --resume FILE is a "same command", see ``survey_output``.

    Args:
        requested: the checkpoint of --resume; None without --resume, or if the command is repeated.
        auto_resume: TRAIN.AUTO_RESUME.

    Raises:
        ConfigError: the start is refused, since files of the directory would be lost or mixed with those of another run.
    """
    output, usable = contents.output, contents.usable
    inside = requested is not None and is_inside(requested.path, output)
    check_single_run(contents, requested if inside else None)
    has_run = bool(usable or contents.remains)
    if requested is not None:
        if not inside and has_run:
            raise ConfigError(
                f"--resume {requested.path}: {output} already contains files of a run ({contents.name_files()}), so the "
                "directory would then contain files of two runs. Choose another --tag to continue from this checkpoint in a "
                f"new directory{', or leave out --resume to resume the run of this directory' if usable else ''}"
            )
        if inside and usable and usable[0].num_updates > requested.num_updates:
            raise ConfigError(
                f"{output} contains {usable[0].path.name}, but this run starts from the earlier update "
                f"{requested.num_updates}, so the directory would then contain checkpoints of two runs. Leave out --resume to "
                "resume from that checkpoint, or choose another --tag to continue from the earlier one in a new directory"
            )
        return requested
    if has_run and not auto_resume:
        raise ConfigError(
            f"TRAIN.AUTO_RESUME=False: {output} contains files of a run ({contents.name_files()}), so the directory would then "
            "contain files of two runs. Choose another --tag, or move the directory away"
            f"{', or resume that run with TRAIN.AUTO_RESUME True' if usable else ''}"
        )
    if has_run and not usable:
        reasons = "".join(f"; {path.name}: {reason}" for path, reason in contents.unusable.items())
        raise ConfigError(
            f"{output} contains files of a run ({contents.name_files()}), but no checkpoint from which it could "
            f"resume{reasons}. Choose another --tag to start a new run, or move the directory away; to resume, copy an intact "
            "checkpoint of the run into the directory"
        )
    return usable[0] if usable else None


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


def is_inside(path: Path, output: Path) -> bool:
    """Whether a file is directly in a directory."""
    try:
        return os.path.samefile(path.absolute().parent, output)
    except OSError:  # the directory does not exist
        return False
