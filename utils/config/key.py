"""A config key, and limits that several keys share."""

from dataclasses import dataclass

INFINITY = float("inf")
# Largest side of an image or a kernel, in pixels or tokens. Larger values are mistakes, which would exhaust the memory at the
# start of a run.
MAX_SIDE = 8192


@dataclass(frozen=True)
class Key:
    """A config key.

    Args:
        default: default value, which also determines the type of the key.
        meaning: what the key does, and its unit, for the documentation.
        choices: legal values; () for no restriction.
        minimum, maximum: smallest and largest legal number, also of each number in a list. Without a minimum, the value is not
            restricted, except that numbers are finite.
        is_path: the value is a path, in which ~ is expanded.
    """

    default: object
    meaning: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float = INFINITY
    is_path: bool = False

    def legal_numbers(self, *, several: bool) -> str:
        """The range of a key with a minimum, in words, such as "a number from 0 to 1"."""
        limits = f"from {self.minimum:g} to {self.maximum:.10g}" if self.maximum < INFINITY else f"of at least {self.minimum:g}"
        return f"{'numbers, each' if several else 'a number'} {limits}"
