"""A matrix on one machine, and on a Ray cluster of one and of two workers of this machine; and what a task costs Ray itself.

    python benchmarks/ray_scale.py [--cells 8]

A worker has one core. Each run begins without a store: codes are made, packages exported and proven. Then GPTQ of a model with experts, each of
them a task, on one core without Ray and on the same clusters. The digests of all runs are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common

from tapeout.generated import write_model

_NODES = Path(__file__).resolve().parents[1] / "tests" / "support" / "ray_nodes.py"
_MATRIX = """
tokens = 512
[matrix]
models = ["arithmetic"]
schemes = [{schemes}]
targets = ["cpu"]
"""
_SCHEMES = ("int8", "int4-g32", "int8-g32", "nf4", "int4-g32-asym", "mxfp4", "w8a8", "none")
_OVERHEAD = """
import contextlib, sys, time, ray
with contextlib.chdir("/"): ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
def empty(): return None
call = ray.remote(num_cpus=1)(empty)
ray.get([call.remote() for _ in range(20)])
begin = time.perf_counter(); ray.get([call.remote() for _ in range(1000)]); print(time.perf_counter() - begin)
"""


_EXPERTS = """
import contextlib, os, sys, time
from pathlib import Path
from tapeout.models import load
from tapeout.matrix.node import RAY, Tensors
from tapeout.quantize import Calibration, quantize
model, out = load(sys.argv[1]), Path(sys.argv[2])
if len(sys.argv) > 3: os.environ[RAY] = sys.argv[3]
else: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
far = Tensors() if len(sys.argv) > 3 else None
if far: [each.result() for each in [far.submit(__import__, "tapeout.quantize.calibrated") for _ in range(4)]]
begin = time.perf_counter()
quant = quantize(model, "int4-g32", rounding="gptq", calibration=Calibration(None, 32, 128), out=out, far=far)
print(time.perf_counter() - begin, quant.digest)
"""
_SHAPE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "num_local_experts": 16}


def experts(model: Path, *address: str) -> tuple[float, str]:
    """Seconds of a calibration once everything is imported, and the codes' digest."""
    with tempfile.TemporaryDirectory() as place:
        done = subprocess.run(
            [sys.executable, "-P", "-c", _EXPERTS, str(model), str(Path(place) / "codes"), *address],
            check=True, capture_output=True, text=True,
            env=os.environ | {"TAPEOUT_CACHE": place, "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        seconds, digest = done.stdout.split()[-2:]
        return float(seconds), digest


def matrix(work: Path, *arguments: str) -> tuple[float, dict[str, str]]:
    """Seconds of a whole run, and the root digests."""
    out = work / "out"
    begin = time.perf_counter()
    subprocess.run(
        [
            str(Path(sys.executable).with_name("tapeout")),
            "matrix",
            str(work / "m.toml"),
            "--out",
            str(out),
            *arguments,
        ],
        check=True,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"TAPEOUT_CACHE": str(work / "cache"), "HF_HUB_OFFLINE": "1"},
    )
    seconds = time.perf_counter() - begin
    return seconds, {
        path.parent.name: json.loads(path.read_text())["root_sha256"]
        for path in sorted(out.glob("*/tapeout.json"))
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=6, help=f"1 … {len(_SCHEMES)}")
    arguments = parser.parse_args()
    text = _MATRIX.format(schemes=", ".join(f'"{each}"' for each in _SCHEMES[: arguments.cells]))
    rows: dict[str, float] = {}
    moe: dict[str, float] = {}
    codes: set[str] = set()
    digests: list[dict[str, str]] = []
    overhead = 0.0

    def run(name: str, *words: str) -> None:
        with tempfile.TemporaryDirectory() as place:
            (Path(place) / "m.toml").write_text(text)
            rows[name], found = matrix(Path(place), *words)
            digests.append(found)

    def calibrate(name: str, *address: str) -> None:
        moe[name], digest = experts(Path(model.name) / "moe", *address)
        codes.add(digest)

    model = tempfile.TemporaryDirectory()
    write_model(Path(model.name) / "moe", "mixtral", _SHAPE)
    calibrate("one core")
    run("one process at a time", "--jobs", "1")
    run("two processes", "--jobs", "2")
    for count in (1, 2):
        nodes = json.dumps([{"num_cpus": 0}, *({} for _ in range(count))])
        with subprocess.Popen(
            [sys.executable, str(_NODES), nodes], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, cwd="/",
        ) as cluster:  # fmt: skip
            assert cluster.stdout
            assert cluster.stdin
            address = cluster.stdout.readline().strip()
            run(f"Ray, {count} worker{'s' * (count > 1)}", "--ray", address, "--jobs", str(count))
            calibrate(f"Ray, {count} worker{'s' * (count > 1)}", address)
            if count == 2:
                done = subprocess.run(
                    [sys.executable, "-c", _OVERHEAD, address], check=True, capture_output=True, text=True
                )
                overhead = float(done.stdout.split()[-1]) / 1000
            cluster.stdin.close()
    model.cleanup()
    if len(codes) > 1 or any(each != digests[0] for each in digests):
        sys.exit("the runs gave different packages")
    for name, seconds in rows.items():
        print(f"{name:24} {seconds:7.1f} s, {rows['Ray, 1 worker'] / seconds:.2f}× of one worker")
    print(
        f"{arguments.cells} cells, the same root digests in all runs; an empty task of Ray: {overhead * 1e3:.2f} ms"
    )
    for name, seconds in moe.items():
        print(
            f"GPTQ, {2 * 16} experts, {name:16} {seconds:7.1f} s, {moe['Ray, 1 worker'] / seconds:.2f}× of one worker"
        )
    facts: dict[str, Any] = {
        "benchmark": "ray_scale",
        "cells": arguments.cells,
        "seconds": rows,
        "task_s": overhead,
        "experts_s": moe,
    }
    common.report(facts)


if __name__ == "__main__":
    main()
