"""Mixtral: mistral whose MLPs are routed experts, with tensor names of its own."""

from __future__ import annotations

from tapeout.models.decoder import ConfigReader, DecoderConfig, Moe
from tapeout.models.families import Family, _shared


def _config(fields: ConfigReader) -> DecoderConfig:
    fields.ignore("router_jitter_noise")  # of training
    layers = int(fields.take("num_hidden_layers"))
    moe = Moe(
        experts=int(fields.take("num_local_experts", 8)),
        top_k=int(fields.take("num_experts_per_tok", 2)),
        intermediate_size=int(fields.take("intermediate_size")),
        layers=(True,) * layers,
        renormalize=True,
        router="block_sparse_moe.gate",
        expert="block_sparse_moe.experts.{}",
        parts=("w1", "w3", "w2"),
    )
    return _shared.read_config(
        fields,
        "mixtral",
        defaults={"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
        sliding_window=fields.take("sliding_window", None),
        moe=_shared.check_moe(moe, layers),
    )


FAMILY = Family(_config, _shared.tensors, _shared.optional)
