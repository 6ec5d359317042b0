"""The graph in standard operators: run by onnxruntime, it is the reference; and its codes are those of the store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapeout.errors import SchemeError
from tapeout.exporters import onnx
from tapeout.models import load
from tapeout.quantize import Quantized, QuantTensor, quantize
from tapeout.validate import reference

library, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

IDS = [(i * 37 + 11) % 256 for i in range(40)]
CLOSE = 1e-4  # of the logits' deviation: float32 sums in another order
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tied": ("llama", "int4-g32", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "zero-points": ("llama", "int4-g32-asym", {"attention_bias": True, "head_dim": 12}),
    "rows": ("qwen3", "int8", {}),
    "floats": ("llama", "none", {"tie_word_embeddings": True}),
    "window": ("gemma2", "int3-g64", {"sliding_window": 8}),
    "fused": ("phi3", "int2-g64", {}),
    "experts": ("mixtral", "int8-g32", {}),
    "latents": ("deepseek_v2", "int4-g32", {}),
}


@pytest.fixture
def written(make_model: Callable[..., Path], tmp_path: Path) -> Callable[..., tuple[Quantized, Path]]:
    def write(family: str, scheme: str, **fields: Any) -> tuple[Quantized, Path]:
        quant = quantize(load(make_model(family, **fields)), scheme)
        artifact = onnx.write(quant, tmp_path / "out", dialect="standard")
        for name, found in onnx.read_codes(artifact, quant, dialect="standard"):
            expected = quant[name]
            if isinstance(found, QuantTensor):
                assert isinstance(expected, QuantTensor)
                assert np.array_equal(found.packed, expected.packed), name
                assert np.array_equal(found.scale, expected.scale), name
                if expected.zero_point is not None:
                    assert np.array_equal(found.zero_point, expected.zero_point), name
            else:
                assert np.array_equal(found, quant.float32(name)), name
        return quant, artifact.directory

    return write


def session_of(directory: Path) -> Any:
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    # onnxruntime makes MatMulNBits of what it finds: with float32 inputs, not with int8 ones.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return runtime.InferenceSession(directory / "model.onnx", options)


def run(session: Any, steps: list[np.ndarray], mask: np.ndarray) -> np.ndarray:
    """Logits [batch, tokens, vocab] of ids [batch, tokens] given in steps, the cache handed on."""
    batch, at, logits = len(mask), 0, []
    past = {
        each.name: np.zeros((batch, each.shape[1], 0, each.shape[3]), np.float32)
        for each in session.get_inputs()
        if each.name.startswith("past_")
    }
    names = [each.name.replace("present", "past_key_values") for each in session.get_outputs()]
    for ids in steps:
        at += ids.shape[1]
        first, *present = session.run(None, {"input_ids": ids, "attention_mask": mask[:, :at], **past})
        logits.append(first)
        past = dict(zip(names[1:], present, strict=True))
    return np.concatenate(logits, axis=1)


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_reference(written, case: str) -> None:
    """In pieces and token by token; the graph holds nothing but standard operators."""
    family, scheme, fields = CASES[case]
    quant, directory = written(family, scheme, **fields)
    model = directory / "model.onnx"
    library.checker.check_model(model, full_check=True)
    graph = library.load(model, load_external_data=False)
    assert {node.domain for node in graph.graph.node} == {""}
    assert [each.domain for each in graph.opset_import] == [""]
    store = str(quant.directory)
    expected = reference.open_session(str(quant.model.directory), store=store, threads=1).prefill(IDS)
    pieces = np.split(np.array([IDS]), [17, 18, 19, 31, 32], axis=1)
    logits = run(session_of(directory), pieces, np.ones((1, len(IDS)), np.int64))[0]
    assert np.abs(logits - expected).max() / expected.std() < CLOSE


def test_a_batch_is_padded_on_the_left(written) -> None:
    _, directory = written("mistral", "int4-g32", sliding_window=8)
    session = session_of(directory)
    short = run(session, [np.array([IDS[:25]])], np.ones((1, 25), np.int64))[0]
    both = np.array([IDS[:32], [0] * 7 + IDS[:25]])
    mask = np.ones((2, 32), np.int64)
    mask[1, :7] = 0
    logits = run(session, [both[:, :30], both[:, 30:31], both[:, 31:]], mask)[1, 7:]
    assert np.abs(logits - short).max() / short.std() < CLOSE


@pytest.mark.parametrize("scheme", ["nf4", "fp8"])
def test_what_standard_integers_do_not_hold_is_named(written, scheme: str) -> None:
    with pytest.raises(SchemeError, match=rf"is {scheme}, which .* What fits: int"):
        written("llama", scheme)
