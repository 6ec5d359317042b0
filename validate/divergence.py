"""The first divergence: two models, or a model and the graph, run over the same ids, value by value to the first that parts.

Against the graph every primitive stands alone: it is computed from the device's own inputs, in float64, so that what is left is
what the device's primitive does, whatever came before. Two devices can only be compared as they run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import TapeoutError
from tapeout.validate.session import Logits, Shown
from tapeout.validate.worker import WorkerSession

__all__ = ["Divergence", "Value", "against_graph", "between"]

# Sums of K products in another order differ by about sqrt(K) 2^-24 of their size, below 1e-5 for K = 16384; ten times that
# for exponentials of scores that are large.
_FLOAT32 = 1e-4
# Of a token at position p an angle of RoPE that is made in float32 is off by up to 2^-24 p.
_ANGLE = 2.0**-24
# Where a primitive amplifies its own rounding (a small sum of large terms), float32 takes the graph's own from float64 as well: device
# and graph are each that far off, and as much again for approximated exponentials and roots. The same factor holds for a
# narrower type that the runtime is known to use: its bound is uniform, and 4 standard deviations of it lie beyond any rms.
_NOISES = 4.0
# Where nothing can be computed apart, an error grows from value to value: norms and sums pass it on as it is, scores by their own size,
# which is below ten where softmax still tells tokens apart.
_GROWTH = 10.0


@dataclass(frozen=True)
class Value:
    """One named value of both.

    Attributes:
        op: what made it.
        grown: rms of the difference over rms of the reference's value, all that came before in it.
        own: the same, but of the reference's primitive on the device's own inputs; None: could not be computed apart.
        limit: what ``own``, or without it ``grown``, may be.
    """

    name: str
    op: str
    grown: float
    own: float | None
    limit: float

    @property
    def parts(self) -> bool:
        """Whether it is beyond its limit."""
        return not (self.grown if self.own is None else self.own) <= self.limit

    @property
    def layer(self) -> str:
        """``layers.3``, or its own name outside of layers."""
        words = self.name.split(".")
        return ".".join(words[:2]) if words[0] == "layers" else words[0]


@dataclass(frozen=True)
class Divergence:
    """What a walk found.

    Attributes:
        values: in the order of their making.
        first: the first that parts; None: none does.
        hidden: what ``first`` was made from that the device does not show, so that it may be at fault instead.
        tokens: of the sequence.
        oracle: rms of what the graph's own output is off by from transformers', over its rms; None: not compared.
    """

    values: tuple[Value, ...]
    first: Value | None
    hidden: tuple[str, ...] = ()
    tokens: int = 0
    oracle: float | None = None

    def words(self) -> str:
        """The finding in a sentence or two."""
        worst = max(self.values, key=lambda each: each.grown)
        if self.first is None:
            return (
                f"No primitive parts: all {len(self.values)} values that both show agree on {self.tokens} tokens to {worst.grown:.2g} of "
                f"their size at most ({worst.name}), with inputs of quantized matmuls left as they are.{self._sworn()}"
            )
        first = self.first
        at = self.values.index(first)
        size = first.grown if first.own is None else first.own
        how = "" if first.own is None else " on the same inputs"
        said = (
            f"The first primitive that parts is {first.name} ({first.op}):{how} it is off by {size:.2g} of its size, "
            f"where {first.limit:.2g} is what float types explain"
        )
        if at:
            said += f"; {self.values[at - 1].name} before it agrees"
        said += "."
        if self.hidden:
            said += f" It was made from {', '.join(self.hidden)}, which the runtime does not show: that may be at fault."
        if others := [each.name for each in self.values[at + 1 :] if each.own is not None and each.parts]:
            more = f" … and {len(others) - 3} more" if len(others) > 3 else ""
            said += f" So do {', '.join(others[:3])}{more}, each on its own inputs."
        return said + self._sworn()

    def _sworn(self) -> str:
        return "" if self.oracle is None else f" (The graph itself is transformers' to {self.oracle:.1g}.)"

    def layers(self) -> dict[str, tuple[float, float | None, Value]]:
        """For each layer, and each value outside of them: what it gives is off by, the largest own difference, the value that has it."""
        found: dict[str, tuple[float, float | None, Value]] = {}
        for each in self.values:
            most = found[each.layer][2] if each.layer in found else each
            worst = max(most, each, key=lambda value: value.grown if value.own is None else value.own)
            found[each.layer] = each.grown, worst.own, worst
        return found

    def to_json(self) -> dict[str, Any]:
        """One document."""
        return {
            "tokens": self.tokens,
            "first": self.first.name if self.first else None,
            "finding": self.words(),
            "may_be_at_fault": list(self.hidden),
            "graph_from_transformers": self.oracle,
            "values": [{**asdict(each), "parts": each.parts} for each in self.values],
        }


def against_graph(
    device: WorkerSession,
    graph: WorkerSession,
    ids: Sequence[int],
    scratch: Path,
    expected: Logits | None = None,
) -> Divergence:
    """Walk a device along the graph (``primitives.open_session``), each primitive alone.

    Args:
        device, graph: TracedSessions in workers.
        ids: one sequence.
        scratch: where values go.
        expected: what transformers gives of the ids with the graph's weights.

    Raises:
        TapeoutError: they are different models: no value in common, or one of another shape.
    """
    mine, whole, forced = scratch / "device", scratch / "graph", scratch / "forced"
    shown, known = device.trace(ids, mine), graph.trace(ids, whole)
    grown = dict(_apart(whole, mine, _common(known, shown)))
    graph.trace(ids, forced, given=str(mine))
    own = dict(_apart(forced, mine, list(grown)))
    limits = {name: _limit(len(ids), shown[name]) for name in grown}
    if any(own[name] > limits[name] for name in grown):
        single = scratch / "single"
        graph.trace(ids, single, given=str(mine), double=False)
        noise = dict(_apart(forced, single, list(grown)))
        limits = {name: max(limit, _NOISES * noise[name]) for name, limit in limits.items()}
    values = tuple(Value(name, known[name].op, grown[name], own[name], limits[name]) for name in grown)
    first = next((each for each in values if each.parts), None)
    hidden = tuple(_hidden(first.name, known, shown)) if first else ()
    oracle = None
    if expected is not None:
        given = np.load(whole / f"{list(known)[-1]}.npy")
        oracle = _relative(expected.astype(np.float64), given.astype(np.float64))
    return Divergence(values, first, hidden, len(ids), oracle)


def between(one: WorkerSession, other: WorkerSession, ids: Sequence[int], scratch: Path) -> Divergence:
    """Walk two devices: a value parts where the difference leaves what float types explain and grows tenfold at once.

    Raises:
        TapeoutError: they are different models: no value in common, or one of another shape.
    """
    a, b = scratch / "one", scratch / "other"
    known, shown = one.trace(ids, a), other.trace(ids, b)
    values: list[Value] = []
    most = 0.0
    for name, grown in _apart(a, b, _common(known, shown)):
        limit = max(_limit(len(ids), known[name]), _limit(len(ids), shown[name]), _GROWTH * most)
        values.append(Value(name, known[name].op, grown, None, limit))
        most = max(most, grown)
    return Divergence(tuple(values), next((each for each in values if each.parts), None), (), len(ids))


def _limit(tokens: int, shown: Shown) -> float:
    return max(_FLOAT32 + _ANGLE * tokens, _NOISES * shown.rounding)


def _common(one: Mapping[str, Shown], other: Mapping[str, Shown]) -> list[str]:
    names = [name for name in one if name in other]
    if not names:
        raise TapeoutError(
            f"the two have no value in common (one shows {', '.join(list(one)[:3])}, the other {', '.join(list(other)[:3])}): "
            "they are different models."
        )
    depths = [
        len({name.split(".")[1] for name in each if name.startswith("layers.")}) for each in (one, other)
    ]
    if depths[0] != depths[1]:
        raise TapeoutError(
            f"one has {depths[0]} layers and the other {depths[1]}: they are different models."
        )
    return names


def _apart(reference: Path, other: Path, names: Sequence[str]) -> Iterator[tuple[str, float]]:
    """Rms of each value's difference over rms of the reference's, where that is a number; infinite for a NaN of the other."""
    for name in names:
        mine, theirs = (np.load(at / f"{name}.npy", mmap_mode="r") for at in (reference, other))
        if mine.shape != theirs.shape:
            raise TapeoutError(
                f"{name} is {list(mine.shape)} in one and {list(theirs.shape)} in the other: they are different models."
            )
        told = np.isfinite(mine)
        x, y = mine[told].astype(np.float64), theirs[told].astype(np.float64)
        yield name, _relative(x, y) if np.isfinite(y).all() else float("inf")


def _relative(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
    return float(np.sqrt(((x - y) ** 2).sum() / max((x**2).sum(), np.finfo(np.float32).tiny)))


def _hidden(name: str, known: Mapping[str, Shown], shown: Mapping[str, Shown]) -> Iterator[str]:
    """What a value was made from, back to values that the device shows."""
    for each in known[name].reads:
        if each not in shown:
            if each in known:
                yield from _hidden(each, known, shown)
            yield each
