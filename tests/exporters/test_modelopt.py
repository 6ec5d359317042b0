"""ModelOpt's unified checkpoints: the library's own bytes for the same codes, what damages them, and what servers ask of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapeout.build import target
from tapeout.errors import ModelError, PackageError, SchemeError, TapeoutError
from tapeout.exporters import Artifact, Refused, huggingface
from tapeout.exporters.huggingface import modelopt
from tapeout.generated import write_model
from tapeout.models import load
from tapeout.quantize import SCHEMES, Calibration, Quantized, QuantTensor, quantize
from tapeout.quantize.scheme import E4M3
from tapeout.quantize.tensor import ScaleCodes, pack
from tapeout.targets.modelopt_loader import Reader, open_session
from tapeout.targets.nvidia import Nvidia
from tapeout.validate.rounding import round_e4m3

torch = pytest.importorskip("torch")
load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file

SMALL: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
GOLDEN = Path(__file__).parent / "data" / "modelopt"
O_PROJ = "model.layers.0.self_attn.o_proj"
CASES = {
    "int8": "int8",
    "int8-sq": "w8a8-static",
    "int4-awq": "int4-g64",
    "fp8-kv": "fp8",
    "fp8": "fp8-static",
    "nvfp4-w4a16": "nvfp4",
    "nvfp4": "nvfp4-w4a4",
    "mixed": "fp8",
}


def _raw(tensor: Any) -> bytes:
    found: bytes = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
    return found


@pytest.mark.parametrize("name", CASES)
def test_modelopt_writes_the_same_bytes_for_the_same_codes(name: str, tmp_path: Path) -> None:
    """The golden directories are ModelOpt's (scripts/fixtures/make_modelopt_export.py), made of weights that are codes of ours."""
    quant = quantize(load(GOLDEN / name), out=tmp_path / "codes")
    assert quant.scheme.name == CASES[name]
    kv_cache = "fp8" if name == "fp8-kv" else None
    huggingface.write(quant, tmp_path / "out", "modelopt", kv_cache=kv_cache)  # type: ignore[arg-type]
    theirs, ours = (load_file(place / "model.safetensors") for place in (GOLDEN / name, tmp_path / "out"))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        assert (ours[key].dtype, ours[key].shape) == (tensor.dtype, tensor.shape), key
        assert _raw(ours[key]) == _raw(tensor), key
    for file, part in (("hf_quant_config.json", "quantization"), ("config.json", "quantization_config")):
        said, wrote = (
            json.loads((place / file).read_text())[part] for place in (GOLDEN / name, tmp_path / "out")
        )
        if name == "mixed":  # ModelOpt names groups in another order, and nothing that is left out
            said.pop("ignore", None)
            for statement in (said, wrote):
                groups = statement.pop("config_groups", {}).values()
                statement["groups"] = sorted(json.dumps(group, sort_keys=True) for group in groups)
        assert {key: wrote.get(key) for key in said} == said, file


def _int4(codes: np.ndarray[Any, Any]) -> QuantTensor:
    scale = np.ones((len(codes), 1), np.float16)
    into = codes.shape[1]
    return QuantTensor(pack(codes, 4), 4, into, scale, into, SCHEMES["int4-g64"].codebook())


def test_bytes_by_hand() -> None:
    """Rows 0 … 7 and 8 … 15 of an INT4 matrix: a byte is the first row's code - 8 in its low nibble, the second's in its high one."""
    rows = np.array([[0, 1, 2, 3, 4, 5, 6, 7], [15, 13, 11, 9, 8, 10, 12, 14]], np.uint8)
    part = modelopt.parts("m", _int4(rows), SCHEMES["int4-g64"])["m.weight"]
    assert part.shape == (1, 8)
    assert part.rows(slice(None)).tobytes().hex() == "78593a1b0c2d4e6f"


