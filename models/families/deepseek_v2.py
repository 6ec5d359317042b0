"""DeepSeek V2: latent attention, shared and routed experts by softmax, the first layers dense."""

from __future__ import annotations

from tapeout.errors import ModelError
from tapeout.models.decoder import ConfigReader, DecoderConfig, Moe
from tapeout.models.families import Family, _shared


def _config(fields: ConfigReader) -> DecoderConfig:
    layers, dense = int(fields.take("num_hidden_layers")), int(fields.take("first_k_dense_replace", 0))
    _shared.choice(fields, "scoring_func", "softmax", ("softmax",))
    method = _shared.choice(fields, "topk_method", "greedy", ("greedy", "group_limited_greedy"))
    if fields.take("norm_topk_prob", False):
        raise ModelError(
            "norm_topk_prob = true of a deepseek_v2 model is not handled: transformers leaves it out."
        )
    groups, best = fields.take("n_group", None), fields.take("topk_group", None)
    width = int(fields.take("moe_intermediate_size", 1407))
    moe = Moe(
        experts=int(fields.take("n_routed_experts", 64)),
        top_k=int(fields.take("num_experts_per_tok")),
        intermediate_size=width,
        layers=tuple(i >= dense for i in range(layers)),
        scale=float(fields.take("routed_scaling_factor", 1.0)),
        groups=int(groups) if method != "greedy" else 1,
        top_groups=int(best) if method != "greedy" else 1,
        shared_size=width * int(fields.take("n_shared_experts", 2)),
    )
    bias = bool(fields.take("mlp_bias", False))
    mla = _shared.read_mla(fields)
    return _shared.read_deepseek(fields, "deepseek_v2", mla, moe, interleaved=True, mlp_bias=bias)


FAMILY = Family(_config, _shared.tensors, _shared.optional)
