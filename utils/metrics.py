"""Intervals and tests for counts of correct predictions."""

from scipy.stats import binomtest


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % interval of a share, in percent (Wilson, 1927): it stays within 0 and 100, and holds for small counts."""
    interval = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    return 100 * interval.low, 100 * interval.high


def mcnemar_test(only_first: int, only_second: int) -> float:
    """p-value of the hypothesis that two models are equally good, exact and two-sided (McNemar, 1947).

    Args:
        only_first, only_second: images that only one of them predicts correctly; the others give no information.
    """
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


def paired_interval(only_first: int, only_second: int, total: int) -> tuple[float, float]:
    """95 % interval of the second model's share minus the first's on the same images, in percentage points.

    Exact given the number of images that only one of them predicts correctly (Clopper and Pearson, 1934), so that it excludes
    0 when ``mcnemar_test`` gives less than 0.05.
    """
    discordant = only_first + only_second
    if not discordant:
        return 0.0, 0.0
    interval = binomtest(only_second, discordant).proportion_ci(0.95, method="exact")
    low, high = (100 * (2 * share - 1) * discordant / total for share in (interval.low, interval.high))
    return low, high
