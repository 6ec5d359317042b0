"""How much of a model its quantization keeps: tapeout against llama-quantize, llm-compressor, HQQ and bitsandbytes at equal bits.

    python benchmarks/quality.py --model DIR [--calibration FILE] [--no-peer] [--heldout-bytes 60000] [--known RESULT]

DIR holds a Llama checkpoint and ``heldout.txt``, the text that is measured on; all that look at data look at the same
calibration text (default: tapeout's own), 128 windows of 512 tokens. Every variant is dequantized and run by transformers in float32: mean KL of the
original to it, top-1, perplexity, and the exact bits of its weights. Peers that leave the embedding float are compared on the
linear layers, with the original's embedding and head on both sides. Ends with a JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common
import numpy as np
from quality_peers import LENGTH, SAMPLES, Judge, peers
from safetensors.numpy import save_file

from tapeout.files import cache_directory
from tapeout.models import load
from tapeout.quantize import Calibration, quantize

CALIBRATION = Path(__file__).resolve().parent.parent / "quantize" / "data" / "calibration.txt"

# What llama-quantize gives these of a Q2_K file: Q3_K.
_WIDER = {"*.down_proj": "q3_k", "*.o_proj": "q3_k", "*.v_proj": "q3_k"}

# Scheme of the linear layers, of the embedding (which is the head too), rounding; and of some layers another scheme.
OURS: list[tuple[Any, ...]] = [
    ("int8-g32", "none", "gptq"),
    ("int8", "none", "gptq"),
    ("int8-g32", "int8-g32", "gptq"),
    ("int8", "int8", "gptq"),
    ("q6_k", "q6_k", "gptq"),
    ("q5_k", "q6_k", "gptq"),
    ("q5_k", "q5_k", "gptq"),
    ("q4_k", "q6_k", "gptq"),
    ("q4_k", "q5_k", "gptq"),
    ("q4_k", "q4_k", "gptq"),
    ("int4-g32-asym", "q6_k", "gptq"),
    ("int4-g32", "q6_k", "gptq"),
    ("int4-g32", "int8", "gptq"),
    ("int4-g64", "q6_k", "gptq"),
    ("int4-g128", "q6_k", "gptq"),
    ("int4-g128", "int8", "gptq"),
    ("nf4", "q6_k", "gptq"),
    ("int3-g64", "q6_k", "gptq"),
    ("q3_k", "q6_k", "gptq"),
    ("q3_k", "q4_k", "gptq"),
    ("q3_k", "q3_k", "gptq"),
    ("q2_k", "q4_k", "gptq", _WIDER),
    ("q2_k", "q4_k", "gptq"),
    ("int2-g64", "q4_k", "gptq"),
    *(("int4-g32", "q6_k", rounding) for rounding in ("rtn", "hqq", "awq")),
    *(("int4-g128", "q6_k", rounding) for rounding in ("rtn", "hqq", "awq")),
    *(("q4_k", "q6_k", rounding) for rounding in ("rtn", "hqq", "awq")),
]


def ours(model: Path, text: Path, work: Path, known: set[str]) -> list[tuple[dict[str, Any], Path]]:
    """Our variants in the form of ``peers``, but for those that are known."""
    found = []
    for scheme, ends, rounding, *others in OURS:
        mixed = others[0] if others else {}
        variant = f"{scheme}/{ends} {rounding}" + (" and q3_k" if mixed else "")
        if variant in known:
            continue
        data = Calibration(text, SAMPLES, LENGTH) if rounding in ("gptq", "awq") else None
        store = work / "store"
        quant = quantize(
            load(model),
            scheme,
            rounding=rounding,
            overrides={"model.embed_tokens": ends, **mixed},
            calibration=data,
            out=store,
            force=True,
        )
        bits: dict[str, float] = {}
        for name in quant:
            shape = quant.model.specs[name].shape
            chosen = quant.schemes[name]
            each = 16.0 if chosen.kind == "none" else chosen.bits_per_weight(shape[-1])
            bits[name] = each * math.prod(shape)
        linear = [name for name in bits if name.endswith("_proj.weight")]
        facts = {
            "peer": "tapeout",
            "variant": variant,
            "bits": sum(bits.values()),
            "weights": sum(math.prod(quant.model.specs[name].shape) for name in bits),
            "linear_bits": sum(bits[name] for name in linear),
            "linear_weights": sum(math.prod(quant.model.specs[name].shape) for name in linear),
        }
        path = work / f"{len(found)}.safetensors"
        save_file({name: np.array(quant.float32(name)) for name in quant}, path)
        found.append((facts, path))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, default=CALIBRATION)
    parser.add_argument("--heldout-bytes", type=int, default=60_000)
    parser.add_argument("--no-peer", action="store_true")
    parser.add_argument("--known", type=Path, help="an earlier result: its variants are not measured again")
    arguments = parser.parse_args()
    place = cache_directory() / "benchmarks" / "quality"
    place.mkdir(parents=True, exist_ok=True)
    # Before torch is loaded here: what a child starts with counts as its peak.
    theirs = [] if arguments.no_peer else peers(arguments.model, arguments.calibration, place)
    text = (arguments.model / "heldout.txt").read_bytes()[: arguments.heldout_bytes].decode(errors="ignore")
    told = json.loads(arguments.known.read_text().splitlines()[-1]) if arguments.known else {"variants": []}
    rows = told["variants"]
    known = {(row["peer"], row["variant"]) for row in rows}
    with tempfile.TemporaryDirectory(dir=place) as work:
        ours_known = {variant for peer, variant in known if peer == "tapeout"}
        mine = ours(arguments.model, arguments.calibration, Path(work), ours_known)
        judge = Judge(arguments.model, text)
        for facts, path in mine + theirs:
            if (facts["peer"], facts["variant"]) in known:
                continue
            row = {
                k: v for k, v in facts.items() if not k.startswith(("wall", "peak"))
            }  # what they take: calibrate.py
            if "failed" in facts:
                print(f"{facts['peer']:22} {facts['variant']:20} failed: {facts['failed']}", file=sys.stderr)
                continue
            whole, layers = judge.judge(path)
            print(f"judged {facts['peer']} {facts['variant']}", file=sys.stderr)
            row["bits_per_weight"] = facts["bits"] / facts["weights"]
            row["linear_bits_per_weight"] = facts["linear_bits"] / facts["linear_weights"]
            row |= asdict(whole) | {"linear": asdict(layers)}
            rows.append(row)
    rows.sort(key=lambda row: row["bits_per_weight"])
    for row in rows:
        print(
            f"{row['peer']:22} {row['variant']:22} {row['bits_per_weight']:6.3f} bits  KL {row['mean_kl']:.5f}  top-1 "
            f"{row['top1']:.4f}  perplexity {row['perplexity']:7.3f} | layers alone {row['linear_bits_per_weight']:6.3f} bits  "
            f"KL {row['linear']['mean_kl']:.5f}"
        )
    verdicts = [verdict for row in rows if row["peer"] != "tapeout" for verdict in compare(row, rows)]
    lost = [verdict for verdict in verdicts if verdict["ratio"] >= 1]
    for verdict in lost:
        print(f"lost: {verdict}")
    common.report(
        {
            "benchmark": "quality",
            "model": arguments.model.name,
            "calibration": arguments.calibration.name,
            "heldout_bytes": arguments.heldout_bytes,
            "original_perplexity": judge.original(),
            "comparisons": len(verdicts),
            "lost": lost,
            "largest_ratio": max((verdict["ratio"] for verdict in verdicts), default=None),
            "variants": rows,
        }
    )


def compare(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A peer's variant against our best of no more bits: whole files, and the linear layers alone."""
    found = []
    for what, bits, kl in (
        ("whole", "bits_per_weight", lambda r: r["mean_kl"]),
        ("layers", "linear_bits_per_weight", lambda r: r["linear"]["mean_kl"]),
    ):
        best = min(
            (r for r in rows if r["peer"] == "tapeout" and r[bits] <= row[bits] + 1e-3), key=kl, default=None
        )
        if best is not None:
            found.append(
                {
                    "what": what,
                    "peer": f"{row['peer']} {row['variant']}",
                    "peer_bits": round(row[bits], 4),
                    "peer_kl": kl(row),
                    "ours": best["variant"],
                    "our_bits": round(best[bits], 4),
                    "our_kl": kl(best),
                    "ratio": round(kl(best) / kl(row), 3),
                }
            )
    return found


if __name__ == "__main__":
    main()
