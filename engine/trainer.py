"""The training loop: from the current state of a run to its end, with evaluation, checkpoints and logs."""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor, nn
from yacs.config import CfgNode

from data.loader import Batch, DeviceLoader, TrainLoader
from engine.distillation import Targets, Teacher
from engine.evaluation import evaluate, log_results, on_device
from engine.loading_speed import LoadingCheck
from engine.metrics_writer import MetricsWriter
from engine.optim import amp_dtype, eval_dtype
from engine.remaining_work import Remaining, describe_early_end, work_after
from engine.replay import describe_update, replay_command, try_to_save
from engine.saver import Saver
from engine.schedule import Schedule, accumulation_steps, count_epochs
from engine.state import TrainState, check_trained, describe_best
from engine.step import Mixing, Report, Reports, Requests, mix_batches, train_step
from engine.training_log import TrainingLog
from models.checkpoints.reader import CheckpointError
from utils.config.loading import train_sizes
from utils.distributed import World, end_watch, is_lost_connection, on_main, sum_over_processes
from utils.errors import OtherRankError, Stopped, TrainingError
from utils.random import seed_of_pass
from utils.text import format_duration

logger = logging.getLogger(__name__)

MAX_SKIPPED = 20  # the run ends after this many consecutive updates with non-finite gradients in fp16
SLOW_UPDATE = 5.0  # seconds; see ``Trainer.save_before_slow_update``


