"""Rounds a checkpoint to INT4 in groups of 128 and exports it, in ModelOpt's own way: ``python modelopt_export.py MODEL OUT``.

Round to nearest, weights alone: no calibration text, as its ``INT4_BLOCKWISE_WEIGHT_ONLY_CFG`` has it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import modelopt.torch.quantization as mtq
from modelopt.torch.export import export_hf_checkpoint
from transformers import AutoModelForCausalLM


def main(source: Path, out: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    model = mtq.quantize(model, mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
    export_hf_checkpoint(model, export_dir=out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
