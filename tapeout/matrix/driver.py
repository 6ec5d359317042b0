"""The process that talks to Ray for a ``Cluster``: where each task may run, near what, and what is fetched from there."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from tapeout import __version__
from tapeout.errors import TapeoutError
from tapeout.files import new_directory
from tapeout.manifest import safe_path
from tapeout.matrix import node
from tapeout.matrix.tasks import Outcome, Task
from tapeout.pack import Package

UP_S = 120.0
"""Seconds that connecting may take, with the answers of all machines."""

_ANSWER_S = 90.0  # that a machine may take to say what it sees: it begins a process and imports tapeout
_KNOCK_S = 10.0
_FETCHES = 4  # packages that are fetched at once
_PIECES = 4  # of a package that are on their way at once


@dataclass(frozen=True)
class Request:
    """A task as Ray takes it.

    Attributes:
        environment, directory, cores, here: see ``node.do``.
        resources: of Ray, ``CPU`` among them. memory: bytes.
        near: whether it goes to the machine that has its codes, if that one is free.
    """

    task: Task
    environment: Mapping[str, str]
    directory: str
    cores: int
    here: bool
    resources: Mapping[str, float]
    memory: int
    near: bool = False


@dataclass(frozen=True)
class Machine:
    """One of a cluster: its name, what it lends to tasks, and what it sees of this one."""

    name: str
    resources: Mapping[str, float]
    sight: node.Sight


@dataclass(frozen=True)
class Machines:
    """What a cluster has: resources of all together, and each that takes tasks (a head without a core takes none)."""

    resources: Mapping[str, float]
    every: Sequence[Machine]

    @property
    def memory(self) -> int:
        """Bytes that the largest lends to tasks."""
        return max(int(each.resources.get("memory", 0)) for each in self.every)

    @property
    def cores(self) -> int:
        """Cores of the smallest."""
        return min(int(each.resources.get("CPU", 0)) for each in self.every) or 1

    def all_see(self, path: str) -> bool:
        """Whether each has this path, of those that it was asked for."""
        return all(path in each.sight.paths for each in self.every)


def drive(pipe: Connection, address: str, paths: list[str], log: str) -> None:
    """Talk to Ray for the process at the other end of ``pipe``: requests in, (name, outcome, log) out; None ends it."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):  # what Ray has to tell of its machines
        os.dup2(handle, stream)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which says what is to happen
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        _knock(address)
        node.connect(address)
        pipe.send(_machines(paths))
    except Exception as error:  # whatever Ray has: told, and nothing else can be done
        pipe.send(_why(error))
        return
    with ThreadPoolExecutor(_FETCHES) as fetching:
        _serve(pipe, fetching)
    import ray

    ray.shutdown()


def _knock(address: str) -> None:
    """OSError where nobody listens: Ray itself would try for minutes."""
    found = re.fullmatch(r"(?:ray://)?\[?([^\]/]+?)\]?:(\d+)", address)
    if found:
        try:
            socket.create_connection((found[1], int(found[2])), _KNOCK_S).close()
        except OSError as error:
            raise OSError(f"nobody listens there ({error.strerror or error})") from None


def _serve(pipe: Connection, fetching: ThreadPoolExecutor) -> None:
    """Give tasks to Ray and answers back, until there are no more."""
    import ray
    from ray.exceptions import RayError

    work, waiting, guard = ray.remote(node.do), dict[Any, Request](), threading.Lock()
    made_at: dict[str, str] = {}

    def answer(outcome: Outcome, log: bytes | None = None) -> None:
        with guard, contextlib.suppress(OSError):  # nobody waits for it
            pipe.send((outcome.name, outcome, log))

    def fetch(request: Request, done: node.Done) -> None:
        answer(_brought(request.task, done), done.log)

    while True:
        ready, _ = ray.wait(list(waiting), timeout=0.1) if waiting else ([], [])
        for reference in ready:
            request = waiting.pop(reference)
            task = request.task
            try:
                done: node.Done = ray.get(reference)
            except RayError as error:
                answer(Outcome(task.name, "error", f"Ray could not do it: {_words(error)}", task.inputs))
                continue
            if task.kind == "codes" and done.outcome.status == "passed":
                made_at[task.codes] = done.machine
            if done.left:
                fetching.submit(fetch, request, done)
            else:
                answer(done.outcome, done.log)
        while pipe.poll(0 if waiting else 0.5):
            wanted: Request | None = pipe.recv()
            if wanted is None:
                for reference in waiting:
                    ray.cancel(reference, force=True)
                return
            options = _options(wanted, made_at.get(wanted.task.codes) if wanted.near else None)
            given = (wanted.task, wanted.environment, wanted.directory, wanted.cores, wanted.here)
            waiting[work.options(**options).remote(*given)] = wanted


