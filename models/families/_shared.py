"""What the families share: field names, and the names and shapes of tensors, which follow from the config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tapeout.errors import ModelError, nearest
from tapeout.models.decoder import ACTIVATIONS, ConfigReader, DecoderConfig, Mla, Moe, Role, Rope, TensorSpec
from tapeout.models.rope import mscale, scaling

# Fields that describe training, file handling or defaults of generate(), and never the function computed.
NOT_COMPUTED = (
    "architectures",
    "model_type",
    "attention_dropout",
    "initializer_range",
    "use_cache",
    "cache_implementation",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "_name_or_path",
    "auto_map",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
    "router_aux_loss_coef",
    "return_dict",
    "chunk_size_feed_forward",
    "id2label",
    "label2id",
    "problem_type",
)


def read_config(
    fields: ConfigReader,
    family: str,
    *,
    defaults: Mapping[str, Any] | None = None,
    act: str = "hidden_act",
    **own: Any,
) -> DecoderConfig:
    """Read the fields that every family's ``config.json`` has.

    Args:
        fields: of the config.
        family: ``model_type``.
        defaults: what transformers' config class fills in for a field that is absent, where that is not what is below.
        act: the field that names the activation.
        own: fields of DecoderConfig that are this family's; they win.

    Raises:
        ModelError: what does not fit together, or a value that is not known.
    """
    fields.ignore(*NOT_COMPUTED)
    given: dict[str, Any] = {
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "rope_theta": 10000.0,
        act: "silu",
    }
    given |= defaults or {}

    def take(name: str, default: Any = ...) -> Any:
        # A null is a choice of the file, and stands for what is computed from other fields.
        return fields.take(name, given.get(name, default) if name not in fields.raw else default)

    def count(name: str, default: Any = ...) -> int:
        return positive(name, take(name, default))

    hidden, heads = count("hidden_size"), count("num_attention_heads")
    kv_heads = own.get("num_kv_heads") or count("num_key_value_heads", heads)
    if heads % kv_heads:
        raise ModelError(
            f"num_attention_heads = {heads} is no multiple of num_key_value_heads = {kv_heads}; "
            f"fits: {', '.join(str(n) for n in range(1, heads + 1) if heads % n == 0)}."
        )
    head_dim = own.get("head_dim") or take("head_dim", None) or share_of_head(hidden, heads)
    head_dim, context = positive("head_dim", head_dim), count("max_position_embeddings")
    eos = fields.take("eos_token_id", None)
    rope = own.pop("rope", None) or read_rope(fields, head_dim, context, theta=given["rope_theta"])
    common: dict[str, Any] = {
        "vocab_size": count("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": count("intermediate_size"),
        "num_layers": count("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": float(take("rms_norm_eps", 1e-6)),
        "rope": rope,
        "attention_scale": head_dim**-0.5,
        "hidden_act": activation(take(act, "silu")),
        "tie_word_embeddings": bool(take("tie_word_embeddings", False)),
        "bos_token_id": fields.take("bos_token_id", None),
        "eos_token_id": tuple(eos) if isinstance(eos, list) else eos,
        "pad_token_id": fields.take("pad_token_id", None),
    }
    return DecoderConfig(family=family, **(common | own))


def positive(name: str, value: Any) -> int:
    """A field that counts something; ModelError if it does not."""
    if not isinstance(value, int) or value < 1:
        raise ModelError(f"{name} = {value!r} is not a positive integer.")
    return value


def share_of_head(hidden: int, heads: int) -> int:
    """Elements of a head where the file does not say."""
    if hidden % heads:
        raise ModelError(
            f"hidden_size = {hidden} is no multiple of num_attention_heads = {heads}, and no head_dim is given."
        )
    return hidden // heads


def activation(name: str) -> str:
    """The activation of a gated MLP; ModelError lists the known ones."""
    if name not in ACTIVATIONS:
        raise ModelError(f"the activation '{name}' is not handled{nearest(str(name), ACTIVATIONS)}.")
    return name


def read_rope(
    fields: ConfigReader, head_dim: int, context: int, *, theta: float = 10000.0, **own: Any
) -> Rope:
    """Read RoPE from ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling`` (4).

    Args:
        fields: of the config.
        head_dim: of queries and keys.
        context: ``max_position_embeddings``.
        theta: where the file does not say.
        own: fields of Rope.
    """
    new, old = dict(fields.take("rope_parameters", {})), dict(fields.take("rope_scaling", {}))
    outside = {name: fields.take(name, None) for name in ("rope_theta", "original_max_position_embeddings")}
    share = fields.take("partial_rotary_factor", None)
    return rope_of(old or new, outside, head_dim, context, theta=theta, share=share, **own)


def rope_of(
    parameters: Mapping[str, Any],
    outside: Mapping[str, Any],
    head_dim: int,
    context: int,
    *,
    theta: float,
    share: float | None = None,
    partial: bool = False,
    **own: Any,
) -> Rope:
    """RoPE of a dict of parameters, and of what stands beside it in ``config.json``.

    Args:
        parameters: ``rope_type`` and its fields.
        outside: rope_theta, for parameters that have none, and original_max_position_embeddings, which wins.
        head_dim: of queries and keys.
        context: ``max_position_embeddings``.
        theta: where neither says.
        share: ``partial_rotary_factor``, for parameters that have none.
        partial: whether the family can turn a part of each head only.
        own: fields of Rope.
    """
    p = {name: value for name, value in parameters.items() if value is not None}
    kind = str(p.pop("rope_type", p.pop("type", "default")))
    p.pop("type", None)
    base = p.pop("rope_theta", outside.get("rope_theta") or theta)
    share = float(p.pop("partial_rotary_factor", share or 1.0))
    if share != 1.0 and not partial:
        raise ModelError(f"partial_rotary_factor = {share} is not handled: this family turns whole heads.")
    dim = int(head_dim * share)
    if dim < 2 or dim % 2:
        raise ModelError(
            f"RoPE turns pairs: {dim} elements of a head of {head_dim} are not a whole number of them."
        )
    trained = outside.get("original_max_position_embeddings")
    if trained is not None and kind in ("llama3", "yarn", "longrope"):
        p["original_max_position_embeddings"] = trained
    return Rope(float(base), kind, scaling(kind, p, context=context, dim=dim), dim=dim, **own)


def window_layers(fields: ConfigReader, layers: int, sliding: list[bool]) -> tuple[bool, ...]:
    """Which layers have the sliding window: ``layer_types``, or what the family makes of its other fields.

    Raises:
        ModelError: a type of layer that is not known, or not one for each layer.
    """
    types = fields.take("layer_types", None)
    if types is None:
        return tuple(sliding)
    known = {"sliding_attention": True, "full_attention": False}
    for kind in types:
        if kind not in known:
            raise ModelError(
                f"the attention '{kind}' in layer_types is not handled{nearest(str(kind), known)}."
            )
    if len(types) != layers:
        raise ModelError(f"layer_types names {len(types)} layers of {layers}.")
    return tuple(known[kind] for kind in types)


def tensors(config: DecoderConfig) -> Mapping[str, TensorSpec]:
    """Every tensor of a checkpoint, by its name on the Hub, where an expert has tensors of its own."""
    c, hidden, mla = config, config.hidden_size, config.mla
    found = {"model.embed_tokens.weight": TensorSpec(Role.EMBEDDING, (c.vocab_size, hidden))}

    def norm(name: str, width: int = hidden) -> None:
        found[f"{name}.weight"] = TensorSpec(Role.NORM, (width,))

    def linear(name: str, out: int, into: int, bias: bool = False, role: Role = Role.LINEAR) -> None:
        found[f"{name}.weight"] = TensorSpec(role, (out, into))
        if bias:
            found[f"{name}.bias"] = TensorSpec(Role.BIAS, (out,))

    def mlp(at: str, width: int, bias: bool, parts: tuple[str, str, str] = Moe.parts) -> None:
        if c.fused:
            linear(f"{at}.gate_up_proj", 2 * width, hidden, bias)
        else:
            linear(f"{at}.{parts[0]}", width, hidden, bias)
            linear(f"{at}.{parts[1]}", width, hidden, bias)
        linear(f"{at}.{parts[2]}", hidden, width, bias)

    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    for layer in range(c.num_layers):
        at = f"model.layers.{layer}"
        norm(f"{at}.input_layernorm")
        if mla is not None:
            if mla.q_rank is None:
                linear(f"{at}.self_attn.q_proj", q, hidden)
            else:
                linear(f"{at}.self_attn.q_a_proj", mla.q_rank, hidden, c.qkv_bias)
                norm(f"{at}.self_attn.q_a_layernorm", mla.q_rank)
                linear(f"{at}.self_attn.q_b_proj", q, mla.q_rank)
            linear(f"{at}.self_attn.kv_a_proj_with_mqa", mla.kv_rank + mla.rope_dim, hidden, c.qkv_bias)
            norm(f"{at}.self_attn.kv_a_layernorm", mla.kv_rank)
            linear(f"{at}.self_attn.kv_b_proj", c.num_heads * (mla.nope_dim + mla.v_dim), mla.kv_rank)
        elif c.fused:
            linear(f"{at}.self_attn.qkv_proj", q + 2 * kv, hidden, c.qkv_bias)
        else:
            linear(f"{at}.self_attn.q_proj", q, hidden, c.qkv_bias)
            linear(f"{at}.self_attn.k_proj", kv, hidden, c.qkv_bias)
            linear(f"{at}.self_attn.v_proj", kv, hidden, c.qkv_bias)
        linear(f"{at}.self_attn.o_proj", hidden, c.num_heads * c.value_dim, c.out_bias)
        if c.qk_norm:
            norm(f"{at}.self_attn.q_norm", c.head_dim)
            norm(f"{at}.self_attn.k_norm", c.head_dim)
        norm(f"{at}.post_attention_layernorm")
        if c.sandwich_norms:
            norm(f"{at}.pre_feedforward_layernorm")
        moe = c.routed(layer)
        if moe is None:
            mlp(f"{at}.mlp", c.intermediate_size, c.mlp_bias)
        else:
            linear(f"{at}.{moe.router}", moe.experts, hidden, role=Role.ROUTER)
            if moe.correction_bias:
                found[f"{at}.{moe.router}.e_score_correction_bias"] = TensorSpec(Role.BIAS, (moe.experts,))
            for expert in range(moe.experts):
                mlp(f"{at}.{moe.expert.format(expert)}", moe.intermediate_size, False, moe.parts)
            if moe.shared_size:
                mlp(f"{at}.{moe.shared}", moe.shared_size, c.mlp_bias)
            if moe.shared_gate:
                linear(f"{at}.{moe.shared}_gate", 1, hidden, role=Role.ROUTER)
        if c.sandwich_norms:
            norm(f"{at}.post_feedforward_layernorm")
    norm("model.norm")
    if not c.tie_word_embeddings:
        found["lm_head.weight"] = TensorSpec(Role.HEAD, (c.vocab_size, hidden))
    return found


def optional(config: DecoderConfig, name: str) -> bool:
    """Old checkpoints carry the rotary table, tied ones sometimes their head once more, DeepSeek V3 what drafts tokens."""
    return (
        name.endswith(".rotary_emb.inv_freq")
        or name == "lm_head.weight"
        or (config.family == "deepseek_v3" and name.startswith(f"model.layers.{config.num_layers}."))
    )


def check_moe(moe: Moe, layers: int) -> Moe:
    """The same, if its numbers fit together; ModelError says which do not."""
    for name in ("experts", "top_k", "intermediate_size", "groups", "top_groups"):
        if getattr(moe, name) < 1:
            raise ModelError(f"{name} = {getattr(moe, name)} of the routed experts is not positive.")
    if moe.experts % moe.groups:
        raise ModelError(f"{moe.experts} experts do not divide into n_group = {moe.groups} groups.")
    among = moe.experts // moe.groups * min(moe.top_groups, moe.groups)
    if moe.top_groups > moe.groups or moe.top_k > among:
        raise ModelError(
            f"num_experts_per_tok = {moe.top_k} of {among} experts, in topk_group = {moe.top_groups} of n_group = "
            f"{moe.groups} groups, cannot be chosen."
        )
    if len(moe.layers) != layers:
        raise ModelError(f"{len(moe.layers)} layers are said to be routed or not, of {layers}.")
    return moe


def qwen_moe(fields: ConfigReader, layers: int, defaults: Mapping[str, int], **own: Any) -> Moe:
    """Routed experts as both generations of Qwen name them; ``own``: fields of Moe."""
    # transformers 5 saves num_experts of qwen3_moe by another name.
    defaults = {**defaults, "num_experts": int(fields.take("num_local_experts", defaults["num_experts"]))}
    step = int(fields.take("decoder_sparse_step", 1))
    dense = set(fields.take("mlp_only_layers", []))
    experts, top_k, width = (int(fields.take(name, default)) for name, default in defaults.items())
    moe = Moe(
        experts,
        top_k,
        width,
        layers=tuple(i not in dense and (i + 1) % step == 0 for i in range(layers)),
        renormalize=bool(fields.take("norm_topk_prob", False)),
        **own,
    )
    return check_moe(moe, layers)


def read_mla(fields: ConfigReader) -> Mla:
    """The widths of latent attention, which transformers fills in alike for DeepSeek V2 and V3."""
    rank = fields.take("q_lora_rank", None if "q_lora_rank" in fields.raw else 1536)
    return Mla(
        q_rank=None if rank is None else int(rank),
        kv_rank=int(fields.take("kv_lora_rank", 512)),
        nope_dim=int(fields.take("qk_nope_head_dim", 128)),
        rope_dim=int(fields.take("qk_rope_head_dim", 64)),
        v_dim=int(fields.take("v_head_dim", 128)),
    )


def read_deepseek(
    fields: ConfigReader, family: str, mla: Mla, moe: Moe, *, interleaved: bool, **own: Any
) -> DecoderConfig:
    """What DeepSeek V2 and V3 share; YaRN stretches the scale of the scores as well."""
    # Of training, of parallel execution, or a draft of further tokens; head_dim is rope_dim once more.
    fields.ignore(
        "aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp", "num_nextn_predict_layers", "num_mtp_layers"
    )
    fields.ignore("head_dim", "qk_head_dim")
    heads, bias = int(fields.take("num_attention_heads")), bool(fields.take("attention_bias", False))
    if (kv_heads := int(fields.take("num_key_value_heads", heads))) != heads:
        raise ModelError(
            f"num_key_value_heads = {kv_heads}: latent attention has a key for each of its {heads} heads."
        )
    if (every := int(fields.take("moe_layer_freq", 1))) != 1:
        raise ModelError(f"moe_layer_freq = {every} of a {family} model is not handled; known: 1.")
    context = int(fields.take("max_position_embeddings"))
    rope = read_rope(fields, mla.rope_dim, context, interleaved=interleaved)
    width = mla.nope_dim + mla.rope_dim
    stretch = mscale(
        float(rope.parameters.get("factor", 1.0)), float(rope.parameters.get("mscale_all_dim", 0))
    )
    return read_config(
        fields,
        family,
        num_kv_heads=heads,
        head_dim=width,
        rope=rope,
        attention_scale=width**-0.5 * stretch**2,
        qkv_bias=bias,
        out_bias=bias,
        moe=check_moe(moe, len(moe.layers)),
        mla=mla,
        **own,
    )


def choice(fields: ConfigReader, name: str, default: str, known: tuple[str, ...]) -> str:
    """A field that names a variant; ModelError lists those that are known."""
    value = str(fields.take(name, default))
    if value not in known:
        raise ModelError(f"{name} = '{value}' is not handled{nearest(value, known)}.")
    return value
