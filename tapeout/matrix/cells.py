"""The cells of a matrix: what each is, what it is called, and which a glob means."""

from __future__ import annotations

import fnmatch
import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from tapeout import targets
from tapeout.errors import RecipeError, SchemeError, TapeoutError, nearest
from tapeout.quantize import ROUNDINGS, Scheme
from tapeout.targets import Target

_LONGEST = 160
"""Letters of a name: a file system takes 255 bytes, and names get endings."""

Named = tuple[str, str, Mapping[str, Any]]
"""A target as cells call it, its own name, its options."""


@dataclass(frozen=True)
class Cell:
    """One model as one scheme by one rounding for one target.

    Attributes:
        model: what ``load`` takes. target: what the cell calls the target; ``kind`` is the target's own name.
        options: of the target, by field.
    """

    model: str
    scheme: str
    rounding: str
    target: str
    kind: str = ""
    options: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """``arithmetic.int4-g32.rtn.cpu``: its directory below the matrix's output, whatever else the matrix holds."""
        name = ".".join(map(_safe, (self.called, self.scheme, self.rounding, self.target)))
        if len(name) > _LONGEST:
            name = f"{name[: _LONGEST - 9]}~{hashlib.sha256(name.encode()).hexdigest()[:8]}"
        return name

    @property
    def called(self) -> str:
        """The model's name: the last part of its path, of ``file.py:factory`` the file."""
        return Path(self.model.partition(".py:")[0]).name.removesuffix(".gguf")

    def device(self) -> Target:
        """The target with its options; RecipeError for a value that an option does not take."""
        kind = targets.get(self.kind)
        try:
            made: Target = TypeAdapter(kind).validate_python(dict(self.options))
        except ValidationError as error:
            first = error.errors()[0]
            raise RecipeError(
                f"target {self.kind}: {'.'.join(map(str, first['loc']))} is {first['input']!r}: {first['msg']}."
            ) from None
        except TapeoutError as error:
            raise RecipeError(f"target {self.target} of the matrix: {error}") from None
        return made


class Pattern(BaseModel):
    """Which cells: a glob a field, or several of which one has to match; what is not said is any.

    ``target`` is what cells call it. In an include, targets are said as in ``[matrix]``, and globs choose among what the matrix has.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | list[str] | None = None
    scheme: str | list[str] | None = None
    rounding: str | list[str] | None = None
    target: str | dict[str, Any] | list[str | dict[str, Any]] | None = None

    def matches(self, cell: Cell) -> bool:
        """Whether every field that is said matches."""
        models = (cell.model, cell.called)
        return (
            any(_any(self.model, each) for each in models)
            and _any(self.scheme, cell.scheme)
            and _any(self.rounding, cell.rounding)
            and _any(self.target, cell.target)
        )

    def words(self) -> str:
        """What it says, for a message."""
        said = {key: value for key, value in self.model_dump().items() if value is not None}
        return ", ".join(f"{key} = {value!r}" for key, value in said.items()) or "which says nothing"

    def product(
        self,
        models: Sequence[str],
        schemes: Sequence[str],
        roundings: Sequence[str],
        named: Sequence[Named],
        read: Callable[[str | dict[str, Any]], list[Named]],
    ) -> list[Cell]:
        """The cells of an include."""
        wanted: list[Named] = list(named)
        if self.target is not None:
            wanted = []
            for each in _list(self.target):
                known = [n for n in named if isinstance(each, str) and fnmatch.fnmatchcase(n[0], each)]
                wanted += known or read(each)
        return list(
            product(
                _list(self.model) or models,
                _list(self.scheme) or schemes,
                _list(self.rounding) or roundings,
                wanted,
            )
        )


def product(
    models: Sequence[str], schemes: Sequence[str], roundings: Sequence[str], named: Sequence[Named]
) -> Iterator[Cell]:
    """Every cell of these axes; SchemeError for a scheme or a rounding that does not exist."""
    for scheme in schemes:
        if scheme != "default":
            Scheme.parse(scheme)
    for rounding in roundings:
        if rounding not in ROUNDINGS:
            raise SchemeError(f"'{rounding}' is not a rounding{nearest(rounding, ROUNDINGS)}.")
    for model, scheme, rounding, (called, kind, options) in itertools.product(
        models, schemes, roundings, named
    ):
        yield Cell(model, scheme, rounding, called, kind, options)


def written_twice(cells: Iterable[Cell]) -> str | None:
    """Why two cells would write one directory, where they would; file systems that know no capitals are counted in."""
    seen: dict[str, Cell] = {}
    for cell in cells:
        other = seen.setdefault(cell.name.casefold(), cell)
        if other is cell:
            continue
        if other.model != cell.model:
            what, fit = (
                f"the models {other.model} and {cell.model}",
                "give one of the directories another name",
            )
        elif (other.kind, dict(other.options)) != (cell.kind, dict(cell.options)):
            what = f"two targets that are both called {cell.target}"
            fit = 'give one of them another name: {target = "…", name = "…"}'
        else:
            what, fit = (
                "the same cell twice",
                "it stands twice on an axis, or an [[include]] has what the product has",
            )
        return f"two cells would write {cell.name}: {what}; {fit}."
    return None


def chosen(cells: Sequence[Cell], globs: Sequence[str]) -> tuple[Cell, ...]:
    """The cells that one of the globs names; all without globs. RecipeError for a glob that names none."""
    names = [cell.name for cell in cells]
    for glob in globs:
        if not fnmatch.filter(names, glob):
            raise RecipeError(f"--only {glob} matches no cell{nearest(glob, names)[:600]}.")
    return tuple(
        cell for cell in cells if not globs or any(fnmatch.fnmatchcase(cell.name, glob) for glob in globs)
    )


def _list(said: Any) -> list[Any]:
    if said is None:
        return []
    return said if isinstance(said, list) else [said]


def _any(said: Any, value: str) -> bool:
    return said is None or any(
        isinstance(each, str) and fnmatch.fnmatchcase(value, each) for each in _list(said)
    )


def _safe(part: str) -> str:
    """A part of a name that any file system takes and no shell reads otherwise."""
    return re.sub(r"[^A-Za-z0-9_+-]+", "_", part).strip("_") or "_"
