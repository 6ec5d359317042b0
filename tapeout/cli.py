"""The command line: each verb reads its arguments, makes one call and prints. Human output goes to stderr."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import log10
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import cyclopts
from cyclopts import App, Parameter
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from tapeout import __version__, targets
from tapeout.errors import MissingToolchain, OutputError, PackageError, TapeoutError
from tapeout.recipe import Recipe

if TYPE_CHECKING:
    from tapeout.budget import Plan
    from tapeout.validate.divergence import Divergence

stderr = Console(stderr=True, highlight=False)

app = App(
    name="tapeout",
    version=__version__,
    suppress_keyboard_interrupt=False,  # main says what became of the work
    help="Quantize a language model once, lower those exact codes to every device, and prove it.",
)
app.register_install_completion_command(help="Install completion for this shell.")
export_app = App(
    name="export",
    help="""Take a model from its checkpoint to a proven package: quantize, lower, validate, pack.

    Example: tapeout export cpu arithmetic --scheme int4-g32 --out build/demo
    """,
)
app.command(export_app)

Json = Annotated[bool, Parameter(name="--json", negative="")]
Flag = Parameter(negative="")
Many = Parameter(negative="", consume_multiple=False)
ModelArgument = Annotated[
    str,
    Parameter(
        help="A Hugging Face directory, a hub id, file.py:factory of a torch module, or: "
        "arithmetic, count, formula, text2sql, topics_v1, topics_v2."
    ),
]


def _register_export(kind: type[targets.Target]) -> None:
    """Add ``tapeout export NAME``: the target's own flags are the fields of its dataclass."""

    def export(
        model: ModelArgument,
        *,
        scheme: str | None = None,
        rounding: str | None = None,
        calibration: Path | None = None,
        recipe: Path | None = None,
        bits: float | None = None,
        max_kl: float | None = None,
        out: Path | None = None,
        force: Annotated[bool, Flag] = False,
        require: Annotated[list[str] | None, Many] = None,
        json: Json = False,
        options: Any = None,
    ) -> int:
        """Args:
        scheme: How weights become codes; `tapeout targets` lists what is carried. Default: the target's own, mostly int8.
        rounding: How codes are chosen: rtn, hqq, gptq, awq or smoothquant. Default: rtn.
        calibration: A text that rounding looks at (.txt, .jsonl, a saved dataset). gptq, awq and smoothquant have a default one.
        recipe: A TOML file: scheme, rounding, schemes by tensor, limits of the gates.
        bits: Choose each tensor's scheme so that a weight takes this many bits on average, and as little as possible is lost.
        max_kl: The same the other way round: as small as a predicted KL of this many nats a token allows.
        out: Where the package goes. Default: MODEL-SCHEME-TARGET here.
        force: Replace what stands there.
        require: A gate that must run: skipped counts as failed. May be given several times.
        json: Print the report to stdout.
        """
        from tapeout.build import export as run

        _where_it_runs(kind.name)
        settings = _recipe(recipe, calibration, scheme=scheme, rounding=rounding)
        usual = settings.with_default(targets.default_scheme(options or kind())).scheme
        called = Path(model.partition(".py:")[0]).name  # of file.py:factory the file
        place = out or Path(f"{called}-{_mixed(bits, max_kl) or usual}-{kind.name}")
        with _progress() as progress:
            if _mixed(bits, max_kl):
                settings = _plan(model, options or kind(), settings, bits, max_kl, progress).recipe
            package, report = run(
                options or kind(),
                model,
                place,
                settings,
                force=force,
                require=frozenset(require or ()),
                progress=progress,
            )
        _show(report, as_json=json)
        stderr.print(f"{place}  root digest {package.manifest['root_sha256']}", soft_wrap=True)
        stderr.print(f"{place / 'report.html'}  shows what was measured", soft_wrap=True)
        return 0 if report.passed else 1

    export.__annotations__["options"] = Annotated[
        kind | None, Parameter(name="*", group=f"{kind.name} flags")
    ]
    example = f"Example: tapeout export {kind.name} arithmetic --scheme int4-g32 --out build/demo"
    export_app.command(export, name=kind.name, help=f"{kind.summary}\n\n{example}")


