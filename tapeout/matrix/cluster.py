"""The executor of a Ray cluster: each task on a machine that has its device, and tensors of the codes on all of them.

Ray ends a process whose cluster is gone. So a process of its own talks to Ray, and its end is something that can be told.

What all machines see is used as it is: the output's directory, the cache, the models. Machines that do not see the output put packages into the
shared storage (``--cache``), from which they are fetched.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import secrets
import signal
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tapeout import __version__
from tapeout.errors import MissingToolchain, TapeoutError
from tapeout.files import cache_directory
from tapeout.matrix import node
from tapeout.matrix.machines import LABELS
from tapeout.matrix.shared import Storage
from tapeout.matrix.tasks import Outcome, Task, Told
from tapeout.models import Model

SPREAD_BYTES = 1 << 30
"""Of a checkpoint: the tensors of a smaller one are rounded sooner than other machines' processes have begun."""

_UP_S = 60.0  # that connecting may take


@dataclass(frozen=True)
class Request:
    """A task as Ray takes it."""

    task: Task
    environment: Mapping[str, str]
    directory: str
    cores: int
    here: bool
    resources: Mapping[str, float]
    memory: int


@dataclass(frozen=True)
class Machines:
    """What a cluster has.

    Attributes:
        resources: of all machines together. memory: bytes that the largest lends to tasks. cores: of the smallest.
        sights: what each sees of this one.
    """

    resources: Mapping[str, float]
    memory: int
    cores: int
    sights: Sequence[node.Sight]


