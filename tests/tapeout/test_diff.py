"""The first divergence: every planted bug is named, in ``diff`` and by the lowering gate, and a sound artifact has none."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from tapeout.build import target
from tapeout.diff import diff, picture
from tapeout.errors import OutputError, TapeoutError
from tapeout.exporters import gguf as gguf_exporter
from tapeout.generated import FAMILIES, write_model
from tapeout.models import load
from tapeout.pack import pack
from tapeout.quantize import Quantized, quantize
from tapeout.recipe import Recipe
from tapeout.targets import llama_cpp, onnxruntime_trace
from tapeout.validate import GateResult, Report, gates, primitives
from tapeout.validate.divergence import Divergence, against_graph
from tapeout.validate.evidence import Evidence

pytest.importorskip("onnxruntime")
pytest.importorskip("llama_cpp")
pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _no_workers(monkeypatch: pytest.MonkeyPatch, here: Any) -> None:
    monkeypatch.setattr("tapeout.validate.worker.borrow", here)
    monkeypatch.setattr("tapeout.validate.evidence.borrow", here)


IDS = [(i * 37 + 11) % 256 for i in range(40)]
PROMPT = "A window of 24 tokens is passed by these."
# Caps within the reach of random scores and logits, so that a wrong one shows.
CAPS = {"query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
# One sum of K <= 128 products in another order: sqrt(128) 2^-24 < 1e-6 of its size.
ONE_SUM = 1e-6
GELU_TABLE = 2.0**-11

Plant = Callable[[Path], None]


def graph(change: Callable[[Any], None]) -> Plant:
    """A bug in the graph of an ONNX artifact."""

    def plant(artifact: Path) -> None:
        import onnx

        path = artifact / "model.onnx"
        model = onnx.load(path, load_external_data=False)
        before = model.SerializeToString()
        change(model.graph)
        assert model.SerializeToString() != before
        path.write_bytes(model.SerializeToString())

    return plant


def attribute(name: str, value: float) -> Plant:
    """The same attribute of every attention."""
    import onnx

    def change(found: Any) -> None:
        for node in found.node:
            for each in node.attribute:
                if node.op_type == "GroupQueryAttention" and each.name == name:
                    each.CopyFrom(onnx.helper.make_attribute(name, value))

    return graph(change)


def constant(factors: dict[str, float]) -> Plant:
    """Constants times a factor."""
    import onnx

    def change(found: Any) -> None:
        for each in found.initializer:
            if each.name in factors:
                wrong = onnx.numpy_helper.to_array(each) * np.float32(factors[each.name])
                each.CopyFrom(onnx.numpy_helper.from_array(wrong, each.name))

    return graph(change)


def gguf(change: Callable[[Any], None]) -> Plant:
    """A bug in a GGUF artifact."""

    def plant(artifact: Path) -> None:
        import gguf

        (path,) = artifact.glob("*.gguf")
        before = path.read_bytes()
        reader = gguf.GGUFReader(path, "r+")
        change(reader)
        reader.data.flush()
        assert path.read_bytes() != before

    return plant


def field(name: str, value: float) -> Plant:
    def change(reader: Any) -> None:
        found = reader.fields[name]
        found.parts[found.data[0]][0] = value

    return gguf(change)


def unpermuted(reader: Any) -> None:
    """Rows of queries and keys as Hugging Face has them, which llama.cpp's RoPE of neighbours does not pair."""
    for tensor in reader.tensors:
        heads = {"attn_q": 8, "attn_k": 4}.get(tensor.name.split(".")[-2])
        if heads:
            rows = np.array(tensor.data)
            tensor.data[:] = rows.reshape(heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def without_offset(reader: Any) -> None:
    for tensor in reader.tensors:
        if tensor.name.endswith("_norm.weight"):
            tensor.data[:] -= 1


BUGS: dict[str, tuple[str, str, dict[str, Any], Plant, str]] = {
    "onnx-rope-pairing": (
        "onnx", "llama", {"head_dim": 16}, attribute("rotary_interleaved", 1), "layers.0.attention.rope (rope)",
    ),
    "onnx-norm-offset": (
        "onnx", "gemma", {}, constant({"norm_offset": 0.0}), "layers.0.attention.norm (rms_norm)",
    ),
    "onnx-attention-softcap": (
        "onnx", "gemma2", CAPS, attribute("softcap", 4.0), "layers.0.attention.scores (softcap)",
    ),
    "onnx-logit-softcap": (
        "onnx", "gemma2", CAPS, constant({"logits.factor": 2.0, "logits.small.factor": 0.5}), "logits (softcap)",
    ),
    "onnx-window": (
        "onnx", "mistral", {"sliding_window": 24, "head_dim": 16}, attribute("local_window_size", 20),
        "layers.0.attention.scores (scores)",
    ),
    "gguf-rope-pairing": ("gguf", "llama", {}, gguf(unpermuted), "layers.0.attention.rope (rope)"),
    "gguf-norm-offset": ("gguf", "gemma", {}, gguf(without_offset), "layers.0.attention.norm (rms_norm)"),
    "gguf-attention-softcap": (
        "gguf", "gemma2", CAPS, field("gemma2.attn_logit_softcapping", 4.0), "layers.0.attention.scores (softcap)",
    ),
    "gguf-logit-softcap": (
        "gguf", "gemma2", CAPS, field("gemma2.final_logit_softcapping", 6.0), "logits (softcap)",
    ),
    "gguf-window": (
        "gguf", "mistral", {"sliding_window": 24}, field("granite_swa.attention.sliding_window", 20),
        "layers.0.attention.scores (scores)",
    ),
}  # fmt: skip
"""Format, family, fields of its config, what is planted, and how it must be called."""


@dataclass(frozen=True)
class Made:
    """A package, the model that it was made from, and what the lowering gate said of it."""

    package: Path
    model: Path
    gates: dict[str, GateResult]


def make(
    work: Path,
    form: str,
    family: str,
    fields: dict[str, Any],
    plant: Plant | None = None,
    scheme: str = "int4-g32",
) -> Made:
    """Export a small model, plant a bug in the artifact, hold it against the reference, and pack it."""
    directory = write_model(work / "model", family, fields, dtype="F32")
    quant = quantize(load(directory), scheme)
    kind = target("cpu", format=form, threads=1)
    for folder in ("package/artifact", "scratch"):
        (work / folder).mkdir(parents=True)
    artifact = kind.export(quant, work / "package" / "artifact")
    if plant:
        plant(artifact.directory)
    evidence = Evidence(artifact, quant.model, quant, kind, work / "scratch")
    vars(evidence)["sequences"] = [IDS]
    try:
        found = tuple(gates.lowering(evidence))
    finally:
        evidence.close()
    pack(artifact, Report(quant.model.name, "cpu", scheme, found), quant, kind, Recipe().kept(quant))
    return Made(work / "package", directory, {gate.name: gate for gate in found})


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_named(tmp_path: Path, bug: str) -> None:
    form, family, fields, plant, name = BUGS[bug]
    made = make(tmp_path, form, family, fields, plant)
    assert made.gates["lowering/runtime"].status == "failed"
    assert f"The first primitive that parts is {name}" in made.gates["lowering/runtime"].reason
    found = diff(str(made.package), str(made.model), PROMPT).divergence
    assert found.first
    assert f"{found.first.name} ({found.first.op})" == name
    # What comes before agrees to one sum's rounding, whatever the bug does behind it.
    before = found.values[: found.values.index(found.first)]
    assert before
    assert max(value.own for value in before if not value.name.endswith("mlp.inner")) < ONE_SUM
    assert found.oracle is not None
    assert found.oracle < 1e-5  # transformers, in float32, of two layers


FAMILY_FIELDS: dict[str, dict[str, Any]] = {
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3_text": {"query_pre_attn_scalar": 16},
    "deepseek_v3": {"rms_norm_eps": 1e-6},
    "mistral": {"sliding_window": 24},
}


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", *(name for name in FAMILIES if name != "deepseek_v2")]
)
def test_what_llama_cpp_shows_of_each_family_is_the_graphs(tmp_path: Path, family: str) -> None:
    """Each value's own difference is one sum's rounding: every name means the same in both, elements in the same order."""
    quant = quantize(load(write_model(tmp_path / "model", family, FAMILY_FIELDS.get(family, {}))), "int4-g32")
    artifact = target("cpu").export(quant, tmp_path / "artifact")
    (tmp_path / "scratch").mkdir()
    spec = target("cpu", threads=1).traced(artifact, tmp_path / "scratch")
    device = llama_cpp.open_session(**spec.arguments)
    try:
        found = walked(device, quant, tmp_path)
    finally:
        device.close()
    assert found.first is None, found.words()
    for value in found.values:
        table = family.startswith("gemma") and value.name.endswith("mlp.inner")
        assert value.own < (GELU_TABLE if table else ONE_SUM), value
    shown = {value.name.removeprefix("layers.1.") for value in found.values}
    assert {
        "embedding",
        "attention.norm",
        "attention.rope",
        "attention.scores",
        "attention.context",
        "out",
        "norm",
        "logits",
    } <= shown


