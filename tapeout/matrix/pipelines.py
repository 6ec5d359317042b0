"""A matrix file as the pipeline file of a CI system: the codes once each, a job a cell, and one that joins them into a page.

Nothing is loaded for it: the file's text, and which of its models lie in the repository, decide every byte.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2

from tapeout import __version__, embedded, targets
from tapeout.errors import OutputError, RecipeError, nearest
from tapeout.files import write_whole, writing
from tapeout.matrix.cells import Cell
from tapeout.matrix.ci import OTHER_JOBS, SYSTEMS, extras, runner
from tapeout.matrix.file import Matrix
from tapeout.targets import default_scheme

PLACES = {
    "github": Path(".github/workflows/matrix.yml"),
    "gitlab": Path(".gitlab-ci.yml"),
    "buildkite": Path(".buildkite/pipeline.yml"),
}
"""Where each CI system looks."""

_AT_ONCE = 256
"""Jobs that GitHub makes of one ``strategy.matrix``, at most."""
_WEIGHTS = ("config.json", "model.safetensors", "model.safetensors.index.json", "*.gguf")
"""Files of a model by which GitLab names the cache of its codes."""


@dataclass(frozen=True)
class Codes:
    """The job that makes codes which cells share.

    Attributes:
        cell: the name of one that needs them. files: of the model, where it lies in the repository; patterns.
        from_hub: whether the model comes from elsewhere, so that nothing in the repository changes when it does.
    """

    name: str
    cell: str
    files: tuple[str, ...]
    from_hub: bool
    extras: str

    @property
    def key(self) -> str:
        """The name in letters that Buildkite takes for a key; another for each name."""
        return _key("codes", self.name)


@dataclass(frozen=True)
class Job:
    """The job of a cell: ``runner`` are labels of the machine that it needs, ``extras`` those of tapeout."""

    cell: str
    codes: Codes
    runner: tuple[str, ...]
    extras: str

    @property
    def key(self) -> str:
        """The name in letters that Buildkite takes for a key; another for each name."""
        return _key("cell", self.cell)

    @property
    def own(self) -> bool:
        """Whether it runs on a machine of one's own, where a stranger's pull request has no business."""
        return "self-hosted" in self.runner


def pipeline(path: Path, system: str, *, fail_fast: bool = False) -> str:
    """The pipeline file of ``system`` that makes the matrix file ``path``, which is relative to the repository.

    Raises:
        RecipeError: a CI system that is not known (with the nearest one), ``[runners]`` names no target, a path outside of the repository, or
            what ``Matrix.read`` and ``Matrix.cells`` raise.
    """
    if system not in SYSTEMS:
        raise RecipeError(
            f"'{system}' is no CI system that a pipeline can be written for{nearest(system, SYSTEMS)}."
        )
    if path.is_absolute() or ".." in path.parts or not path.as_posix().isprintable():
        raise RecipeError(
            f"the matrix {path} must be named by a printable path from the root of the repository, where CI starts: go there, and give that."
        )
    matrix = Matrix.read(path)
    cells = matrix.cells()
    _check_runners(matrix, cells)
    codes = _codes(cells)
    jobs = [
        Job(
            cell.name,
            codes[_shared(cell)],
            runner(system, matrix.runners, cell.target, cell.kind),
            extras(cell.kind, cell.options),
        )
        for cell in cells
    ]
    command = [
        "tapeout",
        "matrix",
        path.as_posix(),
        "--emit",
        system,
        *(["--fail-fast"] if fail_fast else []),
    ]
    return _template(system).render(
        command=shlex.join(command),
        path=path.as_posix(),
        ci=matrix.ci,
        codes=list(codes.values()),
        jobs=jobs,
        groups=_groups(jobs),
        others={name: runner(system, matrix.runners, name) for name in OTHER_JOBS},
        fail_fast=fail_fast,
        version=__version__,
    )


def write(text: str, place: Path, *, force: bool = False) -> bool:
    """Put a pipeline file where it belongs; whether something changed. OutputError: another file stands there and not ``force``."""
    if place.is_dir():
        raise OutputError(f"{place} is a directory; --out names the pipeline file itself.")
    with writing(place):
        if place.exists():
            if place.read_text(encoding="utf-8") == text:
                return False
            if not force:
                raise OutputError(
                    f"{place} exists and says something else; give --force to replace it, or another --out."
                )
        place.parent.mkdir(parents=True, exist_ok=True)
        write_whole(place, text)
    return True


def check(text: str, place: Path, command: str) -> None:
    """OutputError where the file at ``place`` is not what the matrix gives now."""
    try:
        stands = place.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise OutputError(f"{place} does not exist: {command} writes it.") from None
    if stands != text:
        at = next(
            (
                n
                for n, (a, b) in enumerate(zip(stands.splitlines(), text.splitlines(), strict=False), 1)
                if a != b
            ),
            None,
        )
        where = f"from line {at} on" if at else "at its end"
        raise OutputError(f"{place} is not what its matrix gives, {where}: {command} --force writes it anew.")


def _codes(cells: Sequence[Cell]) -> dict[tuple[str, str, str], Codes]:
    """The codes that cells need, once each, in the file's order."""
    needing: dict[tuple[str, str, str], list[Cell]] = {}
    for cell in cells:
        needing.setdefault(_shared(cell), []).append(cell)
    found, taken = {}, set[str]()
    for each, (first, *_) in needing.items():
        name = ".".join([first.called, *each[1:]])
        while name in taken:  # two models of one name whose cells differ in the rest
            name += "+"
        taken.add(name)
        files = _files(first.model)
        from_hub = not files and first.model not in embedded.NAMES
        found[each] = Codes(name, first.name, files, from_hub, "reference")
    return found


