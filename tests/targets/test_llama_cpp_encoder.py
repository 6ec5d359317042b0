"""BERT on llama.cpp: its embeddings are the reference's, and what its arch does not compute is refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapeout import validate
from tapeout.build import export, target
from tapeout.errors import ModelError
from tapeout.exporters import gguf
from tapeout.generated import write_model
from tapeout.models import load
from tapeout.quantize import QuantTensor, quantize
from tapeout.recipe import Recipe
from tapeout.replay import revalidate
from tapeout.targets.llama_cpp import LlamaCppEncoder, open_session
from tapeout.validate import reference
from tapeout.validate.encoders import padded

pytest.importorskip("gguf")
pytest.importorskip("llama_cpp")
pytest.importorskip("transformers")

# Of two layers, in units of the deviation; see targets/cpu.py: GELU from a float16 table, which approximates it by tanh.
TOLERANCE = 4 * 2**-11 * math.sqrt(3 * 2)
LOOSE = {"limits": {"kl": 1e3, "top1": 0.0, "perplexity": 1e3}, "tokens": 600}
POOLED = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "1_Pooling/config.json": {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True},
}


def model_at(directory: Path, pooling: str | None) -> Path:
    """A small BERT, with sentence-transformers' files for ``mean`` and ``cls``."""
    write_model(directory, "bert", dtype="F32")
    if pooling:
        (directory / "1_Pooling").mkdir()
        for name, content in POOLED.items():
            (directory / name).write_text(json.dumps(content))
        # Shorter than the table of positions, as most are.
        (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 64}))
        if pooling == "cls":
            config = {"word_embedding_dimension": 64, "pooling_mode_cls_token": True}
            (directory / "1_Pooling" / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize("pooling", [None, "mean", "cls"])
def test_embeddings_are_those_of_the_reference(tmp_path: Path, pooling: str | None) -> None:
    model = load(model_at(tmp_path / "tiny", pooling))
    quant = quantize(model, "int8", out=tmp_path / "codes")
    artifact = gguf.write(quant, tmp_path / "out", as_float32=True)
    session = open_session(
        str(tmp_path / "out" / artifact.files[0]), artifact.context, threads=1, flash_attention=False
    )
    expected = reference.open_session(str(model.directory), str(quant.directory))
    assert isinstance(session, LlamaCppEncoder)
    sequences = [
        [5 + (i * 31 + 7 * row) % 200 for i in range(n)]
        for row, n in enumerate((37, 1, artifact.context, 18))
    ]
    assert artifact.context == (64 if pooling else 96)
    ids, mask = padded(sequences, 0)
    found, wanted = (each.encode(ids.tolist(), mask.tolist()) for each in (session, expected))  # type: ignore[union-attr]
    rows = slice(None) if pooling else mask == 1
    assert found.shape == wanted.shape
    assert np.abs(found[rows] - wanted[rows]).max() < TOLERANCE * wanted[rows].std()
    assert session.tokenize("The thing, sang.") == expected.tokenize("The thing, sang.")
    session.close()


@pytest.mark.parametrize("scheme", ["int8", "int4-g32"])
def test_the_codes_come_back(tmp_path: Path, scheme: str) -> None:
    quant = quantize(load(model_at(tmp_path / "tiny", None)), scheme, out=tmp_path / "codes")
    artifact = gguf.write(quant, tmp_path / "out")
    seen = set()
    for name, tensor in gguf.read_codes(artifact, quant):
        seen.add(name)
        expected = quant[name]
        if isinstance(tensor, QuantTensor):
            assert isinstance(expected, QuantTensor)
            np.testing.assert_array_equal(tensor.packed, expected.packed)
            np.testing.assert_array_equal(tensor.scale, expected.scale)
        else:
            np.testing.assert_array_equal(tensor, quant.float32(name))
    assert seen == set(quant)


def test_a_package_passes_its_gates(tmp_path: Path) -> None:
    directory = model_at(tmp_path / "tiny", "mean")
    package, report = export(
        target("cpu", threads=1), directory, tmp_path / "out", Recipe.of({"scheme": "int8", **LOOSE})
    )
    assert report.passed, [gate for gate in report.gates if gate.status == "failed"]
    ran = {gate.name.split("/")[0] for gate in report.gates if gate.status == "passed"}
    assert ran == set(validate.ENCODER_GATES) - {"task"}
    assert "llama-embedding" in (package.directory / "README.md").read_text()
    again = {gate.name: gate.status for gate in revalidate(tmp_path / "out").gates}
    assert again["golden"] == again["integrity"] == "passed"


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("roberta", {}, r"model_type = roberta is not expressible in GGUF arch 'bert'.*format onnx"),
        ("distilbert", {}, r"model_type = distilbert is not"),
        ("efficient_encoder_v1", {}, r"model_type = efficient_encoder_v1, a head of classes = 4 is not"),
        ("bert", {"architectures": ["BertForSequenceClassification"]}, r"a head of classes = 2 is not"),
        ("bert", {"hidden_act": "relu"}, r"hidden_act = relu is not"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(
    tmp_path: Path, family: str, fields: dict[str, Any], message: str
) -> None:
    quant = quantize(
        load(write_model(tmp_path / "tiny", family, fields, dtype="F32")), "int8", out=tmp_path / "codes"
    )
    with pytest.raises(ModelError, match=message):
        gguf.write(quant, tmp_path / "out")
