"""The directory as onnxruntime-genai loads it: the same tokens as our own session generates, whatever the cache is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapeout.exporters import onnx
from tapeout.models import load
from tapeout.quantize import quantize
from tapeout.targets import onnxruntime

pytest.importorskip("onnx")
genai = pytest.importorskip("onnxruntime_genai")

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 16}),
    "window": ("mistral", {"sliding_window": 8, "head_dim": 16}),
    "turned-before": ("llama", {}),
    "latents": ("deepseek_v2", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_it_generates_the_same_tokens(make_model: Callable[..., Path], tmp_path: Path, case: str) -> None:
    family, fields = CASES[case]
    out = tmp_path / "out"
    onnx.write(quantize(load(make_model(family, **fields)), "int4-g32"), out)
    session = onnxruntime.open_session(str(out), context=256, threads=1)
    prompt = session.tokenize("def f(x):\n    return 漢字")
    logits, expected = session.append(prompt)[0], []
    for _ in range(30):
        expected.append(int(logits.argmax()))
        logits = session.decode(expected[-1])
    model = genai.Model(str(out))
    assert genai.Tokenizer(model).encode("def f(x):\n    return 漢字").tolist() == prompt
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=200)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(prompt)
    found: list[int] = []
    while not generator.is_done() and len(found) < 30:
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    stop = expected.index(256) + 1 if 256 in expected else 30
    assert found == expected[:stop]
    assert len(set(np.array(found))) > 1
