"""Training and evaluation: the step, the epoch, the run.

Nothing in a step waits for the device: losses and norms are read when they are logged.
"""

import copy
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from utils.background import BackgroundWrite
from utils.checkpoint import BEST, checkpoint_path, link_best, remove_surplus, save_checkpoint, to_host
from utils.distributed import World, gather_on_main, on_main, side_channel, sum_over_processes
from utils.log import MetricsWriter, progress
from utils.schedule import Schedule

logger = logging.getLogger(__name__)

SEED_OF_STEP = 3  # apart from the seeds of images and of mixup
MAX_SKIPPED = 20  # updates in a row that fp16 may skip


class TrainingError(RuntimeError):
    """Training that cannot continue. The message names the update and the remedy."""


class Stopped(Exception):  # noqa: N818 - an event, not an error
    """Training was stopped from outside. The message tells where, and how it resumes."""


def check_trained(*, num_updates: int, num_skipped: int) -> None:
    """
    Raises:
        TrainingError: the weights were never changed.
    """
    if 0 < num_updates == num_skipped:
        raise TrainingError("fp16 skipped every update of this run; use AMP_DTYPE bf16, or lower TRAIN.BASE_LR")


# The best evaluation of a run: accuracy in percent, raw or ema weights, its epoch and its number of updates.
NO_BEST = {"acc1": -1.0, "weights": "", "epoch": -1, "num_updates": -1}


@dataclass
class TrainState:
    """All that the next update needs.

    Args:
        scales_loss: whether ``scaler`` has a state, as in fp16.
        num_updates: updates done, skipped ones included: the position in the data.
        num_skipped: updates that fp16 skipped; the learning rate schedule does not count them.
        last_evaluation: ``num_updates`` at the last evaluation.
        best: see ``NO_BEST``.
    """

    model: nn.Module
    optimizer: Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None
    scales_loss: bool = False
    num_updates: int = 0
    num_skipped: int = 0
    last_evaluation: int = 0
    best: dict = field(default_factory=lambda: dict(NO_BEST))

    def to_dict(self) -> dict:
        """Plain data for a checkpoint, parameters under their bare names."""
        return {
            "model": self.model.state_dict(),
            "state_dict_ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scales_loss else {},
            "num_updates": self.num_updates,
            "num_skipped": self.num_skipped,
            "last_evaluation": self.last_evaluation,
            "best": self.best,
        }

    def load_dict(self, state: dict) -> None:
        """Resume from a checkpoint, with the optimizer's options as they are configured now.

        An average that the checkpoint lacks starts from its weights.

        Raises:
            KeyError, RuntimeError: a checkpoint of another model or optimizer.
        """
        self.model.load_state_dict(state["model"])
        options = [{name: value for name, value in group.items() if name != "params"} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, configured in zip(self.optimizer.param_groups, options, strict=True):
            group.update(configured)
        if self.scales_loss and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["state_dict_ema"] or state["model"])
        self.num_updates = state["num_updates"]
        self.num_skipped = state.get("num_skipped", 0)
        self.last_evaluation = state.get("last_evaluation", self.num_updates)
        self.best = dict(state["best"])


class Report(NamedTuple):
    """Numbers of one update. loss: mean over its batches and all processes; grad_norm: L2 norm before clipping; stop, save:
    share of the processes that ask to stop, or for a checkpoint."""

    loss: float
    grad_norm: float
    stop: float
    save: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


