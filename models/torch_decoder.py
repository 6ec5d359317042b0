"""A decoder layer in plain torch, cut where calibration has to look: at the inputs of its linear layers.

Weights are given by tensor, so that one layer's are in memory at a time. Sequences run one by one, on one core each: the same
bits whatever the number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tapeout.errors import MissingToolchain
from tapeout.models.decoder import DecoderConfig, Rope

if TYPE_CHECKING:
    import torch

Weights = Mapping[str, "torch.Tensor"]
"""Of one layer, float32, by name without ``model.layers.N.``."""


def inverse_frequencies(rope: Rope, head_dim: int) -> npt.NDArray[np.float64]:
    """Radians a position of each rotary pair, float64 [head_dim / 2] (transformers, ``modeling_rope_utils``)."""
    frequency = 1.0 / rope.theta ** (np.arange(0, head_dim, 2) / head_dim)
    p = rope.parameters
    if rope.kind == "linear":
        return np.asarray(frequency / float(p["factor"]))
    if rope.kind == "llama3":
        turns = float(p["original_max_position_embeddings"]) * frequency / (2 * math.pi)
        low, high = float(p["low_freq_factor"]), float(p["high_freq_factor"])
        smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
        return np.asarray(frequency * ((1 - smooth) / float(p["factor"]) + smooth))
    return np.asarray(frequency)


@dataclass(frozen=True)
class TorchDecoder:
    """The steps of a pre-norm decoder (RMSNorm, rotary attention, gated MLP) on a sequence [tokens, hidden]."""

    config: DecoderConfig

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm."""
        variance = x.pow(2).mean(-1, keepdim=True)
        return weight * (x * (variance + self.config.rms_norm_eps).rsqrt())

    def attend(self, x: torch.Tensor, w: Weights) -> torch.Tensor:
        """What o_proj is given [tokens, heads * head_dim], of the normed input [tokens, hidden]."""
        import torch

        c, tokens = self.config, len(x)

        def heads(name: str, count: int) -> torch.Tensor:
            return linear(x, w, f"self_attn.{name}").view(tokens, count, c.head_dim).transpose(0, 1)

        turns = np.outer(np.arange(tokens), inverse_frequencies(c.rope, c.head_dim))
        cos = torch.from_numpy(np.cos(turns).astype(np.float32)).to(x.device)
        sin = torch.from_numpy(np.sin(turns).astype(np.float32)).to(x.device)

        def rotate(y: torch.Tensor) -> torch.Tensor:
            a, b = y.chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

        q, k = rotate(heads("q_proj", c.num_heads)), rotate(heads("k_proj", c.num_kv_heads))
        v = heads("v_proj", c.num_kv_heads)
        shared = c.num_heads // c.num_kv_heads
        k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=x.device).tril()
        if c.sliding_window:
            mask = mask.triu(1 - c.sliding_window)
        out = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None], mask)[0]
        return out.transpose(0, 1).reshape(tokens, -1)

    def gate(self, x: torch.Tensor, w: Weights) -> torch.Tensor:
        """What down_proj is given [tokens, intermediate], of the normed input [tokens, hidden]."""
        import torch

        return torch.nn.functional.silu(linear(x, w, "mlp.gate_proj")) * linear(x, w, "mlp.up_proj")


def linear(x: torch.Tensor, w: Weights, name: str) -> torch.Tensor:
    """``x @ weightᵀ + bias``."""
    import torch

    return torch.nn.functional.linear(x, w[f"{name}.weight"], w.get(f"{name}.bias"))


def one_core_each() -> None:
    """To be called first in every thread that runs torch: its own pool would share the cores, and sum in another order."""
    try:
        import torch
    except ImportError as error:
        raise MissingToolchain(
            f"calibration needs torch ({error}): pip install 'tapeout[reference]'"
        ) from error
    torch.set_num_threads(1)
