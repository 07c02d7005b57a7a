"""One optimizer update, and its report: loss, gradient norm, and requests to stop or to save a checkpoint.

The host does not wait for the device during an update, unless the optimizer is not fused.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import reduce
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.distillation import DistillationTargets, Targets, Teacher
from utils.distributed import num_processes, start_sum
from utils.random import seed_device

Number = TypeVar("Number", Tensor, float)
# Function: images, targets, number of the forward pass -> mixed images and targets.
Mixing = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


class Requests(NamedTuple):
    """Requests of one process, which it sends to all processes with an update."""

    stop: bool = False
    save: bool = False


@dataclass(frozen=True)
class Report(Generic[Number]):
    """Loss, gradient norm and requests of one update: scalar tensors on the device, or numbers on the host.

    Args:
        loss: mean over the update's batches and all processes.
        grad_norm: L2 norm before clipping.
        num_stops: number of processes that request a stop.
        num_saves: number of processes that request a checkpoint.
        base_loss, distillation_loss: the parts of the loss, see ``DistillationLoss``; None without a teacher.
    """

    loss: Number
    grad_norm: Number
    num_stops: Number
    num_saves: Number
    base_loss: Number | None = None
    distillation_loss: Number | None = None

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train_step(
    model: nn.Module,
    criterion: nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Iterable[tuple[Tensor, Targets]],
    *,
    seeds: Sequence[int],
    amp_dtype: torch.dtype,
    max_grad_norm: float,
    requests: Callable[[], Requests] = Requests,
    begin_change: Callable[[], None] = lambda: None,
    failed: Tensor | None = None,
) -> Report[Tensor]:
    """Run one optimizer update in any precision, with or without gradient clipping and accumulation.

    An update changes no weights and no optimizer state if its loss (in any process) or its gradient is not finite.

    Args:
        model: maps images to logits. With several processes, its backward pass averages the gradients over them, except
            within ``model.no_sync()``, if it has this method.
        criterion: maps logits and targets to the loss, or to the loss and its parts, see ``DistillationLoss``.
        batches: pairs of images (B, 3, H, W), normalised, on the model's device, and targets: (B,) class ids, or
            (B, num_classes) probabilities after mixup, or ``DistillationTargets``.
        seeds: one seed per batch, for the model's random draws (drop path, dropout).
        scaler: from ``engine.optim.build_scaler``; disabled unless ``amp_dtype`` is float16.
        max_grad_norm: maximum L2 norm of the gradient over all parameters; ``inf``: no clipping.
        requests: returns the requests of this process; called before the last backward pass.
        begin_change: called after the last backward pass, before anything changes that a checkpoint contains. An error before
            this call leaves the state as it was after the previous update.
        failed: scalar tensor, initially 0, which becomes 1 at the first update whose loss or gradient is not finite; later
            updates then change nothing. None if each update is skipped or not by itself, as in fp16.

    Returns:
        The report, on the device. Reading it makes the host wait, so the caller decides when to read.
    """
    loss, num_stops, num_saves, *parts = run_passes(
        model, criterion, scaler, batches, seeds=seeds, amp_dtype=amp_dtype, requests=requests
    ).unbind()
    begin_change()
    scaler.unscale_(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    grad_norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    skip = (loss + grad_norm).isfinite().logical_not().float()
    if failed is not None:
        skip = failed.logical_or_(skip)
    nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, grad_norm)
    step_unless(skip, optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return Report(loss, grad_norm, num_stops, num_saves, *parts)


def run_passes(
    model: nn.Module,
    criterion: nn.Module,
    scaler: torch.amp.GradScaler,
    batches: Iterable[tuple[Tensor, Targets]],
    *,
    seeds: Sequence[int],
    amp_dtype: torch.dtype,
    requests: Callable[[], Requests],
) -> Tensor:
    """Run the forward and backward passes of one update.

    The mean loss and the requests are summed over the processes while the last backward pass computes the gradients.

    Args: see ``train_step``.

    Returns:
        Mean loss, number of processes that request a stop, number of processes that request a checkpoint, and the means of the
        other losses that the criterion returns, in one vector.
    """
    losses = []
    for index, ((images, targets), seed) in enumerate(zip(batches, seeds, strict=True)):
        seed_device(seed, images.device)
        is_last = index + 1 == len(seeds)
        with nullcontext() if is_last or not hasattr(model, "no_sync") else model.no_sync():  # type: ignore[operator]  # of DDP
            with torch.autocast(images.device.type, dtype=amp_dtype, enabled=amp_dtype != torch.float32):
                loss, *parts = (value / len(seeds) for value in as_tuple(criterion(model(images), targets)))
            losses.append([loss.detach(), *parts])
            if is_last:
                # Created on the device: a copy from the host would wait for the device.
                flags = [torch.full((), float(flag), device=loss.device) for flag in requests()]
                mean, *means = (reduce(torch.add, values) / num_processes() for values in zip(*losses, strict=True))
                sums = torch.stack([mean, *flags, *means])
                wait_for_sums = start_sum(sums)
            scaler.scale(loss).backward()
    wait_for_sums()
    return sums


def as_tuple(losses: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The result of a criterion: the loss, followed by its parts, if any."""
    return losses if isinstance(losses, tuple) else (losses,)


