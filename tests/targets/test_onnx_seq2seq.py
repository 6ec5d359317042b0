"""Encoder-decoders on ONNX Runtime: both graphs give what the reference gives, and a package passes its gates and generates."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapeout import validate
from tapeout.build import export, target
from tapeout.errors import ModelError, SchemeError, TapeoutError
from tapeout.exporters import onnx as exporter
from tapeout.generated import write_model
from tapeout.models import Generation, Seq2SeqConfig, load
from tapeout.pack import Package
from tapeout.quantize import quantize
from tapeout.recipe import Recipe
from tapeout.replay import generate, revalidate
from tapeout.targets.onnxruntime import OnnxSeq2Seq, open_session
from tapeout.validate import Options, reference
from tapeout.validate.generate import generate as sample

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

# As for the graph in torch (tests/models/test_seq2seq.py).
TOLERANCE = 40 * 128**0.5 * 2**-24 * 8
V11 = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
CASES = [({}, "none"), (V11, "int8"), ({}, "int4-g32"), (V11 | {"num_decoder_layers": 1}, "w8a8")]
LOOSE = {"limits": {"kl": 1e3, "top1": 0.0, "perplexity": 1e3}, "tokens": 600}


def ids(count: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(3, 250, count).tolist()


@pytest.mark.parametrize(("fields", "scheme"), CASES, ids=["none", "v1.1-int8", "int4", "v1.1-w8a8"])
def test_logits_are_those_of_the_reference(tmp_path: Path, fields: Any, scheme: str) -> None:
    model = load(write_model(tmp_path / "tiny", "t5", fields, dtype="F32"))
    quant = quantize(model, scheme, out=tmp_path / "codes")
    artifact = exporter.write(quant, tmp_path / "out", exact=True)
    for name in ("model.onnx", "encoder.onnx"):
        onnx.checker.check_model(str(tmp_path / "out" / name), full_check=True)
    session = open_session(str(tmp_path / "out"), artifact.context, threads=1)
    expected = reference.open_session(str(model.directory), str(quant.directory))
    assert isinstance(session, OnnxSeq2Seq)
    for source, target_ids in ((1, 3), (150, 20), (37, 150)):
        for each in (session, expected):
            each.reset()  # type: ignore[union-attr]
        rows = [
            np.concatenate([each.prefill(ids(source)), each.prefill(ids(target_ids, 1))])  # type: ignore[union-attr]
            for each in (session, expected)
        ]
        assert rows[0].shape == (target_ids + 1, 272)
        assert np.abs(rows[0] - rows[1]).max() < TOLERANCE
        session.reset()
        session.prefill(ids(source))
        stepped = [session.decode(token) for token in ids(target_ids, 1)[:5]]
        np.testing.assert_allclose(stepped, rows[1][1:6], atol=TOLERANCE)


def test_padded_batches_of_sources(tmp_path: Path) -> None:
    """Straight through both graphs, as another program runs them."""
    model = load(write_model(tmp_path / "tiny", "t5", dtype="F32"))
    assert isinstance(model.config, Seq2SeqConfig)
    exporter.write(quantize(model, "none", out=tmp_path / "codes"), tmp_path / "out")
    encoder, decoder = (
        onnxruntime.InferenceSession(str(tmp_path / "out" / name), providers=["CPUExecutionProvider"])
        for name in ("encoder.onnx", "model.onnx")
    )
    source = np.array([ids(20, row) for row in range(3)])
    mask = (np.arange(20) < np.array([[20], [1], [11]])).astype(np.int64)
    given = np.array([[0, *ids(9, 10 + row)] for row in range(3)])
    names = [each.name for each in encoder.get_outputs()]
    assert names[:2] == ["cross.0.key", "cross.0.value"]
    crossed = dict(zip(names, encoder.run(None, {"input_ids": source, "attention_mask": mask}), strict=True))
    past = {
        each.name: np.zeros((3, 4, 0, 24), np.float32)
        for each in decoder.get_inputs()
        if each.name.startswith("past_")
    }
    feed = {"input_ids": given, "encoder_attention_mask": mask, **crossed, **past}
    found = decoder.run(["logits"], feed)[0]
    network = reference.open_session(str(model.directory))._module  # type: ignore[union-attr]
    with torch.inference_mode():
        wanted = network(
            input_ids=torch.from_numpy(source),
            attention_mask=torch.from_numpy(mask),
            decoder_input_ids=torch.from_numpy(given),
        ).logits.numpy()
    assert np.abs(found - wanted).max() < TOLERANCE


def test_generation_is_that_of_transformers(tmp_path: Path) -> None:
    # As many layers on both sides: transformers sizes the cache of `generate` by the encoder's.
    fields = V11 | {"num_decoder_layers": 2}
    model = load(write_model(tmp_path / "tiny", "t5", fields, dtype="F32"))
    artifact = exporter.write(quantize(model, "none", out=tmp_path / "codes"), tmp_path / "out")
    session = open_session(str(tmp_path / "out"), artifact.context, threads=1)
    found = list(sample(session, ids(30), Generation(max_new_tokens=12, stop_token_ids=(1,))))  # type: ignore[arg-type]
    network = reference.open_session(str(model.directory))._module  # type: ignore[union-attr]
    wanted = network.generate(torch.tensor([ids(30)]), max_new_tokens=12, do_sample=False, num_beams=1)
    assert found == wanted[0, 1:].tolist()  # behind the token that begins a target
    for wrong in ([], [272], ids(193)):
        session.reset()  # type: ignore[union-attr]
        with pytest.raises(TapeoutError):
            session.prefill(wrong)  # type: ignore[union-attr]


@pytest.mark.parametrize("fields", [{}, V11], ids=["tied", "v1.1"])
def test_a_package_passes_its_gates_and_generates(tmp_path: Path, fields: Any) -> None:
    directory = write_model(tmp_path / "t5", "t5", fields, dtype="F32")
    kind = target("cpu", format="onnx", threads=1)
    package, report = export(kind, directory, tmp_path / "out", Recipe.of({"scheme": "int8", **LOOSE}))
    assert report.passed, [gate for gate in report.gates if gate.status == "failed"]
    ran = {gate.name.split("/")[0] for gate in report.gates if gate.status == "passed"}
    assert ran == set(validate.GATES) - {"task"}  # it has none
    assert package.damage() == []
    assert package.manifest["needs"]["key_value_cache_bytes"] == 2 * 3 * 4 * 24 * 2 * 192 * 4
    again = {gate.name: gate.status for gate in revalidate(tmp_path / "out").gates}
    assert again["golden"] == again["integrity"] == "passed"
    pieces = list(generate(Package.open(tmp_path / "out"), "a source", max_new_tokens=4))
    assert 1 <= len(pieces) <= 4


def scaled_scores(graph: Any) -> None:
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "MultiHeadAttention" and attribute.name == "scale":
                attribute.f = 24**-0.5


def late_buckets(graph: Any) -> None:
    for constant in graph.initializer:
        if constant.name.startswith("distance.0"):
            values = onnx.numpy_helper.to_array(constant) - 1
            constant.CopyFrom(onnx.numpy_helper.from_array(values, constant.name))


@pytest.mark.slow
@pytest.mark.parametrize("fault", [scaled_scores, late_buckets])
def test_a_planted_fault_fails_the_gates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Any], None]
) -> None:
    from tapeout.exporters.onnx import writer

    sound = writer._model

    def faulty(*arguments: Any) -> bytes:
        model = onnx.load_model_from_string(sound(*arguments))
        fault(model.graph)
        data: bytes = model.SerializeToString(deterministic=True)
        return data

    monkeypatch.setattr(writer, "_model", faulty)
    model = load(write_model(tmp_path / "tiny", "t5", dtype="F32"))
    quant, kind = quantize(model, "int8", out=tmp_path / "codes"), target("cpu", format="onnx", threads=1)
    artifact = kind.export(quant, tmp_path / "out")
    recipe = Recipe.of({"scheme": "int8", **LOOSE})
    options = Options(recipe.limits, tokens=recipe.tokens, throughput=False)
    report = validate.validate(artifact, model, quant, kind, options)
    failed = {gate.name for gate in report.gates if gate.status == "failed"}
    assert {"lowering/weights", "lowering/runtime"} <= failed


def test_what_it_cannot_be_is_refused(tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "tiny", "t5", dtype="F32"))
    quant = quantize(model, "int8", out=tmp_path / "codes")
    with pytest.raises(ModelError, match=r"is an encoder-decoder \(t5\).*use --format onnx"):
        target("cpu").export(quant, tmp_path / "out")
    with pytest.raises(ModelError, match=r"is an encoder-decoder \(t5\), which target null does not run"):
        target("null").export(quant, tmp_path / "out")
    with pytest.raises(ModelError, match=r"is an encoder-decoder \(t5\), which is written in ONNX Runtime's"):
        exporter.write(quant, tmp_path / "out", dialect="standard")
    with pytest.raises(SchemeError, match=r"is an encoder-decoder \(t5\), which calibration does not run"):
        quantize(model, "int4-g32", rounding="gptq")
