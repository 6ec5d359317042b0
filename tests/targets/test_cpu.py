from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tapeout import target
from tapeout.errors import TapeoutError
from tapeout.exporters import Artifact
from tapeout.targets.cpu import Cpu


def test_a_cache_that_llama_cpp_lacks_is_named() -> None:
    with pytest.raises(TapeoutError, match="'kv-int3' is not a cache of target cpu; did you mean 'kv-int8'"):
        target("cpu", kv_cache="kv-int3")


def test_codes_need_heads_of_whole_blocks() -> None:
    every = ("kv-f16", "kv-int8", "kv-int4")
    assert Cpu.kv_caches() == Cpu.kv_caches(32) == Cpu.kv_caches(96) == every
    assert Cpu.kv_caches(80) == Cpu.kv_caches(16) == ("kv-f16",)


@pytest.mark.parametrize(("kind", "flags"), [("kv-int8", "q8_0"), ("kv-int4", "q4_0")])
def test_what_is_deployed_and_what_the_card_says_use_the_cache(tmp_path: Path, kind: Any, flags: str) -> None:
    artifact = Artifact("gguf", tmp_path, ("m.gguf",), 128, 0, {}, ())
    assert Cpu(kv_cache=kind).session(artifact).arguments["kv_cache"] == kind
    assert f"-m artifact/m.gguf -c 128 -fa on -ctk {flags} -ctv {flags}" in Cpu(kv_cache=kind).card(artifact)
    assert "-ctk" not in Cpu().card(artifact)
