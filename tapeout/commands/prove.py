"""Verbs that run what was made: validate, bench, run, diff, compare."""

from __future__ import annotations

import sys
from dataclasses import asdict
from math import log10
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rich.table import Table
from rich.text import Text

from tapeout.commands.terminal import (
    AllDemands,
    Flag,
    Json,
    Many,
    demands,
    print_json,
    progress_bars,
    show,
    stderr,
    stdout,
    typed,
    where_it_runs,
)
from tapeout.errors import PackageError, TapeoutError
from tapeout.recipe import Recipe

if TYPE_CHECKING:
    from tapeout.validate.divergence import Divergence


def validate(
    package: Path,
    *,
    model: str | None = None,
    recipe: Path | None = None,
    calibration: Path | None = None,
    require: Annotated[list[str] | None, Many] = None,
    device_report: Path | None = None,
    on: str | None = None,
    report: Path | None = None,
    speed: AllDemands = None,
    json: Json = False,
) -> int:
    """Run the gates of a package again, on this machine; with --on a device's besides.

    Without its model, the gates that need it are skipped; the golden logits are compared all the same.

    Example: tapeout validate build/demo --model arithmetic

    Args:
        package: The package's directory.
        model: The model that it was made from: a directory, a hub id or an embedded name.
        recipe: Other limits, or the evaluation text. Default: the limits that it was made with; its schemes are its own.
        calibration: The text that its rounding looked at, when that was one of your own.
        require: A gate that must run: skipped counts as failed. May be given several times.
        device_report: What the package's own script found on a device (device_report.json): its gates and figures become part of the report.
        on: A device, ssh://[user@]host[:port][/directory]: the package is copied there, its check.py run, and the report brought back.
        report: A directory to write report.json, report.html, report.md and report.xml to.
        json: Print the report to stdout.
    """
    from tapeout.pack import Package
    from tapeout.replay import revalidate
    from tapeout.ssh import Address, checked

    if on and device_report:
        raise TapeoutError(
            "--on brings a device report, and --device-report gives one: leave one of them out."
        )
    address = Address.parse(on) if on else None
    opened = Package.open(package)
    where_it_runs(opened.manifest["target"]["name"])
    with progress_bars() as progress:
        told = checked(opened, address, progress) if address else device_report
        found = revalidate(
            package,
            model,
            Recipe.read(recipe) if recipe else None,
            calibration=calibration,
            required=frozenset(require or ()),
            device_report=told,
            speed=demands(speed),
            progress=progress,
        )
    if report:
        report.mkdir(parents=True, exist_ok=True)
        found.write(report)
    show(found, as_json=json)
    return 0 if found.passed else 1


