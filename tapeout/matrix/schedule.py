"""When each task is begun: after what it needs, as many at once as there are jobs, and never more than memory holds."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil

from tapeout.matrix.tasks import Executor, Outcome, Task, after

_LOOK_S = 0.2
_PATIENCE_S = 600.0
"""How long a task that would fit waits for memory that others hold, while nothing of ours runs."""

LOG = logging.getLogger(__name__)


class Watcher(Protocol):
    """Told of what happens, in the main thread."""

    def known(self, outcome: Outcome, stands: bool) -> None: ...
    def began(self, task: Task) -> None: ...
    def stage(self, task: Task, stage: str, done: int, total: int) -> None: ...
    def ended(self, task: Task, outcome: Outcome) -> None: ...
    def tick(self, used: Mapping[str, int], waits: str) -> None: ...


@dataclass(frozen=True)
class Room:
    """Memory that tasks may take.

    Attributes:
        most: bytes that they may take at best: a task that is predicted to take more is never begun.
        given: whether somebody said so; else what is free just now counts as well.
    """

    most: int
    given: bool = False

    @classmethod
    def here(cls, given: int | None = None) -> Room:
        """This machine's, or what its control group leaves of it."""
        return (
            cls(given, True) if given else cls(min(psutil.virtual_memory().total, _group_limit() or 1 << 62))
        )

    def fits(self, task: Task, running: Sequence[Task], used: Mapping[str, int]) -> bool:
        """Whether a task may begin beside those that run, each of which may still grow to what is predicted of it."""
        if self.given:
            return sum(each.memory_bytes for each in running) + task.memory_bytes <= self.most
        growth = sum(max(0, each.memory_bytes - used.get(each.name, 0)) for each in running)
        return growth + task.memory_bytes <= min(psutil.virtual_memory().available, _group_left() or 1 << 62)


@dataclass
class _State:
    waiting: list[Task]
    running: dict[Future[Outcome], Task] = field(default_factory=dict)
    done: dict[str, Outcome] = field(default_factory=dict)


def schedule(
    tasks: Sequence[Task],
    executor: Executor,
    watcher: Watcher,
    *,
    jobs: int = 1,
    room: Room | None = None,
    fail_fast: bool = False,
    keep: Callable[[Task, Outcome], None] = lambda task, outcome: None,
) -> dict[str, Outcome]:
    """Do tasks, in their order as far as needs, jobs and memory let.

    Args:
        tasks: those that others need come before them.
        executor: called in threads, at most ``jobs`` at once.
        room: None: memory is somebody else's concern.
        fail_fast: stop everything at the first outcome that is red.
        keep: called with each outcome as soon as it is there, in the main thread.

    Returns:
        An outcome of every task, by name.
    """
    state = _State(list(tasks))
    reports: list[tuple[Task, str, int, int]] = []
    pool = ThreadPoolExecutor(jobs, thread_name_prefix="matrix")

    def end(task: Task, outcome: Outcome) -> None:
        state.done[task.name] = outcome
        keep(task, outcome)
        watcher.ended(task, outcome)

    try:
        hungry = time.monotonic()
        while state.waiting or state.running:
            _drop_hopeless(state, room, end)
            waits = ""
            while len(state.running) < jobs and (task := _next(state, executor, room)):
                state.waiting.remove(task)
                watcher.began(task)

                def told(stage: str, done: int, total: int, task: Task = task) -> None:
                    reports.append((task, stage, done, total))

                state.running[pool.submit(executor, task, told)] = task
            if state.running:
                hungry = time.monotonic()
            elif state.waiting:
                waits = f"waiting for {state.waiting[0].memory_bytes / 1e9:.1f} GB of memory that other processes hold"
                if time.monotonic() - hungry > _PATIENCE_S:
                    end(state.waiting[0], _starved(state.waiting.pop(0)))
            finished = wait(state.running, _LOOK_S, FIRST_COMPLETED).done if state.running else set()
            if not state.running:
                time.sleep(_LOOK_S if state.waiting else 0)
            while reports:
                watcher.stage(*reports.pop(0))
            watcher.tick(executor.used(), waits)
            for future in finished:
                task = state.running.pop(future)
                end(task, outcome := future.result())
                if fail_fast and outcome.red:
                    _stop(
                        state, executor, end, f"{task.name} did not pass, and --fail-fast stops at the first."
                    )
    finally:
        executor.stop()
        pool.shutdown(wait=True, cancel_futures=True)
    return state.done


def _next(state: _State, executor: Executor, room: Room | None) -> Task | None:
    """The first task that may begin now."""
    running = list(state.running.values())
    if any(task.alone for task in running):
        return None
    for task in state.waiting:
        if any(need not in state.done for need in task.needs) or (task.alone and running):
            continue
        if room is None or room.fits(task, running, executor.used()):
            return task
    return None


def _drop_hopeless(state: _State, room: Room | None, end: Callable[[Task, Outcome], None]) -> None:
    """End tasks that need one that did not pass, and those that no memory here would hold."""
    for task in list(state.waiting):
        lost = next(
            (
                state.done[need]
                for need in task.needs
                if need in state.done and state.done[need].status != "passed"
            ),
            None,
        )
        if lost:
            state.waiting.remove(task)
            end(task, after(lost, task))
        elif room and task.memory_bytes > room.most:
            state.waiting.remove(task)
            whose = "--memory gives" if room.given else "this machine has"
            reason = f"it is predicted to take {task.memory_bytes / 1e9:.1f} GB of memory, and {whose} {room.most / 1e9:.1f} GB."
            end(task, Outcome(task.name, "refused", reason, task.inputs))


def _starved(task: Task) -> Outcome:
    reason = (
        f"it is predicted to take {task.memory_bytes / 1e9:.1f} GB of memory, which other processes did not leave in "
        f"{_PATIENCE_S / 60:.0f} minutes."
    )
    return Outcome(task.name, "error", reason, task.inputs)


def _stop(state: _State, executor: Executor, end: Callable[[Task, Outcome], None], why: str) -> None:
    """End what runs and what waits."""
    executor.stop()
    wait(state.running)
    for future, task in list(state.running.items()):
        end(task, future.result())
    for task in state.waiting:
        end(task, Outcome(task.name, "not run", why, task.inputs))
    state.running.clear()
    state.waiting.clear()


def _group_limit() -> int | None:
    """Bytes that this process's control group may take; None: there is no limit."""
    return _read_group("memory.max", "memory/memory.limit_in_bytes")


def _group_left() -> int | None:
    """Bytes that it may still take; what only caches files is taken back when somebody needs it."""
    limit, held = _group_limit(), _read_group("memory.current", "memory/memory.usage_in_bytes")
    if limit is None or held is None:
        return None
    return max(0, limit - held + (_cached() or 0))


def _cached() -> int | None:
    for name in ("memory.stat", "memory/memory.stat"):
        try:
            rows = dict(line.split() for line in (_GROUP / name).read_text().splitlines())
            return int(rows.get("inactive_file", 0))
        except (OSError, ValueError):
            continue
    return None


_GROUP = Path("/sys/fs/cgroup")


def _read_group(*names: str) -> int | None:
    for name in names:
        try:
            value = int((_GROUP / name).read_text())
        except (OSError, ValueError):  # none, or "max"
            continue
        return value if value < 1 << 60 else None
    return None
