"""Whether cells got worse than an earlier run: verdict, quality, size and speed, each within the margin that the file states."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tapeout.errors import PackageError
from tapeout.matrix.file import Margins
from tapeout.matrix.tasks import FORMAT_VERSION, Outcome

FLOOR = 16 * 2**-24
"""Nats that say nothing: what rounding to float32 moves the logarithm of a probability by, of logits that are 16 large."""

_MANY = 4
"""Measurements of a speed that --speed comes to: the export's own, and three alone."""


@dataclass(frozen=True)
class Change:
    """A figure of a cell, before and now.

    Attributes:
        what: ``verdict``, ``quality``, ``size`` or ``speed``; unit: of ``before`` and ``now``.
        allowed: the share that it may get worse by; None: it is not a matter of degree.
        worse: whether it got worse than that. reason: one sentence: what was compared, or why nothing could be.
    """

    cell: str
    what: str
    unit: str
    before: float | str | None
    now: float | str | None
    allowed: float | None
    worse: bool
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return asdict(self)


def read(place: Path) -> dict[str, Outcome]:
    """The outcomes of an earlier run, by cell: of its output, or of its ``matrix.json`` alone.

    Raises:
        PackageError: there is none, or it is of a newer format.
    """
    path = place / "matrix.json" if place.is_dir() else place
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        if raw["format_version"] > FORMAT_VERSION:
            raise PackageError(
                f"{path} has format_version {raw['format_version']}; this tapeout reads up to {FORMAT_VERSION}: upgrade it."
            )
        found = [Outcome.of({"format_version": FORMAT_VERSION, **each}) for each in raw["cells"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or repr(error)
        raise PackageError(f"{path} is no matrix.json of an earlier run: {reason}.") from error
    return {each.name: each for each in found}


def compare(before: Mapping[str, Outcome], now: Mapping[str, Outcome], margins: Margins) -> list[Change]:
    """Every figure that both runs have, cell by cell in this run's order; what only one has is no change for the worse."""
    return [
        change
        for name, outcome in now.items()
        if name in before
        for change in _changes(before[name], outcome, margins)
    ]


def suspects(before: Mapping[str, Outcome], now: Mapping[str, Outcome], margins: Margins) -> list[str]:
    """Cells whose speed has to be measured again before anything is said of it: they look slower, or ran beside others."""
    found = []
    for name, outcome in now.items():
        earlier = before.get(name)
        if earlier is None or outcome.status != "passed" or _apart(earlier, outcome):
            continue
        slow = _speed(earlier, outcome, margins)
        if not outcome.figures["speed"].get("alone") or (slow and slow.worse):
            found.append(name)
    return found


def _changes(before: Outcome, now: Outcome, margins: Margins) -> Iterator[Change]:
    name = now.name
    if before.status == "passed" and now.status != "passed":
        yield Change(name, "verdict", "", before.status, now.status, None, True, now.reason)
        return
    if now.status != "passed" or before.status != "passed":
        return
    old, new = before.figures, now.figures
    if (was := old.get("quality")) and (found := new.get("quality")) and was["gate"] == found["gate"]:
        worse = found["value"] > was["value"] * (1 + margins.kl) + FLOOR
        reason = f"{found['gate']}; less than {FLOOR:.1g} is float32's own rounding"
        yield Change(
            name, "quality", found["metric"], was["value"], found["value"], margins.kl, worse, reason
        )
    if (was := old.get("artifact_bytes")) and (found := new.get("artifact_bytes")):
        worse = found > was * (1 + margins.size)
        yield Change(name, "size", "bytes", was, found, margins.size, worse, "files that the runtime loads")
    if old.get("speed") and new.get("speed"):
        why = _apart(before, now) or (
            None if new["speed"].get("alone") else "it was measured beside other cells"
        )
        if why:
            rates = old["speed"]["value"], new["speed"]["value"]
            yield Change(name, "speed", new["speed"]["unit"], *rates, None, False, f"not compared: {why}")
        elif slow := _speed(before, now, margins):
            yield slow


def _apart(before: Outcome, now: Outcome) -> str | None:
    """Why two speeds say nothing of each other; an empty reason where one was not measured."""
    old, new = before.figures.get("speed"), now.figures.get("speed")
    if not old or not new:
        return "it was not measured"
    if old["unit"] != new["unit"]:
        return "the units differ"
    if before.figures.get("processor") != now.figures.get("processor"):
        return f"the baseline is of {before.figures.get('processor')}, and this is {now.figures.get('processor')}"
    return None if old.get("alone") else "the baseline was measured beside other cells: make it with --speed"


def _speed(before: Outcome, now: Outcome, margins: Margins) -> Change | None:
    """The best of this run's measurements against the median of the baseline's, which is granted its own spread.

    What disturbs a measurement makes it slower and never faster, so that the best is the one that is nearest to the truth. Of a baseline
    that has as many as --speed makes, the slowest does not count for the same reason: one disturbance would excuse every later slowness.
    """
    old, new = sorted(samples(before)), samples(now)
    old = old[1:] if len(old) >= _MANY else old
    middle, best = statistics.median(old), max(new)
    spread = (old[-1] - old[0]) / middle
    allowed = max(margins.tokens_per_s, spread)
    reason = f"best of {len(new)} against the median of {len(old)}, which spread over {spread:.0%}"
    unit = now.figures["speed"]["unit"]
    return Change(now.name, "speed", unit, middle, best, allowed, best < middle * (1 - allowed), reason)


def samples(outcome: Outcome) -> Sequence[float]:
    """Every measurement of a cell's speed."""
    speed = outcome.figures["speed"]
    return speed.get("samples") or [speed["value"]]
