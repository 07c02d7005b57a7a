"""Loader workers: how they start, how their progress is watched, and how they end."""

import contextlib
import functools
import logging
import math
import multiprocessing
import multiprocessing.queues
import multiprocessing.util
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from data.datasets import ImageDataset, Key
from data.files import DataError
from data.index import Index
from utils.stop import SIGNALS

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_CHECKS = 1.0  # interval of the checks for a stalled worker, and for the end of the parent process
SECONDS_UNTIL_WARNING = 30.0  # time without a finished image after which a warning is logged
FINISHED, READING, NANOSECONDS = 0, 1, 2  # columns of ``WatchedDataset.progress``
SHARED_MEMORY = "/dev/shm"
BATCHES_PER_WORKER = 2  # that a loader worker prepares in advance, torch's default
NO_IMAGE = -1


class StalledWorkerError(RuntimeError):
    """The loader workers make no progress. The message includes the workers, the images that they read and the remedy."""


class WatchedDataset(Dataset):
    """A dataset whose loader workers record their progress in memory that they share with the main process.

    Attributes:
        progress: (max(num_workers, 1), 3), the number of images that each worker has finished, the position of the image
            that it is reading, or ``NO_IMAGE``, and the nanoseconds that the finished images took.
    """

    def __init__(self, dataset: ImageDataset, num_workers: int):
        self.dataset = dataset
        self.progress = torch.tensor([[0, NO_IMAGE, 0]] * max(num_workers, 1))
        if num_workers:
            self.progress.share_memory_()

    @property
    def index(self) -> Index:
        return self.dataset.index

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def seconds_per_image(self) -> float:
        """Mean time that a worker takes to read, decode and augment an image; 0 before the first image."""
        total = self.progress.sum(dim=0)
        return float(total[NANOSECONDS] / 1e9 / total[FINISHED].clamp(min=1))

    def __getitem__(self, key: Key) -> object:
        started = time.perf_counter_ns()
        worker = get_worker_info()
        progress = self.progress[0 if worker is None else worker.id]
        progress[READING] = key[1]
        try:
            sample = self.dataset[key]
        except BaseException as error:
            if not isinstance(error, DataError) and hasattr(error, "add_note"):  # Python 3.11 or later
                error.add_note(f"The error occurred while reading {self.path(key[1])}")
            raise_sendable(error)
        finally:
            progress[READING] = NO_IMAGE
        progress[NANOSECONDS] += time.perf_counter_ns() - started
        progress[FINISHED] += 1
        return sample

    def path(self, position: int) -> str:
        """Path of an image, for messages."""
        return self.index.path(position)


class StallCheck:
    """Checks that the loader workers make progress while the main process waits for a batch.

    Progress is an image that any worker has finished, so that large batches and slow disks are no stall. Time during which
    this process did not run, for example while it was suspended, is not counted.

    Args:
        timeout: seconds without progress after which ``check`` raises an error; 0: never.
    """

    def __init__(self, dataset: WatchedDataset, timeout: float):
        self.dataset = dataset
        self.timeout = timeout
        self.interval = min(SECONDS_BETWEEN_CHECKS, timeout / 2) if timeout else SECONDS_BETWEEN_CHECKS
        self.restart()

    def restart(self) -> None:
        """Start to wait for the next batch."""
        self._last_check = time.monotonic()
        self._seconds = 0.0
        self._finished = self._num_finished()
        self._warned = False

    def check(self) -> None:
        """Check the progress; call it every ``interval`` seconds while no batch arrives.

        Raises:
            StalledWorkerError: no image was finished for ``timeout`` seconds.
        """
        seconds = time.monotonic() - self._last_check
        if self._num_finished() != self._finished:
            self.restart()
            return
        self._last_check += seconds
        self._seconds += min(seconds, 2 * self.interval)  # a longer time means that this process did not run
        if 0 < self.timeout <= self._seconds:
            raise self.stalled(self._seconds)
        if self._seconds >= SECONDS_UNTIL_WARNING and not self._warned:
            self._warned = True
            limit = f"; after {self.timeout:g} s (DATA.WORKER_TIMEOUT), the run ends" if self.timeout else ""
            logger.warning(
                "the loader workers have finished no image for %.0f s (%s)%s", self._seconds, self._describe(), limit
            )

    def stalled(self, seconds: float) -> StalledWorkerError:
        """The error for workers that have made no progress for ``seconds``."""
        return StalledWorkerError(
            f"the loader workers have finished no image for {seconds:.0f} s ({self._describe()}); check the disk, or raise "
            f"DATA.WORKER_TIMEOUT={self.timeout:g}. The same command resumes the run"
        )

    def _num_finished(self) -> int:
        return int(self.dataset.progress[:, FINISHED].sum())

    def _describe(self) -> str:
        """The images that the workers are reading."""
        reading = [(worker, position) for worker, position in enumerate(self.dataset.progress[:, READING].tolist())]
        names = [f"worker {worker} is reading {self.dataset.path(position)}" for worker, position in reading if position >= 0]
        return ", ".join(names) or "no worker is reading an image"


