"""Our efficient encoders in plain torch: what trains them, and the reference that their graph is held to.

Pre-norm, GELU (erf), scaled dot products over all tokens that are no padding; the mean of the last states is classified. The
shape that they are meant for: vocabulary 30522, hidden 256, 4 layers, 8 heads, ffn 512, 4 classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tapeout.models.encoder import EncoderConfig

if TYPE_CHECKING:
    import torch


def network(config: EncoderConfig) -> torch.nn.Module:
    """A fresh network in evaluation mode; its parameters have the names of the checkpoint's tensors.

    Called with ``ids`` int64 [batch, tokens] and ``mask`` bool [batch, tokens] it gives logits [batch, classes].
    """
    import torch
    from torch import nn

    hidden, heads, rope = config.hidden_size, config.num_heads, config.rope

    def rotate(x: Any) -> Any:
        """Turn [batch, heads, tokens, head_dim]: element i of a head with i + head_dim / 2."""
        assert rope is not None
        half = config.head_dim // 2
        frequencies = rope.theta ** (-torch.arange(half, dtype=torch.float64) / half)
        turns = torch.outer(torch.arange(x.shape[2], dtype=torch.float64), frequencies)
        cos, sin = turns.cos().to(x.dtype), turns.sin().to(x.dtype)
        a, b = x[..., :half], x[..., half:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

    class Attention(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.query, self.key, self.value, self.out = (nn.Linear(hidden, hidden) for _ in range(4))

        def forward(self, x: Any, mask: Any) -> Any:
            q, k, v = (
                linear(x).unflatten(-1, (heads, -1)).transpose(1, 2)
                for linear in (self.query, self.key, self.value)
            )
            if rope is not None:
                q, k = rotate(q), rotate(k)
            y = nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None, None, :])
            return self.out(y.transpose(1, 2).flatten(-2))

    class Mlp(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(hidden, config.intermediate_size)
            self.down = nn.Linear(config.intermediate_size, hidden)

        def forward(self, x: Any) -> Any:
            return self.down(nn.functional.gelu(self.up(x)))

    class Layer(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.attention_norm = nn.LayerNorm(hidden, config.layer_norm_eps)
            self.attention = Attention()
            self.mlp_norm = nn.LayerNorm(hidden, config.layer_norm_eps)
            self.mlp = Mlp()

        def forward(self, x: Any, mask: Any) -> Any:
            x = x + self.attention(self.attention_norm(x), mask)
            return x + self.mlp(self.mlp_norm(x))

    class EfficientEncoder(nn.Module):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(config.vocab_size, hidden)
            if config.position_rows:
                self.positions = nn.Embedding(config.position_rows, hidden)
            self.layers = nn.ModuleList(Layer() for _ in range(config.num_layers))
            self.norm = nn.LayerNorm(hidden, config.layer_norm_eps)
            self.classifier = nn.Linear(hidden, len(config.labels))

        def forward(self, ids: Any, mask: Any) -> Any:
            x = self.words(ids)
            if config.position_rows:
                x = x + self.positions(torch.arange(ids.shape[1]))
            for layer in self.layers:
                x = layer(x, mask)
            real = mask[..., None].to(x.dtype)
            pooled = (self.norm(x) * real).sum(1) / real.sum(1)
            return self.classifier(pooled)

    return EfficientEncoder().eval()