@app.command
def quantize(
    model: ModelArgument,
    *,
    scheme: str | None = None,
    rounding: str | None = None,
    calibration: Path | None = None,
    recipe: Path | None = None,
    bits: float | None = None,
    max_kl: float | None = None,
    out: Path,
    force: Annotated[bool, Flag] = False,
    json: Json = False,
) -> int:
    """Make the canonical codes only, as a store.

    Example: tapeout quantize arithmetic --scheme nf4 --out build/codes

    Args:
        scheme: How weights become codes. Default: int8.
        rounding: How codes are chosen: rtn, hqq, gptq, awq or smoothquant. Default: rtn.
        calibration: A text that rounding looks at (.txt, .jsonl, a saved dataset). gptq, awq and smoothquant have a default one.
        recipe: A TOML file: scheme, rounding, schemes by tensor.
        bits: Choose each tensor's scheme so that a weight takes this many bits on average, and as little as possible is lost.
        max_kl: The same the other way round: as small as a predicted KL of this many nats a token allows.
        out: Where the store goes.
        force: Replace what stands there.
        json: Print a summary to stdout.
    """
    from tapeout.models import load
    from tapeout.quantize import quantize as run

    settings = _recipe(recipe, calibration, scheme=scheme, rounding=rounding)
    with _progress() as progress:
        if _mixed(bits, max_kl):
            settings = _plan(model, None, settings, bits, max_kl, progress).recipe
        quant = run(
            load(model),
            **settings.rounds(),
            out=out,
            force=force,
            progress=progress,
        )
    for name, reason in quant.fallbacks.items():
        stderr.print(f"[yellow]{name}: {reason}[/]")
    summary = {
        "store": str(out),
        "scheme": quant.scheme.name,
        "codes_sha256": quant.digest,
        "source_sha256": quant.source_sha256,
        "fallbacks": dict(quant.fallbacks),
        "clamped_groups": dict(quant.clamped),
    }
    if json:
        _print_json(summary)
    stderr.print(f"{out}  {quant.scheme}, codes {quant.digest}", soft_wrap=True)
    return 0


@app.command
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

    settings = _recipe(recipe, calibration, rounding=rounding)
    with _progress() as progress:
        found = _plan(model, targets.get(target)(), settings, bits, max_kl, progress)
    if plot:
        draw(found, plot)
    if out:
        with writing(out):
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(found.toml(), encoding="utf-8")
    else:
        stderr.print(Text(found.recipe.toml()), soft_wrap=True)
    if json:
        _print_json(found.to_json())
    table = Table("bits a weight", "predicted KL, nats a token")
    for mix in found.curve:
        table.add_row(f"{mix.bits:.2f}", f"{mix.kl:.3g}")
    stderr.print(table)
    return 0


@app.command
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
        _print_json(found.to_json())
    else:
        for each in show(found):
            stderr.print(each, soft_wrap=isinstance(each, Text))
    return 0


@app.command
def validate(
    package: Path,
    *,
    model: str | None = None,
    recipe: Path | None = None,
    calibration: Path | None = None,
    require: Annotated[list[str] | None, Many] = None,
    device_report: Path | None = None,
    report: Path | None = None,
    json: Json = False,
) -> int:
    """Run the gates of a package again, on this machine.

    Without its model, the gates that need it are skipped; the golden logits are compared all the same.

    Example: tapeout validate build/demo --model arithmetic

    Args:
        package: The package's directory.
        model: The model that it was made from: a directory, a hub id or an embedded name.
        recipe: Other limits, or the evaluation text. Default: the limits that it was made with; its schemes are its own.
        calibration: The text that its rounding looked at, when that was one of your own.
        require: A gate that must run: skipped counts as failed. May be given several times.
        device_report: What the package's own script found on a device (device_report.json): its gates and figures become part of the report.
        report: A directory to write report.json, report.html, report.md and report.xml to.
        json: Print the report to stdout.
    """
    from tapeout.pack import Package
    from tapeout.replay import revalidate

    _where_it_runs(Package.open(package).manifest["target"]["name"])
    with _progress() as progress:
        found = revalidate(
            package,
            model,
            Recipe.read(recipe) if recipe else None,
            calibration=calibration,
            required=frozenset(require or ()),
            device_report=device_report,
            progress=progress,
        )
    if report:
        report.mkdir(parents=True, exist_ok=True)
        found.write(report)
    _show(found, as_json=json)
    return 0 if found.passed else 1


@app.command
def bench(
    package: Path,
    *,
    contexts: Annotated[list[int] | None, Many] = None,
    json: Json = False,
) -> int:
    """Measure a package's throughput on this machine, and nothing else.

    Example: tapeout bench build/demo

    Args:
        package: The package's directory.
        contexts: Context length to measure at, in tokens. May be given several times.
        json: Print the figures to stdout.
    """
    from tapeout.pack import Package
    from tapeout.replay import bench as run
    from tapeout.validate.report import throughput_table

    _where_it_runs(Package.open(package).manifest["target"]["name"])
    with _progress() as progress:
        figures = run(package, tuple(contexts or ()), progress)
    if json:
        _print_json(figures)
    stderr.print(throughput_table(figures))
    return 0


