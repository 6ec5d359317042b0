"""The matrix file: models × schemes × roundings × targets, what comes beside that, what does not, and what every cell shares.

extends = "base.toml"           # beside this file; its tables are this one's where this one says nothing else

[matrix]
models = ["arithmetic", "models/own"]
schemes = ["int8", "int4-g32"]
roundings = ["rtn"]
targets = ["cpu", "apple", {target = "cpu", format = "onnx"}, {target = "nvidia", format = "trtllm", tensor_parallel = 2}]

[[exclude]]                     # cells of the product that are left out: globs, a list where any may match
model = "arithmetic"
target = ["apple", "nvidia*"]

[[include]]                     # cells beside the product; what is not said is all that the matrix has
rounding = "gptq"
scheme = "int4-g32"
target = "cpu"

[tensors]                       # and [calibration], [limits], text, tokens: as in a recipe, of every cell
lm_head = "int8"

[margins]                       # what may get worse before a baseline fails, as shares
kl = 0.05

[runners]                       # and [ci]: what pipelines of CI systems are written with, see matrix/ci.py
nvidia = ["self-hosted", "gpu"]
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tapeout import targets
from tapeout.errors import RecipeError, nearest
from tapeout.matrix.cells import Cell, Named, Pattern, chosen, product, written_twice
from tapeout.matrix.ci import Ci
from tapeout.quantize import Calibration
from tapeout.recipe import Recipe
from tapeout.validate import Limits

__all__ = ["Axes", "Margins", "Matrix"]

ALL = "all"
"""Stands for every format of every installed target."""


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Axes(_Table):
    """What the cells are the product of.

    Attributes:
        models: what ``load`` takes.
        schemes: ``default`` is each target's own, and what a quantized checkpoint has.
        targets: names, or tables of a name (``target``) and the target's options; ``name`` is what such a one is called in cells.
            ``all``: every format of every installed target.
    """

    models: list[str]
    schemes: list[str] = Field(default_factory=lambda: ["default"])
    roundings: list[str] = Field(default_factory=lambda: ["rtn"])
    targets: list[str | dict[str, Any]]


class Margins(_Table):
    """How much worse than the baseline a cell may be, as a share of the baseline's figure.

    Attributes:
        kl: of the mean KL to the original. The codes are the same bits wherever they are made, so that nothing but another choice
            of codes, or another text, moves it.
        size: of the bytes that the runtime loads.
        tokens_per_s: of the speed, which is also granted the spread of the baseline's own measurements.
    """

    kl: float = Field(default=0.05, ge=0)
    size: float = Field(default=0.01, ge=0)
    tokens_per_s: float = Field(default=0.10, ge=0, lt=1)


class Matrix(_Table):
    """A matrix file, read and checked."""

    matrix: Axes
    include: list[Pattern] = Field(default_factory=list)
    exclude: list[Pattern] = Field(default_factory=list)
    tensors: dict[str, str] = Field(default_factory=dict)
    calibration: Calibration | None = None
    limits: Limits = Limits()
    text: Path | None = None
    tokens: int = Field(default=4096, gt=0)
    margins: Margins = Margins()
    ci: Ci = Ci()
    runners: dict[str, str | list[str]] = Field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Matrix:
        """Read a matrix file with all that it extends.

        Raises:
            RecipeError: it cannot be read, extends itself, has a key that is not known (with the nearest one), or a value that does not fit.
        """
        raw = _extended(path, ())
        try:
            return cls.model_validate(raw)
        except ValidationError as error:
            first = error.errors()[0]
            place = [str(part) for part in first["loc"]]
            key = ".".join(place)
            if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
                known = _TABLES.get(place[0] if len(place) > 1 else "", cls.model_fields)
                known = [*known, "extends"] if len(place) == 1 else known
                raise RecipeError(f"{path} has an unknown key '{key}'{nearest(place[-1], known)}.") from None
            if first["type"] == "missing":
                raise RecipeError(
                    f"{path} lacks '{key}': a matrix is at least [matrix] with models and targets."
                ) from None
            raise RecipeError(f"{path}: {key} is {first['input']!r}: {first['msg']}.") from None

    def cells(self) -> tuple[Cell, ...]:
        """The cells, in the order of the file.

        Raises:
            RecipeError: there is none, an exclude matches none, or two would write one directory. TapeoutError: an unknown target or option.
            SchemeError: an unknown scheme or rounding.
        """
        axes = self.matrix
        named = [target for each in axes.targets for target in _targets(each)]
        found = list(product(axes.models, axes.schemes, axes.roundings, named))
        if not found:
            empty = [key for key in ("models", "schemes", "roundings", "targets") if not getattr(axes, key)]
            raise RecipeError(f"the matrix has no cell: {', '.join(empty)} is empty.")
        for number, pattern in enumerate(self.exclude, 1):
            left = [cell for cell in found if not pattern.matches(cell)]
            if len(left) == len(found):
                raise RecipeError(
                    f"[[exclude]] number {number} ({pattern.words()}) matches no cell: leave it out."
                )
            if not left and not self.include:
                raise RecipeError(
                    f"the matrix has no cell: [[exclude]] number {number} ({pattern.words()}) takes the last of them."
                )
            found = left
        for pattern in self.include:
            found += pattern.product(axes.models, axes.schemes, axes.roundings, named, _targets)
        if twice := written_twice(found):
            raise RecipeError(twice)
        return tuple(found)

    def recipe(self, cell: Cell) -> Recipe:
        """The recipe that a cell is made by; without a scheme where the cell has ``default``."""
        shared: dict[str, Any] = {
            key: getattr(self, key)
            for key in ("tensors", "calibration", "limits", "text", "tokens")
            if key in self.model_fields_set
        }
        if cell.scheme != "default":
            shared["scheme"] = cell.scheme
        return Recipe(rounding=cell.rounding, **shared)

    def only(self, globs: Iterable[str]) -> tuple[Cell, ...]:
        """The cells whose names one of the globs matches; all without globs. RecipeError: one matches none."""
        return chosen(self.cells(), tuple(globs))


_TABLES: dict[str, Iterable[str]] = {
    "matrix": Axes.model_fields,
    "include": Pattern.model_fields,
    "exclude": Pattern.model_fields,
    "margins": Margins.model_fields,
    "ci": Ci.model_fields,
    "limits": Limits.__dataclass_fields__,
    "calibration": Calibration.__dataclass_fields__,
}


def _extended(path: Path, before: tuple[Path, ...]) -> dict[str, Any]:
    """A file's values over those of the file that it extends."""
    real = path.resolve()
    if real in before:
        way = " extends ".join(os.path.relpath(each) for each in (*before[before.index(real) :], real))
        raise RecipeError(f"{way}: a file cannot extend itself.")
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        by = f", which {os.path.relpath(before[-1])} extends" if before else ""
        raise RecipeError(f"the matrix {path}{by} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"the matrix {path} is not TOML: {error}.") from error
    base = raw.pop("extends", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise RecipeError(f"{path}: extends is {base!r}; expected the path of one file.")
    return _over(_extended(path.parent / base, (*before, real)), raw)


def _over(base: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """Tables joined key by key; anything else of ``raw`` takes the place of what ``base`` has."""
    joined = dict(base)
    for key, value in raw.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        joined[key] = _over(base[key], value) if both else value
    return joined


def _targets(said: str | dict[str, Any]) -> list[Named]:
    """What a target of the file means: what cells call it, the target's name, its options."""
    if said == ALL:
        every = [(name, way) for name in targets.names() for way in targets.variants(name).values()]
        return [_target({"target": name, **targets.options(way)}) for name, way in every]
    return [_target({"target": said} if isinstance(said, str) else said)]


def _target(said: dict[str, Any]) -> Named:
    options = dict(said)
    name, called = options.pop("target", None), options.pop("name", None)
    if not isinstance(name, str):
        raise RecipeError(
            f"a target of the matrix is {said!r}: it lacks target, the name of one{nearest('', targets.names())}."
        )
    kind = targets.get(name)
    for key in options:
        if key not in (known := [field.name for field in fields(kind)]):  # type: ignore[arg-type]
            raise RecipeError(f"target {name} has no option '{key}'{nearest(key, ['name', *known])}.")
    if called is None:
        shown = [str(options["format"])] if "format" in options else []
        shown += [f"{key}-{value}".replace("_", "-") for key, value in options.items() if key != "format"]
        called = "-".join([name, *shown])
    return str(called), name, options
