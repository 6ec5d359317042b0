"""Every scheme × rounding through target ``cpu`` on one small model: are the codes in the file, and does llama.cpp run them?

    .venv/bin/python scripts/matrix.py [--out docs/matrix.md]

Writes the table and ends with 1 when a gate failed. Takes some minutes; not part of the tests, which hold every scheme to all gates with
one rounding (``tapeout.conformance``).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tapeout.build import target
from tapeout.conformance import MODELS, lowered
from tapeout.exporters import Refused
from tapeout.generated import write_model
from tapeout.models import Model, load
from tapeout.quantize import ROUNDINGS, SCHEMES, Calibration, quantize

SEQUENCES = [[(i * i * 7 + i * 31 + j * 13) % 256 for i in range(64)] for j in range(4)]
HEAD = """\
# Every scheme × rounding on target `cpu`

Made by `python scripts/matrix.py`: a random Llama (hidden 256, 2 layers, 8 heads over 4), calibrated on 16 windows of 64 tokens. In every
cell the `codes` gate passed (each tensor read back with the `gguf` library, bit for bit) and both `lowering` gates did. A cell holds the
largest logit difference of the file's float32 twin from the reference in units of the logits' standard deviation (limit 1e-4, or what
float32 itself does to the reference), and the shipped file's KL as a share of its limit, which the reference predicts. `smoothquant` is for
schemes that round inputs.

"""


def cell(model: Model, scheme: str, rounding: str, work: Path) -> str:
    """What the gates say of one scheme and rounding."""
    data = rounding in ("gptq", "awq", "smoothquant") or SCHEMES[scheme].calibrated
    quant = quantize(
        model,
        scheme,
        rounding=rounding,
        calibration=Calibration(None, 16, 64) if data else None,
        out=work / "codes",
    )
    # A model so small is done before two threads have met.
    return lowered(target("cpu", threads=1), quant, work, SEQUENCES)


def main() -> None:
    """Run all cells and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/matrix.md"))
    arguments = parser.parse_args()
    kind, begin = target("cpu"), time.perf_counter()
    rows = [["scheme", *(f"`{rounding}`" for rounding in ROUNDINGS)], ["---"] * (1 + len(ROUNDINGS))]
    with tempfile.TemporaryDirectory(prefix="tapeout-") as place:
        family, fields = MODELS["llama"]
        model = load(write_model(Path(place) / "llama", family, fields, dtype="F32"))
        for scheme in (s for s in SCHEMES.values() if s.kind != "none"):
            if isinstance(carry := kind.carries(scheme), Refused):
                rows.append([f"`{scheme}`", *([f"refused: {carry.reason}"] + [""] * (len(ROUNDINGS) - 1))])
                continue
            row = [f"`{scheme}`"]
            for rounding in ROUNDINGS:
                if rounding == "smoothquant" and not scheme.activations:
                    row.append("–")
                    continue
                with tempfile.TemporaryDirectory(dir=place) as work:
                    row.append(cell(model, scheme.name, rounding, Path(work)))
                print(f"{time.perf_counter() - begin:5.0f} s  {scheme} {rounding}: {row[-1]}", flush=True)
            rows.append(row)
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    arguments.out.write_text(HEAD + table + "\n", encoding="utf-8")
    sys.exit("**" in table)


if __name__ == "__main__":
    main()
