"""Background writes of logs and checkpoints. A failed log write causes a warning; a failed checkpoint write ends the run."""

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue

logger = logging.getLogger(__name__)

MAX_QUEUED = 10_000  # maximum number of queued writes per output; further writes are dropped
SECONDS_AT_EXIT = 5.0  # maximum wait for the queued writes of an output when the process ends


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
        except Exception as error:  # any error: a failed log write must not end the run
            if not self._failed:
                self._failed = True
                logger.warning("%s: not written (%s: %s); the run continues", self.name, type(error).__name__, error)


class BackgroundWrite:
    """Runs one write at a time in a thread, while training continues. The process does not exit before the write ends."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="write")
        self._write: Future | None = None

    def start(self, write: Callable[[], None]) -> None:
        """Run a write in the background. Call ``wait`` before starting the next one."""
        assert self._write is None, "call wait() first, which raises the error of the previous write"
        self._write = self._executor.submit(write)

    def wait(self) -> None:
        """Wait for the current write, if there is one.

        Raises:
            Exception: the error with which the write failed.
        """
        write = self._write
        self._write = None
        if write is not None:
            write.result()

    @property
    def failed(self) -> bool:
        """Whether the write has failed, so that ``wait`` will raise its error."""
        return self._write is not None and self._write.done() and self._write.exception() is not None

    def close(self) -> None:
        """Wait for the write, and log its error: raising it at the end of a run would hide an earlier error."""
        try:
            self.wait()
        except Exception as error:
            logger.error("%s", error)
