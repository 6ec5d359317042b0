"""Codes in graphs that others made: found by the weights' values, put in place, read back, and the same function as before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tapeout
from tapeout.errors import ModelError, PackageError, SchemeError
from tapeout.exporters import onnx
from tapeout.models import Model, Role
from tapeout.quantize import Quantized, quantize
from tapeout.validate import reference

pytestmark = pytest.mark.slow  # of torch.onnx, that makes the graphs
library, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

CLOSE = 1e-4  # of the outputs' deviation: float32 sums in another order, through a few layers
CONTAINERS = {"none": "F32", "int8": "MatMulNBits 8-bit", "int4-g32": "MatMulNBits 4-bit"}
IDS = [(i * 37 + 11) % 256 for i in range(40)]


def exact_session(quant: Quantized, directory: Path) -> Any:
    """The artifact under a graph whose matmuls leave their inputs alone."""
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory))
    return runtime.InferenceSession(onnx.exact_graph(quant), options)


def with_codes(module: nn.Module, quant: Quantized) -> nn.Module:
    """The module itself with the values of the codes as its weights."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in quant and quant.schemes[name].kind != "none":
                weight = torch.from_numpy(quant.float32(name))
                parameter.copy_(weight.T if quant.model.checkpoint[name].turned else weight)
    return module


def outputs_of(module: nn.Module, given: tuple[torch.Tensor, ...]) -> list[np.ndarray]:
    with torch.no_grad():
        found = module(*given)
    return [each.numpy() for each in (found if isinstance(found, tuple) else (found,))]


