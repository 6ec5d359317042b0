"""Whole files: that they are sound ONNX, hold the codes of the store, and that damage shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapeout.errors import ModelError, OutputError, PackageError, SchemeError
from tapeout.exporters import Artifact, Exact, Refused, onnx
from tapeout.exporters.onnx.blocks import NBits, container_of
from tapeout.models import load
from tapeout.quantize import SCHEMES, Quantized, quantize

library = pytest.importorskip("onnx")

CARRIED = [name for name, scheme in SCHEMES.items() if not isinstance(onnx.carries(scheme), Refused)]
LARGE = {"hidden_size": 128, "intermediate_size": 256}


@pytest.fixture
def quantized(make_model: Callable[..., Path]) -> Callable[..., Quantized]:
    """``quantized("nf4", attention_bias=True)``."""

    def make(
        scheme: str, model_type: str = "llama", overrides: dict[str, str] | None = None, **fields: Any
    ) -> Quantized:
        wide = 2 if SCHEMES[scheme].scales == "super" else 1
        sizes = {name: wide * size for name, size in LARGE.items()}
        return quantize(load(make_model(model_type, **sizes | fields)), scheme, overrides=overrides)

    return make


def graph_of(artifact: Artifact) -> Any:
    return library.load(artifact.directory / "model.onnx", load_external_data=False).graph


@pytest.mark.parametrize("scheme", [name for name in CARRIED if name != "w8a8-static"])
def test_the_codes_come_back(quantized, tmp_path: Path, scheme: str, wrong: Callable[..., list[str]]) -> None:
    quant = quantized(scheme, attention_bias=True)
    artifact = onnx.write(quant, tmp_path / "out")
    assert wrong(artifact, quant) == []
    assert artifact.containers.keys() == quant.keys()
    carry = onnx.carries(SCHEMES[scheme])
    assert isinstance(carry, Exact)
    container = artifact.containers["model.layers.0.mlp.up_proj.weight"]
    assert container == ("BF16" if scheme == "none" else carry.container.split(",")[0])
    library.checker.check_model(tmp_path / "out" / "model.onnx", full_check=True)
    assert artifact.bytes_per_token < (tmp_path / "out" / "model.onnx.data").stat().st_size


@pytest.mark.parametrize("tied", [False, True])
def test_a_readable_graph(quantized, tmp_path: Path, tied: bool) -> None:
    """A node a primitive, but one for queries, keys and values: eight a layer, and what is around them."""
    quant = quantized("int4-g32", head_dim=16, tie_word_embeddings=tied)
    graph = graph_of(onnx.write(quant, tmp_path))
    count = Counter(node.op_type for node in graph.node)
    layers = {
        "MatMulNBits": 5 * 2 + 1, "GroupQueryAttention": 2, "SkipSimplifiedLayerNormalization": 2 * 2, "QuickGelu": 2, "Mul": 2,
    }  # fmt: skip
    around = {"GatherBlockQuantized": 1, "RMSNormalization": 1, "Slice": 1}
    lengths = {"ReduceSum": 1, "Cast": 2, "Sub": 1, "Shape": 1, "Squeeze": 1}
    assert count == layers | around | lengths
    assert {node.name for node in graph.node} >= {"layers.1.attention.context", "layers.1.mlp.out", "logits"}
    produced = [name for node in graph.node for name in node.output if name]
    assert "layers.0.attention.residual" in produced
    assert len(produced) == len(set(produced))
    # A tied head multiplies with the bytes that the embedding looks up.
    places = Counter(
        tuple(e.value for e in each.external_data) for each in graph.initializer if each.external_data
    )
    assert sum(n > 1 for n in places.values()) == tied


def attended(graph: Any) -> list[str]:
    """What the second layer's attention is given of queries, keys and values."""
    (attention,) = (node for node in graph.node if node.name == "layers.1.attention.context")
    return [name for name in attention.input[:3] if name]


