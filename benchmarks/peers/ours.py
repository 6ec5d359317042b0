"""Quantizes and exports a Llama checkpoint with tapeout, no gates: ``python ours.py TARGET SCHEME MODEL OUT [LAYERS [OVERRIDES [OPTIONS]]]``.

With LAYERS the model has so many, and its checkpoint fewer, which stand for the others in turn: every layer is read, quantized and written
as any other, and a disk need not hold all of them. OVERRIDES: schemes by glob, OPTIONS: of the target, both JSON.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from tapeout import Model, load, quantize, target
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


def main(
    device: str,
    scheme: str,
    source: Path,
    out: Path,
    layers: int,
    overrides: dict[str, str],
    options: dict[str, Any],
) -> None:
    model = load(source)
    if layers:
        model = unfolded(model, layers)
    out.mkdir(parents=True)
    known = {name: each for name, each in overrides.items() if f"{name}.weight" in model.specs}
    target(device, **options).export(quantize(model, scheme, overrides=known), out)


if __name__ == "__main__":
    words = sys.argv[1:]
    layers, *named = (*words[4:], *("0", "{}", "{}")[len(words) - 4 :])
    main(words[0], words[1], Path(words[2]), Path(words[3]), int(layers), *map(json.loads, named))
