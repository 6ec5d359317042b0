"""A graph for TensorRT and its engine by TensorRT-RTX, without a GPU: seconds, memory, bytes against theory, codes found in the engine.

    python benchmarks/tensorrt_engine.py [--shape 1b|8b] [--scheme int4-g32] [--context 2048] [--level 0..5]

Takes the worker environment ``tensorrt-rtx``. The checkpoint is generated; it is quantized before, and its store is read from the page cache.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import common

from tapeout import environments, load, quantize
from tapeout.targets import tensorrt_engine

_EXPORT = """\
import sys; from pathlib import Path; from tapeout import load, quantize, target
quant = quantize(load(sys.argv[1]), sys.argv[2])
target('nvidia', format='onnx-trt', context=int(sys.argv[4])).export(quant, Path(sys.argv[3]))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=common.SHAPES, default="1b")
    parser.add_argument("--scheme", default="int4-g32")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--level", type=int)
    parser.add_argument("--work", type=Path, default=common.cache_directory() / "benchmarks")
    arguments = parser.parse_args()
    python = environments.python("tensorrt-rtx")
    model = common.checkpoint(arguments.shape, arguments.work)
    quant = quantize(load(model), arguments.scheme)
    theory = sum(
        spec.shape[0] * spec.shape[1] * scheme.bits_per_weight(spec.shape[1]) / 8
        for name, spec in quant.model.specs.items()
        if (scheme := quant.schemes[name]).kind != "none"
    )
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        out = Path(name) / "out"
        export = common.run(
            sys.executable, "-c", _EXPORT, model, arguments.scheme, out, str(arguments.context)
        )
        level = ["--level", str(arguments.level)] if arguments.level is not None else []
        done = subprocess.run(
            [python, "-I", out / "build_engine.py", *level], capture_output=True, text=True, check=True
        )
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        built = json.loads(done.stdout.strip().splitlines()[-1])
        found, matrices = tensorrt_engine.places(out)
        data = (out / "model.onnx.data").stat().st_size
        shutil.rmtree(out)
    facts = {
        "benchmark": "tensorrt_engine",
        "shape": arguments.shape,
        "scheme": arguments.scheme,
        "context": arguments.context,
        "export_s": round(export.wall_s, 2),
        "export_peak_gb": round(export.peak_bytes / 1e9, 3),
        "parse_s": built["parse_s"],
        "build_s": built["build_s"],
        "build_peak_gb": round(peak / 1e9, 3),
        "theory_bytes": round(theory),
        "data_bytes": data,
        "plan_bytes": built["bytes"],
        "codes_found": len(found),
        "matrices": matrices,
    }
    for key, value in facts.items():
        print(f"{key:15} {value}")
    common.report(facts)


if __name__ == "__main__":
    main()
