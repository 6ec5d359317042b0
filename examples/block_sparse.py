"""A stack of block-sparse attention in plain torch, of no family: ``tapeout export cpu block_sparse.py:make --format onnx``.

As Sparse Transformers' fixed pattern (arXiv:1904.10509): a token sees its own block, and the last token of each block before.
"""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """Attention over the own block and one token of each earlier one, and an MLP with a bias; post-norm."""

    def __init__(self, width: int, heads: int, block: int) -> None:
        super().__init__()
        self.heads, self.block = heads, block
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        # As some write it: [in, out], multiplied from the right.
        self.out = nn.Parameter(torch.randn(width, width) * width**-0.5)
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to the same."""
        batch, tokens, width = x.shape

        def split(y: torch.Tensor) -> torch.Tensor:
            return y.view(batch, tokens, self.heads, -1).transpose(1, 2)

        query, key, value = split(self.query(x)), split(self.key(x)), split(self.value(x))
        at = torch.arange(tokens, device=x.device)
        same = at[:, None] // self.block == at[None, :] // self.block
        last = (at % self.block == self.block - 1)[None, :]
        seen = (at[None, :] <= at[:, None]) & (same | last)
        bias = torch.where(seen, 0.0, float("-inf"))
        attended = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        x = self.norm(x + attended.transpose(1, 2).reshape(batch, tokens, width) @ self.out)
        return self.mlp_norm(x + self.down(nn.functional.gelu(self.up(x))))


class BlockSparse(nn.Module):
    """States [batch, tokens, width] and how much each token counts, to states and their weighted mean."""

    def __init__(self, width: int = 128, heads: int = 4, block: int = 8, layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, heads, block) for _ in range(layers))

    def forward(self, states: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[batch, tokens, width] and [batch, tokens] to [batch, tokens, width] and [batch, width]."""
        for block in self.blocks:
            states = block(states)
        share = weights / weights.sum(1, keepdim=True)
        return states, (states * share[..., None]).sum(1)


def make() -> tuple[nn.Module, tuple[torch.Tensor, ...], dict[str, object]]:
    """The module with random weights, example inputs, and which of their axes may have another length."""
    torch.manual_seed(0)
    tokens = torch.export.Dim("tokens", min=2, max=512)
    given = (torch.randn(1, 40, 128), torch.rand(1, 40) + 0.1)
    return BlockSparse().eval(), given, {"states": {1: tokens}, "weights": {1: tokens}}
