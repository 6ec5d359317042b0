"""Seconds and memory of each stage of a run."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from time import perf_counter
from types import TracebackType
from typing import Any

import psutil

__all__ = ["Watch"]

_REST = 100.0  # times as long as a reading took: it costs a hundredth of a core at most
_LEAST_S = 0.02
_FAMILY_S = 2.0  # between two looks for workers that were started since: a look through all of the machine's processes
_POINTS = 200  # of a curve

Point = tuple[float, int]


class Watch:
    """Takes down the stages of a run, and while it is entered the resident memory of this process and of those below it.

    A thread reads it some times a second. Pages that several of the processes map count in each; what lives shorter than a rest
    is not seen. A watch that nobody entered keeps seconds alone.
    """

    def __init__(self) -> None:
        self._stages: list[dict[str, Any]] = []
        self._points: list[Point] = []
        self._family: list[psutil.Process] = []
        self._looked = -_FAMILY_S
        self._begun = self._peak = 0.0
        self._entered = 0
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Watch:
        self._entered += 1
        if self._thread is None:
            self._begun = perf_counter()
            self._thread = threading.Thread(target=self._run, name="tapeout-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered -= 1
        if self._entered == 0 and self._thread:
            self._ended.set()
            self._thread.join()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage of the run, from its begin to its end; one at a time."""
        begin = perf_counter()
        if self._thread:
            self._peak = 0.0
            self._read()
        try:
            yield
        finally:
            taken: dict[str, Any] = {"name": name, "seconds": perf_counter() - begin}
            if self._thread:
                self._read()
                taken |= {"begin_s": begin - self._begun, "peak_bytes": int(self._peak)}
            self._stages.append(taken)

    def findings(self) -> dict[str, Any]:
        """``stages`` (name, seconds, begin_s, peak_bytes) and ``memory`` (points [seconds, bytes], peak_bytes) of a report."""
        with self._lock:
            points = _thinned(self._points, _POINTS)
        found: dict[str, Any] = {"stages": list(self._stages)} if self._stages else {}
        if points:
            shown = [[round(second, 3), count] for second, count in points]
            found["memory"] = {"points": shown, "peak_bytes": max(count for _, count in points)}
        return found

    def _run(self) -> None:
        rest = 0.0
        while not self._ended.wait(rest):
            begin = perf_counter()
            self._read()
            rest = max(_LEAST_S, _REST * (perf_counter() - begin))

    def _read(self) -> None:
        with self._lock:
            now = perf_counter() - self._begun
            if now - self._looked >= _FAMILY_S:
                me = psutil.Process()
                self._family, self._looked = [me, *me.children(recursive=True)], now
            count = 0
            for process in self._family:
                with contextlib.suppress(psutil.Error):  # it has ended since
                    count += process.memory_info().rss
            self._peak = max(self._peak, count)
            self._points.append((now, count))
            if len(self._points) >= 4 * _POINTS:
                self._points = _thinned(self._points, 2 * _POINTS)


def _thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most so many points: of neighbours the one with the most bytes stands for all."""
    step = -(-len(points) // most) if points else 1
    return [max(points[at : at + step], key=lambda each: each[1]) for at in range(0, len(points), step)]
