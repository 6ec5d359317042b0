"""GGUF, the format of llama.cpp: the codes in its own block types, the model's numbers and its tokenizer in one file."""

from __future__ import annotations

from tapeout.exporters.gguf.arch import turns_neighbours
from tapeout.exporters.gguf.layout import block_of, carries
from tapeout.exporters.gguf.reader import describe, read_codes
from tapeout.exporters.gguf.widened import widened
from tapeout.exporters.gguf.writer import write

__all__ = ["block_of", "carries", "describe", "read_codes", "turns_neighbours", "widened", "write"]
