"""Rank checkpoints of TensorRT-LLM, for the ``trtllm-build`` of its releases 1.0 to 1.2: config.json and rank{r}.safetensors.

``layout`` says which part of which tensor of the model stands where in a rank, ``packing`` what stands for codes.
"""

from __future__ import annotations

from tapeout.exporters.trtllm.packing import carries
from tapeout.exporters.trtllm.reader import read_codes
from tapeout.exporters.trtllm.writer import WORDS, write

__all__ = ["WORDS", "carries", "read_codes", "write"]
