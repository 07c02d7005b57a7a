"""Writes in the background: an output that fails or blocks never reaches the training loop."""

import logging
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

logger = logging.getLogger(__name__)

MAX_WAITING = 10_000  # writes; further ones are dropped while an output blocks
SECONDS_AT_END = 5.0  # to wait for an output when the process ends


class Sink:
    """Runs the writes to one output, in their order, in a thread of its own.

    The first write that fails is reported as a warning; later ones are tried all the same. Loader workers that are forked
    have no such thread and write directly.

    Args:
        name: of the output, for the warning.
    """

    def __init__(self, name: str):
        self.name = name
        self._tasks: SimpleQueue = SimpleQueue()
        self._failed = False
        self._process = os.getpid()
        threading.Thread(target=self._work, name=f"write {name}", daemon=True).start()

    def __call__(self, task: Callable, *arguments: object) -> None:
        """Run ``task(*arguments)`` in the background."""
        if os.getpid() != self._process:
            self._run(task, arguments)
        elif self._tasks.qsize() < MAX_WAITING:
            self._tasks.put((task, arguments))

    def flush(self) -> None:
        """Wait until the writes so far are done, for at most ``SECONDS_AT_END``."""
        if os.getpid() == self._process:
            done = threading.Event()
            self._tasks.put((done.set, ()))
            done.wait(SECONDS_AT_END)

    def _work(self) -> None:
        while True:
            self._run(*self._tasks.get())

    def _run(self, task: Callable, arguments: tuple) -> None:
        try:
            task(*arguments)
        except Exception as error:  # whatever an output raises: it must not end the run
            if not self._failed:
                self._failed = True
                logger.warning("%s: not written (%s: %s); the run continues without it", self.name, type(error).__name__, error)
