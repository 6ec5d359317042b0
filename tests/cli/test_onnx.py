"""The cpu target's other format, as a user starts it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from commands import tapeout

from tapeout.generated import write_model

pytest.importorskip("onnxruntime")
RECIPE = 'scheme = "int4-g32"\ntokens = 64\nlimits = {kl = 1e3, top1 = 0.0, perplexity = 1e3}\n'


def test_a_package_of_onnx(tmp_path: Path) -> None:
    """It says how it was made, so that every verb finds its runtime; a byte changed in the weights is found."""
    model, out = write_model(tmp_path / "model", config={"head_dim": 16}), tmp_path / "out"
    (tmp_path / "recipe.toml").write_text(RECIPE)
    options = ("--format", "onnx", "--threads", "1", "--recipe", tmp_path / "recipe.toml", "--out", out)
    report: dict[str, Any] = json.loads(tapeout("export", "cpu", model, *options, "--json").stdout)
    assert report["passed"]
    assert report["throughput"]["runtime"].startswith("onnxruntime ")
    assert sorted(path.name for path in (out / "artifact").glob("model*")) == [
        "model.onnx",
        "model.onnx.data",
    ]
    manifest = json.loads((out / "tapeout.json").read_text())
    assert manifest["target"] == {"name": "cpu", "options": {"format": "onnx", "threads": 1}}
    assert manifest["needs"]["runtime"] == "onnxruntime 1.32 or newer"
    # Float32 keys and values of two layers of four heads, 256 tokens.
    assert manifest["needs"]["key_value_cache_bytes"] == 2 * 2 * 4 * 16 * 4 * 256
    assert "onnxruntime_genai" in (out / "README.md").read_text()
    assert (
        json.loads(tapeout("inspect", out / "artifact" / "model.onnx", "--json").stdout)["opsets"]["ai.onnx"]
        == 23
    )
    assert "text" in json.loads(
        tapeout("run", out, "--prompt", "ab", "--max-new-tokens", "3", "--json").stdout
    )
    data = out / "artifact" / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-1] + b"\x55")
    assert "model.onnx.data differs" in tapeout("verify", out, status=2).stderr


def test_flags_of_the_other_format_are_refused(tmp_path: Path) -> None:
    done = tapeout(
        "export",
        "cpu",
        "count",
        "--format",
        "onnx",
        "--max-shard-size",
        "2M",
        "--out",
        tmp_path / "out",
        status=2,
    )
    assert "--max-shard-size, --sliding-window and --kv-cache are of the format gguf" in done.stderr