@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g32-asym", "int8", "int3-g64"])
@pytest.mark.parametrize("biased", [False, True])
def test_queries_keys_and_values_are_rows_of_one_matrix(
    quantized, tmp_path: Path, wrong: Callable[..., list[str]], scheme: str, biased: bool
) -> None:
    quant = quantized(scheme, attention_bias=biased, head_dim=16)
    artifact = onnx.write(quant, tmp_path)
    graph = graph_of(artifact)
    assert attended(graph) == ["layers.1.attention.qkv"]
    assert wrong(artifact, quant) == []
    held = {
        each.name.rpartition(".")[2]: library.numpy_helper.to_array(each, str(tmp_path))
        for each in graph.initializer
        if each.name.startswith("layers.1.attention.qkv.")
    }
    names = [f"model.layers.1.self_attn.{part}_proj" for part in "qkv"]
    parts = [
        NBits.pack(container_of(quant.schemes[f"{name}.weight"], 128), quant[f"{name}.weight"])
        for name in names
    ]
    expected = {part: np.concatenate([each[part] for each in parts]) for part in parts[0]}
    if biased:
        expected["bias"] = np.concatenate([quant[f"{name}.bias"].float32() for name in names])
    assert held.keys() == expected.keys()
    for part, values in expected.items():
        assert np.array_equal(held[part].reshape(values.shape), values), part


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama", {"*.v_proj": "int8"}),  # another container
        ("llama", {"*.k_proj": "none"}),
        ("llama", {"*.self_attn.?_proj": "w8a8"}),  # not in blocks
        ("qwen3", None),  # norms come between
    ],
)
def test_what_is_not_held_alike_stays_apart(
    quantized, tmp_path: Path, wrong: Callable[..., list[str]], family: str, overrides: dict[str, str] | None
) -> None:
    quant = quantized("int4-g32", family, overrides, head_dim=16)
    artifact = onnx.write(quant, tmp_path)
    assert len(attended(graph_of(artifact))) == 3
    assert wrong(artifact, quant) == []


def test_schemes_of_one_container_are_one_matrix(
    quantized, tmp_path: Path, wrong: Callable[..., list[str]]
) -> None:
    """Codes of 3 bits lie in 4: the file tells no difference, and each comes back by its own scheme."""
    quant = quantized("int4-g64", "llama", {"*.q_proj": "int3-g64"}, head_dim=16)
    artifact = onnx.write(quant, tmp_path)
    assert attended(graph_of(artifact)) == ["layers.1.attention.qkv"]
    assert wrong(artifact, quant) == []


def test_the_same_bytes_whatever_the_threads(quantized, tmp_path: Path) -> None:
    quant = quantized("int4-g32-asym")
    files = [onnx.write(quant, tmp_path / f"{n}", threads=n) for n in (1, 3)]
    for name in files[0].files:
        one, other = ((file.directory / name).read_bytes() for file in files)
        assert one == other, name


def test_tensors_are_aligned_and_do_not_overlap(quantized, tmp_path: Path) -> None:
    graph = graph_of(onnx.write(quantized("int4-g32", vocab_size=40000), tmp_path))
    places = set()
    for each in graph.initializer:
        said = {entry.key: entry.value for entry in each.external_data}
        if said:
            offset, length = int(said["offset"]), int(said["length"])
            assert offset % (4096 if length >= 2**20 else 64) == 0
            places.add((offset, offset + length))
    ordered = sorted(places)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(ordered))
    assert ordered[-1][1] == (tmp_path / "model.onnx.data").stat().st_size


def test_rows_that_no_block_divides_are_float(
    quantized, tmp_path: Path, wrong: Callable[..., list[str]]
) -> None:
    quant = quantized(
        "int8", hidden_size=72, num_attention_heads=3, num_key_value_heads=1, intermediate_size=64
    )
    artifact = onnx.write(quant, tmp_path)
    assert wrong(artifact, quant) == []
    assert artifact.containers["model.layers.0.self_attn.q_proj.weight"] == "F32"
    assert artifact.containers["model.layers.0.mlp.down_proj.weight"] == "MatMulNBits 8-bit"
    note = (
        "model.layers.0.self_attn.q_proj.weight is float32: no block of int8 divides its rows of 72 weights"
    )
    assert note in artifact.notes


