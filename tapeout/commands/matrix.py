"""The verb of many exports at once: matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from tapeout.commands.matrix_ci import ForCi, emit, key
from tapeout.commands.matrix_table import watching
from tapeout.commands.terminal import Flag, Json, Many, print_json


def matrix(
    recipe: Path,
    *,
    out: Path | None = None,
    jobs: int = 1,
    only: Annotated[list[str] | None, Many] = None,
    cache: str | None = None,
    memory: str | None = None,
    fail_fast: Annotated[bool, Flag] = False,
    force: Annotated[bool, Flag] = False,
    json: Json = False,
    ci: ForCi | None = None,
) -> int:
    """Make and prove models × schemes × roundings × targets, each cell a package, and write one page of them all.

    A run that was stopped goes on where it was: the same command. Exit status 1: a cell failed.

    Example: tapeout matrix examples/matrix.toml --out build/matrix --jobs 2

    Args:
        recipe: The matrix file.
        out: Where packages, logs and pages go. Default: the file's name without its ending, here.
        jobs: Cells at once; never more than memory holds.
        only: Cells whose names this glob matches. May be given several times.
        cache: Where finished work is shared among machines: a directory, or what fsspec opens (s3://bucket/path).
        memory: What all cells may take together (8G). Default: what is free.
        fail_fast: Stop at the first cell that fails. Default: go on with the others.
        force: Make again what stands already.
        json: Print all outcomes to stdout.
    """
    from tapeout.matrix import run
    from tapeout.matrix.part import join, make_codes

    ci, globs, place = ci or ForCi(), tuple(only or ()), out or Path(recipe.stem)
    if ci.emit:
        return emit(recipe, ci.emit, out, check=ci.check, fail_fast=fail_fast, force=force)
    if ci.key:
        return key(recipe, globs)
    if ci.join:
        outcomes = join(recipe, place, globs)
        return 1 if any(outcome.red for outcome in outcomes.values()) else 0
    if ci.codes:
        with watching() as watcher:
            outcomes = make_codes(recipe, place, watcher=watcher, only=globs, cache=cache, jobs=jobs)
        return 1 if any(outcome.red for outcome in outcomes.values()) else 0
    with watching() as watcher:
        outcomes = run(
            recipe,
            place,
            watcher=watcher,
            jobs=jobs,
            only=globs,
            cache=cache,
            fail_fast=fail_fast,
            force=force,
        )
    if json:
        print_json([outcome.to_json() for outcome in outcomes.values()])
    return 1 if any(outcome.red for outcome in outcomes.values()) else 0
