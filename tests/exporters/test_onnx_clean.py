"""What we write is sound to those who own the format: its checker, its shape inference, and the passes of onnx-ir and onnxscript."""

from __future__ import annotations

import contextlib
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from thinned import thinned

import tapeout
from tapeout.exporters import onnx
from tapeout.generated import ENCODERS
from tapeout.models import Model, load
from tapeout.quantize import quantize

library = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
optimizer = pytest.importorskip("onnxscript.optimizer")

ROOT = Path(__file__).resolve().parents[2]
DECODERS = (
    "llama",
    "mistral",
    "gemma2",
    "gemma3_text",
    "phi3",
    "qwen3",
    "qwen2_moe",
    "mixtral",
    "deepseek_v2",
    "deepseek_v3",
)


def assert_clean(path: Path) -> None:
    """Checker and strict shape inference raise nothing, nothing is there twice or for nothing, and what the passes make is sound too."""
    from onnx_ir.passes import common

    library.checker.check_model(path, full_check=True)
    proto = library.load(path, load_external_data=False)
    inferred = library.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    known = {value.name for value in (*inferred.graph.value_info, *inferred.graph.output)}
    if {node.domain for node in proto.graph.node} == {""}:  # of other domains' operators ONNX knows no types
        assert {name for node in proto.graph.node for name in node.output if name} <= known
    with contextlib.chdir(path.parent):  # where onnx-ir's checker looks for the data file
        for each in (
            common.CheckerPass(full_check=True),
            common.ShapeInferencePass(check_type=True, strict_mode=True),
        ):
            each(ir.serde.deserialize_model(proto))
    # Names of optional outputs that are left out are all that a further pass would add.
    model = ir.load(path)
    for each in (
        common.TopologicalSortPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.OutputFixPass(),
    ):
        assert not each(model).modified, type(each).__name__  # so the next one gets what the file holds
    optimizer.optimize_ir(model)
    optimized = path.with_name("optimized.onnx")
    ir.save(model, optimized)
    library.checker.check_model(optimized, full_check=True)


@pytest.mark.parametrize("family", thinned(DECODERS))
@pytest.mark.parametrize("dialect", ["onnxruntime", "standard", "tensorrt", "migraphx"])
def test_a_decoder(make_model: Callable[..., Path], tmp_path: Path, dialect: Any, family: str) -> None:
    quant = quantize(load(make_model(family)), "int4-g32")
    assert_clean(onnx.write(quant, tmp_path / "out", dialect=dialect).directory / "model.onnx")


@pytest.mark.parametrize("scheme", ["none", "int8", "int4-g32-asym", "nf4", "fp8"])
def test_a_container(make_model: Callable[..., Path], tmp_path: Path, scheme: str) -> None:
    quant = quantize(load(make_model(hidden_size=128, tie_word_embeddings=True)), scheme)
    assert_clean(onnx.write(quant, tmp_path / "out").directory / "model.onnx")


@pytest.mark.parametrize("family", ENCODERS)
def test_an_encoder(make_model: Callable[..., Path], tmp_path: Path, family: str) -> None:
    quant = quantize(load(make_model(family)), "int8")
    assert_clean(onnx.write(quant, tmp_path / "out").directory / "model.onnx")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["none", "int4-g32"])
@pytest.mark.parametrize("name", ["sliding_window", "block_sparse"])
def test_a_module(example: Callable[..., Any], tmp_path: Path, name: str, scheme: str) -> None:
    quant = quantize(tapeout.load_module(*example(name)), scheme)
    assert_clean(onnx.write(quant, tmp_path / "out").directory / "model.onnx")


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_a_family_of_optimums(unknown_family: Callable[[str], Model], tmp_path: Path, name: str) -> None:
    quant = quantize(unknown_family(name), "int4-g32")
    assert_clean(onnx.write(quant, tmp_path / "out").directory / "model.onnx")


@pytest.mark.slow
def test_the_node_counts_are_those_of_the_page() -> None:
    """A graph is read in Netron: what its size is stands in docs/onnx.md, and a pass that grows it shows."""
    page = (ROOT / "docs" / "onnx.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- nodes -->\n(.*?)\n<!-- /nodes -->", page, re.DOTALL)
    assert found
    assert found[1] == runpy.run_path(str(ROOT / "scripts" / "readme.py"))["nodes"](), "run scripts/readme.py"
