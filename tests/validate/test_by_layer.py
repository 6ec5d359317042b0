"""What a reference's layers give is what transformers says they give, and error begins in the layer that was rounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapeout.models import load
from tapeout.quantize import quantize
from tapeout.validate import by_layer
from tapeout.validate.reference import open_session

MakeModel = Callable[..., Path]
IDS = [3, 1, 4, 1, 5, 9, 2, 6]


def traced(session: Any, place: Path) -> dict[str, np.ndarray[Any, Any]]:
    place.mkdir()
    return by_layer.read(list(session.trace(IDS, str(place))), place)


@pytest.mark.parametrize("family", ["llama", "mixtral", "bert"])
def test_layers_give_what_transformers_says(make_model: MakeModel, tmp_path: Path, family: str) -> None:
    import torch

    session = open_session(str(make_model(family, dtype="F32")), threads=1)
    found = traced(session, tmp_path / "layers")
    network = getattr(session, "_network", None) or session._module
    with torch.inference_mode():
        states = network(torch.tensor([IDS]), output_hidden_states=True).hidden_states
    names = ["embedding", *(f"layers.{k}" for k in range(len(states) - 1))]
    assert list(found) == [*names, "output" if family == "bert" else "logits"]
    # The last state of a decoder has gone through the final norm already.
    shown = names if family == "bert" else names[:-1]
    for name, state in zip(shown, states, strict=False):
        assert np.array_equal(found[name], state[0].numpy()), name
    if family == "llama":
        session.reset()
        assert np.array_equal(found["logits"], session.prefill(IDS))
        assert np.array_equal(
            traced(session, tmp_path / "again")["logits"], found["logits"]
        )  # no hook is left, nor a cache


def test_both_stacks_of_an_encoder_decoder(make_model: MakeModel, tmp_path: Path) -> None:
    session = open_session(str(make_model("t5", dtype="F32")), threads=1)
    found = traced(session, tmp_path / "layers")
    stacks = [name.split(".")[0] for name in found]
    assert stacks == ["embedding", "encoder", "encoder", "decoder", "decoder", "decoder", "logits"]
    assert {len(found[name]) for name in found if name.startswith("encoder")} == {4}
    assert len(found["decoder.0"]) == len(found["logits"]) == 5  # what the target begins with, and its tokens


def test_error_begins_where_it_was_rounded(make_model: MakeModel, tmp_path: Path) -> None:
    directory = make_model("llama", dtype="F32", num_hidden_layers=3)
    quant = quantize(
        load(directory), "none", overrides={"model.layers.1.mlp.*": "int4-g32"}, out=tmp_path / "codes"
    )
    original = traced(open_session(str(directory), threads=1), tmp_path / "original")
    rounded = traced(open_session(str(directory), str(quant.directory), threads=1), tmp_path / "rounded")
    grown = by_layer.error_by_layer([original], [rounded])
    assert list(grown) == ["embedding", "layers.0", "layers.1", "layers.2", "logits"]
    assert grown["embedding"] == grown["layers.0"] == 0.0
    assert all(grown[name] > 1e-4 for name in ("layers.1", "layers.2", "logits"))  # type: ignore[operator]


def test_error_is_the_difference_over_the_size() -> None:
    rng = np.random.default_rng(0)
    one, two = (rng.normal(size=(length, 8)).astype(np.float32) for length in (5, 9))
    assert by_layer.error_by_layer([{"a": one}, {"a": two}], [{"a": one * 1.5}, {"a": two * 1.5}]) == {
        "a": pytest.approx(0.5, rel=1e-6)
    }
    zero = np.zeros_like(one)
    assert by_layer.error_by_layer([{"a": one}], [{"a": zero}]) == {"a": pytest.approx(1.0)}
    broken = one.copy()
    broken[2, 3] = np.nan
    assert by_layer.error_by_layer([{"a": one}], [{"a": broken}]) == {"a": None}
    assert by_layer.error_by_layer([], []) == {}
