from __future__ import annotations

import gc
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tapeout.files import lock
from tapeout.generated import write_model

MakeModel = Callable[..., Path]
Once = Callable[[str, Callable[[Path], Any]], tuple[Path, Any]]


def pytest_configure() -> None:
    """A core for each worker of xdist: runtimes that wait for one another's threads on shared cores take ten times as long."""
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports it
    os.environ.pop("COLUMNS", None)  # xdist's; rich would keep to it, whatever a test asks for
    os.environ["TAPEOUT_CACHE"] = tempfile.mkdtemp(
        prefix="tapeout-tests-"
    )  # what modules share; each test has its own
    # Most objects of a test are gone by themselves: a look through all of torch's, every few hundred, takes a tenth of the time.
    gc.set_threshold(50_000, 20, 50)
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def pytest_collection_finish() -> None:
    """What is imported by now stays: the collector need not look at it again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["TAPEOUT_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds a store that another one made, nor the user's own; and nothing asks a hub."""
    monkeypatch.setenv("TAPEOUT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """``once("name", make)`` lets the first of xdist's workers ``make(directory)``; gives directory and result to all."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base

    def shared(name: str, make: Callable[[Path], Any]) -> tuple[Path, Any]:
        place, made = root / f"once-{name}" / "work", root / f"once-{name}" / "made.pickle"
        with lock(place.parent, wait=True):
            if not made.exists():
                shutil.rmtree(place, ignore_errors=True)
                place.mkdir(parents=True)
                made.write_bytes(pickle.dumps(make(place)))
        return place, pickle.loads(made.read_bytes())

    return shared


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """``make_model("mistral", sliding_window=24)`` writes a small random model and gives its directory."""

    def make(model_type: str = "llama", *, name: str = "tiny", **fields: Any) -> Path:
        keywords = {key: fields.pop(key) for key in ("dtype", "shard_bytes", "seed") if key in fields}
        return write_model(tmp_path / name, model_type, fields, **keywords)

    return make
