"""Exports a Llama checkpoint to Core ML with tapeout: ``python coreml_ours.py MODEL OUT [LAYERS]``; quantizes and exports, no gates.

With LAYERS the model has so many, and its checkpoint fewer, which stand for the others in turn: every layer is read, quantized and written
as any other, and a disk need not hold all of them.
"""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from pathlib import Path

from tapeout import Model, Quantized, load, quantize, target
from tapeout.models import Checkpoint
from tapeout.models.decoder import ConfigReader
from tapeout.models.families import family


def unfolded(model: Model, layers: int) -> Model:
    """The same with more layers, whose tensors lie where those of the checkpoint's do."""
    raw = {**model.raw_config, "num_hidden_layers": layers}
    kind, few = family(str(raw["model_type"])), model.decoder.num_layers
    config = kind.config(ConfigReader(raw))
    specs = kind.tensors(config)

    def held(name: str) -> str:
        return re.sub(r"layers\.(\d+)", lambda found: f"layers.{int(found[1]) % few}", name)

    tensors = {name: replace(model.checkpoint[held(name)], name=name) for name in specs}
    checkpoint = Checkpoint(model.directory, tensors)
    return replace(model, raw_config=raw, config=config, specs=specs, checkpoint=checkpoint)


def quantized(model: Model) -> Quantized:
    """INT4 in groups of 32, the head too where it is a matrix of its own; embeddings are int8."""
    head = {"lm_head": "int4-g32"} if "lm_head.weight" in model.specs else {}
    return quantize(model, "int4-g32", overrides=head)


def main(source: Path, out: Path, layers: int) -> None:
    model = load(source)
    if layers:
        model = unfolded(model, layers)
    out.mkdir(parents=True)
    target("apple").export(quantized(model), out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
