"""The encoder-decoder's graphs in plain torch: a batch of padded sources, float32."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tapeout.models.seq2seq import Seq2SeqConfig, Stack
from tapeout.models.torch_encoder import TorchEncoderOps

if TYPE_CHECKING:
    import torch


@dataclass
class TorchSeq2SeqOps(TorchEncoderOps):
    """``Seq2SeqOps`` on tensors [batch, tokens, width]; ``mask`` is the source's.

    Attributes:
        config: of the model. tokens: of this call. past: tokens of the target that came before.
        sources, kept: of each layer of the decoder, keys and values of the source, and of the target so far.
    """

    config: Seq2SeqConfig | None = None
    tokens: int = 0
    past: int = 0
    sources: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def scaled(self, name: str, x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor

    def relative_bias(self, name: str, weight: str, stack: Stack) -> torch.Tensor:
        import torch

        assert self.config is not None
        past = self.past if stack == "decoder" else 0
        distance = torch.arange(past + self.tokens)[None] - torch.arange(past, past + self.tokens)[:, None]
        rows = torch.from_numpy(self.config.bucket(stack))[distance + self.config.max_position_embeddings - 1]
        bias = self.weights(weight)[rows].permute(2, 0, 1)
        if stack == "decoder":
            bias = bias.masked_fill(distance > 0, torch.finfo(torch.float32).min)
        return bias

    def biased_attention(
        self,
        name: str,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        bias: torch.Tensor,
        heads: int,
        layer: int | None,
    ) -> torch.Tensor:
        import torch

        if layer is None:
            return self._attend(query, key, value, bias + self._padding(), heads)
        if layer in self.kept:
            key, value = (torch.cat((a, b), 1) for a, b in zip(self.kept[layer], (key, value), strict=True))
        self.kept[layer] = key, value
        return self._attend(query, key, value, bias, heads)

    def source(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        self.sources[layer] = key, value

    def cross_attention(self, name: str, query: torch.Tensor, heads: int, layer: int) -> torch.Tensor:
        return self._attend(query, *self.sources[layer], self._padding(), heads)

    def _padding(self) -> torch.Tensor:
        """The lowest float at padding [batch, 1, 1, source]."""
        import torch

        assert self.mask is not None
        return torch.where(self.mask, 0.0, torch.finfo(torch.float32).min)[:, None, None]

    @staticmethod
    def _attend(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, heads: int
    ) -> torch.Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        return ((q @ k.transpose(2, 3) + bias).softmax(-1) @ v).transpose(1, 2).flatten(2)
