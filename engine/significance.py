"""Confidence intervals and significance tests for counts of correct predictions."""

from scipy.stats import binomtest


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of an accuracy, in percent (Wilson, 1927). It is within [0, 100] and valid for small counts."""
    interval = binomtest(correct, total).proportion_ci(0.95, method="wilson")
    return 100 * interval.low, 100 * interval.high


def mcnemar_test(only_first: int, only_second: int) -> float:
    """Exact two-sided p-value of the hypothesis that two models are equally accurate (McNemar, 1947).

    Args:
        only_first, only_second: numbers of images that only the first, or only the second, model predicts correctly. The test
            does not depend on the other images.
    """
    discordant = only_first + only_second
    return float(binomtest(only_first, discordant).pvalue) if discordant else 1.0


def paired_interval(only_first: int, only_second: int, total: int) -> tuple[float, float]:
    """95 % confidence interval of the second model's accuracy minus the first's on the same images, in percentage points.

    The interval is exact, conditional on the number of images that only one model predicts correctly (Clopper and Pearson,
    1934). It excludes 0 if ``mcnemar_test`` returns less than 0.05.
    """
    discordant = only_first + only_second
    if not discordant:
        return 0.0, 0.0
    interval = binomtest(only_second, discordant).proportion_ci(0.95, method="exact")
    low, high = (100 * (2 * proportion - 1) * discordant / total for proportion in (interval.low, interval.high))
    return low, high
