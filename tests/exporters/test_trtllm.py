"""Rank checkpoints: NVIDIA's own bytes for the same codes, every cut put together again, and what damages or does not fit them."""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tapeout.errors import ModelError, PackageError, SchemeError, TapeoutError
from tapeout.exporters import Artifact, Refused, trtllm
from tapeout.exporters.trtllm import packing
from tapeout.exporters.trtllm.layout import Mapping, places
from tapeout.exporters.trtllm.reader import open_rank
from tapeout.generated import write_model
from tapeout.models import load
from tapeout.quantize import SCHEMES, Quantized, QuantTensor, quantize
from tapeout.quantize.tensor import pack
from tapeout.recipe import Recipe

torch = pytest.importorskip("torch")
load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file

THEIRS = Path(__file__).parent / "data"
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
# What make_trtllm.py makes, but for its vocabulary of 64, which a tokenizer of bytes does not fit.
TINY: dict[str, Any] = WIDE | {
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}  # fmt: skip
_VOCABULARY = ("lm_head", "transformer.vocab_embedding")
ALGORITHMS = {
    packing.PLAIN: "int8",
    packing.AWQ: "int4-g64",
    packing.PER_TOKEN: "w8a8",
    packing.STATIC: "w8a8-static",
}


def _tensor(scheme_name: str, out: int, into: int, seed: int = 7) -> QuantTensor:
    """Codes without symmetry, in every value that the scheme has."""
    scheme, rng = SCHEMES[scheme_name], np.random.default_rng(seed)
    codes = rng.integers(0, 2**scheme.bits, (out, into), np.uint8)
    group = scheme.group or into
    scale = rng.uniform(0.01, 0.02, (out, into // group)).astype(np.float16)
    zero = rng.integers(0, 16, scale.shape, np.uint8) if scheme.kind == "asymmetric" else None
    step = np.float32(0.0371) if scheme.activations == "int8-static" else None
    return QuantTensor(
        pack(codes, scheme.bits), scheme.bits, into, scale, group, scheme.codebook(), zero, input_scale=step
    )


def _bytes(blocks: list[QuantTensor], algorithm: str, row: bool = False) -> dict[str, Any]:
    made = packing.parts(blocks, algorithm, row=row)
    return {suffix: part.rows(slice(None)) for suffix, part in made.items()}


def test_nibbles_by_hand() -> None:
    """Rows 0 and 1 of codes 0 … 15 and 15 … 0 in pairs: code - 8 in two's complement, the even row low."""
    codes = np.stack([np.arange(64, dtype=np.uint8) // 4, 15 - np.arange(64, dtype=np.uint8) // 4])
    scale = np.array([[0.5], [2.0]], np.float16)
    zero = np.array([[3], [9]], np.uint8)
    scheme = SCHEMES["int4-g64-asym"]
    found = _bytes([QuantTensor(pack(codes, 4), 4, 64, scale, 64, scheme.codebook(), zero)], packing.AWQ)
    assert found["weight"].shape == (1, 64)
    assert found["weight"].tobytes()[::4].hex() == "78695a4b3c2d1e0ff0e1d2c3b4a59687"
    assert found["zero"].tolist() == [[2.5, -2.0]]  # (8 - 3) / 2 and (8 - 9) * 2
    assert found["weights_scaling_factor"].tolist() == scale.tolist()
    assert found["prequant_scaling_factor"].tolist() == [1.0] * 64


def test_bytes_by_hand() -> None:
    codes = np.arange(8, dtype=np.uint8).reshape(2, 4) * 30 + 1
    scale = np.array([[0.5], [2.0]], np.float16)
    tensor = QuantTensor(codes, 8, 4, scale, 4, SCHEMES["int8"].codebook())
    plain = _bytes([tensor], packing.PLAIN)
    assert plain["weight"].view(np.int8).tolist() == [[-127, -7], [-97, 23], [-67, 53], [-37, 83]]
    assert plain["per_channel_scale"].tolist() == [0.5, 2.0]
    token = _bytes([tensor], packing.PER_TOKEN, row=True)
    assert token["weight"].view(np.int8).tolist() == [[-127, -97, -67, -37], [-7, 23, 53, 83]]
    assert token["per_channel_scale"].dtype == np.float32
    assert token["per_channel_scale"].tolist() == [[0.5, 2.0]]
    assert token["smoother"].tolist() == [[1.0] * 4]
    assert "smoother" not in _bytes([tensor], packing.PER_TOKEN)


@given(
    algorithm=st.sampled_from([*ALGORITHMS, "zeros"]),
    outs=st.lists(st.sampled_from([2, 4, 34]), min_size=1, max_size=3),
    groups=st.integers(1, 3),
    seed=st.integers(0, 2**16),
)
def test_what_is_packed_is_unpacked(algorithm: str, outs: list[int], groups: int, seed: int) -> None:
    zeros = algorithm == "zeros"
    name = "int4-g64-asym" if zeros else ALGORITHMS[algorithm]
    algorithm = packing.AWQ if zeros else algorithm
    blocks = [_tensor(name, out, 64 * groups, seed + i) for i, out in enumerate(outs)]
    whole = packing.unpacked(_bytes(blocks, algorithm).__getitem__, algorithm, 64, zeros)
    at = 0
    for block in blocks:
        found = packing.cut(whole, slice(at, at + len(block.packed)), slice(None))
        at += len(block.packed)
        assert np.array_equal(found.packed, block.packed)
        assert np.array_equal(found.scale, block.scale)
        assert found.zero_point is None or np.array_equal(found.zero_point, block.zero_point)  # type: ignore[arg-type]
        assert (found.group, found.bits, found.input_scale) == (block.group, block.bits, block.input_scale)


@pytest.mark.parametrize(
    ("name", "algorithm"), [("trtllm-int4", packing.AWQ), ("trtllm-int8-sq", packing.STATIC)]
)
def test_codes_of_nvidias_exporter_mean_what_it_says_and_come_out_as_they_went_in(
    name: str, algorithm: str
) -> None:
    oracle = load_file(THEIRS / name / "oracle.safetensors")
    ranks = [load_file(THEIRS / name / f"rank{rank}.safetensors") for rank in range(2)]
    for rank, theirs in enumerate(ranks):
        at = "transformer.layers.0."
        for base in ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj"):
            tensors = {
                key.rpartition(".")[2]: tensor.numpy()
                for key, tensor in theirs.items()
                if key.rpartition(".")[0] == at + base
            }
            codes = packing.unpacked(tensors.__getitem__, algorithm, 64, zeros=False)
            ours = _bytes([codes], algorithm, row=True)
            assert ours.keys() == tensors.keys()
            for suffix, array in tensors.items():
                if (
                    suffix != "prequant_scaling_factor"
                ):  # theirs is AWQ's, ours is folded into the layer before
                    assert ours[suffix].tobytes() == array.tobytes(), (base, suffix)
            means = codes.dequantize()
            if (
                base == "attention.qkv" and algorithm == packing.STATIC
            ):  # AWQ's are scaled to one smoothing of all three
                for part, rows, share in (("q_proj", slice(0, 64), 64), ("k_proj", slice(64, 96), 32)):
                    wanted = oracle[part].numpy()[rank * share : (rank + 1) * share]
                    assert np.allclose(means[rows], wanted, rtol=2e-6, atol=1e-9)
            if base == "attention.dense":
                wanted = oracle["o_proj"].numpy()[:, 64 * rank : 64 * rank + 64]
                assert np.allclose(means, wanted, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize(("name", "scheme"), [("trtllm-int4", "int4-g64"), ("trtllm-int8-sq", "w8a8-static")])
def test_names_types_and_shapes_are_those_of_nvidias_exporter(name: str, scheme: str, tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "model", config=TINY, dtype="F16"))
    calibration = Recipe.of({"scheme": scheme, "calibration": {"sequences": 4, "length": 32}}).calibration
    static = scheme == "w8a8-static"
    quant = quantize(model, scheme, calibration=calibration if static else None, out=tmp_path / "codes")
    trtllm.write(quant, tmp_path / "out", tensor_parallel=2)
    for rank in range(2):
        ours, theirs = (
            {
                key: (tuple(each.shape[key.startswith(_VOCABULARY) :]), each.dtype)
                for key, each in load_file(place / f"rank{rank}.safetensors").items()
            }
            for place in (tmp_path / "out", THEIRS / name)
        )
        if not static:  # the builder brings them to the model's type, in which ours are exact
            scales = [key for key in theirs if key.endswith("weights_scaling_factor")]
            theirs |= {key: (theirs[key][0], torch.float16) for key in scales}
        assert ours == theirs
    said, wrote = (
        json.loads((place / "config.json").read_text()) for place in (THEIRS / name, tmp_path / "out")
    )
    for key in (
        "architecture",
        "dtype",
        "mapping",
        "head_size",
        "num_key_value_heads",
        "use_parallel_embedding",
        "hidden_act",
    ):
        assert wrote[key] == said[key]
    wanted = {key: value for key, value in said["quantization"].items() if key != "exclude_modules"}
    assert wrote["quantization"] == wanted


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Quantized, Artifact]:
    work = tmp_path_factory.mktemp("trtllm")
    model = load(
        write_model(
            work / "model", config=WIDE | {"num_key_value_heads": 1, "attention_bias": True}, dtype="F32"
        )
    )
    quant = quantize(model, "none", out=work / "codes")
    return quant, trtllm.write(quant, work / "out", tensor_parallel=2, pipeline_parallel=2)


def _codes(artifact: Artifact, quant: Quantized) -> dict[str, Any]:
    return dict(trtllm.read_codes(artifact, quant))


@pytest.mark.parametrize("mapping", [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2)])
def test_every_cut_is_put_together_again(mapping: tuple[int, int], tmp_path: Path) -> None:
    fields = {"hidden_size": 512, "intermediate_size": 512, "num_key_value_heads": 2}
    model = load(write_model(tmp_path / "model", config=fields, dtype="F16"))
    quant = quantize(model, "int8", out=tmp_path / "codes")
    artifact = trtllm.write(quant, tmp_path / "out", tensor_parallel=mapping[0], pipeline_parallel=mapping[1])
    found = _codes(artifact, quant)
    assert list(found) == list(quant)
    for name, tensor in found.items():
        expected = quant[name]
        if isinstance(tensor, QuantTensor):
            assert isinstance(expected, QuantTensor)
            assert np.array_equal(tensor.packed, expected.packed)
            assert np.array_equal(tensor.scale, expected.scale)
        else:
            assert np.array_equal(tensor, quant.float32(name).astype(np.float16).astype(np.float32))


def test_threads_do_not_change_the_bytes(exported: tuple[Quantized, Artifact], tmp_path: Path) -> None:
    quant, artifact = exported
    other = trtllm.write(quant, tmp_path / "out", tensor_parallel=2, pipeline_parallel=2, threads=1)
    assert other.files == artifact.files
    for name in artifact.files:
        assert (tmp_path / "out" / name).read_bytes() == (artifact.directory / name).read_bytes()


def test_each_rank_has_its_share_and_no_more(exported: tuple[Quantized, Artifact]) -> None:
    quant, artifact = exported
    mapping = Mapping(2, 2)
    with ExitStack() as stack:
        for rank in range(4):
            opened = open_rank(artifact.directory, rank, 4, stack)
            named = {place.name for place in places(quant.model, mapping, rank)}
            found = set(opened.keys())
            assert {n.removesuffix(".weight") for n in found} == {n.removesuffix(".weight") for n in named}
            # The only key head is in both ranks, the biases of rows too.
            assert opened.get_slice("transformer.layers.0.attention.qkv.weight").get_shape() == [
                64 + 2 * 16,
                128,
            ]
            assert opened.get_slice("transformer.layers.0.attention.dense.bias").get_shape() == [128]
            assert ("transformer.vocab_embedding.weight" in found) == (rank < 2)
            assert ("lm_head.weight" in found) == (rank > 1)


@pytest.mark.parametrize(
    ("rank", "name"),
    [
        (1, "transformer.layers.0.input_layernorm.weight"),  # two ranks have it
        (3, "transformer.layers.0.attention.dense.bias"),
        (1, "transformer.layers.0.attention.qkv.weight"),
        (0, "transformer.vocab_embedding.weight"),
    ],
)
def test_an_altered_rank_is_found(
    exported: tuple[Quantized, Artifact], rank: int, name: str, tmp_path: Path
) -> None:
    quant, artifact = exported
    damaged = replace(artifact, directory=tmp_path / "out")
    shutil.copytree(artifact.directory, damaged.directory)
    path = damaged.directory / f"rank{rank}.safetensors"
    tensors = load_file(path)
    tensors[name].view(-1)[-1] += 1
    save_file(tensors, path)
    found = _codes(damaged, quant)
    wrong = [
        each for each, values in found.items()
        if each not in quant or not np.array_equal(values, quant.float32(each))
    ]  # fmt: skip
    assert wrong


def test_a_missing_or_truncated_rank_is_named(exported: tuple[Quantized, Artifact], tmp_path: Path) -> None:
    quant, artifact = exported
    damaged = replace(artifact, directory=tmp_path / "out")
    shutil.copytree(artifact.directory, damaged.directory)
    path = damaged.directory / "rank3.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(PackageError, match=r"rank3.safetensors cannot be read"):
        _codes(damaged, quant)
    path.unlink()
    with pytest.raises(PackageError, match=r"rank3.safetensors is missing: config.json says 4 ranks"):
        _codes(damaged, quant)
    (damaged.directory / "config.json").write_text("{}")
    with pytest.raises(PackageError, match="is none of a rank checkpoint"):
        _codes(damaged, quant)


def test_every_refusal_names_what_fits() -> None:
    for name, scheme in SCHEMES.items():
        answer = trtllm.carries(scheme)
        if isinstance(answer, Refused):
            assert not isinstance(trtllm.carries(SCHEMES[answer.nearest]), Refused), name
    refused = {name for name, scheme in SCHEMES.items() if isinstance(trtllm.carries(scheme), Refused)}
    assert refused >= {"nf4", "nf4-dq", "mxfp4", "fp8", "q4_k", "q6_k", "int8-g32", "int4-g32"}
    assert trtllm.carries(SCHEMES["int4-g32-asym"]).nearest == "int4-g64-asym"  # type: ignore[union-attr]


CASES: list[tuple[str, dict[str, Any], str, dict[str, int], type[TapeoutError], str]] = [
    ("llama", {}, "int8", {"tensor_parallel": 3}, TapeoutError, r"--tensor-parallel 3 is no size.*fits model: 1, 2, 4, 8"),
    ("llama", {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 192}, "none", {"tensor_parallel": 4},
     TapeoutError, r"--tensor-parallel 4 does not divide the 6 attention heads or the 6 key heads .*fits: 1, 2"),
    ("llama", {"num_attention_heads": 12, "num_key_value_heads": 3, "hidden_size": 192}, "none", {"tensor_parallel": 2},
     TapeoutError, r"the 3 key heads \(nor is it a multiple of them\) of model; fits: 1"),
    ("llama", {"vocab_size": 275}, "none", {"tensor_parallel": 2}, TapeoutError, r"the 275 rows of the vocabulary of model; fits: 1"),
    ("llama", {}, "int8", {"tensor_parallel": 4}, TapeoutError, r"multiples of 64; fits: --tensor-parallel 1, 2 or w8a8 or none"),
    ("llama", {}, "int4-g128", {"tensor_parallel": 2}, TapeoutError, r"multiples of 128; fits: --tensor-parallel 1 or groups of 64"),
    ("llama", {}, "none", {"pipeline_parallel": 3}, TapeoutError, r"--pipeline-parallel 3 does not divide the 2 layers of model; fits: 1, 2"),
    ("phi3", {"num_key_value_heads": 8}, "none", {"pipeline_parallel": 2}, TapeoutError, r"Phi-3 has no stages; what fits: 1"),
    ("deepseek_v3", {}, "none", {}, ModelError, r"family deepseek_v3, which is not written.*What fits: --format modelopt"),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}, "none", {},
     ModelError, r"RoPE scaling of the type yarn"),
    ("llama", {"hidden_act": "gelu"}, "none", {}, ModelError, r"GELU by erf"),
    ("mixtral", {}, "int8", {}, ModelError, r"has experts.*What fits: int4-g64, int4-g128, none"),
    ("gemma2", {}, "int4-g64", {}, ModelError, r"run in bfloat16, which does not hold.*What fits: of a checkpoint in bfloat16 int4-g64"),
    ("qwen2", {}, "w8a8", {}, ModelError, r"SmoothQuant attention.*What fits: w8a8-static, int8"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "fields", "scheme", "options", "error", "said"), CASES)
