"""IREE: its own library's bytes for an archive, what comes back of it, and what damages it. Nothing is compiled here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensors import tensor_of

from tapeout.errors import ModelError, PackageError
from tapeout.exporters import Artifact, Refused, iree
from tapeout.exporters.iree import archive, blocks, mlir
from tapeout.generated import write_model
from tapeout.models import load
from tapeout.quantize import SCHEMES, Quantized, QuantTensor, quantize

runtime = pytest.importorskip("iree.runtime")

SMALL: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
CARRIED = [
    name
    for name, scheme in SCHEMES.items()
    if scheme.kind != "none" and not isinstance(iree.carries(scheme), Refused)
]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def made(
    work: Path,
    scheme: str = "int4-g32",
    family: str = "llama",
    fields: dict[str, Any] = SMALL,
    dtype: str = "BF16",
) -> tuple[Quantized, Artifact]:
    quant = quantize(
        load(write_model(work / "model", family, fields, dtype=dtype)), scheme, out=work / "codes"
    )
    return quant, iree.write(quant, work / "artifact", iree.Options(chunk=16))


# The archive


def test_header_by_hand() -> None:
    """By the layout in iree/schemas/parameter_archive.h: header, one entry, its name, and data at a multiple of 64."""
    layout = archive.lay_out({"a.b": 5})
    assert layout.header.hex(" ", 8) == (
        "4952504100000000 5800000000000000 0000000000000000 0000000000000000 0100000000000000 6000000000000000 "
        "4c00000000000000 ac00000000000000 0300000000000000 c000000000000000 0500000000000000 0000000000000000 "
        "4c00000000000000 0200000000000000 0000000000000000 0000000003000000 0000000000000000 0000000000000000 "
        "0000000040000000 0000000000000000 0000000005000000 00000000612e6200 0000000000000000 0000000000000000"
    )
    assert (layout.places, layout.end) == ({"a.b": 192}, 197)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=9))
def test_the_library_writes_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int]
) -> None:
    place, rng = tmp_path_factory.mktemp("archive"), np.random.default_rng(len(sizes))
    data = {f"layer.{at}.weight": rng.integers(0, 256, size, np.uint8) for at, size in enumerate(sizes)}
    runtime.save_archive_file(data, place / "theirs.irpa")
    layout = archive.lay_out({name: values.size for name, values in data.items()})
    ours = bytearray(layout.end)
    ours[: len(layout.header)] = layout.header
    for name, values in data.items():
        ours[layout.places[name] : layout.places[name] + values.size] = values.tobytes()
    theirs = (place / "theirs.irpa").read_bytes()
    assert theirs[: len(ours)] == ours
    assert not any(theirs[len(ours) :])  # it fills the last page
    (place / "ours.irpa").write_bytes(ours)
    found = archive.read(place / "ours.irpa")
    assert {name: values.tobytes() for name, values in found.items()} == {
        name: values.tobytes() for name, values in data.items()
    }


# Codes


def test_codes_by_hand() -> None:
    """Codes 0 0 1 1 2 2 …, less 8, as halves of a byte, the even element in the lower one."""
    tensor = tensor_of("int4-g32", (np.arange(32) // 2)[None], scale=np.ones((1, 1)))
    held = blocks.container(SCHEMES["int4-g32"]).codes(tensor)
    assert held.tobytes().hex() == "8899aabbccddeeff0011223344556677"


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(CARRIED), st.integers(0, 2**32 - 1))
def test_codes_come_back(name: str, seed: int) -> None:
    scheme, rng = SCHEMES[name], np.random.default_rng(seed)
    codes = rng.integers(0, 2**scheme.bits, (5, 256), np.uint8)
    groups = 256 // (scheme.group or 256)
    packed = blocks.pack(codes, scheme.bits)
    scale = np.ones((5, groups), np.float16)
    tensor = QuantTensor(packed, scheme.bits, 256, scale, 256 // groups, scheme.codebook())
    held = blocks.container(scheme)
    found = held.codes(tensor)
    assert found.nbytes * 8 == codes.size * blocks.bits_of(held.element)
    assert np.array_equal(held.unpacked(found, scheme.bits), packed)


def swapped(codes: np.ndarray) -> np.ndarray:
    return codes >> 4 | codes << 4


def shifted(codes: np.ndarray) -> np.ndarray:
    return codes ^ np.uint8(0x88)  # as if codes were not signed


def turned(codes: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(codes.reshape(128, -1).T).reshape(-1)


@pytest.mark.parametrize("mutation", [swapped, shifted, turned])
def test_a_wrong_packing_does_not_come_back(tmp_path: Path, mutation: Any) -> None:
    quant, artifact = made(tmp_path)
    path = artifact.directory / iree.ARCHIVE
    sound, data = archive.read(path)[f"{Q_PROJ}.codes"].copy(), bytearray(path.read_bytes())
    at = data.index(sound.tobytes())
    data[at : at + sound.size] = mutation(sound).tobytes()
    path.write_bytes(data)
    found = dict(iree.read_codes(artifact, quant))
    expected = quant[Q_PROJ]
    assert isinstance(expected, QuantTensor)
    assert not np.array_equal(found[Q_PROJ].packed, expected.packed)


@pytest.mark.parametrize("scheme", ["int4-g32-asym", "nf4-dq", "int3-g64", "int8", "q6_k", "none"])
@pytest.mark.parametrize(
    ("family", "fields", "dtype"),
    [
        ("llama", SMALL | {"hidden_size": 256}, "BF16"),
        ("mixtral", SMALL | {"hidden_size": 256}, "F32"),
    ],
)
def test_what_the_archive_means(
    tmp_path: Path, scheme: str, family: str, fields: dict[str, Any], dtype: str
) -> None:
    """Every tensor by its name and without the store, experts among them, which stand together."""
    quant, artifact = made(tmp_path, scheme, family, fields, dtype)
    found = dict(iree.read_weights(artifact.directory))
    assert found.keys() == set(quant)
    for name in quant:
        assert np.array_equal(found[name], quant.float32(name)), name


def test_bytes_per_token_counts_the_experts_that_a_token_takes(tmp_path: Path) -> None:
    quant, artifact = made(tmp_path, "int8", "mixtral", SMALL | {"num_local_experts": 8})
    parts = archive.read(artifact.directory / iree.ARCHIVE)
    sizes = {name: each.nbytes for name, each in parts.items() if not name.startswith("rope")}
    experts = sum(size for name, size in sizes.items() if "and_7_more" in name)
    row = sum(size for name, size in sizes.items() if "embed_tokens" in name) / quant.model.decoder.vocab_size
    rest = sum(
        size for name, size in sizes.items() if "and_7_more" not in name and "embed_tokens" not in name
    )
    assert artifact.bytes_per_token == round(experts * 2 / 8 + row + rest)


# What is not expressible


def test_experts_of_several_schemes_are_refused(tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "model", "mixtral", SMALL, dtype="F32"))
    quant = quantize(model, "int4-g32", overrides={"*.experts.1.w1": "int8"}, out=tmp_path / "codes")
    with pytest.raises(
        ModelError, match=r"experts\.0\.w1.* is int4-g32 and .*experts\.1\.w1.* is int8.*one scheme"
    ):
        iree.write(quant, tmp_path / "artifact")


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "model", "bert", {}, dtype="F32"))
    quant = quantize(model, "int8", out=tmp_path / "codes")
    with pytest.raises(ModelError, match=r"an encoder.*written of decoders"):
        iree.write(quant, tmp_path / "artifact")


def test_a_context_that_the_model_has_not(tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "model", "llama", SMALL, dtype="F32"))
    quant = quantize(model, "int8", out=tmp_path / "codes")
    with pytest.raises(ModelError, match=r"context = 100000: .* was made for"):
        iree.write(quant, tmp_path / "artifact", iree.Options(100_000))


# Damage


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-4096])


def altered(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("name", "damage", "told"),
    [
        (iree.ARCHIVE, cut, r"model\.irpa cannot be read"),
        (iree.ARCHIVE, lambda path: path.write_bytes(b"GGUF" + path.read_bytes()[4:]), r"model\.irpa cannot be read"),
        (iree.ARCHIVE, Path.unlink, r"model\.irpa cannot be read"),
        (iree.MLIR, Path.unlink, r"model\.mlir cannot be read"),
        (iree.MLIR, lambda path: altered(path, "arith.subf", "arith.addf"), r"model\.mlir is not the module of this model: line \d+"),
        ("model.json", lambda path: altered(path, '"chunk": 16', '"chunk": "x"'), r"does not say what the module was made for"),
        ("model.json", lambda path: altered(path, '"group": 32', '"group": 64'), r"says something else of the module"),
    ],
)  # fmt: skip
def test_files_that_are_not_whole(tmp_path: Path, name: str, damage: Any, told: str) -> None:
    quant, artifact = made(tmp_path)
    damage(artifact.directory / name)
    with pytest.raises(PackageError, match=told):
        list(iree.read_codes(artifact, quant))


def test_an_altered_table_is_told(tmp_path: Path) -> None:
    quant, artifact = made(tmp_path)
    path = artifact.directory / iree.ARCHIVE
    data, table = bytearray(path.read_bytes()), archive.read(path)["rope.0.sin"].tobytes()
    data[data.index(table) + 70] ^= 1
    path.write_bytes(data)
    with pytest.raises(PackageError, match=r"rope\.0\.sin holds other values"):
        list(iree.read_codes(artifact, quant))


def test_parameters_that_are_missing_are_named(tmp_path: Path) -> None:
    quant, artifact = made(tmp_path)
    path = artifact.directory / iree.ARCHIVE
    parts = {name: each.copy() for name, each in archive.read(path).items()}
    del parts["model.norm.weight"]
    runtime.save_archive_file(parts, path)
    with pytest.raises(PackageError, match=r"lacks parameters or has others: model\.norm\.weight"):
        list(iree.read_codes(artifact, quant))


# The text


def test_the_bytes_do_not_depend_on_threads(tmp_path: Path) -> None:
    quant, artifact = made(tmp_path, "int4-g32", "mixtral")
    again = iree.write(quant, tmp_path / "again", iree.Options(chunk=16), threads=1)
    for name in artifact.files:
        assert (artifact.directory / name).read_bytes() == (again.directory / name).read_bytes(), name


def test_floats_are_written_as_their_bits() -> None:
    assert [mlir.literal(value) for value in (1.0, 0.1, -1e30)] == ["0x3F800000", "0x3DCCCCCD", "0xF149F2CA"]


def test_facts_name_every_parameter(tmp_path: Path) -> None:
    _, artifact = made(tmp_path)
    said = json.loads((artifact.directory / "model.json").read_text())["parameters"]
    assert said[f"{Q_PROJ}.codes"]["shape"] == [128, 4, 32]
    assert said[f"{Q_PROJ}.codes"]["element"] == "i4"
    assert (
        f'@"{Q_PROJ}.codes" = #flow.parameter.named<"model"::"{Q_PROJ}.codes"> : tensor<128x4x32xi4>'
        in (artifact.directory / iree.MLIR).read_text()
    )
