"""Saved packages, run by the interpreter of MIL: every family is the one graph, whatever the pieces, and planted faults show."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from thinned import thinned

from tapeout.errors import MissingToolchain
from tapeout.exporters import coreml
from tapeout.exporters.coreml import emitter
from tapeout.exporters.coreml.emitter import DecoderOps
from tapeout.exporters.coreml.program import library
from tapeout.generated import ENCODERS
from tapeout.models import load
from tapeout.models.encoder import encoder
from tapeout.models.graph import decoder
from tapeout.models.torch_encoder import TorchEncoderOps
from tapeout.models.torch_ops import Cache, TorchOps
from tapeout.quantize import Quantized, QuantTensor, quantize
from tapeout.validate import mil

torch = pytest.importorskip("torch")
try:
    library()
except MissingToolchain:
    pytest.skip("coremltools is not installed", allow_module_level=True)

IDS = [(i * 37 + 11) % 256 for i in range(44)]
# Below, at and beyond a window of 8 and the trained length of 24; the first alone; one token by either function.
PIECES = (("decode", 1), ("prefill", 6), ("decode", 1), ("prefill", 1), ("prefill", 16), ("prefill", 15), ("decode", 1), ("decode", 1),
          ("prefill", 2))  # fmt: skip
# The package is computed in float64; the reference in float32, whose sums of n products of size 1 are off by about sqrt(n) 2^-24:
# five matmuls in a row in each of two layers, of up to 128 products; the largest of some thousand such errors by four times that.
TOLERANCE = 10 * 128**0.5 * 2**-24 * 4

FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 5.0, 9.0]}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "int4-g32", {}),
    "tied": ("llama", "int8", {"tie_word_embeddings": True, "num_key_value_heads": 1, "head_dim": 24}),
    "biases": ("llama", "int4-g64-asym", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    "floats": ("llama", "none", {}),
    "levels": ("llama", "nf4", {}),
    "nested": ("llama", "q6_k", {"hidden_size": 256, "intermediate_size": 256}),
    "linear": ("llama", "int8", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "llama3": ("llama", "int8", {"rope_scaling": LLAMA3}),
    "yarn": ("llama", "int8", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}),
    "longrope": ("llama", "int8", {"rope_scaling": {"rope_type": "longrope"} | FACTORS, "original_max_position_embeddings": 24}),
    "window": ("mistral", "int4-g32", {"sliding_window": 8}),
    "narrow-window": ("mistral", "int4-g32", {"sliding_window": 2}),
    "experts": ("mixtral", "int4-g32", {"sliding_window": 24}),
    "gemma": ("gemma", "int8", {}),
    "gemma2": ("gemma2", "int4-g32", {"sliding_window": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.0}),
    "gemma3": ("gemma3_text", "int4-g32", {"sliding_window": 8}),
    "phi3": ("phi3", "int4-g32", {"sliding_window": 24, "hidden_act": "gelu_pytorch_tanh"}),
    "partial": (
        "phi3",
        "int3-g64",
        {
            "partial_rotary_factor": 0.5,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 5.0]},
            "original_max_position_embeddings": 24,
        },
    ),
    "qwen2": ("qwen2", "int4-g32", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("qwen3", "int4-g32", {}),
    "qwen2_moe": ("qwen2_moe", "int4-g32", {}),
    "qwen3_moe": ("qwen3_moe", "int8-g32", {}),
    "deepseek_v2": ("deepseek_v2", "int4-g32", {}),
    "deepseek_v3": ("deepseek_v3", "int4-g32-asym", {}),
}  # fmt: skip


def held(quant: Quantized, artifact: coreml.writer.Artifact) -> Callable[[str], Any]:
    """The weights that the package holds: those of the store, but for what float16 rounds, which its notes tell."""

    def weight(name: str) -> Any:
        tensor = quant[name]
        if isinstance(tensor, QuantTensor):
            if "lookup" in artifact.containers[name] and not tensor.scale_codes:
                tensor = replace(tensor, codebook=tensor.codebook.astype(np.float16).astype(np.float32))
            return torch.from_numpy(tensor.dequantize())
        values = quant.float32(name)
        if artifact.containers[name] == "F16":
            values = values.astype(np.float16).astype(np.float32)
        return torch.from_numpy(values)

    return weight


def expected(
    quant: Quantized, artifact: coreml.writer.Artifact, pieces: Sequence[tuple[str, int]]
) -> np.ndarray:
    """Logits [tokens, vocab] of the graph in torch, piece by piece."""
    cache, logits = Cache(), []
    ops = TorchOps(held(quant, artifact), cache)
    for _, count in pieces:
        ids = torch.tensor(IDS[cache.length : cache.length + count])
        logits.append(decoder(ops, quant.model.decoder, ids).numpy())
        cache.length += count
    return np.concatenate(logits)


def ran(
    artifact: coreml.writer.Artifact,
    pieces: Sequence[tuple[str, int]],
    precision: mil.Precision = "float64",
    padding: Sequence[int] = (0,),
) -> np.ndarray:
    """Logits [batch, tokens, vocab] of the saved package; of each sequence so many tokens on its left are padding."""
    machine = mil.Machine(
        mil.load(artifact.directory / "model.mlpackage"), precision, exact_states=precision == "float64"
    )
    state, past, logits = machine.new_state(), 0, []
    for function, count in pieces:
        end = past + count
        ids = [[0] * pad + IDS for pad in padding]
        mask = np.zeros((len(padding), 1, count, end), np.float16)
        for row, pad in enumerate(padding):
            mask[row, :, :, :pad] = -np.inf
        given = {"inputIds": np.array(ids_of(ids, past, end), np.int32), "fullAttentionMask": mask}
        logits.append(machine.run(function, given, state)["logits"])
        past = end
    return np.concatenate(logits, axis=1)


def ids_of(rows: Sequence[Sequence[int]], begin: int, end: int) -> list[Sequence[int]]:
    return [row[begin:end] for row in rows]


@pytest.fixture
def package(
    make_model: Callable[..., Path], tmp_path: Path
) -> Callable[..., tuple[Quantized, coreml.writer.Artifact]]:
    """``package("llama", "int8", batch_size=2, fields={...})``."""

    def make(
        family: str, scheme: str, fields: dict[str, Any] | None = None, **options: Any
    ) -> tuple[Quantized, coreml.writer.Artifact]:
        quant = quantize(load(make_model(family, **fields or {})), scheme)
        return quant, coreml.write(quant, tmp_path / "out", coreml.Options(prefill_chunk=16, **options))

    return make


def far(logits: np.ndarray, wanted: np.ndarray) -> float:
    """The largest difference, in deviations of the logits."""
    return float(np.abs(logits - wanted).max() / wanted.std())


@pytest.mark.parametrize("case", thinned(CASES, alike=lambda case: CASES[case][0]))
def test_it_is_the_one_graph(package, case: str) -> None:
    quant, artifact = package(*CASES[case])
    assert far(ran(artifact, PIECES)[0], expected(quant, artifact, PIECES)) < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama", "window", "gemma2", "experts", "deepseek_v2"])
def test_float16_is_near(package, case: str) -> None:
    """Operators' results rounded to float16, 2^-12 of each in the mean: some thirty in a row in each of two layers, at random, and the logits."""
    quant, artifact = package(*CASES[case])
    limit = (2 * 30 + 1) ** 0.5 * 2.0**-12 * 4 * 2  # the largest of thousands, and weights rounded too
    logits, wanted = ran(artifact, PIECES, "float16")[0], expected(quant, artifact, PIECES)
    assert np.isfinite(logits).all()
    assert np.sqrt(np.mean((logits - wanted) ** 2)) / wanted.std() < limit


