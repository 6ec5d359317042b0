"""The embedded models on target cpu: lowered to a device's files, they still answer what they were made for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from thinned import thinned

from tapeout.errors import ModelError
from tapeout.models import Model, load
from tapeout.quantize import quantize
from tapeout.targets.cpu import Cpu
from tapeout.validate import Limits, gates
from tapeout.validate.evidence import Evidence
from tapeout.validate.generate import answer

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from tapeout.embedded import training  # noqa: E402

ASKED = {"formula": 200, "text2sql": 12}
"""Tasks of a test: all of the small model's, few of the large one's for the time they take."""


def right(given: Sequence[str], tasks: Sequence[training.Sample]) -> float:
    """Share of exact answers; outer spaces are none."""
    return sum(a.strip() == t.answer.strip() for a, t in zip(given, tasks, strict=True)) / len(tasks)


def original(model: Model, tasks: Sequence[training.Sample]) -> float:
    network = transformers.AutoModelForCausalLM.from_pretrained(model.directory, dtype="float32")
    words = transformers.AutoTokenizer.from_pretrained(model.directory)
    return right(training.answers(network, words, [task.prompt for task in tasks]), tasks)


@pytest.mark.parametrize("scheme", thinned(["int4-g32", "int8"]))
@pytest.mark.parametrize(("name", "form"), [("formula", "onnx"), ("text2sql", "gguf"), ("text2sql", "onnx")])
def test_tasks_survive_the_device(tmp_path: Path, name: str, form: str, scheme: str) -> None:
    """The codes arrive as they are, and no more answers are lost than the task gate allows."""
    pytest.importorskip("onnxruntime" if form == "onnx" else "llama_cpp")
    model, device = load(name), Cpu(format=form, threads=1)
    lines = (model.directory / "tasks.jsonl").read_text().splitlines()[: ASKED[name]]
    tasks = [training.Sample(**json.loads(line)) for line in lines]
    quant = quantize(model, scheme, out=tmp_path / "store")
    (tmp_path / "artifact").mkdir()
    artifact = device.export(quant, tmp_path / "artifact")
    evidence = Evidence(artifact, model, quant, device, tmp_path)
    assert [gate.status for gate in gates.codes(evidence)] == ["passed"]
    deployed = device.session(artifact)
    session = deployed.imported()(**deployed.arguments)  # in this process: a worker takes seconds to load
    try:
        given = [answer(session, task.prompt, model.generation) for task in tasks]
    finally:
        session.close()
    assert right(given, tasks) >= original(model, tasks) - Limits().task


def test_gguf_names_what_it_lacks_of_formula(tmp_path: Path) -> None:
    """llama.cpp's phi3 computes SiLU, whatever a config says."""
    quant = quantize(load("formula"), "int8", out=tmp_path / "store")
    (tmp_path / "artifact").mkdir()
    message = (
        "hidden_act = gelu_pytorch_tanh is not expressible in GGUF arch 'phi3'; what fits: --format onnx"
    )
    with pytest.raises(ModelError, match=message):
        Cpu().export(quant, tmp_path / "artifact")
    assert not list((tmp_path / "artifact").iterdir())
