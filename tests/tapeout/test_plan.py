"""What a plan says, against files that are written and tables that are published."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from thinned import thinned

from tapeout import targets
from tapeout.cli import app
from tapeout.devices import chosen, table
from tapeout.errors import RecipeError, TapeoutError
from tapeout.generated import LLAMA_7B, MIXTRAL_8X7B, write_config, write_model
from tapeout.models import load
from tapeout.plan import Planned, Row, plan
from tapeout.plan_report import size
from tapeout.quantize import quantize
from tapeout.quantize.hollow import quantized, store_bytes

DOCS = Path(__file__).resolve().parents[2] / "docs" / "plan.md"
WAYS = [way for name in targets.names() for way in targets.variants(name)]
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("llama", {"hidden_size": 256, "intermediate_size": 512}),
    "tied-window": (
        "mistral",
        {"hidden_size": 256, "intermediate_size": 512, "sliding_window": 24, "tie_word_embeddings": True},
    ),
    "experts": ("mixtral", {"hidden_size": 256, "intermediate_size": 512, "num_local_experts": 4}),
}


@pytest.mark.parametrize("shape", thinned(SHAPES))
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.slow if "iree" in way else ()) for way in WAYS]
)
def test_sizes_are_those_of_the_files(way: str, shape: str, tmp_path: Path) -> None:
    """Every file is as long as planned, to the byte, but for digests in them, which are as long as any."""
    family, fields = SHAPES[shape]
    model = load(write_model(tmp_path / "model", family, fields))
    target = targets.variants(way.split()[0])[way]
    scheme = targets.default_scheme(target)
    hollow = quantized(load(tmp_path / "model", weights=False), scheme)
    (tmp_path / "planned").mkdir()
    (tmp_path / "made").mkdir()
    quant = quantize(model, scheme, out=tmp_path / "codes")
    try:
        made = target.export(quant, tmp_path / "made")
    except TapeoutError as error:
        with pytest.raises(type(error)):
            target.export(hollow, tmp_path / "planned")
        return
    planned = target.export(hollow, tmp_path / "planned")
    lengths = [
        {name: (each.directory / name).stat().st_size for name in each.files} for each in (planned, made)
    ]
    assert lengths[0] == lengths[1]
    assert planned.bytes_per_token == made.bytes_per_token
    assert planned.containers == made.containers
    written = sum(path.stat().st_size for path in (tmp_path / "codes" / "tensors").iterdir())
    assert store_bytes(hollow) == written


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["none", "int4-g64-asym", "nf4", "q4_k", "fp8", "w8a8"])
def test_sizes_of_other_schemes(scheme: str, tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "model", "llama", SHAPES["dense"][1], dtype="F16"))
    quant = quantize(model, scheme, out=tmp_path / "codes")
    told = 0
    for way in WAYS:
        if way == "null":
            continue
        (tmp_path / way).mkdir()
        target = targets.variants(way.split()[0])[way]
        row = next(
            row for row in plan(model, [], [way.split()[0]], [scheme], context=256).rows if row.target == way
        )
        if row.cannot and "cannot lay files out" in row.cannot:
            assert way == "rocm --format iree"  # its module is what a compiler makes of it
            continue
        if row.cannot:
            with pytest.raises(TapeoutError):
                targets.check_carries(target, set(quant.schemes.values()))
                target.export(quant, tmp_path / way)
            continue
        made = targets.at(target, 256).export(quant, tmp_path / way)
        assert row.artifact_bytes == sum((tmp_path / way / name).stat().st_size for name in made.files), way
        told += 1
    assert told >= 2


def test_null_says_that_it_cannot_tell(tmp_path: Path) -> None:
    config = write_config(tmp_path, "llama", LLAMA_7B)
    (row,) = plan(config, [], ["null"]).rows
    assert row.cannot
    assert "without weights" in row.cannot


SERVER = """
[gpu-24]
targets = ["rocm"]
memory_gb = 24
usable = 0.9
gb_per_s = 960
reaches = 0.5
[gpu-2x24]
targets = ["rocm"]
memory_gb = 24
usable = 0.9
gb_per_s = 960
cards = 2
scaling = 0.8
reaches = 0.5
[gpu-4x24]
targets = ["rocm"]
memory_gb = 24
usable = 0.9
gb_per_s = 960
cards = 4
scaling = 0.7
reaches = 0.5
[server]
targets = ["cpu"]
memory_gb = 64
gb_per_s = 34.4
reaches = 0.7
"""
_GPUS = ("gpu-24", "gpu-2x24", "gpu-4x24")


def _planned(tmp_path: Path, name: str, dtype: str, scheme: str) -> Planned:
    family, fields = {"7B": ("llama", LLAMA_7B), "8x7B": ("mixtral", MIXTRAL_8X7B)}[name]
    own = tmp_path / "devices.toml"
    own.write_text(SERVER)
    devices = chosen(table(own), [*_GPUS, "server"])
    model = write_config(tmp_path / f"{name}-{dtype}", family, fields, dtype=dtype)
    return plan(model, devices, ["rocm", "cpu"], [scheme], context=512)


_TABLE = (
    ("7B", "F32", "none", "float32"),
    ("7B", "BF16", "none", "bfloat16"),
    ("7B", "BF16", "int4-g32", "int4-g32"),
    ("8x7B", "BF16", "none", "bfloat16"),
    ("8x7B", "BF16", "int4-g32", "int4-g32"),
)


@pytest.mark.slow
def test_fit_table(tmp_path: Path) -> None:
    """Dense 7B and 8x7B on 24, 48 and 96 GB and on a CPU, from their true shapes; docs/plan.md has the same."""
    lines, fits, speed = [], {}, {}
    for name, dtype, scheme, called in _TABLE:
        rows = {row.target: row for row in _planned(tmp_path, name, dtype, scheme).rows}
        gpus = {fit.device: fit for fit in rows["rocm"].fits}
        (server,) = rows["cpu"].fits
        fits[name, called] = {device: fit.fits for device, fit in gpus.items()}
        speed[name, called] = server.tokens_per_s
        cells = ["yes" if fit.fits else f"no: {fit.instead}" for fit in gpus.values()]
        cpu = "does not fit" if server.tokens_per_s is None else f"≈{server.tokens_per_s[0]:.1f} tokens/s"
        lines.append(
            f"| {name} | {called} | {size(rows['rocm'].artifact_bytes)} | {' | '.join(cells)} | {cpu} |"
        )
    assert fits["7B", "float32"] == dict(zip(_GPUS, (False, True, True), strict=True))
    assert all(fits["7B", "int4-g32"].values())
    assert fits["8x7B", "int4-g32"] == dict(zip(_GPUS, (False, True, True), strict=True))
    offloaded = next(line for line in lines if line.startswith("| 8x7B | int4-g32"))
    assert "experts offloaded" in offloaded
    assert "sharded over 2 cards" in offloaded
    dense, experts = speed["7B", "int4-g32"], speed["8x7B", "int4-g32"]
    assert dense
    assert 5 <= dense[0] <= 10
    assert experts
    assert experts[0] < dense[0]
    text = DOCS.read_text(encoding="utf-8")
    shown = re.search(r"<!-- fit -->\n(.*?)<!-- /fit -->", text, re.DOTALL)
    assert shown
    assert shown[1].splitlines()[2:] == lines, "\n".join(lines)


def _row(found: Planned, target: str) -> Row:
    return next(row for row in found.rows if row.target == target)


@pytest.mark.slow
def test_memory_grows_with_context_and_batch(tmp_path: Path) -> None:
    """Keys and values by the target's own memory(), once for each sequence; a batch reads weights once."""
    config = write_config(tmp_path, "llama", LLAMA_7B)
    own = tmp_path / "devices.toml"
    own.write_text(SERVER)
    devices = chosen(table(own), ["server", "gpu-24"])
    one, long, many = (
        plan(config, devices, ["rocm", "cpu"], ["int4-g32"], context=context, batch=batch)
        for context, batch in ((512, 1), (2048, 1), (512, 4))
    )
    for target in ("rocm", "cpu"):
        a, b, c = (_row(each, target).fits[0] for each in (one, long, many))
        kind = targets.at(targets.get(target)(), 512)
        config_ = load(config, weights=False).decoder
        assert a.cache == kind.memory(config_, 512).cache
        assert b.cache == 4 * a.cache == c.cache
        assert a.tokens_per_s
        assert c.tokens_per_s
        assert b.tokens_per_s
        assert a.tokens_per_s[0] > b.tokens_per_s[0]
        assert a.tokens_per_s[0] < c.tokens_per_s[0] < 4 * a.tokens_per_s[0]


