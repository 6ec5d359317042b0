"""What the device of a session reads, writes, multiplies and adds, measured there by torch: a GPU's side of the roofline.

ROCm's torch has the same names as CUDA's. Times are those of the device's own events; on ``cpu``, where the same code runs, of the clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter
from typing import Any

__all__ = ["copy_bandwidth", "matmul_peaks", "roof", "seconds"]

_COPIED = 1 << 30  # bytes, several times any GPU's cache
_SIDE = 8192  # rows and columns, of which every unit has its share
_WARM, _REPEATS = 3, 10


def seconds(
    work: Callable[[], object],
    device: str,
    repeats: int = _REPEATS,
    before: Callable[[], object] | None = None,
) -> list[float]:
    """Seconds of each of ``repeats`` calls on a device, after three that choose and compile kernels and do not count.

    Args:
        work: what is timed; it may return before the device is done.
        device: of torch.
        repeats: how often.
        before: called before each, outside of the time.
    """
    for _ in range(_WARM):
        work()
    found = []
    for _ in range(repeats):
        if before:
            before()
        found.append(_timed(work, device))
    return found


def _timed(work: Callable[[], object], device: str) -> float:
    import torch

    if torch.device(device).type != "cuda":
        at = perf_counter()
        work()
        return perf_counter() - at
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def copy_bandwidth(device: str, count: int = _COPIED) -> float:
    """Bytes a second that a device reads and writes together when it copies ``count`` bytes within its memory: the best of ten."""
    import torch

    source = torch.empty(_fitting(count, device), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    moved, best = 2 * source.nbytes, min(seconds(partial(target.copy_, source), device))
    del source, target
    _give_back(device)
    return float(moved / best)


def matmul_peaks(device: str, types: Sequence[str], side: int = _SIDE) -> list[dict[str, Any]]:
    """Operations a second of torch's matmul of square matrices, by type; see ``roofline.peaks``, whose rows they are.

    Args:
        device: of torch.
        types: torch's names, such as float16.
        side: rows and columns.
    """
    import torch

    # Two factors and a product in float32.
    while side > 1024 and _fitting(12 * side**2, device) < 12 * side**2:
        side //= 2
    found = []
    for name in dict.fromkeys(types):
        one, two = (torch.randn(side, side, device=device).to(getattr(torch, name)) for _ in range(2))
        best = min(seconds(partial(torch.matmul, one, two), device))
        told = f"torch.matmul of {side}², the best of {_REPEATS}"
        found.append({"type": name, "operations_per_s": 2 * side**3 / best, "measured_with": told})
        del one, two
    _give_back(device)
    return found


def roof(device: str, types: Sequence[str], chunk: int) -> dict[str, Any]:
    """What a session on a device tells of it besides its bandwidth: ``peaks``, ``bandwidth_measured_with``, and ``chunk``, the tokens of a prompt at once."""
    words = f"copying within the device's memory, read and written, the best of {_REPEATS}"
    return {"peaks": matmul_peaks(device, types), "bandwidth_measured_with": words, "chunk": chunk}


def _give_back(device: str) -> None:
    """What was allocated stays with torch otherwise, and others on the device find less."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


def _fitting(count: int, device: str) -> int:
    """As many bytes as a quarter of a GPU's free memory has room for, at most ``count``."""
    import torch

    if torch.device(device).type != "cuda":
        return count
    return min(count, int(torch.cuda.mem_get_info(torch.device(device))[0]) // 4)
