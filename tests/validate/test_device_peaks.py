"""What a device reads and multiplies, measured on the processor by the code that a GPU runs; and its events, on a stand-in for them."""

from __future__ import annotations

from typing import Any

import pytest

from tapeout.validate import device_peaks
from tapeout.validate.device_peaks import copy_bandwidth, matmul_peaks, seconds
from tapeout.validate.roofline import roofline
from tapeout.validate.speed_page import roof_words, speed_charts

torch = pytest.importorskip("torch")


def test_on_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    took: list[float] = []
    timed = device_peaks._timed

    def told(work: Any, device: str) -> float:
        took.append(timed(work, device))
        return took[-1]

    monkeypatch.setattr(device_peaks, "_timed", told)
    assert copy_bandwidth("cpu", 1 << 22) == 2 * (1 << 22) / min(took)
    assert len(took) == 10
    took.clear()
    rows = matmul_peaks("cpu", ("float32", "bfloat16", "float32"), side=64)
    assert [row["type"] for row in rows] == ["float32", "bfloat16"]
    assert [row["operations_per_s"] for row in rows] == [
        2 * 64**3 / min(part) for part in (took[:10], took[10:])
    ]
    assert rows[0]["measured_with"] == "torch.matmul of 64², the best of 10"


class Event:
    """One of CUDA's, on a device that is always a second behind whoever calls."""

    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at: float = Event.clock

    def synchronize(self) -> None:
        assert self.at == Event.clock

    def elapsed_time(self, end: Event) -> float:
        return 1e3 * (end.at - self.at)


def test_a_gpu_is_timed_by_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    calls: list[str] = []

    def work() -> None:
        calls.append("work")
        Event.clock += 0.25

    def before() -> None:
        calls.append("before")
        Event.clock += 7

    assert seconds(work, "cuda:0", 4, before) == [0.25] * 4
    assert calls == ["work"] * 3 + ["before", "work"] * 4


def test_less_is_measured_where_there_is_less_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (400 << 20, 1 << 34))
    assert device_peaks._fitting(1 << 30, "cuda") == 100 << 20
    assert device_peaks._fitting(1 << 20, "cuda") == 1 << 20
    assert device_peaks._fitting(1 << 40, "cpu") == 1 << 40


def test_the_page_says_what_was_measured_and_how() -> None:
    known = {"weights": 10**9, "attention": []}
    rows = matmul_peaks("cpu", ("float32",), side=64)
    row = {"context": 16, "cache_bytes": 0, "prefill_s": 1.0, "token_s": 1.0}
    drawn = roofline(known, 10**9, 4.8e12, rows, [row])
    drawn |= {"device": "NVIDIA H200", "bandwidth_measured_with": "copying"}
    words = roof_words(drawn)
    assert words.startswith("Measured on NVIDIA H200: 4,800 GB/s (copying), ")
    assert "G float32 operations/s (torch.matmul of 64², the best of 10)" in words
    assert "roofline" in speed_charts({"roofline": drawn})
