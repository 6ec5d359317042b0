"""Verbs that make something: export, quantize, budget, plan."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter
from rich.table import Table
from rich.text import Text

from tapeout import targets
from tapeout.commands.terminal import (
    Codes,
    Demands,
    DemandsOfAll,
    Flag,
    Json,
    Many,
    ModelArgument,
    demands,
    mixed_by_budget,
    print_json,
    progress_bars,
    recipe_of,
    show,
    stderr,
    where_it_runs,
)

export_app = App(
    name="export",
    help="""Take a model from its checkpoint to a proven package: quantize, lower, validate, pack.

    Example: tapeout export cpu arithmetic --scheme int4-g32 --out build/demo
    """,
)


def register_export(kind: type[targets.Target]) -> None:
    """Add ``tapeout export NAME``: the target's own flags are the fields of its dataclass."""

    def export(
        model: ModelArgument,
        *,
        codes: Codes | None = None,
        out: Path | None = None,
        force: Annotated[bool, Flag] = False,
        require: Annotated[list[str] | None, Many] = None,
        json: Json = False,
        speed: Any = None,
        options: Any = None,
    ) -> int:
        """Make a proven package.

        Args:
            out: Where the package goes. Default: MODEL-SCHEME-TARGET here.
            force: Replace what stands there.
            require: A gate that must run: skipped counts as failed. May be given several times.
            json: Print the report to stdout.
        """
        from tapeout.build import export as run

        where_it_runs(kind.name)
        codes = codes or Codes()
        settings = codes.settings.demanding(**demands(speed))
        usual = settings.with_default(targets.default_scheme(options or kind())).scheme
        called = Path(model.partition(".py:")[0]).name  # of file.py:factory the file
        place = out or Path(f"{called}-{codes.mix or usual}-{kind.name}")
        with progress_bars() as progress:
            if codes.mix:
                settings = mixed_by_budget(
                    model, options or kind(), settings, codes.bits, codes.max_kl, progress
                ).recipe
            package, report = run(
                options or kind(),
                model,
                place,
                settings,
                force=force,
                require=frozenset(require or ()),
                progress=progress,
            )
        show(report, as_json=json)
        stderr.print(f"{place}  root digest {package.manifest['root_sha256']}", soft_wrap=True)
        stderr.print(f"{place / 'report.html'}  shows what was measured", soft_wrap=True)
        return 0 if report.passed else 1

    own = "max_memory" in {field.name for field in fields(kind)}  # type: ignore[arg-type]
    export.__annotations__["speed"] = Annotated[
        (Demands if own else DemandsOfAll) | None, Parameter(name="*", group="limits of speed")
    ]
    export.__annotations__["options"] = Annotated[
        kind | None, Parameter(name="*", group=f"{kind.name} flags")
    ]
    example = f"Example: tapeout export {kind.name} arithmetic --scheme int4-g32 --out build/demo"
    export_app.command(export, name=kind.name, help=f"{kind.summary}\n\n{example}")


def quantize(
    model: ModelArgument,
    *,
    codes: Codes | None = None,
    out: Path,
    force: Annotated[bool, Flag] = False,
    json: Json = False,
) -> int:
    """Make the canonical codes only, as a store.

    Example: tapeout quantize arithmetic --scheme nf4 --out build/codes

    Args:
        out: Where the store goes.
        force: Replace what stands there.
        json: Print a summary to stdout.
    """
    from tapeout.models import load
    from tapeout.quantize import quantize as run

    codes = codes or Codes()
    settings = codes.settings
    with progress_bars() as progress:
        if codes.mix:
            settings = mixed_by_budget(model, None, settings, codes.bits, codes.max_kl, progress).recipe
        quant = run(
            load(model),
            **settings.rounds(),
            out=out,
            force=force,
            progress=progress,
        )
    for name, reason in quant.fallbacks.items():
        stderr.print(Text(f"{name}: {reason}", "yellow"))
    summary = {
        "store": str(out),
        "scheme": quant.scheme.name,
        "codes_sha256": quant.digest,
        "source_sha256": quant.source_sha256,
        "fallbacks": dict(quant.fallbacks),
        "clamped_groups": dict(quant.clamped),
    }
    if json:
        print_json(summary)
    stderr.print(f"{out}  {quant.scheme}, codes {quant.digest}", soft_wrap=True)
    return 0


def budget(
    target: str,
    model: ModelArgument,
    *,
    bits: float | None = None,
    max_kl: float | None = None,
    rounding: str | None = None,
    calibration: Path | None = None,
    recipe: Path | None = None,
    out: Path | None = None,
    plot: Path | None = None,
    json: Json = False,
) -> int:
    """Choose each tensor's scheme by a budget, as a recipe for a target, and show what each size would lose.

    Measures once, tensor by tensor, how much of the model its rounding costs; then any budget is a matter of seconds.

    Example: tapeout budget cpu arithmetic --bits 5 --out build/recipe.toml

    Args:
        target: What is to run the model: `tapeout targets` lists them. Only schemes that it carries exactly are chosen.
        bits: Bits a weight, over all matrices, as the target's file takes them.
        max_kl: As small as a predicted KL of this many nats a token allows.
        rounding: Goes into the recipe. The KL is predicted for rtn, which the others stay below.
        calibration: A text to measure on. Default: the model's own, or the one that ships with tapeout.
        recipe: A TOML file without schemes: rounding, calibration, limits.
        out: Where the recipe goes. Default: it is shown.
        plot: Draw the size-quality curve to this file (.svg, .png, .pdf).
        json: Print the mix and the curve to stdout.
    """
    from tapeout.budget import plot as draw
    from tapeout.files import writing

    settings = recipe_of(recipe, calibration, rounding=rounding)
    with progress_bars() as progress:
        found = mixed_by_budget(model, targets.get(target)(), settings, bits, max_kl, progress)
    if plot:
        draw(found, plot)
    if out:
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(found.toml(), encoding="utf-8")
    else:
        stderr.print(Text(found.recipe.toml()), soft_wrap=True)
    if json:
        print_json(found.to_json())
    table = Table("bits a weight", "predicted KL, nats a token")
    for mix in found.curve:
        table.add_row(f"{mix.bits:.2f}", f"{mix.kl:.3g}")
    stderr.print(table)
    return 0


def plan(
    model: ModelArgument,
    *,
    target: Annotated[list[str] | None, Many] = None,
    scheme: Annotated[list[str] | None, Many] = None,
    device: Annotated[list[str] | None, Many] = None,
    devices: Path | None = None,
    context: int | None = None,
    batch: int = 1,
    json: Json = False,
) -> int:
    """Say what fits where, before any work: no weight is read, and config.json alone will do.

    Example: tapeout plan arithmetic --target cpu

    Args:
        target: Plan for this one. May be given several times. Default: all that have a device in the table.
        scheme: How weights become codes. May be given several times. Default: each target's own.
        device: A device of the table. May be given several times. Default: all.
        devices: A TOML file with devices of your own, over the table's.
        context: Tokens of a sequence. Default: 4096, or the model's own where that is less.
        batch: Sequences at once.
        json: Print the plan to stdout.
    """
    from tapeout.devices import chosen, table
    from tapeout.plan import plan as run
    from tapeout.plan_report import show

    found = run(model, chosen(table(devices), device), target, scheme, context=context, batch=batch)
    if json:
        print_json(found.to_json())
    else:
        for each in show(found):
            stderr.print(each, soft_wrap=isinstance(each, Text))
    return 0
