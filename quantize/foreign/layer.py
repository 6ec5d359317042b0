"""What the formats share: the tensors that stand for one weight, and how they become parts of a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import ModelError
from tapeout.models import Checkpoint, SourceTensor
from tapeout.models.checkpoint import FLOATS
from tapeout.quantize.foreign.schemes import FP8_TENSOR, named, with_float32_scales
from tapeout.quantize.scheme import E4M3_ONE, SCHEMES, Scheme
from tapeout.quantize.tensor import unpack

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Layer:
    """One weight of the model and the tensors that stand for it: ``q_proj.qweight``, … for ``q_proj.weight``.

    Attributes:
        name: of the weight.
        shape: [out, in], as the model's config gives it.
    """

    checkpoint: Checkpoint
    name: str
    shape: tuple[int, ...]

    @property
    def base(self) -> str:
        """The module's name."""
        return self.name.removesuffix(".weight")

    def get(self, suffix: str) -> SourceTensor | None:
        """The tensor ``base.suffix``, if there is one."""
        return self.checkpoint.get(f"{self.base}.{suffix}")

    def source(self, suffix: str, dtypes: tuple[str, ...], *shapes: tuple[int, ...]) -> SourceTensor:
        """The tensor ``base.suffix``, of one of these types and shapes (none given: any shape); else ModelError."""
        found = self.get(suffix)
        if found is None:
            raise ModelError(f"{self.base}.{suffix} is missing in {self.checkpoint.directory}.")
        if found.dtype not in dtypes or (shapes and found.shape not in shapes):
            wanted = " or ".join(str(list(shape)) for shape in shapes) or "any shape"
            raise ModelError(
                f"{found.name} in {found.file} is {found.dtype} {list(found.shape)} where {' or '.join(dtypes)} {wanted} is "
                f"expected for a weight of {list(self.shape)}."
            )
        return found

    def floats(self, suffix: str, *shapes: tuple[int, ...]) -> Floats:
        """A float tensor as float32."""
        return self.source(suffix, FLOATS, *shapes).float32()

    def refuse(self, what: str) -> ModelError:
        """The error of a weight that canonical codes do not carry."""
        return ModelError(f"{self.name} cannot be carried as it is: {what}.")


@dataclass(frozen=True)
class Imported:
    """A weight in canonical codes.

    Attributes:
        packed: gives the codes as ``tensor.pack`` packs them, uint8 [out, ceil(in * bits / 8)].
        parts: the others that ``lattice.layout`` names.
    """

    scheme: Scheme
    packed: Callable[[], Bytes]
    parts: Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Reader:
    """A format under a checkpoint's statement.

    Attributes:
        layer: reads a weight; None: it is not quantized.
        suffixes: of the tensors that may stand for a weight.
        left_behind: endings of tensors that say nothing of weights.
        notes: what else the statement says.
    """

    layer: Callable[[Layer], Imported | None]
    suffixes: tuple[str, ...]
    left_behind: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def integers(
    layer: Layer,
    bits: int,
    scale: Floats,
    zero_point: Bytes | None,
    packed: Callable[[], Bytes],
    activations: Scheme | None = None,
    extra: Mapping[str, npt.NDArray[Any]] | None = None,
) -> Imported:
    """A weight ``(code - zero_point) * scale``; symmetric where every zero point is the middle, or there is none.

    Args:
        scale: float32 [out, groups].
        zero_point: uint8 [out, groups].
        packed: see Imported.
        activations: a scheme whose treatment of inputs is meant; kept where a scheme is known with it.
        extra: parts that go with it.
    """
    into = layer.shape[1]
    group: int | None = into // scale.shape[1]
    symmetric = zero_point is None or bool((zero_point == 2 ** (bits - 1)).all())
    if group == into and bits == 8 and symmetric:
        group = None
    scheme = named(Scheme("", bits, group, "symmetric" if symmetric else "asymmetric"))
    scheme, kept = with_scale(layer, scheme, scale)
    parts = {"scale": kept}
    if activations is not None and replace(activations, name=scheme.name, activations=None) == scheme:
        return Imported(activations, packed, {**parts, **(extra or {})})
    if not symmetric and zero_point is not None:
        return Imported(scheme, packed, {**parts, "zero_point": zero_point})
    return Imported(scheme, packed, parts)


def with_scale(layer: Layer, scheme: Scheme, scale: Floats) -> tuple[Scheme, npt.NDArray[Any]]:
    """Scales as float16 where every one is exactly that, which canonical codes have otherwise; else as float32, and its scheme.

    Raises:
        ModelError: one is NaN or infinite.
    """
    if not np.isfinite(scale).all():
        at = [int(i) for i in np.argwhere(~np.isfinite(scale))[0]]
        raise layer.refuse(f"its scale at {at} is {scale[tuple(at)]}")
    with np.errstate(over="ignore"):
        half = scale.astype(np.float16)
    if np.array_equal(half.astype(np.float32), scale):
        return scheme, half
    return with_float32_scales(scheme), scale


def words_as_packed(words: npt.NDArray[np.int32], in_features: int, bits: int) -> Bytes:
    """Words of 32 bits [rows, n], filled lowest bits first without gaps, are what ``tensor.pack`` packs, and zeros behind."""
    raw = np.ascontiguousarray(words.astype("<i4", copy=False)).view(np.uint8)
    return np.ascontiguousarray(raw[:, : -(-in_features * bits // 8)])


def unpack_words(words: npt.NDArray[np.int32], count: int, bits: int) -> Bytes:
    """The ``count`` integers of each row of such words, uint8 [rows, count]."""
    return np.ascontiguousarray(unpack(words_as_packed(words, count, bits), bits, count))


def word_count(count: int, bits: int) -> int:
    """Words that hold ``count`` integers without gaps."""
    return -(-count * bits // 32)


def e4m3(
    layer: Layer, scale: Floats, codes: Callable[[], Bytes], input_scale: Floats | None = None
) -> Imported:
    """A float8 weight under one scale, or one a row.

    One float32 for the whole tensor is kept as it is, rows of the scale 1 under it; and then the one of its inputs, if it has one.
    """
    out = layer.shape[0]
    if scale.size == 1:
        one = np.full((out, 1), E4M3_ONE, np.uint8)
        parts: dict[str, npt.NDArray[Any]] = {"scale_codes": one, "scale_block": scale.reshape(1)}
        if input_scale is not None:
            return Imported(SCHEMES["fp8-static"], codes, {**parts, "input_scale": _step(layer, input_scale)})
        return Imported(FP8_TENSOR, codes, parts)
    scheme, kept = with_scale(layer, SCHEMES["fp8"], scale.reshape(out, 1))
    return Imported(scheme, codes, {"scale": kept})


def nvfp4(
    packed: Callable[[], Bytes],
    parts: Mapping[str, npt.NDArray[Any]],
    layer: Layer,
    input_scale: Floats | None,
) -> Imported:
    """A weight of E2M1 under E4M3 under a float32, with the scale of its inputs, if it has one."""
    if input_scale is None:
        return Imported(SCHEMES["nvfp4"], packed, parts)
    return Imported(SCHEMES["nvfp4-w4a4"], packed, {**parts, "input_scale": _step(layer, input_scale)})


def _step(layer: Layer, scale: Floats) -> Floats:
    """The scale of inputs, float32 [1]; ModelError for one that is none."""
    step = scale.reshape(1)
    if not 0 < step[0] < np.inf:
        raise layer.refuse(f"the scale of its inputs is {step[0]}")
    return step
