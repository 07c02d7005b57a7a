"""Set up the processes, run one job, and turn errors into an exit status."""

import argparse
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence

import torch
from torch.distributed.elastic.multiprocessing.errors import record
from yacs.config import CfgNode

from data.build import StalledWorkerError
from data.index import DataError
from jobs.evaluation import evaluate_checkpoint
from jobs.replay import replay_update
from jobs.throughput import measure_throughput
from jobs.training import check_model, dry_run_training, train
from utils.arguments import is_reporting_process
from utils.config import ConfigError
from utils.distributed import (
    LostRankError,
    MissingDeviceError,
    OtherRankError,
    World,
    cleanup,
    is_lost_connection,
    lost_rank_error,
    setup,
)
from utils.errors import Stopped, TrainingError
from utils.log import setup_logging
from utils.schedule import accumulation_steps
from utils.stop import StopRequest
from weights.reader import CheckpointError

logger = logging.getLogger(__name__)

FAILED = 1  # exit status: the job cannot continue
USAGE_ERROR = 2  # exit status: the command, config, data or checkpoint is unusable, or the disk is full
STOPPED = 75  # exit status: a signal stopped training; the same command resumes it (EX_TEMPFAIL of sysexits.h)
USER_ERRORS = (ConfigError, DataError, CheckpointError, TrainingError)


@record
def launch(args: argparse.Namespace, cfg: CfgNode | None, opts: Sequence, stop: StopRequest) -> None:
    """Set up the processes, run the requested job, and exit with a nonzero status if the job fails or is stopped.

    Args:
        cfg: None for --replay, and for --eval without --cfg.
        opts: KEY, VALUE, ... of the command line.
        stop: records stop signals. After a signal, training saves within a few updates and exits; other jobs end immediately.
    """
    world = start_processes(cfg)
    setup_logging(world.rank)
    try:
        run_job(args, cfg, opts, world, stop)
    except USER_ERRORS as error:  # the message gives the remedy, so the traceback is omitted
        if world.is_main or not isinstance(error, TrainingError):  # all processes raise the same TrainingError
            logger.error("%s", without_traceback(error))
        leave(world, FAILED if isinstance(error, TrainingError) else USAGE_ERROR)
    except OtherRankError:  # the rank that failed reports the reason
        leave(world, USAGE_ERROR)
    except (LostRankError, StalledWorkerError) as error:
        logger.error("%s", error)
        leave(world, FAILED)
    except RuntimeError as error:
        message = describe_known_error(error, world)
        if message is None:
            raise
        logger.error("%s", message)
        leave(world, FAILED)
    except Stopped as reason:
        if world.is_main:
            logger.warning("%s", reason)
        leave(world, STOPPED)
    except KeyboardInterrupt:
        if world.is_main:
            logger.warning("stopped")
        leave(world, 128 + signal.SIGINT)
    cleanup()


def start_processes(cfg: CfgNode | None) -> World:
    """Check the model and join the other processes; on failure, print the reason and exit, since logging is not set up yet."""
    try:
        if cfg is None:
            return setup()
        check_model(cfg)
        world = setup(cfg.COLLECTIVE_TIMEOUT)
        accumulation_steps(cfg, world.size)  # rejects a global batch size that is not a multiple of the images per forward pass
        return world
    except ValueError as error:
        if is_reporting_process() or isinstance(error, MissingDeviceError):
            sys.stderr.write(f"main.py: error: {error}\n")
        sys.exit(USAGE_ERROR)
    except LostRankError as error:
        sys.stderr.write(f"main.py: error: {error}\n")
        sys.exit(FAILED)


def run_job(args: argparse.Namespace, cfg: CfgNode | None, opts: Sequence, world: World, stop: StopRequest) -> None:
    if args.throughput or args.eval or args.replay or args.check:  # these jobs have no state to save on a signal
        stop.restore_handlers()
    if args.throughput:
        measure_throughput(cfg, world)
    elif args.eval:
        evaluate_checkpoint(args, cfg, opts, world)
    elif args.replay:
        replay_update(args.replay, opts, world)
    elif args.check:
        dry_run_training(cfg, world, find_unused_parameters=args.find_unused_params)
    else:
        train(cfg, world, stop, find_unused_parameters=args.find_unused_params)


def describe_known_error(error: RuntimeError, world: World) -> str | None:
    """The message, with its remedy, for a known error of torch; None for any other error."""
    first_line = str(error).splitlines()[0] if str(error) else ""
    if isinstance(error, torch.OutOfMemoryError):
        remedy = (
            "lower --batch-size (set DATA.GLOBAL_BATCH_SIZE to keep the global batch size), or add --use-checkpoint or --amp"
        )
        return f"{first_line}; {remedy}"
    if is_lost_connection(error):
        return str(lost_rank_error(world, error, "start-up or evaluation"))
    if "DataLoader worker" in str(error):
        return (
            f"{first_line.strip().rstrip('.')}. Lower DATA.NUM_WORKERS if the host runs out of memory; the same command "
            "resumes the run"
        )
    return None


def leave(world: World, status: int) -> None:
    """End this process after an error or a stop.

    If there are several processes, skip Python's cleanup: threads of the process group may wait for ranks that have ended, and
    joining or destroying them would block or abort.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise an error about the killed workers
    for child in multiprocessing.active_children():
        child.kill()  # loader workers, which ignore the signals that stop training
    if world.size == 1:
        sys.exit(status)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # the stream is closed, or was never open
            stream.flush()
    os._exit(status)


def without_traceback(error: Exception) -> str:
    """Message of an error. An error from a loader worker contains a traceback, of which only the final message is returned."""
    text = str(error).strip()
    return text.splitlines()[-1].split(": ", 1)[-1] if "Original Traceback" in text else text
