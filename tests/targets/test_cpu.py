from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tapeout import target, targets
from tapeout.errors import TapeoutError
from tapeout.exporters import Artifact
from tapeout.models import load
from tapeout.quantize import quantize
from tapeout.targets import check_cache
from tapeout.targets.cpu import Cpu

MakeModel = Callable[..., Path]


def test_a_cache_that_llama_cpp_lacks_is_named() -> None:
    with pytest.raises(TapeoutError, match="'kv-int3' is not a cache of target cpu; did you mean 'kv-int8'"):
        target("cpu", kv_cache="kv-int3")


def test_codes_need_heads_of_whole_blocks() -> None:
    cpu, every = Cpu(), ("kv-f16", "kv-int8", "kv-int4")
    assert cpu.kv_caches() == cpu.kv_caches(32) == cpu.kv_caches(96) == every
    assert cpu.kv_caches(80) == cpu.kv_caches(16) == ("kv-f16",)


def test_the_cache_is_the_formats_own_where_none_is_chosen() -> None:
    assert (Cpu().cache, Cpu(kv_cache="kv-int4").cache, Cpu(format="onnx").cache) == (
        "kv-f16",
        "kv-int4",
        "kv-f32",
    )
    assert Cpu(format="onnx").kv_caches(80) == ("kv-f32",)
    for kind in ("kv-f16", "kv-int8"):
        with pytest.raises(TapeoutError, match="--kv-cache are of the format gguf"):
            target("cpu", format="onnx", kv_cache=kind)


@pytest.mark.parametrize(("kind", "flags"), [("kv-int8", "q8_0"), ("kv-int4", "q4_0")])
def test_what_is_deployed_and_what_the_card_says_use_the_cache(tmp_path: Path, kind: Any, flags: str) -> None:
    artifact = Artifact("gguf", tmp_path, ("m.gguf",), 128, 0, {}, ())
    assert Cpu(kv_cache=kind).session(artifact).arguments["kv_cache"] == kind
    assert f"-m artifact/m.gguf -c 128 -fa on -ctk {flags} -ctv {flags}" in Cpu(kv_cache=kind).card(artifact)
    assert "-ctk" not in Cpu().card(artifact)


def test_a_cache_of_codes_is_refused_for_latent_attention(make_model: MakeModel) -> None:
    model = load(make_model("deepseek_v2"))
    check_cache(Cpu(), model)
    with pytest.raises(
        TapeoutError, match=r"as kv-int8: what that costs latent attention.*What fits: kv-f16"
    ):
        check_cache(Cpu(kv_cache="kv-int8"), model)


@pytest.mark.parametrize("format", ["gguf", "onnx"])
def test_sessions_read_weights_from_huge_pages(tmp_path: Path, monkeypatch: Any, format: Any) -> None:  # noqa: A002
    artifact = Artifact(format, tmp_path, ("m",), 128, 0, {}, ())
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    asked = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    assert Cpu(format=format).session(artifact).environment == asked
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")  # a user's own
    assert Cpu(format=format).session(artifact).environment == {}


@pytest.mark.parametrize(
    ("scheme", "bits", "read"),
    [("int4-g32", 5, 6), ("int4-g128", 4.25, 4.5), ("int8", 8.25, 8.5), ("nf4", 4.5, 68.5), ("none", 16, 32)],
)
def test_onnxruntime_reads_more_than_the_file_has(
    make_model: MakeModel, tmp_path: Path, scheme: str, bits: float, read: float
) -> None:
    """A float32 sum beside each scale, of a block of 32 or 128, and NF4's float32 twice; llama.cpp reads what the file has."""
    model = load(make_model("llama", hidden_size=256, intermediate_size=512))
    quant = quantize(model, scheme, overrides={"lm_head": scheme}, out=tmp_path / "store")
    assert targets.read(Cpu(format="onnx"), quant, 1000.0) == pytest.approx(1000 * read / bits)
    assert targets.read(Cpu(), quant, 1000.0) == 1000
