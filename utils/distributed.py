"""Distributed processes: rank and device, DDP, and collective operations."""

import itertools
import logging
import os
import socket
import struct
import time
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from utils.collective_watch import CollectiveWatch, StalledCollectiveError, watched
from utils.devices import check_device_is_not_shared, choose_device, count_cores, usable_cores, warn_about_unused_devices
from utils.errors import FAILED, USAGE_ERROR, OtherRankError, exit_status, one_line
from utils.launcher import read_launch

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
COLLECTIVE_TIMEOUT = 600.0  # seconds
LONG_TIMEOUT = 3600.0  # seconds, while rank 0 lists a data set, which may have a million files on a slow disk
SECONDS_TO_REGISTER = 5.0  # maximum wait for ranks to register in the store after a failed collective
SECONDS_BETWEEN_CHECKS = 0.02  # polling interval of the store while processes start


class LostRankError(RuntimeError):
    """A process did not start, or no longer takes part in collectives. The message gives its rank, if known."""


_watch: CollectiveWatch | None = None  # of this process's GPU, from ``setup`` to ``cleanup``, like torch's process group
_alone = False  # see ``alone``


@dataclass
class Position:
    """What a process is doing; ``describe`` returns, for example, "training after update 4"."""

    describe: Callable[[], str] = lambda: "start-up or evaluation"


@dataclass(frozen=True)
class World:
    """Rank and device of this process among ``size`` processes.

    Args:
        timeout_seconds: maximum wait for a process to join a collective.
        store: key-value store shared by the processes of this launch; None without torchrun.
        num_cores: CPU cores for this process, see ``utils.devices.count_cores``.
        position: what this process is doing, for the error after a failed collective operation.

    Attributes:
        meetings: numbers of the waits for rank 0 in the store, in which all processes take part in the same order.
    """

    rank: int
    local_rank: int
    size: int
    device: torch.device
    timeout_seconds: float = COLLECTIVE_TIMEOUT
    store: dist.Store | None = field(default=None, repr=False, compare=False)
    num_cores: int = field(default_factory=count_cores, compare=False)
    position: Position = field(default_factory=Position, repr=False, compare=False)
    meetings: Iterator[int] = field(default_factory=itertools.count, init=False, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def processes(self) -> str:
        """The number of processes in words, as in "1 process" or "8 processes"."""
        return "1 process" if self.size == 1 else f"{self.size} processes"

    def __str__(self) -> str:
        return f"{self.processes} on {self.device.type}"


def setup(
    timeout_seconds: float = COLLECTIVE_TIMEOUT, on_stall: Callable[[BaseException, World], object] | None = None
) -> World:
    """Join the process group of torchrun (NCCL on GPUs, else gloo); without torchrun, run as a single process.

    Args:
        timeout_seconds: maximum wait for a process to start or to join a collective.
        on_stall: called on GPUs, in a thread, if a collective does not finish in time, shortly before NCCL aborts the process;
            it should end the process. None: leave it to NCCL.

    Raises:
        ConfigError: the launcher's variables are missing or inconsistent.
        MissingDeviceError: fewer GPUs than processes, or GPUs that torch cannot use.
        LostRankError: a process did not start.
    """
    launched, rank, local_rank, size = read_launch()
    device = choose_device(local_rank)
    if not launched:
        warn_about_unused_devices(device)
        return World(rank, local_rank, size, device, timeout_seconds)
    timeout, on_gpu = timedelta(seconds=timeout_seconds), device.type == "cuda"
    if not on_gpu:
        choose_interface(size)
    try:
        store, rank, size = next(dist.rendezvous("env://", rank, size, timeout=timeout))
        store = dist.PrefixStore(agree_on_launch_id(store, rank, size, timeout_seconds=timeout_seconds), store)
        if on_gpu:
            check_device_is_not_shared(store, device)
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            store=dist.PrefixStore("collectives", store),
            rank=rank,
            world_size=size,
            device_id=device if on_gpu else None,
            timeout=timeout,
        )
        cores: list[Any] = [None] * size
        dist.all_gather_object(cores, usable_cores())
    except RuntimeError as error:  # includes dist.DistError
        if not is_lost_connection(error):
            raise
        raise LostRankError(
            f"rank {rank} did not connect to the other ranks within COLLECTIVE_TIMEOUT={timeout_seconds:g} s: {error}. If the "
            "nodes cannot reach each other at the addresses above (Debian maps a host name to 127.0.1.1), set "
            f"{'NCCL' if on_gpu else 'GLOO'}_SOCKET_IFNAME on every node to the network interface of the cluster, which "
            "`ip address` lists"
        ) from None
    world = World(rank, local_rank, size, device, timeout_seconds, store, count_cores(cores[rank], cores))
    if on_gpu and size > 1 and on_stall is not None:
        global _watch
        _watch = CollectiveWatch(timeout_seconds, lambda error: on_stall(error, world))
    return world


