"""Every verb on its happy path, as a user starts it: what is printed where, and the exit status."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import pty
import re
import shutil
import struct
import subprocess
import termios
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast
from xml.etree import ElementTree

import pytest
from commands import PROGRAM, Done, process, tapeout

from tapeout.generated import write_model

MakeModel = Callable[..., Path]
Once = Callable[[str, Callable[[Path], Any]], tuple[Path, Any]]
VERBS = (
    "quantize",
    "validate",
    "bench",
    "run",
    "compare",
    "diff",
    "inspect",
    "verify",
    "sign",
    "targets",
    "matrix",
    "export null",
    "export cpu",
)

# The model is random: what its quantization loses says nothing.
RECIPE = """
scheme = "int8"
tokens = 64
limits = {kl = 1e3, top1 = 0.0, perplexity = 1e3}
"""


def document(done: Done, status: int = 0) -> Any:
    """The one JSON document that stands on stdout, of a run that ended with ``status``."""
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout)


def told(done: Done) -> str:
    """What a run without ``--json`` told its user, with the table's lines and breaks taken out: all of it on stderr."""
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    return " ".join(re.sub(r"[│┃━┏┓┡┩┳╇└┘┴─]", " ", done.stderr).split())


@dataclass(frozen=True)
class Exported:
    """A package that ``export`` made, what it printed, and what it was made from."""

    package: Path
    model: Path
    recipe: Path
    done: Done
    environment: dict[str, str]


@pytest.fixture(scope="module")
def null(once: Once) -> Exported:
    def make(work: Path) -> Exported:
        model, recipe = write_model(work / "tiny", dtype="F32"), work / "loose.toml"
        recipe.write_text(RECIPE)
        environment = {"TAPEOUT_CACHE": str(work / "cache")}
        done = tapeout("export", "null", "tiny", "--recipe", recipe, "--json", cwd=work, **environment)
        return Exported(work / "tiny-int8-null", model, recipe, done, environment)

    return cast(Exported, once("null", make)[1])


@pytest.fixture(scope="module")
def cpu(once: Once) -> Exported:
    def make(work: Path) -> Exported:
        environment = {"TAPEOUT_CACHE": str(work / "cache")}
        arguments = ("--scheme", "int4-g32", "--rounding", "rtn", "--threads", "1", "--require", "task")
        done = tapeout("export", "cpu", "arithmetic", "--out", work / "demo", *arguments, **environment)
        return Exported(work / "demo", Path("arithmetic"), work / "none", done, environment)

    return cast(Exported, once("cpu", make)[1])


def test_export_prints_its_report_as_one_document(null: Exported) -> None:
    report = document(null.done)
    assert report == json.loads((null.package / "report.json").read_text())
    assert (report["passed"], report["model"], report["target"], report["scheme"]) == (
        True,
        "tiny",
        "null",
        "int8",
    )
    gates = {gate["name"]: gate["status"] for gate in report["gates"]}
    assert gates.pop("task") == "skipped"
    assert set(gates.values()) == {"passed"}
    assert {name.split("/")[0] for name in gates} == {
        "integrity",
        "codes",
        "lowering",
        "decode",
        "quality",
        "tokenizer",
    }
    assert "PASSED" in null.done.stderr
    manifest = json.loads((null.package / "tapeout.json").read_text())
    assert f"tiny-int8-null  root digest {manifest['root_sha256']}\n" in null.done.stderr
    assert sorted(path.name for path in null.package.parent.iterdir()) == [
        "cache",
        "loose.toml",
        "tiny",
        "tiny-int8-null",
    ]


@pytest.mark.slow
def test_export_for_a_device_and_what_runs_there(cpu: Exported) -> None:
    said = told(cpu.done)
    assert "PASSED arithmetic → int4-g32 → cpu" in said
    assert "failed" not in said
    assert re.search(r"demo root digest [0-9a-f]{64} \S*demo/report\.html shows what was measured$", said)
    manifest = json.loads((cpu.package / "tapeout.json").read_text())
    assert manifest["target"] == {"name": "cpu", "options": {"threads": 1}}
    assert [Path(file).suffix for file in manifest["artifact"]["files"]] == [".gguf"]
    ran = tapeout("run", cpu.package, "--prompt", "7*8=")
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "56\n", "")