def test_nvfp4_bytes_by_hand() -> None:
    codes = (np.arange(16, dtype=np.uint8) * 5 % 16)[None]
    kept = ScaleCodes(np.array([[0x5B]], np.uint8), E4M3, np.array([0.25], np.float32), 1)
    tensor = QuantTensor(
        pack(codes, 4), 4, 16, kept.values(), 16, SCHEMES["nvfp4"].codebook(), scale_codes=kept
    )
    parts = modelopt.parts("m", tensor, SCHEMES["nvfp4"])
    assert parts["m.weight"].rows(slice(None)).tobytes().hex() == "50fa943ed8721cb6"
    assert parts["m.weight_scale"].rows(slice(None)).tobytes().hex() == "5b"
    assert parts["m.weight_scale_2"].rows(slice(None)).tobytes().hex() == "0000803e"
    assert parts["m.weight_scale_2"].shape == ()
    negative = replace(tensor, scale_codes=replace(kept, codes=kept.codes | np.uint8(0x80)))
    with pytest.raises(SchemeError, match="negative scale"):
        modelopt.parts("m", negative, SCHEMES["nvfp4"])


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> tuple[Quantized, Artifact]:
    work = tmp_path_factory.mktemp("int4")
    quant = quantize(load(write_model(work / "model", "llama", SMALL)), "int4-g64", out=work / "codes")
    return quant, huggingface.write(quant, work / "out", "modelopt")


def _differs(artifact: Artifact, quant: Quantized) -> list[str]:
    """Names of tensors whose codes or scales are others than the store's."""
    found = []
    for name, tensor in huggingface.read_codes(artifact, quant, Reader):
        wanted = quant[name]
        if isinstance(tensor, QuantTensor) and isinstance(wanted, QuantTensor):
            same = np.array_equal(tensor.packed, wanted.packed) and np.array_equal(tensor.scale, wanted.scale)
            if not same:
                found.append(name)
    return found


def _altered(artifact: Artifact, work: Path, tensors: dict[str, Any]) -> Artifact:
    """The same directory with other tensors."""
    shutil.copytree(artifact.directory, work, dirs_exist_ok=True)
    save_file(tensors, work / "model.safetensors", {"format": "pt"})
    return replace(artifact, directory=work)


def test_what_was_written_is_read(int4: tuple[Quantized, Artifact], tmp_path: Path) -> None:
    quant, artifact = int4
    same = _altered(artifact, tmp_path / "same", load_file(artifact.directory / "model.safetensors"))
    assert _differs(same, quant) == []


@pytest.mark.parametrize("damage", ["nibbles", "zero point", "scale transposed", "weight transposed"])
def test_a_mutation_shows(damage: str, int4: tuple[Quantized, Artifact], tmp_path: Path) -> None:
    quant, artifact = int4
    tensors = load_file(artifact.directory / "model.safetensors")
    weight, scale = tensors[f"{O_PROJ}.weight"], tensors[f"{O_PROJ}.weight_scale"]
    if damage == "nibbles":
        tensors[f"{O_PROJ}.weight"] = (weight << 4) | (weight >> 4)
    elif damage == "zero point":
        tensors[f"{O_PROJ}.weight"] = weight ^ 0x88
    elif damage == "scale transposed":
        tensors[f"{O_PROJ}.weight_scale"] = scale.T.reshape(scale.shape).contiguous()
    else:
        tensors[f"{O_PROJ}.weight"] = weight.T.reshape(weight.shape).contiguous()
    altered = _altered(artifact, tmp_path / "altered", tensors)
    assert _differs(altered, quant) == [f"{O_PROJ}.weight"]
    ids = [5, 3, 8, 1]
    before, after = (
        open_session(str(each.directory), threads=1).prefill(ids) for each in (artifact, altered)
    )
    assert np.abs(before - after).max() > 1e-2 * before.std(), "logits do not show it"


