"""``config.json`` of a rank checkpoint, and what a model must be to have one (``tensorrt_llm/models/*/config.py``, releases 1.0 to 1.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tapeout.errors import ModelError, SchemeError, TapeoutError
from tapeout.exporters.trtllm import packing
from tapeout.exporters.trtllm.layout import Mapping
from tapeout.models import DecoderConfig, Model, Role
from tapeout.quantize import Quantized, QuantTensor

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
}
TENSOR_PARALLEL = (1, 2, 4, 8)
# In float16 their activations overflow.
IN_BFLOAT16 = ("gemma2", "gemma3_text")
_OTHERWISE = "What fits: --format modelopt, which current TensorRT-LLM, vLLM and SGLang load."
_EXCLUDED = ("*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding")
_GATES = ("*shared_expert_gate", "*shared_expert_gate.weight")  # as a module, and as a tensor


def check_model(model: Model) -> None:
    """ModelError for what that release has no model of, or computes otherwise."""
    c = model.decoder
    if c.family not in ARCHITECTURES:
        raise ModelError(
            f"{model.name} is of the family {c.family}, which is not written as a rank checkpoint; written are "
            f"{', '.join(ARCHITECTURES)}. {_OTHERWISE}"
        )
    if reason := _otherwise(c):
        raise ModelError(f"{model.name} ({c.family}) {reason}. {_OTHERWISE}")


def _otherwise(c: DecoderConfig) -> str:
    """Why TensorRT-LLM would not compute this model; nothing: it does."""
    kinds = ("default", "longrope") if c.family == "phi3" else ("default", "linear", "dynamic", "llama3")
    if c.rope.kind not in kinds:
        return (
            f"has RoPE scaling of the type {c.rope.kind}, which TensorRT-LLM's model of it does not compute"
        )
    if c.local_rope and (c.rope.kind != "default" or c.local_rope.kind != "default"):
        return "scales RoPE of some layers and not of others, which TensorRT-LLM's model of it does not tell apart"
    if c.rope.kind == "longrope":
        p = c.rope.parameters
        trained = float(p["original_max_position_embeddings"])
        factor = c.max_position_embeddings / trained
        own = math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0
        if not math.isclose(own, float(p["attention_factor"]), rel_tol=1e-6):
            return f"multiplies LongRoPE's sines by {p['attention_factor']:.6g}, where TensorRT-LLM makes {own:.6g} of the contexts"
    if c.rope.dim != c.head_dim and c.family != "phi3":
        return "turns a part of each head only"
    if c.hidden_act == "gelu":
        return "has GELU by erf, and TensorRT-LLM's is the one by tanh"
    if c.hidden_act != "silu" and (c.moe or c.family == "phi3"):
        return f"has {c.hidden_act} where TensorRT-LLM's model of it has SwiGLU"
    if c.out_bias and (c.family.startswith(("qwen", "phi")) or not c.qkv_bias):
        return "has a bias in o_proj that TensorRT-LLM's model of it does not have"
    if c.qkv_bias and c.family in ("llama", "mistral") and not c.out_bias:
        return "has biases of q, k and v without one of o_proj"
    if not math.isclose(c.attention_scale, c.head_dim**-0.5) and c.family not in IN_BFLOAT16:
        return f"scales attention by {c.attention_scale:.6g}, which is not 1 / sqrt(head_dim)"
    if c.moe and not all(c.moe.layers):
        return "has layers with a dense MLP among those with experts"
    if c.family == "gemma3_text" and _every(c) is None:
        return "has layers with and without a window in no period"
    return ""


def _every(c: DecoderConfig) -> int | None:
    """Gemma 3: every which layer has no window; None: there is no such period."""
    n = c.num_layers
    found = (
        e
        for e in range(1, n + 2)
        if all(bool(c.window(i) is not None) == bool((i + 1) % e) for i in range(n))
    )
    return next(found, None)


def check_mapping(model: Model, mapping: Mapping) -> None:
    """TapeoutError for a size that does not divide what it cuts, with those that do."""
    c, tensor, stages = model.decoder, mapping.tensor, mapping.pipeline
    if tensor not in TENSOR_PARALLEL:
        fits = [n for n in TENSOR_PARALLEL if not _undivided(c, n)]
        raise TapeoutError(
            f"--tensor-parallel {tensor} is no size that ranks are written of; fits {model.name}: {_list(fits)}."
        )
    if stages > 1 and c.family == "phi3":
        raise TapeoutError("--pipeline-parallel: TensorRT-LLM's Phi-3 has no stages; what fits: 1.")
    if c.num_layers % stages:
        fits = [n for n in range(1, c.num_layers + 1) if c.num_layers % n == 0]
        raise TapeoutError(
            f"--pipeline-parallel {stages} does not divide the {c.num_layers} layers of {model.name}; fits: {_list(fits)}."
        )
    if wrong := _undivided(c, tensor):
        fits = [n for n in TENSOR_PARALLEL if not _undivided(c, n)]
        raise TapeoutError(
            f"--tensor-parallel {tensor} does not divide {' or '.join(wrong)} of {model.name}; fits: {_list(fits)}."
        )


def _undivided(c: DecoderConfig, tensor: int) -> list[str]:
    """What a size does not divide, in words."""
    cut = {"attention heads": c.num_heads, "rows of the vocabulary": c.vocab_size}
    if c.moe:
        cut |= {"rows of an expert": c.moe.intermediate_size}
        cut |= {"rows of the shared expert": c.moe.shared_size} if c.moe.shared_size else {}
    else:
        cut["rows of the MLP"] = c.intermediate_size
    wrong = [f"the {total} {what}" for what, total in cut.items() if total % tensor]
    if c.num_kv_heads % tensor and tensor % c.num_kv_heads:
        wrong.append(f"the {c.num_kv_heads} key heads (nor is it a multiple of them)")
    return wrong


def check_widths(model: Model, mapping: Mapping, algorithm: str, group: int) -> None:
    """SchemeError where a rank's share of a linear is no whole number of what the kernels take at once.

    TensorRT-LLM fills other shares with zeros in its converter alone; ``trtllm-build`` then finds a shape that it does not expect.
    """
    unit = max(64, group) if algorithm == packing.AWQ else 64 if algorithm == packing.PLAIN else 4
    if wrong := _ragged(model.decoder, mapping.tensor, unit):
        c = model.decoder
        sizes = [n for n in TENSOR_PARALLEL if not _undivided(c, n) and not _ragged(c, n, unit)]
        fits = [f"--tensor-parallel {_list(sizes)}"] if sizes else []
        if unit == 128 and not _ragged(c, mapping.tensor, 64):
            fits.append("groups of 64")
        raise SchemeError(
            f"{model.name} gives each of {mapping.tensor} ranks {' and '.join(wrong)}, and the kernels of {algorithm} take multiples of "
            f"{unit}; fits: {' or '.join([*fits, 'w8a8 or none' if unit > 4 else 'none'])}."
        )


def _ragged(c: DecoderConfig, tensor: int, unit: int) -> list[str]:
    heads = c.num_heads // tensor
    kv_heads = max(1, c.num_kv_heads // tensor)
    shares = {
        "columns of the hidden state over all ranks": c.hidden_size / tensor,
        "rows of qkv": (heads + 2 * kv_heads) * c.head_dim,
        "columns of dense": heads * c.head_dim,
    }
    if c.moe:
        shares["rows of an expert"] = c.moe.intermediate_size // tensor
        if c.moe.shared_size:
            shares["rows of the shared expert"] = c.moe.shared_size // tensor
    else:
        shares["rows of the MLP"] = c.intermediate_size // tensor
    return [f"{total:g} {what}" for what, total in shares.items() if total % unit]


def check_scheme(quant: Quantized, algorithm: str | None) -> None:
    """ModelError for an algorithm that TensorRT-LLM's model of a family does not have."""
    model = quant.model
    c = model.decoder
    if algorithm is None:
        return
    if c.family in IN_BFLOAT16:
        coded = [
            name
            for name, scheme in quant.schemes.items()
            if scheme.kind != "none" and model.specs[name].role is not Role.LINEAR
        ]
        zeros = any(scheme.kind == "asymmetric" for scheme in quant.schemes.values())
        others = {each.dtype for name in quant if not isinstance(each := quant[name], QuantTensor)} - {"BF16"}
        if algorithm != packing.AWQ or zeros or coded or others:
            raise ModelError(
                f"{model.name} ({c.family}) is run in bfloat16, which does not hold the float16 scales of {algorithm if not zeros else 'zero points'}"
                f"{', nor the values of other codes' if coded else ''}{', nor floats of ' + ', '.join(sorted(others)) if others else ''}. What "
                "fits: of a checkpoint in bfloat16 int4-g64 or int4-g128 with embed_tokens = none in a recipe, whose scales the builder "
                f"rounds itself; the scheme none; or {_OTHERWISE.removeprefix('What fits: ')}"
            )
    if c.moe and algorithm != packing.AWQ:
        raise ModelError(
            f"{model.name} has experts, whose codes TensorRT-LLM's kernel takes of {packing.AWQ} alone without an order of bytes "
            "of its own. What fits: int4-g64, int4-g128, none."
        )
    plain = c.rope.kind == "default" and not c.qkv_bias and c.head_dim * c.num_heads == c.hidden_size
    if algorithm == packing.PER_TOKEN and not (c.family in ("llama", "mistral") and plain):
        raise ModelError(
            f"{model.name} ({c.family}) is more than TensorRT-LLM's SmoothQuant attention computes: a llama or mistral whose RoPE is not "
            "scaled, without biases. What fits: w8a8-static, int8."
        )


