"""Errors and events that end a run."""


class TrainingError(RuntimeError):
    """Training or evaluation cannot continue. The message has the update or the weights, and the remedy."""


class Stopped(Exception):  # noqa: N818 - an event, not an error
    """A signal stopped the run. The message has its position and how to resume."""
