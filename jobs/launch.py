"""Set up the processes, run one job, and turn errors into an exit status."""

import argparse
import contextlib
import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Sequence
from functools import partial
from typing import NoReturn

from torch.distributed.elastic.multiprocessing.errors import get_error_handler
from yacs.config import CfgNode

from data.workers import StalledWorkerError, kill_workers
from engine.largest_batch import OUT_OF_MEMORY, OUT_OF_MEMORY_REMEDY
from engine.replay import replay_update
from engine.schedule import accumulation_steps
from jobs.evaluate import evaluate_checkpoint
from jobs.model import check_model
from jobs.teacher import build_teacher
from jobs.throughput import measure_throughput
from jobs.train import dry_run_training, train
from utils.devices import MissingDeviceError
from utils.distributed import (
    LostRankError,
    World,
    cleanup,
    is_lost_connection,
    lost_rank_error,
    setup,
)
from utils.errors import FAILED, USAGE_ERROR, OtherRankError, Stopped, TrainingError, exit_status, is_user_error, one_line
from utils.launcher import is_reporting_process, read_launch
from utils.log import FILE_ONLY, setup_logging
from utils.stop import StopRequest
from utils.text import printable

logger = logging.getLogger(__name__)

SECONDS_TO_END = 20.0  # maximum time from the report of an error to the end of the process
# Type of an error, parts of its message of which it has one, and the remedy.
REMEDIES = (
    (RuntimeError, OUT_OF_MEMORY, OUT_OF_MEMORY_REMEDY),
    (
        Exception,
        (
            "unable to allocate shared memory",
            "unable to resize file </torch_",
            "unable to stretch file </torch_",
            "unable to write to file </torch_",
            "Bus error",
            "out of shared memory",
        ),
        "The shared memory (/dev/shm) through which the loader workers send batches is full: enlarge it (docker run --shm-size "
        "16g), or lower DATA.NUM_WORKERS or --batch-size; the same command resumes the run",
    ),
    (
        RuntimeError,
        ("DataLoader worker (pid",),  # the worker itself ended
        "See its output above for a reason; lower DATA.NUM_WORKERS if the host runs out of memory; the same command resumes "
        "the run",
    ),
)


def launch(args: argparse.Namespace, cfg: CfgNode | None, opts: Sequence, stop: StopRequest) -> None:
    """Set up the processes, run the requested job, and exit with a nonzero status if the job fails or is stopped.

    Args:
        cfg: None for --replay, and for --eval without --cfg.
        opts: KEY, VALUE, ... of the command line.
        stop: records stop signals. After a signal, training saves within a few updates and exits; other jobs end immediately.
    """
    get_error_handler().initialize()  # prints the Python stack after a crash
    world = None
    try:
        setup_logging(read_launch().rank)
        world = start_processes(cfg)
        run_job(args, cfg, opts, world, stop)
        cleanup()
    except BaseException as error:  # even SystemExit: Python's own exit waits for threads and child processes without limit
        leave(error, world)


def start_processes(cfg: CfgNode | None) -> World:
    """Check the model and join the other processes. An error of the command is reported like those of the command line."""
    try:
        if cfg is None:
            return setup(on_stall=leave)
        check_model(cfg)
        world = setup(cfg.COLLECTIVE_TIMEOUT, on_stall=leave)
        accumulation_steps(cfg, world.size)  # rejects a global batch size that is not a multiple of the images per forward pass
        return world
    except ValueError as error:
        if is_reporting_process() or isinstance(error, MissingDeviceError):
            sys.stderr.write(f"main.py: error: {printable(error)}\n")
        end_process(USAGE_ERROR)
    except LostRankError as error:
        sys.stderr.write(f"main.py: error: {printable(error)}\n")
        end_process(FAILED)


