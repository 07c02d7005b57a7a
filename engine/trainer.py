"""The training loop: from the current state of a run to its end, with evaluation, checkpoints and logs."""

import copy
import logging
import math
import shlex
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import NoReturn

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.checkpoint_writer import link_best, remove_surplus, save_checkpoint, to_host
from engine.evaluation import EvalResult, evaluate, log_results
from engine.metrics_writer import MetricsWriter
from engine.remaining_work import remaining_work
from engine.run_directory import record_save
from engine.schedule import Schedule
from engine.step import Report, Reports, Requests, train_step
from models.checkpoints.reader import CheckpointError
from utils.background import BackgroundWrite
from utils.distributed import World, is_lost_connection, on_main, sum_over_processes
from utils.errors import OtherRankError, Stopped, TrainingError, one_line
from utils.progress import progress
from utils.random import seed_of_pass
from utils.run_files import BEST, checkpoint_path

logger = logging.getLogger(__name__)

# Function: images, targets, number of the forward pass -> mixed images and targets.
Mixing = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]
MAX_SKIPPED = 20  # the run ends after this many consecutive updates with non-finite gradients in fp16
SLOW_UPDATE = 5.0  # seconds; see ``Trainer.save_before_slow_update``
SHARE_OF_TIMEOUT = 0.9  # of the timeout of collectives; NCCL aborts the process once all of it has passed


def check_trained(*, num_updates: int, num_skipped: int) -> None:
    """Check that training changed the weights.

    Raises:
        TrainingError: fp16 skipped every update.
    """
    if 0 < num_updates == num_skipped:
        raise TrainingError("fp16 skipped every update of this run; use AMP_DTYPE bf16, or lower TRAIN.BASE_LR")


# Value of ``TrainState.best`` before the first evaluation. Entries: top-1 accuracy in percent, label of the weights (raw or
# ema), epoch, and number of updates.
NO_BEST = {"acc1": -1.0, "weights": "", "epoch": -1, "num_updates": -1}


@dataclass
class TrainState:
    """Complete state of a run at the end of an update.

    Args:
        scales_loss: whether the loss is scaled (fp16); only then do checkpoints contain the state of ``scaler``.
        num_updates: number of updates so far, including skipped ones; it determines the position in the data.
        num_skipped: number of updates skipped in fp16 (non-finite gradients); the learning-rate schedule does not count them.
        last_evaluation: ``num_updates`` at the last evaluation.
        best: the best evaluation so far, see ``NO_BEST``.
        evaluations: all evaluations so far, as in ``metrics.jsonl``. That file is restored from them on resume.
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
    evaluations: list[dict] = field(default_factory=list)

    def to_dict(self) -> dict:
        """State dicts and counters for a checkpoint; parameter names have no prefixes of DDP or ``torch.compile``."""
        return {
            "model": self.model.state_dict(),
            "state_dict_ema": self.ema.module.state_dict() if self.ema else None,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict() if self.scales_loss else {},
            "num_updates": self.num_updates,
            "num_skipped": self.num_skipped,
            "last_evaluation": self.last_evaluation,
            "best": self.best,
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
        if self.scales_loss and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.module.load_state_dict(state["state_dict_ema"] or state["model"])
        self.num_updates = state["num_updates"]
        self.num_skipped = state.get("num_skipped", 0)
        self.last_evaluation = state.get("last_evaluation", self.num_updates)
        self.best = dict(state["best"])
        self.evaluations = list(state.get("evaluations", []))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Settings of the training loop; ``num_epochs`` includes the cooldown epochs.

    Units: updates (``print_freq``, ``save_steps``), epochs (``save_freq``, ``eval_freq``), minutes (``save_minutes``).
    """

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


