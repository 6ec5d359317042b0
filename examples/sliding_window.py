"""A stack of causal sliding-window attention blocks in plain torch, of no family: ``tapeout export cpu sliding_window.py:make --format onnx``."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """Attention over the last ``window`` tokens, and a gated MLP; pre-norm."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.norm, self.mlp_norm = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        self.gate_up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to the same."""
        batch, tokens, width = x.shape
        parts = self.qkv(self.norm(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = parts[0], parts[1], parts[2]
        at = torch.arange(tokens, device=x.device)
        before = at[:, None] - at[None, :]
        seen = (before >= 0) & (before < self.window)
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        x = x + self.out((weights @ value).transpose(1, 2).reshape(batch, tokens, width))
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, -1)
        return x + self.down(nn.functional.silu(gate) * up)


class SlidingWindow(nn.Module):
    """Token ids [batch, tokens] to logits [batch, tokens, vocab]."""

    def __init__(
        self, vocab: int = 320, width: int = 128, heads: int = 4, window: int = 16, layers: int = 2
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width, heads, window) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits after each token."""
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def make() -> tuple[nn.Module, tuple[torch.Tensor, ...], dict[str, object]]:
    """The module with random weights, example inputs, and which of their axes may have another length."""
    torch.manual_seed(0)
    tokens = torch.export.Dim("tokens", min=2, max=512)
    ids = torch.randint(0, 320, (1, 48))
    return SlidingWindow().eval(), (ids,), {"ids": {1: tokens}}
