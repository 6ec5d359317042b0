"""Bad input and a hostile machine: one clear paragraph, the right exit status, nothing half-written, nothing lost."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import PROGRAM, Done, process, tapeout
from safetensors.numpy import load_file, save_file

from tapeout.validate import worker

MakeModel = Callable[..., Path]
Once = Callable[[str, Callable[[Path], Any]], tuple[Path, Any]]


def leftovers(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def paragraph(done: Done) -> str:
    """What was said, checked to be one paragraph."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("tapeout:")]
    assert len(lines) == 1, done.stderr
    assert not done.stdout
    return lines[0]


def truncate(directory: Path) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def poison(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    save_file(tensors, directory / "model.safetensors")


def unknown_family(directory: Path) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": "mistrall"}))


def edit(**fields: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def word_level(directory: Path) -> None:
    path = directory / "tokenizer.json"
    vocab = {"type": "WordLevel", "vocab": {"a": 0, "<eos>": 256}, "unk_token": "a"}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model": vocab}))


def more_tokens(directory: Path) -> None:
    """Tokens 272 and 273, for which the model has no rows."""
    path = directory / "tokenizer.json"
    raw = json.loads(path.read_text())
    raw["model"]["vocab"] |= {"ab": 272, "cd": 273}
    path.write_text(json.dumps(raw))


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            edit(num_attention_heads=16),  # of 8 elements, as the other fields have it: the tensors do not
            "q_proj.weight is [64, 64] where config.json says [128, 64]",
        ),
        (
            edit(num_key_value_heads=2, head_dim=8),
            "k_proj.weight is [32, 64] where config.json says [16, 64]",
        ),
        (
            edit(num_key_value_heads=3),
            "num_attention_heads = 8 is no multiple of num_key_value_heads = 3; fits: 1, 2, 4, 8.",
        ),
        (
            edit(num_attention_heads=7, num_key_value_heads=7),
            "hidden_size = 64 is no multiple of num_attention_heads = 7, and no head_dim is given.",
        ),
        (edit(num_attention_heads=0), "num_attention_heads = 0 is not a positive integer."),
        (
            edit(hidden_act="relu6"),
            "the activation 'relu6' is not handled; did you mean 'gelu'? (known: gelu, gelu_pytorch_tanh, silu).",
        ),
        (
            edit(rope_scaling={"rope_type": "ntk", "factor": 2.0}),
            "rope_type 'ntk' is not handled (known: default, dynamic, linear, llama3, longrope, yarn).",
        ),
        (
            edit(model_type="gemma3_text", layer_types=["sliding_attention", "linear_attention"]),
            "the attention 'linear_attention' in layer_types is not handled; ",
        ),
        (
            edit(attention_type="linear"),
            "attention_type = \"linear\", which the family 'llama' does not handle",
        ),
        (more_tokens, "tokenizer.json has ids beyond vocab_size 272 of config.json: 'ab' = 272, 'cd' = 273."),
    ],
)
def test_configs_that_lie(
    make_model: MakeModel, tmp_path: Path, kind: str, damage: Callable[[Path], None], message: str
) -> None:
    """What is wrong, and what is known, before anything is written."""
    model = make_model(dtype="F32", **({"head_dim": 8} if "[128" in message else {}))
    damage(model)
    before = leftovers(tmp_path)
    done = tapeout("export", "cpu", model, "--format", kind, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert message in paragraph(done)
    assert leftovers(tmp_path) == before


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (
            word_level,
            [],
            "tokenizer.json is a WordLevel tokenizer; tapeout writes BPE, WordPiece and Unigram",
        ),
        (lambda d: None, ["--context", "0"], "--context is 0; what fits: 1 or more"),
        (truncate, [], "is not a whole safetensors file"),
        (poison, [], "model.layers.1.mlp.up_proj.weight in "),
        (unknown_family, [], "did you mean 'mistral'"),
        (lambda d: (d / "config.json").unlink(), [], "config.json is absent"),
        (lambda d: (d / "tokenizer.json").unlink(), [], "tokenizer"),
        (
            lambda d: None,
            ["--scheme", "int4-g128"],
            "group 128 of scheme int4-g128 does not divide in_features 64",
        ),
        (lambda d: None, ["--scheme", "int4-32"], "did you mean 'int4-g32'"),
        (lambda d: None, ["--rounding", "rtm"], "did you mean 'rtn'"),
        (lambda d: None, ["--max-shard-size", "12Q"], "12Q"),
        (
            lambda d: None,
            ["--kv-cache", "kv-int8"],
            "its heads of 8 elements are no whole blocks. What fits: kv-f16.",
        ),
    ],
)
def test_bad_models_and_arguments(
    make_model: MakeModel, tmp_path: Path, damage: Callable[[Path], Any], arguments: list[str], message: str
) -> None:
    model = make_model(dtype="F32")
    damage(model)
    before = leftovers(tmp_path)
    done = tapeout("export", "cpu", model, "--out", tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert message in paragraph(done)
    assert leftovers(tmp_path) == before


def test_unknown_target_and_unknown_flag(tmp_path: Path) -> None:
    for arguments in (
        ["export", "cpuu", "arithmetic"],
        ["export", "cpu", "arithmetic", "--shceme", "int8"],
        ["exprot"],
    ):
        done = tapeout(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert "cpu" in done.stderr or "--scheme" in done.stderr or "export" in done.stderr
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("schem = 'int8'", "unknown key 'schem'; did you mean 'scheme'"),
        ("[limits]\nkll = 1", "did you mean 'kl'"),
        ("scheme = ", "is not TOML"),
        ("tokens = 0", "tokens is 0"),
        ("[tensors]\n'*.upp_proj' = 'int8'", "matches no tensor"),
    ],
)
def test_bad_recipes(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "recipe.toml").write_text(text)
    done = tapeout(
        "export", "cpu", "arithmetic", "--recipe", tmp_path / "recipe.toml", "--out", tmp_path / "out"
    )
    assert done.returncode == 2
    assert message in paragraph(done)
    assert leftovers(tmp_path) == ["recipe.toml"]


