"""How a matrix is watched: a live table on a terminal, a line a cell elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from rich.text import Text

from tapeout.commands.terminal import stderr
from tapeout.matrix.tasks import Outcome, Task

STYLES = {
    "passed": "green",
    "failed": "bold red",
    "error": "bold red",
    "refused": "cyan",
    "skipped": "yellow",
    "not run": "red",
}


class Lines:
    """A line for each task that ended."""

    def began(self, task: Task) -> None:
        """Nothing is said of it."""

    def stage(self, task: Task, stage: str, done: int, total: int) -> None:
        """Nothing is said of it."""

    def ended(self, task: Task, outcome: Outcome) -> None:
        """Say what came of it."""
        said = Text.assemble(
            (f"{outcome.status:<8}", STYLES[outcome.status]), f" {task.name}", f"  {outcome.seconds:.1f} s"
        )
        if outcome.reason:
            said.append(f"  {outcome.reason}")
        stderr.print(said, soft_wrap=True)

    def tick(self, used: Mapping[str, int], waits: str) -> None:
        """Nothing is said of it."""


@contextmanager
def watching() -> Iterator[Lines]:
    """Who is told what happens."""
    yield Lines()
