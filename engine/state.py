"""The state of a run at the end of an update, which checkpoints contain."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from engine.metrics import score
from utils.errors import TrainingError


def check_trained(*, num_updates: int, num_skipped: int) -> None:
    """Check that training changed the weights.

    Raises:
        TrainingError: fp16 skipped every update.
    """
    if 0 < num_updates == num_skipped:
        raise TrainingError("fp16 skipped every update of this run; use AMP_DTYPE bf16, or lower TRAIN.BASE_LR")


# Value of ``TrainState.best`` before the first evaluation. Entries: top-1 accuracy in percent, label of the weights (raw or
# ema), epoch, and number of updates; also ``metric`` and ``value`` if BEST_METRIC is not the top-1 accuracy.
NO_BEST = {"acc1": -1.0, "weights": "", "epoch": -1, "num_updates": -1}


def describe_best(best: Mapping) -> str:
    """The value of the best evaluation, such as ``Acc@1 82.106``. best: see ``NO_BEST``."""
    accuracy = f"Acc@1 {best['acc1']:.3f}"
    return f"{best['metric']} {best['value']:.4f}, {accuracy}" if "metric" in best else accuracy


@dataclass
class TrainState:
    """Complete state of a run at the end of an update.

    Args:
        scaler: loss scaler, disabled except in fp16; checkpoints contain its state only if it is enabled.
        num_updates: number of updates so far, including skipped ones; it determines the position in the data.
        num_skipped: number of updates skipped in fp16 (non-finite gradients); the learning-rate schedule does not count them.
        ema_updates: number of updates of the EMA so far; it determines the decay with EMA.WARMUP.
        last_evaluation: ``num_updates`` at the last evaluation.
        best: the best evaluation so far, see ``NO_BEST``.
        best_since: ``num_updates`` when ``best`` was last reset: evaluations until then are not compared with later ones.
        evaluations: all evaluations so far, as in ``metrics.jsonl``. That file is restored from them on resume.
    """

    model: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    num_updates: int = 0
    num_skipped: int = 0
    ema_updates: int = 0
    last_evaluation: int = 0
    best: dict = field(default_factory=lambda: dict(NO_BEST))
    best_since: int = 0
    evaluations: list[dict] = field(default_factory=list)

    def update_ema(self) -> None:
        """Update the average of the weights, if there is one."""
        if self.ema is None:
            return
        self.ema.update(self.model, step=self.ema_updates + 1 if self.ema.use_warmup else None)  # timm counts from 1
        self.ema_updates += 1

    def reset_best(self) -> None:
        """Forget the best evaluation; the next one sets it."""
        self.best, self.best_since = dict(NO_BEST), self.num_updates

    def add_evaluation(self, weights: str, record: dict, metric: str) -> bool:
        """Add the evaluation of a set of weights after the newest update.

        Args:
            record: epoch and metrics.
            metric: BEST_METRIC.

        Returns:
            Whether it is the best one so far; on ties, prefer the later epoch.
        """
        self.evaluations.append({"step": self.num_updates, "kind": f"eval_{weights}", **record})
        former = self.best.get("value", self.best["acc1"])
        if self.best["num_updates"] >= 0 and score(record[metric], metric) < score(former, metric):
            return False
        value = {} if metric == "acc1" else {"metric": metric, "value": record[metric]}
        position = {"weights": weights, "epoch": record["epoch"], "num_updates": self.num_updates}
        self.best = {"acc1": record["acc1"], **position, **value}
        return True

    def to_dict(self) -> dict:
        """State dicts and counters for a checkpoint; parameter names have no prefixes of DDP or ``torch.compile``."""
        return {
            "model": self.model.state_dict(),
            "state_dict_ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "num_updates": self.num_updates,
            "num_skipped": self.num_skipped,
            "ema_updates": self.ema_updates,
            "last_evaluation": self.last_evaluation,
            "best": self.best,
            "best_since": self.best_since,
            "evaluations": self.evaluations,
        }

    def load_dict(self, state: dict) -> None:
        """Restore a checkpoint, except for the optimizer's options such as weight decay, which keep the config's values.

        If the checkpoint has no EMA weights, they are initialised from the model weights.

        Raises:
            KeyError, RuntimeError: the checkpoint belongs to another model or optimizer.
        """
        self.model.load_state_dict(state["model"])
        # The learning rate is the checkpoint's until the next update sets it: a run that resumes to evaluate may save it again.
        kept = ("params", "lr")
        options = [{name: value for name, value in group.items() if name not in kept} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, configured in zip(self.optimizer.param_groups, options, strict=True):
            group.update(configured)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["state_dict_ema"] or state["model"])
        self.num_updates = state["num_updates"]
        self.num_skipped = state.get("num_skipped", 0)
        # Checkpoints of earlier versions do not count the updates of the EMA; it was then updated from the first update on.
        counted = state.get("ema_updates", self.num_updates - self.num_skipped)
        self.ema_updates = counted if self.ema is not None and state["state_dict_ema"] else 0
        self.last_evaluation = state.get("last_evaluation", self.num_updates)
        self.best = dict(state["best"])
        self.best_since = state.get("best_since", 0)
        self.evaluations = list(state.get("evaluations", []))
