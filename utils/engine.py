"""Training and evaluation: the step, the epoch, the run.

Nothing in a step waits for the device: losses and norms are read when they are logged.
"""

import copy
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from utils.checkpoint import BEST, checkpoint_path, link_best, remove_surplus, save_checkpoint
from utils.distributed import World, gather_on_main, on_main, sum_over_processes
from utils.log import MetricsWriter, progress
from utils.schedule import Schedule

logger = logging.getLogger(__name__)

SEED_OF_STEP = 3  # apart from the seeds of images and of mixup


class TrainingError(RuntimeError):
    """Training that cannot continue. The message names the update and the remedy."""


class Stopped(Exception):  # noqa: N818 - an event, not an error
    """Training was stopped from outside. The message tells where, and how it resumes."""


# The best evaluation of a run: accuracy in percent, raw or ema weights, its epoch and its number of updates.
NO_BEST = {"acc1": -1.0, "weights": "", "epoch": -1, "num_updates": -1}


@dataclass
class TrainState:
    """All that the next update needs. ``num_updates`` are done."""

    model: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    num_updates: int = 0
    best: dict = field(default_factory=lambda: dict(NO_BEST))

    def to_dict(self) -> dict:
        """Plain data for a checkpoint, parameters under their bare names."""
        return {
            "model": self.model.state_dict(),
            "state_dict_ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "num_updates": self.num_updates,
            "best": self.best,
        }

    def load_dict(self, state: dict) -> None:
        """Go on from a checkpoint, with the optimizer's options as they are configured now.

        An average that the checkpoint lacks starts from its weights.

        Raises:
            KeyError, RuntimeError: a checkpoint of another model or optimizer.
        """
        self.model.load_state_dict(state["model"])
        options = [{name: value for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, configured in zip(self.optimizer.param_groups, options, strict=True):
            group.update(configured)
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["state_dict_ema"] or state["model"])
        self.num_updates, self.best = state["num_updates"], dict(state["best"])


def train_step(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    num_batches: int,
    amp_dtype: torch.dtype,
    max_grad_norm: float,
) -> tuple[Tensor, Tensor]:
    """One optimizer update, for every precision, clipped or not, accumulated or not.

    Args:
        batches: ``num_batches`` pairs of images (B, 3, H, W), normalised, on the model's device, and targets: (B,)
            class ids, or (B, num_classes) probabilities after mixup.
        scaler: disabled unless ``amp_dtype`` is float16.
        max_grad_norm: L2 norm over all parameters; ``inf`` measures without clipping.

    Returns:
        Mean loss and gradient norm before clipping, left on the device: reading them stalls it, so the caller decides
        when.
    """
    total_loss = None
    for index, (images, targets) in enumerate(batches):
        # Processes exchange gradients once an update, in the last backward pass.
        apart = isinstance(model, DistributedDataParallel) and index + 1 < num_batches
        with model.no_sync() if apart else nullcontext():
            with torch.autocast(images.device.type, dtype=amp_dtype, enabled=amp_dtype != torch.float32):
                loss = criterion(model(images), targets) / num_batches
            scaler.scale(loss).backward()
        total_loss = loss.detach() if total_loss is None else total_loss + loss.detach()
    scaler.unscale_(optimizer)  # the norm below is of true gradients
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    grad_norm = nn.utils.clip_grad_norm_(parameters, max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total_loss, grad_norm


@dataclass(frozen=True, eq=False)
class Answers:
    """What a model said of every image of a dataset, in the dataset's order.

    Args:
        targets: (N,) class ids.
        ranked: (N, k) class ids, the k <= 5 likeliest, likeliest first.
        confidence: (N,) softmax of the first.
        model_classes: (N,) the first as the model's class id, which a class map makes another one.
    """

    targets: np.ndarray
    ranked: np.ndarray
    confidence: np.ndarray
    model_classes: np.ndarray


@dataclass(frozen=True)
class EvalResult:
    """Counts over a whole dataset.

    Args:
        weights: raw or ema.
        num_classes: classes that predictions are among; of five or fewer, every top-5 is correct.
        answers: on rank 0, where they are kept.
    """

    weights: str
    correct1: int
    correct5: int
    num_images: int
    loss: float
    num_classes: int
    answers: Answers | None = field(default=None, repr=False, compare=False)

    @property
    def acc1(self) -> float:
        """Percent."""
        return 100 * self.correct1 / self.num_images

    @property
    def acc5(self) -> float:
        """Percent."""
        return 100 * self.correct5 / self.num_images

    def __str__(self) -> str:
        top5 = f" Acc@5 {self.acc5:.3f}" if self.num_classes > 5 else ""
        return f" * Acc@1 {self.acc1:.3f}{top5}"


@torch.no_grad()
def evaluate(
    models: dict[str, nn.Module],
    loader,
    *,
    amp_dtype: torch.dtype,
    world: World,
    class_ids: Sequence[int] | None = None,
    keep_answers: bool = False,
) -> dict[str, EvalResult]:
    """Count right answers over a dataset that the processes share, every image once; one reduction at the end.

    Args:
        models: by the label of their weights, raw or ema; all see each batch. Not wrapped: processes may have different
            numbers of batches.
        loader: batches of this process's share.
        class_ids: the model's class for each of the dataset's; answers are among those. None: they are the same.
        keep_answers: give rank 0 every image's answer too.

    Returns:
        A result for each model, the same in every process, but for the answers.
    """
    were_training = {label: model.training for label, model in models.items()}
    # Right at 1, right at 5, sum of losses: counts are exact in float64.
    sums = {label: torch.zeros(3, dtype=torch.float64, device=world.device) for label in models}
    answers: dict[str, list[Tensor]] = {label: [] for label in models}
    indices, targets = [], []
    num_classes = 0
    chosen = None if class_ids is None else torch.tensor(class_ids, device=world.device)
    num_images = 0
    for model in models.values():
        model.eval()
    for batch in progress(loader, len(loader), "evaluate"):
        num_images += len(batch.targets)
        if keep_answers:
            indices += batch.indices
            targets.append(batch.targets)
        for label, model in models.items():
            with torch.autocast(world.device.type, dtype=amp_dtype, enabled=amp_dtype != torch.float32):
                logits = model(batch.images)
            logits = logits.float() if chosen is None else logits.float().index_select(1, chosen)
            num_classes = logits.shape[1]
            ranked = logits.topk(min(5, logits.shape[1]), dim=1).indices
            right = ranked == batch.targets.unsqueeze(1)  # (B, 5)
            loss = F.cross_entropy(logits, batch.targets, reduction="sum")
            sums[label] += torch.stack([right[:, 0].sum(), right.sum(), loss]).double()
            if keep_answers:
                answers[label].append(torch.cat([ranked.double(), logits.softmax(dim=1).amax(dim=1, keepdim=True)], dim=1))
    # A process may have no batches, and then does not know the number of classes.
    counts = torch.tensor([num_images, num_classes, num_classes > 0], device=world.device)
    total, class_sum, num_sharing = sum_over_processes(counts).tolist()
    num_classes = class_sum // num_sharing
    results = {}
    for label, model in models.items():
        model.train(were_training[label])
        correct1, correct5, loss = sum_over_processes(sums[label]).tolist()
        kept = _gather_answers(indices, targets, answers[label], class_ids, world) if keep_answers else None
        results[label] = EvalResult(label, int(correct1), int(correct5), total, loss / total, num_classes, kept)
    return results


def log_results(results: Mapping[str, EvalResult]) -> None:
    for label, result in results.items():
        counts = (result.correct1, result.num_images)
        logger.info("%s weights: %d of %d correct, loss %.4f,%s", label, *counts, result.loss, result)


def _gather_answers(
    indices: list[int], targets: list[Tensor], answers: list[Tensor], class_ids: Sequence[int] | None, world: World
) -> Answers | None:
    """The answers of all processes, in the dataset's order; None but on rank 0."""
    share = np.empty((0, 0)), np.empty(0), np.empty(0)
    if indices:
        share = torch.cat(answers).cpu().numpy(), torch.cat(targets).cpu().numpy(), np.array(indices)
    shares = gather_on_main(world, share)
    if shares is None:
        return None
    values, truths, positions = (np.concatenate(parts) for parts in zip(*(s for s in shares if len(s[2])), strict=True))
    order = positions.argsort()
    values, ranked = values[order], values[order, :-1].astype(np.int64)
    first = ranked[:, 0] if class_ids is None else np.array(class_ids)[ranked[:, 0]]
    return Answers(truths[order].astype(np.int64), ranked, values[:, -1], first)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a run trains, and how often it logs, saves and evaluates. Epochs include those of the cooldown."""

    num_epochs: int
    accumulation: int
    amp_dtype: torch.dtype
    eval_dtype: torch.dtype
    max_grad_norm: float
    seed: int
    print_freq: int
    save_freq: int
    save_steps: int
    eval_freq: int
    keep_checkpoints: int


class Trainer:
    """A run from where its state stands to its end.

    Args:
        model: ``state.model`` as it trains: wrapped for several processes, or compiled.
        mixup: mixes a batch by the number of its forward pass; None for no mixing.
        metrics: where numbers are written, on rank 0.
        header: what every checkpoint carries besides the state (the config, the shape of the run).
    """

    def __init__(
        self,
        *,
        state: TrainState,
        model: nn.Module,
        criterion: nn.Module,
        schedule: Schedule,
        train_loader,
        val_loader,
        mixup: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None,
        recipe: Recipe,
        world: World,
        output: Path,
        metrics: MetricsWriter | None = None,
        header: dict,
    ):
        self.state, self.model, self.criterion, self.schedule = state, model, criterion, schedule
        self.train_loader, self.val_loader, self.mixup = train_loader, val_loader, mixup
        self.recipe, self.world, self.output, self.metrics, self.header = recipe, world, output, metrics, header
        self.updates_per_epoch = train_loader.updates_per_epoch

    def fit(self) -> None:
        """Train what is left of the run, evaluating and saving on the way."""
        first_epoch = self.state.num_updates // self.updates_per_epoch
        started = time.monotonic()
        for epoch in range(first_epoch, self.recipe.num_epochs):
            self.train_epoch(epoch)
            last = epoch + 1 == self.recipe.num_epochs
            improved = False
            if last or (epoch + 1) % self.recipe.eval_freq == 0:
                improved = self.evaluate(epoch)
            if last or improved or (epoch + 1) % self.recipe.save_freq == 0:
                self.save(best=improved)
        best = self.state.best
        logger.info(
            "done in %s; best Acc@1 %.3f (%s weights, epoch %d)",
            format_duration(time.monotonic() - started),
            best["acc1"],
            best["weights"],
            best["epoch"],
        )

    def train_epoch(self, epoch: int) -> None:
        """The updates of one epoch that are still to do."""
        state, recipe = self.state, self.recipe
        first_update = state.num_updates - epoch * self.updates_per_epoch
        self.train_loader.set_position(epoch, first_update)
        self.model.train()
        meter = Meter(epoch, self)
        batches = self.mixed_batches(iter(self.train_loader), meter)
        updates = range(first_update, self.updates_per_epoch)
        for update in progress(updates, len(updates), f"epoch {epoch}/{recipe.num_epochs}", seconds_between_lines=math.inf):
            meter.add(*self.update(batches))
            done = update + 1
            saving = recipe.save_steps and done % recipe.save_steps == 0 and done < self.updates_per_epoch
            if saving or done % recipe.print_freq == 0 or done == self.updates_per_epoch:
                meter.log(self.schedule(state.num_updates - 1))
            if saving:
                self.save()
                meter.restart()

    def update(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """One update, with as many of the batches as it takes; mean loss and gradient norm, left on the device."""
        state, recipe = self.state, self.recipe
        learning_rate = self.schedule(state.num_updates)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        loss, grad_norm = train_step(
            self.model,
            self.criterion,
            state.optimizer,
            state.scaler,
            (next(batches) for _ in range(recipe.accumulation)),
            num_batches=recipe.accumulation,
            amp_dtype=recipe.amp_dtype,
            max_grad_norm=recipe.max_grad_norm,
        )
        if state.ema is not None:
            state.ema.update(state.model)
        state.num_updates += 1
        return loss, grad_norm

    def mixed_batches(self, batches: Iterator, meter: "Meter") -> Iterator[tuple[Tensor, Tensor]]:
        """Images and targets of every forward pass, the model's own draws (drop path, dropout) seeded for each."""
        forward_pass = self.state.num_updates * self.recipe.accumulation
        while True:
            waiting = time.monotonic()
            batch = next(batches, None)
            meter.wait += time.monotonic() - waiting
            if batch is None:
                return
            if forward_pass == 0:
                self.show_batch(batch.images)
            images, targets = batch.images, batch.targets
            if self.mixup is not None:
                images, targets = self.mixup(images, targets, forward_pass)
            meter.images += len(images) * self.world.size
            position = (self.recipe.seed, forward_pass, self.world.rank, SEED_OF_STEP)
            torch.manual_seed(int(np.random.SeedSequence(position).generate_state(1)[0]))
            yield images, targets
            forward_pass += 1

    def show_batch(self, images: Tensor) -> None:
        """The first images after augmentation, as a grid, each stretched to its own range."""
        if self.metrics is None:
            return
        from torchvision.utils import make_grid

        grid = make_grid(images[:16].float().cpu(), nrow=4, normalize=True, scale_each=True)
        self.metrics.image("first_batch", grid, 0)

    def evaluate(self, epoch: int) -> bool:
        """Evaluate raw weights and their average. True where one of them is the best so far."""
        improved = False
        models = {"raw": self.state.model}
        if self.state.ema is not None:
            models["ema"] = _on_device(self.state.ema.module, self.world.device)
        results = evaluate(models, self.val_loader, amp_dtype=self.recipe.eval_dtype, world=self.world)
        log_results(results)
        for weights, result in results.items():
            if self.metrics is not None:
                self.metrics.scalars(self.state.num_updates, f"eval_{weights}", _record(result, epoch))
            if result.acc1 >= self.state.best["acc1"]:  # on ties, prefer the later epoch
                improved = True
                position = {"epoch": epoch, "num_updates": self.state.num_updates}
                self.state.best = {"acc1": result.acc1, "weights": weights, **position}
        return improved

    def save(self, *, best: bool = False) -> None:
        """Write the state, then let go of surplus checkpoints; every process learns how it went."""

        def write() -> None:
            path = checkpoint_path(self.output, self.state.num_updates)
            started = time.monotonic()
            save_checkpoint(self.state.to_dict() | self.header, path)
            if best:
                link_best(path, self.output / BEST)
            remove_surplus(self.output, self.recipe.keep_checkpoints)
            logger.info("saved %s%s in %.1f s", path, " (and as best.pth)" if best else "", time.monotonic() - started)

        on_main(self.world, write)


class Meter:
    """What happened since the last line of the log, most of it still on the device."""

    def __init__(self, epoch: int, trainer: Trainer):
        self.epoch, self.trainer = epoch, trainer
        self.restart()

    def restart(self) -> None:
        self.started, self.wait, self.images = time.monotonic(), 0.0, 0
        self.losses: list[Tensor] = []
        self.grad_norms: list[Tensor] = []

    def add(self, loss: Tensor, grad_norm: Tensor) -> None:
        self.losses.append(loss)
        self.grad_norms.append(grad_norm)

    def check(self) -> tuple[list[float], list[float]]:
        """Read losses and gradient norms: the one point where training waits for the device.

        Raises:
            TrainingError: in every process, where a loss was not finite in any.
        """
        trainer, state = self.trainer, self.trainer.state
        losses = (sum_over_processes(torch.stack(self.losses).double()) / trainer.world.size).tolist()
        grad_norms = torch.stack(self.grad_norms).tolist()  # of averaged gradients: the same in every process
        for index, (loss, grad_norm) in enumerate(zip(losses, grad_norms, strict=True)):
            # The scaler leaves out updates with infinite gradients, and lowers its scale.
            if not math.isfinite(loss) or not (math.isfinite(grad_norm) or state.scaler.is_enabled()):
                update = state.num_updates - len(losses) + index
                raise TrainingError(
                    f"the loss is {loss} and the gradient's norm {grad_norm} at update {update} (epoch {self.epoch}, counted "
                    f"from 0); the last good checkpoint in {trainer.output} is untouched. Look at the data of that update, "
                    "lower TRAIN.BASE_LR, set TRAIN.CLIP_GRAD, or use AMP_DTYPE bf16"
                )
        return losses, grad_norms

    def log(self, learning_rate: float) -> None:
        """Check what was gathered, write it to the log and the metrics, and start again.

        Raises:
            TrainingError: see ``check``.
        """
        trainer, state = self.trainer, self.trainer.state
        if not self.losses:
            return
        losses, grad_norms = self.check()
        seconds = time.monotonic() - self.started
        done = state.num_updates - self.epoch * trainer.updates_per_epoch
        left = trainer.recipe.num_epochs * trainer.updates_per_epoch - state.num_updates
        values = {
            "epoch": self.epoch,
            "loss": sum(losses) / len(losses),
            "lr": learning_rate,
            "grad_norm": grad_norms[-1],
            "images_per_second": self.images / seconds,
            "data_wait": self.wait / seconds,
            "memory_mib": _peak_memory(trainer.world.device) / 2**20,
        }
        if state.scaler.is_enabled():
            values["loss_scale"] = state.scaler.get_scale()
        logger.info(
            "epoch %d/%d [%d/%d] loss %.4f lr %.3e grad norm %.3f | %.1f images/s, %.0f %% waiting for data, %.0f MiB, ETA %s",
            self.epoch,
            trainer.recipe.num_epochs,
            done,
            trainer.updates_per_epoch,
            values["loss"],
            learning_rate,
            values["grad_norm"],
            values["images_per_second"],
            100 * values["data_wait"],
            values["memory_mib"],
            format_duration(left * seconds / len(losses)),
        )
        if trainer.metrics is not None:
            trainer.metrics.scalars(state.num_updates, "train", values)
        self.restart()


def _record(result: EvalResult, epoch: int) -> dict[str, float | int]:
    return {
        "epoch": epoch,
        "acc1": result.acc1,
        "acc5": result.acc5,
        "correct1": result.correct1,
        "correct5": result.correct5,
        "num_images": result.num_images,
        "loss": result.loss,
    }


def _on_device(model: nn.Module, device: torch.device) -> nn.Module:
    """An average kept in host memory is copied over for its evaluation."""
    return model if next(model.parameters()).device.type == device.type else copy.deepcopy(model).to(device)


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def format_duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
