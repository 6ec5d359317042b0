"""Percentiles, intervals, warm-up and change, against closed forms and against series whose truth is known."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from tapeout.validate.statistics import ALPHA, change, effective, interval, needed, summary, warm_up


def below(count: int, share: float, fewer: int) -> float:
    """P(fewer than ``fewer`` of ``count`` times lie below the quantile of that share), term by term."""
    return sum(comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(fewer))


@pytest.mark.parametrize(("share", "count"), [(0.5, 6), (0.9, 36), (0.95, 72), (0.99, 368), (0.1, 36)])
def test_as_many_samples_as_a_percentile_needs(share: float, count: int) -> None:
    assert needed(share) == count
    far = max(share, 1 - share)
    assert far**count <= ALPHA / 2 < far ** (count - 1)
    assert None not in interval(count, share)
    assert None in interval(count - 1, share)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("count", [6, 36, 37, 100, 368, 1000])
def test_an_interval_is_the_narrowest_with_both_tails(share: float, count: int) -> None:
    low, high = interval(count, share)
    # The time of place l (from 0) is above the quantile when l or fewer times are below it.
    if low is not None:
        assert below(count, share, low + 1) <= ALPHA / 2
    assert low == count - 1 or below(count, share, (0 if low is None else low + 1) + 1) > ALPHA / 2
    # That of place u is below the quantile when more than u times are.
    if high is not None:
        assert 1 - below(count, share, high + 1) <= ALPHA / 2
    assert 1 - below(count, share, count if high is None else high) > ALPHA / 2


def test_a_summary_has_percentiles_with_their_intervals() -> None:
    found = summary(list(range(1, 101)))
    assert found["samples"] == 100
    assert found["p50"]["value"] == 50.5
    # Of a binomial (100, 1/2): the ranks 40 and 61, as tables have them.
    assert summary(np.random.default_rng(1).permutation(np.arange(1, 101)))["p50"] == {
        "value": 50.5, "low": 40.0, "high": 61.0
    }  # fmt: skip
    assert found["p99"] is None
    assert summary(range(35), (90,))["p90"] is None


def test_intervals_hold_the_true_percentile() -> None:
    rng, truth = np.random.default_rng(2), np.log(10)  # p90 of an exponential
    held = [
        each["low"] <= truth <= each["high"]
        for each in (summary(rng.exponential(size=200), (90,))["p90"] for _ in range(400))
    ]
    # 95 % of 400 have a deviation of 1.1 %; four of them below.
    assert np.mean(held) >= 0.95 - 4 * 0.011


def test_neighbours_that_are_alike_count_less() -> None:
    rng, count, alike = np.random.default_rng(3), 4000, 0.8
    series, noise = np.zeros(count), rng.standard_normal(count)
    for at in range(1, count):
        series[at] = alike * series[at - 1] + noise[at]
    # Of such a series n (1 - a) / (1 + a) are independent; the estimate is off by a third at most here.
    assert effective(series) == pytest.approx(count * (1 - alike) / (1 + alike), rel=1 / 3)
    assert effective(noise) > 0.9 * count
    wide, narrow = summary(series, (50,))["p50"], summary(rng.permutation(series), (50,))["p50"]
    assert wide["low"] < narrow["low"] < narrow["high"] < wide["high"]
    assert effective([1.0] * 50) == 50


def test_the_warm_up_ends_where_the_steady_state_begins() -> None:
    rng = np.random.default_rng(4)
    steady = rng.lognormal(0, 0.05, 400)
    assert warm_up(steady) <= 20  # chance drops a few
    slow = steady.copy()
    slow[:40] *= np.linspace(2, 1.3, 40)
    assert 38 <= warm_up(slow) <= 60
    hiccup = steady.copy()
    hiccup[150:155] = 100
    assert warm_up(hiccup) <= 20
    assert warm_up([1.0, 2.0]) == 0
    # What is faster is no warm-up of a machine, but one of a queue.
    cool = np.concatenate([steady[:100] / 2, steady[100:]])
    assert warm_up(cool) == 0
    assert 100 <= warm_up(cool, slower=False) <= 120
    assert warm_up([3.0, 3.0, *[1.0] * 50]) == 2
    assert warm_up(np.linspace(2, 1, 100)) == 50  # never steady: half, and not more


def test_a_change_in_the_middle_is_found_where_it_is() -> None:
    rng = np.random.default_rng(5)
    times = rng.lognormal(0, 0.1, 400)
    assert change(times) is None
    throttled = times.copy()
    throttled[250:] *= 1.4
    found = change(throttled)
    assert found is not None
    assert abs(found.at - 250) <= 5
    assert found.factor == pytest.approx(1.4, rel=0.05)
    faster = change(throttled[::-1])
    assert faster is not None
    assert faster.factor == pytest.approx(1 / 1.4, rel=0.05)
    assert change(rng.lognormal(0, 0.1, 400) * np.linspace(1, 1.5, 400)) is not None  # it creeps
    assert change(throttled[:5]) is None


def test_chance_is_no_change() -> None:
    rng = np.random.default_rng(6)
    told = [change(rng.lognormal(0, 0.2, 200)) is not None for _ in range(300)]
    # At most one in a hundred, whose deviation of 300 is 0.6 %; four of them.
    assert np.mean(told) <= 0.01 + 4 * 0.006
