"""MLPerf's scenarios on a package's runtime (Reddi et al., ISCA 2020): how long a user waits, and how much a machine gets done.

``single_stream`` sends a request when the one before is answered; ``offline`` has all requests at once; in ``server`` they come as they
like. Times are taken in the worker; what they say is worked out here, and what cannot be measured is told in ``skipped`` by name.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

import psutil

from tapeout.errors import TapeoutError
from tapeout.validate.batching import arrivals
from tapeout.validate.machine_state import Energy, State, energy_missing, noise
from tapeout.validate.measuring import LOADS, Asked, Place
from tapeout.validate.memory_watch import watched
from tapeout.validate.session import SessionSpec
from tapeout.validate.statistics import change, needed, summary, warm_up
from tapeout.validate.sweeps import context_sweep, thread_sweep
from tapeout.validate.worker import WorkerSession

__all__ = ["run"]

_SEQUENCES = 8  # answered together
_USUAL = 0.7  # the load that stands among the scenarios, or the one next to it; the others stand in the sweep


def run(place: Place, asked: Asked) -> dict[str, Any]:
    """Measure each scenario; see docs/throughput.md.

    Returns:
        ``scenarios`` by name, ``server_sweep``, ``context_sweep``, ``thread_sweep`` (rows), ``server_limit`` (``max_ttft_ms``,
        ``percentile``, and the largest ``load`` that keeps it with its ``arrivals_per_s``, None: no load does), ``skipped`` (pairs of
        name and reason), ``notes``.

    Raises:
        TapeoutError: ``asked.seconds`` are too few for the percentiles.
    """
    found: dict[str, Any] = {"scenarios": {}, "skipped": [], "notes": []}
    for name, measure in (
        ("single-stream", single_stream),
        ("offline", offline),
        ("server", server),
        ("context-sweep", context_sweep),
        ("thread-sweep", thread_sweep),
    ):
        if name in asked.scenarios:
            measure(place, asked, found)
    return {key: value for key, value in found.items() if value}


class _Run:
    """Requests of one scenario as they are timed, with what the machine says beside them."""

    def __init__(
        self, name: str, place: Place, asked: Asked, session: WorkerSession, *, queued: bool = False
    ) -> None:
        self._name, self._place, self._asked, self._session = name, place, asked, session
        self._queued = queued  # it begins with an empty queue, and faster than it goes on
        self.first: list[float] = []
        self.token: list[float] = []
        self.whole: list[float] = []
        self.took: list[float] = []  # wall seconds of each request's share of the machine
        self._before, self._own = State.read(asked.root), _processor_s(session)
        self._energy, self._begin = Energy(self._before), perf_counter()

    def add(self, first: float, last: float, new: int, took: float) -> None:
        """A request's seconds to its first and to its last token."""
        self.first.append(first)
        self.token.append((last - first) / (new - 1))
        self.whole.append(last)
        self.took.append(took)

    def more(self, wanted: int) -> bool:
        """Whether the steady state has fewer samples than are wanted; looks at the clock and at the machine."""
        self._energy.add(State.read(self._asked.root))
        count, elapsed, limit = len(self.whole), perf_counter() - self._begin, self._asked.seconds
        self._place.tell(self._name, count, wanted)
        steady = count - self._dropped
        if limit is None:
            return steady < wanted
        if count >= needed(0.5) and elapsed < limit and 2 * count * limit / elapsed < self._asked.needed:
            self._refuse(count * limit / elapsed, elapsed)
        if elapsed < limit and (self._asked.samples is None or steady < wanted):
            return True
        if steady < self._asked.needed:
            self._refuse(steady, elapsed)
        return False

    @property
    def _dropped(self) -> int:
        return warm_up(self.whole, slower=not self._queued)

    def _refuse(self, count: float, elapsed: float) -> None:
        each = elapsed / max(1, len(self.whole))
        raise TapeoutError(
            f"{self._asked.seconds:g} seconds are too few for {self._name}: this package answers about {count:.0f} requests in the steady "
            f"state in that time, and {self._asked.demand}. What fits: --seconds {math.ceil(1.5 * each * self._asked.needed)}, or "
            "fewer percentiles (--percentile 50)."
        )

    def result(self, new: int, **more: Any) -> dict[str, Any]:
        """Percentiles of the steady state, rates, energy, and what disturbed them."""
        after, own = State.read(self._asked.root), _processor_s(self._session) - self._own
        self._energy.add(after)
        dropped, percentiles = self._dropped, self._asked.percentiles
        steady = summary(self.whole[dropped:], (50, *percentiles))
        middle, notes = steady["p50"], []
        if dropped and dropped == len(self.whole) // 2:
            notes.append("it never came to a steady state: half of the run is left out as its warm-up")
        if not self._queued and (found := change(self.whole[dropped:])):
            notes.append(_changed(found.at + dropped, len(self.whole), found.before, found.after))
        wide = 0.0
        if middle and None not in (middle["low"], middle["high"]):
            wide = (middle["high"] - middle["low"]) / 2 / middle["value"]
        notes += noise(self._before, after, own, wide)
        missing = energy_missing(self._asked.root)
        return {
            "samples": len(self.whole) - dropped,
            "warm_up": dropped,
            "seconds": sum(self.took),
            "first_token": summary(self.first[dropped:], percentiles),
            "token": summary(self.token[dropped:], percentiles),
            "request": {key: value for key, value in steady.items() if key != "p50" or 50 in percentiles},
            "tokens_per_s": new * (len(self.whole) - dropped) / sum(self.took[dropped:]),
            "joules_per_token": None if missing else self._energy.joules / (new * len(self.whole)),
            "energy": missing
            or "RAPL: all of the processor's packages, idle cores too; tokens that were generated",
            **more,
            "notes": notes,
        }


