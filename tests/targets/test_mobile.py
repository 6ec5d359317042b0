"""The mobile target: the same files as cpu's, with a phone's defaults, and what is too large refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tapeout import target
from tapeout.build import export
from tapeout.errors import TapeoutError
from tapeout.exporters import onnx
from tapeout.models import load
from tapeout.quantize import quantize
from tapeout.recipe import Recipe
from tapeout.targets import default_scheme
from tapeout.targets.cpu import Cpu
from tapeout.targets.mobile import Mobile

pytest.importorskip("llama_cpp")
MakeModel = Callable[..., Path]
LOOSE: dict[str, Any] = {"tokens": 40, "limits": {"kl": 1e3, "top1": 0.0, "perplexity": 1e3}}


def test_a_phones_defaults() -> None:
    mobile = Mobile()
    assert (mobile.threads, mobile.context, mobile.max_memory) == (4, 4096, "4G")
    assert (default_scheme(mobile), default_scheme(Cpu), default_scheme(Cpu())) == (
        "int4-g32",
        "int8",
        "int8",
    )
    assert mobile.needs == "llama.cpp, or llama-cpp-python 0.3.36 or newer, for arm64"


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_a_package_for_phones(make_model: MakeModel, tmp_path: Path, kind: Any) -> None:
    """Four bits unless said otherwise, the context bounded in the file, and it says where it was run."""
    directory = make_model(max_position_embeddings=8192, head_dim=16)
    package, report = export(Mobile(format=kind, threads=1), directory, tmp_path / "out", Recipe.of(LOOSE))
    assert report.passed
    manifest = package.manifest
    assert (manifest["scheme"], manifest["artifact"]["context"]) == ("int4-g32", 4096)
    cell = 4 if kind == "onnx" else 2
    assert manifest["needs"]["key_value_cache_bytes"] == 2 * 2 * 4 * 16 * 4096 * cell
    assert any("not on a phone" in note for note in report.notes)
    card = (tmp_path / "out" / "README.md").read_text()
    if kind == "onnx":
        assert "GatherBlockQuantized, GroupQueryAttention, MatMulNBits" in card
        assert "onnxruntime-android" in card
        genai = json.loads((tmp_path / "out" / "artifact" / "genai_config.json").read_text())
        assert genai["model"]["context_length"] == 4096
    else:
        assert f"llama-cli -m artifact/{manifest['artifact']['files'][0]} -c 4096 -t 1" in card
        assert "llama.xcframework" in card


def test_a_scheme_that_is_given_wins(make_model: MakeModel, tmp_path: Path) -> None:
    recipe = Recipe.of({**LOOSE, "scheme": "int3-g64"})
    package, _ = export(Mobile(threads=1), make_model(), tmp_path / "out", recipe)
    assert package.manifest["scheme"] == "int3-g64"


def test_the_file_has_positions_for_the_context_alone(make_model: MakeModel, tmp_path: Path) -> None:
    """Cosine and sine of 4096 positions instead of 65,536: 8 pairs, 4 bytes each."""
    quant = quantize(load(make_model(max_position_embeddings=65536, head_dim=16)), "int4-g32")
    small = Mobile(format="onnx").export(quant, tmp_path / "mobile")
    whole = Cpu(format="onnx").export(quant, tmp_path / "cpu")
    sizes = [(each.directory / "model.onnx.data").stat().st_size for each in (whole, small)]
    assert sizes[0] - sizes[1] == pytest.approx(2 * 8 * 4 * (65536 - 4096), abs=2 * 4096)
    assert len(list(onnx.read_codes(small, quant))) == len(quant)


def test_what_is_too_large_for_a_phone_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    quant = quantize(load(make_model(max_position_embeddings=65536, head_dim=16)), "int4-g32")
    mobile = Mobile(max_memory="25M", context=65536)
    needed = mobile.memory(quant.model.decoder, 65536)
    assert needed.cache == 2 * 2 * 4 * 16 * 65536 * 2
    with pytest.raises(
        TapeoutError,
        match=r"needs 0\.10 GB at 65536 tokens, more than the 25M .* What fits: --context 8192\.",
    ):
        mobile.export(quant, tmp_path / "out")
    with pytest.raises(
        TapeoutError, match=r"What fits: .*fewer bits fit, or a smaller model|weights alone take"
    ):
        Mobile(max_memory="1M").export(quant, tmp_path / "again")
    with pytest.raises(TapeoutError, match="'4' is not a size; write 500M or 2G"):
        target("mobile", max_memory="4")


@pytest.mark.parametrize("field", ["threads", "context", "prefill_chunk"])
def test_numbers_that_are_none(field: str) -> None:
    for name in ("cpu", "mobile"):
        with pytest.raises(TapeoutError, match=f"--{field.replace('_', '-')} is 0; what fits: 1 or more"):
            target(name, **{field: 0})