NUM_REQUESTS = 2  # stop and save


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
    requests: Tensor | None = None,
    failed: Tensor | None = None,
) -> Tensor:
    """One optimizer update, for every precision, clipped or not, accumulated or not.

    An update changes nothing if its loss, in any process, or its gradient is not finite. In fp32 and bf16 the device decides
    that, without the host; in fp16 the host reads the norm in every update, since the loss scaler makes skipped updates
    ordinary, and EMA and schedule must skip them too.

    Args:
        model: from ``utils.distributed.wrap``.
        batches: ``num_batches`` pairs of images (B, 3, H, W), normalised, on the model's device, and targets: (B,)
            class ids, or (B, num_classes) probabilities after mixup.
        scaler: from ``utils.optim.build_scaler``; its scale is 1 unless ``amp_dtype`` is float16.
        max_grad_norm: L2 norm over all parameters; ``inf`` measures without clipping.
        requests: (2,), what this process asks for, stop and save, 0 or 1.
        failed: (), 0. Becomes NaN at the first update that is not finite in fp32 or bf16; updates change nothing from then on.

    Returns:
        (4,) numbers of a ``Report``, on the device: reading them stalls it, so the caller decides when.
    """
    device = optimizer.param_groups[0]["params"][0].device
    requests = torch.zeros(NUM_REQUESTS, device=device) if requests is None else requests
    failed = torch.zeros((), device=device) if failed is None else failed
    for index, (images, targets) in enumerate(batches):
        # Processes exchange gradients once per update, in the last backward pass.
        deferred = isinstance(model, DistributedDataParallel) and index + 1 < num_batches
        with model.no_sync() if deferred else nullcontext():
            with torch.autocast(images.device.type, dtype=amp_dtype, enabled=amp_dtype != torch.float32):
                logits, channel = model(images)
                loss = criterion(logits, targets) / num_batches
            numbers = torch.cat([loss.detach().view(1), requests / num_batches])
            (scaler.scale(loss) + channel @ numbers).backward()
    loss, *asked = side_channel(model).take()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    scaled = amp_dtype == torch.float16
    if scaled:
        scaler.unscale_(optimizer)
    grad_norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
    not_finite = 0 * (loss + grad_norm)  # 0 or NaN
    if scaled:
        if bool(not_finite == 0):
            nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm)
            scaler.step(optimizer)
        scaler.update()
    else:
        failed += not_finite
        # A norm of NaN makes every gradient NaN, which the scaler sees: its optimizer step then changes nothing.
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm + failed)
        scaler.step(optimizer)
        scaler.update(1.0)
    optimizer.zero_grad(set_to_none=True)
    return torch.stack([loss, grad_norm, *asked])


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
    stop: Callable[[], bool] = lambda: False,
) -> dict[str, EvalResult]:
    """Count right answers over a dataset that the processes share, every image once; one reduction at the end.

    Args:
        models: by the label of their weights, raw or ema; all see each batch. Not wrapped: processes may have different
            numbers of batches.
        loader: batches of this process's share.
        class_ids: the model's class for each of the dataset's; answers are among those. None: they are the same.
        keep_answers: give rank 0 every image's answer too.
        stop: whether this process was asked to stop.

    Returns:
        A result for each model, the same in every process, but for the answers.

    Raises:
        Stopped: in every process, if any was asked to stop.
        TrainingError: in every process, if a model gives outputs that are not finite.
    """
    were_training = {label: model.training for label, model in models.items()}
    # Correct at 1, correct at 5, sum of losses, images with outputs that are not finite: counts are exact in float64.
    sums = {label: torch.zeros(4, dtype=torch.float64, device=world.device) for label in models}
    answers: dict[str, list[Tensor]] = {label: [] for label in models}
    indices, targets = [], []
    num_classes = 0
    chosen = None if class_ids is None else torch.tensor(class_ids, device=world.device)
    num_images, stopping = 0, False
    for model in models.values():
        model.eval()
    for batch in progress(loader, len(loader), "evaluate"):
        if stopping := stop():
            break
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
            not_finite = (~logits.isfinite()).any(dim=1).sum()
            sums[label] += torch.stack([right[:, 0].sum(), right.sum(), loss, not_finite]).double()
            if keep_answers:
                answers[label].append(torch.cat([ranked.double(), logits.softmax(dim=1).amax(dim=1, keepdim=True)], dim=1))
    # A process may have no batches, and then does not know the number of classes.
    counts = torch.tensor([num_images, num_classes, num_classes > 0, stopping], device=world.device)
    total, class_sum, num_sharing, num_stopping = sum_over_processes(counts).tolist()
    for label, model in models.items():
        model.train(were_training[label])
    if num_stopping:
        raise Stopped("stopped during evaluation")
    num_classes = class_sum // num_sharing
    results = {}
    for label in models:
        correct1, correct5, loss, not_finite = sum_over_processes(sums[label]).tolist()
        if not_finite:
            raise TrainingError(
                f"the {label} weights give outputs that are not finite for {int(not_finite)} of {total} images: accuracy is "
                "undefined; evaluate another checkpoint, or in fp32 (TEST.PRECISION fp32)"
            )
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
    save_minutes: float
    eval_freq: int
    keep_checkpoints: int