def test_quantize_makes_a_store(null: Exported, tmp_path: Path) -> None:
    out = tmp_path / "codes"
    summary = document(tapeout("quantize", null.model, "--scheme", "nf4", "--out", out, "--json"))
    assert {key: summary[key] for key in ("store", "scheme", "fallbacks", "clamped_groups")} == {
        "store": str(out),
        "scheme": "nf4",
        "fallbacks": {},
        "clamped_groups": {},
    }
    assert document(tapeout("inspect", out, "--json")) | {"bytes": 0} == {
        "kind": "store",
        "scheme": "nf4",
        "rounding": "rtn",
        "tensors": {"int8": 2, "nf4": 14, "none": 5},
        "fallbacks": {},
        "clamped_groups": 0,
        "bytes": 0,
        "source_sha256": summary["source_sha256"],
        "tapeout": tapeout("--version").stdout.strip(),
    }
    again = tapeout("quantize", null.model, "--scheme", "nf4", "--out", out)
    assert again.returncode == 2
    assert "--force" in again.stderr
    said = told(tapeout("quantize", null.model, "--scheme", "nf4", "--out", out, "--force"))
    assert said == f"{out} nf4, codes {summary['codes_sha256']}"
    assert [path.name for path in tmp_path.iterdir()] == ["codes"]


def test_a_recipe_and_a_flag_over_it(null: Exported, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('scheme = "nf4"\n[tensors]\n"*.down_proj" = "int8"\nlm_head = "none"\n')
    arguments = ("--recipe", recipe, "--scheme", "int4-g32", "--out", tmp_path / "codes", "--json")
    assert document(tapeout("quantize", null.model, *arguments))["scheme"] == "int4-g32"
    found = document(tapeout("inspect", tmp_path / "codes", "--json"))
    assert found["tensors"] == {"int4-g32": 12, "int8": 3, "none": 6}


def test_inspect_a_model() -> None:
    found = document(tapeout("inspect", "arithmetic", "--json"))
    expected = {"kind": "model", "family": "mistral", "layers": 3, "sliding_window": 20, "parameters": 112064}
    assert {key: found[key] for key in expected} == expected
    said = told(tapeout("inspect", "arithmetic"))
    assert "family mistral" in said
    assert "licence apache-2.0" in said


def test_inspect_a_package(null: Exported) -> None:
    manifest = json.loads((null.package / "tapeout.json").read_text())
    covered = [path for path in null.package.rglob("*") if path.is_file() and not beside(path, null.package)]
    assert document(tapeout("inspect", null.package, "--json")) == {
        "kind": "package",
        "model": "tiny",
        "family": "llama",
        "scheme": "int8",
        "rounding": "rtn",
        "target": "null",
        "graph": "built",
        "format": "plain",
        "containers": {"float": 5, "u8": 16},
        "context": 256,
        "bytes": sum(path.stat().st_size for path in covered),
        "passed": True,
        "report": "11 passed, 0 failed, 1 skipped",
        "root_sha256": manifest["root_sha256"],
    }
    assert "target null" in told(tapeout("inspect", null.package))
    report = document(tapeout("inspect", null.package / "report.json", "--json"))
    assert (report["kind"], report["gates"]) == ("report", "11 passed, 0 failed, 1 skipped")
    assert report["root_sha256"] == manifest["root_sha256"]
    assert report["look_first"] == "not proven here, since they were skipped: task."


def test_help_describes_every_flag() -> None:
    for verb in (("export", "null"), ("quantize",), ("validate",)):
        said = tapeout(*verb, "--help").stdout
        assert "How weights become codes" in said or verb == ("validate",)
        assert not re.search(r"│ +--[a-z-]+ [A-Z]+(\.\.\.)? +│", said), "a flag without a word"


def plain(*arguments: str | Path, columns: int = 60, status: int = 0, **environment: str) -> Done:
    """A command where nothing but ASCII is shown, in columns that are few."""
    poor = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    poor |= {"NO_COLOR": "1", "TERM": "dumb", "COLUMNS": str(columns)}
    done = process(*arguments, env=poor | environment)
    assert done.returncode == status, done.stderr
    assert (done.stdout + done.stderr).isascii()
    assert "\x1b" not in done.stdout + done.stderr
    return done


def rows(text: str) -> list[str]:
    """The lines of tables: each ends where it began a line above, in no more than 60 columns."""
    found = [line for line in text.splitlines() if line.startswith(("|", "+"))]
    assert found
    assert all(len(line) <= 60 and line[-1] in "|+" for line in found), found
    return found


@pytest.mark.slow
def test_a_poor_terminal_shows_all(null: Exported, tmp_path: Path) -> None:
    root = json.loads((null.package / "tapeout.json").read_text())["root_sha256"]
    said = plain("inspect", null.package).stderr
    rows(said)
    assert root in said  # to be copied: in one piece
    assert root in plain("verify", null.package).stderr
    said = plain("targets").stderr
    rows(said)
    assert "targets" in said
    assert "..." not in said
    assert "~" not in said  # nothing is cut short
    for name in ("int4-g128-asym", "w8a8-static", "kv-int4"):
        assert name in said
    said = plain("plan", "arithmetic").stderr
    rows(said)
    assert "~1 s" in said  # of what is about a second
    other = shutil.copytree(null.package, tmp_path / "other")
    table = plain("compare", null.package, other).stdout
    assert "| tiny-int8-null | other |" in table
    twice = tapeout("compare", null.package, other, null.package, status=2)
    assert "is given twice" in twice.stderr


@pytest.mark.slow
def test_a_poor_terminal_shows_verdicts(null: Exported) -> None:
    done = plain("validate", null.package, **null.environment)
    assert "PASSED  tiny > int8 > null" in done.stderr
    assert any("golden" in row for row in rows(done.stderr))
    found = json.loads(
        plain("run", null.package, "--prompt", "\u00e9a", "--max-new-tokens", "3", "--json").stdout
    )
    assert found["prompt"] == "\u00e9a"


def test_a_dumb_terminal_has_its_own_width(null: Exported) -> None:
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 44, 0, 0))
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"} | {"TERM": "dumb"}
    command = [PROGRAM, "inspect", null.package]
    with subprocess.Popen(command, stdin=its, stdout=its, stderr=its, env=environment) as done:
        os.close(its)
        said = b""
        with contextlib.suppress(OSError):  # of which Linux tells that the other end is closed
            while part := os.read(ours, 4096):
                said += part
    os.close(ours)
    assert done.returncode == 0
    assert b"\x1b" not in said
    drawn = [line for line in said.decode().splitlines() if line.startswith(("│", "┌", "└"))]
    assert drawn
    assert max(map(len, drawn)) <= 44