@pytest.mark.slow
@pytest.mark.parametrize("case", ["llama", "window", "gemma2", "qwen2_moe", "deepseek_v2"])
def test_a_batch_is_padded_on_the_left(package, case: str) -> None:
    """Tokens hidden by the mask count as positions, and rotary positions are relative: the others' logits are as without them."""
    pieces, pad = (("prefill", 11), ("prefill", 12), ("decode", 1), ("decode", 1)), 7
    _, artifact = package(*CASES[case], batch_size=2)
    both = ran(artifact, pieces, padding=(0, pad))
    assert np.isfinite(both).all()
    assert far(both[1, pad:], both[0, : 25 - pad]) < TOLERANCE


def test_more_tokens_than_a_window(package) -> None:
    """At once, from nothing; and again with the ring full."""
    quant, artifact = package(*CASES["narrow-window"])
    pieces = [("prefill", 16), ("prefill", 16), ("decode", 1)]
    assert far(ran(artifact, pieces)[0], expected(quant, artifact, pieces)) < TOLERANCE


def test_a_sequence_fills_its_cache(package) -> None:
    quant, artifact = package("llama", "int8", sequence_length=20)
    pieces = [("prefill", 16), ("prefill", 3), ("decode", 1)]
    assert far(ran(artifact, pieces)[0], expected(quant, artifact, pieces)) < TOLERANCE


@pytest.mark.parametrize("case", ["tied", "gemma2"])
def test_chunks_in_turn(package, tmp_path: Path, case: str) -> None:
    """One package a layer, each with its own caches; what one gives the next takes."""
    family, scheme, fields = CASES[case]
    quant, artifact = package(family, scheme, fields | {"num_hidden_layers": 4}, chunks=4)
    machines = [
        mil.Machine(mil.load(tmp_path / "out" / f"model_{part}_of_4.mlpackage"), exact_states=True)
        for part in range(1, 5)
    ]
    states, past, logits = [machine.new_state() for machine in machines], 0, []
    for function, count in PIECES:
        end = past + count
        given: dict[str, Any] = {"inputIds": np.array([IDS[past:end]], np.int32)}
        for machine, state in zip(machines, states, strict=True):
            mask = {"fullAttentionMask": np.zeros((1, 1, count, end), np.float16)}
            ((_, value),) = machine.run(function, given | mask, state).items()
            given = {"hiddenStates": value}
        logits.append(value[0])
        past = end
    assert far(np.concatenate(logits), expected(quant, artifact, PIECES)) < TOLERANCE


