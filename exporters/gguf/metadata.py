"""The key-value pairs of a file: what the model is, in llama.cpp's words. No clock, host or path goes in."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tapeout.exporters.gguf.layout import Layout, library
from tapeout.quantize import Quantized

_QUANTIZATION_VERSION = 2  # of ggml's block layouts

# File types that are not MOSTLY_ and the type. The _S are llama.cpp's recipes with the fewest tensors of another type.
_FILE_TYPES = {
    "F32": "ALL_F32",
    "Q2_K": "MOSTLY_Q2_K_S",
    "Q3_K": "MOSTLY_Q3_K_S",
    "Q4_K": "MOSTLY_Q4_K_S",
    "Q5_K": "MOSTLY_Q5_K_S",
    "MXFP4": "MOSTLY_MXFP4_MOE",
}


def largest_kind(layout: Layout) -> str:
    """The GGUF type that holds most of the weights."""
    bytes_of: Counter[str] = Counter()
    for entry in layout.entries:
        weights = 1
        for n in entry.shape:
            weights *= n
        bytes_of[entry.kind] += weights
    return bytes_of.most_common(1)[0][0]


def add_model(writer: Any, quant: Quantized, layout: Layout, name: str) -> None:
    """Add everything but the tokenizer to a ``gguf.GGUFWriter``."""
    gguf = library()
    config, model = quant.model.decoder, quant.model
    kind = largest_kind(layout)
    writer.add_type("model")
    writer.add_name(name)
    if model.licence:
        writer.add_license(model.licence)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES.get(kind, f"MOSTLY_{kind}")])
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    writer.add_string("tapeout.scheme", quant.scheme.name)
    writer.add_string("tapeout.rounding", quant.rounding)
    writer.add_string("tapeout.source_sha256", quant.source_sha256)
    writer.add_string("tapeout.codes_sha256", quant.digest)

    writer.add_context_length(layout.context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(layout.layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    if config.rope.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(config.rope.parameters["factor"]))
    if layout.arch == "granite_swa":
        writer.add_logit_scale(1.0)
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([True] * layout.layers)
