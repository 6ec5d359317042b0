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
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import psutil

from tapeout.matrix.tasks import Outcome, Task, Told

_LOOK_S = 0.25  # between looks at how much memory processes hold
_GRACE_S = 30.0  # that a process may take to unwind before it is ended by force
_LAST_WORDS = 600  # letters of a log


class Processes:
    """The executor of this machine.

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
        self._running: dict[str, psutil.Process] = {}
        self._held: dict[str, int] = {}
        self._guard = threading.Lock()
        self._stopping = False

    def __call__(self, task: Task, told: Told) -> Outcome:
        """Do a task in a process; see ``tasks.Executor``."""
        with self._guard:
            cores = self._free.pop(0) if self._free else self._every
        try:
            return self._run(task, told, self._every if task.alone else cores)
        finally:
            with self._guard:
                self._free.append(cores)

    def used(self) -> Mapping[str, int]:
        """Bytes that each running task's processes hold, but for what they share with files."""
        with self._guard:
            return dict(self._held)

    def stop(self) -> None:
        """Ask every process to unwind; those that take too long are ended by force."""
        with self._guard:
            self._stopping = True
            running = list(self._running.values())
        for process in running:
            _signal(process, signal.SIGTERM)
        _, left = psutil.wait_procs(running, timeout=_GRACE_S)
        for process in left:
            _signal(process, signal.SIGKILL)

    def _run(self, task: Task, told: Told, cores: list[int]) -> Outcome:
        begun, peak = time.monotonic(), 0
        reading, writing = os.pipe()
        log = Path(task.log)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as words, os.fdopen(reading, "rb") as replies:
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
            known = psutil.Process(process.pid)
            with self._guard:
                self._running[task.name], self._held[task.name] = known, 0
                late = self._stopping
            if late:
                _signal(known, signal.SIGTERM)
            found: dict[str, Any] = {}
            ended = threading.Event()

            def look() -> None:
                nonlocal peak
                while not ended.wait(_LOOK_S):
                    held = _held(known)
                    peak = max(peak, held)
                    with self._guard:
                        self._held[task.name] = held

            looking = threading.Thread(target=look, daemon=True)
            looking.start()
            try:
                _give(process, {"task": asdict(task), "cores": cores})
                for line in replies:
                    said = json.loads(line)
                    if "outcome" in said:
                        found = said["outcome"]
                    else:
                        told(said["stage"], said["done"], said["total"])
                status = process.wait()
            finally:
                ended.set()
                looking.join()
                with self._guard:
                    self._running.pop(task.name)
                    self._held.pop(task.name)
        if found:
            return replace(Outcome(**found | {"notes": tuple(found["notes"])}), peak_bytes=peak)
        if self._stopping:
            return Outcome(task.name, "not run", "it was stopped.", task.inputs)
        return Outcome(
            task.name,
            "error",
            _how(status, log),
            task.inputs,
            seconds=time.monotonic() - begun,
            peak_bytes=peak,
        )


def _give(process: subprocess.Popen[bytes], request: Mapping[str, Any]) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(json.dumps(request).encode())
        process.stdin.close()
    except BrokenPipeError:  # it is gone: its status says how
        pass


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
