"""Phi-3 and Phi-4-mini: fused projections, LongRoPE, of which a part of each head may be left out."""

from __future__ import annotations

from tapeout.errors import ModelError
from tapeout.models.decoder import ConfigReader, DecoderConfig
from tapeout.models.families import Family, _shared


def _config(fields: ConfigReader) -> DecoderConfig:
    fields.ignore("resid_pdrop", "embd_pdrop")  # of training
    for name in ("full_attn_mod", "interpolate_factor"):  # Phi-4-mini says them; only 1 is ever computed
        if fields.take(name, 1) != 1:
            raise ModelError(f"{name} = {fields.raw[name]} of a phi3 model is not handled; known: 1.")
    new, old = dict(fields.take("rope_parameters", {})), dict(fields.take("rope_scaling", {}))
    given = old or new
    kind = given.get("rope_type") or given.get("type") or "default"
    # The first releases call it su, and some yarn.
    given["rope_type"] = {"su": "longrope", "yarn": "longrope"}.get(kind, kind)
    if given["rope_type"] not in ("default", "longrope"):
        raise ModelError(f"rope_type '{kind}' is not handled of a phi3 model; known: default, longrope.")
    outside = {
        "rope_theta": fields.take("rope_theta", None),
        "original_max_position_embeddings": fields.take("original_max_position_embeddings", 4096),
    }
    heads = _shared.positive("num_attention_heads", fields.take("num_attention_heads"))
    rope = _shared.rope_of(
        given,
        outside,
        _shared.share_of_head(int(fields.take("hidden_size")), heads),
        int(fields.take("max_position_embeddings")),
        theta=10000.0,
        share=fields.take("partial_rotary_factor", None),
        partial=True,
    )
    return _shared.read_config(
        fields,
        "phi3",
        defaults={"rms_norm_eps": 1e-5},
        rope=rope,
        fused=True,
        sliding_window=fields.take("sliding_window", None),
    )


FAMILY = Family(_config, _shared.tensors, _shared.optional)
