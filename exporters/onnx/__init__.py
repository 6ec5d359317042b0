"""ONNX, in the operators of ONNX Runtime: the codes in its own containers, the graph built from the one definition, weights beside it."""

from __future__ import annotations

from tapeout.exporters.onnx.blocks import carries, input_block
from tapeout.exporters.onnx.reader import describe, read_codes
from tapeout.exporters.onnx.writer import exact_graph, write

__all__ = ["carries", "describe", "exact_graph", "input_block", "read_codes", "write"]
