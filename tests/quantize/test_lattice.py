"""Grids: never worse than the plain one, weighted by importance, the same however rows are cut, and as format owners have them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file

from tapeout.models.checkpoint import read_header
from tapeout.quantize import SCHEMES, Scheme, lattice, store
from tapeout.quantize.lattice import Grid
from tapeout.quantize.rtn import Rounded, round_to_nearest
from tapeout.quantize.scheme import E2M1, E4M3, SUPER, dynamic_map
from tapeout.quantize.tensor import QuantTensor, ScaleCodes, pack

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
QUANTIZING = [scheme for scheme in SCHEMES.values() if scheme.kind != "none"]
GOLDEN = Path(__file__).parent / "golden"
SEARCHING = [s for s in QUANTIZING if s.scales != "double" and s.levels != "e4m3"]  # the others have one grid


def normal(rows: int, into: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal((rows, into)).astype(np.float32) * np.float32(0.02)


def student(rows: int, into: int, seed: int = 0) -> Floats:
    """Heavy tails (4 degrees of freedom), and off centre."""
    return (np.random.default_rng(seed).standard_t(4, (rows, into)) * 0.02 + 0.005).astype(np.float32)


def rtn(weight: Floats, scheme: Scheme, importance: Floats | None = None) -> Rounded:
    whole = lattice.tensor_scale(float(np.abs(weight).max(initial=0)), scheme)
    return round_to_nearest(weight, scheme, importance, tensor_scale=whole)


def square_error(
    weight: Floats, scheme: Scheme, rounded: Rounded, importance: Floats | None = None
) -> Doubles:
    """By group, [rows, groups]."""
    error = lattice.dequantize(rounded.codes, scheme, rounded.grid).astype(np.float64) - weight
    weighted = error**2 if importance is None else error**2 * importance
    return weighted.reshape(len(weight), -1, scheme.group or weight.shape[1]).sum(axis=2)


def plain_grid(weight: Floats, scheme: Scheme) -> tuple[Doubles, float]:
    """What the extremes alone give: weights under that grid, unrounded, and the largest magnitude of a code's value."""
    rows, into = weight.shape
    x = weight.astype(np.float64).reshape(rows, -1, scheme.group or into)
    amax = np.abs(x).max(axis=2, keepdims=True)
    if scheme.kind == "symmetric":
        if scheme.bits == 8:
            scale, low, high = amax / 127, -127, 127
        else:
            high = 2 ** (scheme.bits - 1) - 1
            low = -high - 1
            extreme = np.take_along_axis(x, np.abs(x).argmax(axis=2, keepdims=True), axis=2)
            scale = extreme / low
        return (np.clip(np.rint(x / scale), low, high) * scale).reshape(rows, into), -low
    if scheme.kind == "asymmetric":
        least, most = np.minimum(x.min(axis=2, keepdims=True), 0), np.maximum(x.max(axis=2, keepdims=True), 0)
        high = 2**scheme.bits - 1
        scale = (most - least) / high
        zero = np.rint(-least / scale)
        codes = np.clip(np.rint(x / scale) + zero, 0, high)
        return ((codes - zero) * scale).reshape(rows, into), high
    levels = scheme.codebook().astype(np.float64)
    levels = levels[np.isfinite(levels)]
    largest = float(np.abs(levels).max())
    if scheme.scales == "e8m0":  # OCP Microscaling Formats 1.0, section 6.3
        scale = 2.0 ** (np.floor(np.log2(amax)) - 2)
    elif scheme.scales == "e4m3" and scheme.group is None:  # one scale for the tensor
        scale = np.full_like(amax, np.abs(weight).max() / 448)
    elif scheme.scales == "e4m3":
        whole = float(np.abs(weight).max()) / (448 * 6)
        positive = E4M3[:127].astype(np.float64)
        scale = positive[np.abs(amax / 6 / whole - positive).argmin(axis=2)][..., None] * whole
    else:
        scale = amax / largest
    nearest = np.abs(x[..., None] / scale[..., None] - levels).argmin(axis=3)
    return (levels[nearest] * scale).reshape(rows, into), largest