def test_an_output_that_exists_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    for force in ([], ["--force"]):
        done = tapeout("export", "cpu", "arithmetic", "--out", out, *force)
        assert done.returncode == 2
        assert "exists" in paragraph(done)
        assert (out / "mine.txt").read_text() == "keep"
        assert leftovers(tmp_path) == ["out"]


def test_an_output_that_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = tapeout("export", "cpu", "arithmetic", "--out", tmp_path / "file" / "out")
    assert done.returncode == 2
    assert "a part of the path is a file" in paragraph(done)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a read-only and a tiny file system, which takes root")
@pytest.mark.parametrize(("options", "message"), [("ro", "read-only"), ("size=64k", "the disk is full")])
def test_a_read_only_and_a_full_disk(
    make_model: MakeModel, tmp_path: Path, options: str, message: str
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip(f"mount is not permitted here: {mounted.stderr.strip()}")
    try:
        done = tapeout("export", "cpu", make_model(), "--scheme", "int8", "--out", disk / "out")
        assert done.returncode == 2
        assert message in paragraph(done)
        assert leftovers(disk) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.slow
def test_a_file_larger_than_may_be_written(make_model: MakeModel, tmp_path: Path) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    model = make_model()
    done = process("export", "cpu", model, "--scheme", "int8", "--out", tmp_path / "out", preexec_fn=limit)
    assert done.returncode == 2
    assert "larger than this process may write" in paragraph(done)
    assert leftovers(tmp_path) == ["tiny"]
    assert tapeout("export", "cpu", model, "--scheme", "int8", "--out", tmp_path / "out").returncode in (0, 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle(make_model: MakeModel, tmp_path: Path, number: signal.Signals) -> None:
    model = make_model(hidden_size=512, intermediate_size=1024, num_hidden_layers=4)
    before = leftovers(tmp_path)
    child = subprocess.Popen(
        [str(PROGRAM), "export", "cpu", str(model), "--out", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial/artifact/*.gguf")) and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(number)
    _, said = child.communicate(timeout=60)
    assert child.returncode == 128 + number
    assert f"stopped by {number.name}" in said
    assert "Traceback" not in said
    assert leftovers(tmp_path) == before


@pytest.mark.slow
def test_two_processes_and_one_output(make_model: MakeModel, tmp_path: Path) -> None:
    model = make_model()
    command = [str(PROGRAM), "export", "cpu", str(model), "--out", str(tmp_path / "out")]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / ".out.partial").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    second = tapeout(*command[1:])
    assert second.returncode == 2
    assert "another tapeout process is writing" in paragraph(second)
    first.communicate(timeout=120)
    assert (tmp_path / "out" / "tapeout.json").exists()
    assert first.returncode in (0, 1)


@pytest.fixture(scope="module")
def package(once: Once) -> Path:
    place, done = once(
        "package",
        lambda work: tapeout("export", "cpu", "arithmetic", "--scheme", "int4-g32", "--out", work / "out"),
    )
    assert done.returncode == 0, done.stderr
    return place / "out"


@pytest.fixture
def copied(package: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(package, tmp_path / "package"))


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_a_corrupted_artifact(copied: Path) -> None:
    flip(next((copied / "artifact").glob("*.gguf")), -100)
    verified = tapeout("verify", copied)
    assert verified.returncode == 2
    assert "differs from its digest" in paragraph(verified)
    validated = tapeout("validate", copied, "--model", "arithmetic", "--json")
    assert validated.returncode == 1
    gates = {gate["name"]: gate for gate in json.loads(validated.stdout)["gates"]}
    assert gates["integrity"]["status"] == "failed"
    assert gates["codes"]["status"] == "failed"
    assert ".gguf" in gates["integrity"]["reason"]


@pytest.mark.slow
def test_a_truncated_artifact(copied: Path) -> None:
    path = next((copied / "artifact").glob("*.gguf"))
    path.write_bytes(path.read_bytes()[:-5000])
    validated = tapeout("validate", copied, "--model", "arithmetic", "--json")
    assert validated.returncode == 1
    gates = {gate["name"]: gate["status"] for gate in json.loads(validated.stdout)["gates"]}
    assert gates["integrity"] == gates["codes"] == "failed"
    assert "passed" not in {gates[name] for name in gates if name.startswith(("lowering/runtime", "decode"))}


def test_a_package_that_is_none(tmp_path: Path) -> None:
    for verb in ("validate", "verify", "bench"):
        done = tapeout(verb, tmp_path)
        assert done.returncode == 2
        assert "is not a package: it has no tapeout.json" in paragraph(done)


@pytest.mark.slow
def test_a_walk_that_cannot_be(copied: Path, make_model: MakeModel) -> None:
    other = make_model("llama")
    for arguments, told in (
        ((copied, "arithmetic", "--prompt", ""), "the prompt '' gives no token"),
        ((copied, "arithmetic", "--prompt", "1" * 600), "the prompt has 600 tokens; what fits: "),
        ((copied, other), "is not the model that"),
        ((copied, "topics_v1"), "they have nothing in common that can be compared"),
        ((copied, "arithmetik"), "no model at 'arithmetik'"),
        ((copied, "arithmetic", "--picture", "growth.png"), "--picture writes .svg"),
    ):
        done = tapeout("diff", *arguments)
        assert done.returncode == 2, done.stderr
        assert told in paragraph(done)


def test_a_manifest_of_a_newer_format(copied: Path) -> None:
    path = copied / "tapeout.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    done = tapeout("verify", copied)
    assert done.returncode == 2
    assert "format_version 2; this tapeout reads up to 1" in paragraph(done)


def test_an_edited_manifest(copied: Path) -> None:
    path = copied / "tapeout.json"
    raw = json.loads(path.read_text())
    raw["scheme"] = "int8"
    path.write_text(json.dumps(raw))
    assert "differs from its root digest" in paragraph(tapeout("verify", copied))


def hide(tmp_path: Path, name: str, code: str) -> dict[str, str]:
    """An environment in which importing ``name`` runs ``code``: workers that start in it do."""
    for key in [key for key in worker._idle if name in str(key)]:
        worker._idle.pop(key).close()
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / f"{name}.py").write_text(code)
    return {"PYTHONPATH": str(tmp_path / "hidden")}


def test_a_runtime_that_is_not_installed(copied: Path, tmp_path: Path) -> None:
    environment = hide(tmp_path, "llama_cpp", "raise ModuleNotFoundError('no', name='llama_cpp')")
    done = tapeout("run", copied, "--prompt", "1+1=", **environment)
    assert done.returncode == 3
    assert "pip install 'tapeout[cpu]'" in paragraph(done)
    arguments = ("--model", "arithmetic", "--require", "decode", "--json")
    validated = tapeout("validate", copied, *arguments, **environment)
    assert validated.returncode == 1
    gates = {gate["name"]: gate for gate in json.loads(validated.stdout)["gates"]}
    assert gates["tokenizer"]["status"] == "skipped"
    assert "pip install" in gates["tokenizer"]["reason"]
    assert gates["decode"]["status"] == "failed"
    assert "pip install" in gates["decode"]["reason"]
    assert gates["codes"]["status"] == "passed", gates["codes"]["reason"]


def test_a_runtime_that_segfaults(copied: Path, tmp_path: Path) -> None:
    environment = hide(tmp_path, "llama_cpp", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    done = tapeout("run", copied, "--prompt", "1+1=", **environment)
    assert done.returncode == 1
    assert "SIGSEGV" in done.stderr
    validated = tapeout("validate", copied, "--model", "arithmetic", "--json", **environment)
    assert validated.returncode == 1
    gates = {gate["name"]: gate for gate in json.loads(validated.stdout)["gates"]}
    assert gates["decode"]["status"] == "failed"
    assert "SIGSEGV" in gates["decode"]["reason"]


def test_a_package_that_failed_is_marked_and_run_warns(tmp_path: Path) -> None:
    (tmp_path / "strict.toml").write_text("[limits]\nkl = 0.0")
    out = tmp_path / "out"
    done = tapeout(
        "export",
        "cpu",
        "arithmetic",
        "--scheme",
        "int4-g32",
        "--recipe",
        tmp_path / "strict.toml",
        "--out",
        out,
    )
    assert done.returncode == 1
    assert json.loads((out / "report.json").read_text())["passed"] is False
    assert json.loads((out / "tapeout.json").read_text())["passed"] is False
    ran = tapeout("run", out, "--prompt", "2*3=", "--max-new-tokens", "4")
    assert ran.returncode == 0
    assert "warning" in ran.stderr
