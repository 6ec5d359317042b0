"""A matrix: models × schemes × roundings × targets, each cell a package in a process of its own, and one verdict.

OUT/CELL/            the cell's package
OUT/cells/CELL.json  what came of it; a run that was stopped goes on from these
OUT/logs/CELL.log    what its process said
OUT/index.html       all of them on a page; index.md for a comment, index.xml (JUnit) for CI systems
OUT/matrix.json      the same for programs
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic, sleep

from tapeout import targets
from tapeout.errors import MissingToolchain, OutputError
from tapeout.files import writing
from tapeout.matrix.cells import Cell, chosen
from tapeout.matrix.file import Matrix
from tapeout.matrix.forecast import Forecast, codes_memory, forecast
from tapeout.matrix.local import Processes
from tapeout.matrix.schedule import Room, Watcher, schedule
from tapeout.matrix.shared import Storage
from tapeout.matrix.tasks import (
    Executor,
    Outcome,
    Sources,
    States,
    Task,
    cell_digest,
    codes_digest,
    finished,
)
from tapeout.models import Model, load
from tapeout.recipe import Recipe
from tapeout.targets import default_scheme

__all__ = ["Cell", "Executor", "Matrix", "Outcome", "Planned", "Task", "planned", "run"]

_LEASE_S = 60.0
"""How long processes of a run that was killed may take to end before a new one gives up."""


@dataclass(frozen=True)
class Planned:
    """A cell with what is known before it is made.

    Attributes:
        recipe: with a scheme, but for a checkpoint that is quantized already.
        done: what came of it in an earlier run, if that still stands.
    """

    cell: Cell
    recipe: Recipe
    forecast: Forecast
    codes: Task
    task: Task
    done: Outcome | None = None


def planned(
    matrix: Matrix, out: Path, *, only: Sequence[str] = (), cache: str | None = None
) -> list[Planned]:
    """Look at every cell before any work: load the models, lay files out, find what stands already.

    Raises:
        TapeoutError: one of its kinds, of a model that cannot be read as much as of the file itself: before hours of work, not after.
    """
    cells = chosen(matrix.cells(), only)
    models, missing = _models(cells)
    sources, states = Sources(out / ".sources.json"), States(out)
    digests = {name: sources.digest(model) for name, model in models.items()}
    found = []
    for cell in cells:
        device, recipe = cell.device(), matrix.recipe(cell)
        model = models.get(cell.model)
        if model is None:
            found.append(_without(cell, recipe, missing[cell.model]))
            continue
        if not model.quantization:
            recipe = recipe.with_default(default_scheme(device))
        told = forecast(model, device, recipe)
        raw = recipe.model_dump(mode="json", exclude_unset=True)
        codes = codes_digest(model, recipe, digests[cell.model])
        making = Task(
            f"codes {cell.called}.{recipe.scheme_given or 'own'}.{cell.rounding}.{codes[:8]}",
            "codes", cell.model, raw, codes, codes, str(out / "logs" / f"codes-{codes[:16]}.log"),
            memory_bytes=codes_memory(model, recipe), cache=cache,
        )  # fmt: skip
        options = targets.options(device)
        inputs = cell_digest(codes, recipe, cell.kind, options)
        task = Task(
            cell.name, "cell", cell.model, raw, inputs, codes, str(out / "logs" / f"{cell.name}.log"), cell.kind, options,
            str(out / cell.name), told.memory_bytes, (making.name,), cache,
        )  # fmt: skip
        found.append(Planned(cell, recipe, told, making, task, finished(task, states.read(cell.name))))
    return found


def run(
    path: Path,
    out: Path,
    *,
    watcher: Watcher,
    jobs: int = 1,
    only: Sequence[str] = (),
    cache: str | None = None,
    memory: int | None = None,
    fail_fast: bool = False,
    force: bool = False,
    executor: Callable[[int, int], Executor] = Processes,
) -> dict[str, Outcome]:
    """Make and prove every cell of a matrix file that does not stand already.

    Args:
        path: the matrix file. out: the directory of packages, outcomes and pages.
        jobs: tasks at once. memory: bytes that they may take together; None: what this machine has free.
        only: globs of cells' names. cache: a shared storage; see ``shared``.
        fail_fast: stop at the first cell that does not pass. force: make again what stands.
        executor: called with ``jobs`` and the file descriptor of the output's lease; gives who does the tasks.

    Returns:
        An outcome of every cell, in the file's order.

    Raises:
        TapeoutError: one of its kinds, before any work.
    """
    matrix = Matrix.read(path)
    out = out.absolute()
    with lease(out) as held:
        every = planned(matrix, out, only=only, cache=cache)
        if force:
            every = [replace(each, done=None) for each in every]
        outcomes = {each.cell.name: known for each in every if (known := _known(each))}
        left = [each for each in every if each.cell.name not in outcomes]
        _check_disk(out, left)
        states = States(out)
        for known in outcomes.values():
            states.write(known)

        def keep(task: Task, outcome: Outcome) -> None:
            if task.kind == "cell":
                outcomes[task.name] = outcome
                states.write(outcome)

        schedule(
            _tasks(left, cache),
            executor(jobs, held),
            watcher,
            jobs=jobs,
            room=Room.here(memory),
            fail_fast=fail_fast,
            keep=keep,
        )
        return {each.cell.name: outcomes[each.cell.name] for each in every}


def _known(each: Planned) -> Outcome | None:
    """What came of a cell, or can be told without making it."""
    if each.done:
        return each.done
    if each.forecast.skipped:
        return Outcome(each.cell.name, "skipped", each.forecast.skipped, each.task.inputs)
    if each.forecast.refused:
        return Outcome(each.cell.name, "refused", each.forecast.refused, each.task.inputs)
    return None


def _tasks(left: Sequence[Planned], cache: str | None) -> list[Task]:
    """The codes that cells need, once each, before the first cell that needs them; none for a cell that the storage has."""
    notes: list[str] = []
    storage = Storage.at(cache, notes)
    tasks: dict[str, Task] = {}
    for each in left:
        task = each.task
        if storage.has_package(task.inputs):
            task = replace(task, needs=())
        else:
            tasks.setdefault(each.codes.name, each.codes)
        tasks[task.name] = task
    return list(tasks.values())


def _models(cells: Sequence[Cell]) -> tuple[dict[str, Model], dict[str, str]]:
    """The models of cells, and of those whose toolchain is missing what to do."""
    models, missing = {}, {}
    for name in dict.fromkeys(cell.model for cell in cells):
        try:
            models[name] = load(name)
        except MissingToolchain as error:
            missing[name] = str(error)
    return models, missing


def _without(cell: Cell, recipe: Recipe, why: str) -> Planned:
    """A cell of a model that cannot be loaded here."""
    task = Task(cell.name, "cell", cell.model, {}, "", "", "")
    return Planned(cell, recipe, Forecast(0, skipped=why), task, task)


def _check_disk(out: Path, left: Sequence[Planned]) -> None:
    """OutputError when the packages that are to be made do not fit the disk, as far as their sizes are known."""
    wanted = sum(each.forecast.disk_bytes for each in left)
    free = shutil.disk_usage(out).free
    if wanted > free:
        raise OutputError(
            f"{out} has {free / 1e9:.1f} GB free, and {len(left)} cells take {wanted / 1e9:.1f} GB: free some space, give another --out, "
            "or fewer cells with --only."
        )


@contextmanager
def lease(out: Path) -> Iterator[int]:
    """Hold the output among processes, ours and those that they start; waits for those of a run that was killed."""
    import fcntl
    import os

    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / ".matrix.lock").exists())):
        raise OutputError(f"{out} exists and is no output of a matrix; give another --out.")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out / ".matrix.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        begun = monotonic()
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if monotonic() - begun > _LEASE_S:
                    raise OutputError(
                        f"another tapeout process has been writing {out} for a minute; wait for it, or give another --out."
                    ) from None
                sleep(0.1)
        yield handle
    finally:
        os.close(handle)
