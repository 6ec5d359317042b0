"""Parts of a matrix, as the jobs of a CI system do them: the codes alone, a name for them, and the page of cells made elsewhere."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from tapeout import own_wheel
from tapeout.errors import MissingToolchain, PackageError
from tapeout.files import canonical_json
from tapeout.matrix import Executor, Matrix, Outcome, Planned, planned
from tapeout.matrix.local import Processes
from tapeout.matrix.schedule import Room, Watcher, schedule
from tapeout.matrix.tasks import States, Task
from tapeout.pack import Package

__all__ = ["codes_key", "join", "make_codes"]


def codes_key(path: Path, only: Sequence[str] = ()) -> str:
    """A digest of all that decides the codes of the chosen cells, this tapeout's own files too, for the key of a cache.

    Raises:
        MissingToolchain: a model cannot be loaded here. TapeoutError: as ``planned``.
    """
    with tempfile.TemporaryDirectory() as scratch:
        every = planned(Matrix.read(path), Path(scratch), only=only)
    tasks = [_codes_task(each) for each in every]
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
    from tapeout.matrix import lease

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
        raise MissingToolchain(each.forecast.skipped)
    return each.codes


def join(path: Path, out: Path, only: Sequence[str] = ()) -> dict[str, Outcome]:
    """What came of each cell by what its own run left below ``out``, whichever machine that was.

    A cell that left nothing was not run; a package is compared with its manifest once more, since it has been sent here.
    """
    states = States(out)
    return {
        cell.name: _joined(states.read(cell.name), cell.name, out) for cell in Matrix.read(path).only(only)
    }


def _joined(known: Outcome | None, name: str, out: Path) -> Outcome:
    if known is None:
        return Outcome(
            name,
            "not run",
            "its job left no outcome: it did not start, was stopped, or its artifact was not brought here.",
        )
    if known.status != "passed":
        return known
    try:
        package = Package.open(out / name)
        damage = package.damage()
        if package.manifest["root_sha256"] != known.root_sha256:
            damage.append(f"its root digest is not {known.root_sha256}, which its job told")
    except PackageError as error:
        damage = [str(error)]
    if not damage:
        return known
    return Outcome(
        name, "error", f"its package did not arrive as it was made: {'; '.join(damage[:3])}.", known.inputs
    )