@app.command
def run(
    package: Path,
    *,
    prompt: str,
    chat: Annotated[bool, Flag] = False,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    repetition_penalty: float | None = None,
    max_new_tokens: int | None = None,
    seed: int = 0,
    json: Json = False,
) -> int:
    """Generate on the target's runtime, with the package's own generation settings; or encode a text with an encoder's package.

    Example: tapeout run build/demo --prompt "12*3="

    Args:
        package: The package's directory.
        prompt: The text to go on from.
        chat: Put the prompt into the package's chat template, as the user's turn.
        temperature: 0 takes the likeliest token each time.
        top_p: Sample from the likeliest tokens that together have this probability.
        top_k: Sample from this many likeliest tokens; 0: from all.
        repetition_penalty: Above 1 makes tokens that occurred less likely.
        max_new_tokens: Stop after this many.
        seed: Of the sampling.
        json: Print one document with the text and its token ids instead of streaming.
    """
    from tapeout.pack import Package
    from tapeout.replay import generate

    opened = Package.open(package)
    _where_it_runs(opened.manifest["target"]["name"])
    if not opened.passed:
        stderr.print(f"[yellow]warning: {package} failed its gates; see {package / 'report.html'}[/]")
    if opened.encoder_output:
        import numpy as np

        from tapeout.replay import encode

        found = encode(opened, prompt)
        if json:
            _print_json(found)
        else:
            said = found.get("label") or " ".join(
                f"{value:.6g}" for value in np.ravel(found[opened.encoder_output])
            )
            sys.stdout.write(f"{said}\n")
        return 0
    given = {
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "max_new_tokens": max_new_tokens,
    }
    ids: list[int] = []
    text = ""
    for token, piece in generate(
        opened, prompt, chat=chat, seed=seed, **{k: v for k, v in given.items() if v is not None}
    ):
        ids.append(token)
        text += piece
        if not json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    if json:
        _print_json({"prompt": prompt, "text": text, "token_ids": ids})
    else:
        sys.stdout.write("\n")
    return 0


@app.command
def diff(
    one: str,
    other: str,
    *,
    prompt: str | None = None,
    calibration: Path | None = None,
    picture: Path | None = None,
    json: Json = False,
) -> int:
    """Find the first primitive where two models part: two packages, or a package and the model that it was made from.

    Artifacts run the numbers that their files hold, without the rounding of matmul inputs that their runtime adds. Exit status 1: one parts.

    Example: tapeout diff build/demo arithmetic

    Args:
        one: A package, a .gguf file, an ONNX directory, or a model.
        other: The same. A model beside a package stands for the reference with the package's own codes.
        prompt: What both are run on. Default: the longest golden prompt of the package.
        calibration: The text that the package's rounding looked at, when that was one of your own.
        picture: Draw how the difference grows to this file (.svg).
        json: Print every value's difference to stdout.
    """
    from tapeout.diff import check_picture
    from tapeout.diff import diff as run
    from tapeout.diff import picture as draw

    if picture:
        check_picture(picture)
    with _progress() as progress:
        found = run(one, other, prompt, calibration=calibration, progress=progress)
    if picture:
        draw(found, picture)
    if json:
        _print_json(found.to_json())
    stderr.print(_growth(found.divergence))
    for note in found.notes:
        stderr.print(Text(f"note: {note}"), soft_wrap=True)
    stderr.print(Text(found.divergence.words()), soft_wrap=True)
    return 0 if found.divergence.first is None else 1


@app.command
def compare(*packages: Path, html: Path | None = None, json: Json = False) -> int:
    """Set the reports of several packages side by side, as a table in Markdown. Exit status 1: one of them did not pass.

    Example: tapeout compare build/demo build/onnx --html build/compare.html

    Args:
        packages: Their directories, two or more.
        html: Write the same as a page, with charts.
        json: Print the figures to stdout as JSON instead.
    """
    from tapeout.compare import reports
    from tapeout.files import writing
    from tapeout.validate.page import comparison_markdown, comparison_page, comparison_rows

    if len(packages) < 2:
        raise TapeoutError(f"compare takes two packages or more, found {len(packages)}.")
    found = reports(packages)
    if html:
        with writing(html):
            html.parent.mkdir(parents=True, exist_ok=True)
            html.write_text(comparison_page(found), encoding="utf-8")
        stderr.print(Text(f"{html}"), soft_wrap=True)
    if json:
        _print_json({"packages": list(found), "rows": comparison_rows(found)})
    else:
        sys.stdout.write(comparison_markdown(found))
    return 0 if all(report.passed for report in found.values()) else 1


