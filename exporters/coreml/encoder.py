"""The encoder's graph in MIL's operators: whole batches in, with sequences of any length and a padding mask."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tapeout.exporters.coreml.emitter import LOWEST, Emitter, Var, builder
from tapeout.exporters.coreml.program import mil_name
from tapeout.models.encoder import SelfAttention
from tapeout.models.rope import cos_sin

OUTPUTS = {"last_hidden_state": "hiddenStates", "sentence_embedding": "embeddings", "logits": "logits"}
"""What a function gives, by what is asked of the model."""


@dataclass
class EncoderMilOps(Emitter):
    """``EncoderOps`` that writes a function; see ``tapeout.models.encoder``.

    Attributes:
        context: most tokens of a sequence.
    """

    context: int = 0
    _mask: Var = None  # int32 [batch, tokens]
    _tokens: Var = None  # of a row, int32 []
    _made: dict[str, Any] = field(default_factory=dict)

    def begin(self, inputs: Any) -> Var:
        """Take the function's inputs; give the token ids."""
        mb = builder()
        self._mask = inputs["attentionMask"]
        lengths = mb.shape(x=self._mask, name="lengths")
        self._tokens = mb.slice_by_index(x=lengths, begin=[1], end=[2], squeeze_mask=[True], name="tokens")
        return inputs["inputIds"]

    def output(self, x: Var, kind: str) -> Var:
        """What the function gives: float32."""
        y, name = self.wide(x), OUTPUTS[kind]
        return y if y.name == name else builder().identity(x=y, name=name)

    def positions(self, name: str, ids: Var, weight: str, padding: int | None) -> Var:
        """Gather of the table's first rows, or of those that count what is no padding."""
        mb, table = builder(), self.graph.vector(weight)
        if padding is None:
            rows = mb.range_1d(start=np.int32(0), end=self._tokens, step=np.int32(1))
            return self._named("gather", name, x=table, indices=rows, axis=0)
        real = mb.cast(x=mb.not_equal(x=ids, y=np.int32(padding)), dtype="int32")
        counted = mb.mul(x=mb.cumsum(x=real, axis=1), y=real)
        rows = mb.add(x=counted, y=np.int32(padding))
        return self._named("gather", name, x=table, indices=rows, axis=0)

    def token_types(self, name: str, weight: str) -> Var:
        """The first row: every token is of type 0."""
        rows = np.zeros(1, np.int32)
        return self._named("gather", name, x=self.graph.vector(weight), indices=rows, axis=0)

    def layer_norm(self, name: str, x: Var, weight: str, bias: str, *, eps: float) -> Var:
        """LayerNorm in float32."""
        return self._named(
            "layer_norm", name, x=self.wide(x), axes=[-1], gamma=self.graph.vector(weight),
            beta=self.graph.vector(bias), epsilon=self._f32(eps),
        )  # fmt: skip

    def activation(self, name: str, x: Var, act: str) -> Var:
        """One operator, in float32: of the tokens' values there are few."""
        return self._act(name, self.wide(x), act)

    def self_attention(self, name: str, query: Var, key: Var, value: Var, spec: SelfAttention) -> Var:
        """Matmuls in float16 and softmax in float32."""
        mb = builder()
        q, k, v = (self._heads(self.wide(x), spec.heads) for x in (query, key, value))
        if spec.rope:
            cos, sin = self._angles(spec)
            q, k = (self._rotate(x, spec.rope, cos, sin) for x in (q, k))
        q = mb.mul(x=q, y=self._f32(spec.head_dim**-0.5))
        q, k, v = (mb.transpose(x=self.half(x), perm=[0, 2, 1, 3]) for x in (q, k, v))
        scores = mb.add(x=self.wide(mb.matmul(x=q, y=k, transpose_y=True)), y=self._hidden())
        y = mb.matmul(x=self.half(mb.softmax(x=scores, axis=-1)), y=v)
        return self._joined(name, y)

    def _angles(self, spec: SelfAttention) -> tuple[Var, Var]:
        if "angles" not in self._made:
            mb, found = builder(), []
            assert spec.rope
            rows = mb.range_1d(start=np.int32(0), end=self._tokens, step=np.int32(1))
            tables = cos_sin(spec.rope, np.arange(self.context))
            for part, values in zip(("cos", "sin"), tables, strict=True):
                table = self.graph.constant(values, f"rope_{part}")
                found.append(mb.expand_dims(x=mb.gather(x=table, indices=rows, axis=0), axes=[1]))
            self._made["angles"] = found[0], found[1]
        angles: tuple[Var, Var] = self._made["angles"]
        return angles

    def _hidden(self) -> Var:
        """What is added to scores: 0, or LOWEST for padding; float32 [batch, 1, 1, tokens]."""
        if "hidden" not in self._made:
            mb = builder()
            padding = mb.sub(x=self._real(), y=self._f32(1))
            mask = mb.mul(x=padding, y=self._f32(-LOWEST))
            self._made["hidden"] = mb.expand_dims(x=mask, axes=[1, 2], name="mask")
        return self._made["hidden"]

    def _real(self) -> Var:
        """1 for tokens that are no padding, 0 for padding; float32 [batch, tokens]."""
        if "real" not in self._made:
            mb = builder()
            real = mb.not_equal(x=self._mask, y=np.int32(0))
            self._made["real"] = mb.cast(x=real, dtype="fp32", name="real")
        return self._made["real"]

    def first(self, name: str, x: Var) -> Var:
        """Slice of row 0."""
        return self._named(
            "slice_by_index", name, x=self.wide(x), begin=[0, 0, 0], end=[0, 1, 0], begin_mask=[True, False, True],
            end_mask=[True, False, True], squeeze_mask=[False, True, False],
        )  # fmt: skip

    def mean(self, name: str, x: Var) -> Var:
        """A sum over what the mask leaves, and a division; of a row of padding alone, zeros."""
        mb = builder()
        real = self._real()
        kept = mb.mul(x=self.wide(x), y=mb.expand_dims(x=real, axes=[2]))
        total = mb.reduce_sum(x=kept, axes=[1])
        count = mb.maximum(x=mb.reduce_sum(x=real, axes=[1], keep_dims=True), y=self._f32(1))
        return self._named("real_div", name, x=total, y=count)

    def normalize(self, name: str, x: Var) -> Var:
        """A division by the length."""
        mb, y = builder(), self.wide(x)
        length = mb.sqrt(
            x=mb.reduce_sum(x=mb.square(x=y), axes=[-1], keep_dims=True), name=mil_name(f"{name}.length")
        )
        return self._named("real_div", name, x=y, y=mb.maximum(x=length, y=self._f32(1e-12)))
