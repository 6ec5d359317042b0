"""The command line, as tests call it."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

from tapeout import cli

Done = subprocess.CompletedProcess[str]
PROGRAM = Path(sys.executable).with_name("tapeout")


def tapeout(
    *arguments: str | Path, cwd: Path | None = None, status: int | None = None, **environment: str
) -> Done:
    """Run a command in this process; it must end with ``status``, if that is given, and never in a traceback.

    Its workers are real and stay for the next command, which most of the time is what importing torch and transformers takes.
    What a process of its own must show (signals, limits, an environment that Python reads when it starts) is ``process``'s.
    """
    command = ["tapeout", *map(str, arguments)]
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    ended: Any = None
    try:
        with (
            patch.object(sys, "argv", command),
            patch.dict(os.environ, environment),
            contextlib.chdir(cwd or Path.cwd()),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            cli.main()
    except SystemExit as end:
        ended = end.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    said, told = (each.buffer.getvalue().decode() for each in (out, err))  # type: ignore[attr-defined]
    assert status in (None, ended), told
    return _sound(Done(command, ended, said, told))


def process(*arguments: str | Path, **keywords: Any) -> Done:
    """Run a command in a process of its own, with keywords of ``subprocess.run``."""
    # One thread: those that wait for one another burn a shared core for minutes.
    given = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"} | keywords.pop("env", {})
    command = [str(PROGRAM), *map(str, arguments)]
    return _sound(
        subprocess.run(
            command, capture_output=True, text=True, timeout=120, check=False, env=given, **keywords
        )
    )


def _sound(done: Done) -> Done:
    assert "Traceback" not in done.stderr, done.stderr
    return done
