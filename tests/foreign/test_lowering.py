"""A foreign checkpoint all the way into a file of llama.cpp, and the codes read back out of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from tapeout.exporters.gguf import read_codes, write
from tapeout.generated import write_model
from tapeout.models import Model, load
from tapeout.quantize import Quantized, QuantTensor, foreign, quantize


def imported(model: Model, directory: Path) -> Quantized:
    return quantize(model, out=directory)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gptq-v1-g32", "Q4_0"),
        ("gptq-v1-g32-asym", "Q5_0"),
        ("awq-gemm-g64", "Q5_0"),
        ("gptq-v1-int8", "Q8_0"),
    ],
)
def test_the_codes_in_the_file_are_those_of_the_checkpoint(
    name: str, kind: str, tmp_path: Path, checkpoint: Callable[..., Path], weight: Callable[..., Any]
) -> None:
    source = checkpoint(name)
    # The fixtures have no tokenizer; this one fits their vocabulary.
    for file in write_model(tmp_path / "tokenizer").glob("tokenizer*"):
        file.rename(source / file.name)
    model = load(source)
    quant = imported(model, tmp_path / "store")
    artifact = write(quant, tmp_path / "artifact")
    compared = 0
    for tensor, held in read_codes(artifact, quant):
        if isinstance(held, QuantTensor):
            stored = quant[tensor]
            assert isinstance(stored, QuantTensor)
            np.testing.assert_array_equal(held.codes(), stored.codes())
            np.testing.assert_array_equal(held.scale, stored.scale)
            compared += 1
    assert compared >= 6
    # And gguf's own reading of q_proj is the checkpoint's weight, bit for bit.
    block = next(
        t for t in gguf.GGUFReader(artifact.directory / artifact.files[0]).tensors if "attn_q" in t.name
    )
    assert block.tensor_type.name == kind
    tensor = "model.layers.0.self_attn.q_proj.weight"
    rows = gguf.dequantize(block.data, block.tensor_type).reshape(model.specs[tensor].shape)
    rows = rows.reshape(model.config.num_heads, -1, 2, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)
    np.testing.assert_array_equal(rows, weight(foreign.read(model), tensor))


def test_a_gguf_file_comes_out_as_it_went_in(tmp_path: Path) -> None:
    first = write(quantize(load("count"), "int4-g32"), tmp_path / "first")
    again = write(imported(load(first.directory / first.files[0]), tmp_path / "store"), tmp_path / "again")
    one, two = (gguf.GGUFReader(made.directory / made.files[0]) for made in (first, again))
    assert [tensor.name for tensor in one.tensors] == [tensor.name for tensor in two.tensors]
    for before, after in zip(one.tensors, two.tensors, strict=True):
        assert before.tensor_type == after.tensor_type
        np.testing.assert_array_equal(before.data, after.data)
    kept = (
        "tokenizer.ggml.tokens",
        "tokenizer.ggml.merges",
        "tokenizer.ggml.pre",
        "tokenizer.ggml.token_type",
    )
    for field in (
        *kept,
        "llama.rope.freq_base",
        "llama.attention.layer_norm_rms_epsilon",
        "llama.context_length",
    ):
        assert one.fields[field].contents() == two.fields[field].contents(), field
