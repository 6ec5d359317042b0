"""The graph as compilers of engines take it: every value has the type that it is computed in, and the cache stands outside of attention.

Matmuls and what lies between them are float16; hidden states between layers, norms, softmax, routing and soft caps are float32, since
there float16 would overflow or lose what is small. ``exact`` writes the same graph over the same data with float32 everywhere.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from tapeout.errors import SchemeError
from tapeout.exporters import Refused
from tapeout.exporters.onnx.blocks import Bnb4, Container, Floats, Linear, as_held
from tapeout.exporters.onnx.emitter import Routing, Sum, Value
from tapeout.exporters.onnx.graph import library
from tapeout.exporters.onnx.standard import StandardOps
from tapeout.models.decoder import Attention, Mla, Moe, Role
from tapeout.models.rope import Rope
from tapeout.quantize import QuantTensor, Scheme

LOGITS_AT = "logits_at"
_LOW = (
    np.finfo(np.float32).min / 2
)  # for what the mask hides: finite, so that a row with nothing else stays a number


@dataclass
class TypedOps(StandardOps):
    """``Ops`` that writes typed operators; a compiler's own are in its subclass."""

    _wide: set[str] = field(default_factory=set)  # values that are float32 where others are float16

    @staticmethod
    @abstractmethod
    def held(scheme: Scheme, *, turned: bool) -> Container | Refused:
        """What holds a matrix of the scheme."""

    @abstractmethod
    def _cached(self, layer: int, part: str, new: str, heads: int, width: int) -> str:
        """Declare a layer's cache, append to it what is new [batch, heads, tokens, width]; every token so far."""

    @property
    def _half(self) -> int:
        kinds = library().TensorProto
        return int(kinds.FLOAT if self.exact else kinds.FLOAT16)

    def ids(self) -> str:
        """Declare what every step is given; positions and the rows whose logits are wanted among it."""
        onnx = library()
        kind = onnx.TensorProto.INT64
        self.graph.inputs += [
            onnx.helper.make_tensor_value_info(name, kind, shape) for name, shape in self._given().items()
        ]
        self.graph.constant("one", np.ones(1, np.int64))
        return "input_ids"

    def _given(self) -> dict[str, list[str | int]]:
        return {
            "input_ids": ["batch", "tokens"],
            "position_ids": ["batch", "tokens"],
            "attention_mask": ["batch", "total"],
            LOGITS_AT: ["logits_tokens"],
        }

    def logits(self, value: Value) -> None:
        """Declare what every step gives, in float32."""
        name = self._use(value)
        assert name in self._wide or self.exact
        super().logits(name)

    def embedding(self, name: str, ids: Value, weight: str, scale: float) -> str:
        """Gather."""
        table = self._weight(weight, lookup=True)
        last = name if scale == 1.0 else f"{name}.plain"
        rows = self.graph.node("Gather", [table, self._use(ids)], last if self.exact else f"{name}.rows")
        y = self._float(rows, last)
        container = self._container(weight, turned=False)
        if isinstance(container, Floats) and container.bits == 4:
            last = f"{last}.scaled"
            y = self._mark(self.graph.node("Mul", [y, self._rest_of_scale(weight)], last))
        return y if scale == 1.0 else self._mark(self._times(name, y, scale))

    def linear(self, name: str, x: Value, weight: str, bias: str | None) -> str:
        """MatMul, and Add; in float32 of routers and of rounded inputs, to float32 by routers and the head."""
        g, x = self.graph, self._wanted(name, x)
        router = g.quant.model.specs[weight].role is Role.ROUTER
        container = None if router else self._container(weight, turned=not self._tied(weight))
        rounded = isinstance(container, Linear | Floats) and container.static
        scaled = isinstance(container, Floats) and container.bits == 4
        computed = router or rounded or scaled or isinstance(container, Bnb4)
        wanted = router or name in ("logits", "head")
        last = name if computed == wanted or self.exact else f"{name}.{'wide' if computed else 'narrow'}"
        at = f"{last}.product" if bias else last
        if router:
            turned = self._once("Transpose", [g.vector(weight)], f"{weight}.turned", perm=[1, 0])
            y = g.node("MatMul", [self._float(x), turned], at)
        elif rounded:
            assert isinstance(container, Linear | Floats)
            y = self._rounded(at, self._float(x), weight, container)
        elif isinstance(container, Bnb4):
            y = self._bnb4(at, self._float(x), weight, container)
        else:
            product = f"{at}.unscaled" if scaled else at
            y = g.node("MatMul", [self._narrow(x), self._weight(weight, lookup=False)], product)
        if scaled:
            y = g.node("Mul", [self._float(y), self._rest_of_scale(weight)], at)
        if bias:
            vector = g.vector(bias)
            y = g.node("Add", [y, vector if computed else self._narrow(vector)], last)
        if computed:
            self._mark(y)
        if last == name:
            return y
        return self._cast(y, name, self._half) if computed else self._float(y, name)

    def rms_norm(self, name: str, x: Value, weight: str, *, eps: float, offset: float, parts: int = 1) -> str:
        """In float32."""
        x = self._float(self._use(x))
        at = name if self.exact else f"{name}.wide"
        y = self._mark(self._rms(at, x, self._gamma(weight, offset), eps, parts))
        return y if self.exact else self._cast(y, name, self._half)

    def add(self, name: str, x: Value, y: Value) -> Sum:
        """A sum of float32."""
        self._mark(name)
        return super().add(name, self._float(self._use(x)), self._float(self._use(y)))

    def softcap(self, name: str, x: Value, cap: float) -> str:
        """In float32."""
        y = self._times(f"{name}.small", self._float(self._use(x)), 1 / cap)
        return self._mark(self._times(name, self.graph.node("Tanh", [y], f"{name}.tanh"), cap))

    def route(self, name: str, logits: Value, bias: str | None, moe: Moe) -> Routing:
        """In float32."""
        found = super().route(name, self._float(self._use(logits)), bias, moe)
        self._wide |= {found.weights, found.ranks}
        return found

    def sigmoid_gate(self, name: str, x: Value, logit: Value) -> str:
        """In float32."""
        gate = self.graph.node("Sigmoid", [self._float(self._use(logit))], f"{name}.gate")
        return self._mark(self.graph.node("Mul", [self._float(self._use(x)), gate], name))

    def attention(self, name: str, query: Value, key: Value, value: Value, spec: Attention) -> str:
        """Turned queries and keys, the cache, and attention over it."""
        q = self._turn(f"{name}.q", self._use(query), spec.heads, spec.rope)
        k = self._turn(f"{name}.k", self._use(key), spec.kv_heads, spec.rope)
        window = spec.window if spec.window and spec.window < self.context else None
        keys, values = (
            self._cached(
                spec.layer,
                part,
                self._split_heads(f"{name}.{part}", each, spec.kv_heads, spec.head_dim),
                spec.kv_heads,
                spec.head_dim,
            )
            for part, each in (("key", k), ("value", self._use(value)))
        )
        return self._attended(name, (q, keys, values), spec, window)

    def _attend_latents(self, name: str, query: str, key: str, latent: str, spec: Attention, mla: Mla) -> str:
        """One cache: values are the first part of the keys."""
        width = mla.kv_rank + mla.rope_dim
        keys = self._cached(spec.layer, "key", self._split_heads(f"{name}.key", key, 1, width), 1, width)
        begin, end, last = (
            self.graph.constant(f"latent.{part}", np.array([value]))
            for part, value in (("from", 0), ("to", mla.kv_rank), ("axis", 3))
        )
        values = self.graph.node("Slice", [keys, begin, end, last], f"{name}.values")
        shared = replace(spec, kv_heads=1, head_dim=width)
        return self._composed(name, (query, keys, values), shared, None)

    def _attended(self, name: str, inputs: tuple[str, str, str], spec: Attention, window: int | None) -> str:
        """Attention of turned queries [batch, tokens, heads · width] over keys and values [batch, kv_heads, total, width]."""
        return self._composed(name, inputs, spec, window)

    def _composed(self, name: str, inputs: tuple[str, str, str], spec: Attention, window: int | None) -> str:
        """Matmuls, and a softmax in float32; the heads of a group share keys by broadcasting."""
        g, (q, keys, values) = self.graph, inputs

        def at(part: str) -> str:
            return f"{name}.{part}"

        each = spec.heads // spec.kv_heads
        by = self._narrow(g.constant(at("scale"), np.array(spec.scale, np.float32)))
        q = self._shaped(
            g.node("Mul", [q, by], at("scaled")), (0, 0, spec.kv_heads, each, spec.head_dim), at("groups")
        )
        q = g.node("Transpose", [q], at("queries"), perm=[0, 2, 3, 1, 4])
        two = g.constant("axis.2", np.array([2]))
        keys = g.node("Transpose", [keys], at("keys.turned"), perm=[0, 1, 3, 2])
        keys, values = (
            g.node("Unsqueeze", [x, two], at(f"{part}.shared"))
            for part, x in (("keys", keys), ("values", values))
        )
        scores = self._float(g.node("MatMul", [q, keys], at("products")))
        if spec.softcap:
            scores = self.softcap(at("capped"), scores, spec.softcap)
        mask = self._mask(window)
        mask = self._once("Unsqueeze", [mask, two], f"{mask}.shared")
        low = g.constant("low", np.array(_LOW, np.float32))
        scores = g.node("Where", [mask, scores, low], at("masked"))
        shares = self._mark(g.node("Softmax", [scores], at("shares"), axis=-1))
        y = g.node("MatMul", [self._narrow(shares), values], at("heads"))
        y = g.node("Transpose", [y], at("tokens"), perm=[0, 3, 1, 2, 4])
        return self._shaped(y, (0, 0, -1), name)

    def _split_heads(self, name: str, x: str, heads: int, width: int) -> str:
        """[batch, tokens, heads · width] to [batch, heads, tokens, width]."""
        y = self._shaped(x, (0, 0, heads, width), f"{name}.split")
        return self.graph.node("Transpose", [y], f"{name}.heads", perm=[0, 2, 1, 3])

    def _of_latents(self, weight: str) -> str:
        return self._narrow(self.graph.vector(weight))

    def _by_position(self, rope: Rope) -> tuple[str, str, str]:
        """Tables as float16, and rows of them."""
        cos, sin, position = self._rope(rope, always=True)
        assert position is not None
        return self._narrow(cos), self._narrow(sin), position

    def _positions(self, at: str, trained: int | None) -> str:
        if trained is None:
            return "position_ids"
        g, name = self.graph, f"{at}.positions"
        if name not in g.names:
            long = g.node(
                "Greater", [self._total(), g.constant(f"{at}.trained", np.array([trained]))], f"{at}.is_long"
            )
            places = (
                g.constant(f"{at}.table", np.array([self.context])),
                g.constant("zero.int64", np.zeros(1, np.int64)),
            )
            g.node("Add", ["position_ids", g.node("Where", [long, *places], f"{at}.offset")], name)
        return name

    def _total(self) -> str:
        """Tokens so far, int64 [1]."""
        return self._once("Shape", ["attention_mask"], "total", start=1, end=2)

    def _wanted(self, name: str, x: Value) -> str:
        x = self._use(x)
        if name not in ("logits", "head"):
            return x
        y = self.graph.node("Gather", [x, LOGITS_AT], "wanted", axis=1)
        return self._mark(y) if x in self._wide else y

    def _container(self, weight: str, *, turned: bool) -> Container | None:
        g = self.graph
        scheme, spec = g.quant.schemes[weight], g.quant.model.specs[weight]
        if scheme.kind == "none":
            return None
        found = self.held(as_held(scheme, spec.role), turned=turned)
        if isinstance(found, Refused):
            raise SchemeError(f"{weight} is {scheme}: {found.reason} What fits: {found.nearest}.")
        return found

    def _tied(self, weight: str) -> bool:
        tied = self.graph.quant.model.config.tie_word_embeddings
        return bool(tied) and weight == "model.embed_tokens.weight"

    def _weight(self, weight: str, *, lookup: bool) -> str:
        """A matrix as float16, [out, in] for a lookup, [in, out] for a MatMul."""
        turned = not lookup and not self._tied(weight)
        out, into = self._shape(weight)
        container = self._container(weight, turned=turned)
        if container is None:
            matrix = self.graph.floats(weight)
            narrow = self.graph.initializers[matrix].kind == ("FLOAT" if self.exact else "FLOAT16")
            wide = matrix if narrow else self._cast(matrix, f"{weight}.values", self._half)
        elif isinstance(container, Bnb4):
            raise SchemeError(f"{weight} is looked up, and NF4 is multiplied only. What fits: int8.")
        else:
            wide = self._dequantized(weight, container, out, into)
            if turned:
                return wide
        if lookup:
            return wide
        return self._once("Transpose", [wide], f"{weight}.turned", perm=[1, 0])

    def _parts_of(self, weight: str, container: Container, out: int, into: int) -> dict[str, str]:
        return {
            part: self.graph.part(f"{weight}.{part}", part, container, [(weight,)], shape)
            for part, (_, shape) in container.shapes(out, into).items()
        }

    def _dequantized(self, weight: str, container: Container, out: int, into: int) -> str:
        assert isinstance(container, Linear | Floats)
        name = f"{weight}.values"
        if name in self.graph.names:
            return name
        parts = self._parts_of(weight, container, out, into)
        if isinstance(container, Floats) and container.bits == 4:
            return self._float4(weight, name, parts, container)
        parts.pop("input_scale", None)
        parts["scales"] = self._as_scales(weight, parts["scales"])
        blocks: dict[str, Any] = (
            {"block_size": container.block} if isinstance(container, Linear) and container.block else {}
        )
        return self.graph.node("DequantizeLinear", list(parts.values()), name, axis=container.axis, **blocks)

    def _as_scales(self, weight: str, scales: str) -> str:
        """Scales of the type that a matrix is of."""
        narrow = self.graph.initializers[scales].kind == ("FLOAT" if self.exact else "FLOAT16")
        return scales if narrow else self._cast(scales, f"{weight}.scales.as", self._half)

    def _float4(self, weight: str, name: str, parts: dict[str, str], container: Floats) -> str:
        """E2M1 under E4M3, without the rest of the tensor's scale: what float16 holds exactly."""
        step = self.graph.constant(f"{weight}.step", np.array(self._step(weight), np.float32))
        scales = [parts["scales"], self._narrow(step)]
        scales = [parts["codes"], self.graph.node("DequantizeLinear", scales, f"{name}.scales")]
        return self.graph.node(
            "DequantizeLinear", scales, name, axis=container.axis, block_size=container.block
        )

    def _step(self, weight: str) -> np.float32:
        """The power of two below the one scale of a tensor; float16 would round the scale itself, or lose it."""
        tensor = self.graph.quant[weight]
        assert isinstance(tensor, QuantTensor)
        assert tensor.scale_codes is not None
        (scale,) = tensor.scale_codes.block.reshape(-1)
        return np.float32(2.0 ** np.clip(np.floor(np.log2(float(scale))), -14, 15))

    def _rest_of_scale(self, weight: str) -> str:
        """What is left of the tensor's scale, float32 and mostly between 1 and 2, for what was multiplied."""
        return self._once("Div", [f"{weight}.scale", f"{weight}.step"], f"{weight}.rest")

    def _rounded(self, name: str, x: str, weight: str, container: Linear | Floats) -> str:
        """Int8 with int8, or E4M3 with E4M3: QuantizeLinear and DequantizeLinear around the inputs, all under float32 scales."""
        g, (out, into) = self.graph, self._shape(weight)
        parts, tensor = self._parts_of(weight, container, out, into), g.quant[weight]
        assert isinstance(tensor, QuantTensor)
        assert tensor.input_scale is not None
        given = x
        if not self.exact:  # which leaves inputs as they are
            kind = "int8" if isinstance(container, Linear) else "float8"
            helper, kinds = library().helper, library().TensorProto
            element = kinds.INT8 if kind == "int8" else kinds.FLOAT8E4M3FN
            zero = g.constant(f"{kind}.zero", np.zeros((), helper.tensor_dtype_to_np_dtype(element)))
            given = f"{x}.{kind}.{tensor.input_scale.view(np.uint32):08x}"  # what multiplies the same codes shares them
            codes = self._once("QuantizeLinear", [x, parts["input_scale"], zero], f"{given}.codes")
            self._once("DequantizeLinear", [codes, parts["input_scale"], zero], given)
        rows: dict[str, Any] = {"axis": container.axis} if isinstance(container, Linear) else {}
        matrix = g.node("DequantizeLinear", [parts["codes"], parts["scales"]], f"{weight}.values", **rows)
        return g.node("MatMul", [given, matrix], name)

    def _bnb4(self, name: str, x: str, weight: str, container: Bnb4) -> str:
        """NF4 by an operator of its own, where there is one."""
        raise NotImplementedError

    def experts(self, name: str, x: Value, routing: Value, layer: int, act: str, moe: Moe) -> str:
        """Every expert on every token, times its weight, which is mostly zero: shapes do not depend on values."""
        assert isinstance(routing, Routing)
        g, x, hidden = self.graph, self._use(x), self.graph.quant.model.config.hidden_size
        g.note(
            f"every one of {moe.experts} experts is computed for every token: a compiled graph's shapes do not depend on values"
        )
        rows = g.node("Reshape", [x, g.constant("rows.hidden", np.array([-1, hidden]))], f"{name}.rows")
        out = ""
        for expert in range(moe.experts):
            at, column = f"{name}.{expert}", g.constant(f"column.{expert}", np.array([expert]))
            share = g.node("Gather", [routing.weights, column], f"{at}.share", axis=1)
            mine = self._apart(moe.weights(layer, expert))(at, rows, act)
            mine = g.node("Mul", [self._float(mine), share], f"{at}.weighted")
            out = g.node("Add", [out, mine], f"{at}.sum") if out else mine
        return self._mark(g.node("Reshape", [out, g.node("Shape", [x], f"{name}.whole")], name))

    def _mark(self, name: str) -> str:
        """Remember that a value is float32."""
        self._wide.add(name)
        return name

    def _cast(self, x: str, name: str, kind: int) -> str:
        return self._once("Cast", [x], name, to=kind)

    def _float(self, x: str, name: str | None = None) -> str:
        """A value as float32; if it is float16, under this name."""
        if self.exact or x in self._wide:
            return x
        return self._mark(self._cast(x, name or f"{x}.float32", library().TensorProto.FLOAT))

    def _narrow(self, x: str) -> str:
        """A value as float16."""
        constant = x in self.graph.constants or x in self.graph.initializers
        if self.exact or not (x in self._wide or constant):
            return x
        return self._cast(x, f"{x}.float16", self._half)
