"""LLaMA 1 to 3: RMSNorm, SwiGLU, RoPE (every scaling), grouped-query attention."""

from __future__ import annotations

from tapeout.models.decoder import ConfigReader, DecoderConfig
from tapeout.models.families import Family, _shared


def _config(fields: ConfigReader) -> DecoderConfig:
    # Only the order in which one matmul is summed, and transformers 5 ignores it.
    fields.ignore("pretraining_tp")
    bias = bool(fields.take("attention_bias", False))
    return _shared.read_config(
        fields, "llama", qkv_bias=bias, out_bias=bias, mlp_bias=bool(fields.take("mlp_bias", False))
    )


FAMILY = Family(_config, _shared.tensors, _shared.optional)