def test_a_pre_quant_scale_counts(int4: tuple[Quantized, Artifact], tmp_path: Path) -> None:
    quant, artifact = int4
    tensors = load_file(artifact.directory / "model.safetensors")
    scaled = [name for name in tensors if name.endswith("pre_quant_scale")]
    assert {name.split(".")[-2] for name in scaled} == {"o_proj", "down_proj"}, (
        "TensorRT-LLM asks for it where it does not join matrices, and nowhere else"
    )
    name = f"{O_PROJ}.pre_quant_scale"
    twice = _altered(artifact, tmp_path / "twice", {**tensors, name: tensors[name] * 2})
    with pytest.raises(PackageError, match="pre_quant_scale is not 1"):
        _differs(twice, quant)
    before, after = (
        open_session(str(each.directory), threads=1).prefill([5, 3, 8]) for each in (artifact, twice)
    )
    assert np.abs(before - after).max() > 1e-2 * before.std()
    without = {key: tensor for key, tensor in tensors.items() if key != name}
    missing = _altered(artifact, tmp_path / "missing", without)
    with pytest.raises(PackageError, match="pre_quant_scale is missing: a loader of W4A16_AWQ asks for it"):
        open_session(str(missing.directory))
    with pytest.raises(PackageError, match="pre_quant_scale is missing"):
        _differs(missing, quant)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"quant_algo": "W8A16"}, "differ in quant_algo"),
        ({"ignore": []}, "differ in exclude_modules"),
        ({"group_size": 128}, "differ in group_size"),
    ],
)
def test_both_statements_say_the_same(
    change: dict[str, Any], said: str, int4: tuple[Quantized, Artifact], tmp_path: Path
) -> None:
    directory = tmp_path / "out"
    shutil.copytree(int4[1].directory, directory)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= change
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(PackageError, match=said):
        open_session(str(directory))


def test_a_statement_that_is_not_the_files(int4: tuple[Quantized, Artifact], tmp_path: Path) -> None:
    quant, artifact = int4
    tensors = load_file(artifact.directory / "model.safetensors")
    floats = {key: tensor for key, tensor in tensors.items() if not key.startswith(f"{O_PROJ}.")}
    floats[f"{O_PROJ}.weight"] = torch.zeros(128, 128, dtype=torch.float16)
    with pytest.raises(
        PackageError, match=r"o_proj.weight is torch.float16, and the statement says of it W4A16_AWQ"
    ):
        _differs(_altered(artifact, tmp_path / "float", floats), quant)


def test_several_schemes_and_floats(tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "model", "llama", SMALL))
    recipe = {"*.mlp.*": "fp8", "*.o_proj": "none", "*.1.mlp.down_proj": "int8"}
    quant = quantize(model, "int4-g128", overrides=recipe, out=tmp_path / "codes")
    artifact = huggingface.write(quant, tmp_path / "out", "modelopt")
    said = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert said["quant_algo"] == "MIXED_PRECISION"
    layers = said["quantized_layers"]
    assert layers["model.layers.1.mlp.down_proj"] == {"quant_algo": "W8A16"}
    assert layers["model.layers.0.self_attn.q_proj"]["group_size"] == 128
    assert O_PROJ not in layers
    assert {"lm_head", O_PROJ} <= set(said["exclude_modules"])
    assert _differs(artifact, quant) == []
    assert np.isfinite(open_session(str(tmp_path / "out"), threads=1).prefill([5, 3, 8])).all()


def test_what_is_loaded_as_one_is_of_one_scheme_and_one_scale(tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "model", "llama", SMALL))
    quant = quantize(model, "int4-g64", overrides={"*.k_proj": "int8"}, out=tmp_path / "codes")
    with pytest.raises(SchemeError, match=r"q_proj: int4-g64, k_proj: int8.*as one matrix"):
        huggingface.write(quant, tmp_path / "out", "modelopt")


@pytest.mark.parametrize("rounding", ["rtn", "gptq"])
def test_nvfp4_has_one_scale_for_what_is_loaded_as_one(rounding: str, tmp_path: Path) -> None:
    """Servers take the largest weight_scale_2 for all; it has to be everyone's own."""
    model = load(write_model(tmp_path / "model", "llama", SMALL))
    calibration = Calibration(sequences=2, length=32) if rounding == "gptq" else None
    quant = quantize(model, "nvfp4", rounding=rounding, calibration=calibration, out=tmp_path / "codes")
    blocks = {}
    for name in quant:
        tensor = quant[name]
        if isinstance(tensor, QuantTensor) and tensor.scale_codes is not None:
            blocks[name.removeprefix("model.layers.0.").removesuffix(".weight")] = float(
                tensor.scale_codes.block[0]
            )
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        place = "self_attn" if "q_proj" in group else "mlp"
        assert len({blocks[f"{place}.{name}"] for name in group}) == 1
    assert blocks["self_attn.o_proj"] != blocks["self_attn.q_proj"]
    huggingface.write(quant, tmp_path / "out", "modelopt")


