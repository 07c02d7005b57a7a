"""Batches on the device, from the loader workers: waiting, decode errors, augmentation and normalisation there."""

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from data.datasets import Sample
from data.erasing import Erase
from data.files import DataError
from data.rand_augment import RandAugment
from data.samplers import TrainBatches, separate_copies
from data.transforms import Normalize
from data.workers import StallCheck, WatchedDataset

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Batch:
    """A batch on the device.

    images: (B, 3, H, W), normalised; targets: (B,) class ids; keys: (B, 2) epoch and index of each image, on the host.
    """

    images: Tensor
    targets: Tensor
    keys: np.ndarray

    @property
    def indices(self) -> list[int]:
        return self.keys[:, 1].tolist()


class DeviceLoader:
    """Data loader that copies batches to the device, normalises them there and, in training, augments them.

    Args:
        max_unreadable: maximum number of unreadable images of this process; one more ends the run with an error.

    Attributes:
        seconds_waited: time spent waiting for the loader workers, excluding copies to the device.
    """

    def __init__(
        self,
        loader: DataLoader,
        normalize: Normalize,
        device: torch.device,
        *,
        rand_augment: RandAugment | None = None,
        erase: Erase | None = None,
        max_unreadable: int = 0,
    ):
        self.loader = loader
        self.normalize = normalize
        self.device = device
        self.rand_augment = rand_augment
        self.erase = erase
        self.max_unreadable = max_unreadable
        self.unreadable: set[int] = set()
        self.seconds_waited = 0.0
        self._batches: Any = None  # torch's iterator
        self._started = False  # whether the next iteration has been started, see ``TrainLoader.start``
        # On a GPU, batches are copied while the default stream still computes the update before.
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def dataset(self) -> WatchedDataset:
        return cast(WatchedDataset, self.loader.dataset)

    def count_needed_workers(self, num_images: int, seconds: float) -> int:
        """Number of loader workers that load ``num_images`` in ``seconds``, by the speed measured so far."""
        return math.ceil(self.dataset.seconds_per_image * num_images / seconds)

    def __iter__(self) -> Iterator[Batch]:
        for images, targets, keys, decode_errors in self._host_batches():
            self.count_unreadable(decode_errors)
            images, targets = self._to_device(images), self._to_device(targets)
            if self.rand_augment is not None:
                images = self.rand_augment(images, keys)
            images = self.normalize(images)
            if self.erase is not None:
                images = self.erase(images, keys)
            yield Batch(images, targets, keys)

    def _to_device(self, values: Tensor) -> Tensor:
        if self._copies is None:
            return values.to(self.device)
        with torch.cuda.stream(self._copies):
            copy = values.to(self.device, non_blocking=True)
        stream = torch.cuda.current_stream(self.device)
        stream.wait_stream(self._copies)
        copy.record_stream(stream)  # its memory may be reused only after the computations in this stream
        return copy

    def _host_batches(self) -> Iterator:
        """Yield the batches of ``loader``, before the copy to the device.

        Raises:
            StalledWorkerError: the workers finished no image for DATA.WORKER_TIMEOUT seconds.
            RuntimeError: a worker ended.
            Exception: the error of a worker, with its traceback in the message.
        """
        check = StallCheck(self.dataset, self.loader.timeout)
        if not self._started:
            self._start_epoch(check)
        self._started = False
        while True:
            started = time.monotonic()
            batch = self._next(check)
            if batch is None:
                return
            self.seconds_waited += time.monotonic() - started
            yield batch

    def _start_epoch(self, check: StallCheck) -> None:
        """Start the workers, or let them start another epoch.

        Raises:
            StalledWorkerError: a worker did not finish a batch of the previous epoch within DATA.WORKER_TIMEOUT seconds.
        """
        if self._batches is not None:  # the workers persist, and so does their iterator
            self._batches._timeout = self.loader.timeout
        try:
            self._batches = iter(self.loader)
        except RuntimeError as error:
            if not _timed_out(error):
                raise
            raise check.stalled(self.loader.timeout) from None
        if self.loader.timeout:
            self._batches._timeout = check.interval  # after each interval, ``next`` raises an error and can be called again

    def _next(self, check: StallCheck) -> tuple | None:
        """The next batch of ``loader``; None after the last one."""
        check.restart()
        while True:
            try:
                return next(self._batches)
            except StopIteration as end:
                if end.args:  # raised in a worker; the epoch is not complete
                    raise RuntimeError(str(end)) from None
                return None
            except RuntimeError as error:
                if not _timed_out(error):
                    raise
            except (OSError, EOFError) as error:
                if "in DataLoader worker process" in str(error):  # an error of the worker, whose traceback the message has
                    raise
                raise RuntimeError(f"DataLoader worker (pid unknown) ended while it sent a batch ({error!r})") from error
            check.check()

    def count_unreadable(self, decode_errors: list[tuple[int, str]]) -> None:
        """Count and log unreadable images, except those that were counted before.

        Raises:
            DataError: more than ``max_unreadable`` images are unreadable.
        """
        for index, reason in decode_errors:
            if index in self.unreadable:
                continue
            self.unreadable.add(index)
            logger.warning("%s. Unreadable images so far: %d", reason, len(self.unreadable))
        if len(self.unreadable) > self.max_unreadable:
            raise DataError(
                f"unreadable images: {len(self.unreadable)}, more than DATA.MAX_UNREADABLE={self.max_unreadable}; repair or "
                "remove the images listed in the log, or raise the limit"
            )