def config(
    quant: Quantized, mapping: Mapping, dtype: str, algorithm: str | None, group: int, left: Sequence[str]
) -> dict[str, Any]:
    """What ``config.json`` says.

    Args:
        quant: the codes. mapping: how it is cut.
        dtype: of floats, TensorRT-LLM's name of it.
        algorithm: of the linears; None: they are floats.
        group: of W4A16_AWQ.
        left: linears that are floats beside codes, by their names in the ranks.
    """
    model = quant.model
    c = model.decoder
    zeros = algorithm == packing.AWQ and any(s.kind == "asymmetric" for s in quant.schemes.values())
    quantization: dict[str, Any] = {"quant_algo": algorithm, "kv_cache_quant_algo": None}
    if algorithm == packing.AWQ:
        quantization |= {"group_size": group, "has_zero_point": zeros, "pre_quant_scale": True}
    if left:
        both = [name for each in left for name in (each, f"{each}.weight")]
        quantization["exclude_modules"] = [*_EXCLUDED, *_GATES, *both]
    said = {
        "architecture": ARCHITECTURES[c.family],
        "dtype": dtype,
        "logits_dtype": "float32",
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_size": c.head_dim,
        "intermediate_size": c.intermediate_size,
        "hidden_act": "swiglu" if c.moe or c.family == "phi3" else c.hidden_act,
        "norm_epsilon": c.rms_norm_eps,
        "max_position_embeddings": c.max_position_embeddings,
        "position_embedding_type": "rope_gpt_neox",
        "rotary_base": c.rope.theta,
        "rotary_scaling": None,
        "attn_bias": c.qkv_bias,
        "mlp_bias": c.mlp_bias,
        "qk_layernorm": c.qk_norm,
        "tie_word_embeddings": c.tie_word_embeddings,
        "use_parallel_embedding": mapping.tensor > 1,
        "embedding_sharding_dim": 0,
        "disable_weight_only_quant_plugin": algorithm == packing.PLAIN,
        "mapping": {
            "world_size": mapping.world,
            "tp_size": mapping.tensor,
            "pp_size": mapping.pipeline,
        },
        "quantization": quantization,
    }
    return said | _rope(c) | _windows(c) | _own(model)


