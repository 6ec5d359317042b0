"""Requests that are answered together, on a session whose steps take as long as is said."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tapeout.validate.batching import arrivals, time_arrivals
from tapeout.validate.session import Facts, Logits


class Steps:
    """A BatchedSession and its clock: a step takes a second, and what it was given is kept."""

    facts = Facts("steps", "none", 0.0, 0, 99)
    vocab_size = 5

    def __init__(self, sequences: int) -> None:
        self.sequences = sequences
        self.now = 100.0
        self.steps: list[list[tuple[int, int]]] = []
        self.lengths = [0] * sequences

    def step(self, given: Sequence[tuple[int, Sequence[int]]]) -> Logits:
        self.steps.append([(sequence, len(ids)) for sequence, ids in given])
        for sequence, ids in given:
            assert all(0 <= token < self.vocab_size for token in ids)
            self.lengths[sequence] += len(ids)
        self.now += 1.0
        return np.zeros((len(given), self.vocab_size), np.float32)

    def forget(self, sequence: int) -> None:
        self.lengths[sequence] = 0

    def close(self) -> None:
        raise AssertionError

    def answer(self, arrive_s: list[float], prompt: int, new: int) -> list[tuple[float, float]]:
        return time_arrivals(self, arrive_s, prompt, new, clock=lambda: self.now, sleep=self.sleep)

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds


def test_requests_wait_for_one_sequence() -> None:
    session = Steps(1)
    assert session.answer([0.0, 0.0, 0.5], 4, 3) == [(1.0, 3.0), (4.0, 6.0), (7.0, 9.0)]
    assert session.steps == [[(0, 4)], [(0, 1)], [(0, 1)]] * 3
    assert session.lengths == [0]


def test_who_comes_later_joins_those_who_go_on() -> None:
    session = Steps(2)
    assert session.answer([0.0, 1.5, 2.2], 4, 4) == [(1.0, 4.0), (3.0, 6.0), (5.0, 8.0)]
    assert session.steps == [
        [(0, 4)],
        [(0, 1)],
        [(0, 1), (1, 4)],
        [(0, 1), (1, 1)],
        [(1, 1), (0, 4)],  # the third takes what the first has left, at once
        [(1, 1), (0, 1)],
        [(0, 1)],
        [(0, 1)],
    ]


def test_an_idle_machine_sleeps_until_somebody_comes() -> None:
    session = Steps(2)
    assert session.answer([10.0, 30.0], 4, 2) == [(11.0, 12.0), (31.0, 32.0)]
    assert session.answer([], 4, 2) == []


def test_one_new_token_needs_no_second_step() -> None:
    session = Steps(2)
    assert session.answer([0.0, 0.0], 4, 1) == [(1.0, 1.0), (1.0, 1.0)]
    assert session.steps == [[(0, 4), (1, 4)]]


def test_arrivals_are_a_poisson_process() -> None:
    comes = arrivals(20_000, 5.0, seed=1)
    assert comes == arrivals(20_000, 5.0, seed=1) != arrivals(20_000, 5.0)
    gaps = np.diff([0.0, *comes])
    # Mean and deviation of exponential gaps are 1 / rate; those of 20,000 are off by 0.7 % and 1 %: four times that.
    assert gaps.mean() == pytest.approx(0.2, rel=0.028)
    assert gaps.std() == pytest.approx(0.2, rel=0.04)
    # Counts of a Poisson process vary as much as they are.
    counts = np.bincount(np.floor(comes).astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(1, rel=0.1)
