"""The encoder's graph in onnxruntime's own operators: whole batches in, with sequences of any length and a padding mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tapeout.exporters.onnx.blocks import NBits
from tapeout.exporters.onnx.contrib import ContribOps
from tapeout.exporters.onnx.emitter import Cut, Routing, Sum
from tapeout.exporters.onnx.graph import DOMAIN, library
from tapeout.models.encoder import EncoderConfig, SelfAttention
from tapeout.models.rope import cos_sin

_LOWEST = float(np.finfo(np.float32).min)  # what scores of padding become


@dataclass
class Biased:
    """A product whose bias is added by what reads it, where that can, or as soon as something else does."""

    name: str
    product: str
    bias: str
    written: bool = False


Value = str | Sum | Cut | Routing | Biased


@dataclass
class EncoderContribOps(ContribOps):
    """``EncoderOps`` that writes nodes; see ``tapeout.models.encoder``."""

    keep_sums: bool = False  # pre-norm: what a norm adds up is used again

    def ids(self) -> str:
        """Declare what every batch is given, and what follows from it."""
        onnx = library()
        g, info, kinds = self.graph, onnx.helper.make_tensor_value_info, onnx.TensorProto
        config = g.quant.model.config
        assert isinstance(config, EncoderConfig)
        g.inputs += [info(name, kinds.INT64, ["batch", "tokens"]) for name in ("input_ids", "attention_mask")]
        if config.type_rows:
            g.constant("token_type_ids", np.zeros((1, 1), np.int64))
        if config.type_rows > 1:
            # With that initializer of its name it may be left out: every token is of type 0 then. Dimensions of its own, or
            # onnxruntime takes one row of types for as many as there are tokens when it plans its memory.
            g.inputs.append(info("token_type_ids", kinds.INT64, ["types_batch", "types_tokens"]))
        return "input_ids"

    def output(self, value: Value, config: EncoderConfig) -> None:
        """Declare what every batch gives, by the name of ``config.output``."""
        onnx = library()
        name = self._use(value)
        if name != config.output:
            name = self.graph.rename(name, config.output)
        shape = ["batch", config.width]
        if config.output == "last_hidden_state":
            shape = ["batch", "tokens", config.width]
        self.graph.outputs.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))

    def linear(self, name: str, x: Value, weight: str, bias: str | None) -> Value:  # type: ignore[override]
        """As for decoders, but the bias of a matmul that takes none goes into what follows."""
        x = self._use(x)
        if bias is None or isinstance(self.graph.container(weight), NBits):
            return super().linear(name, x, weight, bias)
        return Biased(name, super().linear(f"{name}.product", x, weight, None), self.graph.vector(bias))

    def _wanted(self, name: str, x: Value) -> str:
        """All of it: no row of a head's input is left out."""
        return self._use(x)

    def positions(self, name: str, ids: Value, weight: str, padding: int | None) -> str:
        """The table's first rows, or a Gather where positions leave out padding."""
        g, table = self.graph, self.graph.vector(weight)
        if padding is None:
            count = g.node("Shape", [self._use(ids)], "tokens", start=1, end=2)
            zero, one = (
                g.constant("zero.int64", np.zeros(1, np.int64)),
                g.constant("one", np.ones(1, np.int64)),
            )
            return g.node("Slice", [table, zero, count, zero, one], name)
        pad = g.constant("padding", np.array(padding, np.int64))
        kinds = library().TensorProto
        real = g.node("Not", [g.node("Equal", [self._use(ids), pad], f"{name}.padding")], f"{name}.real")
        real = g.node("Cast", [real], f"{name}.ones", to=kinds.INT64)
        count = g.node("CumSum", [real, g.constant("axis.1", np.array(1))], f"{name}.count")
        rows = g.node("Add", [g.node("Mul", [count, real], f"{name}.counted"), pad], f"{name}.rows")
        return g.node("Gather", [table, rows], name)

    def token_types(self, name: str, weight: str) -> str:
        """Gather."""
        return self.graph.node("Gather", [self.graph.vector(weight), "token_type_ids"], name)

    def add(self, name: str, x: Value, y: Value) -> Sum:
        """Nothing yet: a norm takes the sum with it, and a bias in its second part."""
        mine = self._use(x)
        if isinstance(y, Biased) and not y.written:
            y.written = True
            return BiasedSum(name, mine, y.product, bias=y.bias)
        return Sum(name, mine, self._use(y))

    def layer_norm(self, name: str, x: Value, weight: str, bias: str, *, eps: float) -> str:
        """LayerNormalization, or SkipLayerNormalization of a sum that nobody has asked for yet."""
        given = [self.graph.vector(weight), self.graph.vector(bias)]
        if isinstance(x, Sum) and not x.written:
            outputs = [name]
            if self.keep_sums:
                x.written = True
                outputs = [name, "", "", x.name]
            more = [x.bias] if isinstance(x, BiasedSum) else []
            return self.graph.node(
                "SkipLayerNormalization", [x.x, x.y, *given, *more], name, outputs, domain=DOMAIN, epsilon=eps
            )
        return self.graph.node("LayerNormalization", [self._use(x), *given], name, axis=-1, epsilon=eps)

    def activation(self, name: str, x: Value, act: str) -> str:
        """One node; the exact GELU adds the bias of what it is given."""
        g = self.graph
        if act == "gelu" and isinstance(x, Biased) and not x.written:
            x.written = True
            return g.node("BiasGelu", [x.product, x.bias], name, domain=DOMAIN)
        y = self._use(x)
        if act == "silu":
            return g.node("QuickGelu", [y], name, domain=DOMAIN, alpha=1.0)
        if act.startswith("gelu"):
            return g.node("Gelu", [y], name, approximate="none" if act == "gelu" else "tanh")
        return g.node({"relu": "Relu", "tanh": "Tanh"}[act], [y], name)

    def self_attention(self, name: str, query: Value, key: Value, value: Value, spec: SelfAttention) -> str:
        """MultiHeadAttention, with the padding mask."""
        g = self.graph
        q, k, v = (self._use(each) for each in (query, key, value))
        if spec.rope:
            for part, values in zip(("cos", "sin"), cos_sin(spec.rope, np.arange(self.context)), strict=True):
                g.table(f"rope.{part}", values)
            first = g.constant("zero.int64", np.zeros(1, np.int64))
            q, k = (
                g.node(
                    "RotaryEmbedding", [each, first, "rope.cos", "rope.sin"], f"{name}.{part}", domain=DOMAIN,
                    num_heads=spec.heads, rotary_embedding_dim=spec.rope.dim,
                )
                for part, each in (("q", q), ("k", k))
            )  # fmt: skip
        mask = self._once("Cast", ["attention_mask"], "padding_mask", to=library().TensorProto.INT32)
        return g.node(
            "MultiHeadAttention", [q, k, v, "", mask], name, domain=DOMAIN,
            num_heads=spec.heads, mask_filter_value=_LOWEST,
        )  # fmt: skip

    def first(self, name: str, x: Value) -> str:
        """Gather of row 0."""
        return self.graph.node(
            "Gather", [self._use(x), self.graph.constant("index.0", np.array(0))], name, axis=1
        )

    def mean(self, name: str, x: Value) -> str:
        """A sum over what the mask leaves, and a division."""
        g, last = self.graph, self.graph.constant("last", np.array([-1]))
        axis = g.constant("tokens.axis", np.array([1]))
        mask = self._once("Cast", ["attention_mask"], "mask.float", to=library().TensorProto.FLOAT)
        wide = g.node("Unsqueeze", [mask, last], f"{name}.mask")
        total = g.node(
            "ReduceSum",
            [g.node("Mul", [self._use(x), wide], f"{name}.real"), axis],
            f"{name}.sum",
            keepdims=0,
        )
        return g.node("Div", [total, g.node("ReduceSum", [mask, axis], f"{name}.count", keepdims=1)], name)

    def normalize(self, name: str, x: Value) -> str:
        """A division by the length."""
        g, y = self.graph, self._use(x)
        length = g.node("ReduceL2", [y, g.constant("last", np.array([-1]))], f"{name}.length", keepdims=1)
        least = g.constant("least_length", np.array(1e-12, np.float32))
        return g.node("Div", [y, g.node("Max", [length, least], f"{name}.divisor")], name)

    def _once(self, op: str, inputs: list[str], name: str, *, to: int) -> str:
        """A node that several ask for."""
        if not any(node.name == name for node in self.graph.nodes):
            self.graph.node(op, inputs, name, to=to)
        return name

    def _use(self, value: Value) -> str:
        if isinstance(value, Biased):
            if not value.written:
                value.written = True
                self.graph.node("Add", [value.product, value.bias], value.name)
            return value.name
        if isinstance(value, BiasedSum) and not value.written:
            value.written = True
            y = self.graph.node("Add", [value.y, value.bias], f"{value.name}.biased")
            return self.graph.node("Add", [value.x, y], value.name)
        return super()._use(value)


@dataclass
class BiasedSum(Sum):
    """A sum whose second part still lacks its bias."""

    bias: str = ""
