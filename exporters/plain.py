"""The plainest artifact: canonical codes in one safetensors file a tensor, as the store keeps them, and nothing of a runtime's.

It is what ``targets/null.py`` exports: a worked example of an exporter, and a target for tests that need no device.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tapeout.errors import PackageError
from tapeout.exporters import Artifact, Exact
from tapeout.quantize import Quantized, QuantTensor, Scheme
from tapeout.quantize.tensor import ScaleCodes

_MINIMUM = ("codes", "codebook", "block")


def carries(scheme: Scheme) -> Exact:
    """Everything that has canonical codes."""
    return Exact("float" if scheme.kind == "none" else f"u{scheme.bits}")


def write(quant: Quantized, directory: Path) -> Artifact:
    """Write one ``NAME.safetensors`` a tensor: ``codes``, ``scale``, ``codebook`` and ``zero_point``, or ``weight`` (float32)."""
    for name in quant:
        tensor = quant[name]
        if isinstance(tensor, QuantTensor):
            parts = {"codes": tensor.packed, "scale": tensor.scale, "codebook": tensor.codebook}
            if tensor.zero_point is not None:
                parts["zero_point"] = tensor.zero_point
            if tensor.minimum is not None:
                parts |= {f"minimum_{part}": getattr(tensor.minimum, part) for part in _MINIMUM}
        else:
            parts = {"weight": tensor.float32()}
        save_file(
            {part: np.ascontiguousarray(array) for part, array in parts.items()}, directory / _file(name)
        )
    (directory / "config.json").write_text(json.dumps(dict(quant.model.raw_config), indent=1, sort_keys=True))
    for file in quant.model.tokenizer_files():
        shutil.copyfile(file, directory / file.name)
    return Artifact(
        format="plain",
        directory=directory,
        files=tuple(sorted(path.name for path in directory.iterdir())),
        bytes_per_token=sum(path.stat().st_size for path in directory.glob("*.safetensors")),
        context=quant.model.config.max_position_embeddings,
        containers={name: carries(scheme).container for name, scheme in quant.schemes.items()},
    )


def read_codes(
    artifact: Artifact, quant: Quantized
) -> Iterator[tuple[str, QuantTensor | npt.NDArray[np.float32]]]:
    """Read every tensor of ``quant`` back; PackageError names a file that is not whole."""
    for name in quant:
        yield name, _read(artifact.directory / _file(name))


def read_weights(directory: Path) -> Iterator[tuple[str, npt.NDArray[np.float32]]]:
    """The weights that the files hold, float32, by name; PackageError names a file that is not whole."""
    for path in sorted(directory.glob("*.safetensors")):
        tensor = _read(path)
        yield path.stem, tensor.dequantize() if isinstance(tensor, QuantTensor) else tensor


def _read(path: Path) -> QuantTensor | npt.NDArray[np.float32]:
    try:
        parts = load_file(path)
    except (SafetensorError, OSError) as error:
        raise PackageError(f"{path} cannot be read: {error}.") from error
    if "weight" in parts:
        weight: npt.NDArray[np.float32] = parts["weight"]
        return weight
    bits = (len(parts["codebook"]) - 1).bit_length()
    in_features = parts["codes"].shape[1] * 8 // bits
    return QuantTensor(
        packed=parts["codes"],
        bits=bits,
        in_features=in_features,
        scale=parts["scale"],
        group=in_features // parts["scale"].shape[1],
        codebook=parts["codebook"],
        zero_point=parts.get("zero_point"),
        minimum=_minimum(parts),
    )


def _file(name: str) -> str:
    return f"{name}.safetensors"


def _minimum(parts: dict[str, npt.NDArray[Any]]) -> ScaleCodes | None:
    if "minimum_codes" not in parts:
        return None
    codes, codebook, block = (parts[f"minimum_{part}"] for part in _MINIMUM)
    return ScaleCodes(codes, codebook, block, codes.size // block.size)
