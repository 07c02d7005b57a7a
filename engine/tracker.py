"""An experiment tracker (``TRACKER``), which receives the metrics of a run in a process of its own.

The tracker's package, its threads, its exit handlers and a server that does not respond can thus neither slow down nor end the
run: values are queued, and the process is killed if it does not end in time.
"""

import contextlib
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from yacs.config import CfgNode

from engine.tracker_process import SECONDS_AT_EXIT
from utils.background import Sink
from utils.config.loading import flatten
from utils.text import escape
from utils.urls import without_environment_secrets

logger = logging.getLogger(__name__)

SECONDS_AT_ERROR = 10.0  # maximum wait for the tracker after an error or a stop, which is reported after it
PROGRAM = Path(__file__).with_name("tracker_process.py")


def build_tracker(cfg: CfgNode, run_id: str, output: Path) -> "Tracker | None":
    """Start the tracker of a run; None if the config has none.

    The tracker's run is identified by the id, the model name and the tag of the run. A resumed run thus continues it, and a run
    that starts from a checkpoint of another directory with another tag has its own.
    """
    if cfg.TRACKER == "none":
        return None
    identity = f"{run_id}/{cfg.MODEL.NAME}/{cfg.TAG}".encode(errors="surrogateescape")
    run = {
        "tracker": cfg.TRACKER,
        "id": hashlib.sha256(identity).hexdigest()[:16],
        "name": escape(cfg.TAG),
        "group": escape(cfg.MODEL.NAME),
        "folder": str(output.absolute()),
        "config": {key: escape(value) if isinstance(value, str) else value for key, value in flatten(cfg).items()},
    }
    return Tracker(run)


class Tracker:
    """Passes points to the process of a tracker. No failure of the tracker ends the run; each causes at most one warning.

    Args:
        run: see ``build_tracker``.
    """

    def __init__(self, run: dict):
        self._name = f"TRACKER={run['tracker']}"
        self._process: subprocess.Popen | None = None
        self._ended = threading.Event()  # set when the process has ended, or could not be started
        self._closing = False
        self._write = Sink(self._name)
        self._write(self._start, run)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Add a point.

        Args:
            step: number of updates so far.
            values: finite values by name.
        """
        self._write(self._send, {"step": step, "values": values})

    def close(self, *, finished: bool) -> None:
        """End the tracker's run, and wait for it, for a limited time. Then kill its process.

        Args:
            finished: whether the run has finished; if not, the tracker's run is marked as failed, until the run resumes.
        """
        self._closing = True
        self._write(self._send, {"finished": finished})
        seconds = SECONDS_AT_EXIT if finished else SECONDS_AT_ERROR
        if not self._ended.wait(seconds):
            logger.warning(
                "%s: not finished after %.0f s, so its process is killed. The tracker may lack the last points, but "
                "metrics.jsonl has all of them",
                self._name,
                seconds,
            )
            if self._process is not None:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.killpg(self._process.pid, signal.SIGKILL)
        self._write.flush()  # the warning of a failure is logged before this process ends

    def _start(self, run: dict) -> None:
        try:
            self._process = subprocess.Popen(
                [sys.executable, str(PROGRAM), str(os.getpid())],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C does not reach it, and it can be killed with its own child processes
            )
        except BaseException:
            self._ended.set()
            raise
        threading.Thread(target=self._listen, args=(self._process,), daemon=True).start()
        self._send(run)

    def _send(self, entry: dict) -> None:
        """Write an object to the process. It may block, in the background; if the process has ended, nothing is written."""
        if self._process is None or self._process.stdin is None or self._ended.is_set():
            return
        data = f"{json.dumps(entry)}\n".encode()
        with contextlib.suppress(BrokenPipeError):  # ``_listen`` reports it
            while data:
                data = data[self._process.stdin.write(data) or 0 :]

    def _listen(self, process: subprocess.Popen) -> None:
        """Log what the process reports, until it ends."""
        assert process.stdin is not None
        assert process.stdout is not None
        has_warned = False
        with process.stdout:
            for line in process.stdout:
                level, _, text = line.decode(errors="replace").rstrip().partition(" ")
                has_warned |= level == "WARNING"
                severity = logging.WARNING if level == "WARNING" else logging.INFO
                logger.log(severity, "%s: %s", self._name, without_environment_secrets(text))
        status = process.wait()
        if not self._closing and not has_warned:
            logger.warning("%s: its process has ended (%d); the run continues without it", self._name, status)
        self._ended.set()
        self._write(process.stdin.close)  # in the thread that writes to it
