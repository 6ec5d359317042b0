"""How a matrix is watched: a live table on a terminal, a line a cell elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from time import monotonic

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from tapeout.commands.terminal import stderr
from tapeout.matrix.result import MARKS
from tapeout.matrix.schedule import Watcher
from tapeout.matrix.tasks import Outcome, Status, Task, worst

STYLES: Mapping[Status, str] = {
    "passed": "green",
    "failed": "bold red",
    "error": "bold red",
    "refused": "cyan",
    "skipped": "yellow",
    "not run": "red",
}
_BESIDE = 7  # lines of the terminal that are not for cells that ended


class Lines:
    """A line for each cell, as soon as something is known of it."""

    def known(self, outcome: Outcome, stands: bool) -> None:
        """Say what needs no work."""
        stderr.print(_line(outcome, "as it stands" if stands else ""), soft_wrap=True)

    def began(self, task: Task) -> None:
        """Nothing is said of it."""

    def stage(self, task: Task, stage: str, done: int, total: int) -> None:
        """Nothing is said of it."""

    def ended(self, task: Task, outcome: Outcome) -> None:
        """Say what came of it."""
        stderr.print(_line(outcome, f"{outcome.seconds:.1f} s"), soft_wrap=True)

    def tick(self, used: Mapping[str, int], waits: str) -> None:
        """Nothing is said of it."""


class Shown(Lines):
    """A table that changes: what runs, with its stage and memory, the last that ended, and how many there are of each outcome."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._running: dict[str, tuple[Task, float, str]] = {}
        self._ended: list[Text] = []
        self._cells: dict[str, Outcome] = {}

    def known(self, outcome: Outcome, stands: bool) -> None:
        """Count what needs no work; what was refused or skipped is told."""
        self._cells[outcome.name] = outcome
        self._ended.append(_line(outcome, "as it stands" if stands else ""))

    def began(self, task: Task) -> None:
        """Show it among those that run."""
        self._running[task.name] = task, monotonic(), ""

    def stage(self, task: Task, stage: str, done: int, total: int) -> None:
        """Show how far it is."""
        if task.name in self._running:
            begun = self._running[task.name][1]
            self._running[task.name] = task, begun, f"{stage} {done / total:.0%}" if total else stage

    def ended(self, task: Task, outcome: Outcome) -> None:
        """Count it, and show it among the last."""
        self._running.pop(task.name, None)
        if task.kind == "cell":
            self._cells[task.name] = outcome
        if task.kind == "cell" or outcome.red:
            self._ended.append(_line(outcome, f"{outcome.seconds:.1f} s"))

    def tick(self, used: Mapping[str, int], waits: str) -> None:
        """Draw it anew."""
        table = Table.grid(padding=(0, 2))
        for name, (task, begun, stage) in self._running.items():
            memory = f"{used.get(name, 0) / 1e9:.1f} of {task.memory_bytes / 1e9:.1f} GB"
            table.add_row(
                Text("▸", "bold blue"), Text(name), Text(stage), f"{monotonic() - begun:.0f} s", memory
            )
        counted = [
            f"[{STYLES[status]}]{MARKS[status]} {count} {status}[/]"
            for status, count in self._counts().items()
        ]
        room = max(1, stderr.height - _BESIDE - len(self._running))
        lines: list[Text | Table] = [*self._ended[-room:], table, Text.from_markup("  ".join(counted))]
        if waits:
            lines.append(Text(waits, "yellow"))
        self._live.update(Group(*lines))

    def _counts(self) -> dict[Status, int]:
        return worst(self._cells.values())


def _line(outcome: Outcome, taken: str) -> Text:
    said = Text.assemble(
        (f"{outcome.status:<8}", STYLES[outcome.status]),
        f" {outcome.name}",
        no_wrap=True,
        overflow="ellipsis",
    )
    for words in (taken, outcome.reason, *outcome.notes):
        if words:
            said.append(f"  {' '.join(words.split())}", "dim" if words == taken else "")
    return said


@contextmanager
def watching() -> Iterator[Watcher]:
    """Who is told what happens: a live table, or lines where there is no terminal."""
    if not stderr.is_terminal:
        yield Lines()
        return
    with Live(console=stderr, refresh_per_second=5, transient=True) as live:
        yield Shown(live)