def test_first_layers_alone(package) -> None:
    quant, artifact = package("gemma2", "int8", {"sliding_window": 8}, layers=1)
    ids = torch.tensor(IDS[:12])
    wanted = decoder(TorchOps(held(quant, artifact)), quant.model.decoder, ids, layers=1).numpy()
    assert far(ran(artifact, [("prefill", 12)])[0], wanted) < TOLERANCE


def forget(self: DecoderOps, x: Any, rope: Any, cos: Any, sin: Any) -> Any:
    """Rotate the other way."""
    return rotate(self, x, rope, cos, emitter.builder().mul(x=sin, y=np.float32(-1)))


def late(self: DecoderOps, inputs: Any) -> Any:
    """See one token too many: rotations stay as they are, since they are relative."""
    ids = begin(self, inputs)
    self._positions = emitter.builder().add(x=self._positions, y=np.int32(1))
    return ids


def stale(self: DecoderOps, cache: str, layer: int, new: Any, window: int | None) -> Any:
    """Take the place of another layer."""
    self.places = dict.fromkeys(self.places, 0) if layer == 0 else self.places
    return kept(self, cache, layer, new, window)


def halves(self: DecoderOps, weight: str, heads: int, mla: Any) -> Any:
    """Take rows of keys for those of values."""
    keys, _ = split(self, weight, heads, mla)
    return keys, keys


rotate, begin, kept, split = DecoderOps._rotate, DecoderOps.begin, DecoderOps._kept, DecoderOps._halves


@pytest.mark.parametrize(
    ("case", "method", "fault"),
    [
        ("llama", "_rotate", forget),
        ("llama", "begin", late),
        ("llama", "_kept", stale),
        ("window", "_kept", stale),
        ("deepseek_v2", "_halves", halves),
    ],
)
def test_a_planted_fault_is_seen(
    package, monkeypatch: pytest.MonkeyPatch, case: str, method: str, fault: Callable[..., Any]
) -> None:
    monkeypatch.setattr(DecoderOps, method, fault)
    quant, artifact = package(*CASES[case])
    assert far(ran(artifact, PIECES)[0], expected(quant, artifact, PIECES)) > 100 * TOLERANCE


@pytest.mark.parametrize("lowest", [0.0, 1e9])
def test_a_mask_that_hides_nothing_is_seen(package, monkeypatch: pytest.MonkeyPatch, lowest: float) -> None:
    monkeypatch.setattr(emitter, "LOWEST", lowest)
    quant, artifact = package(*CASES["window"])
    assert far(ran(artifact, PIECES)[0], expected(quant, artifact, PIECES)) > 100 * TOLERANCE


@pytest.mark.parametrize("scheme", ["int8", "int4-g32", "none"])
@pytest.mark.parametrize("family", ENCODERS)
def test_encoders(make_model: Callable[..., Path], tmp_path: Path, family: str, scheme: str) -> None:
    """A batch of two, one of them padded."""
    quant = quantize(load(make_model(family)), scheme)
    encodes(quant, tmp_path / "out")


@pytest.mark.parametrize("pooling", ["pooling_mode_cls_token", "pooling_mode_mean_tokens"])
def test_sentence_encoders(make_model: Callable[..., Path], tmp_path: Path, pooling: str) -> None:
    directory = make_model("bert")
    names = ["Transformer", "Pooling", "Normalize"]
    modules = [
        {
            "type": f"sentence_transformers.models.{name}",
            "path": "" if name == "Transformer" else f"{index}_{name}",
        }
        for index, name in enumerate(names)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 64, pooling: True})
    )
    assert encodes(quantize(load(directory), "int8"), tmp_path / "out") == "embeddings"


@pytest.mark.parametrize("name", ["topics_v1", "topics_v2"])
def test_classifiers(tmp_path: Path, name: str) -> None:
    assert encodes(quantize(load(name), "int4-g32"), tmp_path / "out") == "logits"


def encodes(quant: Quantized, directory: Path) -> str:
    """Hold a package against the graph in torch; the name of its output."""
    artifact = coreml.write(quant, directory, coreml.Options(batch_size=2))
    config = quant.model.config
    padding = getattr(config, "position_padding", None) or 0
    ids = np.array([[3 + (i * k) % 250 for i in range(19)] for k in (37, 31)], np.int32)
    mask = np.ones_like(ids)
    mask[1, 12:], ids[1, 12:] = 0, padding
    machine = mil.Machine(mil.load(directory / "model.mlpackage"))
    ((name, found),) = machine.run(None, {"inputIds": ids, "attentionMask": mask}).items()
    ops = TorchEncoderOps(held(quant, artifact), mask=torch.from_numpy(mask).bool())
    wanted = encoder(ops, config, torch.from_numpy(ids).long()).numpy()  # type: ignore[arg-type, type-var]
    if wanted.ndim == 3:
        found, wanted = found[mask > 0], wanted[mask > 0]
    assert far(found, wanted) < TOLERANCE
    return name
