"""Rounds a checkpoint to INT4 in groups of 128 and exports it, in ModelOpt's own way: ``python modelopt_export.py MODEL OUT [RANKS]``.

Round to nearest, weights alone: no calibration text, as its ``INT4_BLOCKWISE_WEIGHT_ONLY_CFG`` has it. With RANKS the checkpoints of
so many TensorRT-LLM ranks, otherwise the unified directory.
"""

from __future__ import annotations

import sys
from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint, export_tensorrt_llm_checkpoint
from transformers import AutoModelForCausalLM


def main(source: Path, out: Path, ranks: int) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    model = mtq.quantize(model, mtq.INT4_BLOCKWISE_WEIGHT_ONLY_CFG)
    if ranks:
        export_tensorrt_llm_checkpoint(model, "llama", torch.bfloat16, out, inference_tensor_parallel=ranks)
    else:
        export_hf_checkpoint(model, export_dir=out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if sys.argv[3:] else 0)
