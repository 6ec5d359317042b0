"""How many bits a weight takes in a target's files, by what the target and the format say of themselves."""

from __future__ import annotations

from tapeout.exporters import Exact, gguf
from tapeout.quantize import Scheme
from tapeout.targets import Target


def held_bits(target: Target, scheme: Scheme, in_features: int) -> float | None:
    """Bits that a weight takes in the target's files as codes of a scheme; None: it is not held as codes."""
    carry = target.carries(scheme)
    if scheme.kind == "none" or not isinstance(carry, Exact):
        return None
    if carry.bits is not None:
        return carry.bits
    block = gguf.block_of(scheme)
    if block is None or not carry.container.startswith(block.kind):
        return scheme.bits_per_weight(in_features)
    # Rows that are no whole blocks become float16.
    return None if in_features % block.weights else block.bits_per_weight