@dataclass(kw_only=True, eq=False)
class Trainer:
    """Trains from the current state to the end of the run.

    Args:
        cfg: the config of the run; each option is read where it is used.
        model: ``state.model``, compiled and wrapped by ``utils.distributed.wrap``.
        mixup: mixes a batch, given the number of its forward pass; None for no mixing.
        teacher: adds its logits to the targets of mixed batches, for ``DistillationLoss``; None for other criteria.
        output: directory of checkpoints and replay files.
        metadata: entries of every checkpoint besides the state, such as config and class names.
        metrics: writer of ``metrics.jsonl`` and TensorBoard events; None on ranks other than 0 and in a dry run.
        stop: returns whether a signal requested a stop of this process.
        check_output: called before every write to ``output``; raises if the path no longer is the run's directory.
        draw: returns (name, matplotlib figure) pairs for a model, to write after each evaluation; None for no figures.
    """

    cfg: CfgNode
    world: World
    state: TrainState
    model: nn.Module
    criterion: nn.Module
    schedule: Schedule
    train_loader: TrainLoader
    val_loader: DeviceLoader
    mixup: Mixing | None
    output: Path
    metadata: dict
    metrics: MetricsWriter | None = None
    stop: Callable[[], bool] = lambda: False
    check_output: Callable[[], None] = lambda: None
    draw: Callable[[nn.Module], Iterable[tuple[str, object]]] | None = None
    teacher: Teacher | None = None

    def __post_init__(self) -> None:
        self.updates_per_epoch = self.train_loader.updates_per_epoch
        self.num_epochs = count_epochs(self.cfg)
        self.accumulation = accumulation_steps(self.cfg, self.world.size)
        self.first_update = self.state.num_updates  # of this process
        self.phase = "start-up"
        self.reports = Reports()
        self.saver = Saver(
            world=self.world,
            state=self.state,
            output=self.output,
            metadata=self.metadata,
            keep=self.cfg.KEEP_CHECKPOINTS,
            minutes=self.cfg.SAVE_MINUTES,
            best_metric=self.cfg.BEST_METRIC,
            keep_best=self.cfg.KEEP_BEST,
            flush_metrics=self.metrics.flush if self.metrics is not None else lambda: None,
            check_output=self.check_output,
        )
        self.failed = torch.zeros((), device=self.world.device)  # see ``train_step``
        self.skipped_in_a_row = 0
        self.changing_state = False  # whether an update has changed a part of the state, but not yet all of it
        self.sent_stop = False  # whether the newest update carried a request of this process to stop
        self.loading_check = LoadingCheck(self.train_loader, self.world, images_per_update=self.metadata["global_batch_size"])
        self.training_log = TrainingLog(
            updates_per_epoch=self.updates_per_epoch,
            num_epochs=self.num_epochs,
            sizes=train_sizes(self.cfg),
            eval_freq=self.cfg.EVAL_FREQ,
            may_end_early=self.cfg.TRAIN.PATIENCE > 0,
            images_per_update=self.metadata["global_batch_size"],
            loader=self.train_loader,
            device=self.world.device,
            state=self.state,
            learning_rate=self.learning_rate,
        )

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
        started = time.monotonic()
        self.saver.restart_interval()
        first_epoch = max(state.num_updates - 1, 0) // self.updates_per_epoch  # its evaluation may remain
        for epoch in range(first_epoch, max(self.num_epochs, first_epoch + 1)):
            if epoch > first_epoch and self.any_process_stops():
                self.save_and_stop()
            self.run_epoch(epoch)
            if self.remaining_work().stop:  # also before the last epoch, see TRAIN.PATIENCE
                break
        self.finish_saving()
        check_trained(num_updates=state.num_updates, num_skipped=state.num_skipped)
        logger.info(
            "done%s; training in this process took %s; best %s (%s weights, epoch %d/%d)",
            describe_early_end(self.entries(), self.cfg),
            format_duration(time.monotonic() - started),
            *(describe_best(state.best), state.best["weights"], state.best["epoch"] + 1, self.num_epochs),
        )

    def run_epoch(self, epoch: int) -> None:
        """Run the updates that remain in an epoch, then evaluate and save if ``remaining_work`` says so.

        The state is also saved before an evaluation, so that nothing is lost if it fails. The checkpoint with the result then
        replaces that one; both have the same number of updates, and thus the same name.
        """
        cfg, state = self.cfg, self.state
        first = epoch * self.updates_per_epoch
        updates = range(state.num_updates, min(first + self.updates_per_epoch, self.num_epochs * self.updates_per_epoch))
        batches = self.mix(self.load_batches(epoch))
        self.phase = "training"
        self.model.train()
        self.training_log.start_interval()
        saving = False  # whether SAVE_STEPS or SAVE_MINUTES asked for a checkpoint of the newest update
        with closing(self.training_log.show_progress(updates, epoch)) as shown_updates:
            for update in shown_updates:
                started = time.monotonic()
                self.update(batches)
                if self.all_processes_stop():
                    self.save_and_stop()
                seconds = time.monotonic() - started
                done = update + 1 - first
                saving = cfg.SAVE_STEPS > 0 and done % cfg.SAVE_STEPS == 0
                logging_now = saving or done % cfg.PRINT_FREQ == 0 or done == self.updates_per_epoch
                reading_now = logging_now or update == self.first_update or state.scaler.is_enabled()
                reports = self.collect_reports(max_pending=0 if reading_now else 1)
                if any(report.num_stops > 0 for report in reports):
                    self.save_and_stop()
                self.save_before_slow_update(seconds)
                saving = saving or any(report.num_saves > 0 for report in reports)
                if logging_now or saving:
                    self.log()
                elif update == self.first_update:
                    self.training_log.log_first()
                else:
                    self.training_log.log_if_due()
                if saving and done < self.updates_per_epoch:
                    self.save()
                    self.training_log.start_interval()
        work = self.remaining_work()
        if work.evaluate and not self.saver.is_saved:
            self.save()
        is_best = work.evaluate and self.evaluate(epoch)
        is_kept = work.evaluate and (self.remaining_work().stop or self.saver.is_top)
        if work.save or is_best or is_kept or (saving and not self.saver.is_saved):
            self.save(best=is_best)

    def remaining_work(self) -> Remaining:
        """What remains to be done after the newest update."""
        return work_after(self.entries(), self.cfg, is_saved=self.saver.is_saved)

    def entries(self) -> dict:
        """The entries of a checkpoint that determine what remains to be done."""
        return vars(self.state) | {"updates_per_epoch": self.updates_per_epoch}

    def load_batches(self, epoch: int) -> Iterator[Batch]:
        """Batches of the forward passes that remain in an epoch. The first batch of a run is shown in TensorBoard."""
        showing = self.metrics if self.state.num_updates == 0 else None
        self.train_loader.set_position(epoch, self.state.num_updates - epoch * self.updates_per_epoch)
        for batch in self.train_loader:
            if showing is not None:
                showing.image_grid("first_batch", batch.images[:16], 0)
                showing = None
            yield batch

    def mix(self, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Targets]]:
        """Images and targets after mixup, for each forward pass from the current position of the run."""
        return mix_batches(batches, self.mixup, self.teacher, forward_pass=self.state.num_updates * self.accumulation)

    def update(self, batches: Iterator[tuple[Tensor, Targets]]) -> None:
        """Launch one update on the next batches, and update the EMA.

        In fp16, an update with a non-finite loss or gradient is skipped, and the EMA is not updated.
        """
        cfg, state = self.cfg, self.state
        learning_rate = self.learning_rate(state.num_updates)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate * group["lr_scale"]
        first_pass = state.num_updates * self.accumulation
        report = train_step(
            self.model,
            self.criterion,
            state.optimizer,
            state.scaler,
            islice(batches, self.accumulation),
            seeds=[seed_of_pass(cfg.SEED, first_pass + number, self.world.rank) for number in range(self.accumulation)],
            amp_dtype=amp_dtype(cfg),
            max_grad_norm=cfg.TRAIN.CLIP_GRAD or math.inf,
            requests=self.requests,
            begin_change=self.begin_change,
            failed=None if state.scaler.is_enabled() else self.failed,
        )
        self.reports.send(state.num_updates, report)
        state.num_updates += 1
        # The loss scaler skips updates regularly, and the EMA and the schedule must skip them too: only fp16 waits here.
        if state.scaler.is_enabled() and not self.reports.read_newest().is_finite:
            state.num_skipped += 1
            self.skipped_in_a_row += 1
        else:
            self.skipped_in_a_row = 0
            state.update_ema()
        self.changing_state = False

    def begin_change(self) -> None:
        """Note that an update starts to change the state, which is incomplete from now on until the end of ``update``."""
        self.changing_state = True

    def learning_rate(self, num_updates: int) -> float:
        """Learning rate of update ``num_updates`` (counted from 0), to be multiplied by each parameter group's ``lr_scale``."""
        return self.schedule(num_updates - self.state.num_skipped)

    def collect_reports(self, *, max_pending: int) -> list[Report[float]]:
        """Reports that were not collected yet, except for those of the newest ``max_pending`` updates.

        Raises:
            TrainingError: in every process, if the loss or gradient of an update is not finite in fp32 or bf16, or if fp16 has
                skipped ``MAX_SKIPPED`` updates in a row. The message names the replay file.
        """
        reports = []
        for update, report in self.reports.collect_reports(max_pending=max_pending):
            if not report.is_finite and (not self.state.scaler.is_enabled() or self.skipped_in_a_row >= MAX_SKIPPED):
                self.fail(update, report)
            reports.append(report)
        self.training_log.reports += reports
        return reports

    def log(self) -> None:
        """Log the interval since the last point of the metrics, write it as the next point, and start another interval."""
        state = self.state
        self.collect_reports(max_pending=0)
        if not self.training_log.reports:
            return
        values = self.training_log.measure()
        self.training_log.log_line(values)
        if state.scaler.is_enabled():
            values |= {"loss_scale": state.scaler.get_scale(), "skipped_updates": state.num_skipped}
        if self.metrics is not None:
            self.metrics.scalars(state.num_updates, "train", values)
        self.loading_check.check(values["data_wait"], self.metadata["global_batch_size"] / values["images_per_second"])
        self.training_log.start_interval()

    def requests(self) -> Requests:
        """Requests of this process to stop, and to save a checkpoint, sent with an update."""
        self.sent_stop = self.stop()
        return Requests(stop=self.sent_stop, save=self.saver.is_due())

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
        """
        if self.stop() and update_seconds > SLOW_UPDATE and self.world.is_main and not self.failed:
            self.saver.start_unless_failed()

    def fail(self, update: int, report: Report[float]) -> NoReturn:
        """Write the replay file of an update with a non-finite loss or gradient, and raise the error that ends the run."""
        path = self.output / f"replay_{update:09d}.pth"

        def describe() -> dict:
            replay = describe_update(self.train_loader, update, self.accumulation, self.world.size)
            return {"model": self.state.model.state_dict(), "replay": replay, **self.metadata}

        failure = on_main(self.world, partial(try_to_save, describe, path, self.check_output))
        remedy = (
            f"The file for --replay could not be written ({failure})"
            if failure
            else f"{replay_command(path, self.cfg)} repeats the update and names the first module whose output is not finite, "
            "and the images"
        )
        position = f"update {update + 1} of the run (epoch {update // self.updates_per_epoch + 1}/{self.num_epochs})"
        what = f"the loss is {report.loss} and the gradient norm {report.grad_norm} at {position}"
        advice = "Lower TRAIN.BASE_LR, or set TRAIN.CLIP_GRAD"
        if self.state.scaler.is_enabled():
            what = f"{MAX_SKIPPED} updates in a row had gradients that are not finite in fp16, the last at {position}"
            advice = f"Use AMP_DTYPE bf16, or lower TRAIN.BASE_LR. {self.advise_after_divergence()}"
        raise TrainingError(f"{what}. The update changed no weights, and the checkpoints are untouched. {remedy}. {advice}")

    def advise_after_divergence(self) -> str:
        """How to continue if the newest checkpoints contain weights that have diverged."""
        best = self.state.best["num_updates"]
        if best < 0:
            return "If the weights have diverged, start a new run with a lower TRAIN.BASE_LR and another --tag"
        return (
            f"If the weights have diverged since the best evaluation, delete the checkpoints in {self.output} that are later "
            f"than update {best}: the same command with a lower TRAIN.BASE_LR then resumes from the best checkpoint"
        )

    def show_figures(self) -> None:
        """Write the figures of ``draw`` to TensorBoard. Draw no further figures after an error, such as out of memory."""
        if self.draw is None or self.metrics is None:
            return
        try:
            for name, figure in self.draw(self.state.model):
                self.metrics.figure(name, figure, self.state.num_updates)
        except Exception as error:
            logger.warning("attention pictures are disabled after an error: %s", error)
            self.draw = None

    def evaluate(self, epoch: int) -> bool:
        """Evaluate raw and EMA weights.

        Returns:
            Whether the evaluation of raw or EMA weights is the best one so far, see BEST_METRIC.

        Raises:
            Stopped: in every process, if any process was asked to stop; the state before the evaluation is saved.
        """
        state, started = self.state, time.monotonic()
        self.phase = "evaluation"
        if epoch + 1 < self.num_epochs:
            self.train_loader.start(epoch + 1)
        models = {"raw": state.model}
        if state.ema is not None:
            models["ema"] = on_device(state.ema.module, self.world.device)
        try:
            results = evaluate(models, self.val_loader, amp_dtype=eval_dtype(self.cfg), world=self.world, stop=self.stop)
        except Stopped:
            self.save_and_stop()
        except TrainingError as error:
            raise TrainingError(f"{error}. {self.advise_after_divergence()}") from None
        log_results(results)
        improved = False
        for weights, result in results.items():
            record = {"epoch": epoch, **result.to_dict()}
            improved |= state.add_evaluation(weights, record, self.cfg.BEST_METRIC)
            if self.metrics is not None:
                self.metrics.scalars(state.num_updates, f"eval_{weights}", record, file_only=result.file_only)
        if self.metrics is not None and self.draw is not None:
            self.show_figures()
        state.last_evaluation = state.num_updates
        self.training_log.evaluation_seconds = time.monotonic() - started
        return improved

    def save(self, *, best: bool = False) -> None:
        """Start to save the state, see ``Saver.save``."""
        self.phase = "saving"
        self.saver.save(best=best)
        self.phase = "training"

    def finish_saving(self) -> None:
        """Wait until the newest checkpoint is written, see ``Saver.finish``."""
        self.phase = "saving"
        self.saver.finish()

    def save_after_error(self, error: BaseException) -> None:
        """Save the last complete update after an unexpected error, if it is not saved yet. Never raises an error.

        Only rank 0 saves, and without any collective operation, so it does not matter what the other processes do. The state
        is not saved if it may be incomplete: after an error in the part of an update that changes it, after any CUDA error,
        and after a lost connection on GPUs, where kernels run later than the host.

        The write runs in the background; ``saver.background_write.close`` waits for it.
        """
        end_watch()
        expected = isinstance(error, (Stopped, TrainingError, CheckpointError, OtherRankError))
        device_failed = self.world.device.type == "cuda" and (
            isinstance(error, torch.AcceleratorError) or (isinstance(error, Exception) and is_lost_connection(error))
        )
        if not self.world.is_main or expected or device_failed or self.changing_state or self.saver.is_saved:
            return
        try:
            if not self.failed:  # otherwise, the updates since the one that failed have changed nothing
                self.saver.start_after_error()
        except BaseException as second:
            logger.warning("the state could not be saved (%s: %s)", type(second).__name__, second)

    def save_and_stop(self) -> NoReturn:
        """Save the state in the middle of an epoch, or before an evaluation, and raise the exception that ends the run."""
        phase, num_updates = self.phase, self.state.num_updates
        self.log()
        if not self.saver.is_saved:
            self.save()
        self.finish_saving()
        raise Stopped(
            f"stopped in {phase}; the checkpoint after update {num_updates} is saved, and the same command resumes the run"
        )