def test_names_are_no_markup(null: Exported, tmp_path: Path) -> None:
    copied = shutil.copytree(null.package, tmp_path / "[bold]x[/y] :smile:")
    said = tapeout("inspect", copied, status=0).stderr
    assert "[bold]x[/y] :smile:" in said.replace("\n", "")
    assert "[bold]x[/y] :smile: is whole" in tapeout("verify", copied, status=0).stderr


def test_an_edited_report_is_told(null: Exported, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(null.package, tmp_path / "edited"))
    raw = json.loads((copied / "report.json").read_text())
    size = (copied / "report.json").stat().st_size
    raw["gates"][1]["value"] = 1e-9
    (copied / "report.json").write_text(f"{json.dumps(raw):{size}}")  # of the same length
    told_of = "is not the report that the package was made with"
    assert "report.json differs from its digest" in tapeout("verify", copied, status=2).stderr
    assert told_of in tapeout("compare", copied, null.package, status=2).stderr
    assert (
        "not the one that the package was made with"
        in document(tapeout("inspect", copied, "--json"))["report"]
    )
    ran = tapeout("run", copied, "--prompt", "a", "--max-new-tokens", "2", status=0, **null.environment)
    assert told_of in ran.stderr
    gates = {gate["name"]: gate for gate in document(tapeout("validate", copied, "--json"), 1)["gates"]}
    assert gates["integrity"]["reason"] == "report.json differs from its digest"
    assert told_of in gates["golden"]["reason"]  # whose limit the report would give


def test_a_report_of_a_newer_format_is_refused(null: Exported, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(null.package, tmp_path / "newer"))
    path = copied / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    for verb in (
        ("inspect", copied),
        ("inspect", path),
        ("compare", copied, null.package),
        ("validate", copied),
    ):
        said = tapeout(*verb, status=2).stderr
        assert "report.json has format_version 2; this tapeout reads up to 1: upgrade it." in said
    assert "upgrade it" in tapeout("verify", copied, status=2).stderr


def beside(path: Path, package: Path) -> bool:
    """Whether a file is the manifest, measured, or of what is installed here: not what the root digest covers."""
    return (
        path.parent == package and path.name not in ("README.md", "check.py", "check.cpp")
    ) or package / "licences" / "runtime" in path.parents