def choose_interface(size: int) -> None:
    """Let gloo use the network interface that leads to the other nodes, unless GLOO_SOCKET_IFNAME is set.

    By default, gloo uses the address of the host name. Debian maps that name to 127.0.1.1, which other nodes cannot reach.

    Args:
        size: number of processes on all nodes.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ or int(os.environ.get("LOCAL_WORLD_SIZE", 0)) == size:
        return
    interface = find_interface(os.environ["MASTER_ADDR"])
    if interface is None and "LOCAL_WORLD_SIZE" in os.environ:
        # This is the first node, whose own name may be mapped to a loopback address. Use the default route; the address is
        # reserved for documentation, and nothing is sent to it.
        interface = find_interface("192.0.2.1")
    if interface is not None:
        os.environ["GLOO_SOCKET_IFNAME"] = interface


def find_interface(host: str) -> str | None:
    """Name of the network interface from which packets to ``host`` leave; None for a loopback address, or if unknown."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # selects a route without sending a packet
            address = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                if _ipv4_address(probe, name) == address and not address.startswith("127."):
                    return name
    except (OSError, ImportError):
        return None
    return None


def _ipv4_address(probe: socket.socket, interface: str) -> str | None:
    """First IPv4 address of an interface; None if it has none, or on systems other than Linux."""
    import fcntl

    get_interface_address = 0x8915  # SIOCGIFADDR of linux/sockios.h; the address is at bytes 20 to 23 of struct ifreq
    try:
        reply = fcntl.ioctl(probe, get_interface_address, struct.pack("256s", interface.encode()[:15]))
    except OSError:
        return None
    return socket.inet_ntoa(reply[20:24])


def agree_on_launch_id(store: dist.Store, rank: int, size: int, *, timeout_seconds: float) -> str:
    """Wait for all processes of this launch, and return the launch's unique id, a prefix for keys in the store.

    When torchrun restarts the processes, it keeps its store; the restart counts as a new launch. Without the prefix, the new
    processes would read the addresses of processes that have ended.

    Raises:
        LostRankError: a rank did not start in time; the message of rank 0 lists all such ranks.
    """
    deadline = time.monotonic() + timeout_seconds
    try:
        return open_launch(store, size, deadline) if rank == 0 else join_launch(store, rank, deadline)
    except TimeoutError as error:
        raise LostRankError(f"{error} did not start within COLLECTIVE_TIMEOUT={timeout_seconds:g} s") from None


def open_launch(store: dist.Store, size: int, deadline: float) -> str:
    """Rank 0: publish a new launch id, wait until every other rank has registered under it, and confirm their tokens."""
    launch_id = uuid.uuid4().hex
    store.set("start", launch_id)
    while missing := [rank for rank in range(1, size) if not store.check([f"{launch_id}/{rank}"])]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"rank(s) {', '.join(map(str, missing))}")
        time.sleep(SECONDS_BETWEEN_CHECKS)
    tokens = [store.get(f"{launch_id}/{rank}").decode() for rank in range(1, size)]
    store.set(f"{launch_id}/confirmed", ",".join(tokens))
    return launch_id


