"""The device of a process, one of the GPUs that torch can use or the CPU, and its share of the CPU cores."""

import logging
import math
import os
import socket
from collections.abc import Iterator, Sequence
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
        quota: CPU time per second for all processes of ``group`` together; infinity without a limit.
        group: identifies the control group (cgroup) with this limit.
    """

    machine: str
    numbers: frozenset[int]
    quota: float = math.inf
    group: str = ""


def usable_cores() -> Cores:
    """The CPU cores that this process may use, according to its affinity mask and its control groups."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    machine = boot_id.read_text() if boot_id.is_file() else socket.gethostname()
    numbers = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    return Cores(machine, frozenset(numbers), *cpu_quota())


def cpu_quota(mount: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")) -> tuple[float, str]:
    """The lowest CPU quota of this process's control groups, and its group, see ``Cores``; (inf, "") without a quota.

    Containers are limited by such quotas, for example by ``docker run --cpus=4`` or by limits of Kubernetes.

    Args:
        mount: directory of the control groups, of version 1 or 2.
        membership: file that lists the groups of this process.
    """
    lowest = math.inf, ""
    try:
        for group in _cpu_groups(mount, membership.read_text()):
            if (quota := _read_quota(group)) < lowest[0]:
                status = group.stat()
                lowest = quota, f"{status.st_dev}:{status.st_ino}"  # paths differ between containers
    except (OSError, ValueError):  # another system, or files of an unknown format
        pass
    return lowest


def _cpu_groups(mount: Path, membership: str) -> Iterator[Path]:
    """Directories of the control groups that may limit this process, from its own group to the root of each hierarchy.

    Args:
        membership: lines such as "0::/group" (version 2) and "4:cpu,cpuacct:/group" (version 1).
    """
    for line in membership.splitlines():
        number, controllers, path = line.split(":", 2)
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        for root in [mount, mount / "unified"] if number == "0" else [mount / "cpu"]:
            group = root / path.lstrip("/")  # a container may not see its own group, but only the root
            yield from (parent for parent in [group, *group.parents] if parent.is_relative_to(root))


def _read_quota(group: Path) -> float:
    """CPU time per second for the processes of a control group; infinity without a limit."""
    if (limit := group / "cpu.max").is_file():
        quota, period = limit.read_text().split()
        return math.inf if quota == "max" else int(quota) / int(period)
    if (limit := group / "cpu.cfs_quota_us").is_file():
        quota_us = int(limit.read_text())
        return math.inf if quota_us < 0 else quota_us / int((group / "cpu.cfs_period_us").read_text())
    return math.inf


def count_cores(cores: Cores | None = None, of_all_processes: Sequence[Cores] = ()) -> int:
    """Number of cores for a process, at least 1. Processes that share a core or a CPU quota get equal parts of it.

    Launchers either let all processes of a machine use all cores (torchrun), or give each process cores of its own
    (``srun --cpus-per-task``).

    Args:
        cores: cores of the process; this process's by default.
        of_all_processes: cores of every process, including this one; empty if there is only this one.
    """
    cores = cores or usable_cores()
    neighbours = [other for other in of_all_processes if other.machine == cores.machine] or [cores]
    share = sum(1 / sum(number in other.numbers for other in neighbours) for number in cores.numbers)
    share = min(share, cores.quota / sum(other.group == cores.group for other in neighbours))
    return max(int(share + 1e-6), 1)  # the shares of one core may sum to slightly less than 1
