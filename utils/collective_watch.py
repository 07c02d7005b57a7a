"""Detect collective operations on a GPU that do not finish, before NCCL aborts the process without naming a rank.

The host may have to wait for the GPU in any call: one that reads a value, or one that launches a kernel while the launch queue
is full. Therefore a thread watches the time.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

SHARE_OF_TIMEOUT = 0.9  # of the timeout of collectives; NCCL aborts the process once all of it has passed


class StalledCollectiveError(RuntimeError):
    """A collective operation on a GPU has not finished in time, so another process probably does not take part in it."""


class Span:
    """Collective operations that the host launches one after the other.

    Attributes:
        finished: CUDA event that the GPU reaches after all of them; None until they have been launched.
    """

    finished: torch.cuda.Event | None = None


class CollectiveWatch:
    """Calls ``on_stall`` in a thread if the collective operations on this process's GPU do not finish in time.

    Args:
        timeout_seconds: timeout of collectives.
        on_stall: receives a StalledCollectiveError after ``SHARE_OF_TIMEOUT`` of the timeout. Time in which this process was
            suspended is not counted.
    """

    def __init__(self, timeout_seconds: float, on_stall: Callable[[StalledCollectiveError], object]):
        self._seconds = SHARE_OF_TIMEOUT * timeout_seconds
        self._on_stall = on_stall
        self._spans: deque[Span] = deque()  # the thread removes finished spans
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="collective watch", daemon=True).start()

    def begin(self) -> Span:
        """Start a span; call it before the first of its collectives is launched."""
        self._spans.append(span := Span())
        return span

    def end(self, span: Span) -> None:
        """End a span; call it after the current stream has been made to wait for all of its collectives."""
        event = torch.cuda.Event()
        event.record()
        span.finished = event

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _watch(self) -> None:
        interval, previous, seconds = min(1.0, self._seconds / 10), None, 0.0
        while not self._closed.wait(interval):
            try:
                oldest = self._oldest_unfinished()
            except RuntimeError:  # an error of the GPU, which the host's next call reports
                return
            seconds = seconds + interval if oldest is not None and oldest is previous else 0.0
            previous = oldest
            if seconds >= self._seconds:
                self._on_stall(StalledCollectiveError(f"a collective operation has not finished for {seconds:.0f} s"))
                return

    def _oldest_unfinished(self) -> Span | None:
        while self._spans and (event := self._spans[0].finished) is not None and event.query():
            self._spans.popleft()
        return self._spans[0] if self._spans else None


@contextmanager
def watched(watch: CollectiveWatch | None) -> Iterator[None]:
    """Watch the collectives launched in the ``with`` block; no effect without a watch."""
    if watch is None:
        yield
        return
    span = watch.begin()
    yield
    watch.end(span)
