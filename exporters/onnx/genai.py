"""``genai_config.json``: what onnxruntime-genai wants to know of a model, so that the directory loads there as it is."""

from __future__ import annotations

import json

from tapeout.exporters.onnx.blocks import kernel_width
from tapeout.models import DecoderConfig, Model

CONFIG = "genai_config.json"


def cache_shape(config: DecoderConfig) -> tuple[int, int]:
    """Heads of a layer's keys and elements of each, in the cache; its values are as many. The cache of latents is that of one head."""
    if config.mla:
        return 1, kernel_width(config.mla.kv_rank + config.mla.rope_dim)
    return config.num_kv_heads, kernel_width(config.head_dim)


def config(model: Model, context: int) -> str:
    """The file's text; generation defaults are the model's own."""
    c, generation = model.decoder, model.generation
    stop = list(generation.stop_token_ids)
    heads, width = cache_shape(c)
    decoder = {
        "filename": "model.onnx",
        "head_size": width,
        "hidden_size": c.hidden_size,
        "num_attention_heads": c.num_heads,
        "num_hidden_layers": c.num_layers,
        "num_key_value_heads": heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
    }
    pad = c.pad_token_id if c.pad_token_id is not None else stop[0] if stop else 0
    said = {
        "model": {
            "type": "decoder",
            "bos_token_id": c.bos_token_id if c.bos_token_id is not None else pad,
            "eos_token_id": stop or [pad],
            "pad_token_id": pad,
            "context_length": context,
            "vocab_size": c.vocab_size,
            "decoder": decoder,
        },
        "search": {
            "do_sample": generation.temperature > 0,
            "max_length": context,
            "past_present_share_buffer": True,
            "temperature": generation.temperature or 1.0,
            "top_k": generation.top_k,
            "top_p": generation.top_p,
            "repetition_penalty": generation.repetition_penalty,
        },
    }
    return json.dumps(said, indent=1) + "\n"