def test_what_does_not_fit_is_refused_with_what_does(
    family: str,
    fields: dict[str, Any],
    scheme: str,
    options: dict[str, int],
    error: type[TapeoutError],
    said: str,
    tmp_path: Path,
) -> None:
    model = load(write_model(tmp_path / "model", family, WIDE | fields, dtype="F32"))
    with pytest.raises(error, match=said) as raised:
        trtllm.write(quantize(model, scheme, out=tmp_path / "codes"), tmp_path / "out", **options)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_gemma_stays_in_bfloat16(family: str, tmp_path: Path) -> None:
    fields = WIDE | {"query_pre_attn_scalar": 16}
    model = load(write_model(tmp_path / "model", family, fields, dtype="BF16"))
    quant = quantize(model, "int4-g64", overrides={"model.embed_tokens": "none"}, out=tmp_path / "codes")
    artifact = trtllm.write(quant, tmp_path / "out", tensor_parallel=2)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    tensors = load_file(tmp_path / "out" / "rank1.safetensors")
    assert {
        str(t.dtype) for n, t in tensors.items() if not n.endswith((".weight", "weights_scaling_factor"))
    } == {"torch.bfloat16"}
    assert torch.equal(
        tensors["transformer.layers.0.mlp.fc.prequant_scaling_factor"], torch.ones(128, dtype=torch.bfloat16)
    )
    norm = model.checkpoint["model.layers.0.input_layernorm.weight"].float32()
    assert torch.equal(
        tensors["transformer.layers.0.input_layernorm.weight"], torch.from_numpy(norm + 1).bfloat16()
    )
    found = _codes(artifact, quant)
    assert list(found) == list(quant)
    assert all(
        np.array_equal(tensor, quant.float32(name))
        for name, tensor in found.items()
        if not isinstance(tensor, QuantTensor)
    )
    assert any("bfloat16, to which trtllm-build rounds them" in note for note in artifact.notes)
    for scheme in ("int8", "int4-g64-asym", "int4-g64"):  # the last with codes of its embeddings
        with pytest.raises(ModelError, match="run in bfloat16, which does not hold"):
            trtllm.write(quantize(model, scheme, out=tmp_path / scheme), tmp_path / "no")


