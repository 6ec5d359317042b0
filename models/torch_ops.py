"""The graph in plain torch: one sequence, float32, weights by tensor, so that one layer's are in memory at a time.

Sequences run one by one, on one core each: the same bits whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from tapeout.errors import MissingToolchain
from tapeout.models.decoder import Attention, Mla, Moe
from tapeout.models.graph import inside
from tapeout.models.rope import Rope, cos_sin

if TYPE_CHECKING:
    import torch

Weights = Callable[[str], "torch.Tensor"]
"""A tensor by its Hugging Face name, float32."""


@dataclass
class Cache:
    """What the attentions keep of a sequence.

    Attributes:
        length: tokens that every layer has seen; who runs the graph counts them up, step by step.
        kept: of each layer, what it keeps [heads, tokens, width], twice: keys and values, or latents [1, tokens, …].
    """

    length: int = 0
    kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def append(self, layer: int, *new: torch.Tensor, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """All that the new tokens can see of a layer; with a window no more than that is kept for the next ones."""
        import torch

        first, second = new
        if layer in self.kept:
            first, second = (
                torch.cat((old, each), 1) for old, each in zip(self.kept[layer], new, strict=True)
            )
        begin = max(0, first.shape[1] - window + 1) if window else 0
        self.kept[layer] = first[:, begin:], second[:, begin:]
        return first, second


@dataclass
class TorchOps:
    """``Ops`` on tensors [tokens, width].

    Attributes:
        weights: where they come from.
        cache: None: every call sees whole sequences.
        inside: is shown what attentions make on their way (``graph.inside``): name, what it is, value, and of what it is made.
    """

    weights: Weights
    cache: Cache | None = None
    inside: Callable[[str, str, torch.Tensor, torch.Tensor], None] | None = None

    def embedding(self, name: str, ids: torch.Tensor, weight: str, scale: float) -> torch.Tensor:
        x = self.weights(weight)[ids]
        return x if scale == 1.0 else x * scale

    def linear(self, name: str, x: torch.Tensor, weight: str, bias: str | None) -> torch.Tensor:
        import torch

        return torch.nn.functional.linear(x, self.weights(weight), self.weights(bias) if bias else None)

    def rms_norm(
        self, name: str, x: torch.Tensor, weight: str, *, eps: float, offset: float, parts: int = 1
    ) -> torch.Tensor:
        w = self.weights(weight)
        y = x.unflatten(-1, (parts, -1)) if parts > 1 else x
        variance = y.pow(2).mean(-1, keepdim=True)
        y = (w + offset if offset else w) * (y * (variance + eps).rsqrt())
        return y.flatten(-2) if parts > 1 else y

    def split(self, name: str, x: torch.Tensor, sizes: Sequence[int]) -> tuple[torch.Tensor, ...]:
        return tuple(x.split(tuple(sizes), -1))

    def attention(
        self, name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spec: Attention
    ) -> torch.Tensor:
        q, k, v = (
            x.view(len(x), heads, -1).transpose(0, 1)
            for x, heads in ((query, spec.heads), (key, spec.kv_heads), (value, spec.kv_heads))
        )
        q, k = self._rotate(q, spec.rope), self._rotate(k, spec.rope)
        if self.inside:
            self.inside(inside(name, "rope"), "rope", k.transpose(0, 1).flatten(1), key)
        if self.cache:
            k, v = self.cache.append(spec.layer, k, v, window=spec.window)
        shared = spec.heads // spec.kv_heads
        k, v = k.repeat_interleave(shared, 0), v.repeat_interleave(shared, 0)
        self._show_scores(name, q, k, spec, query)
        return _attend(q, k, v, spec)

    def latent_attention(
        self,
        name: str,
        query: torch.Tensor,
        latent: torch.Tensor,
        key_rope: torch.Tensor,
        weight: str,
        spec: Attention,
        mla: Mla,
    ) -> torch.Tensor:
        import torch

        q = query.view(len(query), spec.heads, -1).transpose(0, 1)
        plain, turned = q.split((mla.nope_dim, mla.rope_dim), -1)
        q = torch.cat((plain, self._rotate(turned, spec.rope)), -1)
        latent, turned = latent[None], self._rotate(key_rope[None], spec.rope)
        if self.inside:
            self.inside(inside(name, "rope"), "rope", turned[0], key_rope)
        key_rope = turned
        if self.cache:
            latent, key_rope = self.cache.append(spec.layer, latent, key_rope, window=spec.window)
        kv = torch.nn.functional.linear(latent[0], self.weights(weight))
        kv = kv.view(len(kv), spec.heads, -1).transpose(0, 1)
        k, v = kv.split((mla.nope_dim, mla.v_dim), -1)
        k = torch.cat((k, key_rope.expand(spec.heads, -1, -1)), -1)
        self._show_scores(name, q, k, spec, query)
        return _attend(q, k, v, spec)

    def gated(self, name: str, gate: torch.Tensor, up: torch.Tensor, act: str) -> torch.Tensor:
        import torch

        f = torch.nn.functional
        if act == "silu":
            return f.silu(gate) * up
        return f.gelu(gate, approximate="tanh" if act == "gelu_pytorch_tanh" else "none") * up

    def route(
        self, name: str, logits: torch.Tensor, bias: str | None, moe: Moe
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The chosen experts [tokens, top_k] and their weights [tokens, top_k]."""
        scores = logits.softmax(-1) if moe.scoring == "softmax" else logits.sigmoid()
        choice = scores if bias is None else scores + self.weights(bias)
        if moe.groups > 1:
            groups = choice.unflatten(-1, (moe.groups, -1))
            best = 2 if moe.group_score == "top2" else 1
            value = groups.topk(min(best, groups.shape[-1]), -1).values.sum(-1)
            dropped = value.sort(dim=-1, descending=True, stable=True).indices[..., moe.top_groups :]
            groups = groups.scatter(-2, dropped[..., None].expand(*dropped.shape, groups.shape[-1]), -np.inf)
            choice = groups.flatten(-2)
        chosen = choice.sort(dim=-1, descending=True, stable=True).indices[..., : moe.top_k]
        weights = scores.gather(-1, chosen)
        if moe.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return chosen, weights if moe.scale == 1.0 else weights * moe.scale

    def experts(
        self,
        name: str,
        x: torch.Tensor,
        routing: tuple[torch.Tensor, torch.Tensor],
        layer: int,
        act: str,
        moe: Moe,
    ) -> torch.Tensor:
        import torch

        chosen, weights = routing
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            tokens, place = (chosen == expert).nonzero(as_tuple=True)
            gate, up, down = moe.weights(layer, expert)
            rows = x[tokens]
            inner = self.gated(
                name, self.linear(name, rows, gate, None), self.linear(name, rows, up, None), act
            )
            out.index_add_(0, tokens, self.linear(name, inner, down, None) * weights[tokens, place, None])
        return out

    def sigmoid_gate(self, name: str, x: torch.Tensor, logit: torch.Tensor) -> torch.Tensor:
        return x * logit.sigmoid()

    def add(self, name: str, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    def softcap(self, name: str, x: torch.Tensor, cap: float) -> torch.Tensor:
        return (x / cap).tanh() * cap

    def _show_scores(
        self, name: str, q: torch.Tensor, k: torch.Tensor, spec: Attention, query: torch.Tensor
    ) -> None:
        """What softmax is taken of [heads, tokens, total], NaN where the mask leaves it out."""
        if self.inside:
            scores = _scores(q, k, spec).masked_fill(~_mask(q, k, spec), np.nan)
            what = "scores" if spec.softcap is None else "softcap"
            self.inside(inside(name, "scores"), what, scores, query)

    def _rotate(self, x: torch.Tensor, rope: Rope) -> torch.Tensor:
        """Turn the first ``rope.dim`` elements of the new tokens [heads, tokens, dim]."""
        import torch

        begin = self.cache.length if self.cache else 0
        end = begin + x.shape[1]
        cos, sin = (torch.from_numpy(t).to(x.device) for t in cos_sin(rope, np.arange(begin, end), end))
        turned, rest = x[..., : rope.dim], x[..., rope.dim :]
        a, b = turned.unflatten(-1, (-1, 2)).unbind(-1) if rope.interleaved else turned.chunk(2, -1)
        parts = a * cos - b * sin, b * cos + a * sin
        y = torch.stack(parts, -1).flatten(-2) if rope.interleaved else torch.cat(parts, -1)
        return torch.cat((y, rest), -1) if rest.shape[-1] else y


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, spec: Attention) -> torch.Tensor:
    """The last tokens [heads, tokens, dim] look at all [heads, total, dim]: [tokens, heads * v_dim]."""
    import torch

    mask = _mask(q, k, spec)
    if spec.softcap is None:
        out = torch.nn.functional.scaled_dot_product_attention(
            q[None], k[None], v[None], mask, scale=spec.scale
        )[0]
    else:
        out = _scores(q, k, spec).masked_fill(~mask, -np.inf).softmax(-1) @ v
    return out.transpose(0, 1).reshape(q.shape[1], -1)


def _mask(q: torch.Tensor, k: torch.Tensor, spec: Attention) -> torch.Tensor:
    """Which of all tokens each new one looks at, bool [tokens, total]."""
    import torch

    tokens, total = q.shape[1], k.shape[1]
    mask = torch.ones(tokens, total, dtype=torch.bool, device=q.device).tril(total - tokens)
    return mask.triu(total - tokens + 1 - spec.window) if spec.window else mask


def _scores(q: torch.Tensor, k: torch.Tensor, spec: Attention) -> torch.Tensor:
    """What softmax is taken of, before the mask: [heads, tokens, total]."""
    if spec.softcap is None:
        return q @ k.mT * spec.scale
    return spec.softcap * (q @ k.mT * (spec.scale / spec.softcap)).tanh()


def one_core_each() -> None:
    """To be called first in every thread that runs torch: its own pool would share the cores, and sum in another order."""
    try:
        import torch
    except ImportError as error:
        raise MissingToolchain(
            f"calibration needs torch ({error}): pip install 'tapeout[reference]'"
        ) from error
    torch.set_num_threads(1)
