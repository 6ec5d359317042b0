"""What is wanted of a measurement, and where it is made."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from tapeout.errors import TapeoutError
from tapeout.validate.session import SessionSpec
from tapeout.validate.statistics import needed
from tapeout.validate.worker import WorkerSession

__all__ = ["CONTEXTS", "LOADS", "SCENARIOS", "Asked", "Place"]

SCENARIOS = ("single-stream", "offline", "server", "context-sweep", "thread-sweep")
CONTEXTS = (128, 512, 2048, 8192, 32768)
LOADS = (0.3, 0.5, 0.7, 0.9)
_PROMPT, _NEW = 128, 16  # tokens of a request, as far as the context goes


@dataclass(frozen=True)
class Asked:
    """What is wanted of a measurement.

    Attributes:
        scenarios: names of SCENARIOS.
        percentiles: of latencies, from 1 to 99.
        samples: requests in the steady state; None: as many as the highest percentile needs.
        seconds: most that a scenario may measure; None: until the samples are there.
        contexts: of the context sweep; None: CONTEXTS as far as the package's goes, and what is left of its own.
        loads: of the server, ascending: shares of the offline rate at which requests come; None: LOADS.
        max_ttft_ms: milliseconds to the first token that the largest load which keeps them is looked for of; None: of none.
        root: the directory that stands for ``/`` where the machine is asked of its state.
    """

    scenarios: tuple[str, ...] = ()
    percentiles: tuple[int, ...] = (50, 90, 99)
    samples: int | None = None
    seconds: float | None = None
    contexts: tuple[int, ...] | None = None
    loads: tuple[float, ...] | None = None
    max_ttft_ms: float | None = None
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
        for load in self.loads or ():
            if not 0 < load <= 1:
                raise TapeoutError(
                    f"a load of {load:g} cannot be measured: above the offline rate the queue only grows, and a latency says how long one "
                    "waited for it. What fits: above 0, at most 1."
                )
        if self.loads and "server" not in self.scenarios:
            raise TapeoutError("loads are of the scenario server. What fits: --scenario server with them.")
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
