"""The decoder, written once, against the primitives that an emitter implements.

An emitter runs them (torch) or writes them down (ONNX, MIL). A value is whatever it makes of one: a tensor, a name. Every
call has a name, the same in every emitter, so that the first place where two artifacts part can be found; weights are asked
for by their Hugging Face names, when they are needed and never before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

from tapeout.models.decoder import Attention, DecoderConfig, Mla, Moe

V = TypeVar("V")

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"


def inside(attention: str, part: str) -> str:
    """The name of a value that an attention makes on its way, where an emitter can show it.

    ``rope``: the turned keys [tokens, kv_heads · head_dim] (of latent attention those that heads share, [tokens, rope_dim]).
    ``scores``: what softmax is taken of, scaled and capped, [heads, tokens, tokens].
    """
    return f"{attention.rpartition('.')[0]}.{part}"


class Ops(Protocol[V]):
    """What an emitter implements.

    Shapes are those of one step: [..., tokens, width], where the emitter may have a batch in front. All arithmetic is
    float32 or what an emitter declares instead. Positions, masks and caches are the emitter's own: ``attention`` and
    ``latent_attention`` are told the layer, and nothing else of the graph looks at another token.
    """

    def embedding(self, name: str, ids: V, weight: str, scale: float) -> V:
        """Rows of ``weight`` [vocab, hidden] by ``ids`` [..., tokens], times ``scale``: [..., tokens, hidden]."""

    def linear(self, name: str, x: V, weight: str, bias: str | None) -> V:
        """``x @ weightᵀ + bias``: weight [out, in], bias [out]. Routers and the head are linears too."""

    def rms_norm(self, name: str, x: V, weight: str, *, eps: float, offset: float, parts: int = 1) -> V:
        """``x / sqrt(mean(x²) + eps) · (weight + offset)`` over the last axis, or over each of its ``parts`` equal parts.

        Weight [width / parts]. What ``x`` is shows in its making: where it is a sum of ``add`` (the input of every norm of
        hidden states but the first) an emitter may write both as one skip-norm, since the sum is used again later.
        """

    def split(self, name: str, x: V, sizes: Sequence[int]) -> tuple[V, ...]:
        """Cut the last axis into pieces of these sizes. An emitter whose kernels take them together may keep them so."""

    def attention(self, name: str, query: V, key: V, value: V, spec: Attention) -> V:
        """Turn queries and keys (RoPE), append keys and values to the layer's cache, and attend.

        Args:
            name: of what comes out.
            query: [..., tokens, heads · head_dim], not turned yet; heads one after the other.
            key, value: [..., tokens, kv_heads · head_dim].
            spec: what is computed.

        Returns:
            [..., tokens, heads · head_dim], the input of the output projection.
        """

    def latent_attention(
        self, name: str, query: V, latent: V, key_rope: V, weight: str, spec: Attention, mla: Mla
    ) -> V:
        """Attention whose cache keeps ``latent`` and the turned ``key_rope``: kv_rank + rope_dim numbers a token.

        Args:
            name: of what comes out.
            query: [..., tokens, heads · (nope_dim + rope_dim)]; the rope_dim last elements of a head turn.
            latent: [..., tokens, kv_rank], normed.
            key_rope: [..., tokens, rope_dim], not turned yet; all heads share it.
            weight: [heads · (nope_dim + v_dim), kv_rank]: each head's key without positions, then its value, of a latent.
            spec: what is computed; a head's key is its own nope_dim elements and then the shared key_rope.
            mla: the widths.

        Returns:
            [..., tokens, heads · v_dim].
        """

    def gated(self, name: str, gate: V, up: V, act: str) -> V:
        """``act(gate) · up``, for ``act`` one of ACTIVATIONS."""

    def route(self, name: str, logits: V, bias: str | None, moe: Moe) -> V:
        """Choose each token's experts: a value that only ``experts`` reads.

        Args:
            name: of the choice.
            logits: [..., tokens, experts] of the router.
            bias: [experts], added to the scores for the choice alone; None: there is none.
            moe: how it is done.
        """

    def experts(self, name: str, x: V, routing: V, layer: int, act: str, moe: Moe) -> V:
        """Sum of the chosen experts' gated MLPs of ``x`` by their weights; tensors by ``moe.weights(layer, expert)``."""

    def sigmoid_gate(self, name: str, x: V, logit: V) -> V:
        """``x · sigmoid(logit)``: x [..., tokens, hidden], logit [..., tokens, 1]."""

    def add(self, name: str, x: V, y: V) -> V:
        """``x + y``."""

    def softcap(self, name: str, x: V, cap: float) -> V:
        """``cap · tanh(x / cap)``."""


