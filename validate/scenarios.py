"""MLPerf's scenarios on a package's runtime (Reddi et al., ISCA 2020): how long a user waits, and how much a machine gets done.

``single_stream`` sends a request when the one before is answered; ``offline`` has all requests at once; in ``server`` they come as they
like. ``context_sweep`` and ``thread_sweep`` change one thing and measure again. Times are taken in the worker; what they say is worked
out here, and what cannot be measured is told in ``skipped`` by name.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Thread
from time import perf_counter
from typing import Any

import psutil

from tapeout.errors import MemoryShort, TapeoutError
from tapeout.validate.batching import arrivals
from tapeout.validate.machine_state import Energy, State, energy_missing, memory_at_hand, noise
from tapeout.validate.session import SessionSpec
from tapeout.validate.statistics import change, needed, summary, warm_up
from tapeout.validate.worker import WorkerSession

__all__ = ["SCENARIOS", "Asked", "Place", "room_for", "run"]

SCENARIOS = ("single-stream", "offline", "server", "context-sweep", "thread-sweep")
CONTEXTS = (128, 512, 2048, 8192, 32768)
_PROMPT, _NEW = 128, 16  # tokens of a request, as far as the context goes
_SEQUENCES = 8  # answered together
_LOAD = 0.7  # of the offline rate: the rate at which requests come to the server
_SWEPT_NEW = 32
_WATCH_S = 0.05


@dataclass(frozen=True)
class Asked:
    """What is wanted of a measurement.

    Attributes:
        scenarios: names of SCENARIOS.
        percentiles: of latencies, from 1 to 99.
        samples: requests in the steady state; None: as many as the highest percentile needs.
        seconds: most that a scenario may measure; None: until the samples are there.
        contexts: of the context sweep; None: CONTEXTS as far as the package's goes, and what is left of its own.
        root: the directory that stands for ``/`` where the machine is asked of its state.
    """

    scenarios: tuple[str, ...] = ()
    percentiles: tuple[int, ...] = (50, 90, 99)
    samples: int | None = None
    seconds: float | None = None
    contexts: tuple[int, ...] | None = None
    root: Path = Path("/")

    def __post_init__(self) -> None:
        """TapeoutError for what does not exist, and for fewer samples than the percentiles need, with the count that they do."""
        for name in self.scenarios:
            if name not in SCENARIOS:
                raise TapeoutError(f"'{name}' is not a scenario. What fits: {', '.join(SCENARIOS)}.")
        for percentile in self.percentiles:
            if not 1 <= percentile <= 99:
                raise TapeoutError(f"p{percentile} is not a percentile. What fits: 1 to 99.")
        if not self.percentiles:
            raise TapeoutError("no percentile was asked for. What fits: 1 to 99.")
        if self.seconds is not None and not self.seconds > 0:
            raise TapeoutError(f"{self.seconds} seconds are no time to measure in. What fits: more than 0.")
        if self.samples is not None and self.samples < self.needed:
            raise TapeoutError(f"{self.samples} samples are too few: {self.demand}.")

    @property
    def needed(self) -> int:
        """Samples that the most demanding percentile needs."""
        return max(needed(percentile / 100) for percentile in self.percentiles)

    @property
    def wanted(self) -> int:
        """Samples to take in the steady state."""
        return self.samples or self.needed

    @property
    def demand(self) -> str:
        """What each percentile needs, in words."""
        each = ", ".join(f"p{percentile} needs {needed(percentile / 100)}" for percentile in self.percentiles)
        return f"{each} (below that no interval holds it with 95 %)"


@dataclass(frozen=True)
class Place:
    """A package where it is measured.

    Attributes:
        spec: the artifact as it is deployed. opened: opens a session in a worker for as long as a ``with`` lasts.
        batched: gives the session for so many sequences of so many tokens each; None: the target has none.
        context: most tokens of a sequence here. full: most that the package allows. cores: that the process may use.
        cache_bytes: bytes of keys and values of that many tokens, where the session itself does not say.
        progress: called with (stage, done, total).
    """

    spec: SessionSpec
    opened: Callable[[SessionSpec], AbstractContextManager[WorkerSession]]
    batched: Callable[[int, int], SessionSpec] | None
    context: int
    full: int
    cores: int
    cache_bytes: Callable[[int], int]
    progress: Callable[[str, int, int], None] | None = None

    def tell(self, stage: str, done: int, total: int) -> None:
        """Say how far a stage is."""
        if self.progress:
            self.progress(stage, min(done, total), total)

    @property
    def request(self) -> tuple[int, int]:
        """Tokens of a request's prompt and of its answer."""
        new = min(_NEW, max(2, self.context // 4))
        return max(1, min(_PROMPT, self.context - new)), new


def run(place: Place, asked: Asked) -> dict[str, Any]:
    """Measure each scenario; see docs/throughput.md.

    Returns:
        ``scenarios`` by name, ``context_sweep``, ``thread_sweep`` (rows), ``skipped`` (pairs of name and reason), ``notes``.

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

    def __init__(self, name: str, place: Place, asked: Asked, session: WorkerSession) -> None:
        self._name, self._place, self._asked, self._session = name, place, asked, session
        self._queued = name == "server"  # it begins with an empty queue, and faster than it goes on
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
    """Requests come as a Poisson process at a share of the offline rate, and are answered together."""
    prompt, new = place.request
    spec = _batched(place, _SEQUENCES, prompt + new)
    if isinstance(spec, str):
        found["skipped"].append({"what": "server", "reason": spec})
        return
    if "offline" not in found["scenarios"]:
        offline(place, replace(asked, seconds=None), found)
    rate = _LOAD * found["scenarios"]["offline"]["requests_per_s"]
    with place.opened(spec) as session, watched(session, "server", asked.root):
        run, seed = _Run("server", place, asked, session), 0
        # In one piece, so that the queue is never emptied; a quarter more for the warm-up, which begins with an empty one.
        count = math.ceil(1.25 * asked.wanted)
        if asked.seconds is not None and (count := int(rate * asked.seconds)) < asked.needed:
            raise TapeoutError(
                f"{asked.seconds:g} seconds are too few for server: about {count} requests come in that time, and {asked.demand}. "
                f"What fits: --seconds {math.ceil(1.25 * asked.needed / rate)}, or fewer percentiles (--percentile 50)."
            )
        while run.more(asked.wanted):
            comes = arrivals(count, rate, seed)
            done = session.time_arrivals(comes, prompt, new)
            end = max(last for _, last in done)
            for at, (first, last) in zip(comes, done, strict=True):
                run.add(first - at, last - at, new, end / count)
            seed += 1
        measured = run.result(new, prompt_tokens=prompt, new_tokens=new, sequences=_SEQUENCES)
    found["scenarios"]["server"] = {**measured, "arrivals_per_s": rate, "load": _LOAD, "seed": 0}


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
    last = place.context - min(_SWEPT_NEW, place.context // 2)
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
                new = min(_SWEPT_NEW, place.context - length)
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


def room_for(count: int, root: Path = Path("/")) -> str | None:
    """Why so many bytes more are not to be taken; None: there is room."""
    left = memory_at_hand(root) - _reserve()
    if count <= left:
        return None
    return f"it takes {count / 1e9:.3g} GB more, and {max(0, left) / 1e9:.3g} GB of memory are at hand"


@contextmanager
def watched(session: WorkerSession, name: str, root: Path) -> Iterator[None]:
    """End the worker when less memory than the reserve is left, before the system ends something of its own choice."""
    over, low = Event(), Event()

    def watch() -> None:
        while not over.wait(_WATCH_S):
            if (left := memory_at_hand(root)) < _reserve():
                low.set()
                session.stop(
                    f"{name} was stopped: {left / 1e6:.0f} MB of memory were left, less than the {_reserve() / 1e6:.0f} MB in reserve"
                )
                return

    thread = Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    except TapeoutError as error:
        if low.is_set():
            raise MemoryShort(str(error)) from None
        raise
    finally:
        over.set()
        thread.join()


def _reserve() -> int:
    """What is left to the system: as much as a process can fill between two looks (at 4 GB/s), but no more than a 16th of the memory."""
    return min(200 << 20, psutil.virtual_memory().total // 16)


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


def _resident(session: WorkerSession) -> int:
    return int(psutil.Process(session.pid).memory_info().rss)