@pytest.fixture(scope="module", params=["fp8-static", "nvfp4-w4a4"])
def calibrated(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Quantized, Artifact]:
    work = tmp_path_factory.mktemp(request.param)
    model = load(write_model(work / "model", "llama", SMALL))
    few = Calibration(sequences=2, length=32)
    quant = quantize(model, request.param, calibration=few, out=work / "codes")
    return quant, huggingface.write(quant, work / "out", "modelopt")


def test_what_is_loaded_as_one_has_one_scale_and_one_of_its_inputs(
    calibrated: tuple[Quantized, Artifact], tmp_path: Path
) -> None:
    """Of several a server takes the largest, and rounds the codes of FP8 once more."""
    quant, artifact = calibrated
    assert not _differs(artifact, quant)
    tensors = load_file(artifact.directory / "model.safetensors")
    whole = "weight_scale" if quant.scheme.bits == 8 else "weight_scale_2"
    for group in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")):
        base = "model.layers.1." + ("self_attn" if "q_proj" in group else "mlp")
        for suffix in (whole, "input_scale"):
            assert len({tensors[f"{base}.{name}.{suffix}"].item() for name in group}) == 1
    ids = [5, 3, 8, 1]
    before = open_session(str(artifact.directory), threads=1).prefill(ids)
    plain = open_session(str(artifact.directory), inputs=False, threads=1).prefill(ids)
    assert np.abs(before - plain).max() > 1e-3 * plain.std(), "inputs are not rounded"
    name = "model.layers.1.self_attn.k_proj"
    for suffix in (whole, "input_scale"):
        other = {**tensors, f"{name}.{suffix}": tensors[f"{name}.{suffix}"] * 2}
        with pytest.raises(
            PackageError, match=rf"{suffix} is .* and that of .* as one matrix, under the larger"
        ):
            open_session(str(_altered(artifact, tmp_path / suffix, other).directory))
    zero = {**tensors, f"{O_PROJ}.input_scale": tensors[f"{O_PROJ}.input_scale"] * 0}
    with pytest.raises(PackageError, match=r"o_proj\.input_scale is 0\.0; a step is more than 0"):
        open_session(str(_altered(artifact, tmp_path / "zero", zero).directory))
    without = {key: tensor for key, tensor in tensors.items() if key != f"{O_PROJ}.input_scale"}
    with pytest.raises(
        PackageError, match=r"o_proj.input_scale is missing: a loader of (FP8|NVFP4) asks for it"
    ):
        open_session(str(_altered(artifact, tmp_path / "without", without).directory))


@pytest.mark.parametrize("damage", ["codes", "scale", "transposed"])
def test_a_mutation_of_calibrated_floats_shows(
    damage: str, calibrated: tuple[Quantized, Artifact], tmp_path: Path
) -> None:
    quant, artifact = calibrated
    tensors = load_file(artifact.directory / "model.safetensors")
    weight, key = tensors[f"{O_PROJ}.weight"], f"{O_PROJ}.weight"
    if damage == "codes":
        raw = weight.view(torch.uint8)
        raw = raw ^ 1 if quant.scheme.bits == 8 else (raw << 4) | (raw >> 4)
        tensors[key] = raw.view(weight.dtype)
    elif damage == "scale":
        key = f"{O_PROJ}.weight_scale"
        tensors[key] = tensors[key] * 2 if quant.scheme.bits == 8 else tensors[key].flip(0).contiguous()
    else:
        tensors[key] = weight.view(torch.uint8).T.reshape(weight.shape).contiguous().view(weight.dtype)
    assert _differs(_altered(artifact, tmp_path, tensors), quant) == [f"{O_PROJ}.weight"]


