"""What a decoder is, whatever its family: the numbers that a graph or a file header is built from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from tapeout.models.rope import Rope

__all__ = [
    "ACTIVATIONS",
    "FUSED",
    "Attention",
    "ConfigReader",
    "DecoderConfig",
    "Mla",
    "Moe",
    "Role",
    "Rope",
    "TensorSpec",
    "joined",
]

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
"""Of gated MLPs, as Hugging Face names them: gelu is the exact one (erf)."""

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
)
"""Matrices that servers (vLLM, TensorRT-LLM, SGLang) multiply as one: all of it is of one scheme, and under one scale of a tensor."""


def joined(names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Of each of these weights all those that servers multiply as one with it, where there are any; itself is among them."""
    found: dict[tuple[str, int], list[str]] = {}
    for name in names:
        base, _, last = name.removesuffix(".weight").rpartition(".")
        for index, together in enumerate(FUSED):
            if last in together:
                found.setdefault((base, index), []).append(name)
    return {name: tuple(group) for group in found.values() if len(group) > 1 for name in group}


class Role(StrEnum):
    """What a tensor is for: it decides the default scheme."""

    EMBEDDING = "embedding"  # [vocab, hidden], also the head when tied
    POSITION = (
        "position"  # [positions, hidden] or [token types, hidden] of encoders: small, added to embeddings
    )
    HEAD = "head"  # [vocab, hidden], or [classes, hidden]
    LINEAR = "linear"  # [out_features, in_features]
    ROUTER = "router"  # [experts, hidden], or [1, hidden] for the gate of a shared expert
    NORM = "norm"  # [hidden], or [head_dim] for norms of queries and keys
    BIAS = "bias"  # [out_features]
    OTHER = "other"  # of a graph that others made: of any shape, and used by more than matmuls and lookups

    @property
    def is_matrix(self) -> bool:
        """Whether a tensor of this role can be quantized at all."""
        return self in (Role.EMBEDDING, Role.HEAD, Role.LINEAR)


@dataclass(frozen=True)
class TensorSpec:
    """One tensor that a family expects: its role and shape (as in ``torch.nn``)."""

    role: Role
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Moe:
    """Routed experts, each a gated MLP, and a shared one beside them.

    A token's scores are ``scoring`` over the router's logits. With ``groups`` > 1 only the experts of its best
    ``top_groups`` groups compete; a group is as good as its best expert (``group_score`` max) or the sum of its best two
    (top2). The ``top_k`` best experts are chosen; on equal scores the one of lower number. Their weights are their scores,
    divided by their sum if ``renormalize``, times ``scale``.

    Attributes:
        experts, top_k, intermediate_size: how many there are, how many a token takes, and how wide one is.
        layers: of each decoder layer, whether its MLP is this.
        scoring: softmax or sigmoid.
        correction_bias: the router has a bias [experts] that is added to the scores for the choice alone.
        shared_size: width of the shared expert that every token takes; 0: there is none.
        shared_gate: what the shared expert gives is multiplied by sigmoid of a linear of its input.
        router, expert, parts, shared: names of tensors behind ``model.layers.N.``; ``parts``: gate, up, down of an expert.
    """

    experts: int
    top_k: int
    intermediate_size: int
    layers: tuple[bool, ...]
    scoring: str = "softmax"
    renormalize: bool = False
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_score: str = "max"
    correction_bias: bool = False
    shared_size: int = 0
    shared_gate: bool = False
    router: str = "mlp.gate"
    expert: str = "mlp.experts.{}"
    parts: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared: str = "mlp.shared_experts"

    def weights(self, layer: int, expert: int) -> tuple[str, str, str]:
        """Hugging Face names of an expert's gate, up [intermediate, hidden] and down [hidden, intermediate]."""
        at = f"model.layers.{layer}.{self.expert.format(expert)}"
        gate, up, down = (f"{at}.{part}.weight" for part in self.parts)
        return gate, up, down


@dataclass(frozen=True)
class Mla:
    """Multi-head latent attention: keys and values are made from one latent a token, which is what a cache keeps.

    Attributes:
        q_rank: width of the queries' latent; None: queries come straight from the hidden state.
        kv_rank: width of the latent of keys and values.
        nope_dim, rope_dim: of a head's query and key, the elements without positions, which come first, and with.
        v_dim: elements of a head's value.
        eps: of the norms of both latents; Hugging Face's modules don't take the config's.
    """

    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    eps: float = 1e-6


