"""The encoder's graph in plain torch: a batch of padded sequences, float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tapeout.models.encoder import SelfAttention
from tapeout.models.graph import inside
from tapeout.models.torch_ops import TorchOps

if TYPE_CHECKING:
    import torch


@dataclass
class TorchEncoderOps(TorchOps):
    """``EncoderOps`` on tensors [batch, tokens, width].

    Attributes:
        mask: of the batch, bool [batch, tokens]: False for padding; None: there is none.
        types: of tokens, int64 [batch, tokens]; None: all are 0.
    """

    mask: torch.Tensor | None = None
    types: torch.Tensor | None = None

    def positions(self, name: str, ids: torch.Tensor, weight: str, padding: int | None) -> torch.Tensor:
        table = self.weights(weight)
        if padding is None:
            return table[: ids.shape[1]]
        real = (ids != padding).long()
        return table[real.cumsum(1) * real + padding]

    def token_types(self, name: str, weight: str) -> torch.Tensor:
        table = self.weights(weight)
        return table[0] if self.types is None else table[self.types]

    def layer_norm(self, name: str, x: torch.Tensor, weight: str, bias: str, *, eps: float) -> torch.Tensor:
        import torch

        w, b = self.weights(weight), self.weights(bias)
        return torch.nn.functional.layer_norm(x, w.shape, w, b, eps)

    def activation(self, name: str, x: torch.Tensor, act: str) -> torch.Tensor:
        import torch

        f = torch.nn.functional
        if act.startswith("gelu"):
            return f.gelu(x, approximate="none" if act == "gelu" else "tanh")
        return {"relu": torch.relu, "silu": f.silu, "tanh": torch.tanh}[act](x)

    def self_attention(
        self,
        name: str,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        spec: SelfAttention,
    ) -> torch.Tensor:
        import torch

        batch, tokens, _ = query.shape
        q, k, v = (x.view(batch, tokens, spec.heads, -1).transpose(1, 2) for x in (query, key, value))
        if spec.rope:
            q, k = (self._rotate(x.flatten(0, 1), spec.rope).view_as(x) for x in (q, k))
            if self.inside:
                self.inside(inside(name, "rope"), "rope", k.transpose(1, 2).flatten(2), key)
        seen = None if self.mask is None else self.mask[:, None, None, :]
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen)
        return out.transpose(1, 2).reshape(batch, tokens, -1)

    def first(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return x[:, 0]

    def mean(self, name: str, x: torch.Tensor) -> torch.Tensor:
        if self.mask is None:
            return x.mean(1)
        real = self.mask[..., None].to(x.dtype)
        return (x * real).sum(1) / real.sum(1)

    def normalize(self, name: str, x: torch.Tensor) -> torch.Tensor:
        import torch

        return torch.nn.functional.normalize(x, dim=-1)
