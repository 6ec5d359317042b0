"""IREE: a module built from the one graph definition, and the codes in its parameter archive."""

from __future__ import annotations

from tapeout.exporters.iree.blocks import carries
from tapeout.exporters.iree.reader import facts_of, read_codes
from tapeout.exporters.iree.writer import ARCHIVE, CONFIG, FACTS, MLIR, Options, resolved, write

__all__ = ["ARCHIVE", "CONFIG", "FACTS", "MLIR", "Options", "carries", "facts_of", "read_codes", "resolved", "write"]