def test_scales_that_others_left_apart_are_refused(tmp_path: Path) -> None:
    """ModelOpt keeps a scale for each of the matrices that servers join; another file of them would be rounded once more."""
    quant = quantize(load(GOLDEN / "fp8"), out=tmp_path / "codes")
    path = tmp_path / "apart"
    shutil.copytree(GOLDEN / "fp8", path)
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.weight_scale"] /= 2
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    apart = quantize(load(path), out=tmp_path / "codes-apart")
    assert apart.scheme == quant.scheme
    with pytest.raises(
        SchemeError, match=r"fp8-static under .* as one matrix\. What fits: the original model"
    ):
        huggingface.write(apart, tmp_path / "out", "modelopt")
    with pytest.raises(SchemeError, match="What fits: the original model"):
        huggingface.write(apart, tmp_path / "out", "compressed-tensors")


def test_experts_are_what_a_kernel_takes(tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "model", "mixtral", SMALL))
    for scheme in ("int4-g64", "fp8"):
        quant = quantize(model, scheme, out=tmp_path / scheme)
        with pytest.raises(ModelError, match=r"routed experts.*no loader.*What fits: int8, nvfp4"):
            huggingface.write(quant, tmp_path / "out", "modelopt")
    for scheme in ("int8", "nvfp4"):
        quant = quantize(model, scheme, out=tmp_path / scheme)
        artifact = huggingface.write(quant, tmp_path / f"out-{scheme}", "modelopt")
        said = json.loads((artifact.directory / "hf_quant_config.json").read_text())["quantization"]
        assert "model.layers.0.block_sparse_moe.gate" in said["exclude_modules"]
        assert _differs(artifact, quant) == []


def test_floats_that_no_kernel_reads_keep_the_models_type(tmp_path: Path) -> None:
    """Scales of INT8 and INT4 become the model's type in a server, in which they are exact as float16; FP8's stay float32."""
    written = write_model(tmp_path / "model", "llama", SMALL, dtype="BF16")
    said = json.loads((written / "config.json").read_text()) | {"dtype": "bfloat16"}
    (written / "config.json").write_text(json.dumps(said))
    model = load(written)
    for scheme, dtype in (("int8", "float16"), ("fp8", "bfloat16")):
        quant = quantize(model, scheme, out=tmp_path / scheme)
        huggingface.write(quant, tmp_path / f"out-{scheme}", "modelopt")
        config = json.loads((tmp_path / f"out-{scheme}" / "config.json").read_text())
        assert config["dtype"] == dtype


def test_what_is_refused_is_named(tmp_path: Path) -> None:
    device = target("nvidia")
    for name, why in {
        "nf4": "unpacked in memory",
        "int4-g32": "groups of 64 and 128",
        "int4-g64-asym": "no zero points",
        "int8-g32": "one scale a row",
        "w8a8": "calibrated step",
        "int3-g64": "4 and 8 bits",
        "q4_k": "no super-blocks",
        "mxfp4": "MXFP4",
    }.items():
        answer = device.carries(SCHEMES[name])
        assert isinstance(answer, Refused), name
        assert why in answer.reason
        assert not isinstance(device.carries(SCHEMES[answer.nearest]), Refused)
    encoder = load(write_model(tmp_path / "bert", "bert", {}))
    with pytest.raises(ModelError, match="an encoder"):
        huggingface.write(quantize(encoder, "int8", out=tmp_path / "codes"), tmp_path / "out", "modelopt")
    odd = QuantTensor(
        np.zeros((3, 32), np.uint8), 4, 64, np.ones((3, 1), np.float16), 64, SCHEMES["int4-g64"].codebook()
    )
    with pytest.raises(SchemeError, match="3 rows, of which W4A16_AWQ packs two"):
        modelopt.parts("m", odd, SCHEMES["int4-g64"])


