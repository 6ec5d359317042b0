"""GPTQ (AutoGPTQ, GPTQModel): integers in words of 32 bits, lowest first, along ``in``; zero points along ``out``.

    qweight int32 [in * bits / 32, out]   scales [groups, out]   qzeros int32 [groups, out * bits / 32]   g_idx int32 [in]

Format ``gptq`` (v1) keeps every zero point less one, ``gptq_v2`` as it is. The weight is (code - zero_point) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import ModelError
from tapeout.quantize.foreign.layer import (
    Imported,
    Layer,
    Reader,
    integers,
    unpack_words,
    word_count,
    words_as_packed,
)

_BITS = (2, 3, 4, 8)
_SUFFIXES = ("qweight", "scales", "qzeros", "g_idx")


def read(statement: Mapping[str, Any]) -> Reader:
    """Check what the checkpoint says of itself."""
    bits, group = int(statement.get("bits", 4)), int(statement.get("group_size", 128))
    form = statement.get("checkpoint_format") or statement.get("format") or "gptq"
    if form not in ("gptq", "gptq_v2"):
        raise ModelError(f"the GPTQ checkpoint has the format '{form}'; those read are gptq and gptq_v2.")
    if bits not in _BITS:
        raise ModelError(f"the GPTQ checkpoint has {bits} bits; those read are {', '.join(map(str, _BITS))}.")
    if (width := statement.get("pack_dtype") or "int32") != "int32":
        raise ModelError(f"the GPTQ checkpoint is packed into {width}; int32 is read.")
    if beside := [rule for rule in statement.get("dynamic") or {} if not rule.startswith("-:")]:
        raise ModelError(
            f"the GPTQ checkpoint gives {beside[0]} bits or groups of its own (dynamic), which are not read."
        )
    writers = (statement.get("meta") or {}).get("quantizer") or []
    by_gptqmodel = "gptqmodel" in str(writers).lower()
    return Reader(partial(_layer, bits, group, form == "gptq", by_gptqmodel), _SUFFIXES)


def _layer(bits: int, group: int, less_one: bool, by_gptqmodel: bool, layer: Layer) -> Imported | None:
    if layer.get("qweight") is None:
        return None
    out, into = layer.shape
    group = into if group == -1 else group
    groups = -(-into // group)
    if into * bits % 32 or out * bits % 32:
        raise layer.refuse(f"its {into} × {out} integers of {bits} bits do not fill words of 32 bits")
    words = layer.source("qweight", ("I32",), (word_count(into, bits), out))
    scale = layer.floats("scales", (groups, out))
    zeros = layer.source("qzeros", ("I32",), (groups, word_count(out, bits))).bits()
    if into % group:
        raise layer.refuse(
            f"its last group is shorter: group_size {group} does not divide in_features {into}"
        )
    if layer.get("g_idx") is not None:
        _check_order(layer, layer.source("g_idx", ("I32",), (into,)).bits(), group)
    zero_point = _zero_points(layer, zeros, out, bits, less_one, by_gptqmodel)
    return integers(
        layer,
        bits,
        np.ascontiguousarray(scale.T),
        np.ascontiguousarray(zero_point.T),
        lambda: words_as_packed(words.bits().T, into, bits),
    )


def _check_order(layer: Layer, group_of: npt.NDArray[np.int32], group: int) -> None:
    """Refuse columns whose groups are not contiguous."""
    regular = np.arange(len(group_of)) // group
    if not np.array_equal(group_of, regular):
        first = int(np.flatnonzero(group_of != regular)[0])
        raise layer.refuse(
            f"it was quantized with desc_act and its g_idx puts column {first} into group {group_of[first]} instead of "
            f"{regular[first]}; a canonical group is {group} columns side by side. Quantize the original again with desc_act = "
            "False, or with static_groups = True"
        )


def _zero_points(
    layer: Layer, words: npt.NDArray[np.int32], out: int, bits: int, less_one: bool, by_gptqmodel: bool
) -> npt.NDArray[np.uint8]:
    """Zero points, uint8 [groups, out]."""
    stored = unpack_words(words, out, bits)
    if not less_one:
        return stored
    high = 2**bits - 1
    if not (stored == high).any():
        return stored + np.uint8(1)
    # The field of a zero point 0 holds the largest integer, and what was written into its neighbours depends on the writer.
    if by_gptqmodel and bits != 3:
        ones = np.uint32(
            sum(1 << at for at in range(0, 32, bits))
        )  # GPTQModel takes one off every field of a word at once
        return unpack_words((words.view(np.uint32) + ones).view(np.int32), out, bits)
    if by_gptqmodel:
        return (stored + np.uint8(1)) & np.uint8(high)
    raise layer.refuse(
        f"it has zero points stored as {high} in format gptq (v1), which is 0 less one to some writers and {high + 1} less one "
        "to others; save it as gptq_v2 with the library that wrote it"
    )