def run_job(args: argparse.Namespace, cfg: CfgNode | None, opts: Sequence, world: World, stop: StopRequest) -> None:
    if args.throughput or args.eval or args.replay or args.check:  # these jobs have no state to save on a signal
        stop.restore_handlers()
    if args.throughput:
        measure_throughput(cfg, world)
    elif args.eval:
        evaluate_checkpoint(args, cfg, opts, world)
    elif args.replay:
        replay_update(args.replay, opts, world, build_teacher=build_teacher)
    elif args.check:
        dry_run_training(cfg, world, find_unused_parameters=args.find_unused_params, profile=args.profile)
    else:
        train(cfg, world, stop, find_unused_parameters=args.find_unused_params)


def leave(error: BaseException, world: World | None) -> NoReturn:
    """Report an error or a stop, and end this process. Every error of a job ends here, whatever its type.

    Call it in the ``except`` clause, or in the thread that watches the collectives. Whatever else fails, the process ends
    within ``SECONDS_TO_END``.

    Args:
        world: None if the processes are not set up yet.
    """
    status = FAILED
    try:
        status = exit_status(error)
        end_later(status)
        kill_workers()  # first, since the report may block
        report(error, world)
    except BaseException:  # the report failed, for example for lack of memory; its traceback includes the reported error
        print_traceback()
    finally:
        end_process(status)


def report(error: BaseException, world: World | None) -> None:
    """Log an error or a stop: one line if its reason is known, else the traceback, which torchrun prints again at its end."""
    is_main = world is None or world.is_main
    if isinstance(error, (Stopped, KeyboardInterrupt)):
        if is_main:
            logger.warning("%s", "stopped" if isinstance(error, KeyboardInterrupt) else error)
        return
    if isinstance(error, OtherRankError) or (isinstance(error, TrainingError) and not is_main):
        return  # the main process, or the process that failed, reports the reason
    message = describe_known_error(error, world)
    if message is not None:
        logger.error("%s", message)
        return
    logger.error("unexpected error", exc_info=error, extra=FILE_ONLY)
    for handler in logging.getLogger().handlers:
        handler.flush()  # the console then shows the traceback after the lines that were logged before
    print_traceback()
    get_error_handler().record_exception(error)


def print_traceback() -> None:
    """Print the traceback of the current error on standard error, without Python's buffer, which may be blocked or closed."""
    with contextlib.suppress(BaseException):
        data = f"{printable(traceback.format_exc().strip())}\n".encode(errors="backslashreplace")
        while data:
            data = data[os.write(2, data) :]


def end_process(status: int) -> NoReturn:
    """End this process and its loader workers.

    Python's cleanup is skipped: it joins threads of the process group, of executors and of torch, which may wait for ranks or
    workers that have ended.
    """
    try:
        for task in (partial(end_later, status), kill_workers, logging.shutdown, flush_output):
            with contextlib.suppress(BaseException):
                task()
    finally:
        os._exit(status)


def end_later(status: int) -> None:
    """End this process after ``SECONDS_TO_END``, whatever it is doing: the console may be blocked, for example."""
    timer = threading.Timer(SECONDS_TO_END, os._exit, (status,))
    timer.daemon = True
    timer.start()


def flush_output() -> None:
    """Write the buffers of the console streams."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # the stream is closed, or was never open
            stream.flush()


def describe_known_error(error: BaseException, world: World | None) -> str | None:
    """The message, with its remedy, of a known error; None for any other error."""
    text = without_traceback(error)
    if is_user_error(error) or isinstance(error, (TrainingError, LostRankError, StalledWorkerError)):
        return text
    if world is not None and isinstance(error, RuntimeError) and is_lost_connection(error):
        return str(lost_rank_error(world, error))
    for kind, parts, remedy in REMEDIES:
        if isinstance(error, kind) and any(part in text for part in parts):
            return f"{text.rstrip('.')}. {remedy}"
    return None


def without_traceback(error: BaseException) -> str:
    """Message of an error on one line. Errors of loader workers contain a traceback; only its message is used."""
    text = one_line(error)
    if "Original Traceback" not in text:
        return text
    name = re.escape(type(error).__name__)
    return " ".join(re.split(rf"^(?:[\w.]+\.)?{name}: ", str(error), flags=re.MULTILINE)[-1].split()) or type(error).__name__
