"""What `tapeout plan` says of generated Llama shapes, against files, memory and speed of every target that runs here.

    python benchmarks/plan.py [--shape 1b] [--contexts 256,512] [--targets cpu,apple,rocm]

Size is that of the artifact's files; memory that which the runtime's process has grown by once a prompt has filled the context; speed that
of decoding there. Apple's and AMD's runtimes do not run here: their files alone are compared. The bandwidth is measured around each run, as
plan measures it, and stands in the row: `tests/tapeout/test_plan_check.py` asks plan again from it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common

from tapeout import load, plan_check, quantize, targets
from tapeout.exporters import Artifact, Refused
from tapeout.models import Model
from tapeout.targets import Target

SCHEMES = {"cpu": ("int4-g32", "int8"), "apple": ("int4-g32",), "rocm": ("int4-g32",)}


@dataclass(frozen=True)
class Made:
    """An artifact, and what it was made of."""

    model: Model
    way: str
    scheme: str
    target: Target
    artifact: Artifact
    context: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="1b", choices=common.SHAPES)
    parser.add_argument("--contexts", default="512")
    parser.add_argument("--targets", default=",".join(SCHEMES))
    parser.add_argument("--schemes", default="")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work", type=Path, default=common.cache_directory() / "benchmarks")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as out:
        rows = compared(list(exported(arguments, Path(out))), arguments.repeats)
    common.report({"benchmark": "plan", "shape": arguments.shape, "rows": rows})


def exported(arguments: argparse.Namespace, out: Path) -> Iterator[Made]:
    """Every artifact first, so that runs follow one another."""
    model = load(common.checkpoint(arguments.shape, arguments.work))
    for name in arguments.targets.split(","):
        for scheme in arguments.schemes.split(",") if arguments.schemes else SCHEMES[name]:
            quant = quantize(model, scheme)
            for way, kind in targets.variants(name).items():
                for context in map(int, arguments.contexts.split(",")):
                    if isinstance(kind.carries(quant.scheme), Refused):
                        continue
                    target, place = targets.at(kind, context), out / f"{way}-{scheme}-{context}"
                    place.mkdir()
                    yield Made(model, way, scheme, target, target.export(quant, place), context)


def compared(made: list[Made], repeats: int) -> list[dict[str, Any]]:
    """A row of each; targets whose device this machine is are run."""
    rows = []
    for each in made:
        runs = repeats if each.target.name == "cpu" else None
        row = plan_check.compared(
            each.model, each.way, each.scheme, each.target, each.artifact, each.context, runs
        )
        rows.append(row)
        print(f"{each.way} {each.scheme} {each.context}: {'; '.join(plan_check.lines(row))}", flush=True)
    return rows


if __name__ == "__main__":
    main()
