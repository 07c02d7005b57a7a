"""One optimizer update, and its report: loss, gradient norm, and requests to stop or to save a checkpoint.

The host does not wait for the device during an update, except in fp16.
"""

import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from utils.distributed import side_channel


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
    requests: Tensor | None = None,
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
        scaler: from ``utils.optim.build_scaler``; its scale is 1 unless ``amp_dtype`` is float16.
        max_grad_norm: maximum L2 norm of the gradient over all parameters; ``inf``: no clipping.
        requests: (2,) requests of this process to stop and to save, each 0 or 1.
        failed: scalar tensor, initially 0, updated in place. In fp32 and bf16, it becomes NaN at the first update whose loss or
            gradient is not finite; later updates then change nothing.

    Returns:
        (4,) values of a ``Report``, on the device. Reading them makes the host wait, so the caller decides when to read.
    """
    device = optimizer.param_groups[0]["params"][0].device
    requests = torch.zeros(NUM_REQUESTS, device=device) if requests is None else requests
    failed = torch.zeros((), device=device) if failed is None else failed
    accumulate_gradients(model, criterion, scaler, batches, seeds=seeds, amp_dtype=amp_dtype, requests=requests)
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
    requests: Tensor,
) -> None:
    """Run the forward and backward passes of one update.

    The last backward pass averages gradients, loss and requests over the processes.

    Args: see ``train_step``.
    """
    num_batches = len(seeds)
    for index, ((images, targets), seed) in enumerate(zip(batches, seeds, strict=True)):
        torch.manual_seed(seed)
        without_sync = isinstance(model, DistributedDataParallel) and index + 1 < num_batches
        with model.no_sync() if without_sync else nullcontext():
            with torch.autocast(images.device.type, dtype=amp_dtype, enabled=amp_dtype != torch.float32):
                logits, channel = model(images)
                loss = criterion(logits, targets) / num_batches
            numbers = torch.cat([loss.detach().view(1), requests / num_batches])
            (scaler.scale(loss) + channel @ numbers).backward()


class Reports:
    """Queue of reports that are being copied from the device to the host.

    The host reads the report of an update after it has launched the next one, so that the device is never idle.
    """

    def __init__(self) -> None:
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
        """Remove and yield the number and report of each queued update in order, except for the newest ``max_pending``."""
        while len(self._sent) > max_pending:
            update, report, copied = self._sent.popleft()
            if copied is not None:
                copied.synchronize()
            yield update, Report(*report.tolist())
