"""What cards say of servers: flags that follow from the artifact."""

from __future__ import annotations

import configparser
import json
import re
from pathlib import Path

import pytest

from tapeout.exporters import Artifact
from tapeout.targets import serving


def _artifact(directory: Path, size: int, heads: int) -> Artifact:
    """Files of that size together, which take no room."""
    (directory / "config.json").write_text(json.dumps({"num_attention_heads": heads}))
    with (directory / "model.safetensors").open("wb") as file:
        file.truncate(size)
    return Artifact("modelopt", directory, ("config.json", "model.safetensors"), 4096, 1)


@pytest.mark.parametrize(
    ("size", "heads", "gpus"),
    [
        (4 * 10**9, 32, 1),
        (26 * 10**9, 32, 2),
        (40 * 10**9, 32, 4),
        (40 * 10**9, 6, 2),  # 4 does not divide six heads: the most that does
        (90 * 10**9, 64, 8),
    ],
)
def test_as_many_gpus_as_hold_it_and_divide_the_heads(
    size: int, heads: int, gpus: int, tmp_path: Path
) -> None:
    how = serving.Served.of(_artifact(tmp_path, size, heads))
    assert how.gpus == gpus
    assert how.gpu_gb == pytest.approx(size / gpus / 1e9, rel=1e-3)
    flags = {"TensorRT-LLM": "--tp_size", "vLLM": "--tensor-parallel-size", "SGLang": "--tp-size"}
    for name in serving.SERVERS:
        said = serving.server(name, how)
        assert (f"{flags[name]} {gpus}" in said) == (gpus > 1)
        assert "4096" in said


def test_float8_keys_and_values_are_asked_for_where_no_file_says_so(tmp_path: Path) -> None:
    artifact = _artifact(tmp_path, 10**9, 32)
    plain, float8 = serving.Served.of(artifact), serving.Served.of(artifact, "kv-fp8")
    assert "kv-cache-dtype" not in serving.server("vLLM", plain)
    assert "--kv-cache-dtype fp8 " in serving.server("vLLM", float8)
    assert "--kv-cache-dtype fp8_e4m3" in serving.server("SGLang", float8)
    assert "kv_cache_dtype" not in serving.server("TensorRT-LLM", float8), "it reads kv_cache_quant_algo"


def test_a_unit_is_one_that_systemd_parses(tmp_path: Path) -> None:
    how = serving.Served.of(_artifact(tmp_path, 26 * 10**9, 32))
    text = serving.unit(how, "TensorRT-LLM").split("```ini\n")[1].removesuffix("\n```")
    parser = configparser.ConfigParser()
    parser.optionxform = str  # type: ignore[assignment]
    parser.read_string(text)
    assert parser["Service"]["ExecStart"].startswith(
        "/usr/bin/env trtllm-serve /srv/model/artifact --max_seq_len 4096"
    )
    assert parser["Install"]["WantedBy"] == "multi-user.target"


def test_containers_listen_to_the_port_that_is_published(tmp_path: Path) -> None:
    how = serving.Served.of(_artifact(tmp_path, 10**9, 32))
    for name in serving.SERVERS:
        said = serving.container(how, name)
        port = re.search(r"-p (\d+):\1 ", said)
        assert port
        assert f"localhost:{port[1]}" in serving.server(name, how)
        assert ("--host 0.0.0.0" in said) == (name != "vLLM")
        assert "--gpus all" in said
    amd = serving.container(how, "vLLM", rocm=True)
    assert "/dev/kfd" in amd
    assert "vllm serve /model/artifact" in amd


def test_transformers_is_told_the_most_of_each_gpu(tmp_path: Path) -> None:
    how = serving.Served.of(_artifact(tmp_path, 26 * 10**9, 32))
    said = serving.transformers(how, "transformers accelerate")
    memory = re.search(r"^memory = (\{.*?\})", said, re.MULTILINE)
    assert memory
    most = json.loads(memory[1])
    assert list(most) == ["cuda:0", "cuda:1"]
    assert all(13 < float(each.removesuffix("GiB")) < 24 for each in most.values())
    code = said.split("```python\n")[1].removesuffix("\n```")
    compile(code, "card", "exec")
