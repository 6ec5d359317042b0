"""Verbs that look and change nothing but environments: inspect, targets, doctor, docs, env."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cyclopts import App
from rich import box
from rich.table import Table
from rich.text import Text

from tapeout import targets
from tapeout.commands.terminal import Json, print_json, stderr

if TYPE_CHECKING:
    from tapeout.doctor import Diagnosis


def inspect(path: Path, *, json: Json = False) -> int:
    """Say what is in a model, a store, an artifact or a package.

    Example: tapeout inspect build/demo

    Args:
        path: A model directory, a store, a package, a report.json, a .gguf or .onnx file.
        json: Print it to stdout.
    """
    from tapeout.describe import describe

    found = describe(path)
    if json:
        print_json(found)
        return 0
    table = Table(title=Text(str(path)), show_header=False, title_justify="left")
    shown = {
        key: ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        for key, value in found.items()
    }
    digests = {key: value for key, value in shown.items() if re.fullmatch("[0-9a-f]{64}", value)}
    for key, value in shown.items():
        if key not in digests:
            table.add_row(key, value)
    stderr.print(table)
    for key, value in digests.items():  # whole, to be copied
        stderr.print(f"{key} {value}", soft_wrap=True)
    return 0


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
        print_json(rows)
        return 0
    shown = [each for each in alike(rows) if name is None or any(way.split()[0] == name for way in each)]
    title = "what each target carries" if name is None else f"what {name} carries"
    table = Table("scheme", *(", ".join(each) for each in shown), title=title, title_justify="left")
    for scheme, cells in {**rows["schemes"], **rows["kv_caches"]}.items():
        said = [cells[each[0]] for each in shown]
        table.add_row(scheme, *(said if name else map(_in_short, said)))
    # Columns as wide as their longest words, between lines and spaces.
    columns = ([str(each.header), *map(str, each.cells)] for each in table.columns)
    wide = sum(3 + max(len(word) for cell in cells for word in cell.split()) for cells in columns)
    narrow = wide + 1 > stderr.width
    stderr.print(_as_lists(rows, shown, title) if narrow and name is None else table)
    for each, facts in rows["targets"].items():
        if name in (None, each.split()[0]):
            state = facts["missing"] or "installed"
            line = Text.assemble((each, "bold"), f": {facts['summary']} Runtime: {state}")
            stderr.print(line, soft_wrap=True)
    if name is None:
        stderr.print("In which container, and why not: tapeout targets NAME.")
    return 0


def _as_lists(rows: Mapping[str, Any], shown: Sequence[tuple[str, ...]], title: str) -> Table:
    """The same for a terminal that has no room for a column a target: a row a target, with what it carries how."""
    table = Table("targets", "schemes", title=title, title_justify="left", show_lines=True)
    for each in shown:
        found: dict[str, list[str]] = {}
        for scheme, cells in {**rows["schemes"], **rows["kv_caches"]}.items():
            found.setdefault(_in_short(cells[each[0]]), []).append(scheme)
        caches = found.pop("yes", [])
        found = {**{how: names for how, names in found.items() if how != "no"}, "no": found.get("no", [])}
        lines = [f"{how}: {', '.join(names)}" for how, names in found.items() if names]
        table.add_row(", ".join(each), "\n".join([*lines, f"caches: {', '.join(caches)}"]))
    return table


def _in_short(cell: str) -> str:
    """``exact``, ``rounded +0.02%``, ``no``: what a table of all targets has room for."""
    added = re.search(r"\+[\d.]+%", cell)
    return f"rounded {added[0]}" if added else re.split(r"[ :]", cell, maxsplit=1)[0]


def doctor(*, target: str | None = None, json: Json = False) -> int:
    """Say what works here, what is missing or conflicts, and the command that mends each. Nothing is changed, no network is asked.

    Exit status 0: at least one target works, or the one that was asked for; 3: none, or not that one.

    Example: tapeout doctor
    Example: tapeout doctor --target "cpu --format onnx"

    Args:
        target: Look at what this one needs: its name, or one way of it with its format.
        json: Print everything that was looked at to stdout.
    """
    from tapeout.doctor import diagnose
    from tapeout.errors import MissingToolchain

    with stderr.status("importing what is installed"):
        found = diagnose(target)
    if json:
        print_json(found.to_json())
    else:
        _show(found)
    return 0 if found.healthy else MissingToolchain.status


_MARKS = {"ok": "green", "missing": "yellow", "conflict": "red"}
_AREAS = {  # titles of an area's table and of its last column
    "python": ("Python", "wanted"),
    "package": ("packages", "wanted by tapeout and its extras"),
    "environment": ("worker environments", "for"),
    "tool": ("tools on the PATH", "for"),
    "machine": ("machine", ""),
    "target": ("targets", "runs on"),
}


def _show(found: Diagnosis) -> None:
    """A table an area, then the commands that mend: of conflicts, of targets that do not work, of what is optional."""
    ours = [each for each in found.findings if each.extras == ("dev",) and each.state != "conflict"]
    shown = [each for each in found.findings if each not in ours]  # without what tapeout's own developers use
    for area, (title, about) in _AREAS.items():
        table = Table(title, "", "here", about, box=box.SIMPLE_HEAD, pad_edge=False)
        for each in shown:
            if each.area == area:
                named = f"{each.wanted}  {' '.join(extra or 'tapeout' for extra in each.extras)}"
                what = named if area == "package" and each.state != "conflict" else each.wanted
                table.add_row(each.name, Text(each.state, _MARKS[each.state]), Text(each.found), Text(what))
        if table.row_count:
            stderr.print(table)
    told: set[str] = set()
    for heading, kinds in (
        (
            "conflicts, and what mends each",
            [each for each in shown if each.state == "conflict" and each.mend],
        ),
        ("does not work here", [each for each in shown if each.area == "target" and each.state != "ok"]),
        ("optional", [each for each in shown if each.state == "missing" and each.mend]),
    ):
        lines = {
            f"  {each.name}: {each.mend or each.found}": each.mend for each in kinds if each.mend not in told
        }
        told |= {each for each in lines.values() if each}
        if lines:
            stderr.print(Text("\n".join([heading, *lines])), soft_wrap=True)
    good = ", ".join(way for way, works in found.works.items() if works)
    stderr.print(f"works here: {good or 'none'}", soft_wrap=True)
    stderr.print("not looked at: the network, and Hugging Face's hub and login")


def docs(page: str | None = None) -> int:
    """Show a page of the documentation; without one, the list of them.

    Into a file or a pipe the page goes as it is, as Markdown.

    Example: tapeout docs gates

    Args:
        page: Its name. What an error names behind "see:" is one.
    """
    from rich.console import Console
    from rich.markdown import Markdown

    from tapeout import pages

    if page is None:
        table = Table("page", "about")
        for name in pages.names():
            table.add_row(name, Text(pages.title(name)))
        stderr.print(table)
        return 0
    if sys.stdout.isatty():
        Console().print(Markdown(pages.for_terminal(page)))
    else:
        sys.stdout.write(pages.read(page))
    return 0


env_app = App(
    name="env",
    help="""Worker environments: tools whose pins conflict with tapeout's, each in a Python environment of its own.

    Example: tapeout env create optimum
    """,
)


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
        print_json(
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
