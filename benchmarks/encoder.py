"""A BERT-base-shaped encoder at sequence 128: latency of each scheme on ONNX Runtime against its peers, in turns.

    python benchmarks/encoder.py [--rounds 8] [--quick]

Peers: optimum-onnx (float and its INT8 dynamic quantizer, on ONNX Runtime too), torch (float and dynamic INT8), and OpenVINO
(float32, its own choice of precision, NNCF's INT8), each in an environment of its own. Every side's process stays open and
none runs while another does; a round asks each of them for a few runs after one that is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import common
import numpy as np

BASE = {
    "vocab_size": 30522,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 512,
    "layer_norm_eps": 1e-12,
}
OPTIMUM = ("torch==2.13.0", "optimum-onnx[onnxruntime]==0.1.0", "onnxruntime==1.32.0")
OPENVINO = ("openvino==2026.4.1", "nncf==3.4.0", "onnx==1.23.2")
SIDES: dict[str, tuple[str, ...]] = {
    **{f"tapeout {scheme}": () for scheme in ("none", "int8", "int4-g128", "w8a8", "w8a8-static")},
    "optimum float32": OPTIMUM,
    "optimum int8": OPTIMUM,
    "torch float32": (),
    "torch int8": (),
    "openvino float32": OPENVINO,
    "openvino default": OPENVINO,
    "openvino int8": OPENVINO,
}
RUNS = {1: 12, 8: 4}  # of a round, by batch


class Side:
    """A process that is asked for times."""

    def __init__(self, name: str, model: Path, work: Path) -> None:
        library = name.split()[0]
        folder = work / "encoder" / library
        folder.mkdir(parents=True, exist_ok=True)
        script = Path(__file__).parent / "peers" / "encoder_side.py"
        python = common.environment(library, SIDES[name])
        self._process = subprocess.Popen(
            [python, script, name, model, folder, str(common.cores())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"},
        )
        self.failed = self._answer().get("failed", "")

    def _answer(self) -> Any:
        assert self._process.stdout
        return json.loads(self._process.stdout.readline() or '{"failed": "it died"}')

    def seconds(self, batch: int, runs: int) -> list[float]:
        """Of runs after one that warms up."""
        assert self._process.stdin
        self._process.stdin.write(f"{batch} {runs + 1}\n")
        self._process.stdin.flush()
        found: list[float] = self._answer()[1:]
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--quick", action="store_true", help="make what is timed, and time it once")
    parser.add_argument("--work", type=Path, default=common.cache_directory() / "benchmarks")
    arguments = parser.parse_args()
    model = common.generated(arguments.work / "bert-base", BASE, "bert")
    results: dict[str, dict[str, Any]] = {}
    open_sides: dict[str, Side] = {}
    try:
        for name in SIDES:
            print(f"opening {name}", file=sys.stderr)
            side = Side(name, model, arguments.work)
            if side.failed:
                results[name] = {"failed": side.failed}
                side.close()
            else:
                open_sides[name] = side
        times: dict[str, dict[int, list[float]]] = {name: {size: [] for size in RUNS} for name in open_sides}
        for _ in range(1 if arguments.quick else arguments.rounds):
            for size, runs in RUNS.items():
                for name, side in open_sides.items():
                    times[name][size] += side.seconds(size, runs)
    finally:
        for side in open_sides.values():
            side.close()
    for name, by_batch in times.items():
        results[name] = {
            f"batch_{size}": {
                f"p{percent}_ms": round(1e3 * float(np.percentile(found, percent)), 2) for percent in (50, 99)
            }
            for size, found in by_batch.items()
        }
    for name in SIDES:
        found = results[name]
        said = "   ".join(
            f"batch {size}: {found[f'batch_{size}']['p50_ms']:7.1f} ms, p99 {found[f'batch_{size}']['p99_ms']:7.1f}"
            for size in RUNS
            if not found.get("failed")
        )
        print(f"{name:20} {found.get('failed') or said}")
    common.report({"benchmark": "encoder", "tokens": 128, "rounds": arguments.rounds, "sides": results})


if __name__ == "__main__":
    main()
