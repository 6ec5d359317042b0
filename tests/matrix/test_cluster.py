"""Matrices on a real Ray cluster of two machines' processes: the digests of one machine, also when a machine or all of them die."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import PROGRAM, tapeout

from tapeout.errors import TapeoutError
from tapeout.matrix.cluster import Cluster
from tapeout.matrix.tasks import Outcome, Task
from tapeout.pack import Package

if importlib.util.find_spec("ray") is None:  # importing it would put its own packages on this process's path
    pytest.skip("Ray is not installed: pip install 'tapeout[ray]'", allow_module_level=True)

NODES = Path(__file__).parents[1] / "support" / "ray_nodes.py"
FILE = """
tokens = 64
[matrix]
models = ["count"]
schemes = ["int8", "int4-g32"]
targets = ["null"]
[[include]]
scheme = "int4-g32"
rounding = "hqq"
"""


@contextmanager
def machines(*nodes: dict[str, Any]) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A cluster's address, and the process that obeys ``kill N``; the whole group of processes is ended."""
    with subprocess.Popen(
        [sys.executable, str(NODES), json.dumps(nodes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        process_group=0,
        cwd="/",
    ) as cluster:
        assert cluster.stdout
        try:
            yield cluster.stdout.readline().strip(), cluster
        finally:
            end(cluster)


def end(cluster: subprocess.Popen[str]) -> None:
    """Kill the head, the other machine and what started them, as a data centre without power does."""
    for each in _descendants(cluster.pid):
        try:
            os.kill(each, signal.SIGKILL)
        except ProcessLookupError:
            continue
    cluster.wait()


def _descendants(pid: int) -> list[int]:
    import psutil

    if not psutil.pid_exists(pid):
        return []
    return [child.pid for child in psutil.Process(pid).children(recursive=True)] + [pid]


def environment(work: Path) -> dict[str, str]:
    return os.environ | {"TAPEOUT_CACHE": str(work / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def started(work: Path, address: str, *arguments: str) -> subprocess.Popen[str]:
    (work / "small.toml").write_text(FILE)
    command = [PROGRAM, "matrix", "small.toml", "--out", "out", "--ray", address, *arguments]
    return subprocess.Popen(
        [str(word) for word in command], cwd=work, env=environment(work), stderr=subprocess.PIPE, text=True
    )


def one_passed(work: Path, process: subprocess.Popen[str]) -> None:
    while not any('"passed"' in path.read_text() for path in (work / "out" / "cells").glob("*.json")):
        assert process.poll() is None
        time.sleep(0.1)


def digests(out: Path) -> dict[str, str]:
    return {
        path.parent.name: Package.open(path.parent).manifest["root_sha256"]
        for path in sorted(out.glob("*/tapeout.json"))
    }


def notes(out: Path) -> list[str]:
    return [note for path in (out / "cells").glob("*.json") for note in json.loads(path.read_text())["notes"]]


@pytest.mark.slow
def test_a_machine_dies_then_all_do_and_nothing_is_lost(tmp_path: Path) -> None:
    with machines({}, {"resources": {"macos": 1}}) as (address, cluster):
        process = started(tmp_path, address)
        one_passed(tmp_path, process)
        assert cluster.stdin
        cluster.stdin.write("kill 1\n")
        cluster.stdin.flush()
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
        assert "3 passed" in said
        assert len([note for note in notes(tmp_path / "out") if note.startswith("done on ")]) == 3
        far = digests(tmp_path / "out")

        again = started(tmp_path, address, "--force", "--jobs", "1")
        while not (tmp_path / "out" / "logs" / "ray.log").exists():
            time.sleep(0.1)
        time.sleep(1)
        end(cluster)
        _, said = again.communicate(timeout=300)
        assert again.returncode in (1, 2), said
        assert "Traceback" not in said
        assert f"Ray cluster at {address} " in said.replace("\n", " ")
    here = tapeout(
        "matrix", "small.toml", "--out", "out", cwd=tmp_path, status=0, TAPEOUT_CACHE=str(tmp_path / "cache")
    )
    assert "3 passed" in here.stderr
    assert digests(tmp_path / "out") == far
    fresh = tapeout(
        "matrix", "small.toml", "--out", "one", cwd=tmp_path, status=0, TAPEOUT_CACHE=str(tmp_path / "other")
    )
    assert "3 passed" in fresh.stderr
    assert digests(tmp_path / "one") == far


@pytest.mark.slow
def test_tasks_go_where_their_device_is_and_tensors_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tapeout.models import load
    from tapeout.quantize import quantize

    monkeypatch.setenv("TAPEOUT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("tapeout.matrix.cluster.SPREAD_BYTES", 0)
    model = load("count")
    recipe = {"scheme": "int4-g32"}
    with machines({"memory": 2_000_000_000}, {"resources": {"macos": 1}, "memory": 1_000_000_000}) as (
        address,
        _,
    ):
        out = tmp_path / "out"
        cluster = Cluster(address, out, models={"count": model})
        assert cluster.jobs == 2
        assert cluster.machines.memory == 2_000_000_000
        device = Task("a", "cell", "count", recipe, "i", "c", str(out / "a.log"), "apple", {}, str(out / "a"))
        assert cluster._request(device).resources == {"CPU": 1.0, "macos": 1.0}
        huge = Task("h", "cell", "count", recipe, "i", "c", str(out / "h.log"), "cpu", memory_bytes=3 * 10**9)
        assert cluster(huge, lambda *_: None) == Outcome(
            "h",
            "refused",
            "it is predicted to take 3.0 GB of memory, and no machine of the cluster lends more than 2.0 GB to tasks.",
            "i",
        )
        codes = Task("codes", "codes", "count", recipe, "i", "c", str(out / "codes.log"))
        assert cluster._request(codes).resources == {
            "CPU": 0.0
        }  # or tensors would wait for its core, and it for them
        with ThreadPoolExecutor(1) as pool:
            outcome = pool.submit(cluster, codes, lambda *_: None).result(timeout=200)
        assert outcome.status == "passed", (out / "codes.log").read_text()
        assert outcome.codes_sha256 == quantize(model, "int4-g32", out=tmp_path / "here").digest
        cluster.stop()
        with pytest.raises(TapeoutError, match=r"not every machine .* sees"):
            monkeypatch.setattr(Cluster, "_all_see", lambda self, path: False)
            Cluster(address, out)


def test_a_cluster_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(TapeoutError, match=r"the Ray cluster at 127\.0\.0\.1:9 cannot be used: "):
        Cluster("127.0.0.1:9", tmp_path)
