"""IREE: a module built from the one graph definition, and the codes in its parameter archive."""

from __future__ import annotations

from tapeout.exporters.iree.archive import runtime
from tapeout.exporters.iree.blocks import carries
from tapeout.exporters.iree.mlir import SCOPE
from tapeout.exporters.iree.reader import facts_of, read_codes, read_weights
from tapeout.exporters.iree.writer import ARCHIVE, CONFIG, MLIR, Options, write

__all__ = [
    "ARCHIVE",
    "CONFIG",
    "MLIR",
    "SCOPE",
    "Options",
    "carries",
    "facts_of",
    "read_codes",
    "read_weights",
    "runtime",
    "write",
]
