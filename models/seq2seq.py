"""Encoder-decoder transformers, written once against the primitives that an emitter implements; and what one is.

See ``graph`` for values, names and weights. There are two graphs: the encoder's, which gives the keys and values that every
layer of the decoder looks at, and a step of the decoder, which has a cache of its own tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from tapeout.models.graph import Ops

V = TypeVar("V")

EMBEDDING = "shared.weight"
HEAD = "lm_head.weight"

Stack = Literal["encoder", "decoder"]


@dataclass(frozen=True)
class Seq2SeqConfig:
    """An encoder-decoder (pre-norm, RMSNorm, no bias, relative positions, scores that are not scaled) in the field's own words.

    Attributes:
        family: Hugging Face ``model_type``.
        head_dim: of queries, keys and values, whatever ``hidden_size`` is.
        encoder_layers, decoder_layers: of the two stacks.
        max_position_embeddings: tokens of a source, and of a target, that it is run with; the model has no limit of its own.
        gated: whether the MLP is ``act(gate) · up`` or ``act(up)``.
        buckets, max_distance: of relative positions, see ``bucket``.
        logit_scale: what the head is given is multiplied by it.
        decoder_start_token_id: what every target begins with.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    head_dim: int
    encoder_layers: int
    decoder_layers: int
    rms_norm_eps: float
    hidden_act: str
    gated: bool
    buckets: int
    max_distance: int
    tie_word_embeddings: bool
    logit_scale: float
    decoder_start_token_id: int
    max_position_embeddings: int = 512
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    @property
    def num_layers(self) -> int:
        """Of the deeper stack; cut to n layers, each has n at most."""
        return max(self.encoder_layers, self.decoder_layers)

    @property
    def sliding_window(self) -> None:
        """None: every token looks at all that it may."""

    def layers(self, stack: Stack) -> int:
        """Of one of the stacks."""
        return self.encoder_layers if stack == "encoder" else self.decoder_layers

    def bucket(self, stack: Stack) -> npt.NDArray[np.int64]:
        """The row of a stack's bias for each distance (key - query) from 1 - context to context - 1, int64 [2 · context - 1].

        Half of the buckets are for keys behind the query where it may look at them. Half of the rest are for one distance each, the
        others grow with its logarithm up to ``max_distance`` (Raffel et al., arXiv:1910.10683, 2.1; in float32, as transformers).
        """
        count = self.max_position_embeddings
        distance = np.arange(1 - count, count)
        buckets, base = self.buckets, np.zeros_like(distance)
        if stack == "encoder":
            buckets //= 2
            base = np.where(distance > 0, buckets, 0)
            distance = np.abs(distance)
        else:
            distance = -np.minimum(distance, 0)
        exact = buckets // 2
        with np.errstate(divide="ignore"):
            grown = np.log(distance.astype(np.float32) / np.float32(exact))
        grown = grown / np.float32(math.log(self.max_distance / exact)) * np.float32(buckets - exact)
        far = exact + np.where(distance < exact, 0, grown).astype(np.int64)
        return base + np.where(distance < exact, distance, np.minimum(far, buckets - 1))


class Seq2SeqOps(Ops[V], Protocol[V]):
    """What an emitter implements besides ``Ops``, which gives embedding, linear, rms_norm, gated and add.

    Shapes: x is [batch, tokens, width] and ids [batch, tokens].
    """

    def activation(self, name: str, x: V, act: str) -> V:
        """``act(x)``: relu, gelu, gelu_pytorch_tanh or silu."""

    def scaled(self, name: str, x: V, factor: float) -> V:
        """``x · factor``."""

    def relative_bias(self, name: str, weight: str, stack: Stack) -> V:
        """What is added to the scores of all layers of a stack, by ``bucket`` of the distance: [heads, queries, keys].

        Weight [buckets, heads]. In the decoder a query that may not see a key has the lowest float there.
        """

    def biased_attention(
        self, name: str, query: V, key: V, value: V, bias: V, heads: int, layer: int | None
    ) -> V:
        """``softmax(q kᵀ + bias) v``, [batch, tokens, heads · head_dim] each.

        ``layer``: of the decoder, to whose cache keys and values go; None: the encoder's, over all that is no padding.
        """

    def source(self, layer: int, key: V, value: V) -> None:
        """Keep the source's keys and values for a layer of the decoder."""

    def cross_attention(self, name: str, query: V, heads: int, layer: int) -> V:
        """``softmax(q kᵀ) v`` over the source's tokens that are no padding, with what ``source`` has kept for the layer."""


