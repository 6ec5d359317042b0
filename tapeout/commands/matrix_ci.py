"""What ``tapeout matrix`` does for CI systems: their pipeline files, and the parts that the jobs in them do."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter
from rich.text import Text

from tapeout.commands.terminal import Flag, stderr
from tapeout.errors import TapeoutError


@Parameter(name="*")
@dataclass(frozen=True)
class ForCi:
    """Flags that stand for something else than making the matrix here; one at a time."""

    emit: Annotated[
        str | None,
        Parameter(
            help="Write the pipeline file of a CI system that makes this matrix: github, gitlab or buildkite."
        ),
    ] = None
    check: Annotated[
        bool, Flag, Parameter(help="With --emit: write nothing, and fail if the file is not up to date.")
    ] = False
    codes: Annotated[bool, Flag, Parameter(help="Make the codes that cells share, and no cell.")] = False
    key: Annotated[
        bool, Flag, Parameter(help="Print a digest of all that decides those codes, as the key of a cache.")
    ] = False

    def __post_init__(self) -> None:
        given = [f"--{name}" for name in ("emit", "codes", "key") if getattr(self, name)]
        if len(given) > 1:
            raise TapeoutError(f"{' and '.join(given)} are different things to do: give one of them.")
        if self.check and not self.emit:
            raise TapeoutError(
                "--check says whether a pipeline file is up to date: it wants --emit github, gitlab or buildkite, too."
            )


def emit(recipe: Path, system: str, out: Path | None, *, check: bool, fail_fast: bool, force: bool) -> int:
    """Write a pipeline file, or say whether it is up to date."""
    from tapeout.matrix import pipelines

    text = pipelines.pipeline(recipe, system, fail_fast=fail_fast)
    place = out or pipelines.PLACES[system]
    if check:
        again = ["tapeout", "matrix", str(recipe), "--emit", system, *(["--out", str(out)] if out else [])]
        pipelines.check(text, place, shlex.join([*again, *(["--fail-fast"] if fail_fast else [])]))
        stderr.print(Text(f"{place} is up to date"), soft_wrap=True)
    else:
        changed = pipelines.write(text, place, force=force)
        stderr.print(Text(f"{place}{'' if changed else ' was up to date'}"), soft_wrap=True)
    return 0


def key(recipe: Path, only: Sequence[str]) -> int:
    """Print the key of the chosen cells' codes."""
    from tapeout.matrix.part import codes_key

    sys.stdout.write(f"{codes_key(recipe, only)}\n")
    return 0
