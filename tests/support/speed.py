"""Figures of every scenario, as a machine that throttles would give them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tapeout.validate.roofline import roofline
from tapeout.validate.statistics import summary


def measured(short: Mapping[str, Any]) -> dict[str, Any]:
    """The short measurement of a decoder, with all that ``tapeout bench`` may add to it."""
    times = np.random.default_rng(0).lognormal(-5, 0.2, 400)
    common = {
        "samples": 400, "warm_up": 12, "seconds": 9.5, "prompt_tokens": 128, "new_tokens": 16, "joules_per_token": 0.25,
        "energy": "RAPL", "tokens_per_s": 1234.5, "notes": [],
    }  # fmt: skip
    stream = common | {key: summary(times) for key in ("first_token", "token", "request")}
    stream["notes"] = ["from request 190 of 400 on a request took 34% longer: <the machine> throttles"]
    server = common | {"first_token": summary(times[:40]), "token": summary(times), "request": summary(times)}
    server |= {"sequences": 8, "arrivals_per_s": 70.0, "load": 0.7, "seed": 0, "joules_per_token": None}
    server["energy"] = "there are no counters"
    loads = [
        server
        | {"load": load, "arrivals_per_s": 100 * load, "first_token": summary(times / (1 - load))}
        | ({"notes": ["<other processes> took 5%"]} if load == 0.3 else {})
        for load in (0.3, 0.5, 0.7, 0.9)
    ]
    offline = common | {"sequences": 8, "requests_per_s": 100.0, "tokens_per_s_interval": [1e3, None]}
    lengths = (128, 512, 2048, 8192, 32768)
    sweep = [
        {
            "context": length,
            "cache_bytes": 1000 * length,
            "prefill_s": 4e-3 * length + 1e-7 * length**2,
            "token_p50_s": 5e-3 + 1e-7 * length,
            "token_low_s": None,
            "token_high_s": 1.0,
            "samples": 5,
            "prefill_tokens_per_s": 1e6 / length**0.5,
            "decode_tokens_per_s": 900.0,
        }
        for length in lengths
    ]
    threads = [
        {
            "threads": n,
            "prefill_s": 1 / n,
            "prefill_tokens_per_s": 9.0 * n,
            "token_p50_s": 1 / n,
            "decode_tokens_per_s": 30.0 * n,
        }
        for n in (1, 2, 4, 6)
    ]
    peaks = [{"type": "float32", "operations_per_s": 1e11, "measured_with": "numpy's BLAS"}]
    known = {"weights": 200_000_000, "attention": [{"window": None, "per_position": 5000}]}
    rows = [row | {"token_s": row["token_p50_s"]} for row in sweep]
    return dict(short) | {
        "scenarios": {"offline": offline, "server": loads[2], "single-stream": stream},
        "server_sweep": loads,
        "server_limit": {"max_ttft_ms": 25.0, "percentile": "p99", "load": 0.5, "arrivals_per_s": 50.0},
        "context_sweep": sweep,
        "thread_sweep": threads,
        "skipped": [
            {"what": "context-sweep/131072", "reason": "it takes 9 GB more, and 3 GB of memory are at hand"}
        ],
        "operations_per_token": known,
        "roofline": roofline(known, 100_000_000, 3e10, peaks, rows),
    }
