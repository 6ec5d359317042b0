"""bitsandbytes directories: the library's own bytes for the same codes, and what damages them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapeout.errors import ModelError
from tapeout.exporters import Artifact, huggingface
from tapeout.exporters.huggingface import bitsandbytes
from tapeout.generated import write_model
from tapeout.models import load
from tapeout.quantize import SCHEMES, Quantized, QuantTensor, quantize
from tapeout.quantize.scheme import NF4
from tapeout.quantize.tensor import pack

torch = pytest.importorskip("torch")
quantize_4bit = pytest.importorskip("bitsandbytes.functional").quantize_4bit
load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file

SMALL: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
FIXTURES = Path(__file__).parents[1] / "foreign" / "data"
Q_PROJ = "model.layers.0.self_attn.q_proj"
STATE = "weight.quant_state.bitsandbytes__nf4"


def test_bytes_by_hand() -> None:
    codes = (np.arange(64, dtype=np.uint8) // 4)[None]
    tensor = QuantTensor(pack(codes, 4), 4, 64, np.ones((1, 1), np.float16), 64, NF4)
    swapped = codes[:, ::2] << 4 | codes[:, 1::2]  # the even element is the high nibble
    found = bitsandbytes.parts("m", tensor, SCHEMES["nf4"])["m.weight"]
    assert found.rows(slice(None)).tobytes().hex() == swapped.tobytes().hex()
    uneven = QuantTensor(
        pack(np.arange(64, dtype=np.uint8)[None] % 15, 4), 4, 64, np.ones((1, 1), np.float16), 64, NF4
    )
    assert (
        bitsandbytes.parts("m", uneven, SCHEMES["nf4"])["m.weight"].rows(slice(0, 1))[0, :8].tobytes().hex()
        == "0123456789abcde0"
    )


def test_the_library_quantizes_to_the_same_bytes() -> None:
    rng = np.random.default_rng(7)
    codes = rng.integers(0, 16, (24, 256), np.uint8)
    codes[:, ::64] = 15  # the level 1: a block's largest is its scale
    scale = rng.uniform(0.01, 0.02, (24, 4)).astype(np.float16)
    tensor = QuantTensor(pack(codes, 4), 4, 256, scale, 64, NF4)
    packed, state = quantize_4bit(torch.from_numpy(tensor.dequantize()), blocksize=64, quant_type="nf4")
    wanted = {"weight": packed} | {
        f"weight.{name}": each for name, each in state.as_dict(packed=True).items()
    }
    found = {
        name.removeprefix("m."): part
        for name, part in bitsandbytes.parts("m", tensor, SCHEMES["nf4"]).items()
    }
    assert found.keys() == wanted.keys()
    for name, theirs in wanted.items():
        ours = found[name].rows(slice(None))
        if name == STATE:
            assert json.loads(ours.tobytes()) == json.loads(theirs.numpy().tobytes()) | {"dtype": "float16"}
        else:
            assert found[name].shape == tuple(theirs.shape)
            assert ours.tobytes() == theirs.numpy().tobytes(), name


@pytest.mark.parametrize("name", ["bnb-nf4", "bnb-nf4-dq", "bnb-nf4-f32"])
def test_a_checkpoint_of_the_library_comes_out_as_it_went_in(name: str, tmp_path: Path) -> None:
    quant = quantize(load(FIXTURES / name), out=tmp_path / "codes")
    huggingface.write(quant, tmp_path / "out", "bitsandbytes")
    theirs = load_file(FIXTURES / name / "model.safetensors")
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        if key.endswith(STATE):
            states = [json.loads(each.numpy().tobytes()) for each in (ours[key], tensor)]
            assert states[0] == states[1] | {"dtype": "float16"}
        elif tensor.is_floating_point() and ".weight." not in key:
            assert ours[key].dtype == torch.float16
            assert torch.equal(ours[key], tensor.half())
        else:
            assert ours[key].shape == tensor.shape
            assert ours[key].numpy().tobytes() == tensor.numpy().tobytes(), key


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> tuple[Quantized, Artifact]:
    work = tmp_path_factory.mktemp("double")
    quant = quantize(load(write_model(work / "model", "llama", SMALL)), "nf4-dq", out=work / "codes")
    return quant, huggingface.write(quant, work / "out", "bitsandbytes")


@pytest.mark.parametrize("damage", ["none", "nibbles", "scale", "transposed"])
def test_a_mutation_shows(damage: str, double: tuple[Quantized, Artifact], tmp_path: Path) -> None:
    quant, artifact = double
    tensors = load_file(artifact.directory / "model.safetensors")
    weight = tensors[f"{Q_PROJ}.weight"]
    if damage == "nibbles":
        tensors[f"{Q_PROJ}.weight"] = (weight << 4) | (weight >> 4)
    elif damage == "scale":
        tensors[f"{Q_PROJ}.weight.absmax"][3] ^= 1
    elif damage == "transposed":
        tensors[f"{Q_PROJ}.weight"] = weight.reshape(128, -1).T.reshape(weight.shape).contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((artifact.directory / "config.json").read_bytes())
    differs = []
    for name, found in huggingface.read_codes(replace(artifact, directory=tmp_path), quant):
        wanted = quant[name]
        if isinstance(found, QuantTensor) and isinstance(wanted, QuantTensor):
            same = np.array_equal(found.packed, wanted.packed) and np.array_equal(found.scale, wanted.scale)
            differs += [] if same else [name]
    assert differs == ([] if damage == "none" else [f"{Q_PROJ}.weight"])


@pytest.mark.parametrize(("family", "why"), [("mixtral", "routed experts"), ("gemma2", "float16")])
def test_what_transformers_does_not_run_is_refused(family: str, why: str, tmp_path: Path) -> None:
    quant = quantize(load(write_model(tmp_path / "model", family, SMALL)), "nf4", out=tmp_path / "codes")
    with pytest.raises(ModelError, match=why):
        huggingface.write(quant, tmp_path / "out", "bitsandbytes")