def test_linears_of_two_schemes_are_refused_and_floats_beside_codes_excluded(tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "model", config=WIDE))
    mixed = quantize(model, "int4-g64", overrides={"*.down_proj": "int8"}, out=tmp_path / "mixed")
    with pytest.raises(SchemeError, match=r"one algorithm. What fits: one scheme for all linears"):
        trtllm.write(mixed, tmp_path / "out")
    half = quantize(
        model, "int4-g64", overrides={"model.layers.1.mlp.down_proj": "none"}, out=tmp_path / "half"
    )
    artifact = trtllm.write(half, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization"]["exclude_modules"]
    assert {
        "transformer.layers.1.mlp.proj",
        "transformer.layers.1.mlp.proj.weight",
        "*lm_head",
        "*router",
    } <= set(said)
    assert set(_codes(artifact, half)) == set(half)
    with pytest.raises(SchemeError, match=r"What fits: --pipeline-parallel 1"):
        trtllm.write(half, tmp_path / "two", pipeline_parallel=2)
    parts = quantize(
        model, "int4-g64", overrides={"model.layers.0.self_attn.q_proj": "none"}, out=tmp_path / "parts"
    )
    with pytest.raises(SchemeError, match="are one linear in TensorRT-LLM"):
        trtllm.write(parts, tmp_path / "three")
