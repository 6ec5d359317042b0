"""What AWQ loses because a scale of o_proj's inputs must fold into v_proj: one for all query heads of a value head.

    python benchmarks/pre_scale.py --model DIR [--scheme int4-g128] [--sequences 128] [--heldout-bytes 120000]

DIR holds a checkpoint with grouped-query attention and ``heldout.txt``. Against AWQ as it is stand one that leaves o_proj's inputs
alone, and one that gives every channel its own scale, carried explicitly: weights are rounded as ``w * s`` and become ``w / s``, as a
runtime that divides its inputs would see them. Mean KL of the original to each, on transformers in float32. Ends with a JSON line.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common
import numpy as np

from tapeout.models import load
from tapeout.quantize import Calibration, awq, calibrated, quantize
from tapeout.validate.metrics import Distance
from tapeout.validate.reference import Reference, open_session

WINDOW = 512
_awq_scale, _Calibrated = awq.awq_scale, calibrated.Calibrated
_explicit: dict[str, np.ndarray] = {}


def _alone(weights: Any, schemes: Any, inputs: awq.Inputs, heads: Any = None) -> Any:
    """``awq_scale`` that leaves the inputs of o_proj, the only ones with heads, as they are."""
    return np.ones_like(inputs.mean) if heads else _awq_scale(weights, schemes, inputs)


class _Explicit(_Calibrated):
    """Rounds o_proj under a scale of each input channel's own."""

    def _round(
        self, names: Sequence[str], inputs: Callable[[int], Any], weights: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        (name, *_) = names
        if not name.endswith("o_proj.weight"):
            return super()._round(names, inputs, weights)
        weight, scheme = weights[name], self.schemes[name]
        seen = self._inputs(inputs, weight.shape[1], name)
        scale = _awq_scale([weight], [scheme], seen)
        _explicit[name] = scale
        return {name: self._write(name, weight * scale, None, seen.scaled(scale).square) / scale}


@contextmanager
def variant(name: str) -> Iterator[None]:
    """Make ``quantize`` do as the variant does."""
    _explicit.clear()
    awq.awq_scale = _awq_scale if name in ("rtn", "awq") else _alone
    calibrated.Calibrated = _Explicit if name == "explicit" else _Calibrated
    yield
    awq.awq_scale, calibrated.Calibrated = _awq_scale, _Calibrated


def windows(session: Reference, text: str) -> list[list[int]]:
    """The text in windows of at most WINDOW tokens."""
    ids = session.tokenize(text)
    return [ids[at : at + WINDOW] for at in range(0, len(ids) - 1, WINDOW)]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--scheme", default="int4-g128")
    parser.add_argument("--sequences", type=int, default=128, help="of 512 tokens, to calibrate on")
    parser.add_argument("--heldout-bytes", type=int, default=120_000)
    parser.add_argument("--variants", nargs="+", default=["awq", "explicit", "alone", "rtn"])
    arguments = parser.parse_args()
    model = load(arguments.model)
    text = (arguments.model / "heldout.txt").read_bytes()[: arguments.heldout_bytes].decode(errors="ignore")
    original = open_session(str(arguments.model))
    data = Calibration(None, arguments.sequences, WINDOW)
    found: dict[str, float] = {}
    for name in arguments.variants:
        with tempfile.TemporaryDirectory(prefix="tapeout-") as place, variant(name):
            quant = quantize(
                model,
                arguments.scheme,
                rounding="rtn" if name == "rtn" else "awq",
                calibration=data,
                out=Path(place) / "codes",
            )
            session = open_session(str(arguments.model), store=str(quant.directory))
            for tensor, scale in _explicit.items():
                session.substitute(tensor, quant.float32(tensor) / scale)
            distance = Distance()
            for ids in windows(original, text):
                original.reset()
                session.reset()
                distance.add(original.prefill(ids), session.prefill(ids))
            session.close()
        found[name] = distance.kl
        print(f"{name:10} {distance.kl:.5f} nats a token, top-1 {distance.top1:.2%}", flush=True)
    config = model.config
    common.report(
        {
            "model": model.name,
            "scheme": arguments.scheme,
            "heads": [config.num_heads, config.num_kv_heads],
            "kl": found,
        }
    )


if __name__ == "__main__":
    main()
