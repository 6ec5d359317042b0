"""Triton kernels that multiply with codes as they lie in a file: no float copy of a weight is made to decode a token.

The same source runs on NVIDIA and AMD GPUs, and in Triton's interpreter on a CPU (``TRITON_INTERPRET=1``), where tests hold it to
``QuantTensor.dequantize``. A weight is ``(level - zero) * scale``, in float32; sums are float32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

FEW = 4
"""Rows of inputs up to which ``times`` reads codes; for more, ``widen`` and the library's matmul are faster."""

_ROWS, _COLUMNS, _WARPS = 8, 512, 4


@triton.jit
def _levels(codes, table, KIND: tl.constexpr, LOWEST: tl.constexpr):  # type: ignore[no-untyped-def]
    """What codes stand for, float32: a count from LOWEST, a float8, or an entry of a table."""
    if KIND == "linear":
        return codes.to(tl.float32) + LOWEST
    if KIND == "e4m3":
        # Sign, exponent and fraction in the places of float16, whose bias is 8 larger: exact, subnormals too.
        bits = ((codes.to(tl.int32) & 0x80) << 8) | ((codes.to(tl.int32) & 0x7F) << 7)
        return bits.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    return tl.load(table + codes.to(tl.int32))


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
    GROUPS: tl.constexpr,
    PART: tl.constexpr,
):
    """One row of inputs times ROWS rows of weights; a step takes GROUPS groups, or as much of one, PART bytes of each."""
    each: tl.constexpr = 2 if NIBBLES else 1
    x += tl.program_id(0) * into
    y += tl.program_id(0) * out
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None, None]
    groups = into // group
    inside = tl.arange(0, PART)[None, None, :]
    nth = tl.arange(0, GROUPS)[None, :, None]
    total = tl.zeros((ROWS, GROUPS, PART), tl.float32)
    for start in range(0, into, GROUPS * PART * each):
        byte = start // each + nth * PART + inside
        at = byte * each
        there = at < into
        g = (start + nth * PART * each) // group
        real = (row < out) & (g < groups)
        codes = tl.load(packed + row.to(tl.int64) * (into // each) + byte, mask=(row < out) & there, other=0)
        step = tl.load(scale + row * groups + g, mask=real, other=0.0).to(tl.float32)
        first = _levels(codes & 0xF if NIBBLES else codes, table, KIND, LOWEST)
        if ZERO:
            middle = tl.load(zero + row * groups + g, mask=real, other=0).to(tl.float32)
            first -= middle
        part = first * tl.load(x + at, mask=there, other=0.0).to(tl.float32)
        if NIBBLES:
            second = _levels(codes >> 4, table, KIND, LOWEST)
            if ZERO:
                second -= middle
            part += second * tl.load(x + at + 1, mask=there, other=0.0).to(tl.float32)
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
    BYTES: tl.constexpr,
):
    """BYTES bytes of a row of codes as weights."""
    each: tl.constexpr = 2 if NIBBLES else 1
    row = tl.program_id(0).to(tl.int64)
    byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
    at = byte * each
    there = at < into
    groups = into // group
    codes = tl.load(packed + row * (into // each) + byte, mask=there, other=0)
    step = tl.load(scale + row * groups + at // group, mask=there, other=0.0).to(tl.float32)
    first = _levels(codes & 0xF if NIBBLES else codes, table, KIND, LOWEST)
    if ZERO:
        middle = tl.load(zero + row * groups + at // group, mask=there, other=0).to(tl.float32)
        first -= middle
    first = (first * step).to(y.dtype.element_ty)
    if NIBBLES:
        second = _levels(codes >> 4, table, KIND, LOWEST)
        if ZERO:
            second -= middle
        both = tl.join(first, (second * step).to(y.dtype.element_ty))
        place = at[:, None] + tl.arange(0, 2)[None, :]
        tl.store(y + row * into + place, both, mask=place < into)
    else:
        tl.store(y + row * into + at, first, mask=there)


class Codes(torch.nn.Module):
    """The weight of a linear layer as codes on a device.

    Args:
        packed: uint8 [out, in * bits / 8], the even element in the low nibble.
        bits: 4 or 8.
        scale: float16 or float32 [out, groups]. zero: uint8 [out, groups], or None.
        levels: float32 [2**bits], what codes stand for.
        bias: [out], or None.
        step: of inputs that are rounded to 8 bits: None: they are not; 0: each row has its own; else the one of all.
    """

    def __init__(
        self,
        packed: torch.Tensor,
        bits: int,
        scale: torch.Tensor,
        levels: torch.Tensor,
        zero: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        step: float | None = None,
    ) -> None:
        super().__init__()
        self.bits, self.step = bits, step
        self.out_features, self.in_features = len(packed), packed.shape[1] * 8 // bits
        self.group = self.in_features // scale.shape[1]
        self.kind, self.lowest = _kind(levels)
        self.register_buffer("packed", packed.contiguous())
        self.register_buffer("scale", scale.contiguous())
        self.register_buffer("zero", zero)
        self.bias = bias
        self.register_buffer("levels", levels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] to [..., out], in the type of ``x``."""
        if self.step is not None:
            x = rounded(x, self.step)
        flat = x.reshape(-1, self.in_features)
        y = self.times(flat) if len(flat) <= FEW else torch.nn.functional.linear(flat, self.widen(x.dtype))
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, in] to [rows, out], reading codes once for each row."""
        y = torch.empty((len(x), self.out_features), dtype=x.dtype, device=x.device)
        each = 8 // self.bits
        part = min(self.group, _COLUMNS)
        part &= -part  # a power of two that divides the group
        grid = (len(x), triton.cdiv(self.out_features, _ROWS))
        _times[grid](
            x.contiguous(),
            *self._given(),
            y,
            self.out_features,
            self.in_features,
            self.group,
            **self._what(),
            ROWS=_ROWS,
            GROUPS=_COLUMNS // part,
            PART=part // each,
            num_warps=_WARPS,
        )
        return y

    def widen(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight in floats, [out, in]."""
        y = torch.empty((self.out_features, self.in_features), dtype=dtype, device=self.packed.device)
        grid = (self.out_features, triton.cdiv(self.packed.shape[1], 1024))
        _widen[grid](*self._given(), y, self.in_features, self.group, **self._what(), BYTES=1024)
        return y

    def _given(self) -> tuple[torch.Tensor, ...]:
        zero = self.scale if self.zero is None else self.zero
        return self.packed, self.scale, zero, self.levels

    def _what(self) -> dict[str, Any]:
        return {
            "KIND": self.kind,
            "LOWEST": self.lowest,
            "NIBBLES": self.bits == 4,
            "ZERO": self.zero is not None,
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


def rounded(x: torch.Tensor, step: float) -> torch.Tensor:
    """Inputs rounded to 8 bits, by the one step or by each row's own (``step`` 0), as floats again."""
    wide = x.float()
    size: Any = step or wide.abs().amax(-1, keepdim=True).clamp_min(1e-10) / 127
    return (torch.round(wide / size).clamp(-128, 127) * size).to(x.dtype)