@dataclass(frozen=True)
class Attention:
    """What the attention of one layer computes: ``softmax(cap(q kᵀ · scale) + mask) v``, causal.

    Attributes:
        layer: whose cache it is.
        heads, kv_heads, head_dim: of queries and keys; ``heads / kv_heads`` query heads in a row share a key head.
        scale: of the scores.
        rope: turns queries and keys before the keys are cached.
        window: a token attends to itself and the ``window - 1`` before it; None: to all.
        softcap: scores s become ``softcap · tanh(s / softcap)``; None: they stay.
    """

    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    rope: Rope
    window: int | None
    softcap: float | None


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer (pre-norm, RMSNorm, gated MLP) in the field's own words.

    Attributes:
        family: Hugging Face ``model_type``.
        intermediate_size: of a dense MLP.
        head_dim: of queries and keys; with ``mla`` both their parts.
        max_position_embeddings: longest context that the model was made for, in tokens.
        rope: of every layer, but for ``local_rope``: of those with a window, where it is another.
        attention_scale: of the scores, whatever it is made from.
        hidden_act: activation of the gated MLP, one of ACTIVATIONS.
        sliding_window: a token attends to itself and the ``sliding_window - 1`` before it; None: to all.
        window_layers: of each layer, whether it has that window; empty: all have.
        fused: one tensor for q, k, v (``qkv_proj``) and one for gate and up (``gate_up_proj``), rows in that order.
        qkv_bias, out_bias: of q, k, v and of o; with ``mla`` qkv_bias is that of the two projections to latents.
        qk_norm: each head's query and key pass an RMSNorm [head_dim] before they turn.
        sandwich_norms: what attention and MLP give passes a norm before it is added.
        norm_offset: is added to the weights of all norms.
        embedding_scale: embeddings are multiplied by it.
        attention_softcap, logit_softcap: see Attention and ``Ops.softcap``.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: Rope
    attention_scale: float
    hidden_act: str = "silu"
    sliding_window: int | None = None
    window_layers: tuple[bool, ...] = ()
    local_rope: Rope | None = None
    tie_word_embeddings: bool = False
    fused: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    moe: Moe | None = None
    mla: Mla | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    @property
    def value_dim(self) -> int:
        """Elements of a head's value."""
        return self.mla.v_dim if self.mla else self.head_dim

    @property
    def cache_width(self) -> int:
        """Elements that a token has in a layer's cache, the key's and the value's; of latents both are the same ones."""
        if self.mla:
            return self.mla.kv_rank + self.mla.rope_dim
        return self.num_kv_heads * (self.head_dim + self.value_dim)

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer, in tokens."""
        return self.sliding_window if not self.window_layers or self.window_layers[layer] else None

    def routed(self, layer: int) -> Moe | None:
        """The experts of a layer; None: its MLP is dense."""
        return self.moe if self.moe and self.moe.layers[layer] else None

    def attention(self, layer: int) -> Attention:
        """What a layer's attention computes."""
        window = self.window(layer)
        return Attention(
            layer=layer,
            heads=self.num_heads,
            kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=self.attention_scale,
            rope=self.local_rope if self.local_rope and window else self.rope,
            window=window,
            softcap=self.attention_softcap,
        )


class ConfigReader:
    """Hands out the fields of a ``config.json`` and remembers which: what is left at the end is an error by name."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw
        self._left = set(raw)

    def take(self, name: str, default: Any = ...) -> Any:
        """Return a field's value (None counts as absent) or ``default``; a required one that is absent raises KeyError."""
        self._left.discard(name)
        value = self.raw.get(name)
        if value is None:
            if default is ...:
                raise KeyError(name)
            return default
        return value

    def ignore(self, *names: str) -> None:
        """Fields known not to change what the model computes at inference."""
        self._left.difference_update(names)

    def left(self) -> list[str]:
        """Fields that nobody asked for and that hold something other than null or false."""
        return sorted(name for name in self._left if self.raw[name] not in (None, False))
