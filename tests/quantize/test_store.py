"""The store: same bytes whatever the threads, found again, resumed, and checked."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from thinned import thinned

from tapeout.errors import ModelError, OutputError, PackageError, RecipeError, SchemeError
from tapeout.models import load
from tapeout.quantize import SCHEMES, Calibration, Quantized, QuantTensor, lattice, open_store, quantize
from tapeout.quantize.hqq import round_hqq
from tapeout.quantize.rtn import round_to_nearest
from tapeout.quantize.store import tensor_path

MakeModel = Callable[..., Path]
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


def bytes_of(quant: Quantized) -> dict[str, bytes]:
    return {
        str(path.relative_to(quant.directory)): path.read_bytes()
        for path in sorted(quant.directory.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("scheme", thinned(SCHEMES, alike=lambda name: SCHEMES[name].scales))
def test_same_bytes_for_any_thread_count(
    make_model: MakeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    monkeypatch.setattr("tapeout.quantize.store._TASK_WEIGHTS", 1 << 13)  # several tasks a tensor
    monkeypatch.setattr("tapeout.quantize.store._STEP_WEIGHTS", 1 << 11)
    model = load(make_model(hidden_size=256, intermediate_size=512))
    sees = Calibration(None, 8, 64) if SCHEMES[scheme].calibrated else None
    one = quantize(model, scheme, calibration=sees, out=tmp_path / "one", threads=1)
    five = quantize(model, scheme, calibration=sees, out=tmp_path / "five", threads=5)
    assert bytes_of(one) == bytes_of(five)
    assert one.digest == five.digest


@pytest.mark.parametrize("rounding", ["rtn", "hqq"])
@pytest.mark.parametrize(
    "scheme", [name for name, each in SCHEMES.items() if each.kind != "none" and not each.calibrated]
)
def test_stored_codes_are_those_of_the_whole_tensor(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, scheme: str, rounding: str
) -> None:
    """Rows are rounded a few at a time; the library that owns the format reads what one call on all rows gives."""
    monkeypatch.setattr("tapeout.quantize.store._STEP_WEIGHTS", 5 * 256)
    model = load(make_model(hidden_size=256, intermediate_size=256, num_hidden_layers=1))
    quant = quantize(model, scheme, rounding=rounding)
    source = model.checkpoint[Q_PROJ].float32()
    # Servers put queries, keys and values together: the largest of all is the one that counts.
    joined = [model.checkpoint[Q_PROJ.replace("q_proj", each)] for each in ("q_proj", "k_proj", "v_proj")]
    largest = max(float(np.abs(each.float32()).max()) for each in joined)
    whole = lattice.tensor_scale(largest, SCHEMES[scheme])
    by = round_hqq if rounding == "hqq" else round_to_nearest
    expected = by(source, SCHEMES[scheme], tensor_scale=whole)
    parts = load_file(tensor_path(quant.directory, Q_PROJ))
    tensor = quant[Q_PROJ]
    assert isinstance(tensor, QuantTensor)
    np.testing.assert_array_equal(tensor.codes(), expected.codes)
    np.testing.assert_array_equal(tensor.packed, parts["codes"])
    kept = dict(expected.grid.parts)
    if scheme == "nf4-dq":
        kept = lattice.quantize_scales(expected.grid.scale)
    if whole is not None:
        kept["scale_block"] = np.array([whole])
    assert parts.keys() == {"codes", *kept}
    for name, part in kept.items():
        assert parts[name].dtype == part.dtype
        np.testing.assert_array_equal(parts[name].reshape(part.shape), part)


def test_roles_decide_the_default(make_model: MakeModel) -> None:
    quant = quantize(load(make_model(attention_bias=True)), "int4-g32")
    names = {name: str(scheme) for name, scheme in quant.schemes.items()}
    assert names["model.embed_tokens.weight"] == names["lm_head.weight"] == "int8"
    assert names[Q_PROJ] == "int4-g32"
    assert names["model.norm.weight"] == names["model.layers.0.self_attn.q_proj.bias"] == "none"
    unquantized = quantize(load(make_model(name="plain")), "none")
    assert set(map(str, unquantized.schemes.values())) == {"none"}


def test_recipe_by_glob_last_match_wins(make_model: MakeModel) -> None:
    overrides = {"*.down_proj": "int8", "model.layers.1.*_proj": "nf4", "lm_head": "none"}
    quant = quantize(load(make_model()), "int4-g32", overrides=overrides)
    assert str(quant.schemes["model.layers.0.mlp.down_proj.weight"]) == "int8"
    assert str(quant.schemes["model.layers.1.mlp.down_proj.weight"]) == "nf4"
    assert str(quant.schemes["lm_head.weight"]) == "none"
    assert not isinstance(quant["lm_head.weight"], QuantTensor)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"*.dwon_proj": "int8"}, RecipeError, "matches no tensor"),
        ({"lm_haed": "int8"}, RecipeError, "did you mean 'lm_head'"),
        ({"*norm": "int8"}, RecipeError, "which stays float"),
        ({"lm_head": "int9"}, SchemeError, "did you mean 'int8'"),
        (
            {"*.mlp.*": "int4-g128"},
            SchemeError,
            "group 128 of scheme int4-g128 does not divide in_features 64",
        ),
    ],
)
def test_recipes_that_fit_nothing(
    make_model: MakeModel, overrides: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        quantize(load(make_model()), "int4-g32", overrides=overrides)


def test_a_second_run_finds_the_store(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(make_model())
    first = quantize(model, "int4-g32")
    monkeypatch.setattr("tapeout.quantize.store.write_tensor", lambda *_: pytest.fail("quantized again"))
    assert quantize(model, "int4-g32").digest == first.digest
    with pytest.raises(pytest.fail.Exception):
        quantize(model, "int4-g64")


def test_a_killed_run_goes_on_where_it_stopped(make_model: MakeModel, tmp_path: Path) -> None:
    directory = make_model(hidden_size=512, intermediate_size=1024, num_hidden_layers=6)
    whole = quantize(load(directory), "nf4", out=tmp_path / "whole")
    code = f"from tapeout.models import load; from tapeout.quantize import quantize; quantize(load({str(directory)!r}), 'nf4')"
    child = subprocess.Popen([sys.executable, "-P", "-c", code])
    cache = Path(os.environ["TAPEOUT_CACHE"])
    deadline = time.monotonic() + 30
    while (
        len(written := list(cache.glob("store/*/tensors/*.safetensors"))) < 5 and time.monotonic() < deadline
    ):
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    times = {path: path.stat().st_mtime_ns for path in written}
    assert not list(cache.glob("store/*/quantization.json"))
    resumed = quantize(load(directory), "nf4")
    assert bytes_of(resumed) == bytes_of(whole)
    assert times == {path: path.stat().st_mtime_ns for path in written}


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", [Q_PROJ, "model.norm.weight"])
def test_a_weight_that_is_not_finite_is_named(make_model: MakeModel, name: str, bad: float) -> None:
    from safetensors.numpy import save_file

    directory = make_model(dtype="F32")
    tensors = load_file(directory / "model.safetensors")
    tensors[name].reshape(-1)[5] = bad
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ModelError, match=rf"{name} in .* holds {bad} at \[.*5\]"):
        quantize(load(directory), "int4-g32")


def test_a_scale_that_does_not_fit_keeps_the_tensor_float(make_model: MakeModel) -> None:
    from safetensors.numpy import save_file

    directory = make_model(dtype="F32")
    tensors = load_file(directory / "model.safetensors")
    tensors[Q_PROJ] *= 1e8
    save_file(tensors, directory / "model.safetensors")
    quant = quantize(load(directory), "int4-g32")
    assert list(quant.fallbacks) == [Q_PROJ]
    assert "does not fit float16" in quant.fallbacks[Q_PROJ]
    np.testing.assert_array_equal(quant.float32(Q_PROJ), tensors[Q_PROJ])


@pytest.mark.parametrize("what", ["a tensor", "the index"])
def test_a_store_of_the_cache_that_is_damaged_is_made_again(
    make_model: MakeModel, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    model = load(make_model())
    quant = quantize(model, "int4-g32")
    whole = bytes_of(quant)
    path = (
        tensor_path(quant.directory, Q_PROJ) if what == "a tensor" else quant.directory / "quantization.json"
    )
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert bytes_of(quantize(model, "int4-g32")) == whole
    (said,) = [record.getMessage() for record in caplog.records]
    assert path.name in said
    assert said.endswith("It was taken away, and is made again.")


def test_a_store_of_ones_own_that_is_damaged_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    model = load(make_model())
    quant = quantize(model, "int4-g32", out=tmp_path / "codes")
    path = tensor_path(quant.directory, Q_PROJ)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with ThreadPoolExecutor(1) as pool, pytest.raises(PackageError, match=rf"{path.name} is not what"):
        open_store(quant.directory, model, pool)


def test_a_store_of_an_earlier_format_is_not_found(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scales were chosen otherwise; the format is part of what a store is named by."""
    model = load(make_model())
    with monkeypatch.context() as patch:
        patch.setattr("tapeout.quantize.store.FORMAT_VERSION", 1)
        earlier = quantize(model, "int4-g32").directory
    assert quantize(model, "int4-g32").directory.name != earlier.name


def test_a_store_of_a_newer_format_is_refused(make_model: MakeModel) -> None:
    model = load(make_model())
    index = quantize(model, "int4-g32").directory / "quantization.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"format_version": 99}))
    with pytest.raises(PackageError, match="format_version 99; this tapeout reads up to 2: upgrade it"):
        quantize(model, "int4-g32")


def test_outputs_are_never_overwritten_unasked(make_model: MakeModel, tmp_path: Path) -> None:
    model, out = load(make_model()), tmp_path / "out"
    quantize(model, "int8", out=out)
    with pytest.raises(OutputError, match="exists; give --force"):
        quantize(model, "int4-g32", out=out)
    assert str(quantize(model, "int4-g32", out=out, force=True).scheme) == "int4-g32"
    work = tmp_path / "work"
    work.mkdir()
    (work / "thesis.txt").write_text("years of it")
    with pytest.raises(OutputError, match="not a tapeout output"):
        quantize(model, "int8", out=work, force=True)
    assert (work / "thesis.txt").exists()
