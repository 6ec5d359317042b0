"""Run the commands that stand in pages and write what they print below them.

    .venv/bin/python scripts/record.py [FILE.md …]

A page is a session: its blocks of ``console`` are one after the other, each line that begins with ``$`` is a command, and what follows it is
what it printed on a terminal 100 columns wide. All commands of a page run in one new directory. Without files: the README and the tutorials.
"""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 100
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Step:
    """A command and what it printed."""

    command: str
    printed: str


def pages() -> list[Path]:
    """The README and the tutorials."""
    return [ROOT / "README.md", *sorted((ROOT / "docs" / "tutorials").glob("*.md"))]


def steps(text: str) -> list[Step]:
    """The commands of a page; lines that begin with ``>`` go on with the command, as in a shell."""
    found = []
    for part in re.split(r"^\$ ", "".join(BLOCK.findall(text)), flags=re.MULTILINE)[1:]:
        first, *rest = part.splitlines()
        more = next((at for at, line in enumerate(rest) if not line.startswith("> ")), len(rest))
        command = [first, *(line.removeprefix("> ") for line in rest[:more])]
        found.append(Step("\n".join(command), "\n".join(rest[more:])))
    return found


def run(command: str, directory: Path, environment: dict[str, str], status: int = 0) -> tuple[str, int]:
    """Run a command with bash on a terminal; what stands there in the end, and its exit status.

    Args:
        status: what ``$?`` is before it.
    """
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["bash", "-c", f"(exit {status})\n{command}"],
        cwd=directory,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    printed = b""
    while True:
        try:
            piece = os.read(ours, 65536)
        except OSError:  # Linux's word for: the other side is closed
            break
        if not piece:
            break
        printed += piece
    os.close(ours)
    return screen(printed.decode()), process.wait()


def screen(written: str) -> str:
    """What a terminal shows of what was written to it: progress bars come and go, colours are left out."""
    lines, row, column = [""], 0, 0
    for code, letter, plain in re.findall(r"\x1b\[([?\d;]*)([A-Za-z])|([\r\n]|[^\x1b\r\n]+)", written):
        if plain == "\r":
            column = 0
        elif plain == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif plain:
            before, after = lines[row][:column].ljust(column), lines[row][column + len(plain) :]
            lines[row], column = before + plain + after, column + len(plain)
        elif letter == "A":  # up
            row = max(0, row - int(code or 1))
        elif letter == "K":  # clear: the line, or what is right of the cursor
            lines[row] = "" if code == "2" else lines[row][:column]
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def environment(cache: Path) -> dict[str, str]:
    """A newcomer's: this Python's commands first, and a cache of its own."""
    return os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
        "TAPEOUT_CACHE": str(cache),
        "COLUMNS": str(WIDTH),
        "TERM": "xterm",
        "HF_HUB_OFFLINE": "1",
    }


def recorded(text: str) -> str:
    """A page with what its commands print now."""
    with tempfile.TemporaryDirectory() as scratch:
        place, status = Path(scratch, "work"), 0
        place.mkdir()
        (place / "examples").symlink_to(ROOT / "examples")
        given = environment(Path(scratch, "cache"))

        def fill(found: re.Match[str]) -> str:
            nonlocal status
            lines = []
            for step in steps(found[0]):
                printed, status = run(step.command, place, given, status)
                sys.stderr.write(f"[{status}] {step.command}\n")
                lines += ["$ " + step.command.replace("\n", "\n> "), *([printed] if printed else [])]
            return "\n".join(["```console", *lines, "```"])

        return BLOCK.sub(fill, text)


def main() -> None:
    if shutil.which("bash") is None:
        sys.exit("bash is not installed, and commands are run with it.")
    for path in map(Path, sys.argv[1:]) if sys.argv[1:] else pages():
        path.write_text(recorded(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
