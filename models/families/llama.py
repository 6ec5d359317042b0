"""LLaMA 1 to 3: RMSNorm, SwiGLU, RoPE (with llama3 scaling), grouped-query attention."""

from __future__ import annotations

from tapeout.models.decoder import ConfigReader, DecoderConfig
from tapeout.models.families import Family, _llama_like


def _config(fields: ConfigReader) -> DecoderConfig:
    # Only the order in which one matmul is summed, and transformers 5 ignores it.
    fields.ignore("pretraining_tp")
    return _llama_like.read_config(fields, "llama")


FAMILY = Family(_config, _llama_like.tensors, _llama_like.optional)
