"""Read the ranks back through the safetensors library, and put their shares together: what the ``codes`` gate compares with the store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tapeout.errors import PackageError
from tapeout.exporters import Artifact
from tapeout.exporters.streamed import Array
from tapeout.exporters.trtllm import packing
from tapeout.exporters.trtllm.layout import Block, Mapping, Place, places
from tapeout.exporters.trtllm.writer import as_bits, values_of
from tapeout.quantize import Quantized, QuantTensor

Floats = npt.NDArray[np.float32]


class _Share(NamedTuple):
    """Where a block stands: in which rank, under which name, of which expert, from which row on."""

    rank: int
    place: Place
    expert: int
    begin: int
    block: Block


def read_codes(artifact: Artifact, quant: Quantized) -> Iterator[tuple[str, QuantTensor | Floats]]:
    """Yield every tensor that the ranks hold, one in memory at a time, by its Hugging Face name.

    What several ranks hold must be the same in all of them: where it is not, the share is yielded under a name of its own.

    Raises:
        PackageError: a rank is missing or truncated, or config.json is none of a rank checkpoint.
    """
    with ExitStack() as stack:
        said = read_config(artifact.directory)
        mapping = Mapping(int(said["mapping"]["tp_size"]), int(said["mapping"]["pp_size"]))
        ranks = [open_rank(artifact.directory, rank, mapping.world, stack) for rank in range(mapping.world)]
        shares: dict[str, list[_Share]] = {}
        known: list[set[str]] = [set() for _ in ranks]
        for rank in range(mapping.world):
            for place in places(quant.model, mapping, rank):
                known[rank].add(place.name)
                for expert, blocks in enumerate(place.blocks):
                    begin = 0
                    for block in blocks:
                        shares.setdefault(block.name, []).append(_Share(rank, place, expert, begin, block))
                        begin += _height(quant, block)
        for name in quant:
            yield from _joined(name, quant, ranks, shares[name], said["quantization"])
        for rank, opened in enumerate(ranks):
            for name in opened.keys():  # noqa: SIM118  # safetensors' own
                if not {name, name.rpartition(".")[0]} & known[rank] and not name.endswith("scale_to_int"):
                    yield f"{name} of rank {rank}", opened.get_tensor(name).float().numpy()


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json``; PackageError if it is none of a rank checkpoint."""
    try:
        said: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        _ = said["mapping"]["tp_size"], said["mapping"]["pp_size"], said["quantization"]["quant_algo"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PackageError(f"{directory / 'config.json'} is none of a rank checkpoint: {error!r}.") from error
    return said


def open_rank(directory: Path, rank: int, world: int, stack: ExitStack) -> Any:
    """A rank's file; PackageError if it is not there or not whole."""
    from safetensors import SafetensorError, safe_open

    path = directory / f"rank{rank}.safetensors"
    if not path.exists():
        raise PackageError(f"{path} is missing: config.json says {world} ranks. Export the package again.")
    try:
        return stack.enter_context(safe_open(path, "pt"))
    except (SafetensorError, OSError) as error:
        raise PackageError(f"{path} cannot be read: {error}.") from error


def _height(quant: Quantized, block: Block) -> int:
    return len(range(*block.rows.indices(quant.model.specs[block.name].shape[0])))


def _joined(
    name: str, quant: Quantized, ranks: list[Any], shares: list[_Share], said: dict[str, Any]
) -> Iterator[tuple[str, QuantTensor | Floats]]:
    """A tensor of the model from its shares, and each share that is not what another rank has of the same."""
    spec, expected = quant.model.specs[name], quant[name]
    found: dict[tuple[int, int], QuantTensor | Floats] = {}
    for share in shares:
        piece = _read(ranks[share.rank], share, _height(quant, share.block), said, quant)
        at = (share.block.rows.start or 0, share.block.cols.start or 0)
        if at in found and not _equal(found[at], piece):
            yield f"{name} of rank {share.rank}", np.zeros(0, np.float32)
        found.setdefault(at, piece)
    bands = [[found[at] for at in sorted(found) if at[0] == row] for row in sorted({at[0] for at in found})]
    if not all(isinstance(piece, QuantTensor) for piece in found.values()):
        values = [[_values(piece) for piece in band] for band in bands]
        yield name, np.concatenate([np.concatenate(band, axis=-1) for band in values]).reshape(spec.shape)
        return
    codes = [[piece for piece in band if isinstance(piece, QuantTensor)] for band in bands]
    for band in codes:
        for piece in band[1:]:
            if piece.bits == 8 and not np.array_equal(piece.scale, band[0].scale):
                yield f"{name}: the ranks' scales of a row", np.zeros(0, np.float32)
    whole = _under([_beside(band) for band in codes])
    if isinstance(expected, QuantTensor):  # float32 holds a float16 scale
        narrow = whole.scale.astype(np.float16)
        if expected.scale.dtype == np.float16 and np.array_equal(narrow, whole.scale):
            whole = replace(whole, scale=narrow)
    yield name, whole


def _read(
    opened: Any, share: _Share, height: int, said: dict[str, Any], quant: Quantized
) -> QuantTensor | Floats:
    """One share: codes, or float32 values."""
    place, names = share.place, set(opened.keys())
    rows = slice(share.begin, share.begin + height)

    def get(name: str) -> tuple[Array, str]:
        if name not in names:
            raise PackageError(f"rank{share.rank}.safetensors has no {name}.")
        part = opened.get_slice(name)
        tensor = part[share.expert] if place.stacked else part[:]
        if (dtype := str(part.get_dtype())) == "BF16":
            import torch

            return tensor.view(torch.int16).numpy().view(np.uint16), dtype
        return tensor.numpy(), dtype

    linear = place.kind in ("column", "row")
    weight = f"{place.name}.weight" if linear else place.name
    if linear and get(weight)[1] == "I8":
        tensor = packing.unpacked(
            lambda suffix: get(f"{place.name}.{suffix}")[0],
            said["quant_algo"],
            int(said.get("group_size", 0)),
            bool(said.get("has_zero_point")),
        )
        return packing.cut(tensor, rows, slice(None))
    bits, dtype = get(weight)
    values = values_of(bits[rows], dtype)
    if place.offset:  # w + 1 rounds: it is what was put there, or it is not
        own = quant.float32(share.block.name)
        if np.array_equal(as_bits(own + np.float32(place.offset), dtype), bits):
            return own.astype(np.float16).astype(np.float32) if dtype == "F16" else own
        return values - np.float32(place.offset)
    return values


def _equal(one: QuantTensor | Floats, other: QuantTensor | Floats) -> bool:
    if isinstance(one, QuantTensor) and isinstance(other, QuantTensor):
        pairs = [(one.packed, other.packed), (one.scale, other.scale), (one.zero_point, other.zero_point)]
        return all(np.array_equal(mine, theirs) for mine, theirs in pairs if mine is not None)  # type: ignore[arg-type]
    return np.array_equal(_values(one), _values(other))


def _values(piece: QuantTensor | Floats) -> Floats:
    return piece.dequantize() if isinstance(piece, QuantTensor) else piece


def _beside(pieces: list[QuantTensor]) -> QuantTensor:
    """Columns of a tensor put together."""
    first, into = pieces[0], sum(piece.in_features for piece in pieces)
    if first.bits == 8:
        packed = np.concatenate([piece.packed for piece in pieces], axis=1)
        return replace(first, packed=packed, in_features=into, group=into)
    return replace(_concatenated(pieces, 1), in_features=into)


def _under(pieces: list[QuantTensor]) -> QuantTensor:
    """Rows of a tensor put together."""
    return _concatenated(pieces, 0)


def _concatenated(pieces: list[QuantTensor], axis: int) -> QuantTensor:
    zeros = [piece.zero_point for piece in pieces if piece.zero_point is not None]
    return replace(
        pieces[0],
        packed=np.concatenate([piece.packed for piece in pieces], axis=axis),
        scale=np.concatenate([piece.scale for piece in pieces], axis=axis),
        zero_point=np.concatenate(zeros, axis=axis) if zeros else None,
    )
