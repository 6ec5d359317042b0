"""The pipeline: five calls on one screen, and nothing else orchestrates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tapeout.files import new_directory
from tapeout.models import Model, load
from tapeout.pack import Package, pack
from tapeout.positions import placed
from tapeout.quantize import planned, quantize
from tapeout.recipe import Recipe
from tapeout.targets import Target, check_cache, check_carries, default_scheme, target
from tapeout.validate import Options, Report, validate
from tapeout.validate.watch import Watch

__all__ = ["export", "pack", "target", "validate"]


def export(
    target: Target,
    source: str | Path | Model,
    out: Path,
    recipe: Recipe | None = None,
    *,
    force: bool = False,
    require: frozenset[str] = frozenset(),
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[Package, Report]:
    """Take a model from its checkpoint to a package at ``out`` that was proven on the target's runtime.

    A package whose gates failed is written all the same, marked ``"passed": false``: it is what one debugs with.

    Args:
        target: what ``target(name)`` gives.
        source: a model, or what ``load`` takes.
        out: becomes the package, whole or not at all.
        recipe: scheme, rounding, overrides and limits.
        force: replace what stands at ``out``.
        require: gates that must not be skipped.
        progress: called with (stage, done, total).

    Raises:
        TapeoutError: one of its kinds, with what to do.
    """
    recipe = recipe or Recipe()
    model = source if isinstance(source, Model) else load(source)
    if not model.quantization:
        recipe = recipe.with_default(default_scheme(target))
    check_cache(target, model)
    check_carries(
        target, set(planned(model, recipe.scheme_given, recipe.rounding, recipe.tensors).schemes.values())
    )
    watch = Watch()
    with new_directory(out, force=force) as directory, watch:
        with watch.stage("quantize"):
            quant = quantize(model, **recipe.rounds(), progress=progress)
        (directory / "artifact").mkdir()
        with watch.stage("export"):
            artifact = target.export(quant, directory / "artifact", progress)
        options = Options(recipe.limits, recipe.text, recipe.tokens, require, progress, watch=watch)
        report = placed(validate(artifact, model, quant, target, options), artifact, quant, target)
        package = pack(artifact, report, quant, target, recipe.kept(quant))
    return replace(package, directory=out), replace(report, provenance=package.provenance)
