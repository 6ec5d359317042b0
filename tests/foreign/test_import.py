"""What the formats' own libraries wrote, against what they say that it means."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapeout.errors import ModelError, SchemeError
from tapeout.models import Model, load
from tapeout.quantize import SCHEMES, foreign

DATA = Path(__file__).parent / "data"
Call = Callable[..., Any]
Tensors = dict[str, tuple[str, list[int], bytes]]

# By fixture: the scheme of its matrices.
EXACT = {
    "awq-gemm-g32": "int4-g32-asym",
    "awq-gemm-g64": "int4-g64-asym",
    "bnb-nf4": "nf4",
    "bnb-nf4-dq": "nf4-dq",
    "bnb-nf4-dq-stored-bf16": "nf4-dq",
    "bnb-nf4-f32": "nf4-f32",
    "ct-float-channel": "fp8",
    "ct-float-tensor": "fp8-static",
    "ct-int-tensor": "w8a8",
    "ct-int-w8a8": "w8a8",
    "ct-int-w8a8-asym": "int8-g64-asym",
    "ct-int-w8a8-static": "w8a8-static",
    "ct-mxfp4": "mxfp4",
    "ct-pack-g32": "int4-g32",
    "ct-pack-g32-asym": "int4-g32-asym",
    "ct-pack-g64-f32": "int4-g64-f32",
    "ct-pack-int3-g32": "int3-g32",
    "ct-pack-int8": "int8",
    "gptq-static-groups": "int4-g32",
    "gptq-v1-g32": "int4-g32",
    "gptq-v1-g32-asym": "int4-g32-asym",
    "gptq-v1-int3-g64": "int3-g64",
    "gptq-v1-int8": "int8",
    "gptq-v2-g64-asym": "int4-g64-asym",
    "gptq-v2-int2-g32-asym": "int2-g32-asym",
    "modelopt-fp8": "fp8-static",
    "modelopt-fp8-channel": "fp8-f32",
    "modelopt-int8": "int8-f32",
    "modelopt-nvfp4": "nvfp4",
}
# One sentence a checkpoint, and what it has to name.
REFUSED = {
    "bnb-fp4": "codebook 'fp4'; nf4 is read",
    "gptq-desc-act": r"g_idx puts column 1 into group \d instead of 0.*static_groups",
    "modelopt-int4-awq": "o_proj.*pre_quant_scale",
    "modelopt-int8-sq": "q_proj.*pre_quant_scale",
}


@pytest.mark.parametrize(("name", "scheme"), EXACT.items())
def test_codes_mean_what_the_library_says_bit_for_bit(
    name: str, scheme: str, oracle: Call, weight: Call
) -> None:
    found = foreign.read(load(DATA / name))
    quantized = [n for n, s in found.schemes.items() if s.kind != "none"]
    assert quantized == [n for n in found.model.specs if "_proj" in n]
    assert found.scheme.name == scheme
    for tensor, source in oracle(DATA / name).items():
        ours, theirs = weight(found, tensor), source.bits()
        # GPTQ's and AWQ's libraries multiply in float16: one rounding of the same product.
        np.testing.assert_array_equal(ours.astype(theirs.dtype), theirs, strict=True)


@pytest.mark.parametrize("name", [*EXACT, "ct-nvfp4"])
def test_the_weights_are_near_the_original(
    name: str, originals: Callable[[str], Model], oracle: Call, weight: Call
) -> None:
    """The rows and columns stand where they did: a transposed or shuffled matrix would be as far as two random ones."""
    found = foreign.read(load(DATA / name))
    kind = (
        "f16"
        if name.startswith(("gptq", "awq", "ct-pack-int3"))
        else "f32"
        if "-g64-f32" in name or name == "bnb-nf4-f32"
        else "bf16"
    )
    if name == "gptq-v1-g32":  # two layers, so another draw
        return
    for tensor in oracle(DATA / name):
        original = originals(kind).checkpoint[tensor].float32()
        error = np.linalg.norm(weight(found, tensor) - original) / np.linalg.norm(original)
        # compressed-tensors rounds an MXFP4 scale down, which clips.
        assert error < (0.6 if "int2" in name else 0.35 if "int3" in name or "mxfp4" in name else 0.2), tensor


def test_nvfp4_of_compressed_tensors_is_apart_by_the_last_place(oracle: Call, weight: Call) -> None:
    """It divides by the global scale; a product with 1 / g has two roundings more: 2 · 2^-24 relative."""
    found = foreign.read(load(DATA / "ct-nvfp4"))
    assert found.scheme is SCHEMES["nvfp4"]
    assert any("weight_global_scale" in note for note in found.notes)
    for tensor, source in oracle(DATA / "ct-nvfp4").items():
        np.testing.assert_allclose(weight(found, tensor), source.float32(), rtol=2.0**-22, atol=0)


@pytest.mark.parametrize(("name", "said"), REFUSED.items())
def test_what_cannot_be_carried_is_refused_by_name(name: str, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        foreign.read(load(DATA / name))


def test_modelopts_int4_is_what_it_was_before_packing(oracle: Call, weight: Call) -> None:
    """The library packs INT4 and never unpacks it. It simulates by x · (7 / amax) and packs by x / (amax / 7): at a tie, a step."""
    found = foreign.read(load(DATA / "modelopt-int4"))
    assert found.scheme.name == "int4-g32-f32"
    for tensor, source in oracle(DATA / "modelopt-int4").items():
        steps = np.abs(weight(found, tensor) - source.float32()) / np.repeat(
            found.parts(tensor)["scale"], 32, axis=1
        )
        assert np.count_nonzero(steps > 1e-5) <= steps.size // 1000
        assert steps.max() < 1.001


def test_inputs_that_are_quantized_too() -> None:
    static = foreign.read(load(DATA / "ct-int-w8a8-static"))
    name = "model.layers.0.self_attn.q_proj.weight"
    # Set by the script; the checkpoint's type is bfloat16.
    np.testing.assert_array_equal(static.parts(name)["input_scale"], np.array([0.037109375], np.float32))
    assert not static.notes
    for name, step in (("ct-float-tensor", 0.037109375), ("modelopt-fp8", 0.0087890625)):
        found = foreign.read(load(DATA / name))
        assert found.parts("model.layers.0.self_attn.q_proj.weight")["input_scale"] == np.float32(step)
    assert any("float8" in note for note in foreign.read(load(DATA / "ct-float-channel")).notes)


def test_the_store_holds_the_parts(tmp_path: Path) -> None:
    found = foreign.read(load(DATA / "gptq-v1-g32"))
    (tmp_path / "tensors").mkdir()
    seen: list[int] = []
    with ThreadPoolExecutor(2) as pool:
        entries = found.write(tmp_path, pool, lambda stage, done, total: seen.append(total - done))
        again = found.write(tmp_path, pool)
    assert {entry.scheme for entry in entries.tensors.values()} == {"int4-g32"}
    assert len(entries.tensors) == 14
    assert entries.tensors == again.tensors
    assert seen[-1] == 0


def test_every_scheme_is_found_again_by_its_name() -> None:
    for name in EXACT:
        scheme = foreign.read(load(DATA / name)).scheme
        assert foreign.scheme_of(scheme.name) == scheme
    with pytest.raises(SchemeError, match="did you mean"):
        foreign.scheme_of("int4-g32-asim")


def test_quantization_is_no_part_of_the_config() -> None:
    model = load(DATA / "gptq-v1-g32")
    assert "quantization_config" not in model.raw_config
    assert model.quantization is not None
    assert model.quantization["quant_method"] == "gptq"


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        ("gptq-v1-g32", {"quant_method": "gptk"}, "method 'gptk'.*did you mean 'gptq'"),
        ("gptq-v1-g32", {"group_size": 64}, r"scales in .* is F16 \[2, 64\] where .* \[1, 64\] is expected"),
        ("gptq-v1-g32", {"bits": 8}, r"qweight in .* is I32 \[8, 64\] where I32 \[16, 64\]"),
        ("gptq-v1-g32", {"bits": 5}, "5 bits; those read are 2, 3, 4, 8"),
        ("gptq-v1-g32", {"checkpoint_format": "marlin"}, "format 'marlin'"),
        ("gptq-v1-g32", {"pack_dtype": "int64"}, "packed into int64"),
        ("gptq-v1-g32", {"dynamic": {"+:.*down.*": {"bits": 8}}}, "down.*dynamic"),
        ("awq-gemm-g32", {"version": "gemv"}, "version 'gemv'"),
        ("awq-gemm-g32", {"bits": 8}, "8 bits; 4 are read"),
        ("awq-gemm-g32", {"group_size": 64}, r"scales .* where .* \[1, 64\]"),
        ("ct-pack-g32", {"format": "marlin-24"}, "format 'marlin-24'"),
        ("ct-pack-g32", {"quantization_status": "frozen"}, "'frozen'"),
        ("ct-pack-g32", {"config_groups": {}}, "no config group"),
        ("ct-pack-g32", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24-bitmask"),
        ("bnb-nf4", {"load_in_8bit": True}, "LLM.int8"),
        ("modelopt-fp8", {"quant_algo": "FP8_PB_WO"}, "quant_algo FP8_PB_WO"),
    ],
)
def test_a_statement_that_does_not_fit(
    checkpoint: Callable[..., Path], name: str, fields: dict[str, object], said: str
) -> None:
    with pytest.raises(ModelError, match=said):
        foreign.read(load(checkpoint(name, **fields)))


def test_no_method(checkpoint: Callable[..., Path]) -> None:
    with pytest.raises(ModelError, match="no quant_method"):
        load(checkpoint("gptq-v1-g32", quant_method=None))


def test_a_truncated_file(checkpoint: Callable[..., Path]) -> None:
    file = checkpoint("ct-pack-g32") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        load(file.parent)


@pytest.mark.parametrize(
    ("name", "lost", "said"),
    [
        ("gptq-v1-g32", "qzeros", "q_proj.qzeros is missing"),
        ("gptq-v1-g32", "qweight", r"missing: .*k_proj.weight; .* and 51 more"),
        ("awq-gemm-g32", "scales", "scales is missing"),
        ("ct-pack-g32-asym", "weight_zero_point", "asymmetric, and weight_zero_point is missing"),
        ("bnb-nf4", "weight.absmax", "absmax is missing"),
        ("modelopt-nvfp4", "weight_scale", "weight_scale is missing"),
    ],
)
def test_a_tensor_that_is_missing(
    checkpoint: Callable[..., Path], name: str, lost: str, said: str, rewrite: Call
) -> None:
    file = checkpoint(name) / "model.safetensors"

    def lose(tensors: Tensors) -> None:
        for key in [key for key in tensors if key.endswith(f"_proj.{lost}")]:
            del tensors[key]

    rewrite(file, lose)
    with pytest.raises(ModelError, match=said):
        foreign.read(load(file.parent))


def test_a_tensor_too_many(checkpoint: Callable[..., Path], rewrite: Call) -> None:
    file = checkpoint("gptq-v1-g32") / "model.safetensors"
    rewrite(file, lambda tensors: tensors.update(extra=("F16", [1], b"\0<")))
    with pytest.raises(ModelError, match="unexpected: extra"):
        foreign.read(load(file.parent))


def test_biases_of_zeros_are_left_out_others_are_not(checkpoint: Callable[..., Path], rewrite: Call) -> None:
    """AutoGPTQ gave every layer a bias."""
    file = checkpoint("gptq-v1-g32") / "model.safetensors"
    bias = "model.layers.0.self_attn.q_proj.bias"
    rewrite(file, lambda tensors: tensors.update({bias: ("F16", [64], bytes(128))}))
    assert bias not in foreign.read(load(file.parent)).schemes
    rewrite(file, lambda tensors: tensors.update({bias: ("F16", [64], b"\0<" * 64)}))
    with pytest.raises(ModelError, match=f"unexpected: {bias}"):
        foreign.read(load(file.parent))


@pytest.mark.parametrize(("value", "said"), [(b"\0\x7c", r"is inf"), (b"\0\x7e", r"is nan")])
def test_a_scale_that_is_not_finite(
    checkpoint: Callable[..., Path], value: bytes, said: str, rewrite: Call
) -> None:
    file = checkpoint("gptq-v1-g32") / "model.safetensors"

    def damage(tensors: Tensors) -> None:
        key = "model.layers.1.mlp.down_proj.scales"
        dtype, shape, data = tensors[key]
        tensors[key] = (dtype, shape, data[:6] + value + data[8:])

    rewrite(file, damage)
    with pytest.raises(ModelError, match=rf"layers.1.mlp.down_proj.weight .* its scale at \[3, 0\] {said}"):
        foreign.read(load(file.parent))


def test_a_statement_in_a_file_of_its_own(checkpoint: Callable[..., Path]) -> None:
    """As AutoGPTQ wrote it at first."""
    directory = checkpoint("gptq-v1-g32")
    config = json.loads((directory / "config.json").read_text())
    statement = config.pop("quantization_config")
    (directory / "config.json").write_text(json.dumps(config))
    own = {name: statement[name] for name in ("bits", "group_size", "desc_act", "sym")}
    (directory / "quantize_config.json").write_text(json.dumps(own))
    assert foreign.read(load(directory)).scheme is SCHEMES["int4-g32"]
