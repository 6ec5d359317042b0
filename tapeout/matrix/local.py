"""Tasks in processes of their own on this machine: a crash, or too little memory, is the task's."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import psutil

from tapeout.matrix.tasks import Outcome, Task, Told

_LOOK_S = 0.25  # between looks at how much memory processes hold
_GRACE_S = 30.0  # that a process may take to unwind before it is ended by force
_SMALL = 2_000_000_000  # predicted bytes of a task whose imports are most of its work
_KEPT = 700_000_000  # bytes that it may hold between two: what a cell adds to that stays below forecast.BASE
_LAST_WORDS = 600  # letters of a log


@dataclass
class _Child:
    """A process that does tasks, one after another."""

    process: subprocess.Popen[bytes]
    replies: IO[bytes]
    cores: list[int]
    model: str

    @property
    def known(self) -> psutil.Process:
        """The same, to be looked at and signalled."""
        return psutil.Process(self.process.pid)

    def give(self, task: Task) -> None:
        """Give it a task."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it is gone: its status says how
            self.process.stdin.write(json.dumps({"task": asdict(task), "cores": self.cores}).encode() + b"\n")
            self.process.stdin.flush()

    def end(self) -> int:
        """Let it end, and take what it leaves; its status."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        status = self.process.wait()
        self.replies.close()
        return status


class Processes:
    """The executor of this machine.

    Small tasks of one model that follow each other are done by one process, which has paid for its imports; whatever a task breaks is
    its own all the same: a process that said nothing, or met an error, does no other.

    Args:
        jobs: how many tasks run at once: the cores are shared out among them, since runtimes that wait for one another's threads on
            shared cores take several times as long.
        lease: a file descriptor that every process keeps open: the lock on it ends with the last of them.
    """

    def __init__(self, jobs: int, lease: int) -> None:
        self._lease = lease
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._every = cores
        share = max(1, len(cores) // jobs)
        self._free = (
            [cores[at * share % len(cores) :][:share] for at in range(jobs)] if cores else [[]] * jobs
        )
        self._idle: list[_Child] = []
        self._running: dict[str, _Child] = {}
        self._used: dict[str, int] = {}
        self._guard = threading.Lock()
        self._stopping = False

    def __call__(self, task: Task, told: Told) -> Outcome:
        """Do a task in a process; see ``tasks.Executor``."""
        begun = time.monotonic()
        with self._guard:
            cores = self._free.pop(0)
        try:
            child = self._child(task, self._every if task.alone else cores)
            found, peak = self._watched(child, task, told)
            if found and self._goes_on(found, task, child):
                with self._guard:
                    self._idle.append(child)
            else:
                status = child.end()
        finally:
            with self._guard:
                self._free.insert(0, cores)
        if found:
            return replace(Outcome(**found | {"notes": tuple(found["notes"])}), peak_bytes=peak)
        if self._stopping:
            return Outcome(task.name, "not run", "it was stopped.", task.inputs)
        how, seconds = _how(status, Path(task.log)), time.monotonic() - begun
        return Outcome(task.name, "error", how, task.inputs, seconds=seconds, peak_bytes=peak)

    def used(self) -> Mapping[str, int]:
        """Bytes that each running task's processes hold, but for what they share with files."""
        with self._guard:
            return dict(self._used)

    def stop(self) -> None:
        """Ask every process to unwind; those that take too long are ended by force."""
        with self._guard:
            self._stopping = True
            running, idle = [child.known for child in self._running.values()], self._idle
            self._idle = []
        for child in idle:
            child.end()
        for process in running:
            _signal(process, signal.SIGTERM)
        _, left = psutil.wait_procs(running, timeout=_GRACE_S)
        for process in left:
            _signal(process, signal.SIGKILL)

    def _goes_on(self, found: Mapping[str, Any], task: Task, child: _Child) -> bool:
        """Whether a process may do another task: it is sound, and what it keeps loaded is less than what it saves."""
        small = task.memory_bytes <= _SMALL and _held(child.known) <= _KEPT
        return found["status"] != "error" and small and not self._stopping

    def _child(self, task: Task, cores: list[int]) -> _Child:
        """A process that is idle and has the same model and cores, or a new one."""
        with self._guard:
            same = [child for child in self._idle if (child.model, child.cores) == (task.model, cores)]
            of_others = [child for child in self._idle if child.cores == cores and child not in same]
            self._idle = [child for child in self._idle if child not in of_others and child not in same[:1]]
        for child in of_others:
            child.end()
        if same and task.memory_bytes <= _SMALL:
            return same[0]
        for child in same[:1]:
            child.end()
        reading, writing = os.pipe()
        log = Path(task.log)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as words:
            try:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "tapeout.matrix.work", str(writing)],
                    stdin=subprocess.PIPE,
                    stdout=words,
                    stderr=subprocess.STDOUT,
                    pass_fds=(writing, self._lease),
                    process_group=0,  # Ctrl-C is for the parent, which then stops them
                )
            finally:
                os.close(writing)
        return _Child(process, os.fdopen(reading, "rb"), cores, task.model)

    def _watched(self, child: _Child, task: Task, told: Told) -> tuple[dict[str, Any], int]:
        """What a process says of a task, nothing where it ended instead, and most bytes that it held."""
        peak, known, ended = 0, child.known, threading.Event()

        def look() -> None:
            nonlocal peak
            while not ended.wait(_LOOK_S):
                held = _held(known)
                peak = max(peak, held)
                with self._guard:
                    self._used[task.name] = held

        with self._guard:
            self._running[task.name], self._used[task.name] = child, 0
            late = self._stopping
        if late:
            _signal(known, signal.SIGTERM)
        looking = threading.Thread(target=look, daemon=True)
        looking.start()
        try:
            child.give(task)
            for line in child.replies:
                said = json.loads(line)
                if "outcome" in said:
                    return said["outcome"], peak
                told(said["stage"], said["done"], said["total"])
            return {}, peak
        finally:
            ended.set()
            looking.join()
            with self._guard:
                self._running.pop(task.name)
                self._used.pop(task.name)


def _held(process: psutil.Process) -> int:
    """Bytes that a process and all that it started hold in memory and share with no file."""
    held = 0
    try:
        every = [process, *process.children(recursive=True)]
    except psutil.Error:
        return 0
    for each in every:
        try:
            memory = each.memory_info()
        except psutil.Error:
            continue
        held += memory.rss - getattr(memory, "shared", 0)
    return int(held)


def _signal(process: psutil.Process, number: signal.Signals) -> None:
    with contextlib.suppress(psutil.Error):
        process.send_signal(number)


def _how(status: int, log: Path) -> str:
    """How a process ended that said nothing of it, with the last of its log."""
    how = f"ended with status {status}"
    if status < 0:
        how = f"was ended by {signal.Signals(-status).name}"
        if status == -signal.SIGKILL:
            how += ", which is how the system ends what takes more memory than there is"
    words = log.read_text(encoding="utf-8", errors="replace").strip()[-_LAST_WORDS:]
    return f"its process {how}.{' Its last words: ' + ' '.join(words.split()) if words else ''}"
