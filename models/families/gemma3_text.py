"""Gemma 3 (text): gemma 2 without soft caps, with norms of queries and keys, and another RoPE in layers with a window."""

from __future__ import annotations

from tapeout.models.decoder import ConfigReader, DecoderConfig
from tapeout.models.families import Family, _shared

_TANH = "gelu_pytorch_tanh"
_GLOBAL, _LOCAL = 1_000_000.0, 10_000.0  # transformers' thetas where the file has none


def _config(fields: ConfigReader) -> DecoderConfig:
    fields.ignore("hidden_act")  # hidden_activation is the one that is computed
    bias = bool(fields.take("attention_bias", False))
    layers = int(fields.take("num_hidden_layers"))
    head_dim = int(fields.take("head_dim", 256))
    context = int(fields.take("max_position_embeddings"))
    cap = fields.take("final_logit_softcapping", None)
    every = int(fields.take("sliding_window_pattern", 6))
    if "layer_types" in fields.raw:
        fields.ignore("_sliding_window_pattern")  # what layer_types was made from
    given = dict(fields.take("rope_parameters", {}))
    far = dict(given.get("full_attention") or {}) | dict(fields.take("rope_scaling", {}))
    near = dict(given.get("sliding_attention") or {})
    thetas = (fields.take("rope_theta", _GLOBAL), fields.take("rope_local_base_freq", _LOCAL))
    rope, local = (
        _shared.rope_of(p, {}, head_dim, context, theta=theta)
        for p, theta in zip((far, near), thetas, strict=True)
    )
    return _shared.read_config(
        fields,
        "gemma3_text",
        defaults={"num_key_value_heads": 4, "tie_word_embeddings": True, "hidden_activation": _TANH},
        act="hidden_activation",
        head_dim=head_dim,
        rope=rope,
        local_rope=local,
        qkv_bias=bias,
        out_bias=bias,
        norm_offset=1.0,
        embedding_scale=int(fields.take("hidden_size")) ** 0.5,
        attention_scale=float(fields.take("query_pre_attn_scalar", 256)) ** -0.5,
        logit_softcap=None if cap is None else float(cap),
        qk_norm=True,
        sandwich_norms=True,
        sliding_window=int(fields.take("sliding_window", 4096)),
        window_layers=_shared.window_layers(fields, layers, [(i + 1) % every != 0 for i in range(layers)]),
    )


FAMILY = Family(_config, _shared.tensors, _shared.optional)
