"""Errors and events that end a run."""


class ConfigError(ValueError):
    """An invalid setting. The message has the key, the value and the remedy."""


class TrainingError(RuntimeError):
    """Training or evaluation cannot continue, for example after a loss that is not finite. The message gives the remedy."""


class Stopped(Exception):  # noqa: N818 - an event, not an error
    """A signal stopped the run. The message states where it stopped."""


def describe(error: BaseException) -> str:
    """The message of an error on one line; the name of its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__
