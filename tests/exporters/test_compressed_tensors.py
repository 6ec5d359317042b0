"""compressed-tensors directories: the library's own bytes for the same codes, and what damages them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapeout.build import target
from tapeout.errors import ModelError, PackageError, SchemeError
from tapeout.exporters import Artifact, Refused, huggingface
from tapeout.exporters.huggingface import compressed_tensors
from tapeout.generated import write_model
from tapeout.models import load
from tapeout.quantize import SCHEMES, Quantized, QuantTensor, quantize
from tapeout.quantize.scheme import E4M3, E4M3_ONE, reciprocal
from tapeout.quantize.tensor import ScaleCodes, pack
from tapeout.targets.huggingface import open_session

torch = pytest.importorskip("torch")
BaseCompressor = pytest.importorskip("compressed_tensors.compressors").BaseCompressor
QuantizationScheme = pytest.importorskip("compressed_tensors.quantization").QuantizationScheme
preset_name_to_scheme = pytest.importorskip("compressed_tensors.quantization").preset_name_to_scheme
load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file

SMALL: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
FIXTURES = Path(__file__).parents[1] / "foreign" / "data"
Q_PROJ = "model.layers.0.self_attn.q_proj"
CARRIED = [
    name for name, scheme in SCHEMES.items() if not isinstance(compressed_tensors.carries(scheme), Refused)
]


def _tensor(scheme_name: str, out: int, into: int) -> QuantTensor:
    """Codes without symmetry, in every value that the scheme has."""
    scheme, rng = SCHEMES[scheme_name], np.random.default_rng(7)
    codes = rng.integers(0, 2**scheme.bits, (out, into), np.uint8)
    if scheme.levels == "e4m3":
        codes[(codes & 0x7F) == 0x7F] = 0x11  # NaN is no weight
    if scheme.levels == "e2m1":
        codes[codes == 8] = 3  # of -0 the library keeps no sign
    if scheme.kind == "symmetric" and scheme.bits == 8:
        codes[codes == 0] = 3
    group = scheme.group or into
    scale = rng.uniform(0.01, 0.02, (out, into // group)).astype(np.float16)
    kept = None
    if scheme.scales == "e4m3":
        few = rng.integers(1, 127, (out, into // group), np.uint8)  # positive, and none of them NaN
        whole = reciprocal(np.float32(rng.uniform(1e-4, 1e-3)))
        kept = ScaleCodes(
            np.full_like(few, E4M3_ONE) if scheme.bits == 8 else few, E4M3, whole.reshape(1), few.size
        )
        scale = kept.values()
    elif scheme.bits == 4:
        scale[::3] *= np.float16(-1)  # as the extreme of a group takes the lone lowest code
    zero = rng.integers(0, 2**scheme.bits, scale.shape, np.uint8) if scheme.kind == "asymmetric" else None
    step = scheme.input_scale(np.float32(4.7)) if scheme.calibrated else None
    packed = pack(codes, scheme.bits)
    return QuantTensor(
        packed, scheme.bits, into, scale, group, scheme.codebook(), zero, scale_codes=kept, input_scale=step
    )


def _bytes(tensor: QuantTensor, scheme_name: str) -> dict[str, Any]:
    """What the exporter writes for a weight, by suffix."""
    parts = compressed_tensors.parts("m", tensor, SCHEMES[scheme_name])
    return {name.removeprefix("m."): part for name, part in parts.items()}


def test_words_by_hand() -> None:
    codes = (np.arange(32, dtype=np.uint8) // 2)[None]
    scale = np.ones((1, 1), np.float16)
    tensor = QuantTensor(pack(codes, 4), 4, 32, scale, 32, SCHEMES["int4-g32"].codebook())
    words = _bytes(tensor, "int4-g32")["weight_packed"].rows(slice(None))
    assert words.tobytes().hex() == "00112233445566778899aabbccddeeff"


@pytest.mark.parametrize("name", [name for name in CARRIED if name != "none"])
@pytest.mark.parametrize(("out", "into"), [(40, 256), (37, 128)])  # 37 zero points do not fill their words
def test_the_library_compresses_to_the_same_bytes(name: str, out: int, into: int) -> None:
    tensor, scheme = _tensor(name, out, into), SCHEMES[name]
    group = compressed_tensors.statement({"m": scheme}, [])["config_groups"]["group_0"]
    said = QuantizationScheme.model_validate(group)
    state = {
        "weight": torch.from_numpy(tensor.dequantize()),
        "weight_scale": torch.from_numpy(tensor.scale.astype(np.float32)),
    }
    if tensor.zero_point is not None:
        middle = 2 ** (scheme.bits - 1)
        state["weight_zero_point"] = torch.from_numpy(tensor.zero_point.astype(np.int16) - middle).to(
            torch.int8
        )
    if tensor.scale_codes is not None:
        block = torch.from_numpy(np.asarray(tensor.scale_codes.block))
        if scheme.bits == 8:
            state["weight_scale"] = block
        else:
            state["weight_scale"] = torch.from_numpy(E4M3[tensor.scale_codes.codes])
            state["weight_global_scale"] = 1 / block
    wanted = BaseCompressor.get_value_from_registry(group["format"]).compress(state, said)
    found = _bytes(tensor, name)
    assert found.keys() - {"input_scale", "input_global_scale"} == wanted.keys()
    for suffix, theirs in wanted.items():
        ours = found[suffix].rows(slice(None))
        assert found[suffix].shape == tuple(theirs.shape), suffix
        if suffix == "weight_scale" and scheme.levels != "e2m1":
            assert np.array_equal(ours.astype(np.float32), theirs.numpy())
        else:
            raw = theirs.view(torch.uint8) if theirs.itemsize == 1 else theirs
            assert ours.tobytes() == raw.numpy().tobytes(), suffix


@pytest.mark.parametrize(
    "name",
    [
        "ct-pack-g32", "ct-pack-g32-asym", "ct-pack-g64-f32", "ct-pack-int8", "ct-int-w8a8", "ct-int-w8a8-static",
    ],
)  # fmt: skip
def test_a_checkpoint_of_the_library_comes_out_as_it_went_in(name: str, tmp_path: Path) -> None:
    quant = quantize(load(FIXTURES / name), out=tmp_path / "codes")
    huggingface.write(quant, tmp_path / "out", "compressed-tensors")
    theirs = load_file(FIXTURES / name / "model.safetensors")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        same = tensor.float() if tensor.is_floating_point() else tensor
        assert torch.equal(ours[key].to(same.dtype), same), key
    said, wrote = (
        json.loads((place / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
        for place in (FIXTURES / name, tmp_path / "out")
    )
    assert wrote["format"] == said["format"]
    for part in ("weights", "input_activations"):
        assert {key: (wrote[part] or {}).get(key) for key in said[part] or {}} == (said[part] or {})


@pytest.fixture(scope="module")
def asymmetric(tmp_path_factory: pytest.TempPathFactory) -> tuple[Quantized, Artifact]:
    work = tmp_path_factory.mktemp("asymmetric")
    quant = quantize(load(write_model(work / "model", "llama", SMALL)), "int4-g32-asym", out=work / "codes")
    return quant, huggingface.write(quant, work / "out", "compressed-tensors")


def _differs(artifact: Artifact, quant: Quantized) -> list[str]:
    """Names of tensors whose codes or zero points are others than the store's."""
    found = []
    for name, tensor in huggingface.read_codes(artifact, quant):
        wanted = quant[name]
        if isinstance(tensor, QuantTensor) and isinstance(wanted, QuantTensor):
            same = tensor.zero_point is not None and np.array_equal(tensor.zero_point, wanted.zero_point)
            if not same or not np.array_equal(tensor.packed, wanted.packed):
                found.append(name)
    return found


