"""Whole files: what llama.cpp and the format owner's library read from them, and that the codes are those of the store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapeout.errors import ModelError, OutputError, PackageError, SchemeError
from tapeout.exporters import Artifact, Exact, Refused, Rounded, gguf
from tapeout.exporters.gguf.layout import lay_out
from tapeout.models import load
from tapeout.quantize import SCHEMES, Calibration, Quantized, QuantTensor, quantize

CARRIED = [name for name, scheme in SCHEMES.items() if not isinstance(gguf.carries(scheme), Refused)]


@pytest.fixture
def quantized(make_model: Callable[..., Path]) -> Callable[..., Quantized]:
    """``quantized("nf4", attention_bias=True)``."""

    def make(
        scheme: str, model_type: str = "llama", overrides: dict[str, str] | None = None, **fields: Any
    ) -> Quantized:
        wide = 2 if SCHEMES[scheme].scales == "super" else 1
        fields = {"hidden_size": 128 * wide, "intermediate_size": 256 * wide, "vocab_size": 300} | fields
        calibration = Calibration(sequences=2, length=32) if SCHEMES[scheme].calibrated else None
        model = load(make_model(model_type, **fields))
        (model.directory / "calibration.txt").write_text(" ".join(map(str, range(99))))
        return quantize(model, scheme, overrides=overrides, calibration=calibration)

    return make


def open_file(artifact: Artifact, index: int = 0) -> Any:
    from gguf import GGUFReader

    return GGUFReader(artifact.directory / artifact.files[index])


def parts(tensor: QuantTensor) -> list[np.ndarray]:
    minimum = [] if tensor.minimum is None else [tensor.minimum.codes, tensor.minimum.block]
    return [tensor.codes(), tensor.scale, *minimum]


def wrong(artifact: Artifact, quant: Quantized) -> list[str]:
    """Names of the tensors that do not come back as they went in."""
    found = dict(gguf.read_codes(artifact, quant))
    assert found.keys() <= quant.keys()
    names = []
    for name, tensor in found.items():
        expected = quant[name]
        if isinstance(tensor, QuantTensor):
            assert isinstance(expected, QuantTensor)
            same = all(np.array_equal(a, b) for a, b in zip(parts(tensor), parts(expected), strict=True))
        else:
            same = np.array_equal(tensor, quant.float32(name))
        if not same:
            names.append(name)
    return names


@pytest.mark.parametrize("scheme", CARRIED)
def test_the_codes_come_back(quantized, tmp_path: Path, scheme: str) -> None:
    quant = quantized(scheme, attention_bias=True)
    artifact = gguf.write(quant, tmp_path / "out")
    assert wrong(artifact, quant) == []
    assert artifact.containers.keys() == quant.keys()
    carry = gguf.carries(SCHEMES[scheme])
    assert isinstance(carry, Rounded if scheme.startswith("nf4") else Exact)
    container = artifact.containers["model.layers.0.mlp.up_proj.weight"]
    assert container == ("BF16" if scheme == "none" else carry.container.split(",")[0])
    assert artifact.files == (f"tiny-{container}.gguf",)
    found = gguf.describe(tmp_path / "out" / artifact.files[0])["tensors"]
    assert found[container] >= 14
    assert sum(found.values()) == len(quant) + (14 if scheme.startswith("nvfp4") else 0)


@pytest.mark.parametrize("scheme", [name for name in CARRIED if not name.startswith("nf4")])
def test_the_format_owner_reads_the_same_weights(quantized, tmp_path: Path, scheme: str) -> None:
    from gguf import get_tensor_name_map, quants
    from gguf.constants import MODEL_ARCH

    quant = quantized(scheme)
    tensors = {t.name: t for t in open_file(gguf.write(quant, tmp_path)).tensors}
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, 2)
    for name in quant:
        tensor = tensors[names.get_name(name, try_suffixes=(".weight",))]
        weight = quant.float32(name)
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            weight = interleaved(weight, 8 if "q_proj" in name else 4)
        found = quants.dequantize(tensor.data, tensor.tensor_type)
        if tensor.tensor_type.name == "NVFP4":  # multiplied last, so rounded at another place
            found = found * tensors[tensor.name.replace("weight", "scale")].data
            assert (np.abs(found - weight) <= 2**-22 * np.abs(weight)).all()
        else:
            assert np.array_equal(found, weight), name


@pytest.mark.parametrize("scheme", [name for name in CARRIED if name != "none"])
def test_llama_cpp_computes_with_every_type(quantized, tmp_path: Path, llama_cpp_logits, scheme: str) -> None:
    """As with the same weights in F32, but for inputs rounded to int8 (2.5 % of the logits' deviation, formats.md)."""
    quant = quantized(scheme, dtype="F32")
    files = [gguf.write(quant, tmp_path / f"{twin}", as_float32=twin) for twin in (False, True)]
    ids = np.random.default_rng(0).integers(0, 256, 20).tolist()
    got, exact = (llama_cpp_logits(file.directory / file.files[0], ids) for file in files)
    # Weights in a wrong order give other logits altogether, 140 %; NF4's own rounding adds half a percent a matrix.
    assert np.sqrt(((got - exact) ** 2).mean()) / exact.std() < 0.06


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row i of the first half of a head goes to 2 i, of the second half to 2 i + 1; element by element."""
    dim = len(weight) // heads
    out = np.empty_like(weight)
    for head in range(heads):
        for i in range(dim // 2):
            out[head * dim + 2 * i] = weight[head * dim + i]
            out[head * dim + 2 * i + 1] = weight[head * dim + dim // 2 + i]
    return out


def test_the_same_bytes_for_any_number_of_threads(
    quantized, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tapeout.exporters import steps

    quant = quantized("int4-g32-asym")
    whole = gguf.write(quant, tmp_path / "1", threads=1)
    # Tasks and steps of a few rows, so that there are many.
    monkeypatch.setattr(steps, "_TASK_WEIGHTS", 1000)
    monkeypatch.setattr(steps, "_STEP_WEIGHTS", 300)
    cut = gguf.write(quant, tmp_path / "3", threads=3)
    assert (tmp_path / "1" / whole.files[0]).read_bytes() == (tmp_path / "3" / cut.files[0]).read_bytes()
    assert str(tmp_path).encode() not in (tmp_path / "1" / whole.files[0]).read_bytes()


def test_metadata(quantized, tmp_path: Path) -> None:
    quant = quantized("int4-g64", head_dim=32, rope_theta=5e5, rms_norm_eps=1e-6)
    (quant.model.directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    reader = open_file(gguf.write(quant, tmp_path / "out"))
    expected = {
        "general.architecture": "llama",
        "general.name": "tiny",
        "general.license": "apache-2.0",
        "general.file_type": 2,
        "general.quantization_version": 2,
        "tapeout.scheme": "int4-g64",
        "tapeout.rounding": "rtn",
        "tapeout.source_sha256": quant.source_sha256,
        "tapeout.codes_sha256": quant.digest,
        "llama.context_length": 256,
        "llama.embedding_length": 128,
        "llama.block_count": 2,
        "llama.feed_forward_length": 256,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 4,
        "llama.attention.key_length": 32,
        "llama.attention.value_length": 32,
        "llama.attention.layer_norm_rms_epsilon": np.float32(1e-6),
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 5e5,
        "llama.vocab_size": 300,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.eos_token_id": 256,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: reader.get_field(key).contents() for key in expected} == expected


def test_rope_scaling(quantized, tmp_path: Path) -> None:
    linear = quantized("none", rope_scaling={"rope_type": "linear", "factor": 4.0}, name="linear")
    reader = open_file(gguf.write(linear, tmp_path / "linear"))
    assert reader.get_field("llama.rope.scaling.type").contents() == "linear"
    assert reader.get_field("llama.rope.scaling.factor").contents() == 4
    scaling = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    llama3 = quantized("none", rope_scaling=scaling, name="llama3", head_dim=16)
    artifact = gguf.write(llama3, tmp_path / "llama3")
    factors = next(t for t in open_file(artifact).tensors if t.name == "rope_freqs.weight").data
    # transformers gives the inverse frequencies after scaling.
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(head_dim=16, rope_parameters={**scaling, "rope_theta": 10000.0})
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    assert factors == pytest.approx(plain / scaled.numpy(), rel=1e-6)
    assert wrong(artifact, llama3) == []


def test_shards_are_read_by_llama_cpp_and_by_the_reader(quantized, tmp_path: Path, llama_cpp_logits) -> None:
    quant = quantized("int4-g32")
    one = gguf.write(quant, tmp_path / "one")
    many = gguf.write(quant, tmp_path / "many", max_shard_bytes=100_000)
    count = len(many.files)
    assert count > 2
    assert many.files[0] == f"tiny-Q4_0-00001-of-{count:05d}.gguf"
    assert wrong(many, quant) == []
    readers = [open_file(many, i) for i in range(count)]
    assert [reader.get_field("split.no").contents() for reader in readers] == list(range(count))
    assert {reader.get_field("split.count").contents() for reader in readers} == {count}
    total = sum(len(reader.tensors) for reader in readers)
    assert {reader.get_field("split.tensors.count").contents() for reader in readers} == {total}
    ids = list(range(40))
    first, whole = (llama_cpp_logits(a.directory / a.files[0], ids) for a in (many, one))
    assert np.array_equal(first, whole)


def test_rows_that_are_no_whole_blocks_fall_back_to_f16(quantized, tmp_path: Path, llama_cpp_logits) -> None:
    quant = quantized("int8", intermediate_size=48, dtype="F32")
    artifact = gguf.write(quant, tmp_path / "out")
    name = "model.layers.1.mlp.down_proj.weight"
    assert artifact.containers[name] == "F16"
    assert artifact.containers["model.layers.1.mlp.up_proj.weight"] == "Q8_0"
    assert len(artifact.notes) == 2
    assert f"{name} is F16: its rows of 48 weights" in artifact.notes[1]
    assert np.array_equal(
        dict(gguf.read_codes(artifact, quant))[name], quant.float32(name).astype(np.float16)
    )
    assert np.isfinite(llama_cpp_logits(tmp_path / "out" / artifact.files[0], [1, 2, 3])).all()


def test_an_nf4_scale_that_would_be_subnormal_falls_back_to_f16(quantized, tmp_path: Path) -> None:
    quant = quantized("nf4")
    assert gguf.write(quant, tmp_path / "out").notes == ()
    name = "model.layers.0.mlp.up_proj.weight"
    scale = quant[name].scale
    path = next((quant.directory / "tensors").glob(f"{name}*"))
    whole = path.read_bytes()
    small = np.full_like(scale, 2.0**-9)  # 2^-9 / 123.25 is below 2^-14
    path.write_bytes(whole.replace(scale.tobytes(), small.tobytes()))
    artifact = gguf.write(quant, tmp_path / "small")
    assert artifact.containers[name] == "F16"
    assert "subnormal" in artifact.notes[0]


def test_as_float32_holds_the_weights_that_the_codes_are(quantized, tmp_path: Path) -> None:
    quant = quantized("nf4-dq")
    artifact = gguf.write(quant, tmp_path, as_float32=True)
    assert set(artifact.containers.values()) == {"F32"}
    assert artifact.files == ("tiny-F32.gguf",)
    assert wrong(artifact, quant) == []


@pytest.mark.parametrize("as_float32", [True, False])
def test_the_first_layers_only(quantized, tmp_path: Path, llama_cpp_logits, as_float32: bool) -> None:
    quant = quantized("int4-g32", num_hidden_layers=3)
    artifact = gguf.write(quant, tmp_path / "one", layers=1, as_float32=as_float32)
    assert open_file(artifact).get_field("llama.block_count").contents() == 1
    assert wrong(artifact, quant) == []
    assert not any(name.startswith("model.layers.1.") for name in artifact.containers)
    assert llama_cpp_logits(artifact.directory / artifact.files[0], [1, 2]).shape == (2, 300)
    for layers in (0, 4):
        with pytest.raises(ModelError, match="has 1 … 3"):
            gguf.write(quant, tmp_path / "none", layers=layers)


def test_a_sliding_window_is_carried_or_clamped_or_does_not_matter(quantized, tmp_path: Path) -> None:
    quant = quantized("int8", "mistral", sliding_window=64, name="short")
    carried = gguf.write(quant, tmp_path / "carried")
    reader = open_file(carried)
    assert reader.get_field("general.architecture").contents() == "granite_swa"
    assert reader.get_field("granite_swa.attention.sliding_window").contents() == 64
    assert reader.get_field("granite_swa.attention.sliding_window_pattern").contents() == [True, True]
    assert carried.context == 256
    assert "granite_swa" in carried.notes[0]
    clamped = gguf.write(quant, tmp_path / "clamped", sliding_window="clamp")
    assert open_file(clamped).get_field("llama.context_length").contents() == clamped.context == 64
    assert "clamped from 256" in clamped.notes[0]
    long = quantized("int8", "mistral", sliding_window=256, name="long")
    free = gguf.write(long, tmp_path / "long")
    assert (free.context, free.notes) == (256, ())
    assert open_file(free).get_field("general.architecture").contents() == "llama"
    for artifact, of in ((carried, quant), (clamped, quant), (free, long)):
        assert wrong(artifact, of) == []


def test_the_ends_of_a_tied_head(quantized, tmp_path: Path) -> None:
    quant = quantized("int4-g32", tie_word_embeddings=True)
    artifact = gguf.write(quant, tmp_path)
    assert "output.weight" not in {tensor.name for tensor in open_file(artifact).tensors}
    assert wrong(artifact, quant) == []


def test_a_config_that_no_arch_expresses_is_named(quantized) -> None:
    quant = quantized("none")
    object.__setattr__(quant.model.config, "hidden_act", "gelu_pytorch_tanh")
    with pytest.raises(
        ModelError, match="hidden_act = gelu_pytorch_tanh is not expressible in GGUF arch 'llama'"
    ):
        lay_out(quant, sliding_window="carry", as_float32=False, layers=None)


def test_progress_and_a_name(quantized, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    artifact = gguf.write(quantized("int8"), tmp_path, name="other", progress=lambda *what: told.append(what))
    assert artifact.files == ("other-Q8_0.gguf",)
    assert open_file(artifact).get_field("general.name").contents() == "other"
    stage, done, total = told[-1]
    assert (stage, done) == ("export", total)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    for name in ("a/b", ".."):
        with pytest.raises(ModelError, match="name of a file"):
            gguf.write(quantized("int8", name="again"), tmp_path, name=name)


def test_a_place_that_cannot_be_written_says_so(quantized, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        gguf.write(quantized("int8"), tmp_path / "file" / "out")


def test_a_damaged_file_is_a_package_error(quantized, tmp_path: Path) -> None:
    quant = quantized("int4-g32")
    artifact = gguf.write(quant, tmp_path / "out")
    path = tmp_path / "out" / artifact.files[0]
    whole = path.read_bytes()
    for end in (0, 3, 20, 1000, len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:end])
        with pytest.raises(PackageError) as caught:
            list(gguf.read_codes(artifact, quant))
        assert "\n" not in str(caught.value)
    path.write_bytes(b"JUNK" + whole[4:])
    with pytest.raises(PackageError, match="not a whole GGUF file"):
        list(gguf.read_codes(artifact, quant))
    path.unlink()
    with pytest.raises(PackageError, match="cannot be read"):
        list(gguf.read_codes(artifact, quant))


def test_another_models_file_is_a_package_error(quantized, tmp_path: Path) -> None:
    quant = quantized("int4-g32", name="one")
    for fields, said in (
        (
            {"intermediate_size": 512},
            r"ffn_gate.weight is Q4_0 \[512, 128\] where Q4_0 \[256, 128\] is expected",
        ),
        ({"tie_word_embeddings": True}, "output.weight is missing"),
        ({"attention_bias": True}, "attn_k.bias is unexpected"),
    ):
        other = gguf.write(quantized("int4-g32", name="-".join(fields), **fields), tmp_path / "out")
        with pytest.raises(PackageError, match=said):
            list(gguf.read_codes(other, quant))


@pytest.mark.parametrize(
    "scheme", ["int4-g32", "int4-g64-asym", "int8", "nf4", "int2-g64", "mxfp4", "nvfp4", "q6_k", "q4_k"]
)
def test_one_changed_bit_of_a_file_is_found_in_its_tensor(quantized, tmp_path: Path, scheme: str) -> None:
    quant = quantized(scheme)
    artifact = gguf.write(quant, tmp_path / "out")
    path = tmp_path / "out" / artifact.files[0]
    whole = path.read_bytes()
    at = next(t.data_offset for t in open_file(artifact).tensors if t.name == "blk.1.attn_k.weight") + 777
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :])
    assert wrong(artifact, quant) == ["model.layers.1.self_attn.k_proj.weight"]


@pytest.mark.parametrize(
    ("scheme", "file_type"),
    [("q6_k", 18), ("q5_k", 16), ("q4_k", 14), ("q3_k", 11), ("q2_k", 21), ("mxfp4", 38), ("nvfp4", 39)],
)
def test_the_file_type_is_llama_cpps_nearest(quantized, tmp_path: Path, scheme: str, file_type: int) -> None:
    reader = open_file(gguf.write(quantized(scheme), tmp_path))
    assert reader.get_field("general.file_type").contents() == file_type


def test_the_bytes_of_super_blocks_are_counted(quantized, tmp_path: Path) -> None:
    quant = quantized("q4_k", vocab_size=272)
    artifact = gguf.write(quant, tmp_path)
    linear = 2 * (256 * (256 + 128 + 128 + 256) + 3 * 256 * 512) // 256 * 144
    int8 = (272 + 1) * 256 // 32 * 34  # the head, and a row of the embeddings
    norms = 5 * 256 * 4
    assert artifact.bytes_per_token == linear + int8 + norms


def test_what_a_user_has_to_know_of_a_type_is_noted_once(quantized, tmp_path: Path) -> None:
    assert gguf.carries(SCHEMES["int3-g64"]) == Exact("Q4_0, at 4.5 bits")
    notes = gguf.write(quantized("int3-g64", name="narrow"), tmp_path / "narrow").notes
    assert notes == ("the codes of int3-g64 are held as Q4_0: exactly, at 4.5 bits a weight",)
    notes = gguf.write(quantized("w8a8-static", name="static"), tmp_path / "static").notes
    assert len(notes) == 1
    assert "rounds the inputs of w8a8-static to int8 by itself" in notes[0]
    assert "the calibrated scales of the inputs are not in the file" in notes[0]


def test_a_scheme_that_gguf_does_not_carry_is_refused(quantized, tmp_path: Path) -> None:
    quant = quantized("int8", overrides={"*.down_proj": "fp8"})
    with pytest.raises(SchemeError, match=r"model.layers.0.mlp.down_proj.weight is fp8: .* What fits: int8"):
        gguf.write(quant, tmp_path)
    assert gguf.write(quant, tmp_path, as_float32=True).containers.keys() == quant.keys()


def test_nvfp4_rows_that_are_no_whole_blocks_of_64_fall_back_to_f16(quantized, tmp_path: Path) -> None:
    quant = quantized("nvfp4", intermediate_size=80)
    artifact = gguf.write(quant, tmp_path)
    assert artifact.containers["model.layers.0.mlp.down_proj.weight"] == "F16"
    assert "its rows of 80 weights are no whole blocks of 64" in artifact.notes[0]


def test_the_scale_of_an_nvfp4_tensor_is_read_back_with_it(quantized, tmp_path: Path) -> None:
    quant = quantized("nvfp4")
    artifact = gguf.write(quant, tmp_path / "out")
    path = tmp_path / "out" / artifact.files[0]
    whole = bytearray(path.read_bytes())
    at = next(t.data_offset for t in open_file(artifact).tensors if t.name == "blk.1.attn_k.scale")
    whole[at] ^= 1
    path.write_bytes(whole)
    assert wrong(artifact, quant) == ["model.layers.1.self_attn.k_proj.weight"]


def test_nvfp4_is_refused_where_llama_cpp_drops_the_scale_of_the_tensor(
    quantized, tmp_path: Path, llama_cpp_logits
) -> None:
    with pytest.raises(ModelError, match=r"embed_tokens.weight cannot be nvfp4 in GGUF: a lookup"):
        gguf.write(quantized("int8", overrides={"*embed_tokens": "nvfp4"}, name="embedding"), tmp_path)
    quant = quantized("nvfp4", "mistral", sliding_window=64, name="window")
    with pytest.raises(ModelError, match=r"arch granite_swa.* leaves out the scale of the tensor"):
        gguf.write(quant, tmp_path)
    artifact = gguf.write(quant, tmp_path, sliding_window="clamp")
    assert np.isfinite(llama_cpp_logits(tmp_path / artifact.files[0], [1, 2, 3])).all()
    # The head has a scale of its own, and llama.cpp reads it.
    head = quantized("nvfp4", overrides={"lm_head": "nvfp4"}, name="head", dtype="F32")
    files = [gguf.write(head, tmp_path / f"{twin}", as_float32=twin) for twin in (False, True)]
    got, exact = (llama_cpp_logits(file.directory / file.files[0], [1, 2, 3]) for file in files)
    assert np.sqrt(((got - exact) ** 2).mean()) / exact.std() < 0.06