@pytest.mark.parametrize("make", [normal, student])
@pytest.mark.parametrize("scheme", [s for s in QUANTIZING if s.scales != "super"], ids=str)
def test_no_group_is_worse_than_under_the_plain_grid(scheme: Scheme, make: Any) -> None:
    weight = make(24, 512)
    n = scheme.group or 512
    plain, largest = plain_grid(weight, scheme)
    grouped = ((plain - weight) ** 2).reshape(24, -1, n).sum(axis=2) ** 0.5
    # The plain scale is one that is tried. Its codes under a scale that is off by a part e are off by e times their values, so the
    # root of the squared error grows by at most e times theirs. e: 2^-11 of float16, and the sums behind a least squares scale,
    # n * 2^-24 each. Two candidates are told apart by sums of as many squares: 3 n 2^-24 of the weights' own, on either side.
    power = (weight.astype(np.float64) ** 2).reshape(24, -1, n).sum(axis=2)
    rounded = 2.0**-11 + 2 * n * 2.0**-24 if scheme.scales == "float16" else 2.0**-22
    reach = (plain**2).reshape(24, -1, n).sum(axis=2) ** 0.5
    choice = 0 if scheme.bits == 8 else 6 * n * 2.0**-24 * power
    bound = (grouped + rounded * reach) ** 2 + choice
    assert (square_error(weight, scheme, rtn(weight, scheme)) <= bound).all()
    assert largest == np.nanmax(np.abs(scheme.codebook()[1:] if scheme.bits == 8 else scheme.codebook()))


@pytest.mark.parametrize("make", [normal, student])
@pytest.mark.parametrize("scheme", [s for s in QUANTIZING if s.scales == "super"], ids=str)
def test_super_blocks_beat_the_plain_grid(scheme: Scheme, make: Any) -> None:
    """Of a whole tensor: d is rounded to float16 between two searches, and a single super-block may lose by it."""
    weight, per = make(32, 1024), SUPER // (scheme.group or 1)
    x = weight.astype(np.float64).reshape(32, -1, per, scheme.group or 1)
    top = 2**scheme.scale_bits - 1
    if scheme.kind == "symmetric":
        low = -(2 ** (scheme.bits - 1))
        extreme = np.take_along_axis(x, np.abs(x).argmax(axis=3, keepdims=True), axis=3) / low
        d = np.take_along_axis(extreme, np.abs(extreme).argmax(axis=2, keepdims=True), axis=2) / (
            -(top + 1) / 2
        )
        scale = np.clip(np.rint(extreme / d), -(top + 1) / 2, (top - 1) / 2) * d
        minimum, high = np.zeros_like(scale), -low - 1
    else:
        low, high = 0, 2**scheme.bits - 1
        least = np.minimum(x.min(axis=3, keepdims=True), 0)
        wanted = (x.max(axis=3, keepdims=True) - least) / high
        d, dmin = wanted.max(axis=2, keepdims=True) / top, -least.min(axis=2, keepdims=True) / top
        scale, minimum = np.rint(wanted / d) * d, np.rint(-least / dmin) * dmin
    safe = np.where(scale == 0, 1, scale)
    plain = np.clip(np.rint((x + minimum) / safe), low, high) * scale - minimum
    assert square_error(weight, scheme, rtn(weight, scheme)).sum() < ((plain - x) ** 2).sum()


@pytest.mark.parametrize("make", [normal, student])
@pytest.mark.parametrize("scheme", SEARCHING, ids=str)
def test_importance_weights_the_error(scheme: Scheme, make: Any) -> None:
    weight = make(64, 512)
    importance = np.exp(np.random.default_rng(1).standard_normal(512) * 2).astype(np.float32)
    alike = square_error(weight, scheme, rtn(weight, scheme), importance).sum()
    weighted = square_error(weight, scheme, rtn(weight, scheme, importance), importance).sum()
    assert weighted < alike
    assert (
        square_error(weight, scheme, rtn(weight, scheme, importance)).sum()
        > square_error(weight, scheme, rtn(weight, scheme)).sum()
    )


