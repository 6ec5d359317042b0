"""The graphs that TensorRT and MIGraphX compile: on onnxruntime they are the reference, and each holds what its parser knows."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensors import tensor_of
from thinned import thinned

from tapeout.errors import ModelError, SchemeError
from tapeout.exporters import Refused, onnx
from tapeout.exporters.onnx import migraphx, tensorrt
from tapeout.exporters.onnx.blocks import Floats, Linear
from tapeout.models import load
from tapeout.quantize import SCHEMES, Quantized, QuantTensor, quantize
from tapeout.targets.onnxruntime_typed import open_session, open_traced
from tapeout.validate import reference

library = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

DIALECTS: dict[str, Any] = {"tensorrt": tensorrt, "migraphx": migraphx}
IDS = [(i * 37 + 11) % 256 for i in range(40)]
CLOSE = 1e-4  # of the logits' deviation: float32 sums in another order
# A rounding to float16 is off by up to 2^-11 of a value, by 2^-11 / sqrt(3) on average; three dozen of them stand behind one another in two
# layers, and the largest of ten thousand logits is off by four deviations.
HALF = 4 * 2.0**-11 / 3**0.5 * 36**0.5
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tied": ("llama", "int4-g32", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "biases": ("qwen2", "int8", {"head_dim": 12}),  # a head that no kernel is there for
    "window": ("gemma2", "int3-g64", {"sliding_window": 8}),
    "fused": ("phi3", "none", {}),
    "long": ("phi3", "int4-g32", {
        "max_position_embeddings": 128,
        "rope_scaling": {
            "rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0 + i for i in range(4)],
            "original_max_position_embeddings": 32,
        },
    }),
    "experts": ("mixtral", "int4-g32", {}),
    "latents": ("deepseek_v2", "int4-g32", {}),
    "eight-bits": ("llama", "fp8", {}),
    "four-bits": ("llama", "nvfp4", {}),
    "zero-points": ("llama", "int4-g32-asym", {"attention_bias": True}),
    "levels": ("qwen2", "nf4", {}),
    "blocks": ("gemma", "int8-g32", {}),
}  # fmt: skip


def written(
    make_model: Callable[..., Path], out: Path, dialect: Any, case: str
) -> tuple[Quantized, Any] | None:
    family, scheme, fields = CASES[case]
    if isinstance(DIALECTS[dialect].carries(SCHEMES[scheme]), Refused):
        return None
    quant = quantize(load(make_model(family, **fields)), scheme)
    return quant, onnx.write(quant, out, dialect=dialect)


@pytest.mark.parametrize(
    ("dialect", "case"),
    thinned(product(DIALECTS, CASES), alike=lambda cell: cell[1]),
    ids=[f"{dialect}-{case}" for dialect, case in product(DIALECTS, CASES)],
)
def test_it_is_the_reference(
    make_model: Callable[..., Path], tmp_path: Path, dialect: Any, case: str
) -> None:
    """In float32 over the very data that ships, and as it ships; in chunks, and token by token."""
    made = written(make_model, tmp_path / "out", dialect, case)
    if made is None:
        pytest.skip("refused, which another test looks at")
    quant, artifact = made
    for name, found in onnx.read_codes(artifact, quant, dialect=dialect):
        expected = quant[name]
        if isinstance(found, QuantTensor):
            assert isinstance(expected, QuantTensor)
            assert np.array_equal(found.packed, expected.packed), name
            assert np.array_equal(found.scale, expected.scale), name
            assert (found.zero_point is None) == (expected.zero_point is None)
        else:
            assert np.array_equal(found, quant.float32(name)), name
    model = artifact.directory / "model.onnx"
    library.checker.check_model(model, full_check=True)
    expected = reference.open_session(
        str(quant.model.directory), store=str(quant.directory), threads=1
    ).prefill(IDS)
    exact = tmp_path / "exact.onnx"
    exact.write_bytes(onnx.exact_graph(quant, artifact.context, dialect))
    directory = str(artifact.directory)
    session = open_session(
        directory, artifact.context, graph=str(exact), peaks=str(model), threads=1, chunk=17
    )
    logits = session.prefill(IDS)
    assert np.abs(logits - expected).max() / expected.std() < CLOSE
    peaks = session.peaks()
    assert any(name.startswith("layers.0.mlp") and name.endswith("inner") for name in peaks)
    assert 1e-3 < max(peaks.values()) < 1e3
    shipped = open_session(directory, artifact.context, threads=1)
    logits = np.concatenate([shipped.prefill(IDS[:30]), [shipped.decode(token) for token in IDS[30:]]])
    assert np.abs(logits - expected).max() / expected.std() < HALF
    assert np.abs(logits - expected).max() > 0
    shipped.reset()
    assert np.abs(shipped.append(IDS) - expected[-1:]).max() / expected.std() < HALF


# What onnxruntime-migraphx 1.27.1 gives to MIGraphX, of what is used here: a graph with more than ten other nodes stays on the CPU.
PROVIDER = {
    "Add", "And", "Cast", "Concat", "DequantizeLinear", "Div", "Equal", "Erf", "Expand", "Gather", "GatherElements", "Greater",
    "LessOrEqual", "MatMul", "Max", "Min", "Mul", "Neg", "QuantizeLinear", "ReduceMean", "ReduceSum", "Reshape", "ScatterElements",
    "Shape", "Sigmoid", "Slice", "Softmax", "Split", "Sqrt", "Sub", "Tanh", "TopK", "Transpose", "Unsqueeze", "Where",
}  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "deepseek_v3"])
def test_migraphx_knows_every_operator_and_no_shape_grows(
    make_model: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    quant = quantize(load(make_model(family)), "int4-g32")
    path = onnx.write(quant, tmp_path / "out", dialect="migraphx").directory / "model.onnx"
    model = library.load(path, load_external_data=False)
    assert {node.op_type for node in model.graph.node} <= PROVIDER
    assert [(each.domain, each.version) for each in model.opset_import] == [("", 21)]
    named = {
        dim.dim_param
        for each in model.graph.input
        for dim in each.type.tensor_type.shape.dim
        if dim.dim_param
    }
    assert named == {"batch", "tokens", "logits_tokens"}


def test_tensorrts_graph_has_types_and_caches_of_its_own(
    make_model: Callable[..., Path], tmp_path: Path
) -> None:
    quant = quantize(load(make_model("llama", head_dim=16)), "int4-g32")
    path = onnx.write(quant, tmp_path / "out", dialect="tensorrt").directory / "model.onnx"
    model = library.load(path, load_external_data=False)
    kinds = library.TensorProto
    assert {node.domain for node in model.graph.node} == {""}
    assert all(len(node.output) == 1 for node in model.graph.node if node.op_type == "Attention")
    types = {each.name: each.type.tensor_type.elem_type for each in (*model.graph.input, *model.graph.output)}
    assert types["logits"] == kinds.FLOAT
    assert {types[name] for name in types if "key" in name or "value" in name} == {kinds.FLOAT16}
    initial = {each.name: each for each in model.graph.initializer}
    codes = initial["model.layers.0.mlp.down_proj.weight.codes"]
    scales = initial["model.layers.0.mlp.down_proj.weight.scales"]
    out, into = quant.model.specs["model.layers.0.mlp.down_proj.weight"].shape
    assert (codes.data_type, list(codes.dims)) == (kinds.INT4, [into, out])
    assert (scales.data_type, list(scales.dims)) == (kinds.FLOAT16, [into // 32, out])
    inferred = library.shape_inference.infer_shapes(model, strict_mode=True)
    known = {each.name: each.type.tensor_type.elem_type for each in inferred.graph.value_info}
    assert known["layers.0.out"] == known["layers.0.attention.norm.wide"] == kinds.FLOAT
    assert known["layers.0.attention.norm"] == known["layers.0.mlp.inner"] == kinds.FLOAT16


REFUSED = {
    "tensorrt": {
        "nf4": ("NF4: a table would unpack it to 32 bits", "int4-g64"),
        "int4-g64-asym": ("no zero point but 0", "int4-g64"),
        "int8-g32": ("blocks of integers are INT4", "int8"),
        "w8a8": ("calibrated scales only", "w8a8-static"),
        "q4_k": ("scales under scales", "int4-g32"),
        "mxfp4": ("16 weights under E4M3", "nvfp4"),
        "nvfp4-w4a4": ("TRT_FP4DynamicQuantize", "nvfp4"),
    },
    "migraphx": {
        "w8a8": ("calibrated scales only", "w8a8-static"),
        "q6_k": ("scales under scales", "int4-g32"),
        "nvfp4": ("scales under scales", "int4-g32"),
        "nvfp4-w4a4": ("scales under scales", "int4-g32"),
        "fp8-static": ("float8 with float8", "fp8"),
    },
}


@pytest.mark.parametrize("dialect", REFUSED)
def test_what_does_not_fit_is_refused_by_name(
    make_model: Callable[..., Path], tmp_path: Path, dialect: Any
) -> None:
    for scheme, (reason, nearest) in REFUSED[dialect].items():
        carry = DIALECTS[dialect].carries(SCHEMES[scheme])
        assert isinstance(carry, Refused)
        assert reason in carry.reason
        assert carry.nearest == nearest
    first = next(iter(REFUSED[dialect]))
    quant = quantize(load(make_model(hidden_size=256)), first)
    with pytest.raises(SchemeError, match=rf"is {first}: .* What fits: "):
        onnx.write(quant, tmp_path, dialect=dialect)


@pytest.mark.parametrize("dialect", DIALECTS)
def test_encoders_are_refused(make_model: Callable[..., Path], tmp_path: Path, dialect: Any) -> None:
    quant = quantize(load(make_model("bert")), "int8")
    with pytest.raises(ModelError, match="ONNX Runtime's operators only"):
        onnx.write(quant, tmp_path, dialect=dialect)


def test_a_walk_shows_values_by_the_graphs_names(make_model: Callable[..., Path], tmp_path: Path) -> None:
    for dialect in ("tensorrt", "migraphx"):
        quant = quantize(load(make_model("llama")), "int8")
        artifact = onnx.write(quant, tmp_path / dialect, dialect=dialect)  # type: ignore[arg-type]
        session = open_traced(str(artifact.directory), artifact.context, threads=1)
        (tmp_path / f"{dialect}-values").mkdir()
        shown = session.trace(IDS, str(tmp_path / f"{dialect}-values"))
        assert {
            "embedding",
            "layers.0.attention.q",
            "layers.1.attention.rope",
            "layers.1.out",
            "logits",
        } <= set(shown)
        assert all(each.rounding == 2.0**-11 for each in shown.values())


# Of two rows of codes the columns become rows: two a byte, the first row's in the low nibble; signed, so 8 less. By hand: 0 and 15 are
# -8 and 7, which is 0x78, as in the second column; 1 and 15 are -7 and 7, 0x79; … 15 and 5 are 7 and -3, 0xd7.
CODES = np.stack([np.arange(32) // 2, 15 - np.arange(32) // 3])
INT4 = "787879696a6a5b5b5c4c4d4d3e3e3f2f2020111112020303f4f4f5e5e6e6d7d7"


def test_bytes_of_int4_and_what_damages_them() -> None:
    tensor = tensor_of("int4-g32", CODES, scale=[[-2.0], [0.5]])
    how = Linear(4, 32, False, True, scales="FLOAT16")
    parts = how.pack(tensor)
    assert parts["codes"].tobytes().hex() == INT4
    assert parts["scales"].tobytes().hex() == "00c00038"
    flat = np.frombuffer(bytes.fromhex(INT4), np.uint8)
    integers = np.stack([flat & 15, flat >> 4], axis=1)
    values = {"codes": (integers.astype(np.int8) ^ 8) - 8, "scales": parts["scales"]}
    back = how.unpack(values, tensor)
    assert np.array_equal(back.packed, tensor.packed)
    assert np.array_equal(back.scale, tensor.scale)
    for damaged in (values["codes"][:, ::-1], values["codes"] + 1, values["codes"].T):
        assert not np.array_equal(
            how.unpack(values | {"codes": damaged.copy()}, tensor).packed, tensor.packed
        )


def test_bytes_of_nvfp4_and_what_damages_them() -> None:
    random = np.random.default_rng(0)
    tensor = quantized_floats("nvfp4", random)
    how = Floats(4, True)
    parts = how.pack(tensor)
    values = {name: unpacked(part, how.shapes(*tensor.shape)[name]) for name, part in parts.items()}
    back = how.unpack(values, tensor)
    assert np.array_equal(back.packed, tensor.packed)
    assert np.array_equal(back.scale, tensor.scale)
    swapped = dict(values, codes=values["codes"].reshape(tensor.shape[1], -1)[:, ::-1].copy())
    assert not np.array_equal(how.unpack(swapped, tensor).packed, tensor.packed)
    other = dict(values, scale=values["scale"] * np.float32(1.0000001192092896))
    assert not np.array_equal(how.unpack(other, tensor).scale, tensor.scale)
    shifted = dict(values, scales=values["scales"] ^ np.uint8(1))
    assert not np.array_equal(how.unpack(shifted, tensor).scale, tensor.scale)


def test_bytes_of_static_fp8_and_what_damages_them() -> None:
    tensor = quantized_floats("fp8-static", np.random.default_rng(0))
    assert tensor.scale_codes is not None
    how, shape = Floats(8, True, static=True), tensor.shape
    parts = how.pack(tensor)
    assert how.shapes(*shape)["scales"] == how.shapes(*shape)["input_scale"] == ("FLOAT", ())
    assert np.asarray(parts["codes"]).reshape(shape[::-1]).T.tobytes() == tensor.packed.tobytes()
    back = how.unpack(parts, tensor)
    assert np.array_equal(back.packed, tensor.packed)
    assert np.array_equal(back.scale, tensor.scale)
    assert back.input_scale == tensor.input_scale
    other = dict(parts, scales=np.asarray(parts["scales"]) * np.float32(1.0000001192092896))
    assert not np.array_equal(how.unpack(other, tensor).scale, tensor.scale)
    swapped = dict(parts, codes=np.asarray(parts["codes"])[:, ::-1].copy())
    assert not np.array_equal(how.unpack(swapped, tensor).packed, tensor.packed)
    stepped = dict(parts, input_scale=np.asarray(parts["input_scale"]) * 2)
    assert how.unpack(stepped, tensor).input_scale != tensor.input_scale


def quantized_floats(scheme: str, random: np.random.Generator) -> QuantTensor:
    from tapeout.quantize import lattice

    parts = {}
    for name, (dtype, shape) in lattice.layout(SCHEMES[scheme], 4, 64).items():
        if name == "codes":
            parts[name] = random.integers(0, 16, (4, 64))
        elif dtype == "U8":
            parts[name] = random.integers(1, 120, shape)
        else:
            parts[name] = random.uniform(0.5, 2, shape)
    return tensor_of(scheme, **parts)


def unpacked(part: np.ndarray, said: tuple[str, tuple[int, ...]]) -> np.ndarray:
    kind, shape = said
    if kind != "FLOAT4E2M1":
        return np.asarray(part).reshape(shape)
    flat = np.asarray(part).reshape(-1)
    return np.stack([flat & 15, flat >> 4], axis=1).reshape(shape).astype(np.uint8)
