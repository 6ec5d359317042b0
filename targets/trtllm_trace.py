"""What the ranks of a TensorRT-LLM checkpoint mean together: the model's weights by their Hugging Face names, and our graph of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tapeout.models.decoder import ConfigReader, DecoderConfig
from tapeout.models.families import family
from tapeout.targets.trtllm_ranks import WORDS, linear_of, said_of, tensors_of
from tapeout.validate import primitives

if TYPE_CHECKING:
    import torch


def open_traced(directory: str) -> primitives.Primitives:
    """What the ranks mean together in our graph, each primitive's value in sight; called in a worker process."""
    path = Path(directory)
    raw = json.loads((path / WORDS / "config.json").read_text(encoding="utf-8"))
    config = family(raw["model_type"]).config(ConfigReader(raw))
    weights = whole(path, config)
    return primitives.open_weights(config, lambda name: weights[name], path / WORDS)


def whole(directory: Path, config: DecoderConfig) -> dict[str, npt.NDArray[np.float32]]:
    """The model's weights by their Hugging Face names, float32, from the shares of all ranks."""
    import torch

    said = said_of(directory)
    size, stages = int(said["mapping"]["tp_size"]), int(said["mapping"]["pp_size"])
    alone = {**said, "mapping": {"world_size": 1, "tp_size": 1, "pp_size": 1}}
    ranks = [_Share(directory, rank, alone) for rank in range(size * stages)]
    found: dict[str, torch.Tensor] = {}

    def joined(stage: int, name: str, axis: int) -> torch.Tensor:
        return torch.cat([ranks[stage * size + i][name] for i in range(size)], axis)

    found["model.embed_tokens.weight"] = joined(0, "transformer.vocab_embedding.weight", 0)
    found["lm_head.weight"] = joined(stages - 1, "lm_head.weight", 0)
    found["model.norm.weight"] = ranks[-1]["transformer.ln_f.weight"] - config.norm_offset
    dim, kv_heads = config.head_dim, max(1, config.num_kv_heads // size)
    widths = [config.num_heads // size * dim, kv_heads * dim, kv_heads * dim]
    copies = max(1, size // config.num_kv_heads)
    per_stage = config.num_layers // stages
    for layer in range(config.num_layers):
        stage, local = divmod(layer, per_stage)
        at, to = f"transformer.layers.{local}", f"model.layers.{layer}"
        one = ranks[stage * size]
        for suffix in ("weight", "bias"):
            if f"{at}.attention.qkv.{suffix}" not in one:
                continue
            parts = [r[f"{at}.attention.qkv.{suffix}"].split(widths) for r in ranks[stage * size :][:size]]
            q, k, v = (torch.cat([part[i] for part in parts[:: copies if i else 1]]) for i in range(3))
            if config.fused:
                found[f"{to}.self_attn.qkv_proj.{suffix}"] = torch.cat([q, k, v])
            else:
                found |= {
                    f"{to}.self_attn.{n}_proj.{suffix}": t for n, t in zip("qkv", (q, k, v), strict=True)
                }
        rows = {"attention.dense": "self_attn.o_proj", "mlp.proj": "mlp.down_proj"}
        columns = {"mlp.fc": "mlp.gate_proj", "mlp.gate": "mlp.up_proj"}
        moe = config.routed(layer)
        for name, theirs in (rows | columns).items():
            if moe and name.startswith("mlp"):
                continue
            for suffix in ("weight", "bias"):
                key = f"{at}.{name}.{suffix}"
                if key not in one:
                    continue
                if name in columns or suffix == "weight":
                    found[f"{to}.{theirs}.{suffix}"] = joined(stage, key, 0 if name in columns else 1)
                else:
                    found[f"{to}.{theirs}.{suffix}"] = one[key]
        if config.fused:
            halves = [r[f"{at}.mlp.fc.weight"].chunk(2) for r in ranks[stage * size :][:size]]
            del found[f"{to}.mlp.gate_proj.weight"]
            found[f"{to}.mlp.gate_up_proj.weight"] = torch.cat(
                [h[1] for h in halves] + [h[0] for h in halves]
            )
        norms = {"input_layernorm": "input_layernorm", "post_layernorm": "post_attention_layernorm"}
        norms |= {f"{n}_feedforward_layernorm": f"{n}_feedforward_layernorm" for n in ("pre", "post")}
        norms |= {f"attention.{n}_layernorm": f"self_attn.{n}_norm" for n in "qk"}
        for name, theirs in norms.items():
            if f"{at}.{name}.weight" in one:
                found[f"{to}.{theirs}.weight"] = one[f"{at}.{name}.weight"] - config.norm_offset
        if moe:
            found[f"{to}.{moe.router}.weight"] = one[f"{at}.mlp.router.weight"]
            shares = [r[f"{at}.mlp.fc.weight"].chunk(2, 1) for r in ranks[stage * size :][:size]]
            up, gate = (torch.cat([share[i] for share in shares], 1) for i in range(2))
            down = joined(stage, f"{at}.mlp.proj.weight", 2)
            for expert in range(moe.experts):
                named = zip(moe.weights(layer, expert), (gate, up, down), strict=True)
                found |= {name: tensor[expert] for name, tensor in named}
            if moe.shared_size:
                shared = f"{to}.{moe.shared}"
                halves = [
                    r[f"{at}.mlp.shared_expert.fc.weight"].chunk(2) for r in ranks[stage * size :][:size]
                ]
                found[f"{shared}.up_proj.weight"], found[f"{shared}.gate_proj.weight"] = (
                    torch.cat([half[i] for half in halves]) for i in range(2)
                )
                key = f"{at}.mlp.shared_expert.proj.weight"
                found[f"{shared}.down_proj.weight"] = joined(stage, key, 1)
                if moe.shared_gate:
                    found[f"{shared}_gate.weight"] = one[f"{at}.mlp.shared_expert_gate.weight"]
    return {name: np.ascontiguousarray(tensor.numpy()) for name, tensor in found.items()}


class _Share:
    """The tensors of one rank as floats, by name."""

    def __init__(self, directory: Path, rank: int, said: dict[str, Any]) -> None:
        self._tensors, self._said = tensors_of(directory, rank), said

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor = self._tensors[name]
        if tensor.dtype.itemsize > 1:
            return tensor.float()
        return linear_of(self._tensors, name.removesuffix(".weight"), self._said, inputs=False).weight
