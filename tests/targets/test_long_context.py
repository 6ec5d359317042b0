"""Contexts of more than 200,000 tokens: written, run in chunks, and right at the far end against a float64 computation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pytest

from tapeout.exporters import gguf, onnx
from tapeout.models import load
from tapeout.quantize import Quantized, QuantTensor, quantize
from tapeout.targets import llama_cpp, onnxruntime

pytest.importorskip("llama_cpp")
pytest.importorskip("onnxruntime")
MakeModel = Callable[..., Path]
Array = npt.NDArray[np.float64]

CONTEXT, LENGTH, WINDOW, DIM = 262144, 200_001, 64, 16
IDS = [(i * 37 + i // 256 * 11) % 256 for i in range(LENGTH)]
THETA = 5e5
ROPES: dict[str, dict[str, Any]] = {
    "llama3": {
        "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    },
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32768},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * (DIM // 2),
        "long_factor": [1.0 + 3 * i for i in range(DIM // 2)],
        "original_max_position_embeddings": 4096,
    },
}  # fmt: skip


def frequencies(name: str) -> tuple[Array, float]:
    """Radians a position of each pair, and what cosine and sine are multiplied by; as the papers put it, one by one."""
    p, plain = ROPES[name], [THETA ** (-2 * i / DIM) for i in range(DIM // 2)]
    trained = p["original_max_position_embeddings"]
    if name == "longrope":
        stretched = [f / by for f, by in zip(plain, p["long_factor"], strict=True)]
        return np.array(stretched), math.sqrt(1 + math.log(CONTEXT / trained) / math.log(trained))
    found = []
    for i, f in enumerate(plain):
        turns = trained * f / (2 * math.pi)
        if name == "llama3":
            kept = min(1.0, max(0.0, (turns - 1) / (4 - 1)))
        else:
            edges = [DIM * math.log(trained / (n * 2 * math.pi)) / (2 * math.log(THETA)) for n in (32, 1)]
            low, high = max(0, math.floor(edges[0])), min(DIM - 1, math.ceil(edges[1]))
            kept = 1 - min(1.0, max(0.0, (i - low) / (high - low)))
        found.append(kept * f + (1 - kept) * f / p["factor"])
    return np.array(found), 1.0 if name == "llama3" else 0.1 * math.log(p["factor"]) + 1


def last_logits(
    quant: Quantized,
    ids: list[int],
    rope: str,
    window: int | None,
    angles: type[np.floating[Any]] = np.float64,
) -> Array:
    """Logits after the last token in float64, float64 [vocab]: of the dequantized weights, layer by layer.

    With a window, from the tokens that reach it; without, the model has one layer, of which the last token's attention alone counts.
    """
    c = quant.model.decoder
    w = {
        name: each.dequantize() if isinstance(each, QuantTensor) else each.read()
        for name, each in quant.items()
    }
    w = {name: np.asarray(each, np.float64) for name, each in w.items()}
    frequency, factor = frequencies(rope)
    first = max(0, len(ids) - c.num_layers * window) if window else 0
    place = np.arange(first, len(ids))
    x = w["model.embed_tokens.weight"][ids[first:]]
    angle = (place[:, None, None].astype(angles) * frequency.astype(angles)).astype(np.float64)
    cos, sin = np.cos(angle) * factor, np.sin(angle) * factor

    def norm(y: Array, name: str) -> Array:
        return y / np.sqrt((y * y).mean(-1, keepdims=True) + c.rms_norm_eps) * w[name]

    def turn(y: Array) -> Array:
        a, b = y[..., : DIM // 2], y[..., DIM // 2 :]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    for layer in range(c.num_layers):
        at = f"model.layers.{layer}"
        y = norm(x, f"{at}.input_layernorm.weight")
        sizes = [c.num_heads, c.num_kv_heads, c.num_kv_heads]
        if c.fused:
            qkv = np.split(y @ w[f"{at}.self_attn.qkv_proj.weight"].T, np.cumsum(sizes[:2]) * DIM, -1)
        else:
            qkv = [y @ w[f"{at}.self_attn.{part}_proj.weight"].T for part in "qkv"]
        q, k, v = (each.reshape(len(y), n, DIM) for each, n in zip(qkv, sizes, strict=True))
        q, k = turn(q), turn(k)
        k, v = (np.repeat(each, c.num_heads // c.num_kv_heads, axis=1) for each in (k, v))
        rows = range(len(y)) if window else [len(y) - 1]
        out = []
        for row in rows:
            begin = max(0, row + 1 - window) if window else 0
            scores = np.einsum("hd,thd->ht", q[row], k[begin : row + 1]) / math.sqrt(DIM)
            share = np.exp(scores - scores.max(-1, keepdims=True))
            share /= share.sum(-1, keepdims=True)
            out.append(np.einsum("ht,thd->hd", share, v[begin : row + 1]).reshape(-1))
        x = x[rows[0] :] + np.array(out) @ w[f"{at}.self_attn.o_proj.weight"].T
        y = norm(x, f"{at}.post_attention_layernorm.weight")
        if c.fused:
            gate, up = np.split(y @ w[f"{at}.mlp.gate_up_proj.weight"].T, 2, -1)
        else:
            gate, up = (y @ w[f"{at}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{at}.mlp.down_proj.weight"].T
    logits: Array = norm(x[-1], "model.norm.weight") @ w["lm_head.weight"].T
    return logits


def model(
    make_model: MakeModel, rope: str, window: int | None, scheme: str = "int4-g32", **fields: Any
) -> Quantized:
    family = "phi3" if rope == "longrope" else "mistral" if window else "llama"
    own = {"original_max_position_embeddings": 4096, "head_dim": None} if rope == "longrope" else {}
    given: dict[str, Any] = {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": DIM, "rope_theta": THETA,
        "max_position_embeddings": CONTEXT, "rope_scaling": ROPES[rope], "sliding_window": window,
    }  # fmt: skip
    return quantize(load(make_model(family, dtype="F32", **given | own | fields)), scheme)


def apart(expected: Array, found: npt.NDArray[np.float32]) -> float:
    """Largest difference in units of the standard deviation."""
    return float(np.abs(expected - found).max() / expected.std())


@pytest.mark.slow
@pytest.mark.parametrize("rope", ROPES)
def test_onnx_is_right_at_position_200000(make_model: MakeModel, tmp_path: Path, rope: str) -> None:
    """Two layers of windows, so that it takes seconds: 200,001 tokens, or the last of them, which is all that windows reach.

    float32 sums in another order than float64's: 1e-4 of the logits' deviation, as everywhere.
    """
    quant = model(make_model, rope, WINDOW)
    artifact = onnx.write(quant, tmp_path / "out", exact=True)
    assert artifact.context == CONTEXT
    # Cosine and sine, float32 [positions, pairs]; LongRoPE's twice.
    tables = 2 * (2 if rope == "longrope" else 1) * CONTEXT * (DIM // 2) * 4
    assert tables < (tmp_path / "out" / "model.onnx.data").stat().st_size < tables + 400_000
    session = onnxruntime.open_session(str(tmp_path / "out"), context=CONTEXT)
    assert isinstance(session, onnxruntime.OnnxRuntime)
    assert sum(cache.nbytes for cache in session._cache) == 2 * 2 * 2 * DIM * (WINDOW + WINDOW // 8 + 1) * 4
    begin = 0 if rope == "llama3" else LENGTH - 2000
    session._length = begin
    found = session.append(IDS[begin:])[0]
    expected = last_logits(quant, IDS, rope, WINDOW)
    assert apart(expected, found) < 1e-4
    # Angles in float32 would be seen: they are off by up to 200,000 * 2^-24 = 0.012 radians.
    assert apart(expected, last_logits(quant, IDS, rope, WINDOW, np.float32)) > 1e-4
    assert apart(last_logits(quant, [*IDS, 7], rope, WINDOW), session.decode(7)) < 1e-4
    session.close()


@pytest.mark.slow
def test_onnx_attends_to_200000_tokens(make_model: MakeModel, tmp_path: Path) -> None:
    """One layer without a window: 20 billion scores, in chunks, and memory that is the cache's."""
    quant = model(
        make_model, "yarn", None, "none", num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
    )
    onnx.write(quant, tmp_path / "out", exact=True)
    session = onnxruntime.open_session(str(tmp_path / "out"), context=CONTEXT)
    assert isinstance(session, onnxruntime.OnnxRuntime)
    before = psutil.Process().memory_info().rss
    found = session.append(IDS)[0]
    grown = psutil.Process().memory_info().rss - before
    cache = 2 * DIM * LENGTH * 4
    # Beside keys and values the rows of the tables that were read, and what a chunk of 512 takes.
    assert cache < grown < cache + 2 * CONTEXT * (DIM // 2) * 4 + (16 << 20)
    # Sums of 200,000 terms: sqrt(200,000) 2^-24 = 3e-5 of their size.
    assert apart(last_logits(quant, IDS, "yarn", None), found) < 1e-4
    session.close()


def test_llama_cpp_is_near_at_position_200000(make_model: MakeModel, tmp_path: Path) -> None:
    """llama.cpp multiplies a position by powers of theta in float32, whatever the file says.

    Pair i turns by p theta^(-2 i / d), a product of i roundings of 2^-24 each: at most 0.005 radians off here (i = 1). A score of a few
    units moves by as much of itself, and so do the shares and the logits: 0.02 of their deviation is four times that.
    Positions begin where the windows of the last token do, since llama.cpp's masks take minutes.
    """
    quant = model(make_model, "llama3", WINDOW)
    artifact = gguf.write(quant, tmp_path / "out", as_float32=True)
    assert artifact.context == CONTEXT
    session = llama_cpp.open_session(
        str(tmp_path / "out" / artifact.files[0]), context=CONTEXT, kv_cache="kv-f32", flash_attention=False
    )
    assert session.facts.context == CONTEXT
    session._length = LENGTH - 2000
    found = session.append(IDS[-2000:])[0]
    session.close()
    assert apart(last_logits(quant, IDS, "llama3", WINDOW), found) < 2e-2


@pytest.mark.parametrize("rope", ROPES)
def test_a_long_context_is_carried_by_gguf_or_said_not_to_be(
    make_model: MakeModel, tmp_path: Path, rope: str
) -> None:
    """LongRoPE alone is clamped: llama.cpp takes one set of factors for a whole run."""
    artifact = gguf.write(model(make_model, rope, None), tmp_path / "out")
    assert artifact.context == (4096 if rope == "longrope" else CONTEXT)
    assert any("clamped from 262144 to 4096" in note for note in artifact.notes) == (rope == "longrope")
