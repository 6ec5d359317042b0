"""Mistral: llama with a sliding window (v0.1) and no biases."""

from __future__ import annotations

from tapeout.models.decoder import ConfigReader, DecoderConfig
from tapeout.models.families import Family, _shared


def _config(fields: ConfigReader) -> DecoderConfig:
    # transformers' MistralConfig fills an absent field with 4096; a null means no window.
    window = fields.take("sliding_window", None if "sliding_window" in fields.raw else 4096)
    return _shared.read_config(fields, "mistral", defaults={"num_key_value_heads": 8}, sliding_window=window)


FAMILY = Family(_config, _shared.tensors, _shared.optional)
