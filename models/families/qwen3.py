"""Qwen 3: llama with norms of queries and keys, and a window in the upper layers of some."""

from __future__ import annotations

from tapeout.models.decoder import ConfigReader, DecoderConfig
from tapeout.models.families import Family, _shared


def _config(fields: ConfigReader) -> DecoderConfig:
    layers = int(fields.take("num_hidden_layers"))
    bias = bool(fields.take("attention_bias", False))
    used, window = fields.take("use_sliding_window", False), fields.take("sliding_window", 4096)
    first = int(fields.take("max_window_layers", 28))
    sliding = _shared.window_layers(fields, layers, [bool(used) and i >= first for i in range(layers)])
    return _shared.read_config(
        fields,
        "qwen3",
        defaults={"num_key_value_heads": 32, "head_dim": 128},
        qkv_bias=bias,
        out_bias=bias,
        qk_norm=True,
        sliding_window=window if used and any(sliding) else None,
        window_layers=sliding if used and any(sliding) else (),
    )


FAMILY = Family(_config, _shared.tensors, _shared.optional)
