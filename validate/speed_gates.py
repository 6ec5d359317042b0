"""Gates of speed and memory: what was measured against what the user demands. There are none where nothing was demanded."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from tapeout.errors import RecipeError
from tapeout.validate.report import GateResult

__all__ = ["emulated", "parse_bytes", "speed_gates"]

_UNITS = {
    "": 1,
    "k": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "Ki": 2**10,
    "Mi": 2**20,
    "Gi": 2**30,
    "Ti": 2**40,
}


def parse_bytes(text: str) -> int:
    """Bytes of ``2GB``, ``500M`` or ``1.5GiB``; RecipeError for what is no size above zero."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?i?)B?", text.strip())
    unit = found[2].replace("K", "k") if found else ""
    unit = "Ki" if unit == "ki" else unit
    if not found or unit not in _UNITS or not (count := int(float(found[1]) * _UNITS[unit])):
        raise RecipeError(f"'{text}' is not a size of memory. What fits: 500MB, 2GB, 1.5GiB.")
    return count


def speed_gates(
    figures: Mapping[str, Any],
    min_tokens_per_s: float | None = None,
    max_ttft_ms: float | None = None,
    max_memory: str | None = None,
    absent: str = "speed was not measured.",
) -> list[GateResult]:
    """A verdict for each limit that is given.

    Args:
        figures: throughput as it was measured; empty: none was.
        min_tokens_per_s: tokens a second of one stream, at least.
        max_ttft_ms: milliseconds to the first token, at most.
        max_memory: most that loading and running may add to the process's memory (``2GB``).
        absent: why there are no figures.
    """
    demanded = (
        ("tokens-per-s", "tokens a second", min_tokens_per_s, _rate(figures), True),
        ("first-token", "ms to the first token", max_ttft_ms, _first(figures), False),
        (
            "memory",
            "resident bytes",
            None if max_memory is None else float(parse_bytes(max_memory)),
            _memory(figures),
            False,
        ),
    )
    found = []
    for name, metric, limit, (value, how), at_least in demanded:
        if limit is None:
            continue
        if value is None:
            found.append(
                GateResult(f"throughput/{name}", "skipped", metric, None, limit, how if figures else absent)
            )
            continue
        passed = value >= limit if at_least else value <= limit
        reason = f"{how}; {'at least' if at_least else 'at most'} what was demanded."
        found.append(
            GateResult(f"throughput/{name}", "passed" if passed else "failed", metric, value, limit, reason)
        )
    return found


def emulated(runtime: str) -> str:
    """Why a session's speed is nobody's."""
    return f"speed was not measured: here it runs on an {runtime}, whose speed says nothing of a device."


def _rate(figures: Mapping[str, Any]) -> tuple[float | None, str]:
    """Tokens a second of one stream: of the single-stream scenario, or of decoding after the longest prompt that was measured."""
    if one := figures.get("scenarios", {}).get("single-stream"):
        return one["tokens_per_s"], f"single stream, {one['samples']} requests with their prompts"
    if rows := figures.get("contexts"):
        row = rows[-1]
        return row[
            "decode_tokens_per_s"
        ], f"decoding after {row['context']} tokens, median of {row['samples']}"
    if rows := figures.get("encodings"):
        row = rows[-1]
        how = f"batch of {row['batch']} × {row['context']} tokens, median of {row['samples']} runs"
        return row["tokens_per_s"], how
    return None, "a plain module has no tokens."


def _first(figures: Mapping[str, Any]) -> tuple[float | None, str]:
    """Milliseconds to the first token: the highest percentile of the single-stream scenario, or the median after the longest prompt."""
    if one := figures.get("scenarios", {}).get("single-stream"):
        first = one["first_token"]
        name = max((key for key in first if key.startswith("p")), key=lambda key: int(key[1:]))
        return first[name][
            "value"
        ] * 1e3, f"{name} of {first['samples']} requests of {one['prompt_tokens']} tokens"
    if rows := figures.get("contexts"):
        return rows[-1][
            "first_token_s"
        ] * 1e3, f"a prompt of {rows[-1]['context']} tokens, median of the repeats"
    return None, "what generates nothing has no first token."


def _memory(figures: Mapping[str, Any]) -> tuple[float | None, str]:
    """Bytes that loading and running added, at most."""
    if not figures:
        return None, ""
    value = figures.get("peak_resident_bytes", figures["resident_bytes"])
    return float(value), "what loading and running added to the process's memory"