class Trainer:
    """Trains from the current state to the end of the run.

    Args:
        model: ``state.model``, compiled and wrapped by ``utils.distributed.wrap``.
        mixup: mixes a batch, given the number of its forward pass; None for no mixing.
        metrics: writer of ``metrics.jsonl`` and TensorBoard events; None on ranks other than 0 and in a dry run.
        metadata: entries of every checkpoint besides the state, such as config, class names and global batch size.
        stop: returns whether a signal requested a stop of this process.
        draw: returns (name, matplotlib figure) pairs for a model, to write after each evaluation; None for no figures.
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
        mixup: Mixing | None,
        recipe: Recipe,
        world: World,
        output: Path,
        metrics: MetricsWriter | None = None,
        metadata: dict,
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
        self.metadata = metadata
        self.stop = stop
        self.draw = draw
        self.updates_per_epoch = train_loader.updates_per_epoch
        self.phase = "start-up"
        self.reports = Reports(SHARE_OF_TIMEOUT * world.timeout_seconds if world.size > 1 else math.inf)
        self.background_write = BackgroundWrite()  # writes checkpoints, on rank 0
        self.failed = torch.zeros((), device=world.device)  # see train_step
        self.skipped_in_a_row = 0
        self.last_save = time.monotonic()
        # Called before every write of a file to ``output``; raises if the path no longer is the run's directory.
        self.check_output: Callable[[], None] = lambda: None
        self.saved_updates = state.num_updates  # number of updates in the newest checkpoint, or in the one being written
        self.changing_state = False  # whether an update has changed a part of the state, but not yet all of it
        self.sent_stop = False  # whether the newest update carried a request of this process to stop

    def fit(self) -> None:
        """Train the remaining epochs, with evaluation and checkpoints.

        After any error between two updates, rank 0 saves the state, see ``save_after_error``.

        Raises:
            Stopped: in every process, if any process was asked to stop; all updates so far are saved.
            TrainingError: the loss or gradient of an update is not finite, or fp16 skipped too many updates.
            CheckpointError, OtherRankError: a checkpoint could not be written.
        """
        try:
            self.run_epochs()
        except BaseException as error:
            self.save_after_error(error)
            raise

    def run_epochs(self) -> None:
        """Train, evaluate and save until the run is finished. Raises: see ``fit``."""
        state = self.state
        if self.any_process_stops():
            raise Stopped("stopped before the first update")
        self.last_save = started = time.monotonic()
        self.finish_epoch()  # not done yet if the run was stopped after the last update of an epoch
        first_epoch = state.num_updates // self.updates_per_epoch
        for epoch in range(first_epoch, self.recipe.num_epochs):
            if epoch > first_epoch and self.any_process_stops():
                self.save_and_stop()
            self.train_epoch(epoch)
            self.finish_epoch()
        self.finish_saving()
        check_trained(num_updates=state.num_updates, num_skipped=state.num_skipped)
        best = state.best
        logger.info(
            "done; training in this process took %s; best Acc@1 %.3f (%s weights, epoch %d)",
            format_duration(time.monotonic() - started),
            best["acc1"],
            best["weights"],
            best["epoch"],
        )

    def finish_epoch(self) -> None:
        """Evaluate and save if ``remaining_work`` says so. A new best accuracy is always saved.

        The state is also saved before an evaluation, so that nothing is lost if it fails. The checkpoint with the result then
        replaces that one; both have the same number of updates, and thus the same name.
        """
        state, recipe = self.state, self.recipe
        work = remaining_work(
            state.num_updates,
            updates_per_epoch=self.updates_per_epoch,
            num_epochs=recipe.num_epochs,
            eval_freq=recipe.eval_freq,
            save_freq=recipe.save_freq,
            is_evaluated=state.last_evaluation == state.num_updates,
            is_saved=self.is_saved,
        )
        improved = False
        if work.evaluate:
            if not self.is_saved:
                self.save()
            improved = self.evaluate((state.num_updates - 1) // self.updates_per_epoch)
        if work.save or improved:
            self.save(best=improved)

    def train_epoch(self, epoch: int) -> None:
        """Run the remaining updates of an epoch."""
        state, recipe = self.state, self.recipe
        self.phase = "training"
        first_update = state.num_updates - epoch * self.updates_per_epoch
        self.train_loader.set_position(epoch, first_update)
        self.model.train()
        meter = Meter(epoch, self)
        batches = iter(self.train_loader)
        if state.num_updates == 0:
            first = next(batches)
            self.show_batch(first.images)
            batches = chain([first], batches)
            del first  # otherwise this reference would keep the batch in device memory
        batches = self.mixed_batches(batches)
        updates = range(first_update, self.updates_per_epoch)
        for update in progress(updates, len(updates), f"epoch {epoch}/{recipe.num_epochs}", seconds_between_lines=math.inf):
            started = time.monotonic()
            self.update(batches)
            if self.all_processes_stop():
                self.save_and_stop(meter)
            seconds = time.monotonic() - started
            done = update + 1
            saving = recipe.save_steps > 0 and done % recipe.save_steps == 0
            logging_now = saving or done % recipe.print_freq == 0 or done == self.updates_per_epoch
            reports = self.collect_reports(max_pending=0 if logging_now or state.scales_loss else 1)
            meter.add(reports)
            if any(report.num_stops > 0 for report in reports):
                self.save_and_stop(meter)
            self.save_before_slow_update(seconds)
            saving = saving or any(report.num_saves > 0 for report in reports)
            if logging_now or saving:
                meter.add(self.collect_reports(max_pending=0))
                meter.log()
            if saving and done < self.updates_per_epoch:
                self.save()
                meter.restart()

    def mixed_batches(self, batches: Iterable) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and targets after mixup, for each forward pass from the current position of the run."""
        return mix_batches(batches, self.mixup, forward_pass=self.state.num_updates * self.recipe.accumulation)

    def update(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        """Launch one update on the next batches, and update the EMA.

        In fp16, an update with a non-finite loss or gradient is skipped, and the EMA is not updated.
        """
        state, recipe = self.state, self.recipe
        forward_passes = range(state.num_updates * recipe.accumulation, (state.num_updates + 1) * recipe.accumulation)
        learning_rate = self.learning_rate(state.num_updates)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        report = train_step(
            self.model,
            self.criterion,
            state.optimizer,
            state.scaler,
            islice(batches, recipe.accumulation),
            seeds=[seed_of_pass(recipe.seed, number, self.world.rank) for number in forward_passes],
            amp_dtype=recipe.amp_dtype,
            max_grad_norm=recipe.max_grad_norm,
            requests=self.requests,
            begin_change=self.begin_change,
            failed=None if state.scales_loss else self.failed,
        )
        self.reports.send(state.num_updates, report)
        state.num_updates += 1
        if state.scales_loss and not self.reports.read_newest().is_finite:
            state.num_skipped += 1
            self.skipped_in_a_row += 1
        else:
            self.skipped_in_a_row = 0
            if state.ema is not None:
                state.ema.update(state.model)
        self.changing_state = False

    def begin_change(self) -> None:
        """Note that an update starts to change the state, which is incomplete from now on until the end of ``update``."""
        self.changing_state = True

    def learning_rate(self, num_updates: int) -> float:
        """Learning rate of update ``num_updates`` (counted from 0), to be multiplied by each parameter group's ``lr_scale``."""
        return self.schedule(num_updates - self.state.num_skipped)

    def requests(self) -> Requests:
        """Requests of this process to stop, and (only on rank 0) to save a checkpoint, sent with an update.

        If the last checkpoint write failed, a save is requested immediately, so that ``save`` raises the error of the
        failed write in all processes.
        """
        due = 0 < 60 * self.recipe.save_minutes < time.monotonic() - self.last_save
        saving = (due or self.background_write.failed) and self.world.is_main
        if saving:
            self.last_save = time.monotonic()  # request the save only once
        self.sent_stop = self.stop()
        return Requests(stop=self.sent_stop, save=saving)

    def any_process_stops(self) -> bool:
        """Whether any process was asked to stop. The result is the same in all processes, which wait for each other."""
        return sum_over_processes(torch.tensor(float(self.stop()), device=self.world.device)).item() > 0

    def all_processes_stop(self) -> bool:
        """Whether every process was asked to stop before it had sent its requests with the newest update.

        All processes then know it, so they can stop at once. A process that was not asked to stop reads the report only after
        the next update, so that it does not wait for its device; if there is such a process, all stop after that update.
        """
        if self.world.size == 1:
            return self.stop()
        return self.sent_stop and self.reports.read_newest().num_stops == self.world.size

    def save_before_slow_update(self, update_seconds: float) -> None:
        """If this process is rank 0, was asked to stop and must take part in another, slow update, save before that update.

        ``torchrun`` kills its processes 30 seconds after it has passed on a signal. Nothing is saved here if the previous write
        has failed (``requests`` then requests a save, in which all processes raise the error), or if the loss or gradient of
        the newest update is not finite.

        Args:
            update_seconds: duration of the previous update.
        """
        if not (self.stop() and update_seconds > SLOW_UPDATE and self.world.is_main):
            return
        self.background_write.join()
        if not self.background_write.failed and not bool(self.failed):
            self.start_saving(best=False)

    def collect_reports(self, *, max_pending: int) -> list[Report]:
        """Reports that were not collected yet, except for those of the newest ``max_pending`` updates.

        Raises:
            TrainingError: in every process, if the loss or gradient of an update is not finite in fp32 or bf16, or if fp16 has
                skipped ``MAX_SKIPPED`` updates in a row. The message names the replay file.
        """
        reports = []
        for update, report in self.reports.collect_reports(max_pending=max_pending):
            if not report.is_finite and (not self.state.scales_loss or self.skipped_in_a_row >= MAX_SKIPPED):
                self.fail(update, report)
            reports.append(report)
        return reports

    def fail(self, update: int, report: Report) -> None:
        """Write the replay file of an update with a non-finite loss or gradient, and end the run.

        Raises:
            TrainingError: always.
        """
        epoch = update // self.updates_per_epoch
        path = self.output / f"replay_{update:09d}.pth"
        failure = on_main(self.world, partial(self.save_replay_file, update, path))
        position = f"update {update} (epoch {epoch}, both counted from 0)"
        what = f"the loss is {report.loss} and the gradient norm {report.grad_norm} at {position}"
        data_path = self.metadata.get("config", {}).get("DATA", {}).get("DATA_PATH", "DIR")
        command = f"main.py --replay {shlex.quote(str(path))} --data-path {shlex.quote(data_path)}"
        replay = f"{command} repeats the update and names the first module whose output is not finite"
        if failure:
            replay = f"The file for --replay could not be written ({failure})"
        advice = "Lower TRAIN.BASE_LR, set TRAIN.CLIP_GRAD, or inspect the images that --replay lists"
        if failure:
            advice = "Lower TRAIN.BASE_LR, or set TRAIN.CLIP_GRAD"
        if self.state.scales_loss:
            what = f"{MAX_SKIPPED} updates in a row had gradients that are not finite in fp16, the last at {position}"
            advice = f"Use AMP_DTYPE bf16, or lower TRAIN.BASE_LR. {self.advise_after_divergence()}"
        raise TrainingError(f"{what}. The update changed no weights, and the checkpoints are untouched. {replay}. {advice}")

    def advise_after_divergence(self) -> str:
        """How to continue if the newest checkpoints contain weights that have diverged."""
        best = self.state.best["num_updates"]
        if best < 0:
            return "If the weights have diverged, start a new run with a lower TRAIN.BASE_LR and another --tag"
        return (
            f"If the weights have diverged since the best evaluation, delete the checkpoints in {self.output} that are later "
            f"than update {best}: the same command with a lower TRAIN.BASE_LR then resumes from the best checkpoint"
        )

    def save_replay_file(self, update: int, path: Path) -> str:
        """The part of ``fail`` that runs on rank 0. Returns the reason if the file could not be written, else ""."""
        try:
            self.check_output()
            save_checkpoint(self.describe_update(update), path)
        except Exception as error:  # it must not hide the error that ends the run
            return one_line(error.__cause__ or error)
        return ""

    def describe_update(self, update: int) -> dict:
        """Weights, position and images of an update, for ``--replay``."""
        name = self.train_loader.loader.dataset.index.name
        epoch, first_update = divmod(update, self.updates_per_epoch)
        images = []  # [rank][forward pass] -> image names
        for rank in range(self.world.size):
            sampler = copy.copy(self.train_loader.loader.batch_sampler)
            sampler.rank = rank
            sampler.set_position(epoch, first_update)
            images.append([[name(index) for _, index in keys] for keys in islice(sampler, self.recipe.accumulation)])
        return {
            "model": self.state.model.state_dict(),
            "replay": {"update": update, "epoch": epoch, "images": images},
            **self.metadata,
        }

    def show_batch(self, images: Tensor) -> None:
        """Write a grid of the first augmented images to TensorBoard, each scaled to [0, 1] by its own minimum and maximum."""
        if self.metrics is None:
            return
        from torchvision.utils import make_grid

        grid = make_grid(images[:16].float().cpu(), nrow=4, normalize=True, scale_each=True)
        self.metrics.image("first_batch", grid, 0)

    def show_figures(self) -> None:
        """Write the figures of ``draw`` to TensorBoard. Draw no further figures after an error, such as out of memory."""
        try:
            for name, figure in self.draw(self.state.model):
                self.metrics.figure(name, figure, self.state.num_updates)
        except Exception as error:
            logger.warning("attention pictures are disabled after an error: %s", error)
            self.draw = None

    def evaluate(self, epoch: int) -> bool:
        """Evaluate raw and EMA weights.

        Returns:
            Whether raw or EMA weights reach or exceed the best accuracy so far.

        Raises:
            Stopped: in every process, if any process was asked to stop; the state before the evaluation is saved.
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
        except TrainingError as error:
            raise TrainingError(f"{error}. {self.advise_after_divergence()}") from None
        log_results(results)
        improved = False
        for weights, result in results.items():
            kind, record = f"eval_{weights}", _record(result, epoch)
            state.evaluations.append({"step": state.num_updates, "kind": kind, **record})
            if self.metrics is not None:
                self.metrics.scalars(state.num_updates, kind, record)
            if result.acc1 >= state.best["acc1"]:  # on ties, prefer the later epoch
                improved = True
                position = {"epoch": epoch, "num_updates": state.num_updates}
                state.best = {"acc1": result.acc1, "weights": weights, **position}
        if self.metrics is not None and self.draw is not None:
            self.show_figures()
        state.last_evaluation = state.num_updates
        return improved

    def save(self, *, best: bool = False) -> None:
        """Copy the state to host memory and return; a background thread of rank 0 writes it and deletes surplus checkpoints.

        Args:
            best: whether to link the checkpoint as ``best.pth`` too.

        Raises:
            CheckpointError, OtherRankError: the previous checkpoint could not be written.
        """
        self.phase = "saving"
        on_main(self.world, lambda: self.start_saving(best=best))
        self.phase = "training"
        self.last_save = time.monotonic()
        self.saved_updates = self.state.num_updates

    @property
    def is_saved(self) -> bool:
        """Whether a checkpoint of the current number of updates is saved or being written."""
        return self.saved_updates == self.state.num_updates

    def start_saving(self, *, best: bool) -> None:
        """The part of ``save`` that runs on rank 0."""
        self.background_write.wait()
        state = to_host(self.state.to_dict() | self.metadata, copy=True)
        path = checkpoint_path(self.output, self.state.num_updates)
        write = partial(write_checkpoint, state, path, best=best, keep=self.recipe.keep_checkpoints)
        flush_metrics = self.metrics.flush if self.metrics is not None else lambda: None
        self.background_write.start(partial(write, check_output=self.check_output, flush_metrics=flush_metrics))

    def save_after_error(self, error: BaseException) -> None:
        """Save the last complete update after an unexpected error, if it is not saved yet. Never raises an error.

        Only rank 0 saves, and without any collective operation, so it does not matter what the other processes do. The state
        is not saved if it may be incomplete: after an error in the part of an update that changes it, after any CUDA error,
        and after a lost connection on GPUs, where kernels run later than the host.

        The write runs in the background; ``background_write.close`` waits for it.

        Args:
            error: the error that ends the run.
        """
        expected = isinstance(error, (Stopped, TrainingError, CheckpointError, OtherRankError))
        device_failed = self.world.device.type == "cuda" and (
            isinstance(error, torch.AcceleratorError) or (isinstance(error, Exception) and is_lost_connection(error))
        )
        if not self.world.is_main or expected or device_failed or self.changing_state or self.is_saved:
            return
        try:
            if bool(self.failed):  # the updates since the one that failed have changed nothing
                return
            logger.warning("saving the state after update %d before this process ends with an error", self.state.num_updates)
            self.background_write.close()  # waits for a limited time, unlike ``wait``
            if not self.background_write.is_writing:
                self.start_saving(best=False)
        except BaseException as second:
            logger.warning("the state could not be saved (%s: %s)", type(second).__name__, second)

    def finish_saving(self) -> None:
        """Wait until the newest checkpoint is written.

        Raises:
            CheckpointError, OtherRankError: the checkpoint could not be written.
        """
        self.phase = "saving"
        on_main(self.world, self.background_write.wait)

    def save_and_stop(self, meter: "Meter | None" = None) -> NoReturn:
        """Save the state in the middle of an epoch, or before an evaluation, and end the run.

        Raises:
            Stopped: always.
        """
        phase = self.phase
        if meter is not None:
            meter.add(self.collect_reports(max_pending=0))
            meter.log()
        if not self.is_saved:
            self.save()
        self.finish_saving()
        raise Stopped(
            f"stopped in {phase}; the checkpoint after update {self.state.num_updates} is saved, and the same command resumes "
            "the run"
        )


def write_checkpoint(
    state: dict,
    path: Path,
    *,
    best: bool,
    keep: int,
    check_output: Callable[[], None],
    flush_metrics: Callable[[], None],
) -> None:
    """Write a numbered checkpoint, link it as best.pth if it is the best, then delete all but the ``keep`` newest.

    ``check_output`` is called before each of these steps, see ``Trainer``.

    This function runs in another thread and therefore gets no reference to the trainer: if that were the last reference, the
    trainer and its loaders would be destroyed in that thread.

    Args:
        flush_metrics: called first, so that a resumed run does not lack the metrics of updates before the checkpoint.

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
    remove_surplus(path.parent, keep, newest=path)
    logger.info("saved %s%s in %.1f s", path, " (and as best.pth)" if best else "", time.monotonic() - started)


def mix_batches(batches: Iterable, mixup: Mixing | None, *, forward_pass: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and targets of successive forward passes, mixed by ``mixup``.

    Args:
        forward_pass: number of the first forward pass, counted from the start of the run.
    """
    for number, batch in enumerate(batches, forward_pass):
        yield (batch.images, batch.targets) if mixup is None else mixup(batch.images, batch.targets, number)


class Meter:
    """Statistics since the last log line."""

    def __init__(self, epoch: int, trainer: Trainer):
        self.epoch = epoch
        self.trainer = trainer
        self.restart()

    def restart(self) -> None:
        self.started = time.monotonic()
        self.waited_before = self.trainer.train_loader.seconds_waited
        self.reports: list[Report] = []

    def add(self, reports: Iterable[Report]) -> None:
        self.reports += reports

    def log(self) -> None:
        """Write the statistics to the log and the metrics, and restart."""
        trainer, state = self.trainer, self.trainer.state
        if not self.reports:
            return
        seconds = time.monotonic() - self.started
        done = state.num_updates - self.epoch * trainer.updates_per_epoch
        remaining_updates = trainer.recipe.num_epochs * trainer.updates_per_epoch - state.num_updates
        finite_losses = [report.loss for report in self.reports if report.is_finite]  # the other updates were skipped in fp16
        values = {
            "epoch": self.epoch,
            "loss": sum(finite_losses) / len(finite_losses) if finite_losses else math.nan,
            "lr": trainer.learning_rate(state.num_updates - 1),
            "grad_norm": self.reports[-1].grad_norm,
            "images_per_second": len(self.reports) * trainer.metadata["global_batch_size"] / seconds,
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
            format_duration(remaining_updates * seconds / len(self.reports)),
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
    """The model itself, or a copy on ``device`` if the model is on another type of device."""
    return model if next(model.parameters()).device.type == device.type else copy.deepcopy(model).to(device)


def _peak_memory(device: torch.device) -> int:
    """Peak memory in bytes: what torch allocated on a GPU, or the resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def format_duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