class Reports:
    """Reports of updates on their way from the device to the host.

    The host reads the report of an update after it has launched the next one, so that the device always has work.
    """

    def __init__(self) -> None:
        self._sent: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def send(self, update: int, report: Tensor) -> None:
        """Start to copy the (4,) report of an update, counted from 0."""
        copied = None
        if report.device.type == "cuda":
            report = report.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._sent.append((update, report, copied))

    def receive(self, *, keep: int) -> Iterator[tuple[int, Report]]:
        """Updates and their reports, but for the newest ``keep``, in the order in which they were sent."""
        while len(self._sent) > keep:
            update, report, copied = self._sent.popleft()
            if copied is not None:
                copied.synchronize()
            yield update, Report(*report.tolist())


class Trainer:
    """A run from where its state stands to its end.

    Args:
        model: ``state.model`` as it trains: from ``utils.distributed.wrap``, or compiled.
        mixup: mixes a batch by the number of its forward pass; None for no mixing.
        metrics: where numbers are written, on rank 0.
        header: what every checkpoint carries besides the state (the config, the shape of the run).
        stop: whether this process was asked to stop.
        draw: names and matplotlib figures of a model, which the metrics show after each evaluation; None for no figures.
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
        stop: Callable[[], bool] = lambda: False,
        draw: Callable[[nn.Module], Iterable[tuple[str, object]]] | None = None,
    ):
        self.state = state
        self.model = model
        self.criterion = criterion
        self.schedule = schedule
        self.train_loader = train_loader
        self.val_loader = val_loader
        self.mixup = mixup
        self.recipe = recipe
        self.world = world
        self.output = output
        self.metrics = metrics
        self.header = header
        self.stop = stop
        self.draw = draw
        self.updates_per_epoch = train_loader.updates_per_epoch
        self.phase = "start-up"
        self.reports = Reports()
        self.writing = BackgroundWrite()  # of the newest checkpoint, on rank 0
        self.failed = torch.zeros((), device=world.device)  # see train_step
        self.skipped_in_a_row = 0
        self.last_save = time.monotonic()

    def fit(self) -> None:
        """Train what is left of the run, evaluating and saving on the way.

        Raises:
            Stopped: in every process, if one was asked to stop; the state is saved.
            TrainingError: an update that is not finite, or too many that fp16 skipped.
        """
        state = self.state
        if sum_over_processes(torch.tensor(float(self.stop()), device=self.world.device)) > 0:
            raise Stopped("stopped before the first update")
        self.last_save = started = time.monotonic()
        done_epochs, in_epoch = divmod(state.num_updates, self.updates_per_epoch)
        if done_epochs and not in_epoch:
            self.finish_epoch(done_epochs - 1)  # what a stop at the end of the epoch left undone
        for epoch in range(done_epochs, self.recipe.num_epochs):
            self.train_epoch(epoch)
            self.finish_epoch(epoch)
        if state.last_evaluation != state.num_updates:  # TRAIN.EPOCHS was lowered below the position of the run
            self.save(best=self.evaluate(done_epochs))
        self.finish_saving()
        check_trained(num_updates=state.num_updates, num_skipped=state.num_skipped)
        best = state.best
        logger.info(
            "done in %s; best Acc@1 %.3f (%s weights, epoch %d)",
            format_duration(time.monotonic() - started),
            best["acc1"],
            best["weights"],
            best["epoch"],
        )

    def finish_epoch(self, epoch: int) -> None:
        """Evaluate and save at the end of an epoch, as often as the recipe asks, and once only."""
        last = epoch + 1 >= self.recipe.num_epochs
        saving = last or (epoch + 1) % self.recipe.save_freq == 0
        if last or (epoch + 1) % self.recipe.eval_freq == 0:
            if self.state.last_evaluation != self.state.num_updates:
                improved = self.evaluate(epoch)
                if saving or improved:
                    self.save(best=improved)
        elif saving and not on_main(self.world, checkpoint_path(self.output, self.state.num_updates).is_file):
            self.save()

    def train_epoch(self, epoch: int) -> None:
        """The updates of one epoch that are still to do."""
        state, recipe = self.state, self.recipe
        self.phase = "training"
        first_update = state.num_updates - epoch * self.updates_per_epoch
        self.train_loader.set_position(epoch, first_update)
        self.model.train()
        meter = Meter(epoch, self)
        batches = self.mixed_batches(iter(self.train_loader), meter)
        updates = range(first_update, self.updates_per_epoch)
        for update in progress(updates, len(updates), f"epoch {epoch}/{recipe.num_epochs}", seconds_between_lines=math.inf):
            self.update(batches)
            done = update + 1
            saving = recipe.save_steps > 0 and done % recipe.save_steps == 0
            logging_now = saving or done % recipe.print_freq == 0 or done == self.updates_per_epoch
            reports = self.receive(keep=0 if logging_now or state.scales_loss else 1)
            meter.add(reports)
            if any(report.stop > 0 for report in reports):
                self.save_and_stop(meter)
            saving = saving or any(report.save > 0 for report in reports)
            if logging_now or saving:
                meter.add(self.receive(keep=0))
                meter.log()
            if saving and done < self.updates_per_epoch:
                self.save()
                meter.restart()

    def update(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Launch one update, with as many of the batches as it takes."""
        state, recipe = self.state, self.recipe
        learning_rate = self.learning_rate(state.num_updates)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        report = train_step(
            self.model,
            self.criterion,
            state.optimizer,
            state.scaler,
            (next(batches) for _ in range(recipe.accumulation)),
            num_batches=recipe.accumulation,
            amp_dtype=recipe.amp_dtype,
            max_grad_norm=recipe.max_grad_norm,
            requests=self.requests(),
            failed=self.failed,
        )
        self.reports.send(state.num_updates, report)
        state.num_updates += 1
        if state.scales_loss and not Report(*report.tolist()).is_finite:
            state.num_skipped += 1
            self.skipped_in_a_row += 1
            return
        self.skipped_in_a_row = 0
        if state.ema is not None:
            state.ema.update(state.model)

    def learning_rate(self, num_updates: int) -> float:
        """The rate of the update after ``num_updates``, for parameter groups without a multiplier."""
        return self.schedule(num_updates - self.state.num_skipped)

    def requests(self) -> Tensor:
        """(2,) what this process asks all others for: to stop, and, on rank 0, for a checkpoint.

        The next save reports a failure of the last one to all, so it follows at once.
        """
        due = 0 < 60 * self.recipe.save_minutes < time.monotonic() - self.last_save
        saving = (due or self.writing.failed) and self.world.is_main
        if saving:
            self.last_save = time.monotonic()  # ask once
        requests = torch.zeros(NUM_REQUESTS, device=self.world.device)
        for position, asked in enumerate((self.stop(), saving)):
            if asked:
                requests[position] = 1
        return requests

    def receive(self, *, keep: int) -> list[Report]:
        """Reports of the updates so far, but for the newest ``keep``.

        Raises:
            TrainingError: in every process, for an update that is not finite, with the file that repeats it.
        """
        reports = []
        for update, report in self.reports.receive(keep=keep):
            if not report.is_finite and (not self.state.scales_loss or self.skipped_in_a_row >= MAX_SKIPPED):
                self.fail(update, report)
            reports.append(report)
        return reports

    def fail(self, update: int, report: Report) -> None:
        """Save what repeats an update that is not finite, and end the run."""
        epoch = update // self.updates_per_epoch
        path = self.output / f"replay_{update:09d}.pth"
        on_main(self.world, lambda: save_checkpoint(self.describe_update(update), path))
        position = f"update {update} (epoch {epoch}, both counted from 0)"
        what = f"the loss is {report.loss} and the gradient norm {report.grad_norm} at {position}"
        advice = "Lower TRAIN.BASE_LR, set TRAIN.CLIP_GRAD, or look at the images that the replay lists"
        if self.state.scales_loss:
            what = f"{MAX_SKIPPED} updates in a row had gradients that are not finite in fp16, the last at {position}"
            advice = "Use AMP_DTYPE bf16, or lower TRAIN.BASE_LR"
        raise TrainingError(
            f"{what}. It changed no weights, and the checkpoints are untouched. main.py --replay {path} repeats it and names "
            f"the first module whose output is not finite. {advice}"
        )

    def describe_update(self, update: int) -> dict:
        """Weights, position and images of an update: what ``--replay`` needs."""
        name = self.train_loader.loader.dataset.index.name
        epoch, first_update = divmod(update, self.updates_per_epoch)
        images = []  # names by process and forward pass
        for rank in range(self.world.size):
            sampler = copy.copy(self.train_loader.loader.batch_sampler)
            sampler.rank = rank
            sampler.set_position(epoch, first_update)
            images.append([[name(index) for _, index in keys] for keys in islice(sampler, self.recipe.accumulation)])
        return {
            "model": self.state.model.state_dict(),
            "replay": {"update": update, "epoch": epoch, "images": images},
            **self.header,
        }

    def mixed_batches(self, batches: Iterator, meter: "Meter") -> Iterator[tuple[Tensor, Tensor]]:
        """Images and targets of every forward pass, the model's own draws (drop path, dropout) seeded for each."""
        forward_pass = self.state.num_updates * self.recipe.accumulation
        while True:
            batch = next(batches, None)
            if batch is None:
                return
            if forward_pass == 0:
                self.show_batch(batch.images)
            meter.images += len(batch.images) * self.world.size
            yield prepare_batch(batch, self.mixup, seed=self.recipe.seed, forward_pass=forward_pass, rank=self.world.rank)
            forward_pass += 1

    def show_batch(self, images: Tensor) -> None:
        """The first images after augmentation, as a grid, each stretched to its own range."""
        if self.metrics is None:
            return
        from torchvision.utils import make_grid

        grid = make_grid(images[:16].float().cpu(), nrow=4, normalize=True, scale_each=True)
        self.metrics.image("first_batch", grid, 0)

    def show_figures(self) -> None:
        """Draw the model; a failure, such as a lack of memory, is logged once and ends nothing."""
        try:
            for name, figure in self.draw(self.state.model):
                self.metrics.figure(name, figure, self.state.num_updates)
        except Exception as error:
            logger.warning("no more figures of the model: %s", error)
            self.draw = None

    def evaluate(self, epoch: int) -> bool:
        """Evaluate raw weights and their average. True where one of them is the best so far.

        Raises:
            Stopped: in every process, if one was asked to stop; the state before the evaluation is saved.
        """
        state = self.state
        self.phase = "evaluation"
        models = {"raw": state.model}
        if state.ema is not None:
            models["ema"] = _on_device(state.ema.module, self.world.device)
        try:
            results = evaluate(models, self.val_loader, amp_dtype=self.recipe.eval_dtype, world=self.world, stop=self.stop)
        except Stopped:
            self.save_and_stop()
        log_results(results)
        improved = False
        for weights, result in results.items():
            if self.metrics is not None:
                self.metrics.scalars(state.num_updates, f"eval_{weights}", _record(result, epoch))
            if result.acc1 >= state.best["acc1"]:  # on ties, prefer the later epoch
                improved = True
                position = {"epoch": epoch, "num_updates": state.num_updates}
                state.best = {"acc1": result.acc1, "weights": weights, **position}
        if self.metrics is not None and self.draw is not None:
            self.show_figures()
        state.last_evaluation = state.num_updates
        return improved

    def save(self, *, best: bool = False) -> None:
        """Copy the state to host memory, and write it and delete surplus checkpoints in the background.

        Raises:
            CheckpointError, OtherRankError: the previous checkpoint could not be written.
        """
        self.phase = "saving"
        on_main(self.world, lambda: self.start_saving(best=best))
        self.phase = "training"
        self.last_save = time.monotonic()

    def start_saving(self, *, best: bool) -> None:
        self.writing.wait()
        state = to_host(self.state.to_dict() | self.header, copy=True)
        path = checkpoint_path(self.output, self.state.num_updates)
        self.writing.start(partial(write_checkpoint, state, path, best=best, keep=self.recipe.keep_checkpoints))

    def finish_saving(self) -> None:
        """Wait until the newest checkpoint is written.

        Raises:
            CheckpointError, OtherRankError: it could not be written.
        """
        self.phase = "saving"
        on_main(self.world, self.writing.wait)

    def save_and_stop(self, meter: "Meter | None" = None) -> NoReturn:
        """Save the state in the middle of an epoch, or before an evaluation, and end the run.

        Raises:
            Stopped: always.
        """
        phase = self.phase
        if meter is not None:
            meter.add(self.receive(keep=0))
            meter.log()
        self.save()
        self.finish_saving()
        raise Stopped(
            f"stopped in {phase} after update {self.state.num_updates}, which is saved; the same command resumes there"
        )