def _shared(cell: Cell) -> tuple[str, str, str]:
    """Model, scheme and rounding, the scheme being the target's own where the cell has none."""
    scheme = str(default_scheme(cell.device())) if cell.scheme == "default" else cell.scheme
    return cell.model, scheme, cell.rounding


def _files(model: str) -> tuple[str, ...]:
    """Patterns of the files that a model in the repository is made of; nothing for one that comes from elsewhere."""
    if model in embedded.NAMES or not Path(model).exists():
        return ()
    place = PurePosixPath(Path(model).as_posix())
    if ".." in place.parts or place.is_absolute():
        return ()
    return tuple(str(place / name) for name in _WEIGHTS) if Path(model).is_dir() else (str(place),)


def _groups(jobs: Sequence[Job]) -> list[tuple[str, bool, list[Job]]]:
    """Jobs as GitHub can hold them: the name, whether its runners are one's own, and as many jobs as one matrix takes."""
    found = []
    for own, name in ((False, "cells"), (True, "own-cells")):
        those = [job for job in jobs if job.own == own]
        for start in range(0, len(those), _AT_ONCE):
            part = f"{name}-{start // _AT_ONCE + 1}" if len(those) > _AT_ONCE else name
            found.append((part, own, those[start : start + _AT_ONCE]))
    return found


def _check_runners(matrix: Matrix, cells: Sequence[Cell]) -> None:
    known = {*targets.names(), *OTHER_JOBS, *(cell.target for cell in cells)}
    for name, labels in matrix.runners.items():
        if name not in known:
            raise RecipeError(f"[runners] has '{name}', which is no target{nearest(name, known)}.")
        if not labels or not all(
            label.isprintable() and label for label in ([labels] if isinstance(labels, str) else labels)
        ):
            raise RecipeError(f"[runners] {name} is {labels!r}: expected the label of a runner, or several.")


def _key(what: str, name: str) -> str:
    # A key has no dots; a tail of the name's own letters that went keeps two names apart.
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", name)[:60]
    return f"{what}-{plain}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _scalar(value: Any) -> str:
    """Any value as YAML in one line. JSON is YAML, so only what nobody could take for something else stands without quotes."""
    if (
        isinstance(value, str)
        and re.fullmatch(r"[A-Za-z][A-Za-z0-9_./-]*", value)
        and value.lower() not in _WORDS
    ):
        return value
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_scalar, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{_scalar(key)}: {_scalar(each)}' for key, each in value.items())}}}"
    return json.dumps(value, ensure_ascii=False)


def _one(labels: Sequence[str]) -> str | Sequence[str]:
    """A single label by itself."""
    return labels[0] if len(labels) == 1 else labels


_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
"""What some readers of YAML take for no string."""

# What each system would put something else in place of, written so that it stays.
_ESCAPES: Mapping[str, Callable[[str], str]] = {
    "github": lambda text: text.replace("${{", "${{ '${{' }}"),
    "gitlab": lambda text: text.replace("$", "$$"),
    "buildkite": lambda text: text.replace("$", "$$"),
}


@cache
def _template(system: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tapeout", "templates/ci"),
        # As in ERB: bash and GitHub have their own uses for braces.
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<%=",
        variable_end_string="%>",
        comment_start_string="<%#",
        comment_end_string="%>",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    escape = _ESCAPES[system]
    environment.filters |= {"yaml": _scalar, "literal": escape, "one": _one}
    return environment.get_template(f"{system}.yml.j2")
