"""Sweeps: one thing changes, and prefill and decode are measured again."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import psutil

from tapeout.errors import MemoryShort
from tapeout.validate.measuring import CONTEXTS, Asked, Place
from tapeout.validate.memory_watch import room_for, watched
from tapeout.validate.statistics import needed, summary
from tapeout.validate.worker import WorkerSession

__all__ = ["context_sweep", "thread_sweep"]

_NEW = 32  # tokens after each prompt


def context_sweep(place: Place, asked: Asked, found: dict[str, Any]) -> None:
    """Prefill and decode against the tokens that are there already, with the bytes of keys and values that attention reads."""
    wanted = asked.contexts or CONTEXTS
    lengths = [length for length in wanted if length + 2 <= place.context]
    for length in wanted:
        if length not in lengths:
            reason = f"the package's context is {place.full} tokens"
            if place.full >= length + 2:
                reason = (
                    f"of the package's {place.full} tokens the memory at hand has room for {place.context}"
                )
            found["skipped"].append({"what": f"context-sweep/{length}", "reason": reason})
    last = place.context - min(_NEW, place.context // 2)
    if asked.contexts is None and len(lengths) < len(wanted) and last not in lengths:
        lengths = sorted({*lengths, last})
    rows: list[dict[str, Any]] = []
    found["context_sweep"], at = rows, 0
    try:
        with place.opened(place.spec) as session, watched(session, "context-sweep", asked.root):
            for at, length in enumerate(lengths):
                place.tell("context-sweep", at, len(lengths))
                cache = session.cache_bytes(length)
                cache = place.cache_bytes(length) if cache is None else cache
                if short := room_for(cache - (rows[-1]["cache_bytes"] if rows else 0), asked.root):
                    found["skipped"].append({"what": f"context-sweep/{length}", "reason": short})
                    continue
                new = min(_NEW, place.context - length)
                timings = [session.time(length, new, 1, warm=not rows)]
                if timings[0].prefill_s[0] < 2:
                    timings.append(session.time(length, new, needed(0.5) - 1, warm=False))
                prefill = [second for timing in timings for second in timing.prefill_s]
                tokens = [second for timing in timings for repeat in timing.decode_s for second in repeat]
                rows.append(
                    {
                        "context": length,
                        "cache_bytes": cache,
                        "prefill_s": statistics.median(prefill),
                        **_token(tokens),
                        "prefill_tokens_per_s": length / statistics.median(prefill),
                        "resident_bytes": _resident(session),
                    }
                )
    except MemoryShort as error:
        for length in lengths[at:]:
            found["skipped"].append({"what": f"context-sweep/{length}", "reason": str(error)})


def thread_sweep(place: Place, asked: Asked, found: dict[str, Any]) -> None:
    """Prefill and decode with 1, 2, 4 … threads, up to as many as there are cores."""
    if "threads" not in place.spec.arguments:
        reason = f"the session of {place.spec.factory.partition(':')[0].rpartition('.')[2]} takes no number of threads"
        found["skipped"].append({"what": "thread-sweep", "reason": reason})
        return
    counts = sorted(
        {2**power for power in range(place.cores.bit_length()) if 2**power < place.cores} | {place.cores}
    )
    prompt, new = place.request
    rows = []
    for at, count in enumerate(counts):
        place.tell("thread-sweep", at, len(counts))
        spec = replace(place.spec, arguments={**place.spec.arguments, "threads": count})
        with place.opened(spec) as session, watched(session, "thread-sweep", asked.root):
            timing = session.time(prompt, new, needed(0.5))
        prefill = statistics.median(timing.prefill_s)
        tokens = [second for repeat in timing.decode_s for second in repeat]
        rows.append(
            {
                "threads": count,
                "prefill_s": prefill,
                "prefill_tokens_per_s": prompt / prefill,
                **_token(tokens),
            }
        )
    found["thread_sweep"] = rows


def _token(tokens: Sequence[float]) -> dict[str, Any]:
    """The median of a token with its interval, in seconds."""
    middle = summary(tokens, (50,))["p50"] or {"value": statistics.median(tokens), "low": None, "high": None}
    return {
        "token_p50_s": middle["value"],
        "token_low_s": middle["low"],
        "token_high_s": middle["high"],
        "samples": len(tokens),
        "decode_tokens_per_s": 1 / middle["value"],
    }


def _resident(session: WorkerSession) -> int:
    return int(psutil.Process(session.pid).memory_info().rss)