@pytest.mark.slow
def test_diff_of_a_package_and_its_model(null: Exported, tmp_path: Path) -> None:
    found = document(
        tapeout(
            "diff", null.package, null.model, "--prompt", "one two", "--picture", tmp_path / "p.svg", "--json"
        )
    )
    assert (found["one"], found["other"]) == (str(null.package), str(null.model))
    assert found["first"] is None
    assert found["tokens"] == len("one two")  # the tokenizer has bytes
    assert [value["name"] for value in found["values"]][:2] == ["embedding", "layers.0.attention.norm"]
    assert found["values"][-1]["name"] == "logits"
    assert found["graph_from_transformers"] < 1e-5
    ElementTree.parse(tmp_path / "p.svg")
    said = told(tapeout("diff", null.package, null.model))
    assert "difference / size, 16 tokens" in said  # of the golden prompts
    assert "No primitive parts" in said


@pytest.mark.slow
def test_diff_of_what_parts_ends_with_1(null: Exported, make_model: MakeModel) -> None:
    other = make_model("llama", name="other", seed=1, dtype="F32")
    done = tapeout("diff", null.model, other, "--prompt", "one two")
    assert done.returncode == 1
    assert "The first primitive that parts is embedding (embedding): it is off by 1." in done.stderr


def test_verify_a_whole_package(null: Exported) -> None:
    text = (null.package / "tapeout.json").read_bytes()
    root = json.loads(text)["root_sha256"]
    found = document(tapeout("verify", null.package, "--json"))
    assert found["package"] == str(null.package)
    assert (found["root_sha256"], found["manifest_sha256"]) == (root, hashlib.sha256(text).hexdigest())
    assert (found["damage"], found["signature"]) == ([], "none")
    assert found["bill"].startswith("its digests are the manifest's; ")
    assert found["provenance"].startswith("SLSA 1.0, ")
    assert "tapeout/LICENSE" in found["licences"]
    files = sum(path.is_file() for path in null.package.rglob("*")) - 1  # the manifest cannot hold its own
    first, *rest = tapeout("verify", null.package, status=0).stderr.splitlines()
    assert first == f"{null.package} is whole: {files} files, root digest {root}"
    assert [line.split(":")[0] for line in rest] == [
        "signature",
        "bill of materials",
        "provenance",
        "licences",
    ]


def test_verify_tells_damage_in_its_document_too(null: Exported, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(null.package, tmp_path / "copied"))
    (copied / "report.xml").unlink()
    found = document(tapeout("verify", copied, "--json"), status=2)
    assert found["damage"] == ["report.xml is missing"]


def test_validate_with_the_model(null: Exported) -> None:
    done = tapeout(
        "validate",
        null.package,
        *("--model", null.model, "--recipe", null.recipe, "--require", "quality", "--json"),
        **null.environment,
    )
    report = document(done)
    assert report["passed"] is True
    statuses = [(gate["name"], gate["status"]) for gate in report["gates"]]
    assert statuses == [(gate["name"], gate["status"]) for gate in document(null.done)["gates"]]
    assert "PASSED tiny → int8 → null" in " ".join(done.stderr.split())


