"""Background writes of logs and checkpoints. A failed log write causes a warning; a failed checkpoint write ends the run."""

import logging
import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

from utils.errors import one_line

logger = logging.getLogger(__name__)

MAX_QUEUED = 10_000  # maximum number of queued writes per output; further writes are dropped
SECONDS_AT_EXIT = 5.0  # maximum wait for the queued writes of an output when the process ends
SECONDS_OF_LAST_WRITE = 60.0  # maximum wait for the checkpoint that is being written when a run ends


class Sink:
    """Runs the writes to one output in order, in a background thread.

    The first failed write is logged as a warning; later writes are still attempted. Forked loader workers do not have the
    thread and write directly.

    Args:
        name: name of the output, for the warning.
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
        elif self._tasks.qsize() < MAX_QUEUED:
            self._tasks.put((task, arguments))

    def flush(self) -> None:
        """Wait for the writes queued so far, for at most ``SECONDS_AT_EXIT``."""
        if os.getpid() == self._process:
            done = threading.Event()
            self._tasks.put((done.set, ()))
            done.wait(SECONDS_AT_EXIT)

    def _work(self) -> None:
        while True:
            self._run(*self._tasks.get())

    def _run(self, task: Callable, arguments: tuple) -> None:
        try:
            task(*arguments)
        except BaseException as error:  # any error, even SystemExit: a failed log write must end neither run nor thread
            if not self._failed:
                self._failed = True
                logger.warning("%s: not written (%s: %s); the run continues", self.name, type(error).__name__, error)


class BackgroundWrite:
    """Runs one write at a time in a thread, while training continues.

    Call ``wait`` or ``close`` before the process exits; otherwise, the exit interrupts the write.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.has_failed = False  # whether any write has failed

    def start(self, write: Callable[[], None]) -> None:
        """Run a write in the background. Call ``wait`` before starting the next one."""
        assert self._thread is None, "call wait() first, which raises the error of the previous write"
        # A daemon thread: Python's exit would wait without limit for any other thread.
        self._thread = threading.Thread(target=self._run, args=(write,), name="write", daemon=True)
        self._thread.start()

    def _run(self, write: Callable[[], None]) -> None:
        try:
            write()
        except BaseException as error:  # any error: ``wait`` raises it in the thread that started the write
            self._error, self.has_failed = error, True

    def join(self) -> None:
        """Wait for the current write, if there is one. If it has failed, ``wait`` will raise its error."""
        if self._thread is not None:
            self._thread.join()

    def wait(self) -> None:
        """Wait for the current write, if there is one.

        Raises:
            BaseException: the error with which the write failed.
        """
        self.join()
        error, self._thread, self._error = self._error, None, None
        if error is not None:
            raise error

    @property
    def is_writing(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether the write has failed, so that ``wait`` will raise its error."""
        return self._error is not None

    def close(self) -> None:
        """Wait for the write, at most ``SECONDS_OF_LAST_WRITE``, and log its error: raising it would hide an earlier error."""
        if self._thread is None:
            return
        self._thread.join(SECONDS_OF_LAST_WRITE)
        if self._thread.is_alive():
            logger.error("the checkpoint is not written after %.0f s; the write is interrupted", SECONDS_OF_LAST_WRITE)
            return
        try:
            self.wait()
        except BaseException as error:
            logger.error("%s", one_line(error))
