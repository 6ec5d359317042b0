"""What a list of times says and how surely: percentiles with intervals, when the steady state begins, where the times change.

Nothing here assumes a distribution: latencies have none that is known. Times are in seconds, in the order of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["ALPHA", "Change", "change", "effective", "interval", "needed", "summary", "warm_up"]

ALPHA = 0.05
"""Intervals hold the true value in 95 % of runs: each end is wrong in 2.5 %."""
_SURE = 0.01  # a change that chance makes in less than one run of a hundred is told
Times = Sequence[float] | npt.NDArray[np.float64]


def needed(share: float) -> int:
    """Samples without which the quantile of that share has no interval.

    Of n independent times all lie below the quantile with probability p^n, and all above with (1 - p)^n. Only where neither is more
    than ALPHA / 2 are the smallest and the largest of them an interval (Wilks 1941; David and Nagaraja, Order Statistics, 7.1):
    n = ln(ALPHA / 2) / ln(max(p, 1 - p)), which is 6 for p50, 36 for p90, 368 for p99.
    """
    return ceil(log(ALPHA / 2) / log(max(share, 1 - share)))


def interval(count: int, share: float) -> tuple[int | None, int | None]:
    """Which of ``count`` ascending times (from 0) bound the quantile of that share; None: on that side none is low or high enough.

    How many times lie below the quantile is binomial (count, share), so that the l-th smallest is above it with the probability of
    fewer than l: the largest l and the smallest u with tails of no more than ALPHA / 2.
    """
    factorials = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, count + 1)))])
    below = np.arange(count + 1)
    logs = factorials[-1] - factorials - factorials[::-1]
    tail = np.cumsum(np.exp(logs + below * np.log(share) + below[::-1] * np.log1p(-share)))
    low = int(np.searchsorted(tail, ALPHA / 2, side="right"))  # P(fewer than low) <= ALPHA / 2
    high = int(np.searchsorted(tail, 1 - ALPHA / 2)) + 1  # P(high or more) <= ALPHA / 2
    return (low - 1 if low else None), (high - 1 if high <= count else None)


def effective(times: Times) -> int:
    """How many independent samples ``times`` count as.

    Neighbours that are alike (a queue, a noisy second) say less than as many independent ones: n / (1 + 2 Σ ρ), with the
    autocorrelations ρ of the ranks up to the first that chance explains (2 / √n, Bartlett).
    """
    ranks = _ranks(times) - (len(times) + 1) / 2
    size = float(ranks @ ranks)
    if size == 0 or len(ranks) < 4:
        return len(ranks)
    total = 0.0
    for lag in range(1, len(ranks) // 2):
        alike = float(ranks[lag:] @ ranks[:-lag]) / size
        if alike <= 2 / len(ranks) ** 0.5:
            break
        total += alike
    return max(1, int(len(ranks) / (1 + 2 * total)))


def summary(times: Times, percentiles: Sequence[int] = (50, 90, 99)) -> dict[str, Any]:
    """``samples``, ``effective`` (see there), and by name (``p50``) ``value``, ``low``, ``high`` in seconds.

    A percentile that the samples do not carry is None; an end of an interval is None where so many independent samples have none.
    """
    ordered, count = np.sort(np.asarray(times, np.float64)), effective(times)
    found: dict[str, Any] = {"samples": len(ordered), "effective": count}
    for percentile in percentiles:
        share = percentile / 100
        if len(ordered) < needed(share):
            found[f"p{percentile}"] = None
            continue
        low, high = interval(count, share)
        # Places of fewer samples among all of them: an end is never nearer to the middle for it.
        stretch = len(ordered) / count
        found[f"p{percentile}"] = {
            "value": float(np.quantile(ordered, share)),
            "low": None if low is None else float(ordered[int(low * stretch)]),
            "high": None
            if high is None
            else float(ordered[min(len(ordered), ceil((high + 1) * stretch)) - 1]),
        }
    return found


def warm_up(times: Times, *, slower: bool = True) -> int:
    """How many leading times are not of the steady state yet.

    White's rule (MSER, Simulation 69, 1997): the cut after which the squared standard error of the mean of what is left,
    Σ (x - mean)² / m², is smallest; at most half. It is taken of ranks in place of times, so that one hiccup in the middle, however
    long, weighs no more than the slowest rank and is not mistaken for the end of the warm-up.

    Args:
        times: at least four, or nothing is dropped.
        slower: drop a beginning only if it is slower than the rest: what is faster is no warm-up but a machine that slows down. False:
            of a queue, which is empty at first.
    """
    count = len(times)
    if count < 4:
        return 0
    ranks = _ranks(times)[::-1] / count
    left, sums = np.arange(1, count + 1), np.cumsum(ranks)
    errors = ((np.cumsum(ranks**2) - sums**2 / left) / left**2)[::-1][: count // 2 + 1]  # by what is dropped
    if slower:
        means = (sums / left)[::-1][: count // 2 + 1]
        errors = np.where(means <= means[0], errors, np.inf)
    # The first of those that differ by rounding alone.
    return int(np.argmax(errors <= errors.min() + 1e-12))


@dataclass(frozen=True)
class Change:
    """Where times change for good.

    Attributes:
        at: the first time of the second part.
        before, after: medians of both parts, in seconds.
    """

    at: int
    before: float
    after: float

    @property
    def factor(self) -> float:
        """Above 1: it became slower."""
        return self.after / self.before


def change(times: Times) -> Change | None:
    """The place in the middle from which times are longer or shorter; None: they stay as they are.

    Pettitt's test (Applied Statistics 28, 1979): U(t) = 2 Σ ranks up to t - t (n + 1); chance makes a |U| as large as K with
    probability 2 exp(-6 K² / (n³ + n²)). Told below one in a hundred, and where the intervals of the two medians do not overlap: less
    than that nobody could see in the figures. ``n`` counts neighbours that are alike once: see ``effective``, of each part alone,
    since the change itself makes neighbours alike.
    """
    count = len(times)
    if count < 2 * needed(0.5):
        return None
    every, ranks = np.asarray(times, np.float64), _ranks(times)
    sums = 2 * np.cumsum(ranks)[:-1] - np.arange(1, count) * (count + 1)
    at = int(np.argmax(np.abs(sums))) + 1
    parts = every[:at], every[at:]
    if min(len(part) for part in parts) < needed(0.5):
        return None
    independent = sum(effective(part) for part in parts)
    furthest = float(np.abs(sums[at - 1])) * (independent / count) ** 1.5  # K grows with the root of n cubed
    if 2 * np.exp(-6 * furthest**2 / (independent**3 + independent**2)) > _SURE:
        return None
    before, after = (summary(part, (50,))["p50"] for part in parts)
    lower, upper = sorted((before, after), key=lambda each: float(each["value"]))
    if None in (lower["high"], upper["low"]) or lower["high"] >= upper["low"]:
        return None
    return Change(at, before["value"], after["value"])


def _ranks(times: Times) -> npt.NDArray[np.float64]:
    """Ranks from 1, equal times with the mean of theirs."""
    _, where, counts = np.unique(np.asarray(times, np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return np.asarray((last - (counts - 1) / 2)[where], np.float64)
