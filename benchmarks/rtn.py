"""Rounding to nearest: GB/s of source weights (bf16, 1.1B Llama), tapeout against llama-quantize, torchao and the memory itself.

    python benchmarks/rtn.py [--repeats 3] [--schemes int8,int4-g32,q4_k] [--no-peer]

Each side begins with its source in the page cache and runs in a process of its own; the best of the repeats counts, since the machine's
bandwidth is a best one too. ``store``: all that ``quantize`` does, digests of source and codes too, into memory-backed files.
``memory``: rounding and packing alone, the codes kept nowhere. llama-quantize reads F16, as many bytes, and writes a file there too,
embeddings and head as Q8_0 like ours. torchao quantizes modules that hold the same matrices, in memory; embeddings are no such module. What its
Int4WeightOnlyConfig needs, it may not find on a CPU: the reason is kept, and IntxWeightOnlyConfig leaves a byte for each code.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

from tapeout.files import cache_directory
from tapeout.validate.throughput import bandwidth

# llama-quantize's names for what a scheme becomes; Q4_K_S is Q4_K in all but a few tensors.
KINDS = {"int8": "Q8_0", "int4-g32": "Q4_0", "q4_k": "Q4_K_S"}
TORCHAO = ("torch==2.13.0", "torchao==0.18.0", "safetensors", "numpy")
SEEN = re.compile(r"^seconds (\S+) bytes (\d+)$", re.MULTILINE)

OURS = """
import sys, time
from pathlib import Path
from tapeout import load, quantize
from tapeout.quantize import SCHEMES
model, scheme, out = load(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
size = sum(t.nbytes for t in model.checkpoint.values())
begin = time.perf_counter()
quantize(model, scheme, out=out)
print("seconds", time.perf_counter() - begin, "bytes", size)
"""

MEMORY = """
import os, sys, time
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from tapeout import load
from tapeout.memory import keep_freed_memory
from tapeout.quantize import SCHEMES, lattice, assign
from tapeout.quantize.rtn import round_to_nearest
model, scheme = load(sys.argv[1]), SCHEMES[sys.argv[2]]
keep_freed_memory()
def task(job):
    source, scheme, rows = job
    rounded = round_to_nearest(source.float32(rows), scheme)
    lattice.packed_parts(rounded.codes, scheme, rounded.grid)
jobs, size = [], 0
for name, each in assign(model, scheme, {}).items():
    source = model.checkpoint[name]
    if each.kind != "none":
        step = max(1, (1 << 20) // source.shape[1])
        jobs += [(source, each, slice(row, row + step)) for row in range(0, source.shape[0], step)]
        size += source.nbytes
with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
    list(pool.map(task, jobs[::97]))  # the kernels are compiled
    begin = time.perf_counter()
    list(pool.map(task, jobs))
print("seconds", time.perf_counter() - begin, "bytes", size)
"""

THEIRS = """
import sys, time
from pathlib import Path
import torch
from safetensors import safe_open
from torchao import quantization as ao
torch.set_num_threads(int(sys.argv[3]))
model = torch.nn.Module()
size = 0
for path in sorted(Path(sys.argv[1]).glob("*.safetensors")):
    with safe_open(path, "pt") as file:
        for name in file.keys():
            if name.endswith("_proj.weight") or name == "lm_head.weight":
                weight = file.get_tensor(name)
                linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype, device="meta")
                linear.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
                model.add_module(name.replace(".", "_"), linear)
                size += weight.nbytes
config = {
    "int8": lambda: ao.Int8WeightOnlyConfig(),
    "int4-g32": lambda: ao.Int4WeightOnlyConfig(group_size=32),
    "int4-g32 unpacked": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(32)),
}[sys.argv[2]]()
begin = time.perf_counter()
ao.quantize_(model, config)
print("seconds", time.perf_counter() - begin, "bytes", size)
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=common.SHAPES, default="1b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--schemes", default="int8,int4-g32,q4_k")
    parser.add_argument("--no-peer", action="store_true", help="only ours")
    parser.add_argument("--work", type=Path, default=cache_directory() / "benchmarks")
    arguments = parser.parse_args()
    schemes = arguments.schemes.split(",")
    model = common.checkpoint(arguments.shape, arguments.work)
    reading = bandwidth()
    result: dict[str, Any] = {
        "benchmark": "rtn",
        "shape": arguments.shape,
        "repeats": arguments.repeats,
        "bandwidth_gb_per_s": round(reading / 1e9, 2),
    }
    print(f"memory: {reading / 1e9:.1f} GB/s")

    def measure(who: str, one: Callable[[Path], tuple[float, int]]) -> dict[str, Any]:
        seconds, size = [], 0
        for _ in range(arguments.repeats):
            common.read_into_page_cache(model)
            with tempfile.TemporaryDirectory(dir=memory_backed(arguments.work)) as name:
                took, size = one(Path(name))
            seconds.append(took)
        rate = size / min(seconds)
        print(f"{who}: {rate / 1e9:.2f} GB/s, {rate / reading:.1%} of the memory's")
        return {
            "seconds": round(min(seconds), 3),
            "source_bytes": size,
            "gb_per_s": round(rate / 1e9, 3),
            "of_bandwidth": round(rate / reading, 4),
        }

    for scheme in schemes:
        entry: dict[str, Any] = {}
        for way, code in (("store", OURS), ("memory", MEMORY)):
            entry[way] = measure(
                f"tapeout {scheme} {way}",
                lambda scratch, code=code, scheme=scheme: child(  # type: ignore[misc]
                    [sys.executable, "-c", code, str(model), scheme, str(scratch / "store")]
                ),
            )
        result[scheme] = entry
    if not arguments.no_peer:
        result["llama.cpp"] = llama_cpp(model, arguments.work, [s for s in schemes if s in KINDS], measure)
        result["torchao"] = torchao(model, measure)
    common.report(result)


def llama_cpp(
    model: Path, work: Path, schemes: list[str], measure: Callable[..., dict[str, Any]]
) -> dict[str, Any]:
    """llama-quantize from an F16 file of the same model; its time is that of its whole process."""
    common.peer()
    with tempfile.TemporaryDirectory(dir=work) as name:
        source = Path(name) / "f16.gguf"
        common.convert_by_peer(model, source)
        size = source.stat().st_size
        return {
            KINDS[scheme]: measure(
                f"llama-quantize {KINDS[scheme]}",
                lambda scratch, kind=KINDS[scheme]: (
                    common.quantize_by_peer(source, scratch / "out.gguf", kind).wall_s,
                    size,
                ),
            )
            for scheme in schemes
        }


def torchao(model: Path, measure: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Weight-only configurations of torchao, or why there is none on this processor."""
    python = common.environment("torchao", TORCHAO)
    found: dict[str, Any] = {}
    for kind in ("int8", "int4-g32", "int4-g32 unpacked"):
        command = [str(python), "-W", "ignore", "-c", THEIRS, str(model), kind, str(common.cores())]
        try:
            found[kind] = measure(f"torchao {kind}", lambda _, command=command: child(command))
        except RuntimeError as error:
            found[kind] = {"failed": str(error)}
            print(f"torchao {kind}: {error}")
    return found


def child(command: list[str]) -> tuple[float, int]:
    """Seconds and source bytes as a process says them; RuntimeError with its last line when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONSAFEPATH": "1"})
    said = SEEN.search(done.stdout)
    if done.returncode or not said:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return float(said[1]), int(said[2])


def memory_backed(otherwise: Path) -> Path:
    """Where files are memory, if there is such a place."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() else otherwise


if __name__ == "__main__":
    main()