@pytest.mark.parametrize("damage", ["none", "nibbles", "zero point", "transposed"])
def test_a_mutation_shows(damage: str, asymmetric: tuple[Quantized, Artifact], tmp_path: Path) -> None:
    quant, artifact = asymmetric
    tensors = load_file(artifact.directory / "model.safetensors")
    if damage == "nibbles":
        pairs = tensors[f"{Q_PROJ}.weight_packed"].view(torch.uint8)
        tensors[f"{Q_PROJ}.weight_packed"] = ((pairs << 4) | (pairs >> 4)).view(torch.int32)
    elif damage == "zero point":
        tensors[f"{Q_PROJ}.weight_zero_point"] += 1
    elif damage == "transposed":
        square = tensors[f"{Q_PROJ}.weight_packed"]
        tensors[f"{Q_PROJ}.weight_packed"] = square.T.reshape(square.shape).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((artifact.directory / "config.json").read_bytes())
    differs = _differs(replace(artifact, directory=tmp_path), quant)
    assert differs == ([] if damage == "none" else [f"{Q_PROJ}.weight"])


def test_shards_hold_what_one_file_holds(asymmetric: tuple[Quantized, Artifact], tmp_path: Path) -> None:
    quant, artifact = asymmetric
    cut = huggingface.write(quant, tmp_path, "compressed-tensors", max_shard_bytes=100_000, threads=1)
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert all(path.stat().st_size < 120_000 for path in shards)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    one = load_file(artifact.directory / "model.safetensors")
    many = {name: tensor for path in shards for name, tensor in load_file(path).items()}
    assert many.keys() == one.keys() == index["weight_map"].keys()
    assert all(torch.equal(many[name], one[name]) for name in one)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in one.values())
    assert not _differs(cut, quant)


