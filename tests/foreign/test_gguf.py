"""GGUF files that llama.cpp's tools wrote, against gguf's own dequantization; and our own files read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tokenizers import Tokenizer

from tapeout.errors import ModelError
from tapeout.exporters.gguf import pretokenizers, write
from tapeout.models import load
from tapeout.models import pretokenizers as ours
from tapeout.quantize import SCHEMES, foreign, quantize
from tapeout.validate import corpus

DATA = Path(__file__).parent / "data" / "gguf"
Call = Callable[..., Any]


@pytest.mark.parametrize(
    ("name", "schemes"),
    [
        ("k-types", {"q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "int8-g32", "int5-g32"}),
        ("legacy", {"int4-g32", "int5-g32", "int8-g32", "mxfp4"}),
        ("minimums", {"q4_1", "q5_1", "int8-g32"}),
        ("iq4_nl", {"iq4_nl", "int8-g32"}),
    ],
)
def test_blocks_mean_what_gguf_says(name: str, schemes: set[str], weight: Call) -> None:
    found = foreign.read(load(DATA / f"{name}.gguf"))
    assert {scheme.name for scheme in found.schemes.values()} == {*schemes, "none"}
    config = found.model.config
    blocks = {tensor.name: tensor for tensor in gguf.GGUFReader(DATA / f"{name}.gguf").tensors}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    for tensor, scheme in found.schemes.items():
        block = blocks[names.get_name(tensor, try_suffixes=(".weight",))]
        theirs = gguf.dequantize(block.data, block.tensor_type).reshape(found.model.specs[tensor].shape)
        if heads := {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(tensor.split(".")[-2]):
            theirs = theirs.reshape(heads, -1, 2, theirs.shape[1]).swapaxes(1, 2).reshape(theirs.shape)
        mine = found.model.checkpoint[tensor].float32() if scheme.kind == "none" else weight(found, tensor)
        np.testing.assert_array_equal(mine, theirs)


def test_rows_stand_as_in_the_original(originals: Call, weight: Call) -> None:
    """llama.cpp's converter permuted the rows of q and k."""
    found, original = foreign.read(load(DATA / "legacy.gguf")), originals("f16")
    for name in ("q_proj", "k_proj", "v_proj"):
        tensor = f"model.layers.0.self_attn.{name}.weight"
        wanted = original.checkpoint[tensor].float32()
        assert np.linalg.norm(weight(found, tensor) - wanted) / np.linalg.norm(wanted) < 0.12


def test_the_config_comes_back(originals: Call) -> None:
    model, original = load(DATA / "legacy.gguf"), originals("f16")
    assert model.name == "legacy"
    assert model.config == original.config
    assert model.specs == original.specs
    # The directory stands for the file from then on.
    assert load(model.directory).checkpoint.keys() == model.checkpoint.keys()


@pytest.mark.parametrize("length", [0, 3, 200, 20_000])
def test_a_truncated_file(tmp_path: Path, length: int) -> None:
    file = tmp_path / "cut.gguf"
    file.write_bytes((DATA / "legacy.gguf").read_bytes()[:length])
    with pytest.raises(ModelError, match=rf"cut.gguf \({length} bytes\) is not a whole GGUF file"):
        load(file)


def test_another_arch(tmp_path: Path) -> None:
    file = tmp_path / "other.gguf"
    raw = (DATA / "legacy.gguf").read_bytes()
    file.write_bytes(raw.replace(b"\5\0\0\0\0\0\0\0llama", b"\5\0\0\0\0\0\0\0gemma", 1))
    with pytest.raises(ModelError, match=r"arch 'gemma'.*'llama'"):
        load(file)


@pytest.mark.parametrize("model", ["arithmetic", "count"])
def test_our_own_file_comes_back(tmp_path: Path, model: str) -> None:
    quant = quantize(load(model), "int4-g32")
    artifact = write(quant, tmp_path, name="own", sliding_window="clamp")
    back = load(tmp_path / artifact.files[0])
    found = foreign.read(back)
    config = quant.model.config
    assert back.config.rope == config.rope
    assert (back.config.bos_token_id, back.config.eos_token_id) == (config.bos_token_id, config.eos_token_id)
    for name in quant:
        scheme = quant.schemes[name]
        assert (found.schemes[name].kind, found.schemes[name].bits) == (scheme.kind, scheme.bits)
        if scheme.kind == "none":
            np.testing.assert_array_equal(back.checkpoint[name].float32(), quant.float32(name))
        else:
            np.testing.assert_array_equal(found.parts(name)["codes"], np.asarray(quant[name].packed))
    mine, theirs = (Tokenizer.from_file(str(m.directory / "tokenizer.json")) for m in (back, quant.model))
    for text in corpus.hostile(count=1000):
        assert mine.encode(text).ids == theirs.encode(text).ids, text


def test_an_unknown_pre_tokenizer_asks_for_the_tokenizer(tmp_path: Path, make_model: Call) -> None:
    file = tmp_path / "file" / "odd.gguf"
    file.parent.mkdir()
    raw = (DATA / "legacy.gguf").read_bytes()
    assert raw.count(b"\5\0\0\0\0\0\0\0gpt-2") == 1
    file.write_bytes(raw.replace(b"\5\0\0\0\0\0\0\0gpt-2", b"\5\0\0\0\0\0\0\0gpt-9"))
    with pytest.raises(
        ModelError, match=r"pre-tokenizer 'gpt-9'.*Put the model's own tokenizer.json beside it: .*/file/"
    ):
        load(file)
    own = (make_model() / "tokenizer.json").read_bytes()
    (file.parent / "tokenizer.json").write_bytes(own)
    assert (load(file).directory / "tokenizer.json").read_bytes() == own


def test_the_names_of_pre_tokenizers_are_those_of_the_exporter() -> None:
    assert ours.NAMES == pretokenizers.NAMES


def test_a_linear_rope_and_llama3s_come_back(tmp_path: Path, make_model: Call) -> None:
    for name, scaling in {
        "linear": {"rope_type": "linear", "factor": 2.5},
        "llama3": {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }.items():
        model = load(make_model(name=name, rope_scaling=scaling, rope_theta=500000.0))
        artifact = write(quantize(model, SCHEMES["int8"]), tmp_path / f"{name}-gguf")
        assert load(artifact.directory / artifact.files[0]).config.rope == model.config.rope
