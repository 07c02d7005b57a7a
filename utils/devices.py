"""The device of a process, one of the GPUs that torch can use or the CPU, and its share of the CPU cores."""

import logging
import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

logger = logging.getLogger(__name__)


class MissingDeviceError(ValueError):
    """This process has no usable GPU, although other processes of its machine may have one."""


def choose_device(local_rank: int) -> torch.device:
    """Choose and activate the device of a process: the GPU with the number ``local_rank``, or the only one that is visible.

    Schedulers that assign GPUs to tasks, such as ``srun --gpus-per-task=1``, show each process only its own GPU, as number 0.

    Raises:
        MissingDeviceError: fewer GPUs than processes, or GPUs that torch cannot use.
    """
    if not torch.cuda.is_available():
        check_driver()
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count > 1 and local_rank >= count:
        raise MissingDeviceError(
            f"process {local_rank} (counted from 0) has no GPU: only {count} found; lower --nproc_per_node (under SLURM, "
            "--ntasks-per-node)"
        )
    device = torch.device("cuda", local_rank if count > 1 else 0)
    torch.cuda.set_device(device)
    return device


def check_device_is_not_shared(store: dist.Store, device: torch.device) -> None:
    """Reject a GPU that another process of this launch uses, as with ``--nproc_per_node=2`` on a machine with one GPU.

    Args:
        store: store of this launch.

    Raises:
        MissingDeviceError: another process has registered the GPU before this one.
    """
    if store.add(f"gpu/{torch.cuda.get_device_properties(device).uuid}", 1) > 1:
        raise MissingDeviceError(
            f"another process already uses the only GPU that this process sees, {torch.cuda.get_device_name(device)}; lower "
            "--nproc_per_node, or under SLURM assign one GPU to each task (--gpus-per-task=1)"
        )


def warn_about_unused_devices(device: torch.device) -> None:
    """Warn if this process is the only one and leaves GPUs unused.

    Args:
        device: device of this process.
    """
    if device.type == "cuda":
        if torch.cuda.device_count() > 1:
            logger.warning(
                "this machine has %d GPUs, and a single process uses one of them; to use all, start with torchrun "
                "--nproc_per_node=gpu main.py ...",
                torch.cuda.device_count(),
            )
        return
    for name, is_available in (
        ("Apple GPU (MPS)", torch.backends.mps.is_available),
        ("Intel GPU (XPU)", torch.xpu.is_available),
    ):
        if is_available():
            logger.warning("this machine's %s is not used: main.py runs on CUDA devices and on CPUs", name)


def check_driver(devices: Path = Path("/dev")) -> None:
    """Reject a machine with a GPU that torch cannot use: training would silently run on the CPU.

    Args:
        devices: directory of the device files.

    Raises:
        MissingDeviceError: the machine has an NVIDIA GPU that torch cannot use.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = sorted(devices.glob("nvidia[0-9]*"))
    if not gpus or visible in ("", "-1"):
        return
    setting = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    remedy = (
        "Check nvidia-smi, then update the driver, or install a torch build for the CUDA version that the driver supports"
        if torch.version.cuda
        else "This torch build has no CUDA support; install torch and torchvision for CUDA, see https://pytorch.org/get-started"
    )
    raise MissingDeviceError(
        f"this machine has an NVIDIA GPU ({gpus[0]}), but torch {torch.__version__} cannot use it{setting}. {remedy}. To "
        "use the CPU, set CUDA_VISIBLE_DEVICES=-1"
    )


class Cores(NamedTuple):
    """The CPU cores that a process may use.

    Attributes:
        machine: identifies the running kernel, and thus the machine; containers on one machine share it.
        numbers: numbers of the cores.
    """

    machine: str
    numbers: frozenset[int]


def usable_cores() -> Cores:
    """The CPU cores that this process may use, according to its affinity mask."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    machine = boot_id.read_text() if boot_id.is_file() else socket.gethostname()
    if hasattr(os, "sched_getaffinity"):
        return Cores(machine, frozenset(os.sched_getaffinity(0)))
    return Cores(machine, frozenset(range(os.cpu_count() or 1)))


def count_cores(cores: Cores | None = None, of_all_processes: Sequence[Cores] = ()) -> int:
    """Number of cores for a process, at least 1. Processes that may use the same core share it equally.

    Launchers either let all processes of a machine use all cores (torchrun), or give each process cores of its own
    (``srun --cpus-per-task``).

    Args:
        cores: cores of the process; this process's by default.
        of_all_processes: cores of every process, including this one; empty if there is only this one.
    """
    cores = cores or usable_cores()
    neighbours = [other.numbers for other in of_all_processes if other.machine == cores.machine] or [cores.numbers]
    share = sum(1 / sum(number in numbers for numbers in neighbours) for number in cores.numbers)
    return max(int(share + 1e-6), 1)  # the shares of one core may sum to slightly less than 1