@pytest.mark.parametrize(
    "family",
    [
        "llama",
        "mistral",
        "qwen2",
        *FAMILIES,
        "bert",
        "roberta",
        "distilbert",
        "efficient_encoder_v1",
        "efficient_encoder_v2",
    ],
)
def test_what_onnxruntime_shows_of_each_family_is_the_graphs(tmp_path: Path, family: str) -> None:
    fields = FAMILY_FIELDS.get(family, {})
    quant = quantize(load(write_model(tmp_path / "model", family, fields)), "int4-g32")
    artifact = target("cpu", format="onnx").export(quant, tmp_path / "artifact")
    device = onnxruntime_trace.open_traced(str(artifact.directory), artifact.context, 1)
    found = walked(device, quant, tmp_path)
    assert found.first is None, found.words()
    assert max(value.own for value in found.values) < ONE_SUM
    shown = {value.name.removeprefix("layers.1.") for value in found.values}
    wanted = {
        "embedding",
        "attention.norm",
        "attention.q",
        "attention.k",
        "attention.v",
        "attention.context",
        "attention.residual",
        "mlp.out",
        "out",
    }
    missing = {"phi3": {"attention.q", "attention.k", "attention.v"}}
    missing |= {"deepseek_v2": {"attention.k", "attention.v"}, "deepseek_v3": {"attention.k", "attention.v"}}
    moe = {"mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"}
    encoders = {"bert", "roberta", "distilbert", "efficient_encoder_v1", "efficient_encoder_v2"}
    wanted -= missing.get(family, set()) | ({"mlp.out"} if family in moe else set())
    wanted -= (
        {"attention.residual"} if family in encoders else set()
    )  # a skip-norm that does not give its sum
    wanted |= {"norm", "logits", "attention.rope", "attention.scores"} if family not in encoders else set()
    wanted -= {"embedding"} if family.startswith("efficient") else set()  # a sum without a norm
    wanted -= (
        {"out"} if family in ("bert", "roberta", "distilbert") else set()
    )  # the file's output: last_hidden_state
    assert wanted <= shown, wanted - shown


