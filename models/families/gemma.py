"""Gemma: norms of 1 + w, GeGLU, embeddings times the square root of the width, tied head."""

from __future__ import annotations

from tapeout.errors import ModelError
from tapeout.models.decoder import ConfigReader, DecoderConfig
from tapeout.models.families import Family, _shared

_TANH = "gelu_pytorch_tanh"


def _config(fields: ConfigReader) -> DecoderConfig:
    bias = bool(fields.take("attention_bias", False))
    # The first releases say gelu and mean the tanh form, which a second field says of some.
    named, meant = fields.take("hidden_act", _TANH), fields.take("hidden_activation", _TANH)
    named = _TANH if named == "gelu" else named
    if named != meant:
        raise ModelError(f"hidden_act = {named} and hidden_activation = {meant} contradict each other.")
    return _shared.read_config(
        fields,
        "gemma",
        defaults={"num_key_value_heads": 16, "head_dim": 256, "tie_word_embeddings": True},
        hidden_act=_shared.activation(named),
        qkv_bias=bias,
        out_bias=bias,
        norm_offset=1.0,
        embedding_scale=int(fields.take("hidden_size")) ** 0.5,
    )


FAMILY = Family(_config, _shared.tensors, _shared.optional)
