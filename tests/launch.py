"""Run ``main.py``, scripts and functions in processes forked from the test process, so that no package is imported again."""

import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch

import jobs.launch  # noqa: F401 - imported once, before the processes are forked
import main
from utils.distributed import cleanup, setup

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Outcome:
    """Exit code of every process, in order of rank, and the combined output of all processes."""

    exit_codes: list[int]
    output: str


def run_main(
    arguments: list[str],
    log: Path,
    *,
    processes: int = 1,
    kill_when: Callable[[], bool] | None = None,
    kill_signal: int = signal.SIGKILL,
    timeout: float = 120,
    prepare: Callable[[int], None] | None = None,
) -> Outcome:
    """Run ``main.py`` in child processes, and send ``kill_signal`` to all of them once ``kill_when()`` is true.

    Args:
        log: file to which the output of all processes is written.
        processes: number of processes, which is the world size.
        timeout: seconds after which the processes are killed and a TimeoutError is raised.
        prepare: called with the rank in every process, before ``main``.
    """
    context, port = multiprocessing.get_context("fork"), free_port()
    log.write_text("")
    children = [
        context.Process(target=_call_main, args=(arguments, rank, processes, port, log, prepare)) for rank in range(processes)
    ]
    for child in children:
        child.start()
    deadline = time.monotonic() + timeout
    while any(child.is_alive() for child in children):
        if kill_when is not None and kill_when():
            _kill(children, kill_signal)
            kill_when = None
        if time.monotonic() > deadline:
            _kill(children)
            raise TimeoutError(f"still running after {timeout} s:\n{log.read_text()}")
        time.sleep(0.005)
    for child in children:
        child.join()
    return Outcome([child.exitcode for child in children], log.read_text())


def run_script(script: ModuleType, arguments: list, log: Path, timeout: float = 120) -> Outcome:
    """Run ``main`` of a script in a child process, as from the command line; kill the process after ``timeout`` seconds."""
    log.write_text("")
    name = Path(script.__file__).name
    child = multiprocessing.get_context("fork").Process(
        target=_call_script, args=(script.main, [name, *map(str, arguments)], log)
    )
    child.start()
    child.join(timeout)
    child.kill()
    child.join()
    return Outcome([child.exitcode], log.read_text())


def run_in_processes(task: Callable, *arguments, processes: int, timeout: float = 120) -> None:
    """Call ``task(world, *arguments)`` on every rank of a torch.distributed group; assert that all ranks exit with status 0."""
    context, port = multiprocessing.get_context("fork"), free_port()
    children = [
        context.Process(target=_join_and_call, args=(task, arguments, rank, processes, port)) for rank in range(processes)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(timeout)
    exit_codes = [child.exitcode for child in children]
    for child in children:
        child.kill()
    assert exit_codes == [0] * processes


def torchrun(
    arguments: list, log: Path, *options: object, program: str | Path = "main.py", prefix: Sequence[str] = ()
) -> subprocess.Popen:
    """Start ``<prefix> torchrun <options> <program> <arguments>`` in a new session, with its output appended to ``log``."""
    command = [*prefix, sys.executable, "-m", "torch.distributed.run", *map(str, [*options, program, *arguments])]
    with open(log, "a") as file:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=file,
            stderr=file,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen, log: Path, seconds: float = 120) -> None:
    """Wait until ``condition()`` is true; assert that ``process`` is running, and that at most ``seconds`` pass."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.005)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _join_and_call(task: Callable, arguments: tuple, rank: int, processes: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.update(launch_variables(rank, processes, port))
    world = setup()
    task(world, *arguments)
    cleanup()


def launch_variables(rank: int, processes: int, port: int) -> dict[str, str]:
    """Environment variables that torchrun sets for a process."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _kill(children, kill_signal: int = signal.SIGKILL) -> None:
    for child in children:
        try:
            os.killpg(child.pid, kill_signal)  # the POSIX process group includes the loader workers
        except ProcessLookupError:
            child.kill()


def _call_script(task: Callable, arguments: list[str], log: Path) -> None:
    _redirect_output(log)
    torch.set_num_threads(1)
    warnings.resetwarnings()
    sys.argv = arguments
    try:
        task()
    finally:
        logging.shutdown()  # child processes of multiprocessing skip atexit handlers, including this one


def _redirect_output(log: Path) -> None:
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)


def _call_main(
    arguments: list[str], rank: int, processes: int, port: int, log: Path, prepare: Callable[[int], None] | None
) -> None:
    os.setpgid(0, 0)
    _redirect_output(log)
    torch.set_num_threads(1)
    warnings.resetwarnings()
    if processes > 1:
        os.environ.update(launch_variables(rank, processes, port))
    sys.argv = ["main.py", *map(str, arguments)]
    if prepare is not None:
        prepare(rank)
    try:
        main.main()
    finally:
        logging.shutdown()  # child processes of multiprocessing skip atexit handlers, including this one