def assert_same(session: Any, module: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
    feeds = {each.name: value.numpy() for each, value in zip(session.get_inputs(), given, strict=True)}
    for mine, theirs in zip(session.run(None, feeds), outputs_of(module, given), strict=True):
        assert mine.shape == theirs.shape
        assert np.abs(mine - theirs).max() < CLOSE * theirs.std()


@pytest.mark.parametrize("name", ["sliding_window", "block_sparse"])
def test_a_module_is_itself(
    example: Callable[..., Any], tmp_path: Path, name: str, wrong: Callable[..., list[str]]
) -> None:
    """At lengths that it was not traced at, past the window and past several blocks, and in the shape that it was."""
    module, given, dynamic = example(name)
    model = tapeout.load_module(module, given, dynamic)
    linear = {n for n, spec in model.specs.items() if spec.role is Role.LINEAR}
    assert len(linear) == {"sliding_window": 2 * 4 + 1, "block_sparse": 2 * 6}[name]
    for scheme, container in CONTAINERS.items():
        quant = quantize(model, scheme)
        artifact = onnx.write(quant, tmp_path / scheme)
        assert wrong(artifact, quant) == []
        assert {artifact.containers[n] for n in linear} == {container}
        session = exact_session(quant, tmp_path / scheme)
        coded = with_codes(example(name)[0], quant)
        assert_same(session, coded, given)
        for tokens in (2, 7, 130):
            draw = torch.Generator().manual_seed(tokens)
            other = tuple(
                each.reshape(-1)[torch.randint(0, each.numel(), (1, tokens, *each.shape[2:]), generator=draw)]
                for each in given
            )
            assert_same(session, coded, other)


def test_the_nodes_that_codes_take_the_place_of(example: Callable[..., Any], tmp_path: Path) -> None:
    module, given, dynamic = example("block_sparse")
    quant = quantize(tapeout.load_module(module, given, dynamic), "int4-g32")
    onnx.write(quant, tmp_path)
    graph = library.load(tmp_path / "model.onnx", load_external_data=False).graph
    count = Counter(node.op_type for node in graph.node)
    assert count["MatMulNBits"] == 12
    assert count["MatMul"] == 4  # of attention, which has no weights
    assert [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [
        1,
        "tokens",
        128,
    ]
    assert not any(node.doc_string or node.metadata_props for node in graph.node)
    facts = onnx.describe(tmp_path / "model.onnx")
    assert facts["metadata"]["tapeout.graph"] == "torch.export"
    assert facts["inputs"] == ["states", "weights"]
    assert facts["outputs"] == ["output_0", "output_1"]


class Odd(nn.Module):
    """A table that is looked up and multiplied with, one of places, a convolution, a product under a Gemm, one weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(64, 32), nn.Embedding(50, 32)
        self.mix = nn.Conv1d(32, 32, 3, padding=1)
        self.one, self.two = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        self.two.weight = self.one.weight
        self.square = nn.Parameter(torch.randn(32, 32) * 0.2)
        self.bias = nn.Parameter(torch.randn(32))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        x = self.mix(x.transpose(1, 2)).transpose(1, 2)
        x = self.two(torch.relu(self.one(x)))
        rows = torch.addmm(self.bias, x.reshape(-1, 32), self.square)
        # From both sides: no linear layer does that.
        rows = rows @ (self.square.t() @ self.square)
        return rows.reshape(*ids.shape, -1) @ self.words.weight.t()


@pytest.fixture
def odd() -> tuple[nn.Module, Model]:
    torch.manual_seed(1)
    module = Odd().eval()
    dynamic = {"ids": {1: torch.export.Dim("tokens", min=2, max=50)}}
    return module, tapeout.load_module(module, (torch.randint(0, 64, (1, 20)),), dynamic)


def test_each_weight_is_what_it_is_used_for(
    odd: tuple[nn.Module, Model], tmp_path: Path, wrong: Callable[..., list[str]]
) -> None:
    module, model = odd
    roles = {name: spec.role for name, spec in model.specs.items()}
    assert roles == {
        "words.weight": Role.EMBEDDING, "places.weight": Role.POSITION, "mix.weight": Role.OTHER, "mix.bias": Role.OTHER,
        "one.weight": Role.LINEAR, "square": Role.OTHER, "bias": Role.OTHER,
    }  # fmt: skip
    assert model.config.tie_word_embeddings
    assert dict(model.config.same) == {"two.weight": "one.weight"}  # type: ignore[union-attr]
    quant = quantize(model, "int4-g32")
    artifact = onnx.write(quant, tmp_path)
    assert wrong(artifact, quant) == []
    assert artifact.containers["words.weight"] == "MatMulNBits 8-bit"
    (note,) = [each for each in artifact.notes if "stay float" in each]
    assert "mix.weight, square stay float" in note
    assert_same(exact_session(quant, tmp_path), with_codes(module, quant), (torch.arange(33)[None],))


def test_a_weight_on_the_left_is_no_linear_layer() -> None:
    class Left(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Parameter(torch.randn(32, 32)), nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.left @ self.right(x)

    model = tapeout.load_module(Left().eval(), (torch.randn(32, 32),))
    assert {name: spec.role for name, spec in model.specs.items() if len(spec.shape) > 1} == {
        "left": Role.OTHER,
        "right.weight": Role.LINEAR,
    }


def test_damage_is_named(
    example: Callable[..., Any], tmp_path: Path, wrong: Callable[..., list[str]]
) -> None:
    module, given, dynamic = example("block_sparse")
    quant = quantize(tapeout.load_module(module, given, dynamic), "int4-g32")
    artifact = onnx.write(quant, tmp_path)
    data = tmp_path / "model.onnx.data"
    whole = data.read_bytes()
    graph = library.load(tmp_path / "model.onnx", load_external_data=False).graph
    for part in ("blocks.1.out.codes", "blocks.1.out.scales", "blocks.0.up.bias"):
        (proto,) = [each for each in graph.initializer if each.name == part]
        at = int(next(each.value for each in proto.external_data if each.key == "offset")) + 5
        data.write_bytes(whole[:at] + bytes([whole[at] ^ 0x20]) + whole[at + 1 :])
        assert wrong(artifact, quant) == [part.removesuffix(".codes").removesuffix(".scales")]
    data.write_bytes(whole)
    kept = quant.model.config.graph  # type: ignore[union-attr]
    kept.write_bytes(kept.read_bytes()[:100])
    with pytest.raises(PackageError, match=r"graph\.onnx cannot be read"):
        wrong(artifact, quant)


@pytest.mark.parametrize(
    ("family", "scheme"), [("gpt2", "int4-g32"), ("gpt2", "none"), ("opt", "int8"), ("opt", "int4-g32-asym")]
)
def test_a_graph_of_optimum_is_the_reference(
    unknown_family: Callable[[str], Model],
    tmp_path: Path,
    family: str,
    scheme: str,
    wrong: Callable[..., list[str]],
) -> None:
    """GPT-2's matrices are [in, out] under Gemms; OPT's lie turned under names that say nothing, and some under Gemms of the other kind."""
    model = unknown_family(family)
    quant = quantize(model, scheme)
    artifact = onnx.write(quant, tmp_path / "out")
    assert wrong(artifact, quant) == []
    layers = 2 if family == "gpt2" else 1
    turned = {name for name in model.specs if model.checkpoint[name].turned}
    assert len(turned) == (4 * layers if family == "gpt2" else 0)
    count = Counter(spec.role for spec in model.specs.values())
    assert count[Role.LINEAR] == {"gpt2": 4, "opt": 6}[family] * layers
    assert (count[Role.EMBEDDING], count[Role.POSITION], count[Role.HEAD]) == (1, 1, 0)
    assert model.config.folded == ()  # type: ignore[union-attr]
    session = exact_session(quant, tmp_path / "out")
    expected = reference.open_session(str(model.directory), store=str(quant.directory), threads=1).prefill(
        IDS
    )  # type: ignore[union-attr]
    past = {
        each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32)
        for each in session.get_inputs()
        if each.name.startswith("past_")
    }
    names = [each.name.replace("present", "past_key_values") for each in session.get_outputs()]
    logits, at = [], 0
    for ids in np.split(np.array([IDS]), [17, 18, 19, 31], axis=1):
        end = at + ids.shape[1]
        given = {
            "input_ids": ids, "attention_mask": np.ones((1, end), np.int64), "position_ids": np.arange(at, end)[None],
        }  # fmt: skip
        wanted = {each.name for each in session.get_inputs()}
        first, *present = session.run(None, {k: v for k, v in given.items() if k in wanted} | past)
        past, at = dict(zip(names[1:], present, strict=True)), end
        logits.append(first[0])
    assert np.abs(np.concatenate(logits) - expected).max() < CLOSE * expected.std()


def test_one_place_of_the_file_for_a_tied_head(
    unknown_family: Callable[[str], Model], tmp_path: Path
) -> None:
    onnx.write(quantize(unknown_family("gpt2"), "int8"), tmp_path / "out")
    graph = library.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    places = Counter(
        tuple(e.value for e in each.external_data)
        for each in graph.initializer
        if "wte" in each.name and each.external_data
    )
    assert sorted(places.values()) == [1, 2]  # scales, and codes by two names


def test_a_checkpoint_that_is_not_the_graphs(unknown_family: Callable[[str], Model], tmp_path: Path) -> None:
    """Its tensors are not found by their values, and what is not found has no codes."""
    from safetensors.numpy import load_file, save_file

    from tapeout.models import Checkpoint, optimum

    model = unknown_family("opt")
    file = model.directory / "model.safetensors"
    tensors = load_file(file)
    name = "model.decoder.layers.0.fc1.weight"
    tensors[name] = tensors[name] + np.float32(1e-3)
    save_file(tensors, file)
    checkpoint = Checkpoint(model.directory)
    export = Path(__file__).parent / "data" / "optimum" / "opt" / "export"
    place = optimum.place_of(model.directory, checkpoint)
    optimum.read_export(export, place, "opt", "optimum-onnx 0.1.0", checkpoint)
    other = tapeout.load(model.directory)
    assert other.config.folded == (name,)  # type: ignore[union-attr]
    artifact = onnx.write(quantize(other, "int8"), tmp_path / "out")
    assert any(f"has made constants of {name}" in note for note in artifact.notes)
    save_file({key: value + np.float32(1) for key, value in tensors.items()}, file)
    with pytest.raises(ModelError, match="none of its matmuls has a weight of the checkpoint"):
        optimum.read_export(export, tmp_path / "none", "opt", "", Checkpoint(model.directory))


def test_what_such_a_graph_cannot_do_is_named(example: Callable[..., Any], tmp_path: Path) -> None:
    module, given, dynamic = example("sliding_window")
    model = tapeout.load_module(module, given, dynamic, name="window")
    quant = quantize(model, "int8")
    with pytest.raises(
        ModelError, match=r"made by torch\.export: it is written in ONNX Runtime's operators only"
    ):
        onnx.write(quant, tmp_path, dialect="standard")
    with pytest.raises(ModelError, match=r"it is not cut to fewer layers"):
        onnx.write(quant, tmp_path, layers=1)
    for target in (tapeout.target("cpu"), tapeout.target("null")):
        with pytest.raises(ModelError, match=r"window is of no family .* use .*--format onnx"):
            target.export(quant, tmp_path)
    with pytest.raises(SchemeError, match=r"window is of no family .*, which calibration does not run"):
        quantize(model, "int4-g32", rounding="gptq")
    with pytest.raises(SchemeError, match=r"is mxfp4: onnxruntime has no kernel"):
        onnx.write(quantize(model, "mxfp4"), tmp_path)
