"""Core ML: a package whose program is built from the one graph definition, and the codes in its blob file."""

from __future__ import annotations

from tapeout.exporters.coreml.blocks import carries
from tapeout.exporters.coreml.reader import describe, read_codes
from tapeout.exporters.coreml.writer import Options, cache_bytes, packages_in, write

__all__ = ["Options", "cache_bytes", "carries", "describe", "packages_in", "read_codes", "write"]
