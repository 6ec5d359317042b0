"""Each packing with its values written out: one weight of two or more rows whose codes are known."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tapeout.errors import ModelError
from tapeout.models import Checkpoint
from tapeout.models.checkpoint import read_header
from tapeout.quantize import foreign, lattice
from tapeout.quantize.foreign import awq, bitsandbytes, compressed_tensors, gptq, modelopt
from tapeout.quantize.foreign.layer import Layer
from tapeout.quantize.scheme import NF4, dynamic_map

# Asymmetric, and no period: a swap of nibbles, of halves or of the axes gives other codes.
ROWS = np.stack(
    [np.arange(32) // 2, (np.arange(32) * 7 + 3) % 16, 15 - np.arange(32) // 3, np.arange(32) % 5] * 2
).astype(np.uint8)
ROWS[4:, 0] = [9, 1, 14, 6]
HALF = np.full((8, 1), 0.5, np.float16)


def read(
    tmp_path: Path,
    form: ModuleType,
    statement: Mapping[str, Any],
    shape: tuple[int, int],
    **tensors: npt.NDArray[Any],
) -> tuple[str, npt.NDArray[np.uint8], dict[str, npt.NDArray[Any]]]:
    """Scheme, codes [out, in] and the other parts of a weight ``w`` whose tensors are given by suffix."""
    names = {"<i4": "I32", "<i8": "I64", "|i1": "I8", "|u1": "U8", "<f2": "F16", "<f4": "F32"}
    body, entries = b"", {}
    for suffix, array in tensors.items():
        kind = names[array.dtype.str]
        entry = {"dtype": kind, "shape": array.shape, "data_offsets": [len(body), len(body) + array.nbytes]}
        entries[f"w.{suffix}"] = entry
        body += np.ascontiguousarray(array).tobytes()
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    found = form.read(statement).layer(Layer(Checkpoint(tmp_path, quantized=True), "w.weight", shape))
    parts = {"codes": found.packed(), **found.parts}
    return found.scheme.name, lattice.assemble(parts, found.scheme, shape[1]).codes(), parts


def words(values: npt.NDArray[np.uint8]) -> npt.NDArray[np.int32]:
    """Nibbles along the last axis in words, the first lowest: by a sum, as the libraries' packers do it."""
    spread = values.reshape(*values.shape[:-1], -1, 8).astype(np.uint32)
    return (spread << (4 * np.arange(8, dtype=np.uint32))).sum(-1, dtype=np.uint32).view(np.int32)


def test_words_are_filled_lowest_first() -> None:
    assert words(np.array([1, 2, 3, 4, 5, 6, 7, 8], np.uint8)) == 0x87654321 - (1 << 32)


@pytest.mark.parametrize(("form", "stored"), [("gptq", 0x32107654), ("gptq_v2", 0x43218765)])
def test_gptq_zero_points_are_stored_less_one_in_v1(tmp_path: Path, form: str, stored: int) -> None:
    scheme, codes, parts = read(
        tmp_path, gptq, {"bits": 4, "group_size": 32, "checkpoint_format": form}, (8, 32),
        qweight=words(ROWS).T, scales=HALF.T, qzeros=np.array([[stored]], np.int32), g_idx=np.zeros(32, np.int32),
    )  # fmt: skip
    assert scheme == "int4-g32-asym"
    np.testing.assert_array_equal(codes, ROWS)
    assert parts["zero_point"].ravel().tolist() == [5, 6, 7, 8, 1, 2, 3, 4]


def test_gptq_with_eights_is_symmetric(tmp_path: Path) -> None:
    scheme, codes, parts = read(
        tmp_path, gptq, {"bits": 4, "group_size": -1}, (8, 32),
        qweight=words(ROWS).T, scales=HALF.T, qzeros=np.array([[0x77777777]], np.int32),
    )  # fmt: skip
    assert scheme == "int4-g32"
    assert "zero_point" not in parts
    np.testing.assert_array_equal(codes, ROWS)


