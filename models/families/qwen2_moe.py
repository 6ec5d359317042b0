"""Qwen 1.5 and 2 MoE: qwen2 with routed experts beside a shared one that has a gate."""

from __future__ import annotations

from tapeout.models.decoder import ConfigReader, DecoderConfig
from tapeout.models.families import Family, _shared


def _config(fields: ConfigReader) -> DecoderConfig:
    layers = int(fields.take("num_hidden_layers"))
    used, window = fields.take("use_sliding_window", False), fields.take("sliding_window", 4096)
    last = int(fields.take("max_window_layers", 28))
    # transformers gives the window to every other one of the first max_window_layers.
    sliding = _shared.window_layers(
        fields, layers, [bool(used) and i % 2 == 0 and i < last for i in range(layers)]
    )
    return _shared.read_config(
        fields,
        "qwen2_moe",
        defaults={"num_key_value_heads": 16},
        qkv_bias=bool(fields.take("qkv_bias", "qkv_bias" not in fields.raw)),
        sliding_window=window if used and any(sliding) else None,
        window_layers=sliding if used and any(sliding) else (),
        moe=_shared.qwen_moe(
            fields,
            layers,
            {"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408},
            shared_size=int(fields.take("shared_expert_intermediate_size", 5632)),
            shared_gate=True,
            shared="mlp.shared_expert",
        ),
    )


FAMILY = Family(_config, _shared.tensors, _shared.optional)
