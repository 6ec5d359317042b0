"""Checkpoints that the formats' own libraries made (``scripts/fixtures``), and what they were made from."""

from __future__ import annotations

import json
import runpy
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tapeout.generated import write_model
from tapeout.models import Model, load
from tapeout.models.checkpoint import read_header
from tapeout.quantize import foreign, lattice

DATA = Path(__file__).parent / "data"
Floats = npt.NDArray[np.float32]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """``checkpoint("gptq-v1-g32", bits=3)`` copies a fixture and changes its quantization_config."""

    def make(name: str, **fields: Any) -> Path:
        to = tmp_path / name
        shutil.copytree(DATA / name, to, copy_function=shutil.copyfile)
        config = json.loads((to / "config.json").read_text())
        if fields:
            config["quantization_config"] = {**config["quantization_config"], **fields}
            (to / "config.json").write_text(json.dumps(config))
        return to

    return make


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """``originals("bf16")``: the float model that fixtures were made from; its weights come from a seed."""
    made: dict[str, Model] = {}

    def make(kind: str) -> Model:
        if kind not in made:
            base = runpy.run_path(str(Path(__file__).parents[2] / "scripts" / "fixtures" / "base.py"))
            few = {} if kind == "f16" else {"vocab_size": 32, "eos_token_id": 2}
            to = tmp_path_factory.mktemp("base") / kind
            made[kind] = load(write_model(to, "llama", base["SMALL"] | few, dtype=kind.upper()))
        return made[kind]

    return make


def _oracle(directory: Path) -> Mapping[str, Any]:
    """The library's own dequantized weights, some of them."""
    return read_header(directory / "oracle.safetensors")[0]


def _weight(found: foreign.Foreign, name: str) -> Floats:
    """What the codes of a tensor mean; its parts are those that a store has."""
    shape, scheme, parts = found.model.specs[name].shape, found.schemes[name], found.parts(name)
    kinds = {"|u1": "U8", "<f2": "F16", "<f4": "F32"}
    assert {part: (kinds[array.dtype.str], array.shape) for part, array in parts.items()} == lattice.layout(
        scheme, *shape
    )
    return lattice.assemble(parts, scheme, shape[1]).dequantize()


def _rewrite(file: Path, change: Callable[[dict[str, tuple[str, list[int], bytes]]], None]) -> None:
    """Change the tensors of a safetensors file, given by name as dtype, shape and bytes."""
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header.pop("__metadata__", None)
    tensors = {
        name: (entry["dtype"], entry["shape"], body[slice(*entry["data_offsets"])])
        for name, entry in header.items()
    }
    change(tensors)
    at, entries = 0, {}
    for name, (dtype, shape, data) in tensors.items():
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    file.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values()))


@pytest.fixture
def oracle() -> Callable[[Path], Mapping[str, Any]]:
    return _oracle


@pytest.fixture
def weight() -> Callable[[foreign.Foreign, str], Floats]:
    return _weight


@pytest.fixture
def rewrite() -> Callable[[Path, Callable[[dict[str, tuple[str, list[int], bytes]]], None]], None]:
    return _rewrite
