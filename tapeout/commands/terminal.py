"""What all verbs share: the terminal, flags, progress, and how a command is stopped."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from tapeout import targets
from tapeout.recipe import Recipe

if TYPE_CHECKING:
    from tapeout.budget import Plan

# Controls of a terminal, and what turns the direction of text.
_CONTROLS = dict.fromkeys(
    [*({*range(0x20)} - {0x09, 0x0A}), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)],
    "\ufffd",
)


class _Shown(Console):
    """A console on which what models and packages say is shown: a control sequence in a name is not obeyed."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Everything that is printed comes through here; rich's own commands are no text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=segment.text.translate(_CONTROLS))


stderr = _Shown(stderr=True, highlight=False)

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


def where_it_runs(target: str) -> None:
    """Leave a command to the target's worker environment, where there is one and the target's library does not work here."""
    from tapeout import environments

    if found := environments.worker_of(target):
        environment, why = found
        stderr.print(Text(f"{why}: going on in the worker environment '{environment.name}'."), soft_wrap=True)
        environments.run_there(environment, sys.argv[1:])


def recipe_of(path: Path | None, text: Path | None, **given: Any) -> Recipe:
    """The recipe of a file, with what was given on the command line over it."""
    from tapeout.quantize import Calibration

    recipe = Recipe.read(path) if path else Recipe()
    if text:
        given["calibration"] = replace(recipe.calibration or Calibration(), text=text)
    return recipe.model_copy(update={key: value for key, value in given.items() if value is not None})


def mix_name(bits: float | None, max_kl: float | None) -> str | None:
    """What a mix by budget is called; None where no budget was given."""
    if bits is None and max_kl is None:
        return None
    return f"{bits:g}bits" if bits is not None else f"kl{max_kl:g}"


def mixed_by_budget(
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


def show(report: Any, *, as_json: bool) -> None:
    from tapeout.validate.report import device_table, verdict_table

    if as_json:
        print_json(report.to_json())
    stderr.print(verdict_table(report))
    if report.device:
        stderr.print(device_table(report.device))


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on stderr, one a stage; they vanish at the end, and there are none when it is not a terminal."""
    columns = (TextColumn("{task.description:<12}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bars:
        tasks: dict[str, TaskID] = {}

        def update(stage: str, done: int, total: int) -> None:
            if stopped:  # Python drops an exception that is raised in a destructor or a callback
                raise Stopped
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield update


class Stopped(BaseException):
    """SIGINT or SIGTERM arrived: unwinds, so that nothing half-written stays."""


stopped: list[signal.Signals] = []


def stop(number: int, _: object) -> None:
    stopped.append(signal.Signals(number))
    raise Stopped


def say(message: str) -> None:
    # Text, since a message may hold brackets that are no markup.
    stderr.print(Text.assemble(("tapeout: ", "bold red"), message), soft_wrap=True)
