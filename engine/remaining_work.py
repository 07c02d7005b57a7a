"""Decide what remains to be done after an update: at the end of an epoch, and when a run resumes from a checkpoint."""

from collections.abc import Mapping
from enum import Enum
from typing import NamedTuple

from yacs.config import CfgNode

from engine.metrics import count_stale
from engine.schedule import count_epochs


class BestFile(Enum):
    """Where the checkpoint is that a run records as its best one."""

    IN_PLACE = "best.pth"  # or there is none, since no evaluation was recorded yet
    ELSEWHERE = "another file of the output directory, or the checkpoint to resume from"
    UNUSABLE = "lost, or its accuracy is not comparable with later ones"


class Remaining(NamedTuple):
    """Work that remains after an update.

    Attributes:
        evaluate: evaluate the weights.
        save: save the state, after the evaluation if there is one. A new best accuracy is saved in any case.
        link: link ``best.pth`` to the checkpoint that is recorded as the best one.
        reset: forget the best accuracy; the next evaluation sets it.
        stop: no update remains.
    """

    evaluate: bool
    save: bool
    link: bool
    reset: bool
    stop: bool

    @property
    def is_finished(self) -> bool:
        """Whether neither an update nor an evaluation remains."""
        return self.stop and not self.evaluate


def remaining_work(
    num_updates: int,
    *,
    updates_per_epoch: int,
    num_epochs: int,
    eval_freq: int,
    save_freq: int,
    is_evaluated: bool,
    is_saved: bool,
    best: BestFile = BestFile.IN_PLACE,
    num_stale: int = 0,
    patience: int = 0,
) -> Remaining:
    """Decide what remains after update ``num_updates``.

    | position | evaluate | save | stop |
    |---|---|---|---|
    | before the first update, or within an epoch | no | no | no |
    | end of an epoch, EVAL_FREQ due, not evaluated | yes | if SAVE_FREQ is due | no |
    | end of an epoch, already evaluated or EVAL_FREQ not due | no | if SAVE_FREQ is due, and not saved | no |
    | end of the last epoch, or later since TRAIN.EPOCHS was reduced; not evaluated | yes | yes | yes |
    | end of the last epoch, or later; evaluated | no | if not saved | yes |
    | the last ``patience`` evaluations were not better, and this update is evaluated | no | if not saved | yes |

    | best checkpoint | link | reset |
    |---|---|---|
    | in ``best.pth``, or none yet | no | no |
    | elsewhere | yes | no |
    | lost or not comparable | no | unless the run is finished |

    Args:
        num_epochs: including cooldown epochs.
        eval_freq, save_freq: EVAL_FREQ and SAVE_FREQ, in epochs.
        is_evaluated: whether the weights of this update were evaluated.
        is_saved: whether a checkpoint of this update exists or is being written.
        best: only needed on resume; during a run, each new best checkpoint is linked when it is saved.
        num_stale: number of newest evaluations that were not better than those before, see ``count_stale``.
        patience: TRAIN.PATIENCE; 0: no early end.
    """
    epochs, updates_in_epoch = divmod(num_updates, updates_per_epoch)
    stop = epochs >= num_epochs or (is_evaluated and 0 < patience <= num_stale)
    at_end = stop or (epochs > 0 and updates_in_epoch == 0)
    evaluate = at_end and (stop or epochs % eval_freq == 0) and not is_evaluated
    save = at_end and (stop or epochs % save_freq == 0) and (evaluate or not is_saved)
    reset = best is BestFile.UNUSABLE and not (stop and not evaluate)
    return Remaining(evaluate=evaluate, save=save, link=best is BestFile.ELSEWHERE, reset=reset, stop=stop)


def work_after(saved: Mapping, cfg: CfgNode, *, is_saved: bool = True, best: BestFile = BestFile.IN_PLACE) -> Remaining:
    """What remains to be done after a checkpoint, see ``remaining_work``. saved: its entries."""
    num_updates = saved["num_updates"]
    return remaining_work(
        num_updates,
        updates_per_epoch=saved["updates_per_epoch"],
        num_epochs=count_epochs(cfg),
        eval_freq=cfg.EVAL_FREQ,
        save_freq=cfg.SAVE_FREQ,
        is_evaluated=saved.get("last_evaluation", num_updates) == num_updates,
        is_saved=is_saved,
        best=best,
        num_stale=count_stale(saved.get("evaluations", []), cfg.BEST_METRIC, since=saved.get("best_since", 0)),
        patience=cfg.TRAIN.PATIENCE,
    )


def describe_early_end(saved: Mapping, cfg: CfgNode) -> str:
    """Addition to the message that a run is finished: why it has ended before its last epoch; "" if it has not.

    Args:
        saved: entries of its last checkpoint.
    """
    epochs = saved["num_updates"] // saved["updates_per_epoch"]
    if epochs >= count_epochs(cfg):
        return ""
    return (
        f" after epoch {epochs} of {count_epochs(cfg)}, since the last evaluations gave no better {cfg.BEST_METRIC} "
        f"(TRAIN.PATIENCE={cfg.TRAIN.PATIENCE})"
    )


def count_evaluations(num_updates: int, *, updates_per_epoch: int, num_epochs: int, eval_freq: int) -> int:
    """Number of evaluations after update ``num_updates``, including one that is due after this update itself.

    Args:
        num_epochs, eval_freq: see ``remaining_work``.
    """
    finished_epochs = max(num_updates - 1, 0) // updates_per_epoch  # epochs that end before this update
    is_last_additional = num_epochs % eval_freq > 0  # the weights are always evaluated after the last epoch
    return max(num_epochs // eval_freq - finished_epochs // eval_freq + is_last_additional, 0)
