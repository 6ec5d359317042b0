"""The same weights in llama.cpp (as F32) and in transformers give the same logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tapeout.errors import ModelError, SchemeError
from tapeout.exporters import gguf
from tapeout.models import load
from tapeout.models.graph import decoder
from tapeout.models.torch_ops import TorchOps
from tapeout.quantize import QuantTensor, quantize
from tapeout.targets.llama_cpp import open_session

# Both sum in float32, in another order: a dot product of n terms parts by about sqrt(n) * 2^-24 of its size, 6e-7 here,
# and about ten of them follow one another in a layer. Two layers stay below 1e-5 of the logits' deviation.
BOUND = 1e-4


def reference(model, ids):
    import torch
    import transformers

    network = transformers.AutoModelForCausalLM.from_pretrained(
        model.directory, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return network(torch.tensor([ids])).logits[0].numpy()


def dequantized(quant, ids):
    import torch

    with torch.inference_mode():
        ops = TorchOps(lambda name: torch.from_numpy(quant.float32(name)))
        return decoder(ops, quant.model.config, torch.tensor(ids)).numpy()


def apart(got, expected):
    return float(np.abs(got - expected).max() / expected.std())


LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    "fields",
    [
        {"num_key_value_heads": 8},
        {"num_key_value_heads": 4},
        {"num_key_value_heads": 1},
        {"attention_bias": True, "mlp_bias": True},
        {"rope_parameters": LLAMA3},
        {"rope_theta": 5e5, "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}},
        {"head_dim": 16, "attention_bias": True},
        {"tie_word_embeddings": True},
        {"rms_norm_eps": 1e-2},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_llama_is_what_transformers_computes(make_model, llama_cpp_logits, tmp_path: Path, fields) -> None:
    model = load(make_model("llama", dtype="F32", **fields))
    artifact = gguf.write(quantize(model, "none", out=tmp_path / "store"), tmp_path, as_float32=True)
    ids = np.random.default_rng(0).integers(0, 256, 100).tolist()
    assert apart(llama_cpp_logits(tmp_path / artifact.files[0], ids), reference(model, ids)) < BOUND


def gelu_bound(layers: int) -> float:
    """llama.cpp has GELU in a table of float16: input and output are off by 2^-11 in each layer; four deviations of that."""
    return 4 * 2**-11 * (2 * layers) ** 0.5


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 5.0, 9.0]}
# llama.cpp's contexts are whole multiples of 256, and by them it chooses LongRoPE's factors.
LONG = {"original_max_position_embeddings": 256, "max_position_embeddings": 1024}
GEMMA = {"query_pre_attn_scalar": 16}
LATENT = {"rms_norm_eps": 1e-6, "n_group": 1, "topk_group": 1, "topk_method": "greedy"}
OTHERS = [
    ("llama", {"rope_scaling": YARN}),
    ("llama", {"rope_scaling": YARN | {"attention_factor": 1.5}}),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
    (
        "llama",
        {"rope_scaling": {"rope_type": "longrope", **FACTORS}, **LONG},
    ),
    ("mixtral", {}),
    ("mixtral", {"num_key_value_heads": 1, "num_experts_per_tok": 1, "num_local_experts": 8}),
    ("gemma", {}),
    ("gemma2", GEMMA),
    ("gemma2", GEMMA | {"num_key_value_heads": 1, "layer_types": ["full_attention", "sliding_attention"]}),
    ("gemma3_text", GEMMA),
    (
        "gemma3_text",
        GEMMA | {"num_hidden_layers": 5, "sliding_window_pattern": 3, "final_logit_softcapping": 2.0},
    ),
    (
        "gemma3_text",
        GEMMA | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_local_base_freq": 100.0},
    ),
    ("phi3", {}),
    ("phi3", {"num_key_value_heads": 2, "partial_rotary_factor": 0.5}),
    ("phi3", {"rope_scaling": {"type": "longrope", **FACTORS}, **LONG}),
    ("qwen2", {}),
    ("qwen2", {"rope_scaling": YARN, "num_key_value_heads": 1}),
    ("qwen3", {}),
    ("qwen2_moe", {}),
    ("qwen3_moe", {}),
    ("deepseek_v2", LATENT),
    (
        "deepseek_v2",
        LATENT | {"q_lora_rank": None, "rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}},
    ),
    ("deepseek_v3", {"rms_norm_eps": 1e-6, "num_hidden_layers": 3}),
    ("deepseek_v3", {"rms_norm_eps": 1e-6, "rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
]


@pytest.mark.parametrize(
    ("family", "fields"), OTHERS, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_other_families_are_what_transformers_computes(
    make_model, llama_cpp_logits, tmp_path: Path, family: str, fields
) -> None:
    model = load(make_model(family, dtype="F32", **fields))
    quant = quantize(model, "int8-g32", out=tmp_path / "store")
    artifact = gguf.write(quant, tmp_path, as_float32=True)
    ids = np.random.default_rng(0).integers(0, 256, 100).tolist()  # past the windows of 24
    bound = gelu_bound(model.config.num_layers) if family.startswith("gemma") else BOUND
    got = llama_cpp_logits(tmp_path / artifact.files[0], ids, swa_full=True)
    assert apart(got, dequantized(quant, ids)) < bound
    shipped = gguf.write(quant, tmp_path / "shipped")
    read = dict(gguf.read_codes(shipped, quant))
    assert read.keys() == set(quant)
    for name, found in read.items():
        expected = quant[name]
        if isinstance(found, QuantTensor):
            assert np.array_equal(found.packed, expected.packed), name
            assert np.array_equal(found.scale, expected.scale), name
        else:
            assert np.array_equal(found, quant.float32(name)), name
    # Inputs of matmuls in 8 bits: a few percent of the deviation, but for tokens that a router's near-tie sends elsewhere.
    session = open_session(str(tmp_path / "shipped" / shipped.files[0]))
    off = np.abs(session.prefill(ids) - dequantized(quant, ids))
    session.close()
    assert np.median(off) < 0.1


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_longrope_on_either_side_of_the_trained_context(
    make_model, llama_cpp_logits, tmp_path: Path, family: str
) -> None:
    model = load(make_model(family, dtype="F32", rope_scaling={"type": "longrope", **FACTORS}, **LONG))
    artifact = gguf.write(quantize(model, "none", out=tmp_path / "store"), tmp_path, as_float32=True)
    assert artifact.context == 256
    assert any(
        "clamped from 1024 to 256 tokens: llama.cpp chooses between LongRoPE" in note
        for note in artifact.notes
    )
    for tokens in (100, 300):
        ids = np.random.default_rng(0).integers(0, 256, tokens).tolist()
        got = llama_cpp_logits(tmp_path / artifact.files[0], ids)
        assert apart(got, reference(model, ids)) < BOUND


REFUSED = [
    ("llama", {"hidden_act": "gelu"}, "hidden_act = gelu is not expressible in GGUF arch 'llama'"),
    (
        "llama",
        {"rope_scaling": YARN | {"beta_fast": 8, "truncate": False}},
        "beta_fast = 8, truncate = False is not",
    ),
    (
        "mixtral",
        {"sliding_window": 24},
        "sliding_window = 24 of a mixtral model.*fits: sliding_window='clamp'",
    ),
    ("gemma", {"tie_word_embeddings": False}, "tie_word_embeddings = False"),
    ("gemma2", {}, r"the scale of attention's scores = 1 / sqrt\(24\)"),
    ("gemma2", GEMMA | {"attn_logit_softcapping": None}, "attention_softcap = None"),
    (
        "qwen3",
        {"attention_bias": True},
        "qkv_bias = True, out_bias = True is not expressible in GGUF arch 'qwen3'",
    ),
    ("qwen2_moe", {"norm_topk_prob": True}, "renormalize = True"),
    ("qwen3_moe", {"norm_topk_prob": False}, "renormalize = False"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, r"layers with experts = \[1\]"),
    ("deepseek_v2", {"rms_norm_eps": 1e-6}, "topk_method = group_limited_greedy"),
    ("deepseek_v3", {}, "rms_norm_eps = 1e-05"),
    ("deepseek_v3", {"rms_norm_eps": 1e-6, "rope_interleave": False}, "rope_interleave = False"),
    ("deepseek_v3", {"rms_norm_eps": 1e-6, "rope_scaling": YARN}, "the scale of attention's scores"),
]


@pytest.mark.parametrize(("family", "fields", "message"), REFUSED)
def test_what_an_arch_does_not_compute_is_named(
    make_model, tmp_path: Path, family: str, fields, message
) -> None:
    quant = quantize(load(make_model(family, **fields)), "int8", out=tmp_path / "store")
    with pytest.raises(ModelError, match=message):
        gguf.write(quant, tmp_path)


def test_experts_of_two_schemes_do_not_stack(make_model, tmp_path: Path) -> None:
    plan = {"*experts.2.w1": "int4-g32"}
    quant = quantize(load(make_model("mixtral")), "int8-g32", overrides=plan, out=tmp_path / "store")
    with pytest.raises(
        SchemeError, match=r"w1\.weight and the other experts.*Q4_0, Q8_0: give all of them one"
    ):
        gguf.write(quant, tmp_path)


@pytest.mark.parametrize("swa_full", [True, False])
@pytest.mark.parametrize("fields", [{}, {"head_dim": 16, "num_key_value_heads": 1}])
def test_a_sliding_window_is_carried_past_three_windows(
    make_model, llama_cpp_logits, tmp_path: Path, fields, swa_full: bool
) -> None:
    model = load(
        make_model("mistral", dtype="F32", sliding_window=48, max_position_embeddings=4096, **fields)
    )
    artifact = gguf.write(quantize(model, "none", out=tmp_path / "store"), tmp_path, as_float32=True)
    assert artifact.context == 4096
    # A window's cache has whole pages of 256 cells and room for a batch: past both, old cells are taken again.
    ids = np.random.default_rng(0).integers(0, 256, 1200).tolist()
    got = llama_cpp_logits(tmp_path / artifact.files[0], ids, swa_full=swa_full, batch=64)
    assert apart(got, reference(model, ids)) < BOUND
