"""Raise an arbitrary error at an arbitrary call of a function of this project, in any process or thread of a run."""

import asyncio
import collections
import errno
import os
import random
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

import torch
from torch.utils.data import get_worker_info

ROOT = Path(__file__).parent.parent
PACKAGES = ("analysis", "data", "engine", "jobs", "main.py", "models", "scripts", "utils")


class OddError(Exception):
    """An error that cannot be rebuilt from its message, as errors of loader workers are."""

    def __init__(self, one: object, two: object):
        super().__init__(one, two)


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("this error has no message")


class NoExceptionError(BaseException):
    """An error that ``except Exception`` does not catch."""


ERRORS: list[Callable[[], BaseException]] = [
    lambda: KeyError("injected"),
    lambda: OSError(errno.EIO, "Input/output error"),
    lambda: OSError(errno.ENOSPC, "No space left on device", "/injected"),
    lambda: OSError("injected"),
    lambda: MemoryError(),
    lambda: RuntimeError(""),
    lambda: RuntimeError("injected\nCompile with TORCH_USE_CUDA_DSA\n\n"),
    lambda: RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later"),
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    lambda: RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"),
    lambda: SystemExit(0),
    lambda: SystemExit("injected"),
    lambda: KeyboardInterrupt(),
    lambda: RecursionError("maximum recursion depth exceeded"),
    lambda: AssertionError(),
    lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    lambda: ValueError("eingefügt: ошибка \udc80 \x1b[31m\r\n[forged]"),
    lambda: ValueError("x" * 1_000_000),
    lambda: StopIteration(),
    lambda: GeneratorExit(),
    lambda: TimeoutError("injected"),
    lambda: ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
    lambda: EOFError(),
    lambda: asyncio.CancelledError(),
    lambda: ImportError("libinjected.so.1: cannot open shared object file"),
    lambda: ZeroDivisionError("division by zero"),
    lambda: OddError(1, 2),
    lambda: UnprintableError(),
    lambda: NoExceptionError("injected"),
]


class Call(NamedTuple):
    """A function of the project and where it was called.

    Args:
        place: main, worker (a loader worker), writer (the thread that writes checkpoints) or sink (a thread that writes logs).
        function: file and qualified name.
    """

    rank: int
    place: str
    function: str


class Fault(NamedTuple):
    """The error ``ERRORS[error]`` at the ``number``-th call, counted from 1."""

    call: Call
    number: int
    error: int


def name_of(code: CodeType) -> str | None:
    """Name of a function of the project; None for other functions."""
    if not code.co_filename.startswith(f"{ROOT}/"):
        return None
    path = code.co_filename.removeprefix(f"{ROOT}/")
    name = getattr(code, "co_qualname", code.co_name)  # Python 3.10 has no qualified name
    return f"{path}:{name}" if path.split("/")[0] in PACKAGES else None


def current_place() -> str:
    thread = threading.current_thread().name
    if thread == "write":
        return "writer"
    if thread.startswith("write "):
        return "sink"
    return "other" if thread != "MainThread" else "main" if get_worker_info() is None else "worker"


class Tracer:
    """Counts the calls of the project's functions in this process and in processes forked from it.

    Args:
        visit: called with the function, its place and the number of the call, before the function runs; it may raise an error.
    """

    def __init__(self, rank: int, visit: Callable[[Call, int], None]):
        self.rank = rank
        self.visit = visit
        self.names: dict[CodeType, str | None] = {}
        self.counts: collections.Counter[Call] = collections.Counter()

    def start(self) -> None:
        threading.settrace(self)
        sys.settrace(self)

    def __call__(self, frame: FrameType, event: str, _argument: object) -> None:
        code = frame.f_code
        if code not in self.names:
            self.names[code] = name_of(code)
        name = self.names[code]
        if event == "call" and name is not None:
            call = Call(self.rank, current_place(), name)
            self.counts[call] += 1
            self.visit(call, self.counts[call])


def record_calls(path: Path) -> Callable[[int], None]:
    """Return a function that makes a process append its calls to ``path``: each function's 1st, 2nd, 4th, 8th, ... call."""

    def visit(call: Call, number: int) -> None:
        if number & (number - 1) == 0:
            file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(file, "\t".join([*map(str, call), f"{number}\n"]).encode())
            os.close(file)

    return lambda rank: Tracer(rank, visit).start()


def read_calls(path: Path) -> dict[Call, int]:
    """The recorded calls, each with the highest recorded number."""
    numbers: dict[Call, int] = {}
    for line in path.read_text().splitlines():
        rank, place, function, number = line.split("\t")
        call = Call(int(rank), place, function)
        numbers[call] = max(numbers.get(call, 0), int(number))
    return numbers


def draw_fault(calls: dict[Call, int], rng: random.Random) -> Fault:
    """Draw a place, a function, a call and an error."""
    places = sorted({call.place for call in calls} - {"other"})
    place = rng.choice([*places, *(place for place in places if place in ("main", "worker"))])
    call = rng.choice(sorted(call for call in calls if call.place == place))
    return Fault(call, rng.randint(1, calls[call]), rng.randrange(len(ERRORS)))


def inject(faults: list[Fault], path: Path) -> Callable[[int], None]:
    """Return a function that makes a process raise the errors, and append the time and number of each error to ``path``."""

    def visit(call: Call, number: int) -> None:
        for fault in faults:
            if (call, number) == (fault.call, fault.number):
                with open(path, "a") as file:
                    file.write(f"{time.time()} {fault.error}\n")
                raise ERRORS[fault.error]()

    return lambda rank: Tracer(rank, visit).start()
