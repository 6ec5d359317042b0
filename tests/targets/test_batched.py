"""Several sequences at once: each gives the logits that it gives alone, whatever goes on beside it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapeout.build import target
from tapeout.errors import TapeoutError
from tapeout.exporters import Artifact
from tapeout.generated import write_model
from tapeout.models import load
from tapeout.quantize import quantize
from tapeout.validate.batching import time_arrivals
from tapeout.validate.session import Logits, SessionSpec

Once = Callable[[str, Callable[[Path], Any]], tuple[Path, Any]]

# The same sums over rows of a batch of another size, where kernels may take another order: ten times float32's rounding of the
# logits, which are about 1.
CLOSE = 10 * 2**-23 * 8


def opened(spec: SessionSpec) -> Any:
    return spec.imported()(**spec.arguments)


@pytest.fixture(scope="module", params=["gguf", "onnx"])
def lowered(request: pytest.FixtureRequest, once: Once) -> tuple[Any, Artifact]:
    pytest.importorskip("llama_cpp" if request.param == "gguf" else "onnxruntime")
    # Chunks of 8 tokens: a prompt goes on over several of them.
    device = target("cpu", threads=1, format=request.param, prefill_chunk=8)

    def make(work: Path) -> Artifact:
        model = load(str(write_model(work / "model", "llama", {}, dtype="F32")))
        (work / "artifact").mkdir()
        return device.export(quantize(model, "int4-g32"), work / "artifact")

    return device, once(f"batched-{request.param}", make)[1]


@pytest.fixture(scope="module")
def alone(lowered: tuple[Any, Artifact]) -> tuple[list[list[int]], list[Logits]]:
    """Three sequences, and the logits of each by itself."""
    device, artifact = lowered
    session = opened(device.session(artifact))
    vocab = session.prefill([0]).shape[1]
    sequences = [np.random.default_rng(at).integers(0, vocab, n).tolist() for at, n in enumerate((30, 7, 19))]
    logits = []
    for ids in sequences:
        session.reset()
        logits.append(
            np.concatenate([session.prefill(ids[:-3]), [session.decode(token) for token in ids[-3:]]])
        )
    session.close()
    return sequences, logits


def test_sequences_do_not_disturb_one_another(
    lowered: tuple[Any, Artifact], alone: tuple[list[list[int]], list[Logits]]
) -> None:
    device, artifact = lowered
    (long, short, third), (of_long, of_short, of_third) = alone
    session = opened(device.batched(artifact, 3, 64))
    assert session.sequences == 3
    assert session.facts.context == 64

    def check(given: list[tuple[int, list[int]]], *expected: Logits) -> None:
        np.testing.assert_allclose(session.step(given), np.array(expected), atol=CLOSE)

    check([(2, long[:20]), (0, short[:5])], of_long[19], of_short[4])
    check([(0, short[5:6]), (1, third[:10]), (2, long[20:21])], of_short[5], of_third[9], of_long[20])
    # One goes on alone, while the others keep what they have.
    check([(2, long[21:22])], of_long[21])
    check([(1, third[10:11]), (0, short[6:7])], of_third[10], of_short[6])
    # A sequence that was forgotten begins anew, and may be as long as any.
    session.forget(0)
    check([(1, third[11:12]), (0, long), (2, long[22:23])], of_third[11], of_long[29], of_long[22])
    session.forget(0)
    session.step([(0, [1] * 63)])
    session.step([(0, [1])])
    check([(1, third[12:13])], of_third[12])
    with pytest.raises(TapeoutError, match="65 tokens do not fit the context of 64"):
        session.step([(1, third[13:14]), (0, [1])])
    with pytest.raises(TapeoutError, match="not all in the vocabulary"):
        session.step([(1, [session.vocab_size])])
    check([(1, third[13:14])], of_third[13])  # what was refused left no trace
    session.close()
    session.close()


def test_greedy_answers_are_those_of_each_alone(
    lowered: tuple[Any, Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    device, artifact = lowered
    session, single = opened(device.batched(artifact, 2, 64)), opened(device.session(artifact))
    seen: dict[int, list[list[int]]] = {0: [], 1: []}
    step = session.step

    def keeping(given: list[tuple[int, list[int]]]) -> Logits:
        for sequence, ids in given:
            seen[sequence] = seen[sequence] + [ids] if len(ids) == 1 else [*seen[sequence], ids]
        found: Logits = step(given)
        return found

    monkeypatch.setattr(session, "step", keeping)
    done = time_arrivals(session, [0.0, 0.0, 0.0], 9, 4)
    assert all(0 < first < last for first, last in done)
    requests = [seen[0][:4], seen[1][:4], (seen[0][4:] or seen[1][4:])]
    for prompt, *tokens in requests:
        single.reset()
        row = single.prefill(prompt)[-1]
        for (token,) in tokens:
            assert row[token] >= row.max() - CLOSE
            row = single.decode(token)
    session.close()
    single.close()


def test_a_window_is_carried_by_llama_cpp_and_refused_for_onnx(tmp_path: Path) -> None:
    for kind in ("gguf", "onnx"):
        pytest.importorskip("llama_cpp" if kind == "gguf" else "onnxruntime")
        device, model = target("cpu", threads=1, format=kind), load("arithmetic")
        (tmp_path / kind).mkdir()
        artifact = device.export(quantize(model, "int4-g32"), tmp_path / kind)
        if kind == "onnx":
            with pytest.raises(TapeoutError, match="so that this graph takes one"):
                opened(device.batched(artifact, 2, 64))
            continue
        ids = np.random.default_rng(0).integers(0, 14, 50).tolist()  # past the window of 20
        single, session = opened(device.session(artifact)), opened(device.batched(artifact, 2, 96))
        session.step([(1, ids[::-1])])
        expected = [single.prefill(ids[:30])[-1], *(single.decode(token) for token in ids[30:])]
        found = [
            session.step([(0, ids[:30])]),
            *(session.step([(1, [3]), (0, [token])]) for token in ids[30:]),
        ]
        np.testing.assert_allclose(
            [each[-1] for each in found], expected, atol=4 * CLOSE
        )  # these logits are about 4
        single.close()
        session.close()


def test_a_cache_takes_what_the_layout_says(lowered: tuple[Any, Artifact]) -> None:
    device, artifact = lowered
    session, config = opened(device.session(artifact)), load(str(artifact.directory.parent / "model")).config
    for tokens in (1, 100, 256):
        assert session.cache_bytes(tokens) == device.memory(config, tokens).cache
    session.close()