@app.command
def inspect(path: Path, *, json: Json = False) -> int:
    """Say what is in a model, a store, an artifact or a package.

    Example: tapeout inspect build/demo

    Args:
        path: A model directory, a store, a .gguf file or a package.
        json: Print it to stdout.
    """
    from tapeout.describe import describe

    found = describe(path)
    if json:
        _print_json(found)
        return 0
    table = Table(title=str(path), show_header=False, title_justify="left")
    for key, value in found.items():
        shown = ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(key, shown)
    stderr.print(table)
    return 0


@app.command
def verify(package: Path, *, json: Json = False) -> int:
    """Compare every byte of a package with its manifest.

    Example: tapeout verify build/demo

    Args:
        package: The package's directory.
        json: Print the findings to stdout.
    """
    from tapeout.pack import Package

    opened = Package.open(package)
    damage = opened.damage()
    if json:
        _print_json(
            {"package": str(package), "root_sha256": opened.manifest["root_sha256"], "damage": damage}
        )
    if damage:
        raise PackageError(f"{package} is not what its manifest says: {'; '.join(damage[:5])}.")
    stderr.print(
        f"{package} is whole: {len(opened.files())} files, root digest {opened.manifest['root_sha256']}",
        soft_wrap=True,
    )
    return 0


@app.command(name="targets")
def list_targets(name: str | None = None, *, json: Json = False) -> int:
    """List the targets, what each carries, and whether its runtime is installed here.

    Example: tapeout targets
    Example: tapeout targets apple

    Args:
        name: Of one target: in which container it carries each scheme, and why it refuses one.
        json: Print the table to stdout.
    """
    from tapeout.describe import alike, carry_table

    if name is not None:
        targets.get(name)
    rows = carry_table()
    if json:
        _print_json(rows)
        return 0
    shown = [each for each in alike(rows) if name is None or any(way.split()[0] == name for way in each)]
    title = "what each target carries" if name is None else f"what {name} carries"
    table = Table("scheme", *(", ".join(each) for each in shown), title=title, title_justify="left")
    for scheme, cells in {**rows["schemes"], **rows["kv_caches"]}.items():
        said = [cells[each[0]] for each in shown]
        table.add_row(scheme, *(said if name else map(_in_short, said)))
    stderr.print(table)
    for each, facts in rows["targets"].items():
        if name in (None, each.split()[0]):
            state = "installed" if facts["missing"] is None else facts["missing"]
            stderr.print(f"[bold]{each}[/]: {facts['summary']} Runtime: {state}", soft_wrap=True)
    if name is None:
        stderr.print("In which container, and why not: tapeout targets NAME.")
    return 0


def _in_short(cell: str) -> str:
    """``exact``, ``rounded +0.02%``, ``no``: what a table of all targets has room for."""
    added = re.search(r"\+[\d.]+%", cell)
    return f"rounded {added[0]}" if added else re.split(r"[ :]", cell, maxsplit=1)[0]


env_app = App(
    name="env",
    help="""Worker environments: tools whose pins conflict with tapeout's, each in a Python environment of its own.

    Example: tapeout env create optimum
    """,
)
app.command(env_app)


@env_app.command
def create(name: str) -> int:
    """Make a worker environment with pip; one that is there stays, an interrupted one goes on.

    Example: tapeout env create optimum

    Args:
        name: `tapeout env list` shows them.
    """
    from tapeout import environments

    environment = environments.get(name)
    status = stderr.status(f"{name}: {', '.join(environment.requirements)}")
    with status:
        place = environments.create(environment, lambda line: status.update(Text(f"{name}: {line[:100]}")))
    stderr.print(Text(f"{name} is in {place}"), soft_wrap=True)
    return 0


@env_app.command(name="list")
def list_environments(*, json: Json = False) -> int:
    """List the worker environments, what each is for, and whether it is here.

    Example: tapeout env list

    Args:
        json: Print it to stdout.
    """
    from tapeout.environments import ENVIRONMENTS

    if json:
        _print_json(
            [
                {
                    "name": each.name,
                    "purpose": each.purpose,
                    "requirements": each.requirements,
                    "installed": each.installed,
                    "directory": str(each.directory),
                    "size_bytes": each.size_bytes if each.installed else None,
                    "create": each.command,
                }
                for each in ENVIRONMENTS.values()
            ]
        )
        return 0
    table = Table("name", "for", "state", "size")
    for each in ENVIRONMENTS.values():
        state, size = (
            ("installed", f"{each.size_bytes / 1e9:.1f} GB") if each.installed else (each.command, "")
        )
        table.add_row(each.name, each.purpose, state, size)
    stderr.print(table)
    return 0