def walked(device: Any, quant: Quantized, scratch: Path) -> Divergence:
    model = quant.model
    known = primitives.open_session(str(model.directory), str(quant.directory))
    return against_graph(device, known, IDS, scratch / "walk")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "scheme", ["int8", "int4-g32-asym", "nf4", "mxfp4", "nvfp4", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
)
def test_every_container_of_gguf_is_widened_to_what_its_codes_are(tmp_path: Path, scheme: str) -> None:
    fields = {"hidden_size": 256, "intermediate_size": 256, "max_position_embeddings": 64}
    quant = quantize(load(write_model(tmp_path / "model", "llama", fields)), scheme)
    artifact = target("cpu").export(quant, tmp_path / "artifact")
    (tmp_path / "scratch").mkdir()
    spec = target("cpu", threads=1).traced(artifact, tmp_path / "scratch")
    device = llama_cpp.open_session(**spec.arguments)
    try:
        found = walked(device, quant, tmp_path)
    finally:
        device.close()
    worst = max(value.own for value in found.values)
    if scheme == "nf4":  # its levels are integers there
        assert 1e-3 < worst < 4 * gguf_exporter.carries(quant.scheme).added_error
    else:
        assert worst < ONE_SUM


def test_shards_are_walked_as_one(tmp_path: Path) -> None:
    quant = quantize(load(write_model(tmp_path / "model", "llama", {"vocab_size": 4096})), "int8")
    kind = target("cpu", threads=1, max_shard_size="1M")
    artifact = kind.export(quant, tmp_path / "artifact")
    (tmp_path / "scratch").mkdir()
    device = llama_cpp.open_session(**kind.traced(artifact, tmp_path / "scratch").arguments)
    try:
        assert walked(device, quant, tmp_path).first is None
    finally:
        device.close()