def encode(ops: Seq2SeqOps[V], config: Seq2SeqConfig, ids: V, layers: int | None = None) -> None:
    """The source [batch, tokens], as the decoder's layers look at it; ``layers``: of either stack at most."""
    x = ops.embedding("encoder.embedding", ids, EMBEDDING, 1.0)
    x = _stack(ops, config, "encoder", x, layers)
    for index in range(min(config.decoder_layers, layers or config.decoder_layers)):
        at, name = f"decoder.block.{index}.layer.1.EncDecAttention", f"decoder.layers.{index}.cross"
        key, value = (ops.linear(f"{name}.{part}", x, f"{at}.{part}.weight", None) for part in "kv")
        ops.source(index, key, value)


def decode(ops: Seq2SeqOps[V], config: Seq2SeqConfig, ids: V, layers: int | None = None) -> V:
    """Logits [batch, tokens, vocab] of the target's next tokens; ``layers``: of either stack at most."""
    x = ops.embedding("decoder.embedding", ids, EMBEDDING, 1.0)
    x = _stack(ops, config, "decoder", x, layers)
    if config.logit_scale != 1.0:
        x = ops.scaled("scaled", x, config.logit_scale)
    return ops.linear("logits", x, EMBEDDING if config.tie_word_embeddings else HEAD, None)


def _stack(ops: Seq2SeqOps[V], c: Seq2SeqConfig, stack: Stack, x: V, layers: int | None) -> V:
    bias = ops.relative_bias(
        f"{stack}.bias", f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight", stack
    )
    for index in range(min(c.layers(stack), layers or c.layers(stack))):
        name, parts = f"{stack}.layers.{index}", iter(range(3))

        def norm(place: str, y: V, at: str, name: str = name) -> V:
            return _norm(ops, c, f"{name}.{place}.norm", y, f"{at}.layer_norm.weight")

        at = f"{stack}.block.{index}.layer.{next(parts)}"
        y = norm("attention", x, at)
        q, k, v = (
            ops.linear(f"{name}.attention.{part}", y, f"{at}.SelfAttention.{part}.weight", None)
            for part in "qkv"
        )
        layer = index if stack == "decoder" else None
        y = ops.biased_attention(f"{name}.attention.context", q, k, v, bias, c.num_heads, layer)
        y = ops.linear(f"{name}.attention.out", y, f"{at}.SelfAttention.o.weight", None)
        x = ops.add(f"{name}.attention.residual", x, y)
        if stack == "decoder":
            at = f"{stack}.block.{index}.layer.{next(parts)}"
            q = ops.linear(f"{name}.cross.q", norm("cross", x, at), f"{at}.EncDecAttention.q.weight", None)
            y = ops.cross_attention(f"{name}.cross.context", q, c.num_heads, index)
            y = ops.linear(f"{name}.cross.out", y, f"{at}.EncDecAttention.o.weight", None)
            x = ops.add(f"{name}.cross.residual", x, y)
        at = f"{stack}.block.{index}.layer.{next(parts)}"
        x = ops.add(f"{name}.out", x, _mlp(ops, c, f"{name}.mlp", at, norm("mlp", x, at)))
    return _norm(ops, c, f"{stack}.norm", x, f"{stack}.final_layer_norm.weight")


def _norm(ops: Seq2SeqOps[V], c: Seq2SeqConfig, name: str, x: V, weight: str) -> V:
    return ops.rms_norm(name, x, weight, eps=c.rms_norm_eps, offset=0.0)


def _mlp(ops: Seq2SeqOps[V], c: Seq2SeqConfig, name: str, at: str, x: V) -> V:
    at = f"{at}.DenseReluDense"
    if c.gated:
        gate, up = (
            ops.linear(f"{name}.{part}", x, f"{at}.{module}.weight", None)
            for part, module in (("gate", "wi_0"), ("up", "wi_1"))
        )
        inner: Any = ops.gated(f"{name}.inner", gate, up, c.hidden_act)
    else:
        inner = ops.activation(
            f"{name}.inner", ops.linear(f"{name}.up", x, f"{at}.wi.weight", None), c.hidden_act
        )
    return ops.linear(f"{name}.out", inner, f"{at}.wo.weight", None)
