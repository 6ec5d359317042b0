"""The first divergence: two models, or a model and the graph, run over the same ids, value by value to the first that parts.

Against the graph every primitive stands alone: it is computed from the device's own inputs, in float64, so that what is left is
what the device's primitive does, whatever came before. Two devices can only be compared as they run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import TapeoutError
from tapeout.exporters import Artifact, Carry, Rounded
from tapeout.quantize import Scheme
from tapeout.validate.session import Logits, Shown
from tapeout.validate.worker import WorkerSession

__all__ = ["HALF", "Divergence", "Value", "added_rounding", "against_graph", "between"]

# Sums of K products in another order differ by about sqrt(K) 2^-24 of their size, below 1e-5 for K = 16384; ten times that
# for exponentials of scores that are large.
_FLOAT32 = 1e-4
# Of a token at position p an angle of RoPE that is made in float32 is off by up to 2^-24 p.
_ANGLE = 2.0**-24
# Where a primitive amplifies its own rounding (a small sum of large terms), float32 takes the graph's own from float64 as well: device
# and graph are each that far off, and as much again for approximated exponentials and roots. Of a narrower type that the runtime or
# the format rounds to, its unit stands in the place of that.
_NOISES = 4.0
HALF = 2.0**-11
"""The unit of float16: what a rounding to it may take a number off by, of its size."""
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
        also: other values that part, though all that they were made from is the same.
        tokens: of the sequence.
        oracle: rms of what the graph's own output is off by from transformers', over its rms; None: not compared.
    """

    values: tuple[Value, ...]
    first: Value | None
    hidden: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
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
        off = f"is off by {size:.2g} of its size, where {first.limit:.2g} is what float types explain"
        if not np.isfinite(size):
            off = "has numbers where the other has none: another mask, or NaN"
        alone = "" if first.own is None else " on the same inputs"
        before = f"; {self.values[at - 1].name} before it agrees" if at else ""
        said = f"The first primitive that parts is {first.name} ({first.op}):{alone} it {off}{before}."
        if self.hidden:
            said += (
                f" It was made from {', '.join(self.hidden)}, not shown by the runtime: that may be at fault."
            )
        if self.also:
            more = f" … and {len(self.also) - 3} more" if len(self.also) > 3 else ""
            said += f" So do {', '.join(self.also[:3])}{more}, each on its own inputs."
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
            "also": list(self.also),
            "graph_from_transformers": self.oracle,
            # JSON has no infinity, which stands for a number where the other has none.
            "values": [
                {
                    key: None if isinstance(value, float) and not np.isfinite(value) else value
                    for key, value in asdict(each).items()
                }
                | {"parts": each.parts}
                for each in self.values
            ],
        }


def against_graph(
    device: WorkerSession,
    graph: WorkerSession,
    ids: Sequence[int],
    scratch: Path,
    expected: Logits | None = None,
    added: float = 0.0,
) -> Divergence:
    """Walk a device along the graph (``primitives.open_session``), each primitive alone.

    Args:
        device, graph: TracedSessions in workers.
        ids: one sequence.
        scratch: where values go.
        expected: what transformers gives of the ids with the graph's weights.
        added: what the device's format adds to its weights, see ``added_rounding``.

    Raises:
        TapeoutError: they are different models: no value in common, or one of another shape.
    """
    mine, whole, forced = scratch / "device", scratch / "graph", scratch / "forced"
    shown, known = device.trace(ids, _at(mine)), graph.trace(ids, _at(whole))
    grown = dict(_apart(whole, mine, _common(known, shown)))
    graph.trace(ids, _at(forced), given=str(mine))
    own = dict(_apart(forced, mine, list(grown)))
    limits = {name: _limit(len(ids), shown[name].rounding, added) for name in grown}
    if any(own[name] > limits[name] for name in grown):
        single = scratch / "single"
        graph.trace(ids, _at(single), given=str(mine), double=False)
        noise = dict(_apart(forced, single, list(grown)))
        limits = {name: max(limit, _NOISES * noise[name]) for name, limit in limits.items()}
    values = tuple(Value(name, known[name].op, grown[name], own[name], limits[name]) for name in grown)
    first = next((each for each in values if each.parts), None)
    parted = {each.name for each in values if each.parts}
    cleared = {read for each in values if not each.parts for read in known[each.name].reads}
    hidden = [name for name in _hidden(first.name, known, shown) if name not in cleared] if first else []
    also = [name for name in grown if name in parted and not parted & {*known[name].reads}]
    oracle = None
    if expected is not None:
        given = np.load(whole / f"{list(known)[-1]}.npy")
        oracle = _relative(expected.astype(np.float64), given.astype(np.float64))
    return Divergence(values, first, tuple(dict.fromkeys(hidden)), tuple(also[1:]), len(ids), oracle)