def single_stream(place: Place, asked: Asked, found: dict[str, Any]) -> None:
    """One request after another."""
    prompt, new = place.request
    with place.opened(place.spec) as session, watched(session, "single-stream", asked.root):
        run, repeats = _Run("single-stream", place, asked, session), 1
        while run.more(asked.wanted):
            begin = perf_counter()
            timing = session.time(prompt, new - 1, repeats, warm=False)
            taken = perf_counter() - begin
            for first, rest in zip(timing.prefill_s, timing.decode_s, strict=True):
                run.add(first, first + sum(rest), new, first + sum(rest))
            repeats = _next(repeats, taken, asked.wanted)
        found["scenarios"]["single-stream"] = run.result(new, prompt_tokens=prompt, new_tokens=new)


def offline(place: Place, asked: Asked, found: dict[str, Any]) -> None:
    """All requests at once: so many as a session has sequences, wave after wave; without batches one after another."""
    prompt, new = place.request
    sequences, waves = _SEQUENCES, 2 * needed(0.5)  # the median's interval, after a warm-up as long as it
    spec = _batched(place, sequences, prompt + new)
    if isinstance(spec, str):
        found["skipped"].append(
            {"what": "offline/batches", "reason": f"{spec}; requests ran one after another"}
        )
        spec, sequences = place.spec, 1
    asked = replace(asked, percentiles=(50,), samples=waves)
    with place.opened(spec) as session, watched(session, "offline", asked.root):
        run = _Run("offline", place, asked, session)
        while run.more(waves):
            if sequences == 1:
                timing = session.time(prompt, new - 1, 1, warm=False)
                first, rest = timing.prefill_s[0], timing.decode_s[0]
                run.add(first, first + sum(rest), new, first + sum(rest))
                continue
            done = session.time_arrivals([0.0] * sequences, prompt, new)
            last = max(last for _, last in done)
            run.add(max(first for first, _ in done), last, new, last / sequences)
        measured = run.result(new, prompt_tokens=prompt, new_tokens=new, sequences=sequences)
    measured["requests_per_s"] = measured["tokens_per_s"] / new
    # Of a wave the times to its last first token and of a step say nothing to a user; its rate is the figure.
    wave = measured.pop("request")
    del measured["first_token"], measured["token"]
    measured["tokens_per_s_interval"] = [
        None if wave["p50"][end] is None else sequences * new / wave["p50"][end] for end in ("high", "low")
    ]
    found["scenarios"]["offline"] = measured