def bench(
    package: Path,
    *,
    scenario: Annotated[list[str] | None, Many] = None,
    percentile: Annotated[list[int] | None, Many] = None,
    samples: int | None = None,
    seconds: float | None = None,
    contexts: Annotated[list[int] | None, Many] = None,
    load: Annotated[list[float] | None, Many] = None,
    report: Path | None = None,
    speed: AllDemands = None,
    json: Json = False,
) -> int:
    """Measure a package's throughput on this machine, and nothing else: a short measurement, and the scenarios that are asked for.

    Exit status 1: a limit of speed was missed. Nothing is loaded that the memory at hand has no room for.

    Example: tapeout bench build/demo --scenario single-stream

    Args:
        package: The package's directory.
        scenario: single-stream, offline, server, context-sweep or thread-sweep. May be given several times.
        percentile: Of latencies, 1 to 99. May be given several times. Default: 50, 90 and 99.
        samples: Requests of a scenario after its warm-up. Default: as many as the highest percentile needs (368 for p99).
        seconds: Measure each scenario for this long; refused when that gives too few samples.
        contexts: Context length to measure at, in tokens. May be given several times.
        load: Of the scenario server: the rate at which requests come, as a share of the offline rate. May be given several times. Default: 0.3, 0.5, 0.7 and 0.9.
        report: A directory to write the package's report with these figures to: report.json, report.html, report.md and report.xml.
        json: Print the figures to stdout.
    """
    from tapeout.bench import bench as run
    from tapeout.pack import Package
    from tapeout.validate.measuring import Asked
    from tapeout.validate.report import throughput_table
    from tapeout.validate.speed_page import gates_table, speed_tables

    asked = Asked(
        tuple(scenario or ()),
        tuple(sorted(set(percentile or (50, 90, 99)))),
        samples,
        seconds,
        tuple(sorted(set(contexts))) if contexts else None,
        tuple(sorted(set(load))) if load else None,
    )
    where_it_runs(Package.open(package).manifest["target"]["name"])
    with progress_bars() as progress:
        found = run(package, tuple(contexts or ()), progress, asked=asked, speed=demands(speed))
    if report:
        told = found.report()
        report.mkdir(parents=True, exist_ok=True)
        told.write(report)
    if json:
        print_json(
            {**found.figures, **({"gates": [asdict(gate) for gate in found.gates]} if found.gates else {})}
        )
    for table in (throughput_table(found.figures), *speed_tables(found.figures), *gates_table(found.gates)):
        stderr.print(table)
    return 0 if found.passed else 1


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

    opened, prompt = Package.open(package), typed(prompt)
    where_it_runs(opened.manifest["target"]["name"])
    if not opened.passed:
        said = f"warning: {package} failed its gates; see {package / 'report.html'}"
        stderr.print(Text(said, "yellow"), soft_wrap=True)
    try:
        opened.report()
    except PackageError as error:
        stderr.print(Text(f"warning: {error}", "yellow"), soft_wrap=True)
    if opened.encoder_output:
        import numpy as np

        from tapeout.replay import encode

        found = encode(opened, prompt)
        if json:
            print_json(found)
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
        print_json({"prompt": prompt, "text": text, "token_ids": ids})
    else:
        sys.stdout.write("\n")
    return 0


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
    with progress_bars() as progress:
        found = run(one, other, prompt and typed(prompt), calibration=calibration, progress=progress)
    if picture:
        draw(found, picture)
    if json:
        print_json(found.to_json())
    stderr.print(_growth(found.divergence))
    for note in found.notes:
        stderr.print(Text(f"note: {note}"), soft_wrap=True)
    stderr.print(Text(found.divergence.words()), soft_wrap=True)
    return 0 if found.divergence.first is None else 1


def compare(*packages: Path, html: Path | None = None, json: Json = False) -> int:
    """Set the reports of several packages side by side, as a table; where it goes to a file, in Markdown. Exit status 1: one of them did not pass.

    Example: tapeout compare build/demo build/onnx --html build/compare.html

    Args:
        packages: Their directories, two or more.
        html: Write the same as a page, with charts.
        json: Print the figures to stdout as JSON instead.
    """
    from tapeout.compare import reports
    from tapeout.files import writing
    from tapeout.validate.page import cell_text, comparison_markdown, comparison_page, comparison_rows

    if len(packages) < 2:
        raise TapeoutError(f"compare takes two packages or more, found {len(packages)}.")
    found = reports(packages)
    if html:
        with writing(html):
            html.parent.mkdir(parents=True, exist_ok=True)
            html.write_text(comparison_page(found), encoding="utf-8")
        stderr.print(Text(f"{html}"), soft_wrap=True)
    if json:
        print_json({"packages": list(found), "rows": comparison_rows(found)})
    elif sys.stdout.isatty():
        table = Table("", *found, show_lines=True)
        for row in comparison_rows(found):
            fact = row["fact"] + (f", {row['unit']}" if row["unit"] else "")
            table.add_row(fact, *(cell_text(cell) for cell in row["cells"]))
        stdout.print(table)
    else:
        sys.stdout.write(comparison_markdown(found))
    return 0 if all(report.passed for report in found.values()) else 1


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