class Cluster:
    """Does tasks on the machines of a Ray cluster.

    Args:
        address: ``auto``, ``HOST:PORT`` or ``ray://HOST:PORT``. out: the matrix's output. models: by what tasks call them.
        cache: the shared storage. jobs: tasks at once; 0: as many as there are machines.

    Raises:
        MissingToolchain: Ray is not installed. TapeoutError: there is no such cluster, its machines have another tapeout, or they see neither
            the output nor a shared storage.
    """

    def __init__(
        self,
        address: str,
        out: Path,
        *,
        cache: str | None = None,
        models: Mapping[str, Model] = MappingProxyType({}),
        jobs: int = 0,
    ) -> None:
        # Not imported here: Ray puts packages of its own on this process's path.
        if importlib.util.find_spec("ray") is None:
            raise MissingToolchain("--ray needs Ray: pip install 'tapeout[ray]'.")
        self._address, self._cache = address, cache
        self._pending: dict[str, Future[tuple[Outcome, bytes | None]]] = {}
        self._guard = threading.Lock()
        self._lost = False
        out.mkdir(parents=True, exist_ok=True)
        token, stores = out / f".seen-{secrets.token_hex(8)}", cache_directory()
        stores.mkdir(parents=True, exist_ok=True)
        seen = stores / token.name
        token.touch()
        seen.touch()
        try:
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            paths = [str(token), str(seen), *(str(model.directory) for model in models.values())]
            log = str(out / "logs" / "ray.log")
            self._driver = context.Process(target=_drive, args=(theirs, address, paths, log), daemon=True)
            self._driver.start()
            theirs.close()
            self.machines = self._connected()
        finally:
            token.unlink()
            seen.unlink()
        self._here = self._all_see(str(token))
        self._environment = {"TAPEOUT_CACHE": str(stores)} if self._all_see(str(seen)) else {}
        self._spread = {name for name, model in models.items() if self._is_worth_spreading(model)}
        if not self._here and cache is None:
            self.stop()
            raise TapeoutError(
                f"not every machine of the Ray cluster at {address} sees {out}: give --cache with a storage that all of them reach, or "
                "--out on a disk that they share."
            )
        self.jobs = jobs or len(self.machines.sights)
        threading.Thread(target=self._listen, daemon=True).start()

    def __call__(self, task: Task, told: Told) -> Outcome:
        """Do a task on some machine; see ``tasks.Executor``."""
        if task.memory_bytes > self.machines.memory:
            return Outcome(
                task.name,
                "refused",
                f"it is predicted to take {task.memory_bytes / 1e9:.1f} GB of memory, and no machine of the cluster lends more than "
                f"{self.machines.memory / 1e9:.1f} GB to tasks.",
                task.inputs,
            )
        future: Future[tuple[Outcome, bytes | None]] = Future()
        with self._guard:
            if self._lost:
                return self._gone(task.name)
            self._pending[task.name] = future
            self._pipe.send(self._request(task))
        outcome, log = future.result()
        if log is not None:
            Path(task.log).parent.mkdir(parents=True, exist_ok=True)
            Path(task.log).write_bytes(log)
        if task.kind == "cell" and not self._here and outcome.status == "passed":
            notes: list[str] = []
            if not Storage.at(self._cache, notes).fetch_package(task.inputs, Path(task.out)):
                reason = f"its package did not arrive in {self._cache}. {' '.join(notes)}"
                return replace(outcome, status="error", reason=reason.strip())
        return outcome

    def used(self) -> Mapping[str, int]:
        """Nothing: each machine's memory is lent out by Ray."""
        return {}

    def stop(self) -> None:
        """End every task, and let the cluster go."""
        with self._guard, contextlib.suppress(OSError):  # it has ended
            self._pipe.send(None)
        self._driver.join(10)
        if self._driver.is_alive():
            self._driver.kill()

    def _request(self, task: Task) -> Request:
        """A task with what it needs of a machine. Tensors are tasks too: codes hold no core while they wait for them."""
        spreads = task.kind == "codes" and task.model in self._spread
        wanted = next(
            (label for label in LABELS.get(task.target, ()) if label in self.machines.resources), None
        )
        environment = {**self._environment, **({node.RAY: self._address} if spreads else {})}
        cores = max(1, min(self.machines.cores, int(self.machines.resources.get("CPU", 1)) // self.jobs))
        resources = {"CPU": 0.0 if spreads else float(cores), **({wanted: 1.0} if wanted else {})}
        return Request(task, environment, str(Path.cwd()), cores, self._here, resources, task.memory_bytes)

    def _connected(self) -> Machines:
        """Wait for the process that talks to Ray."""
        said: Any = None
        try:
            said = (
                self._pipe.recv()
                if self._pipe.poll(_UP_S)
                else f"it did not answer within {_UP_S:.0f} seconds"
            )
        except EOFError:
            said = "what talks to it ended"
        if isinstance(said, Machines):
            others = {sight.version for sight in said.sights} - {__version__}
            if not others:
                return said
            said = f"machines have tapeout {', '.join(sorted(others))}, and this one has {__version__}: install one version on all"
        self._driver.kill()
        raise TapeoutError(f"the Ray cluster at {self._address} cannot be used: {said}.")

    def _is_worth_spreading(self, model: Model) -> bool:
        """Whether its tensors are rounded by all machines: there are several, they see it, and it is large."""
        size = sum(tensor.nbytes for tensor in model.checkpoint.values())
        return len(self.machines.sights) > 1 and size >= SPREAD_BYTES and self._all_see(str(model.directory))

    def _all_see(self, path: str) -> bool:
        return all(path in sight.paths for sight in self.machines.sights)

    def _listen(self) -> None:
        """Give answers to those that wait for them; when there are no more, the cluster is gone."""
        try:
            while True:
                name, outcome, log = self._pipe.recv()
                self._pending.pop(name).set_result((outcome, log))
        except (EOFError, OSError):
            with self._guard:
                self._lost = True
                for name in list(self._pending):
                    self._pending.pop(name).set_result((self._gone(name), None))

    def _gone(self, name: str) -> Outcome:
        return Outcome(
            name,
            "not run",
            f"the Ray cluster at {self._address} is gone: what was finished stands, and the same command goes on from there.",
        )


def _machines(paths: list[str]) -> Machines:
    """Ask every machine of the cluster; one that dies meanwhile is left out."""
    import ray
    from ray.exceptions import RayError
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    found: list[tuple[dict[str, float], node.Sight]] = []
    asked = []
    for each in [each for each in ray.nodes() if each["Alive"]]:
        there = NodeAffinitySchedulingStrategy(each["NodeID"], soft=False)
        call = ray.remote(num_cpus=0, scheduling_strategy=there)(node.look)
        asked.append((each["Resources"], call.remote(paths)))
    for resources, reference in asked:
        with contextlib.suppress(RayError):
            found.append((resources, ray.get(reference, timeout=_UP_S)))
    if not found:
        raise ValueError("none of its machines answers")
    memory = max(int(resources.get("memory", 0)) for resources, _ in found)
    cores = min(int(resources.get("CPU", 0)) for resources, _ in found) or 1
    return Machines(ray.cluster_resources(), memory, cores, [sight for _, sight in found])


def _drive(pipe: Connection, address: str, paths: list[str], log: str) -> None:
    """Talk to Ray for the process at the other end of ``pipe``: requests in, (name, outcome, log) out; None ends it."""
    Path(log).parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):  # what Ray has to tell of its machines
        os.dup2(handle, stream)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which says what is to happen
    import ray
    from ray.exceptions import RayError

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        node.connect(address)
        pipe.send(_machines(paths))
    except Exception as error:  # whatever Ray has: told, and nothing else can be done
        pipe.send(" ".join(str(error).split())[:400].rstrip("."))
        return
    work, waiting = ray.remote(node.do), dict[Any, Task]()
    while True:
        ready, _ = ray.wait(list(waiting), timeout=0.1) if waiting else ([], [])
        for reference in ready:
            task = waiting.pop(reference)
            try:
                pipe.send((task.name, *ray.get(reference)))
            except RayError as error:
                said = " ".join(str(error).split())[:400]
                pipe.send(
                    (
                        task.name,
                        Outcome(task.name, "error", f"Ray could not do it: {said}", task.inputs),
                        None,
                    )
                )
        while pipe.poll(0 if waiting else 0.5):
            request = pipe.recv()
            if request is None:
                for reference in waiting:
                    ray.cancel(reference, force=True)
                ray.shutdown()
                return
            asked = dict(request.resources)
            options = {
                "num_cpus": asked.pop("CPU"),
                "num_gpus": asked.pop("GPU", 0),
                "resources": asked,
                "memory": request.memory,
                "max_retries": 3,  # a machine that dies takes its task along: it goes to another one
            }
            given = (request.task, request.environment, request.directory, request.cores, request.here)
            waiting[work.options(**options).remote(*given)] = request.task
