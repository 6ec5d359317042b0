"""Exports a Llama checkpoint to Core ML in coremltools' own way: ``python coreml_export.py MODEL OUT``.

A plain torch module of the same graph is traced, converted, and its weights are rounded to INT4 in groups of 32. It is one function
without a cache, less than ours writes; tracing transformers' own module ends at an operator that coremltools does not know.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import coremltools as ct
import coremltools.optimize as cto
import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn

LONGEST = 256


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.empty(width)), eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Layer(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, inner = config["hidden_size"], config["intermediate_size"]
        self.heads, self.kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        self.width = width // self.heads
        for name, into, out in (
            ("q_proj", width, width), ("k_proj", width, self.kv_heads * self.width), ("v_proj", width, self.kv_heads * self.width),
            ("o_proj", width, width), ("gate_proj", width, inner), ("up_proj", width, inner), ("down_proj", inner, width),
        ):  # fmt: skip
            setattr(self, name, nn.Linear(into, out, bias=False))
        self.input_layernorm = Norm(width, config["rms_norm_eps"])
        self.post_attention_layernorm = Norm(width, config["rms_norm_eps"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        y = self.input_layernorm(x)
        q, k, v = (
            part(y).reshape(1, -1, heads, self.width).transpose(1, 2)
            for part, heads in (
                (self.q_proj, self.heads), (self.k_proj, self.kv_heads), (self.v_proj, self.kv_heads),
            )
        )  # fmt: skip
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        k, v = (each.repeat_interleave(self.heads // self.kv_heads, 1) for each in (k, v))
        scores = torch.softmax(q @ k.transpose(2, 3) / self.width**0.5 + mask, -1)
        x = x + self.o_proj((scores @ v).transpose(1, 2).reshape(1, -1, self.heads * self.width))
        y = self.post_attention_layernorm(x)
        return x + self.down_proj(nn.functional.silu(self.gate_proj(y)) * self.up_proj(y))


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Llama(nn.Module):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config["vocab_size"], config["hidden_size"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["num_hidden_layers"]))
        self.norm = Norm(config["hidden_size"], config["rms_norm_eps"])
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        width = config["hidden_size"] // config["num_attention_heads"]
        angles = torch.outer(
            torch.arange(LONGEST), config["rope_theta"] ** (-torch.arange(0, width, 2) / width)
        )
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.register_buffer("mask", torch.full((LONGEST, LONGEST), -1e4).triu(1), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        tokens = ids.shape[1]
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, self.cos[:tokens], self.sin[:tokens], self.mask[:tokens, :tokens])
        return self.lm_head(self.norm(x))


def weights_of(directory: Path, module: Llama) -> None:
    """Copy a checkpoint into the module, tensor by tensor."""
    mine = dict(module.named_parameters())
    for shard in sorted(directory.glob("*.safetensors")):
        with safe_open(shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                short = name.removeprefix("model.").replace(".self_attn.", ".").replace(".mlp.", ".")
                mine.pop(short).data.copy_(file.get_tensor(name))
    assert not mine, sorted(mine)


def main(source: Path, out: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    with torch.device("meta"):
        module = Llama(config)
    module = module.to_empty(device="cpu")
    fresh = Llama(config | {"num_hidden_layers": 0, "vocab_size": 1})
    for name, values in fresh.named_buffers():  # what meta has no values of
        setattr(module, name, values)
    weights_of(source, module)
    with torch.no_grad():
        traced = torch.jit.trace(module.eval(), torch.zeros(1, 8, dtype=torch.int64))
    model = ct.convert(
        traced,
        inputs=[ct.TensorType("inputIds", (1, ct.RangeDim(1, LONGEST, default=8)), np.int32)],
        outputs=[ct.TensorType("logits")],
        minimum_deployment_target=ct.target.iOS18,
        skip_model_load=True,
    )
    del module, traced
    how = cto.coreml.OpLinearQuantizerConfig(
        mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=32
    )
    weights = cto.coreml.OptimizationConfig(op_type_configs={"linear": how, "gather": how})
    model = cto.coreml.linear_quantize_weights(model, weights)
    out.mkdir(parents=True)
    model.save(str(out / "model.mlpackage"))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
