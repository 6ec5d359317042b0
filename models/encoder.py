"""The encoder, written once, against the primitives that an emitter implements; and what an encoder is, whatever its family.

See ``graph`` for values, names and weights. Unlike a decoder, an encoder sees a batch of padded sequences at once: the emitter
knows which tokens are padding, and no primitive's result at a token that is none depends on what stands there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypeVar

from tapeout.models.graph import Ops
from tapeout.models.rope import Rope

__all__ = [
    "ENCODER_ACTIVATIONS",
    "LOWEST",
    "EncoderConfig",
    "EncoderOps",
    "Names",
    "SelfAttention",
    "encoder",
]

V = TypeVar("V")

LOWEST = -3.4028234663852886e38
"""The lowest float32: what the score of a token becomes that is not looked at."""

ENCODER_ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "relu", "silu")
"""Of MLPs, as Hugging Face names them: gelu is the exact one (erf)."""

Output = Literal["last_hidden_state", "sentence_embedding", "logits"]


@dataclass(frozen=True)
class Names:
    """Names of modules in a checkpoint; empty where the family has none of the kind.

    Attributes:
        words, positions, types: tables of embeddings. embedding_norm: of their sum.
        layer: with ``{}`` for the index; query … mlp_norm stand behind it.
        final_norm: of what the last layer gives (pre-norm models).
        dense, classifier: of the head.
    """

    words: str
    positions: str
    types: str
    embedding_norm: str
    layer: str
    query: str
    key: str
    value: str
    out: str
    attention_norm: str
    up: str
    down: str
    mlp_norm: str
    final_norm: str = ""
    dense: str = ""
    classifier: str = ""


@dataclass(frozen=True)
class SelfAttention:
    """What the attention of a layer computes: ``softmax(q kᵀ / sqrt(head_dim)) v`` over all tokens that are no padding.

    Attributes:
        rope: turns queries and keys by their place in the row, padding counted; None: they do not turn.
    """

    heads: int
    head_dim: int
    rope: Rope | None


@dataclass(frozen=True)
class EncoderConfig:
    """An encoder (LayerNorm, biases everywhere, MLP without a gate) in the field's own words.

    Attributes:
        family: Hugging Face ``model_type``.
        max_position_embeddings: longest sequence in tokens, specials counted.
        output: what is asked of the model: ``last_hidden_state`` [batch, tokens, hidden], ``sentence_embedding`` [batch, hidden]
            or ``logits`` [batch, classes].
        pre_norm: norms stand before attention and MLP, and after the last layer; otherwise behind each sum.
        rope: positions that turn queries and keys; None: none do.
        position_rows: of the table of learned positions; 0: there is none.
        position_padding: positions count tokens that are not this id, from the row behind it; padding takes its row. None: they
            count every token of a row from 0.
        type_rows: of the table of token types; 0: there is none.
        pooling: what ``sentence_embedding`` and ``logits`` are made from: the first token's state, or the mean of all that are
            no padding.
        normalize: the embedding is divided by its length.
        dense_act: activation of the linear before the classifier (``tanh``, ``relu``).
        labels: names of the classes.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_position_embeddings: int
    layer_norm_eps: float
    names: Names
    output: Output
    hidden_act: str = "gelu"
    pre_norm: bool = False
    rope: Rope | None = None
    position_rows: int = 0
    position_padding: int | None = None
    type_rows: int = 0
    pooling: Literal["cls", "mean"] = "cls"
    normalize: bool = False
    dense_act: str = ""
    labels: tuple[str, ...] = ()
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    @property
    def sliding_window(self) -> None:
        """None: every token looks at all."""

    @property
    def tie_word_embeddings(self) -> bool:
        """No head shares the table of words."""
        return False

    @property
    def head_dim(self) -> int:
        """Elements of a head."""
        return self.hidden_size // self.num_heads

    @property
    def width(self) -> int:
        """Elements of what comes out, for a token or a sequence."""
        return len(self.labels) if self.output == "logits" else self.hidden_size

    @property
    def attention(self) -> SelfAttention:
        """What every layer's attention computes."""
        return SelfAttention(self.num_heads, self.head_dim, self.rope)


