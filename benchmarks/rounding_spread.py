"""Does a rounding without data do better or worse than ``rtn``? Mean KL over many groupings of the same weights, with its error.

    python benchmarks/rounding_spread.py --model DIR [--draws 6] [--schemes int4-g128,int4-g32,q4_k] [--heldout-bytes 40000]

One model and one scheme give one number, and what chance did to it is a few percent. Here the columns of every linear layer are
permuted before they are rounded, and back again after: an equally good grouping, and another draw of the errors. Both
roundings see the same draws. DIR holds a Llama checkpoint and ``heldout.txt``; embedding and head stay as they are.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import common
import numpy as np
from quality_peers import Judge

from tapeout.models import load
from tapeout.quantize import SCHEMES, lattice
from tapeout.quantize.hqq import round_hqq
from tapeout.quantize.rtn import round_to_nearest

ROUNDINGS = {"rtn": round_to_nearest, "hqq": round_hqq}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--draws", type=int, default=6)
    parser.add_argument("--schemes", default="int4-g128,int4-g32,q4_k")
    parser.add_argument("--heldout-bytes", type=int, default=40_000)
    arguments = parser.parse_args()
    text = (arguments.model / "heldout.txt").read_bytes()[: arguments.heldout_bytes].decode(errors="ignore")
    judge, model = Judge(arguments.model, text), load(arguments.model)
    names = [name for name in model.specs if name.endswith("_proj.weight")]
    weights = {name: np.array(model.checkpoint[name].float32()) for name in names}
    result: dict[str, object] = {"benchmark": "rounding_spread", "draws": arguments.draws}
    for named in arguments.schemes.split(","):
        scheme = SCHEMES[named]
        divergences = np.empty((arguments.draws, len(ROUNDINGS)))
        errors = np.zeros(len(ROUNDINGS))
        for draw in range(arguments.draws):
            for which, rounding in enumerate(ROUNDINGS.values()):
                chance, rounded = np.random.default_rng(draw), {}
                for name, weight in weights.items():
                    order = chance.permutation(weight.shape[1]) if draw else np.arange(weight.shape[1])
                    moved = np.ascontiguousarray(weight[:, order])
                    found = rounding(moved, scheme)
                    rounded[name] = np.empty_like(weight)
                    rounded[name][:, order] = lattice.dequantize(found.codes, scheme, found.grid)
                    errors[which] += float(np.square(rounded[name] - weight).sum())
                divergences[draw, which] = judge.divergence(rounded)
        ratio = divergences[:, 1] / divergences[:, 0]
        error = ratio.std(ddof=1) / len(ratio) ** 0.5
        result[named] = {
            "rtn_kl": round(float(divergences[:, 0].mean()), 5),
            "hqq_kl": round(float(divergences[:, 1].mean()), 5),
            "kl_ratio": round(float(ratio.mean()), 4),
            "standard_error": round(float(error), 4),
            "squared_error_ratio": round(float(errors[1] / errors[0]), 4),
        }
        print(
            f"{named:10} hqq / rtn: KL {ratio.mean():.4f} ± {error:.4f}, squared error {errors[1] / errors[0]:.4f} "
            f"(KL of rtn {divergences[:, 0].mean():.5f})",
            flush=True,
        )
    common.report(result)


if __name__ == "__main__":
    main()
