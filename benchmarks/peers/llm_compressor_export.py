"""Rounds a checkpoint to INT4 in groups of 128 and saves it, in llm-compressor's own way: ``python llm_compressor_export.py MODEL OUT``.

Round to nearest, weights alone: ``oneshot`` with its QuantizationModifier and no calibration text, as its README has it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from transformers import AutoModelForCausalLM


def main(source: Path, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    oneshot(model=model, recipe=QuantizationModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]))
    model.save_pretrained(out, save_compressed=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