def server(place: Place, asked: Asked, found: dict[str, Any]) -> None:
    """Requests come as a Poisson process at shares of the offline rate, and are answered together."""
    prompt, new = place.request
    spec = _batched(place, _SEQUENCES, prompt + new)
    if isinstance(spec, str):
        found["skipped"].append({"what": "server", "reason": spec})
        return
    if "offline" not in found["scenarios"]:
        offline(place, replace(asked, seconds=None), found)
    capacity, loads = found["scenarios"]["offline"]["requests_per_s"], asked.loads or LOADS
    least = loads[0] * capacity
    if asked.seconds is not None and (count := int(least * asked.seconds)) < asked.needed:
        raise TapeoutError(
            f"{asked.seconds:g} seconds are too few for server: about {count} requests come in that time at a load of {loads[0]:g}, and "
            f"{asked.demand}. What fits: --seconds {math.ceil(1.25 * asked.needed / least)}, fewer percentiles (--percentile 50), or "
            "larger loads (--load)."
        )
    with place.opened(spec) as session, watched(session, "server", asked.root):
        rows = [_at_load(load, load * capacity, place, asked, session) for load in loads]
    found["server_sweep"] = rows
    found["scenarios"]["server"] = min(rows, key=lambda row: abs(row["load"] - _USUAL))
    if asked.max_ttft_ms is not None:
        found["server_limit"] = _largest(rows, asked.max_ttft_ms, f"p{max(asked.percentiles)}")


def _at_load(load: float, rate: float, place: Place, asked: Asked, session: WorkerSession) -> dict[str, Any]:
    """The server with ``rate`` requests a second."""
    prompt, new = place.request
    run, seed = _Run(f"server at load {load:g}", place, asked, session, queued=True), 0
    # In one piece, so that the queue is never emptied; a quarter more for the warm-up, which begins with an empty one.
    count = math.ceil(1.25 * asked.wanted) if asked.seconds is None else int(rate * asked.seconds)
    while run.more(asked.wanted):
        comes = arrivals(count, rate, seed)
        done = session.time_arrivals(comes, prompt, new)
        end = max(last for _, last in done)
        for at, (first, last) in zip(comes, done, strict=True):
            run.add(first - at, last - at, new, end / count)
        seed += 1
    measured = run.result(new, prompt_tokens=prompt, new_tokens=new, sequences=_SEQUENCES)
    return {**measured, "arrivals_per_s": rate, "load": load, "seed": 0}


def _largest(rows: Sequence[Mapping[str, Any]], limit_ms: float, percentile: str) -> dict[str, Any]:
    """The largest load at which, and below which, a percentile of the time to the first token keeps a limit."""
    kept = list(
        itertools.takewhile(lambda row: row["first_token"][percentile]["value"] * 1e3 <= limit_ms, rows)
    )
    last = kept[-1] if kept else {"load": None, "arrivals_per_s": None}
    return {
        "max_ttft_ms": limit_ms,
        "percentile": percentile,
        "load": last["load"],
        "arrivals_per_s": last["arrivals_per_s"],
    }


def _batched(place: Place, sequences: int, context: int) -> SessionSpec | str:
    """The session that answers several requests at once, or why there is none."""
    runtime = place.spec.factory.partition(":")[0].rpartition(".")[2]
    if place.batched is None:
        return f"the session of {runtime} takes one sequence at a time"
    if context > place.context:
        return f"the package's context of {place.context} tokens has no room for a request"
    spec = place.batched(sequences, context)
    try:
        with place.opened(spec):
            return spec
    except TapeoutError as error:
        if error.status != 2:
            raise
        return str(error).rstrip(".")


def _changed(at: int, count: int, before: float, after: float) -> str:
    if after > before:
        return (
            f"from request {at + 1} of {count} on a request took {after / before - 1:.0%} longer ({after * 1e3:.3g} ms, before "
            f"{before * 1e3:.3g} ms): the machine throttles, or others take its time"
        )
    return (
        f"from request {at + 1} of {count} on a request took {1 - after / before:.0%} less ({after * 1e3:.3g} ms, before "
        f"{before * 1e3:.3g} ms): others took the machine's time before"
    )


def _next(repeats: int, taken: float, most: int) -> int:
    """Requests of the next call: about a second's, so that clock, memory and machine are looked at meanwhile."""
    return max(1, min(most, 2 * repeats, int(repeats / max(taken, 1e-9))))


def _processor_s(session: WorkerSession) -> float:
    """Processor seconds that the worker took so far."""
    times = psutil.Process(session.pid).cpu_times()
    return times.user + times.system
