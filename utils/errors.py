"""Errors and events that end a run, and the exit status of a process."""

import signal

# Exit statuses of main.py and the scripts, see docs/outputs.md.
FAILED = 1  # the job cannot continue
USAGE_ERROR = 2  # the command, config, data or checkpoint is unusable, or the disk is full
STOPPED = 75  # a signal stopped training; the same command resumes it (EX_TEMPFAIL of sysexits.h)
# The errors of status 2, by name: ``models`` and ``data`` define their own.
_USER_ERRORS = {"ConfigError", "DataError", "CheckpointError"}


class ConfigError(ValueError):
    """An invalid setting. The message has the key, the value and the remedy."""


class TrainingError(RuntimeError):
    """Training or evaluation cannot continue, for example after a loss that is not finite. The message gives the remedy."""


class Stopped(Exception):  # noqa: N818 - an event, not an error
    """A signal stopped the run. The message states where it stopped."""


class OtherRankError(RuntimeError):
    """Another process failed in a task that all processes wait for; that process reports the reason.

    Args:
        status: exit status of the process that failed, and thus of this one.
    """

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


def is_user_error(error: BaseException) -> bool:
    """Whether an error is a ``ConfigError``, ``DataError`` or ``CheckpointError``, whose message has the remedy."""
    return any(base.__name__ in _USER_ERRORS for base in type(error).__mro__)


def exit_status(error: BaseException) -> int:
    """Exit status of a process after an error or a stop."""
    if isinstance(error, Stopped):
        return STOPPED
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT
    if isinstance(error, OtherRankError):
        return error.status
    return USAGE_ERROR if is_user_error(error) else FAILED


def one_line(error: BaseException) -> str:
    """The message of an error on one line; the name of its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
