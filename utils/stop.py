"""Stop signals: a handler sets a flag; the training loop then saves a checkpoint after an update and exits."""

import os
import signal
import time
from types import FrameType

# Signals that launchers, schedulers and terminals send to end a job. Loader workers ignore them.
_NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP", "SIGQUIT")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
SECONDS_OF_ONE_REQUEST = 2.0  # a closed terminal or Ctrl-C signals the process directly, and again through torchrun


class StopRequest:
    """A flag that is set when one of ``SIGNALS`` arrives.

    A second signal ends the process immediately, unless it arrives within ``SECONDS_OF_ONE_REQUEST`` after the first one:
    launchers pass the same request on more than once. SIGHUP stays ignored if it was ignored before, as under ``nohup``.

    The constructor installs the signal handlers. They have no effect in forked loader workers.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._received_at = 0.0
        self._process = os.getpid()
        under_nohup = hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        handled = [number for number in SIGNALS if not (under_nohup and number == signal.SIGHUP)]
        self._previous = {number: signal.signal(number, self._handle) for number in handled}

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
        if self.signal is None:
            self.signal = signal.Signals(number)
            self._received_at = time.monotonic()
        elif time.monotonic() - self._received_at > SECONDS_OF_ONE_REQUEST:
            os._exit(128 + number)
