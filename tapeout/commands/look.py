"""Verbs that look and change nothing but environments: inspect, verify, targets, env."""

from __future__ import annotations

import re
from pathlib import Path

from cyclopts import App
from rich.table import Table
from rich.text import Text

from tapeout import targets
from tapeout.commands.terminal import Json, print_json, stderr


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
        print_json(found)
        return 0
    table = Table(title=Text(str(path)), show_header=False, title_justify="left")
    for key, value in found.items():
        shown = ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(key, Text(shown))
    stderr.print(table)
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
