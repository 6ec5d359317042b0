"""Requests that come when they come, answered together: continuous batching over a session that holds several sequences."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from tapeout.validate.session import BatchedSession

__all__ = ["arrivals", "time_arrivals"]


def arrivals(count: int, per_second: float, seed: int = 0) -> list[float]:
    """Seconds at which requests of a Poisson process of that rate come: exponential gaps, the same for the same seed."""
    gaps = np.random.default_rng(seed).exponential(1 / per_second, count)
    return [float(each) for each in np.cumsum(gaps)]


def time_arrivals(
    session: BatchedSession,
    arrive_s: Sequence[float],
    prompt_tokens: int,
    new_tokens: int,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], None] = time.sleep,
) -> list[tuple[float, float]]:
    """Answer requests in the order of their coming; each takes the first sequence that is free.

    A step takes the whole prompts of those that begin and one token of each that goes on, together: nobody waits for a batch to end.

    Args:
        session: its sequences are all free, and are again at the end.
        arrive_s: seconds from the begin at which each request comes, ascending.
        prompt_tokens, new_tokens: of each request; the first new token follows from the prompt.
        clock, sleep: of the time.

    Returns:
        For each request the seconds from the begin at which its first and its last token were there.
    """
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, session.vocab_size, (len(arrive_s), prompt_tokens)).tolist()
    free, active = deque(range(session.sequences)), dict[int, int]()  # sequence: request
    left, token = [new_tokens] * len(arrive_s), [0] * len(arrive_s)
    first, last = [0.0] * len(arrive_s), [0.0] * len(arrive_s)
    coming, begin = 0, clock()
    while active or coming < len(arrive_s):
        now, given = clock() - begin, [(sequence, [token[request]]) for sequence, request in active.items()]
        while free and coming < len(arrive_s) and arrive_s[coming] <= now:
            active[free[0]] = coming
            given.append((free.popleft(), prompts[coming]))
            coming += 1
        if not given:
            sleep(arrive_s[coming] - now)
            continue
        rows = session.step(given)
        now = clock() - begin
        for (sequence, _), row in zip(given, rows, strict=True):
            request = active[sequence]
            if left[request] == new_tokens:
                first[request] = now
            left[request] -= 1
            token[request] = int(row.argmax())
            if not left[request]:
                last[request] = now
                del active[sequence]
                session.forget(sequence)
                free.append(sequence)
    return list(zip(first, last, strict=True))