def _rope(c: DecoderConfig) -> dict[str, Any]:
    p = dict(c.rope.parameters)
    if c.rope.kind == "longrope":
        return {
            "position_embedding_type": "long_rope",
            "original_max_position_embeddings": p["original_max_position_embeddings"],
            "longrope_scaling_short_factors": list(p["short_factor"]),
            "longrope_scaling_long_factors": list(p["long_factor"]),
        }
    if c.rope.kind == "default":
        return {}
    p.pop("max_position_embeddings", None)
    return {"rotary_scaling": {"type": c.rope.kind, "rope_type": c.rope.kind, **p}}


def _windows(c: DecoderConfig) -> dict[str, Any]:
    """Windows are the runtime's in TensorRT-LLM: this is what it takes where the user says nothing."""
    if c.sliding_window is None:
        return {}
    each = [c.window(layer) or c.max_position_embeddings for layer in range(c.num_layers)]
    return {"runtime_defaults": {"max_attention_window": each[:1] if len(set(each)) == 1 else each}}


def _own(model: Model) -> dict[str, Any]:
    """Fields of one family."""
    c = model.decoder
    found: dict[str, Any] = {}
    if c.moe:
        found["moe"] = {
            "num_experts": c.moe.experts,
            "top_k": c.moe.top_k,
            "normalization_mode": int(c.moe.renormalize),  # RENORMALIZE, or NONE
        }
    if c.family.startswith("qwen"):
        found |= {"qwen_type": c.family, "seq_length": c.max_position_embeddings}
        if c.moe:
            found |= {
                "moe_intermediate_size": c.moe.intermediate_size,
                "moe_shared_expert_intermediate_size": c.moe.shared_size,
            }
    if c.family == "phi3":
        found["rotary_pct"] = c.rope.dim / c.head_dim
    if c.family in IN_BFLOAT16:
        found["query_pre_attn_scalar"] = round(c.attention_scale**-2)
        found["final_logit_softcapping"] = c.logit_softcap
    if c.family == "gemma2":
        found["attn_logit_softcapping"] = c.attention_softcap
    if c.family == "gemma3_text":
        every = _every(c)
        # Releases differ in the name.
        found |= {"sliding_window_pattern": every, "_sliding_window_pattern": every}
        found["sliding_window"] = c.sliding_window
        found["rope_local_base_freq"] = c.local_rope.theta if c.local_rope else c.rope.theta
    return found


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