def step_unless(skip: Tensor, optimizer: Optimizer) -> None:
    """Run the step of an optimizer, unless the scalar ``skip`` is 1.

    Fused optimizers read ``skip`` on the device, by the attribute that ``torch.amp.GradScaler`` uses too. For any other
    optimizer, the host waits for the value.
    """
    if optimizer.param_groups[0].get("fused"):
        optimizer.found_inf = skip  # type: ignore[attr-defined]  # an optional attribute
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    elif not skip:
        optimizer.step()


def mix_batches(
    batches: Iterable, mixup: Mixing | None, teacher: Teacher | None = None, *, forward_pass: int
) -> Iterator[tuple[Tensor, Targets]]:
    """Images and targets of successive forward passes, mixed by ``mixup``.

    Args:
        teacher: predicts the classes of the mixed images; its logits become a part of the targets.
        forward_pass: number of the first forward pass, counted from the start of the run.
    """
    for number, batch in enumerate(batches, forward_pass):
        images, targets = (batch.images, batch.targets) if mixup is None else mixup(batch.images, batch.targets, number)
        yield images, targets if teacher is None else DistillationTargets(targets, teacher(images))


class Reports:
    """Queue of reports that are being copied from the device to the host.

    The host reads the report of an update after it has launched the next one, so that the device is never idle.
    """

    def __init__(self) -> None:
        self._sent: deque[tuple[int, Tensor, torch.cuda.Event | None]] = deque()

    def send(self, update: int, report: Report[Tensor]) -> None:
        """Start to copy the report of update number ``update``, counted from 0, to the host."""
        values, copied = torch.stack([value for value in vars(report).values() if value is not None]), None
        if values.device.type == "cuda":
            values = values.to("cpu", non_blocking=True)
            copied = torch.cuda.Event(blocking=True)  # while the host waits, its core is free for a loader worker
            copied.record()
        self._sent.append((update, values, copied))

    def collect_reports(self, *, max_pending: int) -> Iterator[tuple[int, Report[float]]]:
        """Remove and yield the number and report of each queued update in order, except for the newest ``max_pending``."""
        while len(self._sent) > max_pending:
            update, values, copied = self._sent.popleft()
            yield update, self._read(values, copied)

    def read_newest(self) -> Report[float]:
        """Wait for the newest report and return it, without removing it from the queue."""
        _, values, copied = self._sent[-1]
        return self._read(values, copied)

    @staticmethod
    def _read(values: Tensor, copied: torch.cuda.Event | None) -> Report[float]:
        if copied is not None:
            copied.synchronize()
        return Report(*values.tolist())  # in the order of the fields, as ``send`` stacks them
