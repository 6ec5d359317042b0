"""The graph in onnxruntime's own operators, which its CPU kernels are fast in: one node a primitive wherever there is one.

The interface is the one that onnxruntime-genai knows: ``input_ids`` and ``attention_mask`` in, ``logits`` out, ``past_key_values.N.key``
and ``present.N.key`` (and ``value``) of every layer, which may be the same memory.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.exporters.onnx.blocks import Bnb4, Container, Float8, Linear, NBits, block_of, kernel_width
from tapeout.exporters.onnx.emitter import Cut, Emitter, Product, Routing, Run, Sum, Value
from tapeout.exporters.onnx.graph import DOMAIN, library
from tapeout.models.decoder import Attention, Mla, Moe
from tapeout.models.graph import inside as within
from tapeout.models.rope import Rope
from tapeout.quantize import QuantTensor


@dataclass
class ContribOps(Emitter):
    """``Ops`` that writes onnxruntime's operators."""

    _rounded: dict[tuple[str, float], str] = field(default_factory=dict)  # values under a static scale

    def embedding(self, name: str, ids: Value, weight: str, scale: float) -> str:
        """GatherBlockQuantized of the table that a tied head multiplies with; of NF4 and FP8, row by row."""
        out = name if scale == 1.0 else f"{name}.rows"
        container = self.graph.container(weight)
        if container is None:
            table = self.graph.floats(weight)
            if self.graph.is_float32(table):
                y = self.graph.node("Gather", [table, self._use(ids)], out)
            else:
                y = self.graph.node("Gather", [table, self._use(ids)], f"{out}.narrow")
                y = self._float32(y, out)
        elif isinstance(container, NBits):
            codes, *rest = self._parts(weight, container)
            rows = self.graph.view(
                f"{weight}.rows", codes, container.shapes(*self._shape(weight))["codes"][1]
            )
            y = self.graph.node(
                "GatherBlockQuantized", [rows, self._use(ids), *rest], out, domain=DOMAIN,
                bits=container.bits, block_size=container.block, gather_axis=0, quantize_axis=1,
            )  # fmt: skip
        elif isinstance(container, Bnb4):
            y = self._nf4_rows(out, self._use(ids), weight, container)
        else:
            assert isinstance(container, Float8)
            y = self._fp8_rows(out, self._use(ids), weight, container)
        return y if scale == 1.0 else self._times(name, y, scale)

    def _nf4_rows(self, name: str, ids: str, weight: str, container: Bnb4) -> str:
        """Rows of a table of NF4 by standard operators, since onnxruntime looks up no such codes: the high nibble comes first."""
        g, (rows, into) = self.graph, self._shape(weight)
        codes, scales = self._parts(weight, container)
        codes = g.view(f"{weight}.rows", codes, (rows, into // 2))
        scales = g.view(f"{weight}.scales.rows", scales, (rows, into // container.block))
        both = g.node("Gather", [codes, ids], f"{name}.codes")
        four, low = (g.constant(f"uint8.{value}", np.array(value, np.uint8)) for value in (4, 15))
        halves = [
            g.node("BitShift", [both, four], f"{name}.high", direction="RIGHT"),
            g.node("BitwiseAnd", [both, low], f"{name}.low"),
        ]
        last = g.constant("last", np.array([-1]))
        halves = [g.node("Unsqueeze", [each, last], f"{each}.column") for each in halves]
        pairs = g.node("Concat", halves, f"{name}.pairs", axis=-1)
        pairs = g.node("Cast", [pairs], f"{name}.indices", to=library().TensorProto.INT32)
        levels = g.constant("nf4.levels", self._levels(weight))
        y = g.node("Gather", [levels, pairs], f"{name}.levels")
        y = self._shaped(y, (0, 0, into // container.block, container.block), f"{name}.blocks")
        each = g.node(
            "Unsqueeze", [g.node("Gather", [scales, ids], f"{name}.scales"), last], f"{name}.scales.column"
        )
        return self._shaped(g.node("Mul", [y, each], f"{name}.scaled"), (0, 0, into), name)

    def _fp8_rows(self, name: str, ids: str, weight: str, container: Float8) -> str:
        """Rows of a table of E4M3 by their bytes, since Gather takes no 8-bit floats."""
        g = self.graph
        codes, scales = self._parts(weight, container)
        codes = g.view(f"{weight}.bytes", codes, self._shape(weight), kind="UINT8")
        rows = g.node("Gather", [codes, ids], f"{name}.codes")
        rows = g.node("Cast", [rows], f"{name}.indices", to=library().TensorProto.INT32)
        levels = g.table("fp8.levels", self._levels(weight))
        y = g.node("Gather", [levels, rows], f"{name}.levels")
        return g.node("Mul", [y, g.node("Gather", [scales, ids], f"{name}.scales")], name)

    def _levels(self, weight: str) -> npt.NDArray[np.float32]:
        tensor = self.graph.quant[weight]
        assert isinstance(tensor, QuantTensor)
        return np.asarray(tensor.codebook, np.float32)

    def linear(self, name: str, x: Value, weight: str, bias: str | None) -> Value:
        """MatMulNBits, MatMulBnb4, MatMulIntegerToFloat or FusedMatMul."""
        x = self._wanted(name, x)
        container = self.graph.container(weight)
        if isinstance(container, NBits):
            write = partial(self._n_bits, name, x, weight, container, bias)
            return Product(name, x, weight, bias, container, write)
        if isinstance(container, Linear) and not self.exact:
            return self._integers(name, x, weight, container, bias)
        out = f"{name}.product" if bias else name
        if isinstance(container, Bnb4):
            codes, scales = self._parts(weight, container)
            rows, into = self._shape(weight)
            y = self.graph.node(
                "MatMulBnb4", [x, codes, scales], out, domain=DOMAIN,
                N=rows, K=into, block_size=container.block, quant_type=1, transB=1,
            )  # fmt: skip
        elif isinstance(
            container, Linear
        ):  # not DequantizeLinear, of which onnxruntime would make int8 products again
            codes, scales, *_ = self._parts(weight, container)
            wide = self.graph.node("Mul", [self._float32(codes, f"{out}.levels"), scales], f"{out}.weight")
            y = self.graph.node("MatMul", [x, wide], out)
        elif isinstance(container, Float8):
            y = self._float8(out, x, weight, container)
        else:
            y = self.graph.node("FusedMatMul", [x, self._matrix(weight)], out, domain=DOMAIN, transB=1)
        return self._plus(name, y, self.graph.vector(bias)) if bias else y

    def rms_norm(self, name: str, x: Value, weight: str, *, eps: float, offset: float, parts: int = 1) -> str:
        """RMSNormalization, or SkipSimplifiedLayerNormalization of a sum that nobody has asked for yet."""
        gamma = self._gamma(weight, offset)
        if isinstance(x, Sum) and not x.written and parts == 1:
            x.written = True
            outputs = [name, "", "", x.name]
            return self.graph.node(
                "SkipSimplifiedLayerNormalization",
                [x.x, x.y, gamma],
                name,
                outputs,
                domain=DOMAIN,
                epsilon=eps,
            )
        y = self._use(x)
        return self._rms(name, y, gamma, eps, parts)

    def attention(self, name: str, query: Value, key: Value, value: Value, spec: Attention) -> str:
        """GroupQueryAttention, which turns, caches and masks; heads that it cannot turn are turned before."""
        width = kernel_width(spec.head_dim)
        inside = spec.head_dim % 16 == 0 and spec.rope.dim == spec.head_dim
        cos, sin, position = self._rope(spec.rope, always=not inside)
        taken = [query, key, value]
        whole = self._together(within(name, "qkv"), taken) if inside else None
        given = [whole, "", ""] if whole else [self._use(each) for each in taken]
        attributes: dict[str, Any] = {
            "num_heads": spec.heads,
            "kv_num_heads": spec.kv_heads,
            "scale": spec.scale,
        }
        if spec.softcap is not None:
            attributes["softcap"] = spec.softcap
        window = spec.window if spec.window and spec.window < self.context else None
        if window:
            attributes |= {"local_window_size": window, "sliding_window_cache": 1}
        cache = self._cache(spec.layer, spec.kv_heads, (width, width), window)
        inputs = [*given, *cache[:2], "last_position", "total_length"]
        if inside:
            attributes |= {"do_rotary": 1, "rotary_interleaved": int(spec.rope.interleaved)}
            inputs += [cos, sin, *([position] if position else [])]
        else:
            for at, heads in ((0, spec.heads), (1, spec.kv_heads)):
                inputs[at] = self._turn(f"{name}.{'qk'[at]}", inputs[at], heads, spec.rope)
        if width == spec.head_dim:
            return self.graph.node(
                "GroupQueryAttention", inputs, name, [name, *cache[2:]], domain=DOMAIN, **attributes
            )
        # Zeros behind each head: they add nothing to a score, and what comes out behind a value is dropped.
        for at, heads in enumerate((spec.heads, spec.kv_heads, spec.kv_heads)):
            inputs[at] = self._padded(f"{name}.{'qkv'[at]}.wide", inputs[at], heads, spec.head_dim, width)
        y = self.graph.node(
            "GroupQueryAttention",
            inputs,
            f"{name}.wide",
            [f"{name}.wide", *cache[2:]],
            domain=DOMAIN,
            **attributes,
        )
        y = self._shaped(y, (0, 0, spec.heads, width), f"{name}.heads")
        y, _ = self._cut(y, (spec.head_dim, width - spec.head_dim), f"{name}.kept", f"{name}.unused", 3)
        return self._shaped(y, (0, 0, -1), name)

    def _together(self, name: str, taken: Sequence[Value]) -> str | None:
        """Queries, keys and values as one value, which the kernel cuts by itself; None: they were not made from one input alike.

        Rows of codes held alike are those of one matrix when they follow one another: nothing is rounded again.
        """
        first = taken[0]
        if isinstance(first, Cut):
            return None if first.pieces.written else first.pieces.x
        products = [each for each in taken if isinstance(each, Product) and not each.written]
        if len(products) < len(taken) or len({(p.x, p.container, p.bias is None) for p in products}) > 1:
            return None
        container, into = products[0].container, self._shape(products[0].weight)[1]
        out = sum(self._shape(each.weight)[0] for each in products)
        weights, parts = [(each.weight,) for each in products], []
        for part, (_, shape) in container.shapes(out, into).items():
            shape = container.blocks(out, into) if part == "codes" else shape
            parts.append(self.graph.part(f"{name}.{part}", part, container, weights, shape))
        biases = [each.bias for each in products if each.bias]
        bias = self.graph.vectors(f"{name}.bias", biases) if biases else None
        for each in products:
            each.written = True
        return self._multiply(name, products[0].x, parts, container, out, into, bias)

    def _padded(self, name: str, x: str, heads: int, width: int, wide: int) -> str:
        """Heads of ``width`` elements with zeros behind them."""
        x = self._shaped(x, (0, 0, heads, width), f"{name}.split")
        pads = self.graph.constant(f"pads.{wide - width}", np.array([0] * 7 + [wide - width]))
        return self._shaped(self.graph.node("Pad", [x, pads], f"{name}.heads"), (0, 0, -1), name)

    def _turn(self, name: str, x: str, heads: int, rope: Rope) -> str:
        cos, sin, position = self._rope(rope, always=True)
        assert position is not None
        return self.graph.node(
            "RotaryEmbedding", [x, position, cos, sin], name, domain=DOMAIN,
            num_heads=heads, rotary_embedding_dim=rope.dim, interleaved=int(rope.interleaved),
        )  # fmt: skip

    def _attend_latents(self, name: str, query: str, key: str, latent: str, spec: Attention, mla: Mla) -> str:
        """GroupQueryAttention's values are as wide as its keys: a cached token takes twice kv_rank + rope_dim numbers."""
        width = mla.kv_rank + mla.rope_dim
        if (wide := kernel_width(width)) != width:
            query = self._padded(f"{name}.q.wide", query, spec.heads, width, wide)
            key = self._padded(f"{name}.k.wide", key, 1, width, wide)
        cache = self._cache(spec.layer, 1, (wide, wide), None)
        y = self.graph.node(
            "GroupQueryAttention", [query, key, key, *cache[:2], "last_position", "total_length"], f"{name}.wide",
            [f"{name}.wide", *cache[2:]], domain=DOMAIN, num_heads=spec.heads, kv_num_heads=1, scale=spec.scale,
        )  # fmt: skip
        y = self._shaped(y, (0, 0, spec.heads, wide), f"{name}.heads")
        y, _ = self._cut(y, (mla.kv_rank, wide - mla.kv_rank), f"{name}.kept", f"{name}.unused", 3)
        return self._shaped(y, (0, 0, -1), name)

    def gated(self, name: str, gate: Value, up: Value, act: str) -> str:
        """QuickGelu with alpha 1 is SiLU, in one node."""
        gate, up = self._use(gate), self._use(up)
        if act == "silu":
            y = self.graph.node("QuickGelu", [gate], f"{name}.act", domain=DOMAIN, alpha=1.0)
        else:
            how = "tanh" if act == "gelu_pytorch_tanh" else "none"
            y = self.graph.node("Gelu", [gate], f"{name}.act", approximate=how)
        return self.graph.node("Mul", [y, up], name)

    def experts(self, name: str, x: Value, routing: Value, layer: int, act: str, moe: Moe) -> str:
        """QMoE where the CPU provider has a kernel for these codes, or the experts one by one, each on its tokens."""
        assert isinstance(routing, Routing)
        x = self._use(x)
        names = [moe.weights(layer, expert) for expert in range(moe.experts)]
        container = self._common(names)
        if container is None:
            return self._one_by_one(name, x, routing, [self._apart(each) for each in names], act)
        (inner, hidden), at = self._shape(names[0][0]), f"model.layers.{layer}.experts"
        stacked = {}
        for part in container.shapes(1, 256):
            for which, groups, rows, into in (
                ("gate_up", [(gate, up) for gate, up, _ in names], 2 * inner, hidden),
                ("down", [(down,) for _, _, down in names], hidden, inner),
            ):
                shape = (moe.experts, rows, container.shapes(1, into)[part][1][1])
                stacked[which, part] = self.graph.part(f"{at}.{which}.{part}", part, container, groups, shape)
        if self.exact or act != "silu":
            runs = [
                self._stacked(name, stacked, container, expert, inner, hidden)
                for expert in range(moe.experts)
            ]
            return self._one_by_one(name, x, routing, runs, act)
        inputs = [x, routing.ranks, stacked["gate_up", "codes"], stacked["gate_up", "scales"], ""]
        inputs += [stacked["down", "codes"], stacked["down", "scales"], "", "", "", ""]
        zero_points = [
            stacked[which, "zero_points"] if container.zero_point else "" for which in ("gate_up", "down")
        ]
        return self.graph.node(
            "QMoE", [*inputs, *zero_points, "", routing.weights], name, domain=DOMAIN,
            k=moe.top_k, activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
            expert_weight_bits=container.bits, block_size=container.block, normalize_routing_weights=0,
            weights_prepacked=0, accuracy_level=4,
        )  # fmt: skip

    def _common(self, names: Sequence[tuple[str, str, str]]) -> NBits | None:
        """The container of all experts' tensors, when they can be stacked."""
        found = {self.graph.container(tensor) for each in names for tensor in each}
        schemes = {self.graph.quant.schemes[tensor] for each in names for tensor in each}
        one = next(iter(found))
        if (
            len(schemes) > 1
            or any(not isinstance(each, NBits) for each in found)
            or not isinstance(one, NBits)
        ):
            return None
        inner, hidden = self._shape(names[0][0])
        block = block_of(next(iter(schemes)), math.gcd(inner, hidden))
        bits = {each.bits for each in found if isinstance(each, NBits)}
        return NBits(one.bits, block, one.zero_point) if block and len(bits) == 1 else None

    def _stacked(
        self,
        name: str,
        stacked: dict[tuple[str, str], str],
        container: NBits,
        expert: int,
        inner: int,
        hidden: int,
    ) -> Run:
        """Run one expert on rows, by its place in the stacked tensors; rows of gate and up take turns."""

        def multiply(at: str, rows: str, which: str, out: int, into: int) -> str:
            parts = []
            for part, (_, shape) in container.shapes(out, into).items():
                if part == "codes":
                    shape = container.blocks(out, into)
                of = stacked[which, part]
                each = self.graph.initializers[of].nbytes // self.graph.initializers[of].shape[0]
                parts.append(self.graph.view(f"{of}.{expert}", of, shape, at=expert * each))
            return self._multiply(at, rows, parts, container, out, into, None)

        def run(at: str, rows: str, act: str) -> str:
            g = self.graph
            both = multiply(f"{at}.gate_up", rows, "gate_up", 2 * inner, hidden)
            both = g.node("Reshape", [both, g.constant("pairs", np.array([0, inner, 2]))], f"{at}.pairs")
            gate, up = (
                g.node("Gather", [both, g.constant(f"index.{i}", np.array(i))], f"{at}.{part}", axis=2)
                for i, part in enumerate(("gate", "up"))
            )
            return multiply(f"{at}.down", self.gated(f"{at}.inner", gate, up, act), "down", hidden, inner)

        return run

    def _plus(self, name: str, x: str, y: str) -> str:
        return self.graph.node("Add", [x, y], name)

    def _integers(self, name: str, x: str, weight: str, container: Linear, bias: str | None) -> str:
        """Int8 with int8: the inputs' codes, which whatever multiplies the same inputs shares, and a scale for each output."""
        g = self.graph
        codes, scales, *static = self._parts(weight, container)
        # Unsigned with the zero point in the middle: for those CPUs have faster products with signed weights.
        zero = g.constant("int8.zero", np.array(128, np.uint8))
        last = [g.vector(bias)] if bias else []
        if static:
            tensor = g.quant[weight]
            assert isinstance(tensor, QuantTensor)
            key = (x, float(tensor.input_scale or 0))
            if key not in self._rounded:
                self._rounded[key] = g.node("QuantizeLinear", [x, *static, zero], f"{name}.int8")
            inputs = [self._rounded[key], codes, *static, scales, zero, *(["", *last] if last else [])]
            return g.node("MatMulIntegerToFloat", inputs, name, domain=DOMAIN)
        given, step = self._by_token(x, zero)
        one = g.constant("int8.one", np.ones((), np.float32))
        y = g.node("MatMulIntegerToFloat", [given, codes, one, scales, zero], f"{name}.sums", domain=DOMAIN)
        y = g.node("Mul", [y, step], f"{name}.product" if bias else name)
        return self._plus(name, y, *last) if bias else y

    def _by_token(self, x: str, zero: str) -> tuple[str, str]:
        """Codes of x [..., in] under a scale for each token, amax / 127, and these scales [..., 1].

        A token of zeros has the scale 0, by which whatever its codes give is multiplied.
        """
        g, given, step = self.graph, f"{x}.int8", f"{x}.int8.step"
        if any(node.name == given for node in g.nodes):
            return given, step
        last = g.constant("last", np.array([-1]))
        largest = g.node("ReduceMax", [g.node("Abs", [x], f"{x}.abs"), last], f"{x}.largest", keepdims=1)
        g.node("Div", [largest, g.constant("int8.largest", np.array(127, np.float32))], step)
        steps = g.node("Reshape", [step, last], f"{step}.flat")
        zeros = g.node("Expand", [zero, g.node("Shape", [steps], f"{x}.count")], f"{x}.int8.zeros")
        g.node("Flatten", [x], f"{x}.rows", axis=-1)
        codes = g.node("QuantizeLinear", [f"{x}.rows", steps, zeros], f"{given}.rows", axis=0)
        g.node("Reshape", [codes, g.node("Shape", [x], f"{x}.shape")], given)
        return given, step

    def _parts(self, weight: str, container: Container, **shapes: tuple[int, ...]) -> list[str]:
        """The initializers of a tensor: codes, scales, zero points; of another shape where one is given and nobody has asked before."""
        found = []
        for part, (_, shape) in container.shapes(*self._shape(weight)).items():
            shape = shapes.get(part, shape)
            found.append(self.graph.part(f"{weight}.{part}", part, container, [(weight,)], shape))
        return found

    def _n_bits(self, name: str, x: str, weight: str, container: NBits, bias: str | None) -> str:
        out, into = self._shape(weight)
        blocks = container.blocks(out, into)
        codes, *rest = self._parts(weight, container, codes=blocks)
        codes = self.graph.view(f"{weight}.blocks", codes, blocks)
        vector = self.graph.vector(bias) if bias else None
        return self._multiply(name, x, [codes, *rest], container, out, into, vector)

    def _multiply(
        self, name: str, x: str, parts: Sequence[str], container: NBits, out: int, into: int, bias: str | None
    ) -> str:
        inputs = [x, *parts]
        if bias:
            inputs = [*inputs, *[""] * (5 - len(inputs)), bias]
        return self.graph.node(
            "MatMulNBits", inputs, name, domain=DOMAIN,
            N=out, K=into, bits=container.bits, block_size=container.block, accuracy_level=0 if self.exact else 4,
        )  # fmt: skip

    def _float8(self, name: str, x: str, weight: str, container: Float8) -> str:
        """Codes as float32, made when the model is loaded; scales of rows on the product, or each matrix would be made and kept twice."""
        rows, _ = self._shape(weight)
        codes, scales = self._parts(weight, container, scales=(rows,))
        wide = self._float32(codes, f"{weight}.float32")
        y = self.graph.node("FusedMatMul", [x, wide], f"{name}.unscaled", domain=DOMAIN, transB=1)
        return self.graph.node("Mul", [y, self.graph.view(f"{weight}.row_scales", scales, (rows,))], name)
