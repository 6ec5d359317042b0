"""AWQ (AutoAWQ, version ``gemm``): integers of 4 bits in words of 32 along ``out``, in an order of their own.

    qweight int32 [in, out / 8]   scales [groups, out]   qzeros int32 [groups, out / 8]

Nibble i of a word, lowest first, is that of row 0, 2, 4, 6, 1, 3, 5, 7 of eight. The weight is (code - zero_point) * scale.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import ModelError
from tapeout.quantize.foreign.layer import Bytes, Imported, Layer, Reader, integers, unpack_words
from tapeout.quantize.tensor import pack

_NIBBLE_OF = np.array([0, 4, 1, 5, 2, 6, 3, 7])  # for each of eight rows, where it lies


def read(statement: Mapping[str, Any]) -> Reader:
    """Check what the checkpoint says of itself."""
    bits = int(statement.get("bits", statement.get("w_bit", 4)))
    group = int(statement.get("group_size", statement.get("q_group_size", 128)))
    form = str(statement.get("version") or statement.get("format") or "gemm").lower()
    if form != "gemm":
        raise ModelError(
            f"the AWQ checkpoint has the version '{form}', which is packed otherwise; gemm is read."
        )
    if bits != 4:
        raise ModelError(f"the AWQ checkpoint has {bits} bits; 4 are read.")
    return Reader(partial(_layer, group), ("qweight", "scales", "qzeros"))


def _layer(group: int, layer: Layer) -> Imported | None:
    if layer.get("qweight") is None:
        return None
    out, into = layer.shape
    group = into if group == -1 else group
    if into % group or out % 8:
        raise layer.refuse(
            f"group_size {group} does not divide in_features {into}, or 8 not out_features {out}"
        )
    words = layer.source("qweight", ("I32",), (into, out // 8))
    scale = layer.floats("scales", (into // group, out))
    zeros = layer.source("qzeros", ("I32",), (into // group, out // 8)).bits()
    return integers(
        layer,
        4,
        np.ascontiguousarray(scale.T),
        np.ascontiguousarray(_rows(zeros).T),
        lambda: pack(np.ascontiguousarray(_rows(words.bits()).T), 4),
    )


def _rows(words: npt.NDArray[np.int32]) -> Bytes:
    """Integers of words [n, out / 8] in the order of the rows, uint8 [n, out]."""
    nibbles = unpack_words(words, words.shape[1] * 8, 4).reshape(len(words), -1, 8)
    return nibbles[:, :, _NIBBLE_OF].reshape(len(words), -1)
