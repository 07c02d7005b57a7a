"""Stop signals: a handler sets a flag; the training loop then saves a checkpoint within a few updates and exits."""

import os
import signal
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []))


class StopRequest:
    """A flag that is set when SIGTERM, SIGINT or SIGUSR1 arrives. A second signal ends the process immediately.

    The constructor installs the signal handlers. They have no effect in forked loader workers.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._process = os.getpid()
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def requested(self) -> bool:
        return self.signal is not None

    def restore_handlers(self) -> None:
        """Restore the previous signal handlers, and deliver any received signal to them."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self.signal is not None:
            signal.raise_signal(self.signal)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = signal.Signals(number)