def test_missing_and_gates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "model", "llama", {})
    (row,) = [r for r in plan(model, [], ["rocm"]).rows if r.target == "rocm"]
    assert row.missing is None
    assert {name for name, why in row.gates if why is None} == {
        "integrity", "codes", "lowering", "decode", "quality", "tokenizer",
    }  # fmt: skip
    kind = targets.get("rocm")
    monkeypatch.setattr(kind, "missing", lambda self: "X is not installed: pip install X.")
    (row,) = [r for r in plan(model, [], ["rocm"]).rows if r.target == "rocm"]
    assert row.missing == "X is not installed: pip install X."
    assert dict(row.gates)["codes"] == row.missing
    assert dict(row.gates)["integrity"] is None


def test_device_tables(tmp_path: Path) -> None:
    ours = table()
    assert {"cpu", "phone", "m4", "h100", "mi300x", "rtx4090", "2x-rtx4090", "4x-rtx4090"} <= ours.keys()
    assert ours["m4-max"].bandwidth == 546e9
    own = tmp_path / "own.toml"
    for text, said in (
        ("[cpu]\nmemry_gb = 8", "memory_gb"),
        ("[box]\ntargets = ['cpu']", "reaches"),
        ("[box]\nreaches = 0.5", "targets"),
        ("[cpu]\nreaches = 1.5", "fraction"),
        ("[m4]\nchip = 'M4 Maxi'", "M4 Max"),
        ("[cpu]\nmemory_gb = -1", "above 0"),
        ("[cpu]\nattends = 3", "by format"),
        ("memory_gb = 1", "outside"),
        ("[cpu", "cannot be read"),
    ):
        own.write_text(text)
        with pytest.raises(RecipeError, match=said):
            table(own)
    own.write_text("[cpu]\nmemory_gb = 8\ngb_per_s = 10")
    found = table(own)["cpu"]
    assert (found.memory_gb, found.bandwidth, found.targets) == (8, 10e9, ("cpu",))
    with pytest.raises(RecipeError, match="rtx4090"):
        chosen(ours, ["rtx409"])


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = str(write_config(tmp_path / "seven", "llama", LLAMA_7B))
    own = tmp_path / "devices.toml"
    own.write_text(SERVER)
    words = [
        "plan",
        config,
        "--devices",
        str(own),
        "--device",
        "server",
        "--target",
        "cpu",
        "--scheme",
        "int4-g32",
    ]
    assert app([*words, "--json"], result_action="return_value") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rows"][0]["artifact_bytes"] > 3.9e9
    assert told["rows"][0]["fits"][0]["fits"] is True
    assert app(words, result_action="return_value") == 0
    shown = capsys.readouterr().err
    assert "int4-g32" in shown
    assert "estimate" in shown
    with pytest.raises(TapeoutError, match="4096"):
        plan(config, [], ["cpu"], context=1 << 20)