@pytest.mark.parametrize("scheme", QUANTIZING, ids=str)
def test_only_the_ratios_of_importance_count(scheme: Scheme) -> None:
    weight = student(8, 256)
    importance = np.exp(np.random.default_rng(1).standard_normal(256)).astype(np.float32)
    one, other = rtn(weight, scheme, importance), rtn(weight, scheme, importance * np.float32(2**20))
    np.testing.assert_array_equal(one.codes, other.codes)
    np.testing.assert_array_equal(one.grid.scale, other.grid.scale)
    three, ones = (rtn(weight, scheme, np.full(256, each, np.float32)) for each in (3, 1))
    np.testing.assert_array_equal(three.grid.scale, ones.grid.scale)


@pytest.mark.parametrize("scheme", QUANTIZING, ids=str)
@pytest.mark.parametrize("importance", ["none", "every other group", "every other column"])
def test_columns_without_importance_still_get_their_nearest_code(scheme: Scheme, importance: str) -> None:
    weight = normal(16, 512)
    n = scheme.group or 512
    column = np.arange(512)
    reached = {
        "none": column < 0,
        "every other group": column // n % 2 == 1,
        "every other column": column % 2 == 1,
    }
    rounded = rtn(weight, scheme, reached[importance].astype(np.float32))
    error = square_error(weight, scheme, rounded)
    # Nothing is left to chance where no data reached: a group of columns that are all alike is fitted as if all columns were.
    if importance != "every other column" and scheme.scales != "super":
        alike = rtn(weight, scheme, np.ones(512, np.float32))
        np.testing.assert_array_equal(error, square_error(weight, scheme, alike))
    levels = scheme.codebook()[None, None, None, :].astype(np.float64)
    if rounded.grid.zero_point is not None:
        levels = levels - rounded.grid.zero_point[:, :, None, None]
    values = levels * rounded.grid.scale.astype(np.float64)[:, :, None, None]
    if rounded.grid.minimum is not None:
        values = values - rounded.grid.minimum.astype(np.float64)[:, :, None, None]
    best = np.nanmin(np.abs(weight.reshape(16, -1, n, 1) - values), axis=3)
    took = np.abs(lattice.dequantize(rounded.codes, scheme, rounded.grid).astype(np.float64) - weight)
    # The float32 ties of test_rounding.py, and dequantizing itself: 2^-24 of the product and of the difference.
    slack = 2.0**-20 * (np.abs(weight) + (0 if rounded.grid.minimum is None else np.abs(values).max()))
    assert (took <= best.reshape(16, 512) + slack).all()


@pytest.mark.parametrize("scheme", QUANTIZING, ids=str)
def test_rows_may_be_cut_anywhere(scheme: Scheme) -> None:
    weight = student(23, 512)
    weight[5] = 0
    weight[9, 256:] = 1e-8
    importance = np.random.default_rng(1).random(512).astype(np.float32)
    whole = lattice.tensor_scale(float(np.abs(weight).max()), scheme)

    def rounded(rows: slice) -> Rounded:
        return round_to_nearest(weight[rows], scheme, importance, tensor_scale=whole)

    together = rounded(slice(None))
    cuts = [slice(0, 1), slice(1, 8), slice(8, 23)]
    with ThreadPoolExecutor(3) as pool:
        parts = list(pool.map(rounded, cuts))
    np.testing.assert_array_equal(together.codes, np.concatenate([part.codes for part in parts]))
    assert together.grid.clamped == sum(part.grid.clamped for part in parts)
    for cut, part in zip(cuts, parts, strict=True):
        for expected in (together.grid.rows(cut), part.grid):
            assert expected.parts.keys() == together.grid.parts.keys()
            for name, values in together.grid.parts.items():
                np.testing.assert_array_equal(values[cut], expected.parts[name])
        np.testing.assert_array_equal(
            lattice.nearest(weight[cut], scheme, together.grid.rows(cut)), part.codes
        )


@pytest.mark.parametrize("scheme", QUANTIZING, ids=str)
def test_weights_need_not_lie_in_order(scheme: Scheme) -> None:
    weight = student(8, 512)
    strided = np.asfortranarray(weight)
    np.testing.assert_array_equal(rtn(weight, scheme).codes, rtn(strided, scheme).codes)
    np.testing.assert_array_equal(rtn(weight[::2], scheme).codes, rtn(weight[::2].copy(), scheme).codes)


