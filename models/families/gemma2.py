"""Gemma 2: gemma with norms on both sides, soft caps, and a sliding window in every other layer."""

from __future__ import annotations

from tapeout.models.decoder import ConfigReader, DecoderConfig
from tapeout.models.families import Family, _shared

_TANH = "gelu_pytorch_tanh"


def _cap(fields: ConfigReader, name: str, default: float) -> float | None:
    value = fields.take(name, None if name in fields.raw else default)
    return None if value is None else float(value)


def _config(fields: ConfigReader) -> DecoderConfig:
    fields.ignore("hidden_act")  # hidden_activation is the one that is computed
    bias = bool(fields.take("attention_bias", False))
    layers = int(fields.take("num_hidden_layers"))
    return _shared.read_config(
        fields,
        "gemma2",
        defaults={
            "num_key_value_heads": 4,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "hidden_activation": _TANH,
        },
        act="hidden_activation",
        qkv_bias=bias,
        out_bias=bias,
        norm_offset=1.0,
        embedding_scale=int(fields.take("hidden_size")) ** 0.5,
        attention_scale=float(fields.take("query_pre_attn_scalar", 256)) ** -0.5,
        attention_softcap=_cap(fields, "attn_logit_softcapping", 50.0),
        logit_softcap=_cap(fields, "final_logit_softcapping", 30.0),
        sandwich_norms=True,
        sliding_window=int(fields.take("sliding_window", 4096)),
        window_layers=_shared.window_layers(fields, layers, [i % 2 == 0 for i in range(layers)]),
    )


FAMILY = Family(_config, _shared.tensors, _shared.optional)