def test_damage_is_named(quantized, tmp_path: Path, wrong: Callable[..., list[str]]) -> None:
    quant = quantized("int4-g32")
    artifact = onnx.write(quant, tmp_path)
    data, model = tmp_path / "model.onnx.data", tmp_path / "model.onnx"
    whole, graph = data.read_bytes(), model.read_bytes()
    rng = np.random.default_rng(0)
    places = {
        e.name: int(next(x.value for x in e.external_data if x.key == "offset"))
        for e in graph_of(artifact).initializer
        if e.external_data
    }
    for name in (
        "model.layers.1.mlp.up_proj.weight.codes",
        "model.layers.1.mlp.up_proj.weight.scales",
        "model.norm.weight",
    ):
        at = places[name] + int(rng.integers(0, 64))
        data.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        assert wrong(artifact, quant) == [name.removesuffix(".codes").removesuffix(".scales")]
    size = quant["model.layers.1.self_attn.q_proj.weight"].packed.nbytes
    for part, at in (("q", size - 1), ("k", size)):  # rows of one initializer
        at += places["layers.1.attention.qkv.codes"]
        data.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        assert wrong(artifact, quant) == [f"model.layers.1.self_attn.{part}_proj.weight"]
    data.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PackageError, match=r"cannot be read from"):
        wrong(artifact, quant)
    data.unlink()
    with pytest.raises(PackageError, match=r"cannot be read from"):
        wrong(artifact, quant)
    data.write_bytes(whole)
    for damaged in (graph[: len(graph) // 2], b"", b"no model"):
        model.write_bytes(damaged)
        with pytest.raises(PackageError, match=r"model\.onnx"):
            wrong(artifact, quant)
    model.unlink()
    with pytest.raises(PackageError, match="cannot be read"):
        onnx.describe(model)


def test_a_graph_of_another_model_is_not_taken(
    quantized, tmp_path: Path, wrong: Callable[..., list[str]]
) -> None:
    artifact = onnx.write(quantized("int4-g32", name="a"), tmp_path)
    with pytest.raises(
        PackageError, match=r"up_proj\.weight\.codes is UINT8 \[256, 4, 16\] where UINT8 \[320, 4, 16\]"
    ):
        wrong(artifact, quantized("int4-g32", name="b", intermediate_size=320))
    with pytest.raises(PackageError, match="holds other values than the model's config gives"):
        wrong(artifact, quantized("int4-g32", name="c", rope_theta=5000.0))
    with pytest.raises(PackageError, match=r"model\.layers\.1\..* is unexpected"):
        wrong(artifact, quantized("int4-g32", name="d", num_hidden_layers=1))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", ["nf4", "nf4-dq", "fp8"])
def test_embeddings_of_levels_come_back(
    quantized, tmp_path: Path, scheme: str, tied: bool, wrong: Callable[..., list[str]]
) -> None:
    """And no byte of them is in the file twice."""
    quant = quantized(
        scheme,
        tie_word_embeddings=tied,
        overrides={"*embed_tokens": scheme, "lm_head": scheme} if not tied else {"*embed_tokens": scheme},
    )
    artifact = onnx.write(quant, tmp_path)
    assert wrong(artifact, quant) == []
    assert (
        artifact.containers["model.embed_tokens.weight"]
        == onnx.carries(SCHEMES[scheme]).container.split(",")[0]
    )
    library.checker.check_model(tmp_path / "model.onnx", full_check=True)
    places = {}
    for each in graph_of(artifact).initializer:
        said = {entry.key: int(entry.value) for entry in each.external_data if entry.key != "location"}
        if said:
            places[said["offset"]] = said["length"]
    assert (tmp_path / "model.onnx.data").stat().st_size < sum(places.values()) + 64 * len(places)


def test_what_is_not_expressible_is_named(quantized, tmp_path: Path) -> None:
    with pytest.raises(
        SchemeError,
        match=r"is mxfp4: onnxruntime has no kernel for these levels on CPUs\. What fits: int4-g32",
    ):
        onnx.write(quantized("mxfp4", name="c"), tmp_path)
    quant = quantized("int8", name="d")
    (quant.model.directory / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        onnx.write(quant, tmp_path)
    with pytest.raises(ModelError, match="layers = 3: e has 1 … 2"):
        onnx.write(quantized("int8", name="e"), tmp_path, layers=3)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        onnx.write(quantized("int8", name="f"), tmp_path / "file" / "out")


def test_description(quantized, tmp_path: Path) -> None:
    onnx.write(quantized("int4-g32"), tmp_path)
    found = onnx.describe(tmp_path / "model.onnx")
    assert found["format"] == "onnx"
    assert found["opsets"] == {"ai.onnx": 23, "com.microsoft": 1}
    assert found["inputs"][:2] == ["input_ids", "attention_mask"]
    assert found["outputs"][:3] == ["logits", "present.0.key", "present.0.value"]
    assert found["metadata"]["tapeout.scheme"] == "int4-g32"
    assert found["bytes"] > 2 * 128 * 272