def join_launch(store: dist.Store, rank: int, deadline: float) -> str:
    """Every other rank: register a token under the published launch id until rank 0 confirms it.

    The id may be that of an earlier launch, whose confirmation does not contain this token; the rank then reads it again.
    """
    token, registered = uuid.uuid4().hex, set()
    while time.monotonic() < deadline:
        launch_id = store.get("start").decode() if store.check(["start"]) else ""
        if launch_id and launch_id not in registered:
            store.set(f"{launch_id}/{rank}", token)
            registered.add(launch_id)
        confirmed = f"{launch_id}/confirmed"
        if launch_id and store.check([confirmed]) and token in store.get(confirmed).decode().split(","):
            return launch_id
        time.sleep(SECONDS_BETWEEN_CHECKS)
    raise TimeoutError("rank 0, or another rank,")


def end_watch() -> None:
    """No longer watch the collectives: an error ends this process, which may take longer than the timeout of collectives."""
    global _watch
    if _watch is not None:
        _watch.close()
        _watch = None


def cleanup() -> None:
    """Leave the process group."""
    end_watch()
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(model: nn.Module, world: World, *, find_unused_parameters: bool = False) -> nn.Module:
    """Wrap a model such that its backward pass averages the gradients over the processes; a single process needs no wrapper."""
    if world.size == 1:
        return model
    # DDP warns that it copies gradients whose strides differ from the parameter's, such as those of depthwise kernels. The
    # copies are small, so the warning is ignored.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    with watched(_watch):
        return DistributedDataParallel(
            model,
            device_ids=[world.device.index] if world.device.type == "cuda" else None,
            find_unused_parameters=find_unused_parameters,
            gradient_as_bucket_view=True,
        )


def unwrap(model: nn.Module) -> nn.Module:
    """The model that ``wrap`` was given."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextmanager
def alone() -> Iterator[None]:
    """Context in which a training step takes part in no collective: if it fails, no other process waits for it."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def num_processes() -> int:
    return dist.get_world_size() if dist.is_initialized() and not _alone else 1


def start_sum(values: Tensor) -> Callable[[], object]:
    """Start to sum a tensor over all processes, in place, and return a function that waits for the sum.

    On GPUs, that function lets the kernels launched after it wait, but not the host. Collectives that are launched between the
    two calls, such as those of a backward pass, are watched with this one, see ``utils.collective_watch``.
    """
    if not dist.is_initialized() or _alone:
        return lambda: None
    watch = _watch
    span = watch.begin() if watch is not None else None
    work = dist.all_reduce(values, async_op=True)

    def wait() -> None:
        work.wait()
        if watch is not None and span is not None:
            watch.end(span)

    return wait


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place."""
    start_sum(values)()
    return values


def gather_on_main(world: World, value: Result) -> list[Result] | None:
    """Gather the pickled values of all processes on rank 0, in rank order; None on other ranks."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] | None = [None] * world.size if world.is_main else None
    with watched(_watch):
        dist.gather_object(value, values, dst=0)
    return values


def on_main(world: World, task: Callable[[], Result], *, long_timeout: bool = False) -> Result:
    """Run ``task`` on rank 0 and return its result in every process; if it fails, all processes fail.

    Args:
        long_timeout: let the other processes wait for up to ``LONG_TIMEOUT`` instead of the timeout of collectives.

    Raises:
        OtherRankError: in the other processes, with rank 0's message; rank 0 raises its own error.
        dist.DistError: in the other processes, if rank 0 did not finish in time.
    """
    outcome: list = [None, None, None]  # result, message of an error and its exit status
    error = None
    if world.is_main:
        try:
            outcome[0] = task()
        except (Exception, SystemExit) as caught:  # the other processes wait for the result
            error, outcome[1:] = caught, [f"{type(caught).__name__}: {caught}", exit_status(caught)]
    if dist.is_initialized():
        if long_timeout or world.device.type == "cuda":
            # On GPUs, a collective operation would occupy the GPU while it waits, and its timeout would be too short.
            _wait_for_main(world, LONG_TIMEOUT if long_timeout else world.timeout_seconds)
        with watched(_watch):
            dist.broadcast_object_list(outcome, src=0, device=world.device)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise OtherRankError(f"rank 0 failed: {outcome[1]}", outcome[2])
    return outcome[0]


