"""The key-value pairs of a file: what the model is, in llama.cpp's words. No clock, host or path goes in."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tapeout.exporters.gguf.arch import ARCHS
from tapeout.exporters.gguf.layout import Layout, library
from tapeout.models import DecoderConfig, EncoderConfig
from tapeout.models.decoder import Moe
from tapeout.models.rope import attention_factor, mscale
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
    model = quant.model
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

    if isinstance(model.config, EncoderConfig):
        _add_encoder(writer, model.config, layout)
        return
    config = model.decoder
    writer.add_context_length(layout.context)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(layout.layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.value_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_rope(writer, config)
    if config.attention_softcap:
        writer.add_attn_logit_softcapping(config.attention_softcap)
    if config.logit_softcap:
        writer.add_final_logit_softcapping(config.logit_softcap)
    if layout.arch == "granite_swa":
        writer.add_logit_scale(1.0)
    if layout.arch == "granite_swa" or (ARCHS[layout.arch].windows and config.sliding_window):
        writer.add_sliding_window(config.sliding_window)
        writer.add_sliding_window_pattern([config.window(i) is not None for i in range(layout.layers)])
    if config.moe:
        _add_experts(writer, config.moe, layout)
    if config.mla:
        # Without the lengths of a compressed cache llama.cpp takes kv_b as it is, in the canonical codes.
        writer.add_kv_lora_rank(config.mla.kv_rank)
        writer.add_q_lora_rank(config.mla.q_rank or 0)


def _add_encoder(writer: Any, config: EncoderConfig, layout: Layout) -> None:
    kinds = library().PoolingType
    pooled = {"cls": kinds.CLS, "mean": kinds.MEAN}[config.pooling]
    # The rows of its table, of which sentence-transformers may use fewer.
    writer.add_context_length(config.position_rows)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(layout.layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_layer_norm_eps(config.layer_norm_eps)
    writer.add_causal_attention(False)
    writer.add_pooling_type(pooled if config.output == "sentence_embedding" else kinds.NONE)
    writer.add_vocab_size(config.vocab_size)
    writer.add_token_type_count(max(1, config.type_rows))
    writer.add_bool("tapeout.normalize", config.normalize)


def _add_rope(writer: Any, config: DecoderConfig) -> None:
    rope, p = config.rope, config.rope.parameters
    kinds = library().RopeScalingType
    writer.add_rope_dimension_count(rope.dim)
    writer.add_rope_freq_base(rope.theta)
    if config.local_rope:
        writer.add_rope_freq_base_swa(config.local_rope.theta)
    if rope.kind in ("linear", "yarn"):
        writer.add_rope_scaling_type(kinds.LINEAR if rope.kind == "linear" else kinds.YARN)
        writer.add_rope_scaling_factor(float(p["factor"]))
    if rope.kind in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(int(p["original_max_position_embeddings"]))
    if rope.kind == "yarn":
        if config.mla:
            writer.add_rope_scaling_yarn_log_mul(
                0.1 * float(p["mscale_all_dim"])
            )  # llama.cpp divides by 0.1 again
        else:  # llama.cpp multiplies by YaRN's own factor itself
            writer.add_rope_scaling_attn_factors(attention_factor(rope) / mscale(float(p["factor"])))
    if rope.kind == "longrope":
        writer.add_rope_scaling_type(kinds.LONGROPE)
        writer.add_rope_scaling_attn_factors(attention_factor(rope))


def _add_experts(writer: Any, moe: Moe, layout: Layout) -> None:
    writer.add_expert_count(moe.experts)
    writer.add_expert_used_count(moe.top_k)
    if layout.arch == "llama":  # its experts are as wide as its other networks would be
        return
    writer.add_expert_feed_forward_length(moe.intermediate_size)
    if layout.arch == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(moe.shared_size)
    if layout.arch == "deepseek2":
        gates = library().ExpertGatingFuncType
        writer.add_leading_dense_block_count(
            moe.layers.index(True) if True in moe.layers else len(moe.layers)
        )
        writer.add_expert_shared_count(moe.shared_size // moe.intermediate_size)
        writer.add_expert_weights_scale(moe.scale)
        writer.add_expert_weights_norm(moe.renormalize)
        writer.add_expert_gating_func(gates.SIGMOID if moe.scoring == "sigmoid" else gates.SOFTMAX)
        writer.add_expert_group_count(moe.groups)
        writer.add_expert_group_used_count(moe.top_groups)
