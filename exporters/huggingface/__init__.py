"""Hugging Face directories: safetensors shards, config.json with what it says of quantization, and the tokenizer's files.

One file a format of packing; the writer and the reader around them are the same.
"""

from __future__ import annotations

from tapeout.exporters.huggingface.reader import Tensors, read_codes, read_weights
from tapeout.exporters.huggingface.writer import FORMATS, Format, carries, write

__all__ = ["FORMATS", "Format", "Tensors", "carries", "read_codes", "read_weights", "write"]