def decoder(ops: Ops[V], config: DecoderConfig, ids: V, layers: int | None = None) -> V:
    """Logits [..., tokens, vocab] of token ids [..., tokens]; ``layers``: only that many of the first ones."""
    x = embed(ops, config, ids)
    for index in range(config.num_layers if layers is None else layers):
        x = layer(ops, config, index, x)
    return head(ops, config, x)


def embed(ops: Ops[V], config: DecoderConfig, ids: V) -> V:
    """The first layer's input [..., tokens, hidden]."""
    return ops.embedding("embedding", ids, EMBEDDING, config.embedding_scale)


def head(ops: Ops[V], config: DecoderConfig, x: V) -> V:
    """Logits of what the last layer gives; of the tokens whose logits are wanted, if an emitter leaves out the others."""
    x = _norm(ops, config, "norm", x, NORM)
    weight = EMBEDDING if config.tie_word_embeddings else HEAD
    if config.logit_softcap is None:
        return ops.linear("logits", x, weight, None)
    return ops.softcap("logits", ops.linear("head", x, weight, None), config.logit_softcap)


def layer(ops: Ops[V], config: DecoderConfig, index: int, x: V) -> V:
    """One layer: the hidden state [..., tokens, hidden] before it to the one after it."""
    at, name = f"model.layers.{index}", f"layers.{index}"

    def norm(place: str, y: V, which: str) -> V:
        return _norm(ops, config, f"{name}.{place}", y, f"{at}.{which}_layernorm.weight")

    attend = _latent_attention if config.mla else _attention
    y = attend(ops, config, index, norm("attention.norm", x, "input"))
    if config.sandwich_norms:
        y = norm("attention.post_norm", y, "post_attention")
    x = ops.add(f"{name}.attention.residual", x, y)
    feed = _moe if config.routed(index) else _mlp
    before_mlp = "pre_feedforward" if config.sandwich_norms else "post_attention"
    y = feed(ops, config, index, norm("mlp.norm", x, before_mlp))
    if config.sandwich_norms:
        y = norm("mlp.post_norm", y, "post_feedforward")
    return ops.add(f"{name}.out", x, y)


def _norm(ops: Ops[V], config: DecoderConfig, name: str, x: V, weight: str, parts: int = 1) -> V:
    return ops.rms_norm(name, x, weight, eps=config.rms_norm_eps, offset=config.norm_offset, parts=parts)


def _linear(ops: Ops[V], name: str, x: V, module: str, bias: bool) -> V:
    return ops.linear(name, x, f"{module}.weight", f"{module}.bias" if bias else None)


def _attention(ops: Ops[V], c: DecoderConfig, index: int, x: V) -> V:
    at, name = f"model.layers.{index}.self_attn", f"layers.{index}.attention"
    if c.fused:
        both = _linear(ops, f"{name}.qkv", x, f"{at}.qkv_proj", c.qkv_bias)
        sizes = [heads * c.head_dim for heads in (c.num_heads, c.num_kv_heads, c.num_kv_heads)]
        q, k, v = ops.split(f"{name}.qkv.parts", both, sizes)
    else:
        q, k, v = (_linear(ops, f"{name}.{p}", x, f"{at}.{p}_proj", c.qkv_bias) for p in "qkv")
    if c.qk_norm:
        q = _norm(ops, c, f"{name}.q_norm", q, f"{at}.q_norm.weight", c.num_heads)
        k = _norm(ops, c, f"{name}.k_norm", k, f"{at}.k_norm.weight", c.num_kv_heads)
    y = ops.attention(f"{name}.context", q, k, v, c.attention(index))
    return _linear(ops, f"{name}.out", y, f"{at}.o_proj", c.out_bias)