def _options(request: Request, near: str | None) -> dict[str, Any]:
    """What Ray is asked for; ``near``: a machine that is better than others, as long as it is free."""
    asked = dict(request.resources)
    options = {
        "num_cpus": asked.pop("CPU"),
        "num_gpus": asked.pop("GPU", 0),
        "resources": asked,
        "memory": request.memory,
        "max_retries": 3,  # a machine that dies takes its task along: it goes to another one
    }
    if near:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # Without spilling a task waits for this one machine while others idle.
        there = NodeAffinitySchedulingStrategy(near, soft=True, _spill_on_unavailable=True)
        options["scheduling_strategy"] = there
    return options


def _machines(paths: list[str]) -> Machines:
    """Ask every machine of the cluster; one that dies meanwhile is left out.

    Raises:
        ValueError: none answers, or one has no tapeout that could.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    asked = []
    for each in [each for each in ray.nodes() if each["Alive"]]:
        there = NodeAffinitySchedulingStrategy(each["NodeID"], soft=False)
        call = ray.remote(num_cpus=0, scheduling_strategy=there)(node.look)
        asked.append((each["NodeManagerHostname"], each["Resources"], call.remote(paths)))
    found: list[Machine] = []
    began = time.monotonic()
    for name, resources, reference in asked:
        left = max(0.0, _ANSWER_S - (time.monotonic() - began))
        try:
            found.append(Machine(name, resources, ray.get(reference, timeout=left)))
        except GetTimeoutError:
            raise ValueError(f"its machine {name} did not answer within {_ANSWER_S:.0f} seconds") from None
        except RayTaskError as error:
            missing = re.search(r"No module named '([\w.]+)'", str(error))
            said = (
                f"has no module {missing[1]}: pip install tapeout=={__version__} there"
                if missing
                else _words(error)
            )
            raise ValueError(f"its machine {name} {said}") from None
        except RayError:
            continue
    if not found:
        raise ValueError("none of its machines answers")
    busy = [each for each in found if each.resources.get("CPU", 0) >= 1]
    return Machines(ray.cluster_resources(), busy or found)


def _brought(task: Task, done: node.Done) -> Outcome:
    """The outcome of a task whose package stayed on its machine, once the package is here, or with the reason why it is not."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(done.machine, soft=False)
    call = ray.remote(
        num_cpus=0,
        num_returns="streaming",
        scheduling_strategy=there,
        _generator_backpressure_num_objects=_PIECES,
    )(node.pieces)
    try:
        with new_directory(Path(task.out), force=True) as partial:
            for reference in call.remote(done.left):
                path, piece = ray.get(reference)
                file = partial / safe_path(path)
                file.parent.mkdir(parents=True, exist_ok=True)
                with file.open("ab") as whole:
                    whole.write(piece)
            if damage := Package.open(partial).damage():
                raise TapeoutError("; ".join(damage[:3]))
    except (RayError, TapeoutError, OSError, ValueError) as error:
        note = f"its package is there, in {done.left}, and could not be brought here: {_words(error)}"
        return replace(done.outcome, notes=(*done.outcome.notes, note))
    return replace(done.outcome, notes=(*done.outcome.notes, "its package was brought here to be looked at."))


def _why(error: Exception) -> str:
    """Why a cluster cannot be used, as the end of a sentence."""
    words = _words(error)
    of_both = re.search(
        r"Version mismatch: .*?Ray: (\S+) Python: (\S+) .*?started with: Ray: (\S+) Python: (\S+)", words
    )
    if of_both:
        theirs, python, ours, here = of_both.groups()
        return (
            f"it runs Ray {theirs} on Python {python}, and this machine Ray {ours} on Python {here}: one version of each on all machines "
            f"(pip install ray=={theirs})"
        )
    return words.rstrip(".")


def _words(error: Exception) -> str:
    """What an error says, in one paragraph that is not too long."""
    return " ".join(str(error).split())[:400]
