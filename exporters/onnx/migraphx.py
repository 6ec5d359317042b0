"""The graph as MIGraphX compiles it, by itself or as onnxruntime's provider: primitive operators, and shapes that do not grow.

MIGraphX compiles a program for each set of shapes, and the provider leaves a graph alone that has more than ten nodes it does not
know; so norms, RoPE, attention and GELU are written out, and the cache has room for the whole context from the start: a step puts its
keys and values where ``cache_position`` says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from tapeout.exporters import Carry, Exact, Refused
from tapeout.exporters.onnx.blocks import FLOAT8, NONE, Bnb4, Container, Floats, Linear
from tapeout.exporters.onnx.emitter import Value
from tapeout.exporters.onnx.graph import DOMAIN, library
from tapeout.exporters.onnx.typed import LOGITS_AT, TypedOps
from tapeout.models.rope import Rope
from tapeout.quantize import QuantTensor, Scheme

OPSET = 21  # the first with blocks; it has no norms, no RoPE and no attention


@dataclass
class MiGraphXOps(TypedOps):
    """``Ops`` that writes what MIGraphX parses."""

    @staticmethod
    def held(scheme: Scheme, *, turned: bool) -> Container | Refused:
        """What holds a matrix of the scheme."""
        return held(scheme, turned=turned)

    def _given(self) -> dict[str, list[str | int]]:
        return {
            "input_ids": ["batch", "tokens"],
            "position_ids": ["batch", "tokens"],
            "attention_mask": ["batch", self.context],
            "cache_position": ["tokens"],
            LOGITS_AT: ["logits_tokens"],
        }

    def _container(self, weight: str, *, turned: bool) -> Container | None:
        found = super()._container(weight, turned=turned)
        if isinstance(found, Linear) and found.zero_point and found.bits == 4:
            tensor = self.graph.quant[weight]
            assert isinstance(tensor, QuantTensor)
            assert tensor.zero_point is not None
            if tensor.zero_point.max(initial=0) > 15:  # GPTQ has zero points one beyond the codes
                return Linear(8, found.block, True, found.turned, scales=found.scales)
        return found

    def _total(self) -> str:
        last = self.graph.constant("last", np.array([-1]))
        newest = self._once("Gather", ["cache_position", last], "newest", axis=0)
        return self._once("Add", [newest, "one"], "total")

    def _cached(self, layer: int, part: str, new: str, heads: int, width: int) -> str:
        g, info = self.graph, library().helper.make_tensor_value_info
        past, present = f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"
        g.inputs.append(info(past, self._half, ["batch", heads, self.context, width]))
        g.outputs.append(info(present, self._half, ["batch", heads, self.context, width]))
        taken, fresh = self._places()
        rows = g.node("Gather", [new, taken], f"{present}.rows", axis=2)
        return g.node("Where", [fresh, rows, past], present)

    def _places(self) -> tuple[str, str]:
        """For each row of the cache the new token that goes there, int64 [context], and whether one does, bool [context, 1]."""
        g = self.graph
        if "cache.fresh" not in g.names:
            first = g.node(
                "Gather", ["cache_position", g.constant("at.0", np.array([0]))], "cache.first", axis=0
            )
            columns = g.array("cache.columns", np.arange(self.context))
            behind = g.node("Sub", [columns, first], "cache.behind")
            count = g.node("Shape", ["cache_position"], "cache.count")
            zero = g.constant("zero.int64", np.zeros(1, np.int64))
            most = g.node("Min", [behind, g.node("Sub", [count, "one"], "cache.most")], "cache.capped")
            g.node("Max", [most, zero], "cache.taken")
            inside = g.node("Equal", [behind, "cache.taken"], "cache.inside")
            g.node("Unsqueeze", [inside, "one"], "cache.fresh")
        return "cache.taken", "cache.fresh"

    def _mask(self, window: int | None) -> str:
        """Which rows of the cache each new token attends to, bool [batch, 1, tokens, context]."""
        g, name = self.graph, f"mask.{window}" if window else "mask"
        if name in g.names:
            return name
        if "rows.column" not in g.names:
            g.node("Unsqueeze", ["cache_position", "one"], "rows.column")
            kept = g.node("Cast", ["attention_mask"], "attention_mask.bool", to=library().TensorProto.BOOL)
            g.node("Unsqueeze", [kept, g.constant("head_axes", np.array([1, 2]))], "padding")
        columns = g.array("cache.columns", np.arange(self.context))
        seen = self._once("LessOrEqual", [columns, "rows.column"], "causal")
        if window:
            width = g.constant(f"window.{window}", np.array(window))
            first = g.node("Sub", ["rows.column", width], f"{name}.before")
            seen = g.node("And", [seen, g.node("Greater", [columns, first], f"{name}.near")], f"{name}.seen")
        return g.node("And", [seen, "padding"], name)

    def _turn(self, name: str, x: str, heads: int, rope: Rope) -> str:
        """Turn pairs of the first ``rope.dim`` elements of each head."""
        g, (cos, sin, position) = self.graph, self._by_position(rope)
        two = g.constant("axis.2", np.array([2]))
        cos, sin = (
            self._once(
                "Unsqueeze",
                [self._once("Gather", [table, position], f"{table}.{position}", axis=0), two],
                f"{table}.{position}.heads",
            )
            for table in (cos, sin)
        )
        y = self._shaped(x, (0, 0, heads, -1), f"{name}.split")
        width = self._width(x, heads)
        rest = None
        if width > rope.dim:
            y, rest = self._cut(y, (rope.dim, width - rope.dim), f"{name}.turning", f"{name}.kept", 3)
        if rope.interleaved:
            pairs = self._shaped(y, (0, 0, heads, rope.dim // 2, 2), f"{name}.pairs")
            a, b = (
                g.node("Gather", [pairs, g.constant(f"index.{i}", np.array(i))], f"{name}.{part}", axis=4)
                for i, part in enumerate(("even", "odd"))
            )
        else:
            a, b = self._cut(y, (rope.dim // 2, rope.dim // 2), f"{name}.even", f"{name}.odd", 3)
        products = {
            f"{x}{t}": g.node("Mul", [value, table], f"{name}.{x}.{t}")
            for x, value in (("a", a), ("b", b))
            for t, table in (("cos", cos), ("sin", sin))
        }
        a = g.node("Sub", [products["acos"], products["bsin"]], f"{name}.first")
        b = g.node("Add", [products["bcos"], products["asin"]], f"{name}.second")
        if rope.interleaved:
            four = g.constant("axis.4", np.array([4]))
            a, b = (g.node("Unsqueeze", [z, four], f"{z}.pair") for z in (a, b))
            y = g.node("Concat", [a, b], f"{name}.paired", axis=4)
            y = self._shaped(y, (0, 0, heads, rope.dim), f"{name}.whole")
        else:
            y = g.node("Concat", [a, b], f"{name}.whole", axis=3)
        if rest:
            y = g.node("Concat", [y, rest], f"{name}.joined", axis=3)
        return self._shaped(y, (0, 0, -1), name)

    def _width(self, x: str, heads: int) -> int:
        """Elements of a head: of latent attention those that turn, apart from the others."""
        config = self.graph.quant.model.config
        mla = getattr(config, "mla", None)
        return int(mla.rope_dim if mla else config.head_dim)  # type: ignore[union-attr]

    def _rms(self, name: str, x: str, gamma: str, eps: float, parts: int) -> str:
        g = self.graph
        if parts > 1:
            x = self._shaped(x, (0, 0, parts, -1), f"{name}.split")
        squares = g.node("Mul", [x, x], f"{name}.squares")
        mean = g.node("ReduceMean", [squares, g.constant("last", np.array([-1]))], f"{name}.mean", keepdims=1)
        mean = g.node("Add", [mean, g.constant(f"{name}.eps", np.array(eps, np.float32))], f"{name}.above")
        y = g.node("Div", [x, g.node("Sqrt", [mean], f"{name}.root")], f"{name}.normed")
        if parts == 1:
            return g.node("Mul", [y, gamma], name)
        return self._shaped(g.node("Mul", [y, gamma], f"{name}.heads"), (0, 0, -1), name)

    def gated(self, name: str, gate: Value, up: Value, act: str) -> str:
        """Sigmoid, Tanh or Erf, and products."""
        if act == "silu":
            return super().gated(name, gate, up, act)
        g, x = self.graph, self._use(gate)

        def number(part: str, value: float) -> str:
            return self._narrow(g.constant(f"gelu.{part}", np.array(value, np.float32)))

        if act == "gelu_pytorch_tanh":  # 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³)))
            y = g.node(
                "Mul", [g.node("Mul", [x, x], f"{name}.square"), number("cubic", 0.044715)], f"{name}.cubic"
            )
            y = g.node("Add", [y, number("one", 1.0)], f"{name}.series")
            y = g.node(
                "Mul",
                [g.node("Mul", [x, number("root", math.sqrt(2 / math.pi))], f"{name}.small"), y],
                f"{name}.argument",
            )
            y = g.node("Tanh", [y], f"{name}.tanh")
        else:
            y = g.node(
                "Erf",
                [g.node("Mul", [x, number("half_root", math.sqrt(0.5))], f"{name}.argument")],
                f"{name}.erf",
            )
        y = g.node("Add", [y, number("one", 1.0)], f"{name}.plus")
        y = g.node("Mul", [g.node("Mul", [x, number("half", 0.5)], f"{name}.half"), y], f"{name}.act")
        return g.node("Mul", [y, self._use(up)], name)

    def _bnb4(self, name: str, x: str, weight: str, container: Bnb4) -> str:
        out, into = self._shape(weight)
        parts = self._parts_of(weight, container, out, into)
        return self.graph.node(
            "MatMulBnb4", [x, parts["codes"], parts["scales"]], name, domain=DOMAIN,
            K=into, N=out, block_size=container.block, quant_type=1, transB=1,
        )  # fmt: skip


def held(scheme: Scheme, *, turned: bool) -> Container | Refused:
    """What holds a matrix of the scheme, or why nothing does."""
    if scheme.activations == "int8":
        return Refused("MIGraphX rounds inputs under calibrated scales only.", "w8a8-static")
    if scheme.activations == "e4m3-static":
        return Refused("MIGraphX's matmuls of float8 with float8 are not written.", "fp8")
    if scheme.scales in ("super", "e4m3", "e8m0") or scheme.kind == "affine":
        return Refused(
            "MIGraphX has no scales under scales, no powers of two and no minimum for it.", "int4-g32"
        )
    if scheme.levels == "nf4":
        return Bnb4()
    if scheme.levels == "e4m3" and scheme.group is None:
        return Floats(8, turned)
    bits = {2: 4, 3: 4, 4: 4, 6: 8, 8: 8}.get(scheme.bits)
    if bits is None or scheme.kind not in ("symmetric", "asymmetric"):
        return Refused("MIGraphX has no such levels.", "int4-g32")
    static = scheme.activations == "int8-static"
    kind = "FLOAT" if static else "FLOAT16"
    return Linear(bits, scheme.group, scheme.kind == "asymmetric", turned, static, kind)


def carries(scheme: Scheme) -> Carry:
    """How MIGraphX's operators hold a scheme."""
    if scheme.kind == "none":
        return Exact(NONE)
    found = held(scheme, turned=True)
    if isinstance(found, Refused):
        return found
    if isinstance(found, Bnb4):
        return Exact("MatMulBnb4, MIGraphX alone", 4 + 32 / found.block)
    if isinstance(found, Floats):
        return Exact(FLOAT8)
    assert isinstance(found, Linear)
    if found.static:
        return Exact("INT8, inputs too, their scale calibrated")
    if found.block is None:
        return Exact(found.kind)
    bits = found.bits + (16 + found.bits * found.zero_point) / found.block
    return Exact(found.kind + (f", at {bits:g} bits" if found.bits > scheme.bits else ""), bits)