def _where_it_runs(target: str) -> None:
    """Leave a command to the target's worker environment, where there is one and the target's library does not work here."""
    from tapeout import environments

    if found := environments.worker_of(target):
        environment, why = found
        stderr.print(Text(f"{why}: going on in the worker environment '{environment.name}'."), soft_wrap=True)
        environments.run_there(environment, sys.argv[1:])


def _recipe(path: Path | None, text: Path | None, **given: Any) -> Recipe:
    """The recipe of a file, with what was given on the command line over it."""
    from tapeout.quantize import Calibration

    recipe = Recipe.read(path) if path else Recipe()
    if text:
        given["calibration"] = replace(recipe.calibration or Calibration(), text=text)
    return recipe.model_copy(update={key: value for key, value in given.items() if value is not None})


def _mixed(bits: float | None, max_kl: float | None) -> str | None:
    """What a mix by budget is called; None where no budget was given."""
    if bits is None and max_kl is None:
        return None
    return f"{bits:g}bits" if bits is not None else f"kl{max_kl:g}"


def _plan(
    model: str,
    kind: targets.Target | None,
    settings: Recipe,
    bits: float | None,
    max_kl: float | None,
    progress: Callable[[str, int, int], None],
) -> Plan:
    from tapeout.budget import plan
    from tapeout.models import load

    found = plan(load(model), kind, settings, bits=bits, max_kl=max_kl, progress=progress)
    stderr.print(Text("\n".join(found.summary())), soft_wrap=True)
    return found


def _growth(found: Divergence) -> Table:
    """What each layer gives is off by, with a bar of a block a factor of ten above float32's rounding, and where most of it was made."""
    alone = any(value.own is not None for value in found.values)
    table = Table("", "off by", "", "alone" if alone else "most", "where", title_justify="left")
    table.title = f"difference / size, {found.tokens} tokens"
    for layer, (grown, own, worst) in found.layers().items():
        bar = "█" * max(0, round(log10(max(grown, 1e-8)) + 8))
        style = "bold red" if worst.parts else "green"
        largest = worst.grown if own is None else own
        table.add_row(layer, f"{grown:.2g}", Text(bar, style), f"{largest:.2g}", f"{worst.name} ({worst.op})")
    return table


def _show(report: Any, *, as_json: bool) -> None:
    from tapeout.validate.report import device_table, verdict_table

    if as_json:
        _print_json(report.to_json())
    stderr.print(verdict_table(report))
    if report.device:
        stderr.print(device_table(report.device))


def _print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on stderr, one a stage; they vanish at the end, and there are none when it is not a terminal."""
    columns = (TextColumn("{task.description:<12}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def update(stage: str, done: int, total: int) -> None:
            if _stopped:  # Python drops an exception that is raised in a destructor or a callback
                raise _Stopped
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield update


class _Stopped(BaseException):
    """SIGINT or SIGTERM arrived: unwinds, so that nothing half-written stays."""


_stopped: list[signal.Signals] = []


def _stop(number: int, _: object) -> None:
    _stopped.append(signal.Signals(number))
    raise _Stopped


def main() -> None:
    """Run the command line; exit status 0 all gates pass, 1 a gate failed, 2 bad input or usage, 3 something is missing."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        for name in targets.names():
            if name not in export_app:
                _register_export(targets.get(name))
        status = app(sys.argv[1:], exit_on_error=False, result_action="return_value")
    except TapeoutError as error:
        _say(str(error))
        status = error.status
    except cyclopts.CycloptsError:
        status = 2  # cyclopts has printed what is wrong
    except (KeyboardInterrupt, _Stopped):
        number = _stopped[0] if _stopped else signal.SIGINT
        _say(
            f"stopped by {number.name}; nothing half-written was left. The same command goes on where it stopped."
        )
        status = 128 + number
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except OSError as error:
        _say(f"the operating system refused: {error}.")
        status = OutputError.status
    except ModuleNotFoundError as error:
        _say(
            f"the Python package '{error.name}' is not installed: pip install 'tapeout[cpu]' brings what a CPU export needs."
        )
        status = MissingToolchain.status
    sys.exit(status or 0)


def _say(message: str) -> None:
    # Text, since a message may hold brackets that are no markup.
    stderr.print(Text.assemble(("tapeout: ", "bold red"), message), soft_wrap=True)
