"""Parts of a matrix, as the jobs of a CI system do them: the codes alone, and a name for them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from tapeout import own_wheel
from tapeout.errors import MissingToolchain
from tapeout.files import canonical_json
from tapeout.matrix import Executor, Matrix, Outcome, Planned, lease, planned
from tapeout.matrix.local import Processes
from tapeout.matrix.schedule import Room, Watcher, schedule
from tapeout.matrix.tasks import Task

__all__ = ["codes_key", "make_codes"]


def codes_key(path: Path, only: Sequence[str] = ()) -> str:
    """A digest of all that decides the codes of the chosen cells, this tapeout's own files too, for the key of a cache.

    Raises:
        MissingToolchain: a model cannot be loaded here. TapeoutError: as ``planned``.
    """
    tasks = [_codes_task(each) for each in planned(Matrix.read(path), Path(), only=only)]
    found = {"codes": sorted({task.codes for task in tasks}), "tapeout": own_wheel.digest()}
    return hashlib.sha256(canonical_json(found).encode()).hexdigest()


def make_codes(
    path: Path,
    out: Path,
    *,
    watcher: Watcher,
    only: Sequence[str] = (),
    cache: str | None = None,
    jobs: int = 1,
    memory: int | None = None,
    executor: Callable[[int, int], Executor] = Processes,
) -> dict[str, Outcome]:
    """Make the codes that the chosen cells need, once each, and no cell; see ``matrix.run`` for the arguments.

    Returns:
        An outcome of each codes.

    Raises:
        MissingToolchain: a model cannot be loaded here. TapeoutError: as ``planned``, and what ``lease`` raises.
    """
    out = out.absolute()
    outcomes: dict[str, Outcome] = {}
    with lease(out) as held:
        every = planned(Matrix.read(path), out, only=only, cache=cache)
        tasks = {task.name: task for task in map(_codes_task, every)}

        def keep(task: Task, outcome: Outcome) -> None:
            outcomes[task.name] = outcome

        schedule(
            list(tasks.values()),
            executor(jobs, held),
            watcher,
            jobs=jobs,
            room=Room.here(memory),
            fail_fast=False,
            keep=keep,
        )
    return outcomes


def _codes_task(each: Planned) -> Task:
    if each.codes.kind != "codes":
        raise MissingToolchain(each.forecast.skipped or "")
    return each.codes