class TrainLoader(DeviceLoader):
    """Loader of the training batches of one epoch, which can start at any update of the epoch."""

    @property
    def labels(self) -> np.ndarray:
        """Class id of each image of the dataset."""
        return self.dataset.index.labels

    @property
    def updates_per_epoch(self) -> int:
        return self.sampler.updates_per_epoch

    @property
    def passes_per_epoch(self) -> int:
        """Forward passes of this process per epoch."""
        return self.sampler.updates_per_epoch * self.sampler.accumulation

    def set_position(self, epoch: int, first_update: int = 0) -> None:
        if (epoch, first_update) != (self.sampler.epoch, self.sampler.first_update):
            self._started = False
        self.sampler.set_position(epoch, first_update)

    def start(self, epoch: int) -> None:
        """Let the workers prepare the first batches of an epoch now, for example during an evaluation."""
        self.set_position(epoch)
        if self.loader.num_workers:
            self._start_epoch(StallCheck(self.dataset, self.loader.timeout))
            self._started = True

    @property
    def sampler(self) -> TrainBatches:
        return self.loader.batch_sampler  # type: ignore[return-value]  # given by ``build_train_loader``


def _timed_out(error: RuntimeError) -> bool:
    return str(error).startswith("DataLoader timed out")


def collate(samples: list[Sample]) -> tuple[Tensor, Tensor, np.ndarray, list[tuple[int, str]]]:
    """Collate the readable images of a batch, ordered by ``separate_copies`` for mixup.

    Returns:
        Images, targets, keys and decode errors.

    Raises:
        DataError: no image of the batch is readable.
    """
    decode_errors = [error for sample in samples for error in sample.decode_errors]
    readable = [sample for sample in samples if sample.image is not None]
    if not readable:
        raise DataError(
            f"{decode_errors[0][1]}. All images of this batch are unreadable, so skipping them leaves an empty batch; raise "
            "--batch-size, or set DATA.UNREADABLE to replace"
        )
    readable = [readable[position] for position in separate_copies([sample.key[1] for sample in readable])]
    images, targets = default_collate([(sample.image, sample.label) for sample in readable])
    # One array: torch would search a list of keys for tensors to pin, key by key.
    return images, targets, np.array([sample.key for sample in readable]), decode_errors
