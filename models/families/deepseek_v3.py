"""DeepSeek V3 and R1: V2 with sigmoid scores, a bias that corrects the choice of experts, and groups by their best two."""

from __future__ import annotations

from tapeout.models.decoder import ConfigReader, DecoderConfig, Moe
from tapeout.models.families import Family, _shared


def _config(fields: ConfigReader) -> DecoderConfig:
    layers, dense = int(fields.take("num_hidden_layers")), int(fields.take("first_k_dense_replace", 3))
    _shared.choice(fields, "scoring_func", "sigmoid", ("sigmoid",))
    _shared.choice(fields, "topk_method", "noaux_tc", ("noaux_tc",))
    width = int(fields.take("moe_intermediate_size", 2048))
    moe = Moe(
        experts=int(fields.take("n_routed_experts", 256)),
        top_k=int(fields.take("num_experts_per_tok", 8)),
        intermediate_size=width,
        layers=tuple(i >= dense for i in range(layers)),
        scoring="sigmoid",
        renormalize=bool(fields.take("norm_topk_prob", "norm_topk_prob" not in fields.raw)),
        scale=float(fields.take("routed_scaling_factor", 2.5)),
        groups=int(fields.take("n_group", 8)),
        top_groups=int(fields.take("topk_group", 4)),
        group_score="top2",
        correction_bias=True,
        shared_size=width * int(fields.take("n_shared_experts", 1)),
    )
    interleaved = bool(fields.take("rope_interleave", "rope_interleave" not in fields.raw))
    return _shared.read_deepseek(
        fields, "deepseek_v3", _shared.read_mla(fields), moe, interleaved=interleaved
    )


FAMILY = Family(_config, _shared.tensors, _shared.optional)