def test_gptq_of_three_bits_runs_across_words(tmp_path: Path) -> None:
    """Element 10 has its two low bits on top of the first word and its high bit at the bottom of the second."""
    low = ROWS[:, :32] & 7
    stream = np.unpackbits(low[:, :, None], axis=2, count=3, bitorder="little").reshape(8, -1)
    packed = np.packbits(stream, axis=1, bitorder="little").view("<i4")
    assert (int(packed[0, 0].view(np.uint32)) >> 30 | (int(packed[0, 1]) & 1) << 2) == low[0, 10]
    zeros = np.tile(
        np.packbits(np.tile([1, 1, 0], 32).astype(np.uint8), bitorder="little").view("<i4"), (1, 1)
    )
    shape = (32, 32)
    scheme, codes, _ = read(
        tmp_path, gptq, {"bits": 3, "group_size": 32}, shape,
        qweight=np.tile(packed, (4, 1)).T, scales=np.tile(HALF, (4, 1)).T, qzeros=zeros,
    )  # fmt: skip
    assert scheme == "int3-g32"
    np.testing.assert_array_equal(codes, np.tile(low, (4, 1)))


@pytest.mark.parametrize("writer", ["gptqmodel:7.6.0", "auto_gptq:0.7.1"])
def test_gptq_zero_points_of_zero_in_v1_depend_on_the_writer(tmp_path: Path, writer: str) -> None:
    """GPTQModel subtracts 0x11111111 from the word, so a 0 borrows from its neighbour: 0x...40 becomes 0x...2F."""
    stored = np.array([[0x98765430]], np.uint32) - np.uint32(0x11111111)
    statement = {"bits": 4, "group_size": 32, "meta": {"quantizer": [writer]}}
    tensors = {"qweight": words(ROWS).T, "scales": HALF.T, "qzeros": stored.view(np.int32)}
    if writer.startswith("auto"):
        with pytest.raises(ModelError, match=r"stored as 15 in format gptq \(v1\).*save it as gptq_v2"):
            read(tmp_path, gptq, statement, (8, 32), **tensors)
    else:
        parts = read(tmp_path, gptq, statement, (8, 32), **tensors)[2]
        assert parts["zero_point"].ravel().tolist() == [0, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("g_idx", "said"),
    [
        (np.arange(64) // 32, ""),
        (np.arange(64) % 2, "puts column 1 into group 1 instead of 0"),
        (1 - np.arange(64) // 32, "puts column 0 into group 1 instead of 0"),
    ],
)
def test_gptq_groups_have_to_be_side_by_side(tmp_path: Path, g_idx: npt.NDArray[np.int64], said: str) -> None:
    tensors = {
        "qweight": words(np.tile(ROWS, (1, 2))).T,
        "scales": np.tile(HALF, (1, 2)).T,
        "qzeros": np.full((2, 1), 0x77777777, np.int32),
        "g_idx": g_idx.astype(np.int32),
    }
    statement = {"bits": 4, "group_size": 32, "desc_act": True}
    if said:
        with pytest.raises(ModelError, match=f"desc_act and its g_idx {said}"):
            read(tmp_path, gptq, statement, (8, 64), **tensors)
    else:
        assert read(tmp_path, gptq, statement, (8, 64), **tensors)[0] == "int4-g32"


def test_awq_has_an_order_of_its_own(tmp_path: Path) -> None:
    """Rows 0 to 7 with the zero points 1 to 8: nibbles 0, 2, 4, 6, 1, 3, 5, 7, lowest first, are 1 3 5 7 2 4 6 8."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]
    scheme, codes, parts = read(
        tmp_path, awq, {"bits": 4, "group_size": 32}, (8, 32),
        qweight=words(ROWS.T[:, order]), scales=HALF.T, qzeros=np.array([[0x86427531 - (1 << 32)]], np.int32),
    )  # fmt: skip
    assert scheme == "int4-g32-asym"
    np.testing.assert_array_equal(codes, ROWS)
    assert parts["zero_point"].ravel().tolist() == [1, 2, 3, 4, 5, 6, 7, 8]


def test_compressed_tensors_packs_zero_points_along_out(tmp_path: Path) -> None:
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "group_size": 16, "symmetric": False, "strategy": "group"},
    }
    zeros = np.array([[0x87654321 - (1 << 32), 0x0FEDCBA9]], np.int32)
    scheme, codes, parts = read(
        tmp_path, compressed_tensors, {"format": "pack-quantized", "config_groups": {"group_0": group}}, (8, 32),
        weight_packed=words(ROWS), weight_scale=np.tile(HALF, (1, 2)), weight_zero_point=zeros,
        weight_shape=np.array([8, 32]),
    )  # fmt: skip
    assert scheme == "int4-g16-asym"
    np.testing.assert_array_equal(codes, ROWS)
    assert parts["zero_point"].T.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14, 15, 0]]


def test_compressed_tensors_keeps_int8_signed(tmp_path: Path) -> None:
    group = {"targets": ["re:w$"], "weights": {"num_bits": 8, "symmetric": True, "strategy": "channel"}}
    scheme, codes, _ = read(
        tmp_path, compressed_tensors, {"format": "int-quantized", "config_groups": {"group_0": group}}, (1, 4),
        weight=np.array([[-128, -1, 0, 127]], np.int8), weight_scale=HALF[:1],
    )  # fmt: skip
    assert scheme == "int8"
    assert codes.tolist() == [[0, 127, 128, 255]]


def test_compressed_tensors_with_actorder_is_refused(tmp_path: Path) -> None:
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 4, "group_size": 16, "symmetric": True, "actorder": "group"},
    }
    with pytest.raises(ModelError, match="actorder = group"):
        read(
            tmp_path, compressed_tensors, {"format": "pack-quantized", "config_groups": {"group_0": group}}, (8, 32),
            weight_packed=words(ROWS), weight_scale=np.tile(HALF, (1, 2)), weight_shape=np.array([8, 32]),
            weight_g_idx=(np.arange(32) % 2).astype(np.int32),
        )  # fmt: skip


def test_bitsandbytes_has_the_high_nibble_first(tmp_path: Path) -> None:
    codes = np.tile(ROWS[:2], (1, 2))
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [2, 64]}).encode()
    weight = (codes[:, 0::2] << 4 | codes[:, 1::2]).reshape(-1, 1)
    assert weight[1:3].ravel().tolist() == [0x11, 0x22]
    scheme, found, parts = read(
        tmp_path, bitsandbytes, {"bnb_4bit_quant_type": "nf4"}, (2, 64),
        **{
            "weight": weight, "weight.absmax": np.array([0.25, 2], np.float32), "weight.quant_map": NF4,
            "weight.quant_state.bitsandbytes__nf4": np.frombuffer(state, np.uint8),
        },
    )  # fmt: skip
    assert scheme == "nf4"
    np.testing.assert_array_equal(found, codes)
    assert parts["scale"].tolist() == [[0.25], [2]]


def test_modelopt_pairs_int4_rows(tmp_path: Path) -> None:
    """Low nibble: the even row, in two's complement: code 8 is the nibble 0."""
    signed = ROWS ^ 8
    scheme, codes, _ = read(
        tmp_path, modelopt, {"quantization": {"quant_algo": "W4A16_AWQ"}}, (8, 32),
        weight=signed[0::2] | signed[1::2] << 4, weight_scale=HALF.astype(np.float32),
        pre_quant_scale=np.ones(32, np.float16),
    )  # fmt: skip
    assert scheme == "int4-g32"
    np.testing.assert_array_equal(codes, ROWS)


def test_names_say_what_a_scheme_is() -> None:
    for name in (
        "int2-g32-asym",
        "int5-g32",
        "int4-g256",
        "int8-g64-asym",
        "fp8-tensor",
        "q4_k",
        "int4-g64-f32",
        "nf4-f32",
    ):
        assert foreign.scheme_of(name).name == name
    assert foreign.scheme_of("int4-g256").group == 256
    assert foreign.scheme_of("int8-g64-asym").kind == "asymmetric"


def test_the_map_of_scales_is_that_of_bitsandbytes() -> None:
    header, _ = read_header(Path(__file__).parent / "data" / "bnb-nf4-dq" / "model.safetensors")
    theirs = header["model.layers.0.self_attn.q_proj.weight.nested_quant_map"].float32()
    np.testing.assert_array_equal(dynamic_map(), theirs)
