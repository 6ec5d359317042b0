"""Rows of a tensor, a few at a time, on every core: how exporters stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Executor

_TASK_WEIGHTS = 1 << 21  # weights that one task of the pool packs
_STEP_WEIGHTS = 1 << 20  # weights in work at a time: enough that the packers, not Python, take the time


def steps(rows: int, width: int) -> Iterator[slice]:
    """Slices of ``rows`` rows of ``width`` weights, as many at a time as are good to work on."""
    step = max(1, _STEP_WEIGHTS // max(1, width))
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))


def by_rows(work: Callable[[slice], None], rows: int, width: int, pool: Executor) -> None:
    """Call ``work`` with slices that cover ``rows`` rows of ``width`` weights, each slice once, in no order."""
    task, step = max(1, _TASK_WEIGHTS // width), max(1, _STEP_WEIGHTS // width)

    def run(first: int) -> None:
        end = min(rows, first + task)
        for row in range(first, end, step):
            work(slice(row, min(row + step, end)))

    list(pool.map(run, range(0, rows, task)))
