"""A matrix: models × schemes × roundings × targets, each cell a package in a process of its own, and one verdict.

OUT/CELL/            the cell's package
OUT/cells/CELL.json  what came of it; a run that was stopped goes on from these
OUT/logs/CELL.log    what its process said
OUT/index.html       all of them on a page; index.md for a comment, index.xml (JUnit) for CI systems
OUT/matrix.json      the same for programs, and the baseline of a later run
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from time import monotonic, sleep
from typing import Any

from tapeout import targets
from tapeout.errors import MissingToolchain, OutputError
from tapeout.files import writing
from tapeout.matrix import baseline as baselines
from tapeout.matrix import forecast as forecasts
from tapeout.matrix import schedule as scheduling
from tapeout.matrix.cells import Cell, chosen
from tapeout.matrix.file import Matrix
from tapeout.matrix.forecast import Forecast
from tapeout.matrix.local import Processes
from tapeout.matrix.result import Result
from tapeout.matrix.schedule import Room, Watcher
from tapeout.matrix.shared import Storage
from tapeout.matrix.tasks import Executor, Outcome, Sources, States, Task, cell_digest, codes_digest, finished
from tapeout.models import Model, load
from tapeout.recipe import Recipe
from tapeout.targets import default_scheme

__all__ = ["Cell", "Executor", "Matrix", "Outcome", "Planned", "Result", "Task", "collect", "planned", "run"]

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
    matrix: Matrix, out: Path, *, only: Sequence[str] = (), cache: str | None = None, remember: bool = False
) -> list[Planned]:
    """Look at every cell before any work: load the models, lay files out, find what stands already.

    Args:
        remember: keep the digests of models' files below ``out``, so that a later run reads none of them.

    Raises:
        TapeoutError: one of its kinds, of a model that cannot be read as much as of the file itself: before hours of work, not after.
    """
    cells, out = chosen(matrix.cells(), only), out.absolute()
    models, missing = _models(cells)
    sources, states = Sources(out / ".sources.json", remember), States(out)
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
        told = forecasts.forecast(model, device, recipe)
        raw = recipe.model_dump(mode="json", exclude_unset=True)
        codes = codes_digest(model, recipe, digests[cell.model])
        making = Task(
            f"codes {cell.called}.{recipe.scheme_given or 'own'}.{cell.rounding}",
            "codes", cell.model, raw, codes, codes, str(out / "logs" / f"codes-{codes[:16]}.log"),
            memory_bytes=forecasts.codes_memory(model, recipe), cache=cache,
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
    baseline: Path | None = None,
    speed: bool = False,
    ray: str | None = None,
) -> Result:
    """Make and prove every cell of a matrix file that does not stand already, and write the pages of all.

    Args:
        path: the matrix file. out: the directory of packages, outcomes and pages.
        jobs: tasks at once; 0: one. memory: bytes that they may take together; None: what this machine has free.
        only: globs of cells' names. cache: a shared storage; see ``shared``.
        fail_fast: stop at the first cell that does not pass. force: make again what stands.
        baseline: an earlier output, or its ``matrix.json``: what got worse than the file's margins fails the matrix.
        speed: measure each cell's speed three times more, with nothing of ours beside it.
        ray: address of a Ray cluster whose machines do the tasks; ``jobs`` 0: as many as there are machines.

    Raises:
        TapeoutError: one of its kinds, before any work.
    """
    matrix = Matrix.read(path)
    Storage(cache, [])  # an address that nothing here can open is told now, and not once a cell
    before = baselines.read(baseline) if baseline else {}
    out = out.absolute()
    _models(chosen(matrix.cells(), only))  # what cannot be read stops here, before the output is made
    with lease(out) as held:
        every = planned(matrix, out, only=only, cache=cache, remember=True)
        if force:
            every = [replace(each, done=None) for each in every]
        states = States(out)
        outcomes = {each.cell.name: known for each in every if (known := _known(each, here=ray is None))}
        left = [each for each in every if each.cell.name not in outcomes]
        _check_disk(out, left)
        for each in every:
            if known := outcomes.get(each.cell.name):
                states.write(known)
                watcher.known(known, each.done is not None)

        def keep(task: Task, outcome: Outcome) -> None:
            if task.kind == "cell":
                outcomes[task.name] = _with_speed(outcome, {"alone": jobs <= 1 and ray is None})
            elif task.kind == "speed":
                name = task.name.removeprefix("speed ")
                outcomes[name] = _measured(outcomes[name], outcome)
            else:
                return
            states.write(outcomes[task.name.removeprefix("speed ")])

        def go(tasks: list[Task], jobs: int) -> None:
            if tasks:
                executor, at_once, room = _machines(ray, jobs, held, out, cache, tasks, memory)
                scheduling.schedule(
                    tasks, executor, watcher, jobs=at_once, room=room, fail_fast=fail_fast, keep=keep
                )

        go(_tasks(left, cache), jobs)
        if not (fail_fast and any(outcome.red for outcome in outcomes.values())):
            go(_measurements(every, outcomes, before, matrix, speed), 1)
        return _gathered(matrix, path, out, outcomes, before)


def collect(path: Path, out: Path, *, baseline: Path | None = None) -> Result:
    """Write the pages of what stands below ``out``, as other machines made it, and run nothing: a cell that nobody ran fails the matrix.

    Raises:
        TapeoutError: one of its kinds, of the file or the baseline.
    """
    matrix = Matrix.read(path)
    before = baselines.read(baseline) if baseline else {}
    states, out = States(out.absolute()), out.absolute()
    known = {cell.name: states.read(cell.name) or _not_run(cell, "nobody ran it.") for cell in matrix.cells()}
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    return _gathered(matrix, path, out, known, before)


def _gathered(
    matrix: Matrix, path: Path, out: Path, outcomes: Mapping[str, Outcome], before: Mapping[str, Outcome]
) -> Result:
    """The verdict and its pages; cells that this run was not about are shown as an earlier one left them."""
    states = States(out)
    cells = tuple(
        (cell, outcomes.get(cell.name) or states.read(cell.name) or _not_run(cell, "--only left it out."))
        for cell in matrix.cells()
    )
    changes = baselines.compare(before, outcomes, matrix.margins)
    result = Result(path.stem, cells, frozenset(outcomes), tuple(changes))
    result.write(out)
    return result


def _not_run(cell: Cell, why: str) -> Outcome:
    return Outcome(cell.name, "not run", why)


def _with_speed(outcome: Outcome, found: Mapping[str, Any]) -> Outcome:
    """An outcome with more said of its speed, where it has one; what it says itself stands."""
    if "speed" not in outcome.figures:
        return outcome
    return replace(outcome, figures={**outcome.figures, "speed": {**found, **outcome.figures["speed"]}})


def _measured(outcome: Outcome, found: Outcome) -> Outcome:
    """An outcome with what a measurement alone found."""
    if not found.figures.get("speed"):
        return replace(
            outcome, notes=(*outcome.notes, f"its speed could not be measured again: {found.reason}")
        )
    old, new = outcome.figures["speed"], found.figures["speed"]
    samples = [*(baselines.samples(outcome) if old["alone"] else ()), *new["samples"]]
    return replace(
        outcome,
        figures={
            **outcome.figures,
            "speed": {**new, "value": median(samples), "samples": samples, "alone": True},
        },
    )


def _measurements(
    every: Sequence[Planned],
    outcomes: Mapping[str, Outcome],
    before: Mapping[str, Outcome],
    matrix: Matrix,
    speed: bool,
) -> list[Task]:
    """What is measured alone: every cell that has a speed, if wanted, or those that look slower than a baseline."""
    wanted = set(baselines.suspects(before, outcomes, matrix.margins))
    if speed:
        wanted |= {
            name for name, each in outcomes.items() if each.status == "passed" and "speed" in each.figures
        }
    return [
        replace(each.task, name=f"speed {each.cell.name}", kind="speed", needs=(), alone=True,
                log=str(Path(each.task.log).with_suffix(".speed.log")))
        for each in every
        if each.cell.name in wanted
    ]  # fmt: skip


def _machines(
    ray: str | None,
    jobs: int,
    lease: int,
    out: Path,
    cache: str | None,
    tasks: Sequence[Task],
    memory: int | None,
) -> tuple[Executor, int, Room | None]:
    """Who does the tasks, how many at once, and the memory that there is; None: Ray lends it out."""
    if ray is None:
        return Processes(max(1, jobs), lease), max(1, jobs), Room.here(memory)
    from tapeout.matrix.cluster import Cluster

    models = {task.model: load(task.model) for task in tasks if task.kind == "codes"}
    cluster = Cluster(ray, out, cache=cache, models=models, jobs=jobs)
    return cluster, cluster.jobs, None


def _known(each: Planned, *, here: bool) -> Outcome | None:
    """What came of a cell, or can be told without making it; a toolchain that is missing here may be on another machine."""
    if each.done:
        return each.done
    if each.forecast.skipped and (here or not each.task.inputs):
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
