"""The verb of many exports at once: matrix."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from tapeout.commands.matrix_ci import ForCi, emit, key
from tapeout.commands.terminal import Flag, Json, Many, print_json, stderr
from tapeout.errors import TapeoutError

if TYPE_CHECKING:
    from tapeout.matrix import Planned, Result


def matrix(
    recipe: Path,
    *,
    out: Path | None = None,
    jobs: int | None = None,
    ray: str | None = None,
    only: Annotated[list[str] | None, Many] = None,
    cache: str | None = None,
    memory: str | None = None,
    fail_fast: Annotated[bool, Flag] = False,
    force: Annotated[bool, Flag] = False,
    baseline: Path | None = None,
    speed: Annotated[bool, Flag] = False,
    list_cells: Annotated[bool, Parameter(name="--list", negative="")] = False,
    collect: Annotated[bool, Flag] = False,
    json: Json = False,
    ci: ForCi | None = None,
) -> int:
    """Make and prove models × schemes × roundings × targets, each cell a package, and write one page of them all.

    A run that was stopped goes on where it was: the same command. Exit status 1: a cell failed, or got worse than the baseline allows.

    Example: tapeout matrix examples/matrix.toml --out build/matrix --jobs 2

    Args:
        recipe: The matrix file.
        out: Where packages, logs and pages go. Default: the file's name without its ending, here.
        jobs: Cells at once; never more than memory holds. Default: 1, of a Ray cluster one a machine.
        ray: Do the work on the machines of the Ray cluster at this address (auto, HOST:PORT).
        only: Cells whose names this glob matches. May be given several times.
        cache: Where finished work is shared among machines: a directory, or what fsspec opens (s3://bucket/path).
        memory: What all cells may take together (8G). Default: what is free.
        fail_fast: Stop at the first cell that fails. Default: go on with the others.
        force: Make again what stands already.
        baseline: An earlier output, or its matrix.json: what got worse than the file's [margins] fails.
        speed: Measure each cell's speed three times more, alone: what a baseline should be made with.
        list_cells: Say what would be done, with predicted memory and disk, and do nothing.
        collect: Write the pages of what stands in --out, as other machines made it, and run nothing.
        json: Print all outcomes to stdout.
    """
    from tapeout import matrix as matrices
    from tapeout.commands.matrix_table import watching
    from tapeout.matrix.part import make_codes
    from tapeout.targets.local import parse_size

    place, globs = out or Path(recipe.stem), tuple(only or ())
    if jobs is not None and jobs < 1:
        raise TapeoutError(f"--jobs is {jobs}; what fits: 1 or more.")
    ci = ci or ForCi()
    if ci.emit:
        return emit(recipe, ci.emit, out, check=ci.check, fail_fast=fail_fast, force=force)
    if ci.key:
        return key(recipe, globs)
    if ci.codes:
        with watching() as watcher:
            made = make_codes(
                recipe,
                place,
                watcher=watcher,
                jobs=jobs or 1,
                only=globs,
                cache=cache,
                memory=parse_size(memory) if memory else None,
            )
        return 1 if any(outcome.red for outcome in made.values()) else 0
    if list_cells:
        found = matrices.planned(matrices.Matrix.read(recipe), place, only=globs, cache=cache)
        return _listed(found, as_json=json)
    if collect:
        result = matrices.collect(recipe, place, baseline=baseline)
    else:
        with watching() as watcher:
            result = matrices.run(
                recipe,
                place,
                watcher=watcher,
                jobs=jobs or 0,
                ray=ray,
                only=globs,
                cache=cache,
                memory=parse_size(memory) if memory else None,
                fail_fast=fail_fast,
                force=force,
                baseline=baseline,
                speed=speed,
            )
    if json:
        print_json(result.to_json())
    _say(result, place)
    return 0 if result.passed else 1


def _say(result: Result, place: Path) -> None:
    """The verdict, what failed, what got worse, and where the page is."""
    from tapeout.commands.matrix_table import STYLES
    from tapeout.matrix.result import MARKS, both

    for cell, outcome in result.cells:
        if outcome.red and cell.name in result.chosen:
            stderr.print(
                Text.assemble(
                    (f"{outcome.status} ", STYLES[outcome.status]), f"{cell.name}: {outcome.reason}"
                ),
                soft_wrap=True,
            )
    if result.regressions:
        table = Table(
            "cell",
            "got worse",
            "before",
            "now",
            "allowed",
            title="worse than the baseline",
            title_justify="left",
        )
        for change in result.regressions:
            allowed = "" if change.allowed is None else f"{change.allowed:.0%}"
            table.add_row(Text(change.cell), change.what, *map(Text, both(change)), allowed)
        stderr.print(table)
    elif result.changes:
        stderr.print(f"none of {len(result.changes)} figures is worse than the baseline allows")
    verdict = ("PASSED", "bold green") if result.passed else ("FAILED", "bold red")
    counts = ", ".join(f"{MARKS[status]} {count} {status}" for status, count in result.counts.items())
    stderr.print(Text.assemble(verdict, f"  {len(result.cells)} cells: {counts}"), soft_wrap=True)
    stderr.print(Text(f"{place / 'index.html'}  shows them all"), soft_wrap=True)


def _listed(found: list[Planned], *, as_json: bool) -> int:
    """What would be done."""
    rows: list[dict[str, Any]] = [
        {
            "cell": each.cell.name,
            "do": _do(each),
            "memory_bytes": each.forecast.memory_bytes,
            "disk_bytes": each.forecast.disk_bytes,
            "reason": each.forecast.refused or each.forecast.skipped,
        }
        for each in found
    ]
    if as_json:
        print_json(rows)
        return 0
    table = Table("cell", "what", "memory", "disk", "why", title_justify="left")
    for row in rows:
        table.add_row(
            row["cell"],
            row["do"],
            _size(row["memory_bytes"]),
            _size(row["disk_bytes"]),
            Text(row["reason"] or ""),
        )
    stderr.print(table)
    left = [each for each in found if _do(each) == "make"]
    codes = {each.codes.inputs: each.forecast.store_bytes for each in left}
    most = max((each.forecast.memory_bytes for each in left), default=0)
    stderr.print(
        f"{len(left)} of {len(found)} cells to make, from {len(codes)} sets of codes: at most {_size(most)} of memory a cell, "
        f"{_size(sum(each.forecast.disk_bytes for each in left))} of packages, {_size(sum(codes.values()))} of codes in the cache",
        soft_wrap=True,
    )
    return 0


def _do(each: Planned) -> str:
    if each.forecast.skipped or each.forecast.refused:
        return "skip" if each.forecast.skipped else "refuse"
    return "stands" if each.done else "make"


def _size(count: Any) -> str:
    from tapeout.validate.page import size

    return size(count) if count else ""
