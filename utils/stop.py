"""Signals that ask training to stop: a handler sets a flag, and the training loop saves and leaves at its next update."""

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))


class StopRequest:
    """A flag that SIGTERM, SIGINT and SIGUSR1 set within its ``with`` block; a second signal ends the process at once.

    Loader workers that are forked within the block ignore the signals.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._process = os.getpid()
        self._previous: dict = {}

    def requested(self) -> bool:
        return self.signal is not None

    def __enter__(self) -> "StopRequest":
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = signal.Signals(number)
