"""The graph in ONNX's own operators (opset 23), which any runtime of the format may take: weights behind DequantizeLinear.

The cache grows: past keys and values go in, past and present ones come out, and a sliding window is a mask. Sequences of a batch
are padded on the left.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tapeout.errors import SchemeError
from tapeout.exporters.onnx.blocks import Float8, Linear, container_of, linear_of
from tapeout.exporters.onnx.emitter import Emitter, Routing, Value
from tapeout.exporters.onnx.graph import library
from tapeout.models.decoder import Attention, Mla, Moe
from tapeout.models.rope import Rope


class StandardOps(Emitter):
    """``Ops`` that writes standard operators."""

    def embedding(self, name: str, ids: Value, weight: str, scale: float) -> str:
        """Gather."""
        out = name if scale == 1.0 else f"{name}.rows"
        table = self._weight(weight, lookup=True)
        y = self.graph.node("Gather", [table, self._use(ids)], out)
        return y if scale == 1.0 else self._times(name, y, scale)

    def linear(self, name: str, x: Value, weight: str, bias: str | None) -> str:
        """MatMul, and Add."""
        x = self._wanted(name, x)
        out = f"{name}.product" if bias else name
        y = self.graph.node("MatMul", [x, self._weight(weight, lookup=False)], out)
        return self.graph.node("Add", [y, self.graph.vector(bias)], name) if bias else y

    def rms_norm(self, name: str, x: Value, weight: str, *, eps: float, offset: float, parts: int = 1) -> str:
        """RMSNormalization."""
        return self._rms(name, self._use(x), self._gamma(weight, offset), eps, parts)

    def attention(self, name: str, query: Value, key: Value, value: Value, spec: Attention) -> str:
        """RotaryEmbedding, and Attention over the cache."""
        q = self._turn(f"{name}.q", self._use(query), spec.heads, spec.rope)
        k = self._turn(f"{name}.k", self._use(key), spec.kv_heads, spec.rope)
        window = spec.window if spec.window and spec.window < self.context else None
        widths = spec.head_dim, spec.head_dim
        return self._attend(name, (q, k, self._use(value)), spec, spec.kv_heads, widths, window)

    def gated(self, name: str, gate: Value, up: Value, act: str) -> str:
        """SiLU is a Sigmoid and a Mul."""
        gate, up = self._use(gate), self._use(up)
        if act == "silu":
            y = self.graph.node("Sigmoid", [gate], f"{name}.sigmoid")
            y = self.graph.node("Mul", [gate, y], f"{name}.act")
        else:
            how = "tanh" if act == "gelu_pytorch_tanh" else "none"
            y = self.graph.node("Gelu", [gate], f"{name}.act", approximate=how)
        return self.graph.node("Mul", [y, up], name)

    def experts(self, name: str, x: Value, routing: Value, layer: int, act: str, moe: Moe) -> str:
        """One by one, each on its tokens."""
        assert isinstance(routing, Routing)
        runs = [self._apart(moe.weights(layer, expert)) for expert in range(moe.experts)]
        return self._one_by_one(name, self._use(x), routing, runs, act)

    def _attend_latents(self, name: str, query: str, key: str, latent: str, spec: Attention, mla: Mla) -> str:
        widths = mla.kv_rank + mla.rope_dim, mla.kv_rank
        return self._attend(name, (query, key, latent), spec, 1, widths, None)

    def _attend(
        self,
        name: str,
        inputs: tuple[str, str, str],
        spec: Attention,
        kv_heads: int,
        widths: tuple[int, int],
        window: int | None,
    ) -> str:
        attributes: dict[str, Any] = {
            "q_num_heads": spec.heads, "kv_num_heads": kv_heads, "scale": spec.scale, "softcap": spec.softcap or 0.0,
        }  # fmt: skip
        cache = self._cache(spec.layer, kv_heads, widths, None)
        given = [*inputs, self._mask(window), *cache[:2]]
        return self.graph.node("Attention", given, name, [name, *cache[2:]], **attributes)

    def _turn(self, name: str, x: str, heads: int, rope: Rope) -> str:
        cos, sin, position = self._rope(rope, always=True)
        assert position is not None
        return self.graph.node(
            "RotaryEmbedding", [x, cos, sin, position], name,
            num_heads=heads, rotary_embedding_dim=rope.dim, interleaved=int(rope.interleaved),
        )  # fmt: skip

    def _weight(self, weight: str, *, lookup: bool) -> str:
        """A matrix as float32, [out, in] for a lookup, [in, out] for a MatMul."""
        g, scheme = self.graph, self.graph.quant.schemes[weight]
        tied = g.quant.model.config.tie_word_embeddings and weight == "model.embed_tokens.weight"
        turned = not lookup and not tied
        out, into = self._shape(weight)
        if scheme.kind == "none":
            wide = self._matrix(weight)
        elif isinstance(container_of(scheme, into), Float8):
            raise SchemeError(
                f"{weight} is {scheme}, which is not written in standard operators. What fits: int8."
            )
        else:
            container = linear_of(scheme, into, turned=turned)
            if container is None:
                raise SchemeError(
                    f"{weight} is {scheme}, which ONNX's integers do not hold. What fits: int4-g32."
                )
            wide = self._dequantized(weight, container, out, into)
            if turned:
                return wide
        if lookup:
            return wide
        return self._once("Transpose", [wide], f"{weight}.turned", perm=[1, 0])

    def _dequantized(self, weight: str, container: Linear, out: int, into: int) -> str:
        parts = [
            self.graph.part(f"{weight}.{part}", part, container, [(weight,)], shape)
            for part, (_, shape) in container.shapes(out, into).items()
        ]
        blocks = {"block_size": container.block} if container.block else {}
        return self._once("DequantizeLinear", parts, f"{weight}.float32", axis=container.axis, **blocks)

    def _mask(self, window: int | None) -> str:
        """Which tokens each new one attends to, bool [batch, 1, tokens, total]."""
        g, kinds = self.graph, library().TensorProto
        name = f"mask.{window}" if window else "mask"
        if any(node.name == name for node in g.nodes):
            return name
        if not any(node.name == "columns" for node in g.nodes):
            g.node("Squeeze", ["total"], "total_count")
            g.node(
                "Range",
                [g.constant("from", np.array(0)), "total_count", g.constant("step", np.array(1))],
                "columns",
            )
            count = self._once("Shape", ["input_ids"], "tokens", start=1, end=2)
            begin = self._once("Sub", ["total", count], "past_length")
            rows = g.node("Slice", ["columns", begin, "total"], "rows")
            g.node("Unsqueeze", [rows, "one"], "rows.column")
            kept = g.node("Cast", ["attention_mask"], "attention_mask.bool", to=kinds.BOOL)
            g.node("Unsqueeze", [kept, g.constant("head_axes", np.array([1, 2]))], "padding")
        seen = self._once("LessOrEqual", ["columns", "rows.column"], "causal")
        if window:
            first = g.node(
                "Sub", ["rows.column", g.constant(f"window.{window}", np.array(window))], f"{name}.before"
            )
            near = g.node("Greater", ["columns", first], f"{name}.near")
            seen = g.node("And", [seen, near], f"{name}.seen")
        return g.node("And", [seen, "padding"], name)

    def _positions(self, at: str, trained: int | None) -> str:
        if not any(node.name == "positions" for node in self.graph.nodes):
            g = self.graph
            every = g.node("CumSum", ["attention_mask", g.constant("axis", np.array(1))], "counted")
            every = g.node("Sub", [every, "one"], "every_position.signed")
            every = g.node("Max", [every, g.constant("zero.int64", np.zeros(1, np.int64))], "every_position")
            count = self._once("Shape", ["input_ids"], "tokens", start=1, end=2)
            begin = self._once("Sub", ["total", count], "past_length")
            g.node("Slice", [every, begin, "total", "one"], "positions")
        return super()._positions(at, trained)
