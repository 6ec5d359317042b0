"""The executor of a Ray cluster: each task on a machine that has its device, and tensors of the codes on all of them.

Ray ends a process whose cluster is gone. So a process of its own talks to Ray, and its end is something that can be told.

What all machines see is used as it is: the output's directory, the cache, the models. Machines that do not see the output put packages into the
shared storage (``--cache``), from which they are fetched.
"""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import secrets
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tapeout import __version__
from tapeout.errors import MissingToolchain, TapeoutError
from tapeout.files import cache_directory
from tapeout.matrix import node
from tapeout.matrix.driver import UP_S, Machines, Request, drive
from tapeout.matrix.forecast import calibrates
from tapeout.matrix.machines import LABELS
from tapeout.matrix.shared import Storage
from tapeout.matrix.tasks import Outcome, Task, Told
from tapeout.models import Model
from tapeout.recipe import Recipe

SPREAD_BYTES = 1 << 30
"""Of a checkpoint: the tensors of a smaller one are rounded sooner than other machines' processes have begun."""


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
            self._driver = context.Process(target=drive, args=(theirs, address, paths, log), daemon=True)
            self._driver.start()
            theirs.close()
            self.machines = self._connected()
        finally:
            token.unlink()
            seen.unlink()
        self._here = self.machines.all_see(str(token))
        self._one_cache = self.machines.all_see(str(seen))
        self._environment = {"TAPEOUT_CACHE": str(stores)} if self._one_cache else {}
        self._spread = {name for name, model in models.items() if self._is_worth_spreading(model)}
        if not self._here and cache is None:
            self.stop()
            raise TapeoutError(
                f"not every machine of the Ray cluster at {address} sees {out}: give --cache with a storage that all of them reach, or "
                "--out on a disk that they share."
            )
        self.jobs = jobs or len(self.machines.every)
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
        if spreads and calibrates(Recipe.of(dict(task.recipe))):
            # Sums of floats decide those codes, and their last bits depend on the kind of processor.
            spreads = len({each.sight.processor for each in self.machines.every}) == 1
        wanted = next(
            (label for label in LABELS.get(task.target, ()) if label in self.machines.resources), None
        )
        environment = {**self._environment, **({node.RAY: self._address} if spreads else {})}
        cores = max(1, min(self.machines.cores, int(self.machines.resources.get("CPU", 1)) // self.jobs))
        resources = {"CPU": 0.0 if spreads else float(cores), **({wanted: 1.0} if wanted else {})}
        near = task.kind == "cell" and not self._one_cache
        return Request(
            task, environment, str(Path.cwd()), cores, self._here, resources, task.memory_bytes, near
        )

    def _connected(self) -> Machines:
        """Wait for the process that talks to Ray."""
        said: Any = None
        try:
            said = (
                self._pipe.recv() if self._pipe.poll(UP_S) else f"it did not answer within {UP_S:.0f} seconds"
            )
        except EOFError:
            said = "what talks to it ended"
        if isinstance(said, Machines):
            others = {
                f"{each.name} has tapeout {each.sight.version}"
                for each in said.every
                if each.sight.version != __version__
            }
            if not others:
                return said
            said = f"{', '.join(sorted(others))}, and this machine {__version__}: install one version on all"
        self._driver.kill()
        raise TapeoutError(f"the Ray cluster at {self._address} cannot be used: {said}.")

    def _is_worth_spreading(self, model: Model) -> bool:
        """Whether its tensors are rounded by all machines: there are several, they see it, and it is large."""
        size = sum(tensor.nbytes for tensor in model.checkpoint.values())
        return (
            len(self.machines.every) > 1
            and size >= SPREAD_BYTES
            and self.machines.all_see(str(model.directory))
        )

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