class EncoderOps(Ops[V], Protocol[V]):
    """What an emitter implements besides ``Ops``, which gives embedding, linear and add.

    Shapes: x is [batch, tokens, width] and ids [batch, tokens]; what is pooled is [batch, width].
    """

    def positions(self, name: str, ids: V, weight: str, padding: int | None) -> V:
        """Rows of ``weight`` [positions, hidden] by place; ``padding``: as ``EncoderConfig.position_padding``."""

    def token_types(self, name: str, weight: str) -> V:
        """Rows of ``weight`` [types, hidden] by the types that the step is given, 0 where it is given none."""

    def layer_norm(self, name: str, x: V, weight: str, bias: str, *, eps: float) -> V:
        """``(x - mean) / sqrt(variance + eps) · weight + bias`` over the last axis."""

    def activation(self, name: str, x: V, act: str) -> V:
        """``act(x)`` for one of ENCODER_ACTIVATIONS or ``tanh``."""

    def self_attention(self, name: str, query: V, key: V, value: V, spec: SelfAttention) -> V:
        """Every token looks at all that are no padding: [batch, tokens, hidden] each, heads one after the other."""

    def first(self, name: str, x: V) -> V:
        """The first token's row, padding or not: [batch, hidden]."""

    def mean(self, name: str, x: V) -> V:
        """The mean over tokens that are no padding: [batch, hidden]."""

    def normalize(self, name: str, x: V) -> V:
        """``x / max(|x|, 1e-12)`` over the last axis."""


def encoder(ops: EncoderOps[V], config: EncoderConfig, ids: V, layers: int | None = None) -> V:
    """The output of token ids [batch, tokens], as ``config.output`` says; ``layers``: only that many of the first ones."""
    x = _embed(ops, config, ids)
    layer = _pre_norm_layer if config.pre_norm else _post_norm_layer
    for index in range(config.num_layers if layers is None else layers):
        x = layer(ops, config, index, x)
    if config.names.final_norm:
        x = _norm(ops, config, "norm", x, config.names.final_norm)
    return _head(ops, config, x)


def _embed(ops: EncoderOps[V], c: EncoderConfig, ids: V) -> V:
    n = c.names
    x = ops.embedding("embedding.words", ids, f"{n.words}.weight", 1.0)
    if c.type_rows:
        types = ops.token_types("embedding.types", f"{n.types}.weight")
        x = ops.add("embedding.typed", x, types)
    if c.position_rows:
        places = ops.positions("embedding.positions", ids, f"{n.positions}.weight", c.position_padding)
        x = ops.add("embedding.sum", x, places)
    return _norm(ops, c, "embedding", x, n.embedding_norm) if n.embedding_norm else x


def _post_norm_layer(ops: EncoderOps[V], c: EncoderConfig, index: int, x: V) -> V:
    at, name = f"{c.names.layer.format(index)}.", f"layers.{index}"
    y = ops.add(f"{name}.attention.residual", x, _attention(ops, c, at, name, x))
    x = _norm(ops, c, f"{name}.attention.norm", y, at + c.names.attention_norm)
    y = ops.add(f"{name}.mlp.residual", x, _mlp(ops, c, at, name, x))
    return _norm(ops, c, f"{name}.out", y, at + c.names.mlp_norm)


def _pre_norm_layer(ops: EncoderOps[V], c: EncoderConfig, index: int, x: V) -> V:
    at, name = f"{c.names.layer.format(index)}.", f"layers.{index}"
    y = _norm(ops, c, f"{name}.attention.norm", x, at + c.names.attention_norm)
    x = ops.add(f"{name}.attention.residual", x, _attention(ops, c, at, name, y))
    y = _norm(ops, c, f"{name}.mlp.norm", x, at + c.names.mlp_norm)
    return ops.add(f"{name}.out", x, _mlp(ops, c, at, name, y))


def _attention(ops: EncoderOps[V], c: EncoderConfig, at: str, layer: str, x: V) -> V:
    name, n = f"{layer}.attention", c.names
    q, k, v = (
        _linear(ops, f"{name}.{part}", x, at + module)
        for part, module in (("q", n.query), ("k", n.key), ("v", n.value))
    )
    y = ops.self_attention(f"{name}.context", q, k, v, c.attention)
    return _linear(ops, f"{name}.out", y, at + n.out)


def _mlp(ops: EncoderOps[V], c: EncoderConfig, at: str, layer: str, x: V) -> V:
    up = _linear(ops, f"{layer}.mlp.up", x, at + c.names.up)
    return _linear(
        ops, f"{layer}.mlp.out", ops.activation(f"{layer}.mlp.inner", up, c.hidden_act), at + c.names.down
    )


def _head(ops: EncoderOps[V], c: EncoderConfig, x: V) -> V:
    if c.output == "last_hidden_state":
        return x
    pool: Callable[[str, V], V] = ops.mean if c.pooling == "mean" else ops.first
    x = pool("pooled", x)
    if c.output == "sentence_embedding":
        return ops.normalize("sentence_embedding", x) if c.normalize else x
    if c.names.dense:
        x = ops.activation("dense", _linear(ops, "dense.linear", x, c.names.dense), c.dense_act)
    return _linear(ops, "logits", x, c.names.classifier)


def _norm(ops: EncoderOps[V], c: EncoderConfig, name: str, x: V, module: str) -> V:
    return ops.layer_norm(name, x, f"{module}.weight", f"{module}.bias", eps=c.layer_norm_eps)


def _linear(ops: EncoderOps[V], name: str, x: V, module: str) -> V:
    return ops.linear(name, x, f"{module}.weight", f"{module}.bias")
