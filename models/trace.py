"""The graph as a list of its calls: what reads what, and a way to compute any value alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from tapeout.models import graph
from tapeout.models.decoder import DecoderConfig


@dataclass(frozen=True, eq=False)
class Step:
    """One call of a primitive, and the value that it gives.

    Attributes:
        op: the primitive; ``input`` for what the graph is given, ``part`` for a piece of what ``split`` gives.
        args, keywords: as the graph gave them, Steps among them; of a ``part``: the split and which piece.
    """

    op: str
    name: str
    args: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def reads(self) -> tuple[Step, tuple[str, ...]] | None:
        """The value that weights multiply in this call, and the weights [out, in], but for experts'."""
        if self.op == "linear":
            return self.args[0], (self.args[1],)
        if self.op == "latent_attention":
            return self.args[1], (self.args[3],)
        return None

    def rows(self) -> tuple[str, str | None, slice] | None:
        """Where this value is made by a linear, whole or a piece of it: weight, bias, and which of their rows."""
        if self.op == "linear":
            return self.args[1], self.args[2], slice(None)
        if self.op == "part":
            split, piece = self.args
            made, sizes = split.args[0].rows(), split.args[1]
            if made:
                return made[0], made[1], slice(sum(sizes[:piece]), sum(sizes[: piece + 1]))
        return None


class _Recorder:
    """An emitter (``graph.Ops[Step]``) that writes down every call."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def __getattr__(self, op: str) -> Callable[..., Any]:
        def call(name: str, *args: Any, **keywords: Any) -> Any:
            step = Step(op, name, args, keywords)
            self.steps.append(step)
            if op == "split":
                return tuple(Step("part", f"{name}.{i}", (step, i)) for i in range(len(args[1])))
            return step

        return call


def layer(config: DecoderConfig, index: int) -> tuple[Step, list[Step]]:
    """The input of a layer and its calls in order; the last one is what the layer gives."""
    recorder, x = _Recorder(), Step("input", f"layers.{index}.in")
    graph.layer(cast("graph.Ops[Step]", recorder), config, index, x)
    return x, recorder.steps


def compute(
    step: Step,
    ops: Any,
    recall: Callable[[Step], Any],
    done: Callable[[Step, Any], None] = lambda step, value: None,
) -> Any:
    """The value of a step by an emitter.

    Args:
        step: whose.
        ops: the emitter.
        recall: values that are known already; None for others. The graph's input must be.
        done: is told every other one.
    """
    known: dict[Step, Any] = {}

    def value(each: Step) -> Any:
        if each not in known:
            found = recall(each)
            if found is None:
                args = [value(a) if isinstance(a, Step) else a for a in each.args]
                if each.op == "part":
                    found = args[0][args[1]]
                else:
                    found = getattr(ops, each.op)(each.name, *args, **each.keywords)
                    done(each, found)
            known[each] = found
        return known[each]

    return value(step)
