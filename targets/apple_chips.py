"""What the chips of Macs can be expected to do with a package: an estimate from published bandwidths, measured on none of them.

Decoding reads every weight once a token, so that tokens a second are at most bandwidth / bytes per token; what of it is reached is the
runtime's. Two fractions span the estimate: what Apple published for Core ML, and what well-tuned kernels for Apple's GPUs reach.
"""

from __future__ import annotations

TIERS = ("base", "Pro", "Max", "Ultra")

CHIPS: dict[str, tuple[float | None, ...]] = {
    "M1": (68.25, 200, 400, 800),
    "M2": (100, 200, 400, 800),
    "M3": (100, 150, 400, 819),
    "M4": (120, 273, 546, None),
}
"""Memory bandwidth in GB/s of each tier as Apple publishes it, of Max chips the one with all GPU cores (the smaller M3 Max has 300, the
smaller M4 Max 410); None: there is no such chip."""

# "On Device Llama 3.1 with Core ML" (Apple, 2024): Llama 3.1 8B, int4 in blocks of 32, about 33 tokens/s on an M1 Max.
_ANCHOR_TOKENS_PER_S = 33.0
_ANCHOR_WEIGHTS = 32 * (2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096) + 128256 * 4096
ANCHOR_BYTES = _ANCHOR_WEIGHTS * 4.5 / 8
"""Bytes that a token of that model reads: 4.5 bits for each weight of its linear layers and its head."""

CORE_ML = _ANCHOR_TOKENS_PER_S * ANCHOR_BYTES / (400 * 1e9)
"""The fraction of the bandwidth that the anchor reached: 0.35."""

TUNED = 0.7
"""The fraction that well-tuned kernels reach on these GPUs (published: 0.68 … 0.86)."""

LEAST = 100_000_000
"""Bytes per token below which it is calls, and not memory, that take the time: nothing is estimated."""


def tokens_per_s(bytes_per_token: int, gb_per_s: float) -> tuple[float, float]:
    """Tokens a second in decoding a short context: what Core ML was seen to reach, and well-tuned kernels."""
    most = gb_per_s * 1e9 / bytes_per_token
    return CORE_ML * most, TUNED * most


def table(bytes_per_token: int) -> str:
    """The estimate for every chip as a Markdown table; empty for a model that is too small for one."""
    if bytes_per_token < LEAST:
        return ""
    rows = [f"| tokens/s | {' | '.join(TIERS)} |", "|---|" + "---:|" * len(TIERS)]
    for chip, bandwidths in CHIPS.items():
        cells = ["–" if each is None else _span(bytes_per_token, each) for each in bandwidths]
        rows.append(f"| {chip} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _span(bytes_per_token: int, gb_per_s: float) -> str:
    least, most = tokens_per_s(bytes_per_token, gb_per_s)
    return f"{least:.0f} … {most:.0f}"
