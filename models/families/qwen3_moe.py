"""Qwen 3 MoE: qwen3 with routed experts."""

from __future__ import annotations

from tapeout.models.decoder import ConfigReader, DecoderConfig
from tapeout.models.families import Family, _shared


def _config(fields: ConfigReader) -> DecoderConfig:
    layers = int(fields.take("num_hidden_layers"))
    bias = bool(fields.take("attention_bias", False))
    used, window = fields.take("use_sliding_window", False), fields.take("sliding_window", 4096)
    fields.ignore("max_window_layers")  # transformers gives the window to all layers
    return _shared.read_config(
        fields,
        "qwen3_moe",
        defaults={"num_key_value_heads": 4},
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        sliding_window=window if used else None,
        moe=_shared.qwen_moe(
            fields, layers, {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
        ),
    )


FAMILY = Family(_config, _shared.tensors, _shared.optional)