def test_a_float8_cache(tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "model", "llama", SMALL))
    quant = quantize(model, "int8", out=tmp_path / "codes")
    (tmp_path / "out").mkdir()
    device = Nvidia(kv_cache="kv-fp8")
    artifact = device.export(quant, tmp_path / "out")
    assert device.cache == "kv-fp8"
    said = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert said["kv_cache_quant_algo"] == "FP8"
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    steps = {name: float(tensor) for name, tensor in tensors.items() if name.endswith(("k_scale", "v_scale"))}
    assert steps == {
        f"model.layers.{layer}.self_attn.{x}_proj.{x}_scale": 1.0 for layer in (0, 1) for x in "kv"
    }
    assert "--kv-cache-dtype fp8" not in device.card(artifact), "vLLM does not load W8A16"
    floats = quantize(model, "none", out=tmp_path / "floats")
    with pytest.raises(SchemeError, match="kv-cache-dtype fp8 of the server"):
        device.export(floats, tmp_path / "floats-out")
    with pytest.raises(TapeoutError, match="'kv-int8' is not a cache of target nvidia"):
        Nvidia(kv_cache="kv-int8")  # type: ignore[arg-type]


def test_inputs_are_rounded_to_the_nearest_level() -> None:
    """The loader's and the reference's rounding, each written for itself, against the levels one by one."""
    from tapeout.targets.modelopt_loader import _float8_a_token

    x = torch.from_numpy(np.random.default_rng(3).standard_normal((4, 96)).astype(np.float32)) * 7
    x[1] = 0
    levels = np.sort(E4M3[np.isfinite(E4M3)].astype(np.float64))
    step = np.maximum(np.abs(x.numpy()).max(1, keepdims=True) / np.float32(448), np.float32(1 / (448 * 512)))
    scaled = (x.numpy() / step).astype(np.float64)
    nearest = levels[np.abs(scaled[..., None] - levels).argmin(-1)]
    for rounded in (_float8_a_token(x), round_e4m3(x)):
        np.testing.assert_allclose(rounded.numpy(), nearest * step, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("scheme", "servers"),
    [
        ("int4-g64", {"trtllm-serve"}),
        ("fp8", {"trtllm-serve", "vllm serve"}),
        ("fp8-static", {"trtllm-serve", "vllm serve", "sglang.launch_server"}),
        ("nvfp4-w4a4", {"trtllm-serve", "vllm serve", "sglang.launch_server"}),
        ("w8a8-static", set()),
    ],
)
def test_the_card_names_servers_that_load_it(scheme: str, servers: set[str], tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "model", "llama", SMALL))
    calibration = Calibration(sequences=2, length=32) if SCHEMES[scheme].calibrated else None
    quant = quantize(model, scheme, calibration=calibration, out=tmp_path / "codes")
    (tmp_path / "out").mkdir()
    device = Nvidia()
    artifact = device.export(quant, tmp_path / "out")
    card = device.card(artifact)
    known = {"trtllm-serve", "vllm serve", "sglang.launch_server"}
    assert {name for name in known if name in card} == servers
    assert ("[Service]" in card) == ("docker run" in card) == bool(servers)
    if servers:
        assert f"--max_seq_len {artifact.context}" in card
    assert any("loaded by" in note for note in artifact.notes)


def test_a_cut_file_is_named(int4: tuple[Quantized, Artifact], tmp_path: Path) -> None:
    quant, artifact = int4
    shutil.copytree(artifact.directory, tmp_path / "cut")
    whole = (artifact.directory / "model.safetensors").read_bytes()
    (tmp_path / "cut" / "model.safetensors").write_bytes(whole[:-100])
    with pytest.raises(PackageError, match="cannot be read"):
        _differs(replace(artifact, directory=tmp_path / "cut"), quant)


def test_shards_hold_what_one_file_holds(int4: tuple[Quantized, Artifact], tmp_path: Path) -> None:
    quant, artifact = int4
    cut = huggingface.write(quant, tmp_path, "modelopt", max_shard_bytes=100_000, threads=1)
    many = {
        name: tensor
        for path in sorted(tmp_path.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }
    one = load_file(artifact.directory / "model.safetensors")
    assert many.keys() == one.keys()
    assert all(torch.equal(many[name], one[name]) for name in one)
    assert not _differs(cut, quant)
