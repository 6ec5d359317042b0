"""The encoder's graph in onnxruntime's own operators: whole batches in, with sequences of any length and a padding mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tapeout.exporters.onnx.contrib import ContribOps
from tapeout.exporters.onnx.emitter import Value
from tapeout.exporters.onnx.graph import DOMAIN, library
from tapeout.models.encoder import LOWEST, EncoderConfig, SelfAttention
from tapeout.models.rope import cos_sin


@dataclass
class EncoderContribOps(ContribOps):
    """``EncoderOps`` that writes nodes; see ``tapeout.models.encoder``."""

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

    def add(self, name: str, x: Value, y: Value) -> str:  # type: ignore[override]
        """Add."""
        return self._plus(name, self._use(x), self._use(y))

    def _plus(self, name: str, x: str, y: str) -> str:
        """Add, of a bias as a row: one of a single axis would be made one with a GELU behind it (BiasGelu of onnxruntime 1.32).

        That kernel takes longer than both nodes.
        """
        known = self.graph.initializers
        if y in known and len(known[y].shape) == 1:
            y = self.graph.view(f"{y}.row", y, (1, *known[y].shape))
        return super()._plus(name, x, y)

    def layer_norm(self, name: str, x: Value, weight: str, bias: str, *, eps: float) -> str:
        """LayerNormalization."""
        given = [self._use(x), self.graph.vector(weight), self.graph.vector(bias)]
        return self.graph.node("LayerNormalization", given, name, axis=-1, epsilon=eps)

    def activation(self, name: str, x: Value, act: str) -> str:
        """One node."""
        g, y = self.graph, self._use(x)
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
            num_heads=spec.heads, mask_filter_value=LOWEST,
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