def _latent_attention(ops: Ops[V], c: DecoderConfig, index: int, x: V) -> V:
    at, name, mla = f"model.layers.{index}.self_attn", f"layers.{index}.attention", c.mla
    assert mla is not None
    if mla.q_rank is None:
        q = _linear(ops, f"{name}.q", x, f"{at}.q_proj", False)
    else:
        q = _linear(ops, f"{name}.q_a", x, f"{at}.q_a_proj", c.qkv_bias)
        q = ops.rms_norm(f"{name}.q_norm", q, f"{at}.q_a_layernorm.weight", eps=mla.eps, offset=0.0)
        q = _linear(ops, f"{name}.q", q, f"{at}.q_b_proj", False)
    kv = _linear(ops, f"{name}.kv_a", x, f"{at}.kv_a_proj_with_mqa", c.qkv_bias)
    latent, key = ops.split(f"{name}.kv_a.parts", kv, [mla.kv_rank, mla.rope_dim])
    latent = ops.rms_norm(f"{name}.kv_norm", latent, f"{at}.kv_a_layernorm.weight", eps=mla.eps, offset=0.0)
    spec = c.attention(index)
    y = ops.latent_attention(f"{name}.context", q, latent, key, f"{at}.kv_b_proj.weight", spec, mla)
    return _linear(ops, f"{name}.out", y, f"{at}.o_proj", c.out_bias)


def _gated_mlp(ops: Ops[V], c: DecoderConfig, name: str, at: str, x: V, sizes: list[int] | None) -> V:
    if sizes:
        both = _linear(ops, f"{name}.gate_up", x, f"{at}.gate_up_proj", c.mlp_bias)
        gate, up = ops.split(f"{name}.gate_up.parts", both, sizes)
    else:
        gate = _linear(ops, f"{name}.gate", x, f"{at}.gate_proj", c.mlp_bias)
        up = _linear(ops, f"{name}.up", x, f"{at}.up_proj", c.mlp_bias)
    inner = ops.gated(f"{name}.inner", gate, up, c.hidden_act)
    return _linear(ops, f"{name}.out", inner, f"{at}.down_proj", c.mlp_bias)


def _mlp(ops: Ops[V], c: DecoderConfig, index: int, x: V) -> V:
    sizes = [c.intermediate_size] * 2 if c.fused else None
    return _gated_mlp(ops, c, f"layers.{index}.mlp", f"model.layers.{index}.mlp", x, sizes)


def _moe(ops: Ops[V], c: DecoderConfig, index: int, x: V) -> V:
    at, name, moe = f"model.layers.{index}", f"layers.{index}.mlp", c.moe
    assert moe is not None
    logits = _linear(ops, f"{name}.router", x, f"{at}.{moe.router}", False)
    bias = f"{at}.{moe.router}.e_score_correction_bias" if moe.correction_bias else None
    routing = ops.route(f"{name}.routing", logits, bias, moe)
    y = ops.experts(f"{name}.experts", x, routing, index, c.hidden_act, moe)
    if not moe.shared_size:
        return y
    shared = _gated_mlp(ops, c, f"{name}.shared", f"{at}.{moe.shared}", x, None)
    if moe.shared_gate:
        logit = _linear(ops, f"{name}.shared.gate_logit", x, f"{at}.{moe.shared}_gate", False)
        shared = ops.sigmoid_gate(f"{name}.shared.gated", shared, logit)
    return ops.add(f"{name}.sum", y, shared)
