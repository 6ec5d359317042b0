"""The same weights in llama.cpp (as F32) and in transformers give the same logits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tapeout.exporters import gguf
from tapeout.models import load
from tapeout.quantize import quantize

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
