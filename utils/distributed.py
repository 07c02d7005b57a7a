"""Processes: who am I, where do I compute, and the few things that they agree on."""

import inspect
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

Result = TypeVar("Result")
LONGEST_WAIT = timedelta(hours=1)  # for another process: rank 0 may have a million files on a slow disk to list


class RankZeroError(RuntimeError):
    """Rank 0 could not do what all wait for; it says why itself."""


@dataclass(frozen=True)
class World:
    """This process among ``size`` of them, ``device`` being its own."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def setup() -> World:
    """Join the processes that torchrun started; without torchrun, be the only one. nccl on GPUs, gloo elsewhere."""
    launched = "RANK" in os.environ  # WORLD_SIZE alone may be left over from something else
    rank, local_rank, size = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    if not launched:
        rank, local_rank, size = 0, 0, 1
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"process {local_rank} of this machine has no GPU: it has {torch.cuda.device_count()}; lower --nproc_per_node"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if launched:
        on_gpu = device.type == "cuda"
        dist.init_process_group("nccl" if on_gpu else "gloo", device_id=device if on_gpu else None, timeout=LONGEST_WAIT)
    return World(rank, local_rank, size, device)


def cleanup() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class SideChannel(nn.Module):
    """A model with one more parameter, whose gradient carries numbers through DDP's reduction of the gradients.

    Add ``channel @ numbers`` to the loss: its value is 0, and after the backward pass the gradient of the channel is the mean
    of the numbers over all processes, or NaN if a number was not finite in any. That takes no further collective.

    Args:
        model: images (B, 3, H, W) to logits.
        length: count of the numbers.
    """

    def __init__(self, model: nn.Module, length: int, device: torch.device):
        super().__init__()
        self.model = model
        self.channel = nn.Parameter(torch.zeros(length, device=device))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and the channel, (length,)."""
        return self.model(images), self.channel.view_as(self.channel)

    def take(self) -> Tensor:
        """(length,) means over all processes of what was sent since the last call."""
        means = self.channel.grad.clone()
        self.channel.grad = None
        return means


def side_channel(model: nn.Module) -> SideChannel:
    """The side channel of a model from ``wrap``."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def wrap(model: nn.Module, world: World, *, num_values: int, find_unused_parameters: bool = False) -> nn.Module:
    """The model for training, with a side channel of ``num_values``, and gradients averaged over several processes."""
    model = SideChannel(model, num_values, world.device)
    if world.size == 1:
        return model
    # Gradients of depthwise kernels may have other strides than their parameters; they are small.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    return DistributedDataParallel(
        model,
        device_ids=[world.local_rank] if world.device.type == "cuda" else None,
        find_unused_parameters=find_unused_parameters,
        gradient_as_bucket_view=True,
        **{_SYNC_BUFFERS: False},  # masks and indices: constants
    )


# torch renames it from 2.15 on.
_SYNC_BUFFERS = next(
    name
    for name in ("forward_sync_buffers", "broadcast_buffers")
    if name in inspect.signature(DistributedDataParallel.__init__).parameters
)


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather_on_main(world: World, value: Result) -> list[Result] | None:
    """Every process's value, by rank, on rank 0; None in the others. Values travel pickled."""
    if not dist.is_initialized():
        return [value]
    values = [None] * world.size if world.is_main else None
    dist.gather_object(value, values, dst=0)
    return values


def on_main(world: World, task: Callable[[], Result]) -> Result:
    """What rank 0 gets from ``task``, in every process; where it fails, all fail.

    Raises:
        RankZeroError: in the other processes, with rank 0's message; rank 0 raises its own error.
    """
    outcome: list = [None, None]
    error = None
    if world.is_main:
        try:
            outcome[0] = task()
        except Exception as caught:
            error, outcome[1] = caught, f"{type(caught).__name__}: {caught}"
    if dist.is_initialized():
        dist.broadcast_object_list(outcome, src=0)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise RankZeroError(f"rank 0 failed: {outcome[1]}")
    return outcome[0]
