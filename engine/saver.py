"""Save the state of a run as numbered checkpoints, written in the background."""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from engine.checkpoint_writer import link_best, link_top, remove_surplus, save_checkpoint, to_host
from engine.metrics import list_top
from engine.run_directory import record_save
from engine.state import TrainState
from utils.background import BackgroundWrite
from utils.distributed import World, on_main
from utils.run_files import BEST, checkpoint_path

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, eq=False)
class Saver:
    """Copies the state to host memory, and lets a background thread of rank 0 write it.

    Args:
        output: directory of the checkpoints.
        metadata: entries of every checkpoint besides the state.
        keep: number of checkpoints to keep (KEEP_CHECKPOINTS).
        minutes: interval of ``is_due`` (SAVE_MINUTES); 0: never.
        best_metric, keep_best: BEST_METRIC and KEEP_BEST.
        flush_metrics: called before each write, so that a resumed run does not lack the metrics before the checkpoint.
        check_output: called before every write to ``output``; raises if the path no longer is the run's directory.
    """

    world: World
    state: TrainState
    output: Path
    metadata: dict
    keep: int
    minutes: float
    best_metric: str
    keep_best: int
    flush_metrics: Callable[[], None]
    check_output: Callable[[], None]

    def __post_init__(self) -> None:
        self.background_write = BackgroundWrite()
        self.saved_updates = self.state.num_updates  # number of updates in the newest checkpoint, or the one being written
        self.restart_interval()

    def restart_interval(self) -> None:
        """Start the interval after which ``is_due`` asks for the next save."""
        self.last_save = time.monotonic()

    @property
    def is_saved(self) -> bool:
        """Whether a checkpoint of the current number of updates is saved or being written."""
        return self.saved_updates == self.state.num_updates

    def top(self) -> list[int] | None:
        """Numbers of updates of the ``keep_best`` best evaluations so far; None if ``best.pth`` alone is kept."""
        return list_top(vars(self.state), self.best_metric, self.keep_best)

    @property
    def is_top(self) -> bool:
        """Whether the current number of updates is among ``top``."""
        return self.state.num_updates in (self.top() or ())

    def is_due(self) -> bool:
        """Whether rank 0 should request a save now; True only once in each interval.

        After a failed write, a save is requested immediately, so that ``save`` raises the error in all processes.
        """
        elapsed = 0 < 60 * self.minutes < time.monotonic() - self.last_save
        due = self.world.is_main and (elapsed or self.background_write.failed)
        if due:
            self.restart_interval()
        return due

    def save(self, *, best: bool = False) -> None:
        """Start to save the state. All processes call this function together.

        Args:
            best: whether to link the checkpoint as ``best.pth`` too.

        Raises:
            CheckpointError, OtherRankError: the previous checkpoint could not be written.
        """
        on_main(self.world, partial(self.start, best=best))
        self.restart_interval()
        self.saved_updates = self.state.num_updates

    def start(self, *, best: bool = False) -> None:
        """The part of ``save`` that runs on rank 0."""
        self.background_write.wait()
        self.background_write.start(
            partial(
                write_checkpoint,
                to_host(self.state.to_dict() | self.metadata, copy=True),
                checkpoint_path(self.output, self.state.num_updates),
                best=best,
                keep=self.keep,
                top=self.top(),
                check_output=self.check_output,
                flush_metrics=self.flush_metrics,
            )
        )

    def start_unless_failed(self) -> None:
        """Start to save the state on rank 0 alone; do nothing if the previous write has failed."""
        self.background_write.join()
        if not self.background_write.failed:
            self.start()

    def start_after_error(self) -> None:
        """Start to save the state on rank 0 before an error ends the run, unless the previous write takes too long.

        After a failed write, nothing is saved: if the evaluation that it should have saved was the best one, a later checkpoint
        would record a best accuracy that no file has. The run resumes from the checkpoint before.
        """
        self.background_write.close()  # waits for a limited time, unlike ``wait``
        if not self.background_write.is_writing and not self.background_write.has_failed:
            logger.warning("saving the state after update %d before this process ends with an error", self.state.num_updates)
            self.start()

    def finish(self) -> None:
        """Wait until the newest checkpoint is written. All processes call this function together.

        Raises:
            CheckpointError, OtherRankError: the checkpoint could not be written.
        """
        on_main(self.world, self.background_write.wait)


def write_checkpoint(
    state: dict,
    path: Path,
    *,
    best: bool,
    keep: int,
    top: Sequence[int] | None,
    check_output: Callable[[], None],
    flush_metrics: Callable[[], None],
) -> None:
    """Write a numbered checkpoint, link it as best.pth if it is the best, then delete all but the ``keep`` newest.

    Args:
        top: numbers of updates of the best checkpoints, see ``link_top``.

    This function runs in another thread and therefore gets no reference to the trainer: if that were the last reference, the
    trainer and its loaders would be destroyed in that thread.

    Raises:
        CheckpointError: the checkpoint could not be written, or ``path`` is no longer in the directory of the run.
    """
    started = time.monotonic()
    flush_metrics()
    check_output()
    save_checkpoint(state, path)
    record_save(path.parent)
    if best:
        check_output()
        link_best(path, path.parent / BEST)
    check_output()
    link_top(path.parent, top, newest=path)
    remove_surplus(path.parent, keep, newest=path)
    logger.info("saved %s%s in %.1f s", path, " (and as best.pth)" if best else "", time.monotonic() - started)
