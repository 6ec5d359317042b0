"""Scenarios on real runtimes: the embedded model on llama.cpp and on ONNX Runtime, by the command line and in Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from commands import tapeout

from tapeout.bench import bench
from tapeout.build import export, target
from tapeout.errors import MemoryShort, TapeoutError
from tapeout.pack import Package
from tapeout.recipe import Recipe
from tapeout.replay import revalidate
from tapeout.validate.measuring import SCENARIOS, Asked
from tapeout.validate.page import page
from tapeout.validate.report import Report
from tapeout.validate.speed_page import percentiles

Once = Callable[[str, Callable[[Path], Any]], tuple[Path, Any]]

TOKENS = Recipe.of({"scheme": "int4-g32", "tokens": 100})


@pytest.fixture(scope="module")
def work(once: Once, here: Any) -> Path:
    """Packages ``gguf``, ``onnx`` and ``null`` of the embedded model; speed and memory were demanded of the first."""
    pytest.importorskip("llama_cpp")
    pytest.importorskip("onnxruntime")

    def make(work: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TAPEOUT_CACHE", str(work / "cache"))
            patch.setattr("tapeout.validate.worker.borrow", here)
            patch.setattr("tapeout.validate.evidence.borrow", here)
            demanding = TOKENS.demanding(min_tokens_per_s=1.0, max_memory="2GB")
            export(target("cpu", threads=1), "arithmetic", work / "gguf", demanding)
            export(target("cpu", threads=1, format="onnx"), "arithmetic", work / "onnx", TOKENS)
            export(target("apple"), "arithmetic", work / "apple", TOKENS.demanding(max_ttft_ms=5.0))

    return once("bench", make)[0]


def of(report: Report) -> dict[str, tuple[str, float | None]]:
    return {
        gate.name: (gate.status, gate.limit) for gate in report.gates if gate.name.startswith("throughput")
    }


@pytest.mark.slow
def test_every_scenario_on_llama_cpp(work: Path, tmp_path: Path) -> None:
    flags = [word for name in SCENARIOS for word in ("--scenario", name)]
    few = ("--percentile", "50", "--percentile", "90", "--samples", "40", "--load", "0.5", "--load", "0.8")
    done = tapeout(
        "bench",
        work / "gguf",
        *flags,
        *few,
        "--max-ttft-ms",
        "60000",
        "--report",
        tmp_path,
        "--json",
        status=0,
    )
    figures = json.loads(done.stdout)
    stream, offline, server = (figures["scenarios"][name] for name in SCENARIOS[:3])
    assert stream["samples"] >= 40
    assert 0 < stream["first_token"]["p50"]["value"] <= stream["first_token"]["p90"]["value"]
    assert stream["request"]["p50"]["value"] > stream["first_token"]["p50"]["value"]
    assert offline["sequences"] == 8
    assert [row["load"] for row in figures["server_sweep"]] == [0.5, 0.8]
    assert server == figures["server_sweep"][1]  # the nearest to 0.7
    assert server["arrivals_per_s"] == pytest.approx(0.8 * offline["requests_per_s"])
    assert figures["server_limit"] == {
        "max_ttft_ms": 60000, "percentile": "p90", "load": 0.8, "arrivals_per_s": server["arrivals_per_s"]
    }  # fmt: skip
    assert [row["context"] for row in figures["context_sweep"]] == [128, 224]
    # Of each of three layers a window of 20 and a chunk of 512, as far as the context goes, in half floats.
    assert [row["cache_bytes"] for row in figures["context_sweep"]] == [3 * 256 * 64 * 2] * 2
    assert figures["thread_sweep"][0]["threads"] == 1
    assert {each["what"] for each in figures["skipped"]} == {
        f"context-sweep/{length}" for length in (512, 2048, 8192, 32768)
    }
    assert [point["phase"] for point in figures["roofline"]["points"]] == ["prefill", "decode"] * 2
    assert {gate["name"]: gate["status"] for gate in figures["gates"]} == {
        "throughput/tokens-per-s": "passed",
        "throughput/first-token": "passed",
        "throughput/memory": "passed",
    }
    assert "p90 of the time to the first token is at most 60000 ms" in " ".join(done.stderr.split())
    for title in ("scenario", "load", "threads", "roofline", "skipped", "gate"):
        assert f"┃ {title} " in done.stderr
    report = Report.read(tmp_path / "report.json")
    assert report.throughput == {key: value for key, value in figures.items() if key != "gates"}
    schema = json.loads((files("tapeout.validate") / "data" / "report.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(report.to_json())
    text = (tmp_path / "report.html").read_text()
    assert text == page(report)
    for words in (
        "single-stream: percentiles",
        "server: percentiles",
        "server: time to the first token by load",
        "Roofline",
        "Keys and values by context",
        *(["Decoding by threads"] if len(figures["thread_sweep"]) > 1 else []),
    ):
        assert words in text
    assert percentiles(stream["token"]).startswith("p50 ")


@pytest.mark.slow
def test_a_graph_with_a_window_answers_one_after_another(work: Path) -> None:
    asked = Asked(("offline", "server"), percentiles=(50,))
    found = bench(work / "onnx", asked=asked)
    assert found.passed
    assert found.gates == []
    assert [each["what"] for each in found.figures["skipped"]] == ["offline/batches", "server"]
    assert all("a sliding window" in each["reason"] for each in found.figures["skipped"])
    assert found.figures["scenarios"]["offline"]["sequences"] == 1


def test_limits_fail_and_say_so(work: Path) -> None:
    done = tapeout("bench", work / "gguf", "--min-tokens-per-s", "1e12", "--max-memory", "1kB", status=1)
    assert done.stderr.count("failed") == 2
    report = revalidate(work / "gguf", speed={"max_ttft_ms": 1e-6})
    assert of(report) == {
        "throughput/tokens-per-s": ("passed", 1.0),
        "throughput/first-token": ("failed", 1e-6),
        "throughput/memory": ("passed", 2e9),
    }
    assert not report.passed
    assert of(Report.read(work / "gguf" / "report.json")) == {
        "throughput/tokens-per-s": ("passed", 1.0),
        "throughput/memory": ("passed", 2e9),
    }
    assert of(Report.read(work / "onnx" / "report.json")) == {}
    kept = [
        json.loads((work / name / "tapeout.json").read_text())["recipe"]["limits"]
        for name in ("gguf", "onnx")
    ]
    assert [set(each) - {"kl", "top1", "perplexity", "task"} for each in kept] == [
        {"min_tokens_per_s", "max_memory"},
        set(),
    ]


def test_an_emulated_device_has_no_speed(work: Path) -> None:
    told = {gate.name: gate for gate in Report.read(work / "apple" / "report.json").gates}
    gate = told["throughput/first-token"]
    assert (gate.status, gate.limit) == ("skipped", 5.0)
    assert "whose speed says nothing of a device" in gate.reason
    report = revalidate(work / "apple", required=frozenset({"throughput"}))
    assert of(report) == {"throughput/first-token": ("failed", 5.0)}


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--samples", "100"), "p99 needs 368"),
        (
            ("--scenario", "multi-stream"),
            "'multi-stream' is not a scenario. What fits: single-stream, offline",
        ),
        (("--percentile", "100"), "p100 is not a percentile"),
        (("--scenario", "single-stream", "--seconds", "1e-6"), "seconds are too few for single-stream"),
        (("--seconds", "-1"), "-1.0 seconds are no time"),
        (("--max-memory", "lots"), "'lots' is not a size of memory"),
        (("--max-ttft-ms", "0"), "max_ttft_ms is 0"),
    ],
)
def test_what_cannot_be_measured(work: Path, flags: tuple[str, ...], told: str) -> None:
    done = tapeout("bench", work / "gguf", *flags, status=2)
    assert told in " ".join(done.stderr.split())


def test_a_model_that_the_memory_has_no_room_for_is_not_loaded(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in (
        ("proc/self/cgroup", "0::/"),
        ("sys/fs/cgroup/memory.max", str(10**9)),
        ("sys/fs/cgroup/memory.current", str(10**9 - 220_000_000)),
        ("sys/fs/cgroup/memory.stat", "anon 1"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    package = Package.open(work / "gguf")
    needs = package.manifest["needs"] | {"memory_bytes": 50 * 10**9, "key_value_cache_bytes": 256 * 10**8}
    grown = Package(package.directory, package.manifest | {"needs": needs})
    monkeypatch.setattr("tapeout.bench.Package.open", lambda directory: grown)
    monkeypatch.setattr("tapeout.bench.session_of", None)  # nothing is opened
    with pytest.raises(
        MemoryShort,
        match=r"needs 26 GB for weights, work and a context of 16 tokens \(50 GB at 256\); 0\.22 GB of memory are at hand. Nothing was loaded",
    ) as told:
        bench(work / "gguf", asked=Asked(root=tmp_path))
    assert told.value.status == 3


def test_scenarios_are_of_models_that_generate(
    tmp_path: Path, here: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr("tapeout.validate.worker.borrow", here)
    monkeypatch.setattr("tapeout.validate.evidence.borrow", here)
    export(target("cpu", threads=1, format="onnx"), "topics_v1", tmp_path / "out", Recipe.of({"tokens": 200}))
    with pytest.raises(TapeoutError, match="holds an encoder: the scenarios are of models that generate"):
        bench(tmp_path / "out", asked=Asked(("server",)))
    assert bench(tmp_path / "out", (16,), speed={"min_tokens_per_s": 1.0}).passed


def test_a_mobile_package_has_a_max_memory_of_its_own(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    told = tapeout(
        "export", "mobile", "arithmetic", "--max-memory", "1M", "--out", tmp_path / "out", status=2
    )
    assert "1M of --max-memory" in told.stderr
    assert "--max-ttft-ms" in tapeout("export", "mobile", "--help", status=0).stdout
