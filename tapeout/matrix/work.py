"""The process that does tasks: it reads them from stdin, and tells how it goes and what came of each on a pipe, a JSON document a line.

What libraries print goes to the task's log, which is this process's stdout and stderr meanwhile.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from tapeout.errors import MissingToolchain, ModelError, SchemeError, TapeoutError
from tapeout.matrix.shared import Storage
from tapeout.matrix.tasks import Status, Task

_SAMPLES = 3  # of a speed
_GRACE_S = 20.0  # that unwinding may take once the parent is gone


class _Stopped(BaseException):
    """SIGTERM, or the parent is gone: unwinds, so that nothing half-written stays."""


class _Notes(logging.Handler):
    """Keeps what the library warns of, for the outcome."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.kept: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.kept.append(record.getMessage())


def main() -> None:
    """Do tasks, a line of stdin each, until there are no more; the only argument is the file descriptor to tell on."""
    replies = int(sys.argv[1])
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_end_with_parent, args=(replies,), daemon=True).start()
    notes = _Notes()
    logging.basicConfig(
        stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING
    )
    logging.getLogger("tapeout").addHandler(notes)
    try:
        while line := _line():
            request = json.loads(line)
            if request["cores"] and hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(0, request["cores"])  # before a library counts them
            task = Task(**request["task"])
            _go_elsewhere(task, replies, line)
            _log_to(Path(task.log))
            notes.kept.clear()
            _say(replies, {"outcome": _do(task, replies, notes.kept)})
    except _Stopped:
        os._exit(128 + signal.SIGTERM)


def _do(task: Task, replies: int, notes: list[str]) -> dict[str, Any]:
    """Do a task; what came of it as JSON."""

    def told(stage: str, done: int, total: int) -> None:
        if _stopped:  # Python drops an exception that is raised in a destructor or a callback
            raise _Stopped
        _say(replies, {"stage": stage, "done": done, "total": total})

    begun = time.monotonic()
    try:
        found = _DO[task.kind](task, told, notes)
    except TapeoutError as error:
        found = {"status": _status(task, error), "reason": str(error)}
    except Exception as error:  # a bug, or a library's: the log has where
        traceback.print_exc()
        found = {
            "status": "error",
            "reason": f"{type(error).__name__}: {error}. The log has the traceback.",
        }
    seconds = time.monotonic() - begun
    return {"name": task.name, "inputs": task.inputs, "seconds": seconds, **found, "notes": list(notes)}


def _line() -> bytes:
    """The next line of stdin, read without a buffer: who goes on elsewhere takes what is left."""
    line = b""
    while not line.endswith(b"\n") and (piece := os.read(0, 1)):
        line += piece
    return line


def _log_to(path: Path) -> None:
    """Let everything that is printed from now on go to a file."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def _codes(task: Task, told: Any, notes: list[str]) -> dict[str, Any]:
    """Make the codes in the cache, or take them from shared storage."""
    from tapeout.matrix.node import RAY, Tensors
    from tapeout.models import load
    from tapeout.quantize import quantize
    from tapeout.recipe import Recipe

    storage = Storage.at(task.cache, notes)
    taken = storage.fetch_store(task.codes)
    far = Tensors() if os.environ.get(RAY) else None
    model, recipe = load(task.model), Recipe.of(dict(task.recipe))
    quant = quantize(model, **recipe.rounds(), far=far, checkpoints=storage, progress=told)
    if not taken:
        storage.push_store(task.codes, quant.directory)
        storage.forget_layers(quant.directory)
    return {"status": "passed", "codes_sha256": quant.digest}


def _cell(task: Task, told: Any, notes: list[str]) -> dict[str, Any]:
    """Make and prove a package, or take it from shared storage."""
    from tapeout.build import export, target
    from tapeout.matrix.figures import of
    from tapeout.pack import Package
    from tapeout.recipe import Recipe
    from tapeout.validate.page import risk
    from tapeout.validate.report import Report

    storage, out, figures = Storage.at(task.cache, notes), Path(task.out), {}
    if storage.fetch_package(task.inputs, out):
        package, report = Package.open(out), Report.read(out / "report.json")
        figures = of(report)
        if "speed" in figures:
            figures["speed"]["alone"] = False  # nobody knows what ran beside it
    else:
        storage.fetch_store(task.codes)  # where another machine made them
        recipe = Recipe.of(dict(task.recipe))
        package, report = export(
            target(task.target, **task.options), task.model, out, recipe, force=True, progress=told
        )
        if report.passed:
            storage.push_package(task.inputs, out)
    return {
        "status": "passed" if report.passed else "failed",
        "reason": "" if report.passed else risk(report),
        "root_sha256": package.manifest["root_sha256"],
        "codes_sha256": package.manifest["codes_sha256"],
        "figures": figures or of(report),
    }


def _speed(task: Task, told: Any, notes: list[str]) -> dict[str, Any]:
    """Measure a package's speed again."""
    from tapeout.bench import bench
    from tapeout.matrix.figures import speed

    out = Path(task.out)
    if not out.exists():  # another machine made it
        Storage.at(task.cache, notes).fetch_package(task.inputs, out)
    found = [speed(bench(out, (), told).figures) for _ in range(_SAMPLES)]
    measured = [each for each in found if each]
    if not measured:
        return {"status": "passed"}
    return {
        "status": "passed",
        "figures": {"speed": {**measured[0], "samples": [each["value"] for each in measured]}},
    }


_DO = {"codes": _codes, "cell": _cell, "speed": _speed}


def _status(task: Task, error: TapeoutError) -> Status:
    """What an error means: a target says with some kinds that it does not take the model, whose codes have been made by then."""
    if isinstance(error, MissingToolchain):
        return "skipped"
    says_no = isinstance(error, ModelError) or type(error) is TapeoutError
    return "refused" if isinstance(error, SchemeError) or (says_no and task.kind == "cell") else "error"


def _go_elsewhere(task: Task, replies: int, line: bytes) -> None:
    """Go on in the target's worker environment, where there is one and its library does not work here."""
    from tapeout import environments

    if task.target and (found := environments.worker_of(task.target)):
        reading, writing = os.pipe()  # of 64 kB: a task is some of one
        os.write(writing, line)
        os.close(writing)
        os.dup2(reading, 0)
        environments.run_there(found[0], [str(replies)], "tapeout.matrix.work")


def _say(replies: int, document: Mapping[str, Any]) -> None:
    line = json.dumps(document).encode() + b"\n"
    while line:
        line = line[os.write(replies, line) :]


_stopped: list[int] = []


def _stop(number: int, _: object) -> NoReturn:
    _stopped.append(number)
    raise _Stopped


def _end_with_parent(replies: int) -> None:
    """Unwind as soon as nobody can read the replies; end by force when that takes too long, as in the middle of a native call."""
    poll = select.poll()
    poll.register(replies, 0)  # POLLERR is always reported: the reading end is closed
    poll.poll()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_S)
    os._exit(1)


if __name__ == "__main__":
    main()
