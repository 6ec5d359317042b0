"""What `tapeout plan` says of generated Llama shapes, against files, memory and speed of every target that runs here.

    python benchmarks/plan.py [--shape 1b] [--context 512] [--targets cpu,apple,rocm]

Size is that of the artifact's files; memory that which the runtime's process has grown by once a prompt has filled the context; speed that
of decoding there. Apple's and AMD's runtimes do not run here: their files alone are compared. The bandwidth is measured just before, as
plan measures it.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import psutil

from tapeout import load, quantize, targets
from tapeout.devices import table
from tapeout.exporters import Refused
from tapeout.plan import plan
from tapeout.targets import Target
from tapeout.validate.throughput import bandwidth
from tapeout.validate.worker import open_session

SCHEMES = {"cpu": ("int4-g32", "int8"), "apple": ("int4-g32",), "rocm": ("int4-g32",)}
NEW = 16
LIMITS = {"size": 0.01, "memory": 0.10, "speed": 0.25}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="1b", choices=common.SHAPES)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--targets", default=",".join(SCHEMES))
    parser.add_argument("--schemes", default="")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=common.cache_directory() / "benchmarks")
    arguments = parser.parse_args()
    model = load(common.checkpoint(arguments.shape, arguments.work))
    rows = []
    for name in arguments.targets.split(","):
        for scheme in arguments.schemes.split(",") if arguments.schemes else SCHEMES[name]:
            quant = quantize(model, scheme)
            for way, kind in targets.variants(name).items():
                if not isinstance(kind.carries(quant.scheme), Refused):
                    rows.append(compare(quant, way, targets.at(kind, arguments.context), arguments))
                    print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    common.report({"benchmark": "plan", "shape": arguments.shape, "context": arguments.context, "rows": rows})


def compare(quant: Any, way: str, target: Target, arguments: argparse.Namespace) -> dict[str, Any]:
    """A row: predicted, measured, and how far apart they are."""
    name = way.split()[0]
    with tempfile.TemporaryDirectory(dir=arguments.work) as directory:
        artifact = target.export(quant, Path(directory))
        size = sum((artifact.directory / file).stat().st_size for file in artifact.files)
        measured: dict[str, float] = {"size": size}
        if name == "cpu":
            measured |= run(target.session(artifact), arguments)
    here = replace(table()["cpu"], targets=(name,), gb_per_s=measured.pop("bandwidth", 1e9) / 1e9)
    found = plan(quant.model, [here], [name], [quant.scheme.name], context=arguments.context)
    (row,) = [row for row in found.rows if row.target == way]
    (fit,) = row.fits
    told: dict[str, float] = {"size": row.artifact_bytes, "memory": fit.resident}
    if fit.tokens_per_s:
        told["speed"] = fit.tokens_per_s[0]
    result: dict[str, Any] = {"target": way, "scheme": quant.scheme.name}
    for key, value in measured.items():
        off = told[key] / value - 1
        result |= {f"{key}_planned": told[key], f"{key}_measured": value, f"{key}_off": f"{off:+.1%}"}
        result[key] = "within" if abs(off) <= LIMITS[key] else "MISSES"
    return result


def run(spec: Any, arguments: argparse.Namespace) -> dict[str, float]:
    """Bytes that the runtime's process has grown by, tokens/s at the end of the context, and the bandwidth around it."""
    before = bandwidth()
    with open_session(spec) as session:
        process = psutil.Process(session.pid)
        empty = process.memory_info().rss - session.facts.resident_bytes
        timing = session.time(arguments.context - NEW, NEW, arguments.repeats)
        memory = process.memory_info().rss - empty
    after = bandwidth()
    token_s = statistics.median(second for repeat in timing.decode_s for second in repeat)
    return {"memory": memory, "speed": 1 / token_s, "bandwidth": max(before, after)}


if __name__ == "__main__":
    main()