def _wait_for_main(world: World, timeout_seconds: float) -> None:
    """Wait in the store until rank 0 calls this function too. Time in which this process was suspended is not counted.

    ``store.wait`` would block signal handlers, and other threads that use the store: the watch of the collectives, and NCCL's.

    Raises:
        dist.DistStoreError: rank 0 did not call it in time.
    """
    assert world.store is not None
    key = f"main/{next(world.meetings)}"
    if world.is_main:
        world.store.set(key, "")
    waited = 0.0
    while not world.store.check([key]):
        if waited > timeout_seconds:
            raise dist.DistStoreError(f"rank 0 did not finish within {timeout_seconds:g} s")
        time.sleep(pause := min(max(waited / 10, 0.001), 0.5))
        waited += pause


def on_all(world: World, task: Callable[[], Result]) -> Result:
    """Run ``task`` in every process and return this process's result; if it fails in one process, all processes fail.

    Raises:
        OtherRankError: in the processes where ``task`` succeeded, if it failed in another one. A process where it failed
            raises its own error.
    """
    error: BaseException | None = None
    result: Any = None
    try:
        result = task()
    except (Exception, SystemExit) as caught:  # the other processes wait for the result
        error = caught
    counts = [error is not None, error is not None and exit_status(error) != USAGE_ERROR]
    failures, failures_of_the_job = map(int, sum_over_processes(torch.tensor(counts, dtype=torch.float, device=world.device)))
    if error is not None:
        raise error
    if failures:
        raise OtherRankError(f"{failures} of {world.size} processes failed", FAILED if failures_of_the_job else USAGE_ERROR)
    return result


def is_lost_connection(error: Exception) -> bool:
    """Whether an error comes from a failed collective operation rather than from the computation."""
    # After a timeout, gloo fails the other operations in flight with a message that lacks its path.
    from_gloo = "/gloo/" in str(error) or "caused pair closure" in str(error)
    return isinstance(error, (dist.DistError, StalledCollectiveError)) or (isinstance(error, RuntimeError) and from_gloo)


def lost_rank_error(world: World, error: Exception) -> LostRankError:
    """Return the error to report after a failed collective operation.

    Every surviving process calls this function, which registers its rank in the store; ranks that do not register are lost.
    """
    missing = _find_missing_ranks(world)
    what = f"rank(s) {', '.join(map(str, missing))} lost" if missing else "the connection between the processes is lost"
    reason = one_line(error).split("] ")[-1].split(". ")[0]
    return LostRankError(
        f"{what}: a process ended, or did not take part in {world.position.describe()} within COLLECTIVE_TIMEOUT ({reason}). "
        "If it ended, see its output above for the reason. The same command resumes from the newest checkpoint"
    )


def _find_missing_ranks(world: World) -> list[int]:
    """Ranks that do not register within ``SECONDS_TO_REGISTER``."""
    missing, store = set(range(world.size)), world.store
    assert store is not None  # only several processes, which have one, lose a connection
    deadline = time.monotonic() + SECONDS_TO_REGISTER
    try:
        store.set(f"alive/{world.rank}", "")
        while missing and time.monotonic() < deadline:
            missing = {rank for rank in missing if not store.check([f"alive/{rank}"])}
            time.sleep(0.05)
    except (dist.DistError, RuntimeError):  # the process that hosts the store ended: rank 0, unless torchrun hosts it
        return [0]
    return sorted(missing)