def test_several_schemes_are_groups_of_names(tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "model", "llama", SMALL))
    quant = quantize(
        model, "int4-g32", overrides={"*.down_proj": "w8a8", "*.o_proj": "none"}, out=tmp_path / "codes"
    )
    artifact = huggingface.write(quant, tmp_path / "out", "compressed-tensors")
    said = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert said["format"] == "mixed-precision"
    formats = {group["format"]: group["targets"] for group in said["config_groups"].values()}
    assert "model.layers.1.mlp.down_proj" in formats["int-quantized"]
    assert f"{Q_PROJ}" in formats["pack-quantized"]
    assert {"lm_head", "model.layers.0.self_attn.o_proj"} <= set(said["ignore"])
    kinds = dict(huggingface.read_codes(artifact, quant))
    assert kinds.keys() == set(quant)
    session = open_session(str(tmp_path / "out"), inputs=False, threads=1)
    logits = session.prefill([5, 3, 8])
    alone = open_session(str(tmp_path / "out"), threads=1).prefill([5, 3, 8])
    assert np.isfinite(logits).all()
    assert not np.array_equal(logits, alone), (
        "inputs of down_proj are rounded where the directory is run as it says"
    )


def test_what_is_loaded_as_one_is_of_one_scheme(tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "model", "llama", SMALL))
    quant = quantize(model, "int4-g32", overrides={"*.k_proj": "int8"}, out=tmp_path / "codes")
    with pytest.raises(SchemeError, match=r"q_proj: int4-g32, k_proj: int8.*as one matrix"):
        huggingface.write(quant, tmp_path / "out", "compressed-tensors")


@pytest.mark.parametrize(
    ("scheme", "preset"), [("fp8-static", "FP8"), ("nvfp4", "NVFP4A16"), ("nvfp4-w4a4", "NVFP4")]
)
def test_the_statement_is_the_librarys_preset(scheme: str, preset: str) -> None:
    group = compressed_tensors.statement({"m": SCHEMES[scheme]}, [])["config_groups"]["group_0"]
    ours, theirs = QuantizationScheme.model_validate(group), preset_name_to_scheme(preset, ["Linear"])
    for part in ("weights", "input_activations"):
        said, wanted = getattr(ours, part), getattr(theirs, part)
        assert (said is None) == (wanted is None)
        if said is not None:
            left_out = {"observer", "observer_kwargs"}  # what found the scales
            assert said.model_dump(exclude=left_out) == wanted.model_dump(exclude=left_out)


