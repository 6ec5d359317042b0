"""What a decoder is, whatever its family: the numbers that a graph or a file header is built from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any


class Role(StrEnum):
    """What a tensor is for: it decides the default scheme."""

    EMBEDDING = "embedding"  # [vocab, hidden], also the head when tied
    HEAD = "head"  # [vocab, hidden]
    LINEAR = "linear"  # [out_features, in_features]
    ROUTER = "router"  # [experts, hidden]
    NORM = "norm"  # [hidden]
    BIAS = "bias"  # [out_features]

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
class Rope:
    """Rotary positions. ``kind`` is Hugging Face's ``rope_type``; ``parameters`` its scaling fields.

    For ``llama3``: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings.
    For ``linear``: factor.
    """

    theta: float
    kind: str = "default"
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer (pre-norm, RMSNorm, gated MLP) in the field's own words.

    Attributes:
        family: Hugging Face ``model_type``.
        hidden_act: activation of the gated MLP as Hugging Face names it (``silu``, …).
        max_position_embeddings: longest context that the model was made for, in tokens.
        sliding_window: a token attends to itself and the ``sliding_window - 1`` before it; None: to all.
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
    hidden_act: str = "silu"
    sliding_window: int | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None


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
