"""Throughput on this machine, with the machine's own bandwidth measured in the same run."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import psutil

from tapeout.exporters import Artifact
from tapeout.validate.statistics import summary
from tapeout.validate.worker import WorkerSession

_ARRAY_BYTES = 256 << 20  # of all threads' arrays together: several times any last-level cache
READ_BY = "every core summing an array larger than the caches, the best of five"
"""How ``bandwidth`` measures."""
_NEW_TOKENS, _REPEATS = 32, 3
_ENCODINGS = 20  # repeats of an encoder's run, of which quantiles are taken


def machine() -> dict[str, Any]:
    """What the figures were measured on: processor, cores, memory, system; no host name."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = [
            line.split(":", 1)[1].strip()
            for line in cpuinfo.read_text().splitlines()
            if line.startswith("model name")
        ]
        model = named[0] if named else model
    return {
        "processor": model,
        "architecture": platform.machine(),
        "cores": cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release().split('-')[0]}",
        "python": platform.python_version(),
    }


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def bandwidth(threads: int | None = None) -> float:
    """Bytes a second that this machine's cores read from memory together: the best of five passes.

    Each thread sums an array of its own, all of them several times larger than the last cache together.
    """
    threads = threads or cores()
    arrays = [np.ones(_ARRAY_BYTES // threads // 8, np.uint64) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(5):
            begin = perf_counter()
            list(pool.map(np.bitwise_or.reduce, arrays))
            best = max(best, sum(array.nbytes for array in arrays) / (perf_counter() - begin))
    return best


def measure_throughput(
    session: WorkerSession, artifact: Artifact, contexts: Sequence[int] = ()
) -> dict[str, Any]:
    """Time a session: warm-up apart, three repeats, medians.

    Args:
        session: the artifact as it is deployed.
        artifact: says how many bytes a token reads.
        contexts: prompt lengths in tokens; default: 16, 128 and 512 as far as the context goes.

    Returns:
        runtime, device, load_s, resident_bytes, peak_resident_bytes, bytes_per_token, bandwidth_bytes_per_s, and for each of
        ``contexts``: first_token_s (median seconds of the prompt, whose last logits the first token follows from), token_p50_s,
        token_p90_s, token_p99_s (None: fewer samples than it needs), token_low_s and token_high_s (of the median, with 95 %), samples,
        prefill_tokens_per_s, decode_tokens_per_s, roofline_fraction (bytes read a second by decoding / bandwidth).
    """
    facts = session.facts
    reading = facts.bandwidth or bandwidth()
    rows = []
    before = peak = _resident(session)
    room = facts.context - 1
    for context in contexts or sorted(
        {min(length, room - min(_NEW_TOKENS, room // 2)) for length in (16, 128, 512)}
    ):
        new = max(1, min(_NEW_TOKENS, facts.context - context))
        timing = session.time(context, new, _REPEATS)
        tokens = [second for repeat in timing.decode_s for second in repeat]
        prefill, p50 = statistics.median(timing.prefill_s), statistics.median(tokens)
        peak = max(peak, _resident(session))
        rows.append(
            {
                "context": context,
                "first_token_s": prefill,
                **_quantiles(tokens, "token"),
                "prefill_tokens_per_s": context / prefill,
                "decode_tokens_per_s": 1 / p50,
                "roofline_fraction": artifact.bytes_per_token / p50 / reading,
            }
        )
    return {
        "runtime": facts.runtime,
        "device": facts.device,
        "load_s": facts.load_s,
        "resident_bytes": facts.resident_bytes,
        "peak_resident_bytes": facts.resident_bytes + peak - before,
        "bytes_per_token": artifact.bytes_per_token,
        "bandwidth_bytes_per_s": reading,
        "contexts": rows,
    }


def _quantiles(times: Sequence[float], what: str) -> dict[str, Any]:
    """The median in seconds with its interval, p90 and p99 where the samples carry them, and how many there are."""
    found = summary(times)
    middle = found["p50"] or {"value": statistics.median(times), "low": None, "high": None}
    values = {f"p{each}": (found[f"p{each}"] or {"value": None})["value"] for each in (90, 99)}
    return {
        f"{what}_p50_s": middle["value"],
        f"{what}_p90_s": values["p90"],
        f"{what}_p99_s": values["p99"],
        f"{what}_low_s": middle["low"],
        f"{what}_high_s": middle["high"],
        "samples": len(times),
    }


def _resident(session: WorkerSession) -> int:
    """Bytes of the worker's memory; 0: the session has no process of its own."""
    pid = getattr(session, "pid", None)
    return int(psutil.Process(pid).memory_info().rss) if pid else 0


def measure_module(session: WorkerSession, artifact: Artifact, samples: int) -> dict[str, Any]:
    """Time a module's session on its first sample: warm-up apart, 20 repeats.

    Args:
        session: the artifact as it is deployed.
        artifact: says how many bytes of weights a run reads.
        samples: how many the session has.

    Returns:
        runtime, device, load_s, resident_bytes, bytes_per_token (of one run), bandwidth_bytes_per_s, and ``runs``: one of run_p50_s,
        run_p90_s, run_p99_s, run_low_s, run_high_s (as ``measure_throughput`` has them of a token), samples (runs timed).
    """
    facts = session.facts
    times = session.time_inference(samples, _ENCODINGS)
    return {
        "runtime": facts.runtime,
        "device": facts.device,
        "load_s": facts.load_s,
        "resident_bytes": facts.resident_bytes,
        "bytes_per_token": artifact.bytes_per_token,
        "bandwidth_bytes_per_s": bandwidth(),
        "runs": [_quantiles(times, "run")],
    }


def measure_encoder(
    session: WorkerSession, artifact: Artifact, contexts: Sequence[int] = ()
) -> dict[str, Any]:
    """Time an encoder's session: warm-up apart, 20 repeats, batches of 1 and 8.

    Args:
        session: the artifact as it is deployed.
        artifact: says how many bytes of weights a run reads.
        contexts: lengths of sequences in tokens; default: 16 and 128 as far as the context goes.

    Returns:
        runtime, device, load_s, resident_bytes, bytes_per_token, bandwidth_bytes_per_s, and for each of ``encodings``: batch,
        context, run_p50_s, run_p90_s, run_p99_s, run_low_s, run_high_s, samples, sequences_per_s, tokens_per_s (of the median run).
    """
    facts = session.facts
    rows = []
    for context in contexts or sorted({min(length, facts.context) for length in (16, 128)}):
        for batch in (1, 8):
            times = session.time_encoding(batch, context, _ENCODINGS)
            p50 = statistics.median(times)
            rows.append(
                {
                    "batch": batch,
                    "context": context,
                    **_quantiles(times, "run"),
                    "sequences_per_s": batch / p50,
                    "tokens_per_s": batch * context / p50,
                }
            )
    return {
        "runtime": facts.runtime,
        "device": facts.device,
        "load_s": facts.load_s,
        "resident_bytes": facts.resident_bytes,
        "bytes_per_token": artifact.bytes_per_token,
        "bandwidth_bytes_per_s": bandwidth(),
        "encodings": rows,
    }
