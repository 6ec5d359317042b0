"""How canonical codes lie in the initializers of an ONNX graph: for each scheme a container, its parts, and the two directions.

Layouts: onnxruntime's ``com.microsoft`` operators MatMulNBits, GatherBlockQuantized, QMoE and MatMulBnb4 (``ContribOperators.md``), and
ONNX's own float types. An inverse needs a tensor of the same scheme for what the file does not say (bits, codebook); what it
cannot express as a canonical code comes back so that it equals nothing: a scale as NaN, a code as one beyond the scheme's bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from tapeout.exporters import Carry, Exact, Refused
from tapeout.models import Role
from tapeout.quantize import SCHEMES, QuantTensor, Scheme
from tapeout.quantize.tensor import pack, unpack

Bytes = npt.NDArray[np.uint8]
Parts = dict[str, npt.NDArray[np.generic]]
Shapes = dict[str, tuple[str, tuple[int, ...]]]
"""Of each part its ONNX type (``UINT8``) and its shape."""

_BLOCKS = (128, 64, 32, 16)  # for rows under one scale: the fewer scales, the fewer bytes

NONE = "the checkpoint's own"
FLOAT8 = "FLOAT8E4M3FN"
FLOAT4 = "FLOAT4E2M1"


@dataclass(frozen=True)
class NBits:
    """MatMulNBits, GatherBlockQuantized and QMoE: codes of 2, 4 or 8 bits in blocks along ``in``, under a float32 scale each.

    Attributes:
        bits: of a code in the file.
        block: weights under a scale.
        zero_point: whether each block has one; otherwise it is 2**(bits - 1).

    Parts: ``codes`` uint8 [out, in * bits / 8], lowest bits first along ``in``; ``scales`` float32 [out, in / block];
    ``zero_points`` uint8 [out, ceil(in / block * bits / 8)], packed in the same way.
    """

    bits: int
    block: int
    zero_point: bool = False

    @property
    def kind(self) -> str:
        """What the carry table and a package's manifest call it."""
        return f"MatMulNBits {self.bits}-bit{' asymmetric' if self.zero_point else ''}"

    def shapes(self, out: int, into: int) -> Shapes:
        """The parts of a matrix."""
        blocks = into // self.block
        found: Shapes = {"codes": ("UINT8", (out, into * self.bits // 8)), "scales": ("FLOAT", (out, blocks))}
        if self.zero_point:
            found["zero_points"] = ("UINT8", (out, -(-blocks * self.bits // 8)))
        return found

    def blocks(self, out: int, into: int) -> tuple[int, ...]:
        """The shape that MatMulNBits wants of the codes."""
        return out, into // self.block, self.block * self.bits // 8

    def pack(self, tensor: QuantTensor) -> Parts:
        """The parts of rows of a tensor."""
        codes: Bytes = np.asarray(tensor.packed)
        if tensor.bits != self.bits:  # the same values in the middle of a wider range
            codes = pack(tensor.codes() + np.uint8(self._shift(tensor)), self.bits)
        scale = tensor.scale.astype(np.float32)
        found: Parts = {"codes": codes, "scales": np.repeat(scale, tensor.group // self.block, axis=1)}
        if self.zero_point:
            assert tensor.zero_point is not None
            found["zero_points"] = pack(np.asarray(tensor.zero_point), self.bits)
        return found

    def unpack(self, parts: Mapping[str, npt.NDArray[np.generic]], like: QuantTensor) -> QuantTensor:
        """Undo ``pack``."""
        packed = np.asarray(parts["codes"]).view(np.uint8)
        found = replace(like, scale=_one_scale(parts["scales"], like), scale_codes=None)
        if self.zero_point:
            blocks = like.in_features // self.block
            found = replace(found, zero_point=unpack(parts["zero_points"].view(np.uint8), self.bits, blocks))
        if like.bits == self.bits:
            return replace(found, packed=packed)
        # In uint8 a code below zero wraps to one beyond the scheme's bits.
        codes = unpack(packed, self.bits, like.in_features) - np.uint8(self._shift(like))
        return _with_codes(found, codes)

    def _shift(self, tensor: QuantTensor) -> int:
        return 0 if self.zero_point else int(2 ** (self.bits - 1) - 2 ** (tensor.bits - 1))


@dataclass(frozen=True)
class Bnb4:
    """MatMulBnb4: NF4 as bitsandbytes has it, 64 weights under a float32.

    Parts: ``codes`` uint8 [out * in / 2], the even element in the *high* nibble; ``scales`` float32 [out * in / 64].
    """

    block: int = 64

    @property
    def kind(self) -> str:
        """What the carry table and a package's manifest call it."""
        return "MatMulBnb4"

    def shapes(self, out: int, into: int) -> Shapes:
        """The parts of a matrix."""
        return {"codes": ("UINT8", (out * into // 2,)), "scales": ("FLOAT", (out * into // self.block,))}

    def pack(self, tensor: QuantTensor) -> Parts:
        """The parts of rows of a tensor."""
        return {"codes": _swap(np.asarray(tensor.packed)), "scales": tensor.scale.astype(np.float32)}

    def unpack(self, parts: Mapping[str, npt.NDArray[np.generic]], like: QuantTensor) -> QuantTensor:
        """Undo ``pack``."""
        packed = _swap(parts["codes"].view(np.uint8)).reshape(like.packed.shape)
        return replace(like, packed=packed, scale=_one_scale(parts["scales"], like), scale_codes=None)


@dataclass(frozen=True)
class Float8:
    """E4M3 by its eight bits, which are the codes, and a float32 scale a row.

    Parts: ``codes`` float8e4m3fn [out, in]; ``scales`` float32 [out, 1].
    """

    @property
    def kind(self) -> str:
        """What the carry table and a package's manifest call it."""
        return FLOAT8

    def shapes(self, out: int, into: int) -> Shapes:
        """The parts of a matrix."""
        return {"codes": (FLOAT8, (out, into)), "scales": ("FLOAT", (out, 1))}

    def pack(self, tensor: QuantTensor) -> Parts:
        """The parts of rows of a tensor."""
        return {"codes": np.asarray(tensor.packed), "scales": tensor.scale.astype(np.float32)}

    def unpack(self, parts: Mapping[str, npt.NDArray[np.generic]], like: QuantTensor) -> QuantTensor:
        """Undo ``pack``."""
        packed = parts["codes"].view(np.uint8)
        return replace(like, packed=packed, scale=_one_scale(parts["scales"], like), scale_codes=None)


@dataclass(frozen=True)
class Linear:
    """ONNX's own integers, for DequantizeLinear and matmuls of integers: signed where there is no zero point.

    Attributes:
        bits: of a code in the file: 4 or 8.
        block: weights under a scale; None: a row.
        zero_point: whether each block has one; codes and zero points are then unsigned.
        turned: [in, out], as MatMul takes it; otherwise [out, in], for lookups.
        static: whether the calibrated scale of int8 inputs is there.
        scales: their ONNX type: FLOAT or FLOAT16.

    Parts, turned: ``codes`` (u)int4 or (u)int8 [in, out]; ``scales`` [in / block, out], or [out] of rows;
    ``zero_points`` as the codes [in / block, out]; ``input_scale`` float32 [].
    """

    bits: int
    block: int | None
    zero_point: bool
    turned: bool
    static: bool = False
    scales: str = "FLOAT"

    @property
    def kind(self) -> str:
        """ONNX's type of the codes."""
        return f"{'U' if self.zero_point else ''}INT{self.bits}"

    @property
    def axis(self) -> int:
        """What DequantizeLinear calls so: along which blocks lie, or the one axis of the scales."""
        return int(self.turned == (self.block is None))

    def shapes(self, out: int, into: int) -> Shapes:
        """The parts of a matrix."""
        each = (into // self.block, out) if self.block else (out,)
        if self.block and not self.turned:
            each = each[::-1]
        found: Shapes = {
            "codes": (self.kind, (into, out) if self.turned else (out, into)),
            "scales": (self.scales, each),
        }
        if self.zero_point:
            found["zero_points"] = (self.kind, each)
        if self.static:
            found["input_scale"] = ("FLOAT", ())
        return found

    def pack(self, tensor: QuantTensor) -> Parts:
        """The parts of a whole tensor, since columns become rows."""
        signed = np.uint8(0 if self.zero_point else 2 ** (tensor.bits - 1))
        codes = tensor.codes() - signed
        scale = tensor.scale.astype(np.float16 if self.scales == "FLOAT16" else np.float32)
        parts: Parts = {"codes": self._integers(codes), "scales": scale.T if self.turned else scale}
        if self.zero_point:
            assert tensor.zero_point is not None
            parts["zero_points"] = self._integers(np.asarray(tensor.zero_point))
        if self.static:
            parts["input_scale"] = np.array(tensor.input_scale, np.float32)
        return parts

    def unpack(self, parts: Mapping[str, npt.NDArray[np.generic]], like: QuantTensor) -> QuantTensor:
        """Undo ``pack``; the parts are as onnx gives them: an integer a byte."""
        signed = 0 if self.zero_point else 2 ** (like.bits - 1)
        codes = self._rows(parts["codes"], *like.shape).astype(np.int16) + signed
        scale = self._rows(parts["scales"], *like.scale.shape)
        found = replace(like, scale=_one_scale(scale, like), scale_codes=None)
        if self.zero_point:
            points = self._rows(parts["zero_points"], *like.scale.shape)
            found = replace(found, zero_point=points.astype(np.uint8))
        if self.static:
            found = replace(found, input_scale=parts["input_scale"].reshape(-1)[0])
        return _with_codes(found, codes.astype(np.uint8))

    def _rows(self, part: npt.NDArray[np.generic], rows: int, columns: int) -> npt.NDArray[np.generic]:
        return part.reshape(columns, rows).T if self.turned else part.reshape(rows, columns)

    def _integers(self, values: Bytes) -> Bytes:
        """Packed as ONNX packs them: all of a tensor in a row, of two 4-bit ones the first in the low nibble."""
        flat = np.ascontiguousarray(values.T if self.turned else values).reshape(1, -1)
        return flat if self.bits == 8 else pack(flat & np.uint8(15), 4)


@dataclass(frozen=True)
class Floats:
    """ONNX's own narrow floats, for DequantizeLinear: E4M3 under a float16 a row, or E2M1 in blocks of 16 under E4M3 under a float32.

    Attributes:
        bits: of a code: 8 (E4M3) or 4 (E2M1).
        turned: [in, out], as MatMul takes it; otherwise [out, in], for lookups.
        static: of E4M3: under one float32 a tensor, and the calibrated scale of its inputs is there.

    Parts, turned, of 8 bits: ``codes`` float8e4m3fn [in, out]; ``scales`` float16 [out], or float32 [] and ``input_scale`` float32 []. Of 4: ``codes`` float4e2m1 [in, out], two a
    byte, the first in the low nibble; ``scales`` float8e4m3fn [in / 16, out]; ``scale`` float32 [].
    """

    bits: int
    turned: bool
    static: bool = False
    block: ClassVar[int] = 16

    @property
    def kind(self) -> str:
        """ONNX's type of the codes."""
        return FLOAT8 if self.bits == 8 else FLOAT4

    @property
    def axis(self) -> int:
        """What DequantizeLinear calls so."""
        return int(self.turned == (self.bits == 8))

    def shapes(self, out: int, into: int) -> Shapes:
        """The parts of a matrix."""
        codes = (self.kind, (into, out) if self.turned else (out, into))
        if self.static:
            return {"codes": codes, "scales": ("FLOAT", ()), "input_scale": ("FLOAT", ())}
        if self.bits == 8:
            return {"codes": codes, "scales": ("FLOAT16", (out,))}
        each = (into // self.block, out) if self.turned else (out, into // self.block)
        return {"codes": codes, "scales": (FLOAT8, each), "scale": ("FLOAT", ())}

    def pack(self, tensor: QuantTensor) -> Parts:
        """The parts of a whole tensor."""
        codes = self._turn(tensor.codes()).reshape(1, -1)
        if self.static:
            assert tensor.scale_codes is not None
            step = np.array(tensor.input_scale, np.float32)
            return {"codes": codes, "scales": tensor.scale_codes.block, "input_scale": step}
        if self.bits == 8:
            return {"codes": codes, "scales": tensor.scale}
        assert tensor.scale_codes is not None
        scale = tensor.scale_codes
        return {"codes": pack(codes, 4), "scales": self._turn(scale.codes), "scale": scale.block}

    def unpack(self, parts: Mapping[str, npt.NDArray[np.generic]], like: QuantTensor) -> QuantTensor:
        """Undo ``pack``; the parts are as onnx gives them: a number a byte."""
        out, into = like.shape
        codes = self._back(parts["codes"], out, into)
        if self.static:
            assert like.scale_codes is not None
            scale = replace(like.scale_codes, block=parts["scales"].astype(np.float32).reshape(1))
            step = parts["input_scale"].reshape(-1)[0]
            found = replace(like, scale=scale.values(), scale_codes=scale, input_scale=step)
            return _with_codes(found, codes)
        if self.bits == 8:
            found = replace(like, scale=_one_scale(parts["scales"], like), scale_codes=None)
            return _with_codes(found, codes)
        assert like.scale_codes is not None
        scale = replace(
            like.scale_codes,
            codes=self._back(parts["scales"], *like.scale.shape),
            block=parts["scale"].astype(np.float32).reshape(like.scale_codes.block.shape),
        )
        found = replace(like, scale=scale.values(), scale_codes=scale)
        return _with_codes(found, codes)

    def _turn(self, values: Bytes) -> Bytes:
        return np.ascontiguousarray(values.T if self.turned else values)

    def _back(self, part: npt.NDArray[np.generic], rows: int, columns: int) -> Bytes:
        flat = np.ascontiguousarray(part).view(np.uint8)
        return np.ascontiguousarray(
            flat.reshape(columns, rows).T if self.turned else flat.reshape(rows, columns)
        )


Container = NBits | Bnb4 | Float8 | Linear | Floats


def container_of(scheme: Scheme, into: int) -> Container | None:
    """The container of a matrix with rows of ``into`` weights; None: there is none, of the scheme or of such rows."""
    if scheme.activations in ("e4m3-static", "e2m1-static"):
        return None
    if scheme.activations:  # what kernels that multiply integers with integers take
        static = scheme.activations == "int8-static"
        return Linear(scheme.bits, scheme.group, zero_point=False, turned=True, static=static)
    if scheme.levels == "nf4":
        return Bnb4()
    if scheme.levels == "e4m3" and scheme.scales == "float16":
        return Float8()
    bits = {2: 2, 3: 4, 4: 4, 6: 8, 8: 8}.get(scheme.bits)
    block = block_of(scheme, into)
    if bits is None or block is None or scheme.kind not in ("symmetric", "asymmetric"):
        return None
    return NBits(bits, block, zero_point=scheme.kind == "asymmetric")


def linear_of(scheme: Scheme, into: int, *, turned: bool) -> Linear | None:
    """The container of a matrix in standard operators; None: there is none."""
    bits = {2: 4, 3: 4, 4: 4, 6: 8, 8: 8}.get(scheme.bits)
    if bits is None or scheme.kind not in ("symmetric", "asymmetric"):
        return None
    return Linear(bits, scheme.group, scheme.kind == "asymmetric", turned)


def kernel_width(head_dim: int) -> int:
    """Elements of a head as GroupQueryAttention takes it: a multiple of 8."""
    return -(-head_dim // 8) * 8


def block_of(scheme: Scheme, into: int) -> int | None:
    """Weights that share a scale in the file; None: no block divides the rows."""
    if scheme.group:
        return scheme.group
    return next((block for block in _BLOCKS if into % block == 0), None)


def as_held(scheme: Scheme, role: Role) -> Scheme:
    """The scheme by which a tensor is held: a table that is looked up has no inputs to round, nor has a head that shares it."""
    if scheme.activations and role is Role.EMBEDDING:
        if scheme.kind == "codebook":
            return replace(scheme, activations=None)
        return replace(SCHEMES["int8"], name=scheme.name)
    return scheme


def input_block(scheme: Scheme, into: int) -> int | None:
    """Inputs of a matmul that ONNX Runtime rounds to int8 under one scale, as deployed; None: it leaves them float32.

    Not asked of a scheme that says itself how inputs are rounded.
    """
    container = container_of(scheme, into)
    # There are no int8 kernels of 2 bits for the shortest and the longest blocks.
    rounds = isinstance(container, NBits) and (container.bits > 2 or container.block in (32, 64, 128))
    return container.block if rounds and isinstance(container, NBits) else None


def carries(scheme: Scheme) -> Carry:
    """How ONNX Runtime's operators hold a scheme."""
    if scheme.kind == "none":
        return Exact(NONE)
    container = container_of(scheme, _BLOCKS[0])
    if container is None:
        if scheme.kind == "affine":
            return Refused("MatMulNBits has no minimum beside the scale.", "int4-g32-asym")
        if scheme.activations:
            nearest = "fp8" if scheme.levels == "e4m3" else "int4-g32"
            return Refused("onnxruntime has no kernel on CPUs that rounds inputs to narrow floats.", nearest)
        return Refused("onnxruntime has no kernel for these levels on CPUs.", "int4-g32")
    if isinstance(container, Bnb4):
        return Exact("MatMulBnb4, slow", 4 + 32 / container.block)
    if isinstance(container, Float8):
        return Exact(f"{FLOAT8}, float32 in memory")
    if isinstance(container, Linear):
        each = "calibrated" if container.static else "a token"
        return Exact(f"{container.kind}, inputs too, their scale {each}")
    assert isinstance(container, NBits)
    bits = container.bits + (32 + container.bits * container.zero_point) / container.block
    wider = f", at {bits:g} bits" if container.bits != scheme.bits else ""
    return Exact(container.kind + wider, bits)


def _swap(packed: Bytes) -> Bytes:
    """Exchange the nibbles of each byte."""
    swapped: Bytes = packed << np.uint8(4) | packed >> np.uint8(4)
    return swapped


def _one_scale(
    scales: npt.NDArray[np.generic], like: QuantTensor
) -> npt.NDArray[np.float16] | npt.NDArray[np.float32]:
    """One scale a group [out, groups], in ``like``'s type; NaN where the blocks of a group do not agree or it does not fit."""
    given = np.ascontiguousarray(scales)
    wide = given.astype(np.float32) if given.dtype == np.float16 else given.view(np.float32)
    wide = wide.reshape(*like.scale.shape, -1)
    bits = wide.view(np.uint32)
    with np.errstate(over="ignore", invalid="ignore"):
        one = wide[:, :, 0].astype(like.scale.dtype)
        same = (bits == bits[:, :, :1]).all(axis=2) & (
            one.astype(np.float32).view(np.uint32) == bits[:, :, 0]
        )
    return np.where(same, one, like.scale.dtype.type(np.nan))


def _with_codes(like: QuantTensor, codes: Bytes) -> QuantTensor:
    """``like`` with these codes [out, in]; with one beyond its bits, a tensor of 8 bits that has no value for it."""
    if codes.max(initial=0) < len(like.codebook):
        return replace(like, packed=pack(codes, like.bits))
    codebook = np.full(256, np.nan, np.float32)
    codebook[: len(like.codebook)] = like.codebook
    return replace(like, packed=codes, bits=8, codebook=codebook)
