"""What counts of right and wrong answers say."""

import math
from fractions import Fraction

Z95 = 1.959964  # quantile of the normal distribution, two-sided 95 %


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % interval of a share, in percent (Wilson, 1927): it stays within 0 and 100, and holds for small counts."""
    share, z2 = correct / total, Z95**2
    centre = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2)) / (1 + z2 / total)
    return 100 * max(centre - half, 0.0), 100 * min(centre + half, 1.0)


def mcnemar_test(only_first: int, only_second: int) -> float:
    """p of two models being equally good, exact and two-sided (McNemar, 1947).

    Args:
        only_first, only_second: images that one of them alone got right; those of both or neither tell nothing.
    """
    total, fewer = only_first + only_second, min(only_first, only_second)
    tail = term = 1  # the sum of total over count, count = 0 to fewer
    for count in range(fewer):
        term = term * (total - count) // (count + 1)
        tail += term
    return float(min(Fraction(2 * tail, 2**total), Fraction(1)))


def paired_interval(only_first: int, only_second: int, total: int) -> tuple[float, float]:
    """95 % interval of the second's share minus the first's on the same images, in percentage points (Wald)."""
    difference = (only_second - only_first) / total
    half = Z95 * math.sqrt(only_first + only_second - (only_second - only_first) ** 2 / total) / total
    return 100 * (difference - half), 100 * (difference + half)
