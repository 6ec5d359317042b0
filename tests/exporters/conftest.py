"""What llama.cpp computes, for the tests of GGUF."""

from __future__ import annotations

import ctypes
import runpy
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tapeout.exporters import Artifact, onnx
from tapeout.models import Checkpoint, Model, load, optimum
from tapeout.quantize import Quantized, QuantTensor

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

Logits = npt.NDArray[np.float32]


@pytest.fixture
def llama_cpp_logits() -> Callable[..., Logits]:
    """Logits [tokens, vocab] of a GGUF file: ``llama_cpp_logits(path, ids, swa_full=True)``."""

    def run(path: Path, ids: list[int], *, batch: int = 512, **options: Any) -> Logits:
        import llama_cpp

        # Caches in float32 and no flash attention, so that the arithmetic is float32 all the way.
        runtime = llama_cpp.Llama(
            str(path), n_ctx=len(ids), n_batch=batch, n_ubatch=batch, n_threads=2, n_threads_batch=2, logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, flash_attn=False, verbose=False, **options,
        )  # fmt: skip
        try:
            with ThreadPoolExecutor(
                1
            ) as alone:  # torch leaves other AMX tiles on this thread than ggml configured
                alone.submit(runtime.eval, ids).result()
            return np.array(runtime.scores[: len(ids)])
        finally:
            runtime.close()

    return run


class Ggml:
    """ggml's own quantizers and readers, from the library that llama-cpp-python holds."""

    def __init__(self) -> None:
        import llama_cpp

        folder = Path(llama_cpp.__file__).parent / "lib"
        self._library = ctypes.CDLL(str(next(folder.glob("libggml-base.*"))))
        self._library.ggml_quantize_chunk.restype = ctypes.c_size_t

    def quantize(self, weight: npt.NDArray[np.float32], kind: str) -> npt.NDArray[np.uint8]:
        """Float32 [rows, in] to blocks, uint8 [rows, bytes]; all columns matter alike."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        quant = GGMLQuantizationType[kind]
        per, size = GGML_QUANT_SIZES[quant]
        rows, into = weight.shape
        out = np.empty((rows, into // per * size), np.uint8)
        self._library.ggml_quantize_chunk(
            ctypes.c_int(quant.value), weight.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(0), ctypes.c_int64(rows), ctypes.c_int64(into), None,
        )  # fmt: skip
        return out

    def dequantize(self, packed: npt.NDArray[np.uint8], kind: str) -> npt.NDArray[np.float32]:
        """Blocks, uint8 [rows, bytes], to float32 [rows, in]."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        per, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        out = np.empty((len(packed), packed.shape[1] // size * per), np.float32)
        read = getattr(self._library, f"dequantize_row_{kind.lower().replace('_k', '_K')}")
        read(
            packed.ctypes.data_as(ctypes.c_void_p),
            out.ctypes.data_as(ctypes.c_void_p),
            ctypes.c_int64(out.size),
        )
        return out


@pytest.fixture(scope="session")
def ggml() -> Ggml:
    """``ggml.quantize(weight, "Q4_K")``, ``ggml.dequantize(packed, "Q4_K")``."""
    return Ggml()


FIXTURES = Path(__file__).parent / "data" / "optimum"


@pytest.fixture
def unknown_family(tmp_path: Path) -> Callable[[str], Model]:
    """``unknown_family("gpt2")``: a kept model of a family without a file here, with the graph that optimum made of it."""
    pytest.importorskip("onnxscript")

    def make(name: str) -> Model:
        directory = tmp_path / name
        shutil.copytree(FIXTURES / name / "model", directory)
        checkpoint = Checkpoint(directory, ignored=lambda _: True)
        place = optimum.place_of(directory, checkpoint)
        optimum.read_export(FIXTURES / name / "export", place, name, "optimum-onnx 0.1.0", checkpoint)
        return load(directory)

    return make


@pytest.fixture
def example() -> Callable[..., Any]:
    """``example("sliding_window")`` gives what examples/sliding_window.py's ``make`` does."""
    return lambda name: runpy.run_path(str(EXAMPLES / f"{name}.py"))["make"]()


@pytest.fixture
def wrong() -> Callable[..., list[str]]:
    """Names of the tensors of an ONNX artifact that do not come back as they went in: ``wrong(artifact, quant)``."""

    def differing(artifact: Artifact, quant: Quantized) -> list[str]:
        names, seen = [], set()
        for name, tensor in onnx.read_codes(artifact, quant):
            seen.add(name)
            expected = quant[name]
            if isinstance(tensor, QuantTensor):
                assert isinstance(expected, QuantTensor)
                parts = ((t.packed, t.scale, t.zero_point) for t in (tensor, expected))
                same = all(np.array_equal(a, b) for a, b in zip(*parts, strict=True) if b is not None)
            else:
                same = np.array_equal(tensor, quant.float32(name))
            if not same:
                names.append(name)
        assert seen == quant.keys()
        return names

    return differing
