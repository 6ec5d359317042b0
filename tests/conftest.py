from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tapeout.generated import write_model

MakeModel = Callable[..., Path]


def pytest_configure() -> None:
    """A core for each worker of xdist: runtimes that wait for one another's threads on shared cores take ten times as long."""
    os.environ["TAPEOUT_CACHE"] = tempfile.mkdtemp(
        prefix="tapeout-tests-"
    )  # what modules share; each test has its own
    worker = os.environ.get("PYTEST_XDIST_WORKER", "")
    if worker:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["TAPEOUT_CACHE"], ignore_errors=True)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds a store that another one made, nor the user's own; and nothing asks a hub."""
    monkeypatch.setenv("TAPEOUT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """``make_model("mistral", sliding_window=24)`` writes a small random model and gives its directory."""

    def make(model_type: str = "llama", *, name: str = "tiny", **fields: Any) -> Path:
        keywords = {key: fields.pop(key) for key in ("dtype", "shard_bytes", "seed") if key in fields}
        return write_model(tmp_path / name, model_type, fields, **keywords)

    return make