def collate_sendable(collate: Callable, samples: list) -> object:
    """Collate a batch; all errors reach the main process, see ``raise_sendable``."""
    try:
        return collate(samples)
    except BaseException as error:
        raise_sendable(error)


def raise_sendable(error: BaseException) -> NoReturn:
    """Raise an error or, in a loader worker, a RuntimeError instead of one that torch does not send to the main process.

    After a SystemExit, a KeyboardInterrupt or the like, a worker would end without a message.
    """
    if isinstance(error, Exception) or get_worker_info() is None:
        raise error
    raise RuntimeError(f"{type(error).__name__}: {error}") from error


def create_loader(dataset: Dataset, *, num_workers: int, collate_fn: Callable, **options) -> DataLoader:
    """Create a data loader whose workers end with this process, however it ends.

    Args:
        options: further arguments of ``DataLoader``.

    Raises:
        DataError: the workers cannot create sockets, see ``check_sockets``.
    """
    if num_workers:
        check_sockets()
        _register_exit_hook(os.getpid())
    return DataLoader(
        dataset,
        num_workers=num_workers,
        collate_fn=functools.partial(collate_sendable, collate_fn),
        worker_init_fn=start_worker,
        multiprocessing_context="fork" if num_workers else None,  # Python 3.14 would start them from another process
        **options,
    )


def warn_about_shared_memory(num_bytes: int) -> None:
    """Warn if the batches of the loader workers may not fit into shared memory; a full one would end a worker (bus error).

    Args:
        num_bytes: maximum size of the batches that are ready at the same time.
    """
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:  # a system without this directory
        return
    if (free := status.f_bavail * status.f_frsize) < num_bytes:
        logger.warning(
            "%s has %d MiB free, but the batches of the loader workers of this process may need %d MiB: enlarge it "
            "(docker run --shm-size 16g), or lower DATA.NUM_WORKERS or --batch-size",
            SHARED_MEMORY,
            free // 2**20,
            math.ceil(num_bytes / 2**20),
        )


def check_sockets() -> None:
    """Check that the loader workers can create sockets in the temporary directory; they send the batches through them.

    Raises:
        DataError: no socket can be created, for example because the path of the directory is too long.
    """
    if torch.multiprocessing.get_sharing_strategy() != "file_descriptor":  # other strategies need no sockets
        return
    try:
        with tempfile.TemporaryDirectory(prefix="pymp-") as folder, socket.socket(socket.AF_UNIX) as probe:
            probe.bind(f"{folder}/listener-12345678")  # the name has as many characters as those of multiprocessing
    except OSError as error:
        raise DataError(
            f"loader workers cannot create sockets in the temporary directory {tempfile.gettempdir()} ({error}); set "
            "TMPDIR to a writable local directory with a short path (export TMPDIR=/tmp), or set DATA.NUM_WORKERS to 0"
        ) from None


def start_worker(_worker: int) -> None:
    """Prepare a loader worker: it ignores stop signals, ends with its parent, and ends if it cannot send a batch."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    # Python would print the error and drop the batch, and the main process would wait for it.
    setattr(multiprocessing.queues.Queue, "_on_queue_feeder_error", staticmethod(_end_after_lost_batch))  # noqa: B010 - not typed


def end_with_parent() -> None:
    """Let this worker process end when its parent ends, however it ends. Call it in the worker.

    The loop of torch notices the end of the parent only between two batches, and executors do not notice it.
    """
    process = multiprocessing.parent_process()
    assert process is not None  # only the main process has none
    parent = process.pid  # unlike os.getppid(), right even if the parent has ended already

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_CHECKS)
        os._exit(1)

    threading.Thread(target=watch, name="end with parent", daemon=True).start()


def _end_after_lost_batch(error: Exception, _batch: object) -> NoReturn:
    """End this worker after its thread failed to send a batch."""
    with contextlib.suppress(OSError):
        os.write(2, f"loader worker: cannot send a batch: {type(error).__name__}: {error}\n".encode(errors="backslashreplace"))
    os._exit(1)


@functools.cache
def _register_exit_hook(_process: int) -> None:
    """Kill the loader workers when this process exits, before multiprocessing waits for them.

    Python's exit ends daemonic child processes with SIGTERM and waits for them without limit, but the workers ignore SIGTERM.
    Unlike ``atexit`` handlers, finalizers of multiprocessing also run in processes that multiprocessing has started.
    """
    multiprocessing.util.Finalize(None, kill_workers, exitpriority=0)


def kill_workers() -> None:
    """Kill the daemonic child processes, which include all loader workers, and do not wait for their end."""
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error about the killed workers
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