def test_validate_without_the_model_cannot_pass_what_is_required(null: Exported, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "report"
    done = tapeout("validate", null.package, "--require", "quality", "--report", out, "--json")
    report = document(done, status=1)
    gates = {gate["name"]: gate for gate in report["gates"]}
    assert gates["golden"]["status"] == gates["integrity"]["status"] == "passed"
    assert gates["codes"]["status"] == "skipped"
    assert "--model" in gates["codes"]["reason"]
    assert gates["quality"]["status"] == "failed"
    assert "FAILED" in done.stderr
    assert json.loads((out / "report.json").read_text()) == report
    assert "quality" in (out / "report.html").read_text()
    suite = ElementTree.parse(out / "report.xml").getroot()
    assert suite.get("failures") == "1"
    assert (null.package / "report.json").read_text() != (out / "report.json").read_text()


def test_bench_measures_the_contexts_that_were_asked_for(null: Exported) -> None:
    done = tapeout("bench", null.package, "--contexts", "5", "--contexts", "40", "--json")
    figures = document(done)
    assert [row["context"] for row in figures["contexts"]] == [5, 40]
    assert [row["token_p99_s"] for row in figures["contexts"]] == [None, None]  # 96 tokens do not carry it
    assert all(0 < row["token_p50_s"] <= row["token_p90_s"] for row in figures["contexts"])
    assert figures["runtime"].startswith("transformers ")
    assert "prefill" in done.stderr


def test_run_streams_what_its_document_says(null: Exported) -> None:
    arguments = ("run", null.package, "--prompt", "ab", "--max-new-tokens", "4")
    answer = document(tapeout(*arguments, "--json"))
    assert answer["prompt"] == "ab"
    assert 1 <= len(answer["token_ids"]) <= 4
    streamed = tapeout(*arguments)
    assert (streamed.returncode, streamed.stderr) == (0, "")
    assert streamed.stdout == answer["text"] + "\n"


def test_targets() -> None:
    table = document(tapeout("targets", "--json"))
    assert {"cpu", "null"} <= table["targets"].keys()
    assert table["targets"]["null"]["missing"] is None
    assert table["schemes"]["int4-g32"]["cpu"] == "exact (Q4_0)"
    assert table["schemes"]["nf4"]["null"] == "exact (u4)"
    assert all(cells.keys() == table["targets"].keys() for cells in table["schemes"].values())
    assert [table["kv_caches"][cache]["cpu"] for cache in ("kv-f16", "kv-int8", "kv-int4")] == ["yes"] * 3
    assert {cache: cells["null"] for cache, cells in table["kv_caches"].items()} == {
        "kv-f32": "yes", "kv-f16": "no", "kv-fp8": "no", "kv-int8": "no", "kv-int4": "no",
    }  # fmt: skip
    said = told(process("targets", env={"COLUMNS": "200"}))
    assert "null: No device: canonical codes in safetensors, run by transformers. Runtime: installed" in said
    assert "cpu, mobile" in said  # what they carry is the same
    assert "Q4_0" not in said
    assert "int4-g32 exact (Q4_0)" in told(tapeout("targets", "cpu"))
    unknown = tapeout("targets", "cpuu", status=2)
    assert "did you mean 'cpu'" in unknown.stderr
    assert all(name in said for name in {**table["schemes"], **table["kv_caches"]})


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example_of_the_verb_itself(verb: str) -> None:
    done = tapeout(*verb.split(), "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"Example: tapeout {verb}" in done.stdout
    assert "--json" in done.stdout


def test_help_lists_every_verb() -> None:
    listed = tapeout("--help").stdout
    assert all(re.search(rf"│ {verb.split()[0]} ", listed) for verb in VERBS)
    targets = tapeout("export", "--help").stdout
    assert re.search(r"│ cpu .*│\n(│ {5,}.*\n)*│ mobile .*│\n(│ {5,}.*\n)*│ null ", targets)
    assert "--max-shard-size" in tapeout("export", "cpu", "--help").stdout  # a field of Cpu, and of no other
    assert "--max-shard-size" not in tapeout("export", "null", "--help").stdout


@pytest.mark.parametrize(("shell", "word"), [("bash", "complete"), ("zsh", "#compdef tapeout")])
def test_a_completion_script_is_written(tmp_path: Path, shell: str, word: str) -> None:
    script = tmp_path / "script"
    done = tapeout("--install-completion", "--shell", shell, "--output", script, HOME=str(tmp_path))
    assert done.returncode == 0
    text = script.read_text()
    assert word in text
    assert "export" in text
    assert "--max-new-tokens" in text
    if shell == "bash":
        assert subprocess.run(["bash", "-n", script], check=False).returncode == 0


def test_a_missing_runtime_has_its_own_status(null: Exported, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no', name='torch')")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    done = process("run", null.package, "--prompt", "a", env={"PYTHONPATH": path})
    assert (done.returncode, done.stdout) == (3, "")
    assert "pip install 'tapeout[reference]'" in done.stderr


def test_a_seed_that_is_none(null: Exported) -> None:
    done = tapeout("run", null.package, "--prompt", "a", "--seed=-1")
    assert done.returncode == 2
    assert "seed" in done.stderr


@pytest.mark.parametrize("verb", [("verify",), ("inspect",), ("bench",), ("run", "--prompt", "a")], ids=str)
def test_a_manifest_without_its_keys(tmp_path: Path, verb: tuple[str, ...]) -> None:
    (tmp_path / "tapeout.json").write_text('{"format_version": 1}')
    done = tapeout(verb[0], tmp_path, *verb[1:])
    assert done.returncode == 2
    assert "tapeout.json" in done.stderr