@pytest.mark.parametrize("scheme", QUANTIZING, ids=str)
@pytest.mark.parametrize("size", [1e-45, 1e-40, 3e-39, 1e-30, 1e-8, 1e-6, 1e4])
def test_weights_of_any_size(scheme: Scheme, size: float) -> None:
    """Scales that are subnormal or zero in float16, in float32, or large: finite, and no weight farther off than to zero."""
    weight = (normal(4, 256) * np.float32(50) * np.float32(size)).astype(np.float32)
    rounded = rtn(weight, scheme)
    back = lattice.dequantize(rounded.codes, scheme, rounded.grid)
    assert np.isfinite(back).all()
    if scheme.scales == "float16":
        assert (np.abs(rounded.grid.parts["scale"]) >= np.float16(2.0**-14)).all()
    # Zero is on every grid but the affine ones with a minimum, where it may be half a step away.
    if scheme.kind != "affine":
        group = scheme.group or 256
        off = np.abs(back.astype(np.float64) - weight)
        cut = np.repeat(np.abs(weight).reshape(4, -1, group).max(axis=2), group, axis=1)
        assert (off <= cut).all()


@pytest.mark.parametrize("scheme", QUANTIZING, ids=str)
def test_what_lies_on_the_grid_is_kept(scheme: Scheme) -> None:
    """Weights that are codes already, with scales of a power of two, come back as they are."""
    draw = np.random.default_rng(0)
    group = scheme.group or 256
    levels = scheme.codebook()[np.isfinite(scheme.codebook())]
    if scheme.kind == "symmetric" and scheme.bits == 8:
        levels = levels[1:]  # -128 is not used
    if scheme.kind == "asymmetric":
        levels = levels - np.float32(5)
    weight = draw.choice(levels, (4, 256 // group, group)).astype(np.float32)
    weight[:, :, :2] = levels[np.abs(levels).argmax()], levels.max()  # both ends
    weight[:, :, 2] = levels.min()
    if scheme.kind == "affine":
        weight -= levels.max() // 2
    weight *= np.float32(0.25)
    if scheme.scales == "e4m3":
        weight *= np.float32(7)  # the scale of a tensor is such that 448 is the largest of a group
    weight = weight.reshape(4, 256)
    rounded = rtn(weight, scheme)
    back = lattice.dequantize(rounded.codes, scheme, rounded.grid)
    if scheme.scales in ("float16", "e8m0", "double"):
        np.testing.assert_array_equal(back, weight)
    else:
        # One rounded number under another: the scale of a tensor or d is off by 2^-24 or 2^-11, minimum and scale both are.
        part = 2.0**-22 if scheme.scales == "e4m3" else 2.0**-9
        np.testing.assert_allclose(back, weight, rtol=0, atol=part * np.abs(weight).max())


def payload_bits(scheme: Scheme, out: int, into: int) -> dict[str, int]:
    widths = {"U8": 8, "F16": 16, "F32": 32}
    parts = lattice.layout(scheme, out, into)
    return {name: widths[dtype] * int(np.prod(shape)) for name, (dtype, shape) in parts.items()}


@pytest.mark.parametrize("scheme", QUANTIZING, ids=str)
def test_bits_per_weight_are_those_of_the_store(scheme: Scheme, tmp_path: Path) -> None:
    out, into = 256, 512  # whole blocks of double quantization: 256 scales each
    save_file({"w": normal(out, into)}, tmp_path / "w.safetensors")
    source = read_header(tmp_path / "w.safetensors")[0]["w"]
    (tmp_path / "tensors").mkdir()
    with ThreadPoolExecutor(2) as pool:
        store.write_tensor(tmp_path, source, scheme, pool)
    path = store.tensor_path(tmp_path, "w")
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    bits = payload_bits(scheme, out, into)
    assert 8 * (path.stat().st_size - header) == sum(bits.values())
    once = {"scale_offset": 32, "input_scale": 32} | ({"scale_block": 32} if scheme.scales == "e4m3" else {})
    counted = sum(number for name, number in bits.items() if name not in once)
    # The store gives an integer of a scale, a minimum or a zero point a byte of its own; counted are the bits that it has.
    groups = out * into // (scheme.group or into)
    if scheme.kind == "asymmetric":
        counted -= (8 - scheme.bits) * groups
    if scheme.scales == "e4m3" and scheme.group is None:
        counted -= 8 * out  # the scale 1 of each row
    if scheme.scales == "super":
        counted -= (8 - scheme.scale_bits) * groups * (2 if scheme.kind == "affine" else 1)
    assert counted == scheme.bits_per_weight(into) * out * into


@pytest.mark.parametrize("scheme", QUANTIZING, ids=str)
def test_the_store_means_what_the_grid_means(scheme: Scheme, tmp_path: Path) -> None:
    weight = student(40, 768)
    save_file({"w": weight}, tmp_path / "w.safetensors")
    source = read_header(tmp_path / "w.safetensors")[0]["w"]
    (tmp_path / "tensors").mkdir()
    with ThreadPoolExecutor(2) as pool:
        store.write_tensor(tmp_path, source, scheme, pool)
    tensor = store.read_tensor(tmp_path, "w", scheme, 768)
    rounded = rtn(weight, scheme)
    if scheme.scales == "double":  # the scales of the whole tensor are quantized after it is rounded
        parts = lattice.quantize_scales(rounded.grid.scale)
        scales = ScaleCodes(
            parts["scale_codes"], dynamic_map(), parts["scale_block"], 256, parts["scale_offset"][0]
        )
        rounded = Rounded(rounded.codes, Grid(scales.values()))
    assert tensor.shape == (40, 768)
    np.testing.assert_array_equal(tensor.codes(), rounded.codes)
    expected = lattice.dequantize(rounded.codes, scheme, rounded.grid)
    np.testing.assert_array_equal(tensor.dequantize().view(np.uint32), expected.view(np.uint32))
    some = np.array([3, 17, 4])
    np.testing.assert_array_equal(tensor.rows(some).dequantize(), expected[some])
    np.testing.assert_array_equal(tensor.rows(slice(5, 9)).dequantize(), expected[5:9])


def super_block(
    bits: int, scale_bits: int, offset: int, minimums: bool
) -> tuple[QuantTensor, dict[str, Any]]:
    """A super-block of asymmetric parts, and the parts."""
    draw = np.random.default_rng(bits)
    group = 32 if bits in (4, 5) else 16
    groups = SUPER // group
    codes = draw.integers(0, 2**bits, (1, SUPER)).astype(np.uint8)
    scales = draw.integers(0, 2**scale_bits, (1, groups)).astype(np.uint8)
    mins = draw.integers(0, 2**scale_bits, (1, groups)).astype(np.uint8)
    d, dmin = np.array([[0.01237]], np.float16), np.array([[0.00371]], np.float16)
    book = np.arange(256, dtype=np.float32) - np.float32(offset)
    scale = ScaleCodes(scales, book, d, groups)
    minimum = ScaleCodes(mins, book, dmin, groups) if minimums else None
    levels = np.arange(2**bits, dtype=np.float32) - np.float32(0 if minimums else 2 ** (bits - 1))
    tensor = QuantTensor(
        pack(codes, bits), bits, SUPER, scale.values(), group, levels, scale_codes=scale, minimum=minimum
    )
    return tensor, {"q": codes[0], "sc": scales[0], "m": mins[0], "d": d, "dmin": dmin}


def q4_q5_scales(sc: npt.NDArray[np.uint8], m: npt.NDArray[np.uint8]) -> list[int]:
    """Twelve bytes of eight scales and eight minimums, six bits each (ggml's get_scale_min_k4)."""
    packed = [int(sc[j] | (sc[j + 4] >> 4 << 6)) for j in range(4)]
    packed += [int(m[j] | (m[j + 4] >> 4 << 6)) for j in range(4)]
    return packed + [int((sc[j] & 15) | ((m[j] & 15) << 4)) for j in range(4, 8)]


def k_bytes(name: str, q: Any, sc: Any, m: Any, d: Any, dmin: Any) -> bytes:
    """By hand from ggml-common.h, element by element."""
    q = [int(code) for code in q]
    if name == "Q4_K":
        body = [q[64 * c + i] | q[64 * c + 32 + i] << 4 for c in range(4) for i in range(32)]
        return d.tobytes() + dmin.tobytes() + bytes(q4_q5_scales(sc, m) + body)
    if name == "Q5_K":
        fifth = [sum((q[32 * k + i] >> 4) << k for k in range(8)) for i in range(32)]
        body = [q[64 * c + i] & 15 | (q[64 * c + 32 + i] & 15) << 4 for c in range(4) for i in range(32)]
        return d.tobytes() + dmin.tobytes() + bytes(q4_q5_scales(sc, m) + fifth + body)
    if name == "Q2_K":
        scales = [int(sc[j]) | int(m[j]) << 4 for j in range(16)]
        body = [sum(q[128 * h + 32 * k + i] << 2 * k for k in range(4)) for h in range(2) for i in range(32)]
        return bytes(scales + body) + d.tobytes() + dmin.tobytes()
    if name == "Q6_K":
        low = [
            q[128 * h + 32 * k + i] & 15 | (q[128 * h + 64 + 32 * k + i] & 15) << 4
            for h in range(2)
            for k in range(2)
            for i in range(32)
        ]
        high = [
            sum((q[128 * h + 32 * k + i] >> 4) << 2 * k for k in range(4))
            for h in range(2)
            for i in range(32)
        ]
        return bytes(low + high) + (sc.astype(np.int16) - 128).astype(np.int8).tobytes() + d.tobytes()
    assert name == "Q3_K"
    third = [sum((q[32 * k + i] >> 2) << k for k in range(8)) for i in range(32)]
    low = [sum((q[128 * h + 32 * k + i] & 3) << 2 * k for k in range(4)) for h in range(2) for i in range(32)]
    sc = [int(code) for code in sc]
    scales = [sc[j] & 15 | (sc[j + 8] & 15) << 4 for j in range(8)]
    scales += [sum((sc[j + 4 * k] >> 4) << 2 * k for k in range(4)) for j in range(4)]
    return bytes(third + low + scales) + d.tobytes()


@pytest.mark.parametrize(
    ("name", "bits", "scale_bits", "offset", "minimums"),
    [
        ("Q6_K", 6, 8, 128, False),
        ("Q5_K", 5, 6, 0, True),
        ("Q4_K", 4, 6, 0, True),
        ("Q3_K", 3, 6, 32, False),
        ("Q2_K", 2, 4, 0, True),
    ],
)
def test_super_blocks_mean_what_gguf_means(
    name: str, bits: int, scale_bits: int, offset: int, minimums: bool
) -> None:
    """(d * scale) * q - dmin * minimum in float32, in this order, bit for bit."""
    import gguf

    tensor, parts = super_block(bits, scale_bits, offset, minimums)
    data = np.frombuffer(k_bytes(name, **parts), np.uint8)
    kind = gguf.GGMLQuantizationType[name]
    assert len(data) == gguf.GGML_QUANT_SIZES[kind][1]
    theirs = gguf.dequantize(data[None], kind)
    np.testing.assert_array_equal(tensor.dequantize().view(np.uint32), theirs.view(np.uint32))
    scheme = SCHEMES[name.lower()]
    assert (scheme.bits, scheme.scale_bits, scheme.group) == (bits, scale_bits, tensor.group)
    np.testing.assert_array_equal(scheme.codebook(), tensor.codebook)
    book = scheme.scale_codebook()
    assert book is not None
    np.testing.assert_array_equal(book[: 2**scale_bits], np.arange(2**scale_bits, dtype=np.float32) - offset)


def test_e4m3_is_what_torch_has() -> None:
    import torch

    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(E4M3, theirs)
    assert (np.signbit(E4M3) == np.signbit(theirs)).all()


def test_rounding_to_e4m3_is_torchs_cast() -> None:
    import torch

    finite = np.sort(E4M3[np.isfinite(E4M3)])
    ties = (finite[1:].astype(np.float64) + finite[:-1]) / 2  # exact in float32: one more bit than a code has
    near = [np.nextafter(ties.astype(np.float32), np.float32(end)) for end in (-np.inf, np.inf)]
    some = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    scales = [some * np.float32(2.0**power) for power in (-12, -9, -7, 0, 5, 7)]
    weight = np.concatenate([finite, ties.astype(np.float32), *near, *scales]).astype(np.float32)
    weight = weight[np.abs(weight) <= 448]
    weight = np.append(weight, np.zeros(-weight.size % 2, np.float32))[None]
    grid = Grid(np.ones((1, 1), np.float32))
    ours = lattice.nearest(weight, SCHEMES["fp8"], grid)
    theirs = torch.from_numpy(weight).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    # A value that rounds to zero has no sign here; the weight is the same.
    np.testing.assert_array_equal(np.where(ours == 128, 0, ours), np.where(theirs == 128, 0, theirs))
    beyond = np.array([[449.0, 463.9, 464.0, 1e6, -449.0, -1e30]], np.float32)
    assert E4M3[lattice.nearest(beyond, SCHEMES["fp8"], grid)].tolist() == [[448.0] * 4 + [-448.0] * 2]


def test_e2m1_by_its_bits() -> None:
    """Second implementation: (-1)^s 2^(e - 1) 1.m, and 0.5 m without an exponent (OCP Microscaling Formats 1.0, 5.3.3)."""
    for bits in range(16):
        sign, exponent, mantissa = bits >> 3, bits >> 1 & 3, bits & 1
        value = 2.0 ** (exponent - 1) * (1 + mantissa / 2) if exponent else mantissa / 2
        assert E2M1[bits] == (-1) ** sign * value
    assert np.signbit(E2M1[8])


def test_e8m0_by_its_bits() -> None:
    book = SCHEMES["mxfp4"].scale_codebook()
    assert book is not None
    assert [float(book[code]) for code in (0, 1, 127, 254)] == [2.0**-127, 2.0**-126, 1.0, 2.0**127]
    assert np.isnan(book[255])


def test_mxfp4_codes_are_ggufs_at_its_exponent() -> None:
    import gguf

    scheme = SCHEMES["mxfp4"]
    weight = student(32, 256)
    blocks = gguf.quantize(weight, gguf.GGMLQuantizationType.MXFP4).reshape(-1, 17)
    exponent = blocks[:, 0].reshape(32, 8)
    codes = np.concatenate([blocks[:, 1:] & 15, blocks[:, 1:] >> 4], axis=1).reshape(32, 256)
    book = scheme.scale_codebook()
    assert book is not None
    grid = Grid(book[exponent], parts={"scale_codes": exponent})
    ours = lattice.nearest(weight, scheme, grid)
    # gguf takes the first of the nearest and so never -0; ours is the lower of the two levels on a tie.
    theirs = gguf.dequantize(blocks.reshape(32, -1), gguf.GGMLQuantizationType.MXFP4)
    back = lattice.dequantize(ours, scheme, grid)
    tied = np.abs(back - weight) == np.abs(theirs - weight)
    np.testing.assert_array_equal(ours[~tied | (back == theirs)], codes[~tied | (back == theirs)])
    assert tied.all()
    np.testing.assert_array_equal(lattice.dequantize(codes, scheme, grid), theirs)
    # Its exponent is one of those that the search tries, and the search leaves no group worse.
    chosen = rtn(weight, scheme)
    assert (np.abs(chosen.grid.parts["scale_codes"].astype(int) - exponent) <= 1).all()
    error = ((theirs.astype(np.float64) - weight) ** 2).reshape(32, 8, 32).sum(axis=2)
    assert (square_error(weight, scheme, chosen) <= error * (1 + 32 * 2.0**-23)).all()


def test_nvfp4_by_a_second_implementation() -> None:
    """From NVIDIA's words: a float32 of the tensor, amax / (448 · 6); a group's scale amax / 6 in E4M3 under it; then E2M1."""
    import torch

    scheme = SCHEMES["nvfp4"]
    weight = student(16, 256)
    w = torch.from_numpy(weight)
    whole = 1 / (1 / (w.abs().max() / (448 * 6)))  # the nearest that formats which divide hold
    assert lattice.tensor_scale(float(np.abs(weight).max()), scheme) == whole.numpy()
    wanted = w.reshape(16, 16, 16).abs().amax(dim=2) / 6 / whole
    held = wanted.clamp(max=448).to(torch.float8_e4m3fn)
    scale = held.float() * whole
    codes = (w.reshape(16, 16, 16, 1) / scale[..., None, None] - torch.from_numpy(E2M1)).abs().argmin(dim=3)
    grid = Grid(scale.numpy(), parts={"scale_codes": held.view(torch.uint8).numpy()})
    ours = lattice.nearest(weight, scheme, grid)
    np.testing.assert_array_equal(E2M1[ours], E2M1[codes.numpy().reshape(16, 256)])
    # And the search may only improve on that scale, of which it tries the neighbours.
    chosen = rtn(weight, scheme)
    plain = square_error(weight, scheme, Rounded(ours, grid))
    assert (square_error(weight, scheme, chosen) <= plain * (1 + 16 * 2.0**-23)).all()
    assert (np.abs(chosen.grid.parts["scale_codes"].astype(int) - grid.parts["scale_codes"]) <= 3).all()


def test_nf4_with_double_quantization_is_bitsandbytes_byte_for_byte() -> None:
    golden = load_file(GOLDEN / "bitsandbytes_nf4.safetensors")  # scripts/fixtures/bitsandbytes_nf4.py
    scheme = SCHEMES["nf4-dq"]
    np.testing.assert_array_equal(dynamic_map(), golden["nested_quant_map"])
    rounded = rtn(golden["weight"].astype(np.float32), scheme)
    np.testing.assert_array_equal(rounded.codes[:, ::2] << 4 | rounded.codes[:, 1::2], golden["packed"])
    np.testing.assert_array_equal(rounded.grid.scale.reshape(-1), golden["absmax"])
    parts = lattice.quantize_scales(rounded.grid.scale)
    np.testing.assert_array_equal(parts["scale_offset"], golden["offset"])
    np.testing.assert_array_equal(parts["scale_block"], golden["nested_absmax"])
    np.testing.assert_array_equal(parts["scale_codes"].reshape(-1), golden["absmax_codes"])
    scales = ScaleCodes(
        parts["scale_codes"], dynamic_map(), parts["scale_block"], 256, parts["scale_offset"][0]
    )
    np.testing.assert_array_equal(scales.values().reshape(-1), golden["scales"])


def test_scales_that_are_all_alike_are_quantized_exactly() -> None:
    parts = lattice.quantize_scales(np.full((3, 100), 0.125, np.float32))
    scales = ScaleCodes(
        parts["scale_codes"], dynamic_map(), parts["scale_block"], 256, parts["scale_offset"][0]
    )
    assert (scales.values() == 0.125).all()


@pytest.mark.parametrize("power", [0, -126, -128, -136])
def test_the_code_of_a_scale_is_the_nearest_below_the_normal_numbers_too(power: int) -> None:
    scale = np.random.default_rng(0).uniform(0.5, 1, (4, 64)).astype(np.float32) * np.float32(2.0**power)
    parts = lattice.quantize_scales(scale)
    book, block = dynamic_map().astype(np.float64), parts["scale_block"].astype(np.float64)
    wanted = scale.astype(np.float64).reshape(-1) - parts["scale_offset"][0]
    distance = np.abs(wanted[:, None] - book * block[0])
    took = distance[np.arange(wanted.size), parts["scale_codes"].reshape(-1)]
    # scale - offset is rounded once to float32 (2^-24, below 2^-126 exact), its quotient by the reciprocal twice more: it moves
    # across a midpoint by 3 * 2^-24 of itself, which is twice that in distances.
    assert (took <= distance.min(axis=1) + 6 * 2.0**-24 * np.abs(wanted)).all()


def test_grids_say_what_the_store_keeps() -> None:
    for scheme in QUANTIZING:
        weight = student(4, 512)
        rounded = rtn(weight, scheme)
        kept = lattice.packed_parts(rounded.codes, scheme, rounded.grid)
        expected = lattice.layout(scheme, 4, 512)
        once = {"scale_block", "scale_offset", "input_scale"} if scheme.scales != "super" else set()
        if scheme.scales == "double":
            assert kept.keys() == {"codes", "scale"}  # not quantized yet
            continue
        assert kept.keys() == expected.keys() - once
        names = {np.dtype(np.uint8): "U8", np.dtype(np.float16): "F16", np.dtype(np.float32): "F32"}
        for name, part in kept.items():
            assert (names[part.dtype], part.shape) == expected[name]