def test_a_scale_that_is_one_over_nothing_is_refused(tmp_path: Path) -> None:
    """NVFP4 of ModelOpt, which multiplies by its scale; of ours each is one over a float32."""
    for name in ("modelopt-nvfp4", "ct-nvfp4"):
        quant = quantize(load(FIXTURES / name), out=tmp_path / name)
        scales = {quant[each].scale_codes.block[0] for each in quant if isinstance(quant[each], QuantTensor)}  # type: ignore[union-attr]
        wrong = [scale for scale in scales if reciprocal(scale) != scale]
        if wrong:
            with pytest.raises(SchemeError, match=r"one over no float32\. What fits: the original model"):
                huggingface.write(quant, tmp_path / "out", "compressed-tensors")
    rng = np.random.default_rng(3)
    for scale in rng.uniform(1e-6, 2, 500).astype(np.float32):
        held = compressed_tensors._divisor("m", reciprocal(scale))
        assert np.float32(1) / held == reciprocal(scale)


def test_what_is_refused_is_named(tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "model", "bert", {}))
    with pytest.raises(ModelError, match="an encoder"):
        huggingface.write(
            quantize(model, "int8", out=tmp_path / "codes"), tmp_path / "out", "compressed-tensors"
        )
    for name in ("nf4", "int3-g64", "q4_k", "mxfp4"):
        answer = target("rocm").carries(SCHEMES[name])
        assert isinstance(answer, Refused)
        assert not isinstance(target("rocm").carries(SCHEMES[answer.nearest]), Refused)


def test_a_cut_file_is_named(asymmetric: tuple[Quantized, Artifact], tmp_path: Path) -> None:
    quant, artifact = asymmetric
    whole = (artifact.directory / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:-100])
    (tmp_path / "config.json").write_bytes((artifact.directory / "config.json").read_bytes())
    with pytest.raises(PackageError, match="cannot be read"):
        list(huggingface.read_codes(replace(artifact, directory=tmp_path), quant))


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        ("llmc-int4-g32", "int4-g32"),
        ("llmc-int4-g32-asym", "int4-g32-asym"),
        ("llmc-int8", "int8"),
        ("llmc-w8a8", "w8a8"),
        ("llmc-fp8", "fp8"),
    ],
)
def test_llm_compressor_saves_the_same_codes_to_the_same_bytes(
    name: str, scheme: str, tmp_path: Path
) -> None:
    """Its own oneshot made them (scripts/fixtures/make_llm_compressor.py); the codes come in as they are and go out again."""
    quant = quantize(load(FIXTURES / name), out=tmp_path / "codes")
    target("rocm").export(quant, tmp_path / "out")
    ours, theirs = (load_file(each / "model.safetensors") for each in (tmp_path / "out", FIXTURES / name))
    assert {str(each) for each in quant.schemes.values()} == {scheme, "none"}
    assert ours.keys() == theirs.keys()
    for each in theirs:
        assert (ours[each].dtype, ours[each].shape) == (theirs[each].dtype, theirs[each].shape), each
        assert torch.equal(ours[each].view(torch.uint8), theirs[each].view(torch.uint8)), each
    said, theirs_said = (
        json.loads((each / "config.json").read_text())["quantization_config"]
        for each in (tmp_path / "out", FIXTURES / name)
    )
    # Which numbers they are, and which modules stay floats; not who observed them. Of fp8 alone each names its own unpacking.
    for group, expected in theirs_said["config_groups"].items():
        for part in ("weights", "input_activations"):
            mine, wanted = said["config_groups"][group][part], expected[part]
            assert (mine is None) == (wanted is None), part
            keys = ("num_bits", "type", "strategy", "group_size", "symmetric", "dynamic")
            assert wanted is None or {key: mine[key] for key in keys} == {key: wanted[key] for key in keys}
    assert said["ignore"] == theirs_said["ignore"]
