"""What a Core ML package weighs: bytes against the scheme's own bits, operators of each function, and what it takes to read the program.

    python benchmarks/coreml_load.py [--models arithmetic,1b,8b]

The theory is ``Scheme.bits_per_weight`` for every quantized tensor and 32 bits for what the graph takes as float32; what the file has
beyond it are 64 bytes a blob, and constants such as the table of rotations. Both functions share the one weight file. The program is read
with coremltools' protobuf; what Core ML makes of it when an app loads it can only be measured on a Mac (check.py of the package).
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import common
from coreml_export import checkpoint
from peers.ours import unfolded

from tapeout import Model, load, quantize, target
from tapeout.exporters import coreml
from tapeout.exporters.coreml.program import SPEC, WEIGHTS
from tapeout.exporters.coreml.reader import open_spec


def model_of(name: str, work: Path) -> Model:
    """An embedded model by its name, or a generated one by its shape."""
    if name not in common.SHAPES:
        return load(name)
    return unfolded(load(checkpoint(name, work)), common.SHAPES[name]["num_hidden_layers"])


def measured(model: Model, out: Path) -> dict[str, Any]:
    """Export a model, and weigh it."""
    head = {"lm_head": "int4-g32"} if "lm_head.weight" in model.specs else {}
    quant = quantize(model, "int4-g32", overrides=head)
    target("apple").export(quant, out)
    theory = 0.0
    for name, spec in model.specs.items():
        scheme = quant.schemes[name]
        bits = 32 if scheme.kind == "none" else scheme.bits_per_weight(spec.shape[-1])
        theory += bits * math.prod(spec.shape) / 8
    (package,) = coreml.packages_in(out)
    begin = perf_counter()
    spec = open_spec(package)
    read_s = perf_counter() - begin
    facts = coreml.describe(package)
    return {
        "theory_bytes": round(theory),
        "weight_bytes": (package / WEIGHTS).stat().st_size,
        "program_bytes": (package / SPEC).stat().st_size,
        "operators": facts["functions"],
        "constants": facts["operators"]["const"],
        "layers": int(spec.description.metadata.userDefined["co.tapeout.layers"]),
        "read_s": round(read_s, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="arithmetic,1b,8b")
    parser.add_argument("--work", type=Path, default=common.cache_directory() / "benchmarks")
    parser.add_argument("--store", type=Path, help="where the codes stand meanwhile; default: below --work")
    arguments = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    for name in arguments.models.split(","):
        with (
            tempfile.TemporaryDirectory(dir=arguments.work) as scratch,
            tempfile.TemporaryDirectory(dir=arguments.store or scratch) as store,
            patch.dict(os.environ, TAPEOUT_CACHE=store),
        ):
            (out := Path(scratch) / "out").mkdir()
            row = rows[name] = measured(model_of(name, arguments.work), out)
        beyond = row["weight_bytes"] / row["theory_bytes"] - 1
        operators = ", ".join(f"{function} {count}" for function, count in row["operators"].items())
        print(
            f"{name:10} {row['weight_bytes'] / 1e6:8.2f} MB of weights, {beyond:+.3%} of theory; program {row['program_bytes'] / 1e3:.0f} kB, "
            f"read in {row['read_s']:.2f} s; operators: {operators}"
        )
    common.report({"benchmark": "coreml_load", "scheme": "int4-g32", "rows": rows})


if __name__ == "__main__":
    main()