def write_checkpoint(state: dict, path: Path, *, best: bool, keep: int) -> None:
    """Write a numbered checkpoint, as best.pth too if it is the best, then delete all but the ``keep`` newest.

    It runs in another thread. A reference to the trainer would let that thread destroy it, and with it the loaders.

    Raises:
        CheckpointError: it could not be written.
    """
    started = time.monotonic()
    save_checkpoint(state, path)
    if best:
        link_best(path, path.parent / BEST)
    remove_surplus(path.parent, keep)
    logger.info("saved %s%s in %.1f s", path, " (and as best.pth)" if best else "", time.monotonic() - started)


def prepare_batch(
    batch,
    mixup: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]] | None,
    *,
    seed: int,
    forward_pass: int,
    rank: int,
) -> tuple[Tensor, Tensor]:
    """Images and targets of one forward pass, mixed; seeds torch for the draws of the model (drop path, dropout)."""
    images, targets = batch.images, batch.targets
    if mixup is not None:
        images, targets = mixup(images, targets, forward_pass)
    position = (seed, forward_pass, rank, SEED_OF_STEP)
    torch.manual_seed(int(np.random.SeedSequence(position).generate_state(1)[0]))
    return images, targets


class Meter:
    """What happened since the last line of the log."""

    def __init__(self, epoch: int, trainer: Trainer):
        self.epoch = epoch
        self.trainer = trainer
        self.restart()

    def restart(self) -> None:
        self.started = time.monotonic()
        self.waited_before = self.trainer.train_loader.seconds_waited
        self.images = 0
        self.reports: list[Report] = []

    def add(self, reports: Iterable[Report]) -> None:
        self.reports += reports

    def log(self) -> None:
        """Write what was gathered to the log and the metrics, and start again."""
        trainer, state = self.trainer, self.trainer.state
        if not self.reports:
            return
        seconds = time.monotonic() - self.started
        done = state.num_updates - self.epoch * trainer.updates_per_epoch
        left = trainer.recipe.num_epochs * trainer.updates_per_epoch - state.num_updates
        finite = [report.loss for report in self.reports if report.is_finite]  # the others were skipped, in fp16
        values = {
            "epoch": self.epoch,
            "loss": sum(finite) / len(finite) if finite else math.nan,
            "lr": trainer.learning_rate(state.num_updates - 1),
            "grad_norm": self.reports[-1].grad_norm,
            "images_per_second": self.images / seconds,
            "data_wait": (trainer.train_loader.seconds_waited - self.waited_before) / seconds,
            "memory_mib": _peak_memory(trainer.world.device) / 2**20,
        }
        if state.scales_loss:
            values["loss_scale"] = state.scaler.get_scale()
            values["skipped_updates"] = state.num_skipped
        logger.info(
            "epoch %d/%d [%d/%d] loss %.4f lr %.3e grad norm %.3f | %.1f images/s, %.0f %% waiting for data, %.0f MiB, ETA %s",
            self.epoch,
            trainer.recipe.num_epochs,
            done,
            trainer.updates_per_epoch,
            values["loss"],
            values["lr"],
            values["grad_norm"],
            values["images_per_second"],
            100 * values["data_wait"],
            values["memory_mib"],
            format_duration(left * seconds / len(self.reports)),
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
