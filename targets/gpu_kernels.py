"""Triton kernels that multiply with codes: no float copy of a weight is made to decode a token.

The same source runs on NVIDIA and AMD GPUs, and in Triton's interpreter on a CPU (``TRITON_INTERPRET=1``), where tests hold it to
``QuantTensor.dequantize``. A weight is ``(level - zero) * scale``, in float32; sums are float32.

Bytes of two codes are paired anew when they are loaded: over a block of codes, a whole part of a group, byte i holds code i in its low
nibble and in its high one the code half a block later. Both halves then lie beside one another, as their inputs do.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

FEW = 4
"""Rows of inputs up to which ``times`` reads codes; for more, ``widen`` and the library's matmul are faster."""

# As they were fastest on an H200: rows of a program, codes of a step, warps, and steps that are unrolled.
_ROWS, _COLUMNS, _WARPS, _UNROLL = 4, 512, 2, 4


@triton.jit
def _levels(codes, table, KIND: tl.constexpr, LOWEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """What codes stand for, float32: a count from LOWEST, a float8, or an entry of a table."""
    wide = codes.to(tl.int32)
    if KIND == "linear":
        # 2^23 and the code, as the bits of a float32: conversions of integers are slow.
        return (wide | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 - LOWEST)
    if KIND == "e4m3":
        # Sign, exponent and fraction in the places of a float32, whose bias is 120 larger: exact, subnormals too.
        bits = ((wide & 0x80) << 24) | ((wide & 0x7F) << 20)
        return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.load(table + wide)


@triton.jit
def _times(  # type: ignore[no-untyped-def]
    x,
    packed,
    scale,
    zero,
    table,
    y,
    out,
    into,
    group,
    KIND: tl.constexpr,
    LOWEST: tl.constexpr,
    NIBBLES: tl.constexpr,
    ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PART: tl.constexpr,
    WHOLE: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """One row of inputs times ROWS rows of weights; a step takes BLOCKS blocks of PART bytes. WHOLE: no row or column is left over."""
    each: tl.constexpr = 2 if NIBBLES else 1
    x += tl.program_id(0) * into
    y += tl.program_id(0) * out
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None, None]
    groups = into // group
    nth = tl.arange(0, BLOCKS)[None, :, None]
    inside = tl.arange(0, PART)[None, None, :]
    packed += row.to(tl.int64) * (into // each)
    total = tl.zeros((ROWS, BLOCKS, PART), tl.float32)
    for start in tl.range(0, into, BLOCKS * PART * each, loop_unroll_factor=UNROLL):
        at = start + nth * (PART * each) + inside
        g = row * groups + (start + nth * (PART * each)) // group
        byte = start // each + nth * PART + inside
        if WHOLE:
            codes = tl.load(packed + byte)
            step = tl.load(scale + g).to(tl.float32)
        else:
            real = (row < out) & (start + nth * (PART * each) < into)
            codes = tl.load(packed + byte, mask=real, other=0)
            step = tl.load(scale + g, mask=real, other=0.0).to(tl.float32)
        there = at < into
        if ZERO:
            middle = tl.load(zero + g) if WHOLE else tl.load(zero + g, mask=real, other=0)
            middle = middle.to(tl.float32)
        first = _levels(codes & 0xF if NIBBLES else codes, table, KIND, LOWEST)
        if ZERO:
            first -= middle
        given = tl.load(x + at) if WHOLE else tl.load(x + at, mask=there, other=0.0)
        part = first * given.to(tl.float32)
        if NIBBLES:
            second = _levels(codes >> 4, table, KIND, LOWEST)
            if ZERO:
                second -= middle
            given = tl.load(x + at + PART) if WHOLE else tl.load(x + at + PART, mask=there, other=0.0)
            part += second * given.to(tl.float32)
        total += part * step
    found = tl.sum(tl.sum(total, 2), 1)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    tl.store(y + row, found.to(y.dtype.element_ty), mask=row < out)


@triton.jit
def _widen(  # type: ignore[no-untyped-def]
    packed,
    scale,
    zero,
    table,
    y,
    into,
    group,
    KIND: tl.constexpr,
    LOWEST: tl.constexpr,
    NIBBLES: tl.constexpr,
    ZERO: tl.constexpr,
    BLOCKS: tl.constexpr,
    PART: tl.constexpr,
):
    """BLOCKS blocks of a row of codes as weights."""
    each: tl.constexpr = 2 if NIBBLES else 1
    row = tl.program_id(0).to(tl.int64)
    begin = (tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)[:, None]) * PART
    byte = begin + tl.arange(0, PART)[None, :]
    at = begin * each + tl.arange(0, PART)[None, :]
    there = at < into
    g = row * (into // group) + begin * each // group
    real = begin * each < into
    codes = tl.load(packed + row * (into // each) + byte, mask=there, other=0)
    step = tl.load(scale + g, mask=real, other=0.0).to(tl.float32)
    first = _levels(codes & 0xF if NIBBLES else codes, table, KIND, LOWEST)
    if ZERO:
        middle = tl.load(zero + g, mask=real, other=0).to(tl.float32)
        first -= middle
    tl.store(y + row * into + at, (first * step).to(y.dtype.element_ty), mask=there)
    if NIBBLES:
        second = _levels(codes >> 4, table, KIND, LOWEST)
        if ZERO:
            second -= middle
        tl.store(y + row * into + at + PART, (second * step).to(y.dtype.element_ty), mask=there)


class Codes(torch.nn.Module):
    """The weight of a linear layer as codes on a device.

    Args:
        packed: uint8 [out, in * bits / 8], the even element in the low nibble.
        bits: 4 or 8.
        scale: float16 or float32 [out, groups]. zero: uint8 [out, groups], or None.
        levels: float32 [2**bits], what codes stand for.
        bias: [out], or None.
        inputs: what is done to inputs before they are multiplied, float32 [..., in]; None: nothing.
    """

    def __init__(
        self,
        packed: torch.Tensor,
        bits: int,
        scale: torch.Tensor,
        levels: torch.Tensor,
        zero: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        inputs: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.inputs = bits, inputs
        self.out_features, self.in_features = len(packed), packed.shape[1] * 8 // bits
        self.group = self.in_features // scale.shape[1]
        self.kind, self.lowest = _kind(levels)
        block = min(self.group, _COLUMNS)
        self.part = (block & -block) * bits // 8  # bytes of a block: a power of two that divides the group
        self.register_buffer("packed", self._paired(packed) if bits == 4 else packed.contiguous())
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("zero", zero)
        self.bias = bias
        self.register_buffer("levels", levels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out], in the type of ``x``."""
        if self.inputs is not None:
            x = self.inputs(x.float()).to(x.dtype)
        flat = x.reshape(-1, self.in_features)
        y = self.times(flat) if len(flat) <= FEW else torch.nn.functional.linear(flat, self.widen(x.dtype))
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in] to [rows, out], reading codes once for each row."""
        y = torch.empty((len(x), self.out_features), dtype=x.dtype, device=x.device)
        _times[len(x), triton.cdiv(self.out_features, _ROWS)](
            x.contiguous(),
            *self._given(),
            y,
            self.out_features,
            self.in_features,
            self.group,
            **self._what(),
            ROWS=_ROWS,
            BLOCKS=_COLUMNS * self.bits // 8 // self.part,
            WHOLE=self.out_features % _ROWS == 0 and self.in_features % _COLUMNS == 0,
            UNROLL=_UNROLL,
            num_warps=_WARPS,
        )
        return y

    def widen(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight in floats, [out, in]."""
        y = torch.empty((self.out_features, self.in_features), dtype=dtype, device=self.packed.device)
        blocks = 1024 // self.part
        grid = (self.out_features, triton.cdiv(self.packed.shape[1], 1024))
        _widen[grid](*self._given(), y, self.in_features, self.group, **self._what(), BLOCKS=blocks)
        return y

    def _paired(self, packed: torch.Tensor) -> torch.Tensor:
        """Bytes that pair neighbours as bytes that pair a block's halves."""
        codes = torch.stack((packed & 0xF, packed >> 4), -1).reshape(len(packed), -1, 2, self.part)
        return (codes[:, :, 0] | (codes[:, :, 1] << 4)).reshape(packed.shape)

    def _given(self) -> tuple[torch.Tensor, ...]:
        zero = self.scale if self.zero is None else self.zero
        return self.packed, self.scale, zero, self.levels

    def _what(self) -> dict[str, Any]:
        return {
            "KIND": self.kind,
            "LOWEST": self.lowest,
            "NIBBLES": self.bits == 4,
            "ZERO": self.zero is not None,
            "PART": self.part,
        }


def _kind(levels: torch.Tensor) -> tuple[str, float]:
    """How a kernel makes levels of codes, and the lowest level where they are counted."""
    count = torch.arange(len(levels), device=levels.device, dtype=torch.float32)
    if torch.equal(levels, count + levels[0]):
        return "linear", float(levels[0])
    if len(levels) == 256:
        floats = count.to(torch.uint8).view(torch.float8_e4m3fn).float()
        same = (levels == floats) | floats.isnan()
        if bool(same.all()):
            return "e4m3", 0.0
    return "table", 0.0
