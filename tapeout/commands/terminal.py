"""What all verbs share: the terminal, flags, progress, and how a command is stopped."""

from __future__ import annotations

import codecs
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.console import Console, ConsoleDimensions, ConsoleOptions, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from tapeout import targets
from tapeout.errors import GateFailed, TapeoutError
from tapeout.recipe import Recipe

if TYPE_CHECKING:
    from tapeout.budget import Plan


# Controls of a terminal, and what turns the direction of text.
_CONTROLS = dict.fromkeys(
    [*({*range(0x20)} - {0x09, 0x0A}), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A)],
    "\ufffd",
)


class _Console(Console):
    """Prints what it is given, whole: names and texts of others may hold what rich takes for markup, or a terminal for controls, and no
    cell loses its end.
    """

    def __init__(self, *, stderr: bool) -> None:
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)
        if self.is_dumb_terminal:  # of which rich says 80 columns, whatever it has
            self.size = ConsoleDimensions(*shutil.get_terminal_size())

    def print(self, *objects: Any, **keywords: Any) -> None:
        for each in objects:
            for column in each.columns if isinstance(each, Table) else ():
                column.overflow = "fold"
        super().print(*objects, **keywords)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Everything that is printed comes through here; rich's own commands are no text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=segment.text.translate(_CONTROLS))


stdout, stderr = _Console(stderr=False), _Console(stderr=True)

# What tables and sentences have beside ASCII, a letter for a letter, so that columns stay where they are.
_ASCII = str.maketrans("…→≈–—‖×µ’‘“”█▏·∘≥≤°↑↓✓✗−", "~>~--|xu''\"\"#|.o><o^v+x-")

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


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """Letters that a terminal without UTF-8 cannot show: the nearest one, or the escape that Python writes it as."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    said = error.object[error.start : error.end].translate(_ASCII)
    return said.encode("ascii", "backslashreplace").decode("ascii"), error.end


codecs.register_error("tapeout", _in_ascii)


def any_encoding() -> None:
    """Let stdout and stderr take every letter, whatever their encoding holds."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure and not _unicode(stream):
            reconfigure(errors="tapeout")


def _unicode(stream: Any) -> bool:
    return (getattr(stream, "encoding", None) or "utf-8").lower().replace("_", "-").startswith("utf")


def typed(text: str) -> str:
    """A text of the command line as UTF-8, where the locale says less; TapeoutError for one that is not."""
    try:
        return os.fsencode(text).decode("utf-8") if not text.isascii() else text
    except UnicodeError as error:
        raise TapeoutError(f"the prompt is not UTF-8: {error}.") from error


@dataclass(frozen=True)
class Demands:
    """What is demanded of speed.

    Attributes:
        min_tokens_per_s: Fail below this many tokens a second of one stream.
        max_ttft_ms: Fail when the first token takes more milliseconds than this.
    """

    min_tokens_per_s: float | None = None
    max_ttft_ms: float | None = None


@dataclass(frozen=True)
class DemandsOfAll(Demands):
    """The same of speed and memory; apart, since a target may have a --max-memory of its own.

    Attributes:
        min_tokens_per_s: Fail below this many tokens a second of one stream.
        max_ttft_ms: Fail when the first token takes more milliseconds than this.
        max_memory: Fail when loading and running takes more memory than this: 500MB, 2GB.
    """

    max_memory: str | None = None


AllDemands = Annotated[DemandsOfAll | None, Parameter(name="*", group="limits of speed")]


def demands(given: Demands | None) -> dict[str, Any]:
    """The limits that were given, by name."""
    return {name: value for name, value in asdict(given).items() if value is not None} if given else {}


def where_it_runs(target: str) -> None:
    """Leave a command to the target's worker environment, where there is one and the target's library does not work here."""
    from tapeout import environments

    if found := environments.worker_of(target):
        environment, why = found
        stderr.print(Text(f"{why}: going on in the worker environment '{environment.name}'."), soft_wrap=True)
        environments.run_there(environment, sys.argv[1:])


@Parameter(name="*")
@dataclass(frozen=True)
class Codes:
    """How weights become codes.

    Attributes:
        scheme: How weights become codes; `tapeout targets` lists what is carried. Default: int8, or the target's own where it has one.
        rounding: How codes are chosen: rtn, hqq, gptq, awq or smoothquant. Default: rtn.
        calibration: A text that rounding looks at (.txt, .jsonl, a saved dataset). gptq, awq and smoothquant have a default one.
        recipe: A TOML file: scheme, rounding, schemes by tensor, limits of the gates.
        bits: Choose each tensor's scheme so that a weight takes this many bits on average, and as little as possible is lost.
        max_kl: The same the other way round: as small as a predicted KL of this many nats a token allows.
    """

    scheme: str | None = None
    rounding: str | None = None
    calibration: Path | None = None
    recipe: Path | None = None
    bits: float | None = None
    max_kl: float | None = None

    @property
    def settings(self) -> Recipe:
        """The recipe's, with what was given on the command line over it."""
        return recipe_of(self.recipe, self.calibration, scheme=self.scheme, rounding=self.rounding)

    @property
    def mix(self) -> str | None:
        """What a mix by budget is called; None where no budget was given."""
        if self.bits is None and self.max_kl is None:
            return None
        return f"{self.bits:g}bits" if self.bits is not None else f"kl{self.max_kl:g}"


def recipe_of(path: Path | None, text: Path | None, **given: Any) -> Recipe:
    """The recipe of a file, with what was given on the command line over it."""
    from tapeout.quantize import Calibration

    recipe = Recipe.read(path) if path else Recipe()
    if text:
        given["calibration"] = replace(recipe.calibration or Calibration(), text=text)
    return recipe.model_copy(update={key: value for key, value in given.items() if value is not None})


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
    if not report.passed:
        see(GateFailed.page)


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=not _unicode(sys.stdout)) + "\n")


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars on stderr, one a stage; they vanish at the end, and there are none when it is not a terminal that can take lines back."""
    columns = (TextColumn("{task.description:<12}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_interactive) as bars:
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


def say(message: str, page: str | None = None) -> None:
    """Tell what went wrong, and the page that explains it."""
    # Text, since a message may hold brackets that are no markup.
    stderr.print(Text.assemble(("tapeout: ", "bold red"), message), soft_wrap=True)
    if page:
        see(page)


def see(page: str) -> None:
    stderr.print(f"see: tapeout docs {page}")
