"""What runs on a machine of a Ray cluster: a task in a process of its own, or one tensor's rounding. Imported there by its name."""

from __future__ import annotations

import contextlib
import fcntl
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from tapeout import __version__
from tapeout.files import cache_directory
from tapeout.matrix.local import Processes
from tapeout.matrix.tasks import Outcome, Task

RAY = "TAPEOUT_RAY"
"""The cluster's address, in the environment of a task that spreads its tensors over it."""


_PIECE = 16 << 20  # bytes of a file that travel together


@dataclass(frozen=True)
class Sight:
    """What a machine sees of the one that asks.

    Attributes:
        version: of the tapeout that is installed there. paths: those that it has.
        processor: its kind, which decides the last bit of a sum of floats: libraries choose instructions by it.
    """

    version: str
    paths: frozenset[str]
    processor: str


def connect(address: str) -> None:
    """Join a cluster. Its machines would look for modules in this directory first, where a folder of any name may stand."""
    import ray

    if not ray.is_initialized():
        with contextlib.chdir("/"):
            ray.init(address, logging_level="ERROR", log_to_driver=False)


def look(paths: list[str]) -> Sight:
    """Say which of these paths this machine has."""
    return Sight(__version__, frozenset(path for path in paths if Path(path).exists()), _processor())


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}))


@dataclass(frozen=True)
class Done:
    """A task that was done.

    Attributes:
        log: what the task said, where the one that asks does not see this machine's files.
        machine: Ray's id of this one. left: the directory of a package that failed and stays here; it is what one debugs with.
    """

    outcome: Outcome
    log: bytes | None
    machine: str
    left: str = ""


def do(task: Task, environment: Mapping[str, str], directory: str, cores: int, here: bool) -> Done:
    """Do a task on this machine.

    Args:
        environment, directory: of the task's processes; the latter, if there is one like it. cores: how many they may take.
        here: whether ``task.out`` and ``task.log`` mean the same here.
    """
    import ray

    given = task
    if not here:
        place = cache_directory() / "matrix"
        task = replace(task, out=str(place / Path(task.out).name), log=str(place / Path(task.log).name))
    where = contextlib.chdir(directory if Path(directory).is_dir() else ".")
    with where, _cores(cores), _environment(environment):
        outcome = _kept_processes(environment)(task, _unheard)
    context = ray.get_runtime_context()
    if context.get_accelerator_ids().get("GPU"):
        _end_kept()  # the GPU is lent to another task now, and its memory too
    failed = not here and task.kind == "cell" and outcome.status == "failed"
    return Done(
        replace(outcome, notes=(*outcome.notes, f"done on {platform.node()}.")),
        None if given.log == task.log else Path(task.log).read_bytes(),
        context.get_node_id(),
        task.out if failed else "",
    )


def pieces(directory: str) -> Iterator[tuple[str, bytes]]:
    """A directory's files piece by piece: a path below it, and bytes that follow those given before."""
    root = Path(directory)
    for path in sorted(each for each in root.rglob("*") if each.is_file()):
        with path.open("rb") as file:
            piece = file.read(_PIECE)
            yield path.relative_to(root).as_posix(), piece
            while piece := file.read(_PIECE):
                yield path.relative_to(root).as_posix(), piece


@dataclass(frozen=True)
class _About:
    """What processes were begun with, and others could not go on with."""

    environment: Mapping[str, str]
    directory: Path
    cores: set[int] | None
    gpus: str | None


@dataclass
class _Kept:
    """Processes that have paid for their imports."""

    about: _About
    processes: Processes
    lease: IO[bytes]


_kept: list[_Kept] = []


def _kept_processes(environment: Mapping[str, str]) -> Processes:
    """Those of the task before, if this one's would be begun alike. They end when this process of Ray does: nobody reads their replies."""
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    about = _About(dict(environment), Path.cwd(), _every_core(), gpus)
    if not _kept or _kept[0].about != about:
        _end_kept()
        lease = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as they are
        _kept.append(_Kept(about, Processes(1, lease.fileno()), lease))
    return _kept[0].processes


def _end_kept() -> None:
    while _kept:
        last = _kept.pop()
        last.processes.stop()
        last.lease.close()


def _unheard(stage: str, done: int, total: int) -> None:
    """Progress that nobody follows."""


@contextlib.contextmanager
def _environment(given: Mapping[str, str]) -> Iterator[None]:
    """Ray's own variables, which mean this process, are not for those that it starts."""
    kept = dict(os.environ)
    os.environ.update(given)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(kept)


@contextlib.contextmanager
def _cores(count: int) -> Iterator[None]:
    """Keep to cores that no other task on this machine has, as far as there are enough; a process of Ray serves one task at a time."""
    if (every := _every_core()) is None:
        yield
        return
    place = Path(tempfile.gettempdir()) / f"tapeout-cores-{os.getuid()}"
    place.mkdir(mode=0o700, exist_ok=True)
    taken = set[int]()
    before = (_kept[0].about.cores if _kept else None) or set[int]()  # processes that stayed have these
    with contextlib.ExitStack() as stack:
        for core in sorted(every, key=lambda core: (core not in before, core)):
            file = stack.enter_context((place / str(core)).open("w"))
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                taken.add(core)
            if len(taken) == count:
                break
        os.sched_setaffinity(0, taken or every)
        try:
            yield
        finally:
            os.sched_setaffinity(0, every)


def _every_core() -> set[int] | None:
    """The cores that this process may run on; None: the system does not say."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None


class Tensors(Executor):
    """Rounds tensors on the machines of the cluster that ``RAY`` names; see ``quantize``'s ``far``."""

    def __init__(self) -> None:
        import ray

        connect(os.environ[RAY])
        self._call = ray.remote(num_cpus=1, max_retries=3)(_call)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Call a function on some machine; its errors are those of the call itself."""
        from ray.exceptions import RayTaskError

        told: Future[Any] = Future()

        def done(found: Future[Any]) -> None:
            error = found.exception()
            if error is None:
                told.set_result(found.result())
            else:
                told.set_exception(error.cause if isinstance(error, RayTaskError) else error)

        self._call.remote(fn, args, kwargs).future().add_done_callback(done)
        return told


def _call(fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with _cores(1):
        return fn(*args, **kwargs)
