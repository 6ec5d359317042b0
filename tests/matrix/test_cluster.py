"""Matrices on a real Ray cluster of two machines' processes: the digests of one machine, also when a machine or all of them die."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from commands import PROGRAM, tapeout

from tapeout.errors import TapeoutError
from tapeout.generated import write_model
from tapeout.matrix import driver
from tapeout.matrix.cluster import Cluster
from tapeout.matrix.driver import Machines
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
    mac = {
        "resources": {"macos": 1},
        "memory": 1_000_000_000,
        "env_vars": {"TAPEOUT_CACHE": str(tmp_path / "of the mac")},
    }
    with machines({"memory": 2_000_000_000}, mac) as (address, _):
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
        # Where caches are not shared, a cell goes to its codes, here past the machine that Ray would take first.
        cluster._one_cache, cluster._environment = False, {}
        made = replace(codes, name="codes of the mac", recipe={"scheme": "int8"}, codes="m", target="apple")
        cell = replace(made, name="c", kind="cell", target="null", log=str(out / "c.log"), out=str(out / "c"))
        for task in (made, cell):
            outcome = cluster(task, lambda *_: None)
            assert outcome.status == "passed", outcome.reason
        assert len(list((tmp_path / "of the mac" / "store").glob("count-int8-*"))) == 1
        assert not list((tmp_path / "cache" / "store").glob("count-int8-*"))
        cluster.stop()
        with pytest.raises(TapeoutError, match=r"not every machine .* sees"):
            monkeypatch.setattr(Machines, "all_see", lambda self, path: False)
            Cluster(address, out)


APART = """
tokens = 64
[matrix]
models = ["tiny"]
schemes = ["int8"]
targets = ["null"]
[[include]]
scheme = "int2-g64"
rounding = "gptq"
[calibration]
text = "text.txt"
sequences = 48
length = 128
[limits]
kl = 1e-3
top1 = 0.0
perplexity = 100.0
"""


def kill_machine(cluster: subprocess.Popen[str], cache: Path) -> None:
    """End every process of a machine that has this cache, at once."""
    import psutil

    own = [each for each in map(psutil.Process, _descendants(cluster.pid)) if of(each, cache)]
    assert len(own) > 2
    for each in own:
        each.kill()


def of(process: Any, cache: Path) -> bool:
    import psutil

    try:
        return bool(process.environ().get("TAPEOUT_CACHE") == str(cache))
    except psutil.Error:
        return False


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="directories that machines do not share are mounted as root")
def test_of_machines_that_share_nothing_one_dies_between_two_layers(tmp_path: Path) -> None:
    """Another goes on at the layer that the first had reached, and the package that failed is brought back."""
    from tapeout.models import load
    from tapeout.quantize import Calibration, quantize

    work, shared, caches = tmp_path / "work", tmp_path / "shared", [tmp_path / "one", tmp_path / "two"]
    text = "".join(chr(32 + (i * 37 + i * i // 7) % 95) for i in range(8000))
    for place in (work, *caches):
        place.mkdir()
    model = write_model(tmp_path / "tiny", "llama", {"num_hidden_layers": 12}, dtype="F32")
    (tmp_path / "text.txt").write_text(text)
    file = APART.replace('"tiny"', f'"{model}"').replace("text.txt", str(tmp_path / "text.txt"))
    (work / "small.toml").write_text(file)
    mounts = {str(work): None}
    nodes = [{"env_vars": {"TAPEOUT_CACHE": str(cache)}, "mounts": mounts} for cache in caches]
    with machines({"num_cpus": 0}, *nodes) as (address, cluster):
        command = [PROGRAM, "matrix", "small.toml", "--out", "out", "--ray", address, "--cache", shared]
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=work,
            env=environment(work),
            stderr=subprocess.PIPE,
            text=True,
        )
        while not list((shared / "layers").glob("*int2*.json")):
            assert process.poll() is None
            time.sleep(0.02)
        (dies,) = [cache for cache in caches if list(cache.glob("store/*int2*/.calibration"))]
        kill_machine(cluster, dies)
        _, said = process.communicate(timeout=300)
    assert process.returncode == 1, said
    outcomes = {path.stem: json.loads(path.read_text()) for path in (work / "out" / "cells").glob("*.json")}
    passed, failed = outcomes["tiny.int8.rtn.null"], outcomes["tiny.int2-g64.gptq.null"]
    assert passed["status"] == "passed"
    assert failed["status"] == "failed"
    assert "its package was brought here to be looked at." in failed["notes"]
    package = Package.open(work / "out" / failed["name"])
    assert package.damage() == []
    assert package.manifest["root_sha256"] == failed["root_sha256"]
    assert not json.loads((package.directory / "report.json").read_text())["passed"]
    assert [path.stem for path in (shared / "packages").glob("*.json")] == [passed["inputs"]]
    assert not list((shared / "layers").glob("*.json"))
    (log,) = [
        path.read_text()
        for path in (work / "out" / "logs").glob("codes-*.log")
        if "went on after layer" in path.read_text()
    ]
    assert f"which {shared} had." in log
    here = quantize(
        load(str(model)),
        "int2-g64",
        rounding="gptq",
        calibration=Calibration(tmp_path / "text.txt", 48, 128),
        out=tmp_path / "here",
    )
    assert failed["codes_sha256"] == here.digest


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="what machines see otherwise is mounted as root")
def test_machines_with_other_versions_are_named(tmp_path: Path) -> None:
    import tapeout as package

    installed = Path(package.__file__)
    (tmp_path / "other.py").write_text(installed.read_text().replace(package.__version__, "0.0.7"))
    older = {"mounts": {str(installed): str(tmp_path / "other.py")}}
    without = {"mounts": {str(installed.parent): None}}
    with machines({}, older, without) as (address, cluster):
        assert cluster.stdin
        assert cluster.stdout
        said = []
        for order in ("kill 2", "ray 2.0.1"):
            with pytest.raises(TapeoutError) as told:
                Cluster(address, tmp_path / "out")
            said.append(str(told.value))
            cluster.stdin.write(f"{order}\n")
            cluster.stdin.flush()
            cluster.stdout.readline()
        with pytest.raises(TapeoutError) as told:
            Cluster(address, tmp_path / "out")
    said.append(str(told.value))
    python, own, host = platform.python_version(), importlib.metadata.version("ray"), platform.node()
    assert said == [
        f"the Ray cluster at {address} cannot be used: {why}."
        for why in (
            f"its machine {host} has no module tapeout.matrix: pip install tapeout=={package.__version__} there",
            f"{host} has tapeout 0.0.7, and this machine {package.__version__}: install one version on all",
            f"it runs Ray 2.0.1 on Python {python}, and this machine Ray {own} on Python {python}: one version of each on all machines (pip "
            "install ray==2.0.1)",
        )
    ]


def test_a_cluster_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(TapeoutError) as told:
        Cluster("127.0.0.1:9", tmp_path)
    assert str(told.value) == (
        "the Ray cluster at 127.0.0.1:9 cannot be used: nobody listens there (Connection refused)."
    )
    with pytest.raises(OSError, match=r"nobody listens there \(Name or service not known\)"):
        driver._knock("ray://no.such.host.invalid:10001")
