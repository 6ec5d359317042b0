"""An encoder-decoder in onnxruntime's own operators: two graphs over one data file.

``encoder.onnx`` makes of ``input_ids`` and ``attention_mask`` the keys and values ``cross.N.key`` and ``cross.N.value`` of every
layer of the decoder, [batch, heads, source, head_dim]. ``model.onnx``, the decoder, takes them with ``encoder_attention_mask``,
its own ``input_ids`` and cache (``past_key_values.N.key`` …), and gives ``logits`` and the cache with these tokens (``present.N.key`` …).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from tapeout.exporters.onnx.emitter import Value
from tapeout.exporters.onnx.encoder import EncoderContribOps
from tapeout.exporters.onnx.graph import DOMAIN, library
from tapeout.models.encoder import LOWEST
from tapeout.models.seq2seq import Seq2SeqConfig, Stack

ENCODER = "encoder.onnx"


@dataclass
class Seq2SeqContribOps(EncoderContribOps):
    """``Seq2SeqOps`` that writes nodes, those of one of the two graphs; see ``tapeout.models.seq2seq``."""

    stack: Stack = "encoder"

    @property
    def _config(self) -> Seq2SeqConfig:
        config = self.graph.quant.model.config
        assert isinstance(config, Seq2SeqConfig)
        return config

    def ids(self) -> str:
        """Declare what the graph is given, but for what its layers take."""
        self._input("input_ids", ["batch", "tokens"], floats=False)
        self._input(self._padding, ["batch", "source" if self.stack == "decoder" else "tokens"], floats=False)
        return "input_ids"

    def logits(self, value: Value) -> None:
        """Declare what a step of the decoder gives."""
        self._output(self._use(value), ["batch", "tokens", self._config.vocab_size])
        self.graph.outputs.insert(0, self.graph.outputs.pop())

    def scaled(self, name: str, x: Value, factor: float) -> str:
        """Mul."""
        return self._times(name, self._use(x), factor)

    def relative_bias(self, name: str, weight: str, stack: Stack) -> str:
        """Rows by distance, made of constants when the model is loaded; then a Gather of the distances of this step."""
        g, buckets = self.graph, self._config.bucket(stack)
        rows = g.node("Gather", [g.vector(weight), g.constant(f"{name}.buckets", buckets)], f"{name}.rows")
        if stack == "decoder":
            ahead = np.where(np.arange(len(buckets)) > len(buckets) // 2, LOWEST, 0).astype(np.float32)
            rows = g.node("Add", [rows, g.constant(f"{name}.ahead", ahead[:, None])], f"{name}.causal")
        count = self._count("tokens", "input_ids", 1)
        first = g.constant("index.0", np.array(0))
        if stack == "decoder":
            first = self._count("past", "past_key_values.0.key", 2)
        total = g.node("Add", [first, count], f"{name}.total")
        one = g.constant("index.1", np.array(1))
        keys = g.node("Range", [g.constant("index.0", np.array(0)), total, one], f"{name}.keys")
        queries = g.node("Range", [first, total, one], f"{name}.queries")
        queries = g.node(
            "Unsqueeze", [queries, g.constant("column", np.array([1]))], f"{name}.queries.column"
        )
        distance = g.node("Sub", [keys, queries], f"{name}.distance")
        middle = g.constant("distance.0", np.array(len(buckets) // 2))
        at = g.node("Add", [distance, middle], f"{name}.at")
        bias = g.node("Gather", [rows, at], f"{name}.by_head")
        bias = g.node("Transpose", [bias], f"{name}.heads", perm=[2, 0, 1])
        return g.node("Unsqueeze", [bias, g.constant("front", np.array([0]))], name)

    def biased_attention(
        self, name: str, query: Value, key: Value, value: Value, bias: Value, heads: int, layer: int | None
    ) -> str:
        """MultiHeadAttention, with the padding mask or a cache."""
        inputs = [*(self._use(each) for each in (query, key, value)), ""]
        if layer is None:
            return self._attend(name, [*inputs, self._mask(), self._use(bias)], heads)
        past, present = [], []
        for part in ("key", "value"):
            past.append(f"past_key_values.{layer}.{part}")
            present.append(f"present.{layer}.{part}")
            self._input(past[-1], self._heads("past"))
            self._output(present[-1], self._heads("kept"))
        return self._attend(name, [*inputs, "", self._use(bias), *past], heads, present)

    def source(self, layer: int, key: Value, value: Value) -> None:
        """Outputs, heads apart."""
        g, c = self.graph, self._config
        apart = g.constant("heads.apart", np.array([0, 0, c.num_heads, c.head_dim]))
        for part, x in (("key", key), ("value", value)):
            name = f"cross.{layer}.{part}"
            y = g.node("Reshape", [self._use(x), apart], f"{name}.apart")
            g.node("Transpose", [y], name, perm=[0, 2, 1, 3])
            self._output(name, self._heads("tokens"))

    def cross_attention(self, name: str, query: Value, heads: int, layer: int) -> str:
        """MultiHeadAttention over what ``source`` has kept."""
        names = [f"cross.{layer}.{part}" for part in ("key", "value")]
        for each in names:
            self._input(each, self._heads("source"))
        return self._attend(name, [self._use(query), *names, "", self._mask()], heads)

    def _attend(self, name: str, inputs: list[str], heads: int, present: list[str] | None = None) -> str:
        return self.graph.node(
            "MultiHeadAttention", inputs, name, [name, *(present or [])], domain=DOMAIN,
            num_heads=heads, scale=1.0, mask_filter_value=LOWEST,
        )  # fmt: skip

    @property
    def _padding(self) -> str:
        return "attention_mask" if self.stack == "encoder" else "encoder_attention_mask"

    def _mask(self) -> str:
        return self._once("Cast", [self._padding], "padding_mask", to=library().TensorProto.INT32)

    def _count(self, name: str, x: str, axis: int) -> str:
        """Elements of an axis, a scalar."""
        g = self.graph
        shape = g.node("Shape", [x], f"{name}.shape", start=axis, end=axis + 1)
        return g.node("Squeeze", [shape], f"{name}.count")

    def _heads(self, length: str) -> list[Any]:
        return ["batch", self._config.num_heads, length, self._config.head_dim]

    def _input(self, name: str, shape: list[Any], *, floats: bool = True) -> None:
        kinds = library().TensorProto
        kind = kinds.FLOAT if floats else kinds.INT64
        self.graph.inputs.append(library().helper.make_tensor_value_info(name, kind, shape))

    def _output(self, name: str, shape: list[Any]) -> None:
        onnx = library()
        self.graph.outputs.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))