def test_two_artifacts_of_the_same_codes(tmp_path: Path) -> None:
    one = make(tmp_path / "gguf", "gguf", "llama", {"head_dim": 16})
    other = make(tmp_path / "onnx", "onnx", "llama", {"head_dim": 16})
    sound = diff(str(one.package), str(other.package), PROMPT)
    assert sound.divergence.first is None
    assert sound.notes == ()
    assert all(value.own is None for value in sound.divergence.values)
    BUGS["onnx-rope-pairing"][3](other.package / "artifact")
    found = diff(str(one.package), str(other.package), PROMPT).divergence
    assert found.first
    assert found.first.name == "layers.0.attention.rope"
    assert "first primitive that parts is layers.0.attention.rope" in found.words()


def test_bare_files_and_what_is_drawn(tmp_path: Path) -> None:
    """A GGUF file that nobody packed, beside a model with its own weights; a file of a package is that package."""
    directory = write_model(tmp_path / "model", "llama", {}, dtype="F32")
    quant = quantize(load(directory), "none")
    artifact = target("cpu").export(quant, tmp_path / "artifact")
    found = diff(str(directory), str(artifact.directory / artifact.files[0]), PROMPT)
    assert found.divergence.first is None
    assert "is of no package" in found.notes[0]
    picture(found, tmp_path / "pictures" / "growth.svg")
    drawn = ElementTree.parse(tmp_path / "pictures" / "growth.svg").getroot()
    circles = [each for each in drawn.iter() if each.tag.endswith("circle")]
    assert len(circles) == len(found.divergence.values)
    with pytest.raises(OutputError, match=r"growth\.png cannot be drawn: --picture writes \.svg"):
        picture(found, tmp_path / "growth.png")


def test_what_a_path_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a package is that package, from wherever it is named; a model that is named inside a package is a model."""
    made = make(tmp_path, "onnx", "llama", {})
    package = made.package
    for given in (package, package / "artifact", package / "artifact" / "model.onnx"):
        assert diff(str(given), str(made.model), PROMPT).notes == ()
    monkeypatch.chdir(package / "artifact")
    assert diff("model.onnx", str(made.model), PROMPT).notes == ()
    monkeypatch.chdir(package)
    with pytest.raises(TapeoutError, match="is not the model that"):
        diff(".", "arithmetic", PROMPT)
    shutil.copytree(package / "artifact", tmp_path / "bare")
    found = diff(str(tmp_path / "bare"), str(package), PROMPT)
    assert found.divergence.first is None


def test_bad_input(tmp_path: Path) -> None:
    made = make(tmp_path, "onnx", "llama", {})
    package, model = str(made.package), str(made.model)
    deeper = write_model(tmp_path / "deeper", "llama", {"num_hidden_layers": 3}, dtype="F32")
    wider = write_model(tmp_path / "wider", "llama", {"hidden_size": 128}, dtype="F32")
    encoder = write_model(tmp_path / "encoder", "bert", {})
    for one, other, prompt, told in (
        (package, model, "", "the prompt '' gives no token"),
        (package, model, "x" * 300, r"the prompt has 300 tokens; what fits: 256, which is the context"),
        (package, str(deeper), None, r"deeper is not the model that .*package was made from"),
        (model, str(deeper), None, "one has 2 layers and the other 3: they are different models"),
        (model, str(wider), None, r"embedding is \[\d+, 64\] in one and \[\d+, 128\] in the other"),
        (
            package,
            str(encoder),
            None,
            "is a decoder and .* is an encoder: they have nothing in common that can be",
        ),
        (package, str(tmp_path / "nothing"), None, "no model at"),
    ):
        with pytest.raises(TapeoutError, match=told):
            diff(one, other, prompt)
