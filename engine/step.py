"""One optimizer update, and its report: loss, gradient norm, and requests to stop or to save a checkpoint.

The host does not wait for the device during an update, except in fp16.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from utils.distributed import StalledCollectiveError, side_channel


class Report(NamedTuple):
    """Loss, gradient norm and requests of one update.

    Args:
        loss: mean over the update's batches and all processes.
        grad_norm: L2 norm before clipping.
        stop: fraction of the processes that request a stop.
        save: fraction of the processes that request a checkpoint.
    """

    loss: float
    grad_norm: float
    stop: float
    save: float

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


NUM_REQUESTS = 2  # stop and save
NO_REQUESTS = (False,) * NUM_REQUESTS
SECONDS_BETWEEN_POLLS = 0.0005


def train_step(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    seeds: Sequence[int],
    amp_dtype: torch.dtype,
    max_grad_norm: float,
    requests: Callable[[], Sequence[bool]] = lambda: NO_REQUESTS,
    begin_change: Callable[[], None] = lambda: None,
    failed: Tensor | None = None,
) -> Tensor:
    """Run one optimizer update in any precision, with or without gradient clipping and accumulation.

    An update changes no weights and no optimizer state if its loss (in any process) or its gradient is not finite. In fp32 and
    bf16, this check runs on the device only. In fp16, the host reads the result of the check in every update, because the loss
    scaler regularly skips updates, and the EMA and the schedule must skip the same updates.

    Args:
        model: from ``utils.distributed.wrap``.
        batches: pairs of images (B, 3, H, W), normalised, on the model's device, and targets: (B,) class ids, or
            (B, num_classes) probabilities after mixup.
        seeds: one seed per batch, for the model's random draws (drop path, dropout).
        scaler: from ``engine.optim.build_scaler``; its scale is 1 unless ``amp_dtype`` is float16.
        max_grad_norm: maximum L2 norm of the gradient over all parameters; ``inf``: no clipping.
        requests: returns the requests of this process to stop and to save; called before the last backward pass.
        begin_change: called after the last backward pass, before anything changes that a checkpoint contains. An error before
            this call leaves the state as it was after the previous update.
        failed: scalar tensor, initially 0, updated in place. In fp32 and bf16, it becomes NaN at the first update whose loss or
            gradient is not finite; later updates then change nothing.

    Returns:
        (4,) values of a ``Report``, on the device. Reading them makes the host wait, so the caller decides when to read.
    """
    device = optimizer.param_groups[0]["params"][0].device
    failed = torch.zeros((), device=device) if failed is None else failed
    accumulate_gradients(model, criterion, scaler, batches, seeds=seeds, amp_dtype=amp_dtype, requests=requests)
    begin_change()
    loss, *requested = side_channel(model).pop_means()
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
        # A norm of NaN makes every gradient NaN. The scaler detects this and skips the optimizer step.
        nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm + failed)
        scaler.step(optimizer)
        scaler.update(1.0)
    optimizer.zero_grad(set_to_none=True)
    return torch.stack([loss, grad_norm, *requested])


def accumulate_gradients(
    model: nn.Module,
    criterion: nn.Module,
    scaler: torch.amp.GradScaler,
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    seeds: Sequence[int],
    amp_dtype: torch.dtype,
    requests: Callable[[], Sequence[bool]],
) -> None:
    """Run the forward and backward passes of one update.

    The last backward pass averages gradients, loss and requests over the processes.

    Args: see ``train_step``.
    """
    num_batches = len(seeds)
    for index, ((images, targets), seed) in enumerate(zip(batches, seeds, strict=True)):
        torch.manual_seed(seed)
        last = index + 1 == num_batches
        without_sync = isinstance(model, DistributedDataParallel) and not last
        with model.no_sync() if without_sync else nullcontext():
            with torch.autocast(images.device.type, dtype=amp_dtype, enabled=amp_dtype != torch.float32):
                logits, channel = model(images)
                loss = criterion(logits, targets) / num_batches
            requested = torch.zeros(NUM_REQUESTS, device=loss.device)
            for position, is_requested in enumerate(requests() if last else NO_REQUESTS):
                if is_requested:
                    requested[position] = 1  # filled on the device: a copy from the host would wait for the device
            numbers = torch.cat([loss.detach().view(1), requested])
            (scaler.scale(loss) + channel @ numbers).backward()


class Reports:
    """Queue of reports that are being copied from the device to the host.

    The host reads the report of an update after it has launched the next one, so that the device is never idle.

    Args:
        timeout_seconds: maximum wait for a report. An update takes longer only if another process does not take part in it.
    """

    def __init__(self, timeout_seconds: float = math.inf) -> None:
        self._timeout_seconds = timeout_seconds
        self._sent: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def send(self, update: int, report: Tensor) -> None:
        """Start to copy the (4,) report of update number ``update``, counted from 0."""
        copied = None
        if report.device.type == "cuda":
            report = report.to("cpu", non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()
        self._sent.append((update, report, copied))

    def collect_reports(self, *, max_pending: int) -> Iterator[tuple[int, Report]]:
        """Remove and yield the number and report of each queued update in order, except for the newest ``max_pending``.

        Raises:
            StalledCollectiveError: a report did not arrive in time.
        """
        while len(self._sent) > max_pending:
            update, report, copied = self._sent.popleft()
            self._wait(copied)
            yield update, Report(*report.tolist())

    def read_newest(self) -> Report:
        """Wait for the newest report and return it, without removing it from the queue.

        Raises:
            StalledCollectiveError: the report did not arrive in time.
        """
        _, report, copied = self._sent[-1]
        self._wait(copied)
        return Report(*report.tolist())

    def _wait(self, copied: torch.cuda.Event | None) -> None:
        if copied is None:
            return
        deadline = time.monotonic() + self._timeout_seconds
        while not copied.query():
            if time.monotonic() > deadline:
                raise StalledCollectiveError(f"an update has not finished for {self._timeout_seconds:g} s")
            time.sleep(SECONDS_BETWEEN_POLLS)
