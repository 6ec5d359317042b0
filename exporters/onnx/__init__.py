"""ONNX: the graph built from the one definition, in ONNX Runtime's operators or in the standard ones, and the codes beside it."""

from __future__ import annotations

from tapeout.exporters.onnx.blocks import as_held, block_of, carries, input_block
from tapeout.exporters.onnx.genai import cache_shape
from tapeout.exporters.onnx.graph import check_size
from tapeout.exporters.onnx.reader import describe, inputs, read_codes
from tapeout.exporters.onnx.writer import Dialect, exact_graph, write

__all__ = [
    "Dialect",
    "as_held",
    "block_of",
    "cache_shape",
    "carries",
    "check_size",
    "describe",
    "exact_graph",
    "input_block",
    "inputs",
    "read_codes",
    "write",
]
