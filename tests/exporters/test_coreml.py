"""Whole packages: that they are what coremltools opens, hold the codes of the store, and that damage shows."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from thinned import thinned

from tapeout.errors import MissingToolchain, ModelError, OutputError, PackageError, SchemeError
from tapeout.exporters import Artifact, Refused, coreml
from tapeout.exporters.coreml import program, writer
from tapeout.exporters.coreml.blob import Blobs
from tapeout.models import load
from tapeout.models.families import known
from tapeout.models.rope import inverse_frequencies
from tapeout.quantize import SCHEMES, Quantized, QuantTensor, quantize

try:
    program.library()
except MissingToolchain:
    pytest.skip("coremltools is not installed", allow_module_level=True)

CARRIED = [name for name, scheme in SCHEMES.items() if not isinstance(coreml.carries(scheme), Refused)]
LARGE = {"hidden_size": 128, "intermediate_size": 256}
Options = coreml.Options
MODEL = "model.mlpackage"


@pytest.fixture
def quantized(make_model: Callable[..., Path]) -> Callable[..., Quantized]:
    """``quantized("nf4", attention_bias=True)``."""

    def make(
        scheme: str, model_type: str = "llama", overrides: dict[str, str] | None = None, **fields: Any
    ) -> Quantized:
        wide = 2 if SCHEMES[scheme].scales == "super" else 1
        sizes = {name: wide * size for name, size in LARGE.items()} if model_type == "llama" else {}
        return quantize(load(make_model(model_type, **sizes | fields)), scheme, overrides=overrides)

    return make


def wrong(artifact: Artifact, quant: Quantized) -> list[str]:
    """Names of the tensors that do not come back as they went in."""
    names, seen = [], set()
    for name, tensor in coreml.read_codes(artifact, quant):
        seen.add(name)
        expected = quant[name]
        if isinstance(tensor, QuantTensor):
            assert isinstance(expected, QuantTensor)
            parts = (
                (t.packed, t.scale, t.zero_point, np.asarray(t.codebook).view(np.uint32))
                for t in (tensor, expected)
            )
            same = all(np.array_equal(a, b) for a, b in zip(*parts, strict=True) if b is not None)
        else:
            values = quant.float32(name)
            if artifact.containers[name] == "F16":
                values = values.astype(np.float16).astype(np.float32)
            same = np.array_equal(tensor, values)
        if not same:
            names.append(name)
    assert seen == quant.keys()
    return names


def spec_of(artifact: Artifact) -> Any:
    import coremltools as ct

    return ct.utils.load_spec(str(artifact.directory / MODEL))


def operations(spec: Any, function: str) -> list[Any]:
    found = spec.mlProgram.functions[function]
    return list(found.block_specializations[found.opset].operations)


@pytest.mark.parametrize("scheme", thinned(CARRIED, alike=lambda name: SCHEMES[name].bits))
def test_the_codes_come_back(quantized, tmp_path: Path, scheme: str) -> None:
    quant = quantized(scheme, attention_bias=True)
    artifact = coreml.write(quant, tmp_path / "out")
    assert wrong(artifact, quant) == []
    assert artifact.containers.keys() == quant.keys()
    container = artifact.containers["model.layers.0.mlp.up_proj.weight"]
    carry = coreml.carries(SCHEMES[scheme])
    assert not isinstance(carry, Refused)
    assert container == carry.container.split(", at")[0]
    assert artifact.bytes_per_token < (artifact.directory / MODEL / program.WEIGHTS).stat().st_size
    needs = {"CoreML9"} if "lookup" in container else {"CoreML8"}
    assert {each.opset for each in spec_of(artifact).mlProgram.functions.values()} == needs


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in known() if family != "t5"])
def test_every_family_comes_back(quantized, tmp_path: Path, family: str) -> None:
    quant = quantized("int4-g32", family)
    assert wrong(coreml.write(quant, tmp_path / "out"), quant) == []


def test_narrow_codes_stay_narrow_in_the_newer_opset(quantized, tmp_path: Path) -> None:
    quant = quantized("int3-g64")
    sizes = {}
    for opset in ("ios18", "ios26"):
        artifact = coreml.write(quant, tmp_path / opset, Options(opset=opset))  # type: ignore[arg-type]
        assert wrong(artifact, quant) == []
        sizes[opset] = artifact.bytes_per_token
    assert sizes["ios26"] < sizes["ios18"]


def test_chunks_come_back(quantized, tmp_path: Path) -> None:
    quant = quantized("int4-g32", num_hidden_layers=6, tie_word_embeddings=True)
    artifact = coreml.write(quant, tmp_path / "out", Options(chunks=3))
    assert {name.split("/")[0] for name in artifact.files} >= {f"model_{n}_of_3.mlpackage" for n in (1, 2, 3)}
    assert wrong(artifact, quant) == []
    with pytest.raises(ModelError, match=r"chunks = 4 does not divide the 6 layers .* fits: 1, 2, 3, 6"):
        coreml.write(quant, tmp_path / "other", Options(chunks=4))


def test_coremltools_opens_it(quantized, tmp_path: Path) -> None:
    import coremltools as ct

    quant = quantized("int4-g32")
    artifact = coreml.write(quant, tmp_path, Options(batch_size=2, prefill_chunk=64, sequence_length=128))
    with program.quiet():
        model = ct.models.MLModel(str(tmp_path / MODEL), skip_model_load=True)
    spec = model.get_spec()
    assert spec.specificationVersion == ct.target.iOS18.value
    said = spec.description
    assert said.defaultFunctionName == "prefill"
    functions = {each.name: each for each in said.functions}
    assert list(functions) == ["prefill", "decode"]
    shapes = {
        name: {each.name: list(each.type.multiArrayType.shape) for each in function.input}
        for name, function in functions.items()
    }
    assert shapes["decode"]["inputIds"] == [2, 1]
    ranges = {
        each.name: [(r.lowerBound, r.upperBound) for r in each.type.multiArrayType.shapeRange.sizeRanges]
        for each in functions["prefill"].input
    }
    assert ranges == {
        "inputIds": [(2, 2), (1, 64)],
        "fullAttentionMask": [(2, 2), (1, 1), (1, 64), (1, 128)],
    }
    for function in functions.values():
        assert [each.name for each in function.output] == ["logits"]
        states = {each.name: list(each.type.stateType.arrayType.shape) for each in function.state}
        assert states == {key: [2, 2, 4, 128, 16] for key in ("keyCache", "valueCache")}
        assert all(each.shortDescription for each in (*function.input, *function.output, *function.state))
    facts = said.metadata.userDefined
    assert facts["co.tapeout.scheme"] == "int4-g32"
    assert (facts["co.tapeout.context"], facts["co.tapeout.chunk"], facts["co.tapeout.batch"]) == (
        "128",
        "64",
        "2",
    )
    assert artifact.context == 128
    assert artifact.files[:3] == tuple(
        f"{MODEL}/{name}" for name in (program.MANIFEST, program.SPEC, program.WEIGHTS)
    )


def test_states_are_read_once_and_written_once(quantized, tmp_path: Path) -> None:
    quant = quantized("int8", "gemma2", sliding_window=8, num_hidden_layers=4)
    spec = spec_of(coreml.write(quant, tmp_path))
    for function in ("prefill", "decode"):
        ops = operations(spec, function)
        kinds = {kind: [op for op in ops if op.type == kind] for kind in ("read_state", "write_state")}
        for found in kinds.values():
            of = Counter(op.inputs["input"].arguments[0].name for op in found)
            # Two layers with a window, two without.
            assert of == dict.fromkeys(("keyCache", "valueCache", "keyCacheWindow", "valueCacheWindow"), 2)
        # What a layer has written is there when the next one reads.
        order = [
            op.inputs["input"].arguments[0].name for op in ops if op.type in ("read_state", "write_state")
        ]
        assert all(one == other for one, other in zip(order[::2], order[1::2], strict=True))


def test_both_functions_share_the_weights(quantized, tmp_path: Path) -> None:
    spec = spec_of(coreml.write(quantized("int4-g32-asym"), tmp_path))

    def places(function: str) -> dict[str, int]:
        found = {}
        for op in operations(spec, function):
            values = {"val": op.attributes["val"]} if "val" in op.attributes else {}
            values |= {name: each.arguments[0].value for name, each in op.inputs.items() if each.arguments}
            found |= {
                f"{op.outputs[0].name} {name}": value.blobFileValue.offset
                for name, value in values.items()
                if value.blobFileValue.fileName
            }
        return found

    prefill, decode = places("prefill"), places("decode")
    weights = {name: at for name, at in prefill.items() if name.startswith(("model_", "lm_head"))}
    assert len(weights) == 3 * 14 + 2 * 2 + 5
    assert weights.items() <= decode.items()
    size = (tmp_path / MODEL / program.WEIGHTS).stat().st_size
    assert all(0 < at < size and at % 64 == 0 for at in prefill.values())
    # Nothing stands twice in the file.
    assert len(set(weights.values())) == len(weights)


def test_a_tied_head_is_there_once(quantized, tmp_path: Path) -> None:
    quant = quantized("int8", tie_word_embeddings=True)
    artifact = coreml.write(quant, tmp_path)
    assert wrong(artifact, quant) == []
    table = 272 * 128
    assert (tmp_path / MODEL / program.WEIGHTS).read_bytes().count(
        (np.asarray(quant["model.embed_tokens.weight"].packed) ^ np.uint8(0x80)).tobytes()
    ) == 1
    assert artifact.bytes_per_token > table


@pytest.mark.parametrize("scheme", ["int4-g32-asym", "none"])
def test_the_same_bytes_whatever_the_threads(quantized, tmp_path: Path, scheme: str) -> None:
    quant = quantized(scheme)
    files = [coreml.write(quant, tmp_path / f"{n}", threads=n) for n in (1, 3)]
    for name in files[0].files:
        one, other = ((file.directory / name).read_bytes() for file in files)
        assert one == other, name


def test_the_manifest_is_whole(quantized, tmp_path: Path) -> None:
    coreml.write(quantized("int8"), tmp_path)
    found = json.loads((tmp_path / MODEL / program.MANIFEST).read_text())
    assert found["fileFormatVersion"] == "1.0.0"
    entries = found["itemInfoEntries"]
    assert found["rootModelIdentifier"] in entries
    for entry in entries.values():
        assert (tmp_path / MODEL / "Data" / entry["path"]).exists()
    present = {
        str(path.relative_to(tmp_path / MODEL)) for path in (tmp_path / MODEL).rglob("*") if path.is_file()
    }
    assert present == {program.MANIFEST, program.SPEC, program.WEIGHTS}


def test_blobs_do_not_overlap(quantized, tmp_path: Path) -> None:
    quant = quantized("int4-g32", "mixtral", vocab_size=4000)
    options = writer.resolved(quant, Options())
    graph, _ = writer.build(quant, options)
    coreml.write(quant, tmp_path, options)
    places = sorted((place.record, place.end) for place in graph.layout.places)
    assert all(end <= begin for (_, end), (begin, _) in pairwise(places))
    data = (tmp_path / MODEL / program.WEIGHTS).read_bytes()
    assert len(data) == places[-1][1]
    assert int.from_bytes(data[:4], "little") == len(places)


def test_damage_is_named(quantized, tmp_path: Path) -> None:
    quant = quantized("int4-g32")
    artifact = coreml.write(quant, tmp_path)
    data, model = tmp_path / MODEL / program.WEIGHTS, tmp_path / MODEL / program.SPEC
    whole, spec = data.read_bytes(), model.read_bytes()
    graph, _ = writer.build(quant, writer.resolved(quant, Options()))
    for name, source in (
        ("model__layers__1__mlp__up_proj__weight_codes", "model.layers.1.mlp.up_proj.weight"),
        ("model__layers__1__mlp__up_proj__weight_scale", "model.layers.1.mlp.up_proj.weight"),
        ("model__norm__weight", "model.norm.weight"),
    ):
        place = graph.blobs[name].place
        assert place
        at = place.data + 33
        data.write_bytes(whole[:at] + bytes([whole[at] ^ 0x10]) + whole[at + 1 :])
        assert wrong(artifact, quant) == [source]
    place = graph.blobs["rope_0_cos"].place
    assert place
    data.write_bytes(whole[: place.data] + b"\1" + whole[place.data + 1 :])
    with pytest.raises(PackageError, match="rope_0_cos holds other values"):
        wrong(artifact, quant)
    data.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(PackageError, match="it is cut off"):
        wrong(artifact, quant)
    data.unlink()
    with pytest.raises(PackageError, match=r"weight\.bin cannot be read"):
        wrong(artifact, quant)
    data.write_bytes(whole)
    for damaged in (spec[: len(spec) // 2], b"", b"no model"):
        model.write_bytes(damaged)
        with pytest.raises(PackageError, match=r"model\.mlpackage"):
            wrong(artifact, quant)


def test_another_program_is_not_taken(quantized, tmp_path: Path) -> None:
    artifact = coreml.write(quantized("int4-g32", name="a"), tmp_path)
    with pytest.raises(PackageError, match="gate_proj__weight of function decode is another operator"):
        wrong(artifact, quantized("int4-g32", name="b", intermediate_size=320))
    with pytest.raises(PackageError, match=r"of function decode is another operator"):
        wrong(artifact, quantized("int4-g32", name="c", rms_norm_eps=1e-4))
    with pytest.raises(PackageError, match="embed_tokens__weight of function decode is another operator"):
        wrong(artifact, quantized("int4-g32", name="d", vocab_size=280))
    # Of the mathematics one number is changed: the epsilon of a norm.
    path = tmp_path / MODEL / program.SPEC
    spec = spec_of(artifact)
    for op in operations(spec, "decode"):
        if op.type == "const" and op.outputs[0].name.endswith("epsilon_0"):
            changed = op.attributes["val"].immediateValue.tensor.floats.values
            if changed:
                changed[0] *= 2
                break
    path.write_bytes(spec.SerializeToString())
    with pytest.raises(PackageError, match="of function decode is another operator"):
        wrong(artifact, quantized("int4-g32", name="a"))


def test_angles_far_out(quantized, tmp_path: Path) -> None:
    """At position 200,000, to a unit in the last place of float32: the angle is not a product of float32."""
    quant = quantized("int8", max_position_embeddings=262144, num_hidden_layers=1)
    options = writer.resolved(quant, Options(sequence_length=200_001))
    graph, _ = writer.build(quant, options)
    coreml.write(quant, tmp_path, options)
    turns = 200_000 * inverse_frequencies(quant.model.decoder.rope)
    for part, expected in (("cos", np.cos(turns)), ("sin", np.sin(turns))):
        blob = graph.blobs[f"rope_0_{part}"]
        assert blob.place
        table = Blobs(tmp_path / MODEL / program.WEIGHTS).read(blob.kind, blob.place.record, blob.shape)
        assert table.shape == (200_001, 8)
        assert np.abs(table[-1] - expected).max() <= 2.0**-24


def test_what_is_not_expressible_is_named(quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        SchemeError, match=r"q_proj\.weight is nvfp4: scales under a float32 .* What fits: int4-g32"
    ):
        coreml.write(quantized("nvfp4", name="a"), tmp_path / "a")
    with pytest.raises(
        SchemeError, match=r"is nf4: uint4 lookup, blockwise needs opset ios26\. What fits: int4-g32"
    ):
        coreml.write(quantized("nf4", name="b"), tmp_path / "b", Options(opset="ios18"))
    quant = quantized("int8", name="c")
    with pytest.raises(ModelError, match="layers = 3: c has 1 … 2"):
        coreml.write(quant, tmp_path / "c.out", Options(layers=3))
    with pytest.raises(ModelError, match="sequence_length = 257: c was made for 256 tokens"):
        coreml.write(quant, tmp_path / "c.out", Options(sequence_length=257))
    with pytest.raises(ModelError, match="batch_size = 0: at least 1"):
        Options(batch_size=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        coreml.write(quant, tmp_path / "file" / "out")
    # Two layers, keys and values, 4 heads of 16: 256 numbers a token.
    monkeypatch.setattr(writer, "STATES", 100_000)
    with pytest.raises(
        ModelError, match=r"256 tokens takes 0\.0 GB of float16 caches.*fits: sequence_length 128"
    ):
        coreml.write(quant, tmp_path / "c.out")
    coreml.write(quant, tmp_path / "c.out", Options(sequence_length=128))
    (quant.model.directory / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        coreml.write(quant, tmp_path / "d.out", Options(sequence_length=128))
    monkeypatch.setitem(sys.modules, "coremltools", None)
    with pytest.raises(MissingToolchain, match=r"pip install 'tapeout\[apple\]'"):
        coreml.write(quant, tmp_path / "e.out", Options(sequence_length=128))


def test_a_weight_beyond_float16_is_named(quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quant = quantized("none")
    huge = np.full((128, 128), 1e5, np.float32)
    original = writer.to_float32
    monkeypatch.setattr(
        writer, "to_float32", lambda bits, dtype: huge if bits.shape == (128, 128) else original(bits, dtype)
    )
    with pytest.raises(SchemeError, match=r"self_attn\.q_proj\.weight holds 100000, beyond float16"):
        coreml.write(quant, tmp_path)


def test_experts_of_two_schemes_are_refused(quantized, tmp_path: Path) -> None:
    quant = quantized("int4-g32", "mixtral", overrides={"model.layers.1.*experts.2.w1": "int8"})
    with pytest.raises(
        SchemeError, match=r"experts\.0\.w1\.weight is int4-g32 and .*experts\.2\.w1\.weight is int8"
    ):
        coreml.write(quant, tmp_path)


def test_description(quantized, tmp_path: Path) -> None:
    coreml.write(quantized("int4-g32"), tmp_path)
    found = coreml.describe(tmp_path / MODEL)
    assert found["format"] == "coreml"
    assert found["opsets"] == ["CoreML8"]
    assert found["functions"].keys() == {"decode", "prefill"}
    assert found["inputs"]["decode"] == ["inputIds", "fullAttentionMask"]
    assert found["states"]["prefill"] == ["keyCache", "valueCache"]
    assert found["operators"]["constexpr_blockwise_shift_scale"] == 2 * 16
    assert found["metadata"]["co.tapeout.scheme"] == "int4-g32"
    with pytest.raises(PackageError, match="is not a Core ML package"):
        coreml.describe(tmp_path)
