"""Log lines, metrics and the text of the progress bar during training."""

import logging
import math
import time
from collections.abc import Callable, Generator, Sequence

import torch

from data.loader import DeviceLoader
from engine.remaining_work import count_evaluations
from engine.schedule import find_size, remaining_updates
from engine.state import TrainState
from engine.step import Report
from utils.environment import peak_memory
from utils.progress import progress
from utils.text import format_duration

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 30.0  # maximum time without a log line, except during an update
SECONDS_OF_MEASUREMENT = 1.0  # the progress bar shows the speed of an interval once it has this length


class TrainingLog:
    """Values of the updates since the last point of the metrics.

    An interval ends with a point, which is logged and written to the metrics. Within an interval, ``log_first`` and
    ``log_if_due`` log further lines, which do not change the points.

    Args:
        num_epochs: including cooldown epochs.
        sizes: input sizes, see ``train_sizes``.
        eval_freq: EVAL_FREQ, in epochs.
        may_end_early: whether TRAIN.PATIENCE may end the run before its last epoch.
        images_per_update: over all processes.
        loader: loader of the training images of this process.
        state: state of the run.
        learning_rate: returns the learning rate of an update, given its number, counted from 0.

    Attributes:
        reports: reports of the interval, in the order of the updates.
        evaluation_seconds: duration of the last evaluation of this process; None before the first one.
    """

    def __init__(
        self,
        *,
        updates_per_epoch: int,
        num_epochs: int,
        sizes: Sequence[tuple[int, tuple[int, int]]],
        eval_freq: int,
        may_end_early: bool = False,
        images_per_update: int,
        loader: DeviceLoader,
        device: torch.device,
        state: TrainState,
        learning_rate: Callable[[int], float],
    ):
        self.updates_per_epoch = updates_per_epoch
        self.num_epochs = num_epochs
        self.sizes = sizes
        self.eval_freq = eval_freq
        self.may_end_early = may_end_early
        self.images_per_update = images_per_update
        self.loader = loader
        self.device = device
        self.state = state
        self.learning_rate = learning_rate
        self.evaluation_seconds: float | None = None
        self._logged_size: tuple[int, int] | None = None
        self._shown: dict[str, float] = {}  # newest values of the progress bar
        self._seconds_of_first = 0.0  # duration of the first update, see ``log_first``
        self.start_interval()

    def start_interval(self) -> None:
        """Start an interval after the newest update."""
        self.reports: list[Report[float]] = []
        self.start_clock()

    def start_clock(self) -> None:
        """Measure the speed from now on."""
        self._first_update = self.state.num_updates
        self._started = self._last_line = time.monotonic()
        self._waited_before = self.loader.seconds_waited

    def measure(self) -> dict[str, float]:
        """Values of the interval, which must have a report. ``epoch`` is counted from 0."""
        num_updates = self.state.num_updates
        updates, seconds = num_updates - self._first_update, time.monotonic() - self._started
        if updates == 0:  # the interval only has the first update of this process
            updates, seconds = 1, self._seconds_of_first
        losses = [vars(report) for report in self.reports if report.is_finite]  # other updates were skipped in fp16
        names = [name for name, value in vars(self.reports[-1]).items() if name.endswith("loss") and value is not None]
        return {
            "epoch": (num_updates - 1) // self.updates_per_epoch,
            **{name: sum(values[name] for values in losses) / len(losses) if losses else math.nan for name in names},
            "lr": self.learning_rate(num_updates - 1),
            "grad_norm": self.reports[-1].grad_norm,
            "images_per_second": updates * self.images_per_update / seconds,
            "data_wait": (self.loader.seconds_waited - self._waited_before) / seconds,
            "memory_mib": peak_memory(self.device) / 2**20,
        }

    def log_first(self) -> None:
        """Log the first update of this process, and exclude it from the speed: it includes the start of the loader workers."""
        values, self._seconds_of_first = self.measure(), time.monotonic() - self._started
        logger.info(
            "%s | first update in %.1f s, %.0f MiB",
            self._describe(values),
            self._seconds_of_first,
            values["memory_mib"],
        )
        self._shown = {"loss": values["loss"], "lr": values["lr"]}
        self.start_clock()

    def log_if_due(self) -> None:
        """Log a line if none was logged for ``SECONDS_BETWEEN_LINES``, without waiting for the device."""
        if self.reports and time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES:
            self.log_line(self.measure())

    def log_line(self, values: dict[str, float]) -> None:
        """Log the ``values`` that ``measure`` has just returned."""
        self._shown, self._last_line = values, time.monotonic()
        logger.info(
            "%s | %.1f images/s, %.0f %% waiting for data, %.0f MiB, ETA %s",
            self._describe(values),
            values["images_per_second"],
            100 * values["data_wait"],
            values["memory_mib"],
            self.eta(values["images_per_second"]),
        )

    def _describe(self, values: dict[str, float]) -> str:
        """Position, loss, learning rate and gradient norm."""
        epoch = int(values["epoch"])
        done = self.state.num_updates - epoch * self.updates_per_epoch
        position = f"epoch {epoch + 1}/{self.num_epochs} [{done}/{self.updates_per_epoch}]"
        loss = f"{values['loss']:.4f}"
        if "base_loss" in values:
            loss += f" (base {values['base_loss']:.4f}, distillation {values['distillation_loss']:.4f})"
        return f"{position} loss {loss} lr {values['lr']:.3e} grad norm {values['grad_norm']:.3f}"

    def eta(self, images_per_second: float) -> str:
        """Remaining time of the run, with its evaluations as soon as their duration is known."""
        num_updates = self.state.num_updates
        length = {"updates_per_epoch": self.updates_per_epoch, "num_epochs": self.num_epochs}
        evaluations = count_evaluations(num_updates, **length, eval_freq=self.eval_freq)
        size = find_size(self.sizes, max(num_updates - 1, 0) // self.updates_per_epoch)  # that of the measured updates
        updates = remaining_updates(self.sizes, num_updates, **length, size=size)
        seconds = updates * self.images_per_update / images_per_second
        limit = "at most " if self.may_end_early else ""
        if self.evaluation_seconds is None:
            return f"{limit}{format_duration(seconds)} + {evaluations} evaluation{'' if evaluations == 1 else 's'}"
        return f"{limit}{format_duration(seconds + evaluations * self.evaluation_seconds)}"

    def status(self) -> str:
        """Text of the progress bar: the newest known values, without waiting for the device."""
        if (
            self.reports
            and time.monotonic() - self._started > SECONDS_OF_MEASUREMENT
            and self.state.num_updates > self._first_update
        ):
            self._shown = self.measure()
        if not self._shown:
            return ""
        text = f"loss {self._shown['loss']:.3f}, lr {self._shown['lr']:.1e}"
        speed = self._shown.get("images_per_second")
        return text if speed is None else f"{text}, {speed:.0f} images/s, ETA {self.eta(speed)}"

    def show_progress(self, updates: range, epoch: int) -> Generator[int, None, None]:
        """The ``updates`` that remain in an epoch, with a progress bar on a terminal. Elsewhere, the log lines suffice.

        If the run has several input sizes, each change is logged.
        """
        size = find_size(self.sizes, epoch)
        if len(self.sizes) > 1 and updates and size != self._logged_size:
            logger.info("epoch %d/%d: training with images of %d x %d pixels", epoch + 1, self.num_epochs, *size)
            self._logged_size = size
        return progress(
            updates,
            self.updates_per_epoch,
            f"epoch {epoch + 1}/{self.num_epochs}",
            done=self.updates_per_epoch - len(updates),
            status=self.status,
            seconds_between_lines=math.inf,
        )