def between(
    one: WorkerSession, other: WorkerSession, ids: Sequence[int], scratch: Path, added: float = 0.0
) -> Divergence:
    """Walk two devices: a value parts where the difference leaves what float types explain and grows tenfold at once.

    Raises:
        TapeoutError: they are different models: no value in common, or one of another shape.
    """
    a, b = scratch / "one", scratch / "other"
    known, shown = one.trace(ids, _at(a)), other.trace(ids, _at(b))
    values: list[Value] = []
    most = 0.0
    for name, grown in _apart(a, b, _common(known, shown)):
        limit = max(_limit(len(ids), known[name].rounding, shown[name].rounding, added), _GROWTH * most)
        values.append(Value(name, known[name].op, grown, None, limit))
        most = max(most, grown)
    return Divergence(tuple(values), next((each for each in values if each.parts), None), tokens=len(ids))


def _at(place: Path) -> str:
    place.mkdir(parents=True, exist_ok=True)
    return str(place)


def added_rounding(
    artifact: Artifact, schemes: Mapping[str, Scheme], carries: Callable[[Scheme], Carry]
) -> float:
    """What an artifact's format adds to a weight, relative, where it does not hold the codes as they are (its notes tell).

    Args:
        artifact: with the container of each tensor.
        schemes: of tensors, by their Hugging Face names.
        carries: the target's.
    """
    answers = [carries(scheme) for scheme in set(schemes.values())]
    found = [answer.added_error for answer in answers if isinstance(answer, Rounded)]
    narrow = (
        artifact.containers.get(name) == "F16" and scheme.kind != "none" for name, scheme in schemes.items()
    )
    return max([0.0, *found, HALF * any(narrow)])


def _limit(tokens: int, *roundings: float) -> float:
    return max(_FLOAT32 + _ANGLE * tokens, _NOISES * max(roundings))


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
    """Rms of each value's difference over rms of the reference's, without what is NaN in both; infinite for a NaN of one."""
    for name in names:
        mine, theirs = (np.load(at / f"{name}.npy", mmap_mode="r") for at in (reference, other))
        if mine.shape != theirs.shape:
            raise TapeoutError(
                f"{name} is {list(mine.shape)} in one and {list(theirs.shape)} in the other: they are different models."
            )
        told = np.isfinite(mine)
        x, y = mine[told].astype(np.float64), theirs[told].astype(np.float64)
        yield name, _relative(x, y) if np.array_equal(told, np.isfinite(theirs)) else float("inf")


def _relative(x: npt.NDArray[np.float64], y: npt.NDArray[np.float64]) -> float:
    return float(np.sqrt(((x - y) ** 2).sum() / max((x**2).sum(), np.finfo(np.float32).tiny)))


def _hidden(name: str, known: Mapping[str, Shown], shown: Mapping[str, Shown]) -> Iterator[str]:
    """What a value was made from, back to values that the device shows."""
    for each in known[name].reads:
        if each not in shown:
            if each in known:
                yield from _hidden(each, known, shown)
            yield each
