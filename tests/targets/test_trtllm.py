"""Target nvidia, format trtllm: ranks that are run as ranks equal the model, and the builder is called as its user would."""

from __future__ import annotations

import json
import os
import shutil
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from commands import tapeout
from thinned import thinned

from tapeout.build import target
from tapeout.conformance import lowered
from tapeout.errors import PackageError, RuntimeCrash, TapeoutError
from tapeout.exporters import Artifact
from tapeout.generated import write_model
from tapeout.models import load
from tapeout.quantize import Quantized, quantize
from tapeout.targets.nvidia import Nvidia
from tapeout.targets.trtllm import command
from tapeout.targets.trtllm_ranks import open_session
from tapeout.targets.trtllm_trace import whole
from tapeout.validate.worker import WorkerSession

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
load_file = pytest.importorskip("safetensors.torch").load_file
save_file = pytest.importorskip("safetensors.torch").save_file

THEIRS = Path(__file__).parents[1] / "exporters" / "data" / "trtllm-int8-sq"
WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
BROAD: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256}
# Past the sliding window; a prompt of one token; an odd length.
SEQUENCES = [
    [(i * i * 7 + i * 31 + j * 13) % 256 for i in range(length)] for j, length in enumerate((61, 1, 40))
]


def _device(**options: Any) -> Nvidia:
    made = target("nvidia", format="trtllm", **options)
    assert isinstance(made, Nvidia)
    return made


def _quant(work: Path, family: str, fields: dict[str, Any], scheme: str, dtype: str = "F32") -> Quantized:
    return quantize(
        load(write_model(work / "model", family, fields, dtype=dtype)), scheme, out=work / "codes"
    )


CUT: list[tuple[str, dict[str, Any], str, dict[str, int]]] = [
    # One key head that two ranks share, every bias, a tied head.
    ("llama", BROAD | {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
     "int8", {"tensor_parallel": 2}),
    ("mistral", WIDE | {"sliding_window": 24}, "int4-g64", {"tensor_parallel": 2, "pipeline_parallel": 2}),
    ("mixtral", BROAD, "int4-g128", {"tensor_parallel": 2}),
    ("qwen2_moe", BROAD | {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 256}, "int4-g64-asym", {"tensor_parallel": 2}),
    ("phi3", BROAD | {"num_key_value_heads": 8}, "int4-g64", {"tensor_parallel": 2}),
    ("gemma3_text", WIDE | {"query_pre_attn_scalar": 24}, "none", {"tensor_parallel": 4}),
    ("qwen3", WIDE, "none", {"pipeline_parallel": 2}),
    ("llama", WIDE, "w8a8", {"tensor_parallel": 2}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "fields", "scheme", "options"),
    thinned(CUT),
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_ranks_together_are_the_model(
    family: str, fields: dict[str, Any], scheme: str, options: dict[str, int], tmp_path: Path
) -> None:
    quant = _quant(tmp_path, family, fields, scheme)
    said = lowered(_device(**options), quant, tmp_path, SEQUENCES)
    assert "**" not in said, said


def test_gemmas_codes_in_bfloat16_are_the_model(tmp_path: Path) -> None:
    """But for its norms, which bfloat16 holds as 1 + w."""
    fields = WIDE | {"query_pre_attn_scalar": 24, "sliding_window": 24}
    model = load(write_model(tmp_path / "model", "gemma3_text", fields, dtype="BF16"))
    quant = quantize(model, "int4-g64", overrides={"model.embed_tokens": "none"}, out=tmp_path / "codes")
    said = lowered(_device(tensor_parallel=2), quant, tmp_path, SEQUENCES)
    assert "**" not in said, said


@pytest.mark.slow
def test_eight_ranks_are_the_model(tmp_path: Path) -> None:
    """More ranks than key heads, and than cores."""
    quant = _quant(tmp_path, "llama", WIDE | {"num_key_value_heads": 2}, "none", dtype="F16")
    said = lowered(_device(tensor_parallel=8), quant, tmp_path, SEQUENCES[:1])
    assert "**" not in said, said


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Quantized, Artifact]:
    quant = _quant(tmp_path, "mistral", WIDE | {"sliding_window": 24}, "int8")
    return quant, _device(tensor_parallel=2).export(quant, _room(tmp_path / "out"))


def _room(path: Path) -> Path:
    path.mkdir()
    return path


@pytest.mark.slow
def test_token_by_token_is_all_at_once_past_the_window(exported: tuple[Quantized, Artifact]) -> None:
    _, artifact = exported
    with WorkerSession(_device(tensor_parallel=2).session(artifact)) as session:
        at_once = session.prefill(SEQUENCES[0])
        session.reset()
        one_by_one = np.stack([session.decode(token) for token in SEQUENCES[0]])
        session.reset()
        last = session.append(SEQUENCES[0])
        assert session.detokenize(session.tokenize("ab c")) == "ab c"
        with pytest.raises(TapeoutError, match="do not fit the context of 256"):
            session.prefill([1] * 300)
    # Float32 sums in another order: 2^-24 a product, far below 1e-5 of the logits' deviation.
    assert np.abs(at_once - one_by_one).max() < 1e-5 * at_once.std() * 4
    assert np.abs(at_once[-1] - last[0]).max() < 1e-5 * at_once.std() * 4


@pytest.mark.slow
def test_ranks_end_with_their_worker(exported: tuple[Quantized, Artifact]) -> None:
    """When it is closed, and when it is killed and nobody could clean up."""
    _, artifact = exported
    for end in ("close", "kill"):
        session = WorkerSession(_device(tensor_parallel=2).session(artifact))
        worker = psutil.Process(session._process.pid)
        ranks = worker.children(recursive=True)
        assert len(ranks) == 1
        if end == "kill":
            worker.kill()
        session.close()
        _wait_until(lambda gone=ranks[0]: not gone.is_running() or gone.status() == psutil.STATUS_ZOMBIE)  # type: ignore[misc]


@pytest.mark.slow
def test_a_rank_that_dies_is_a_crash(exported: tuple[Quantized, Artifact]) -> None:
    _, artifact = exported
    with WorkerSession(_device(tensor_parallel=2).session(artifact)) as session:
        rank = psutil.Process(session._process.pid).children(recursive=True)[0]
        rank.kill()
        _wait_until(lambda: not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE)
        with pytest.raises(RuntimeCrash, match="raised"):
            session.prefill([1, 2, 3])


@pytest.mark.slow
def test_a_missing_rank_is_named_before_any_is_started(exported: tuple[Quantized, Artifact]) -> None:
    _, artifact = exported
    (artifact.directory / "rank1.safetensors").unlink()
    with pytest.raises(PackageError, match=r"has no rank1.safetensors, and its config.json says 2 ranks"):
        WorkerSession(_device(tensor_parallel=2).session(artifact))


@pytest.mark.slow
def test_a_byte_that_changes_shows_in_the_logits(
    exported: tuple[Quantized, Artifact], tmp_path: Path
) -> None:
    """The session runs what the files hold: swapped ranks, and a row's scale of the other rank, are other models."""
    _, artifact = exported
    device = _device(tensor_parallel=2)
    swapped = replace(artifact, directory=tmp_path / "swapped")
    shutil.copytree(artifact.directory, swapped.directory)
    first, second = (swapped.directory / f"rank{rank}.safetensors" for rank in range(2))
    ours, theirs = load_file(first), load_file(second)
    name = "transformer.layers.1.mlp.gate.per_channel_scale"
    ours[name], theirs[name] = theirs[name], ours[name]
    save_file(ours, first)
    save_file(theirs, second)
    logits = []
    for each in (artifact, swapped):
        with WorkerSession(device.session(each)) as session:
            logits.append(session.prefill(SEQUENCES[0]))
    assert np.abs(logits[0] - logits[1]).max() > 1e-3 * logits[0].std()


@pytest.mark.parametrize(
    ("family", "fields", "scheme", "options"), [CUT[0], CUT[1], CUT[3], CUT[4], CUT[5]], ids=lambda each: each if isinstance(each, str) else ""
)  # fmt: skip
def test_the_whole_of_all_ranks_is_the_models_weights(
    family: str, fields: dict[str, Any], scheme: str, options: dict[str, int], tmp_path: Path
) -> None:
    quant = _quant(tmp_path, family, fields, scheme)
    artifact = _device(**options).export(quant, _room(tmp_path / "out"))
    config = quant.model.decoder
    found = whole(artifact.directory, config)
    assert found.keys() - {"lm_head.weight"} == quant.keys() - {"lm_head.weight"}
    for name, weight in found.items():
        wanted = quant.float32(
            "model.embed_tokens.weight" if name == "lm_head.weight" and config.tie_word_embeddings else name
        )
        # Floats are float16, and so is a zero term of up to 8 steps.
        step = np.abs(wanted).max() * 2.0**-11 + 2.0**-24
        assert np.abs(weight - wanted).max() <= (step if artifact.containers.get(name) != "W8A16" else 0), (
            name
        )


@pytest.mark.slow
def test_our_ranks_give_nvidias_logits_of_its_own_checkpoint() -> None:
    """The library's own model, its inputs rounded too, and the rank files that it wrote of it."""
    oracle = load_file(THEIRS / "oracle.safetensors")
    ids, wanted = oracle["ids"].tolist(), oracle["logits"].numpy()
    session = open_session(str(THEIRS))
    try:
        found = session.prefill(ids)
    finally:
        session.close()
    # Smoothing and norms are float16 in the files: 2^-11 of themselves, in nine places of one layer; four deviations of the largest.
    # Steps of inputs that this moves over a half are a 127th of the largest input: as many again.
    assert np.abs(found - wanted).max() / wanted.std() < 4 * 2 * np.sqrt(9) / 127
    unrounded = open_session(str(THEIRS), inputs=False)
    try:
        other = unrounded.prefill(ids)
    finally:
        unrounded.close()
    assert np.abs(other - wanted).mean() > np.abs(found - wanted).mean()


BUILDER = """#!{python}
import json, pathlib, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
checkpoint, engine = pathlib.Path(given["--checkpoint_dir"]), pathlib.Path(given["--output_dir"])
world = json.loads((checkpoint / "config.json").read_text())["mapping"]["world_size"]
assert all((checkpoint / f"rank{{rank}}.safetensors").exists() for rank in range(world))
(pathlib.Path(__file__).parent / "given.json").write_text(json.dumps(given))
print("\\n".join(f"line {{i}}" for i in range(30)))
if {fails}:
    sys.exit("no GPU here")
engine.mkdir()
(engine / "config.json").write_text("{{}}")
for rank in range(world):
    (engine / f"rank{{rank}}.engine").write_bytes(b"engine")
"""


def _builder(place: Path, monkeypatch: pytest.MonkeyPatch, *, fails: bool = False) -> Path:
    place.mkdir()
    path = place / "trtllm-build"
    path.write_text(BUILDER.format(python=shutil.which("python3"), fails=fails))
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    return path


def test_the_builder_is_run_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quant = _quant(tmp_path, "llama", WIDE, "int8")
    path = _builder(tmp_path / "bin", monkeypatch)
    device = _device(
        tensor_parallel=2,
        gpt_attention_plugin="float16",
        gemm_plugin="float16",
        max_batch_size=8,
        max_input_len=64,
        max_seq_len=128,
    )
    out = _room(tmp_path / "out")
    artifact = device.export(quant, out)
    assert json.loads((path.parent / "given.json").read_text()) == {
        "--checkpoint_dir": str(out),
        "--output_dir": str(out / "engine"),
        "--gpt_attention_plugin": "float16",
        "--gemm_plugin": "float16",
        "--max_batch_size": "8",
        "--max_input_len": "64",
        "--max_seq_len": "128",
    }
    assert {"engine/config.json", "engine/rank0.engine", "engine/rank1.engine"} <= set(artifact.files)
    assert artifact.context == 128
    assert not any("skipped" in note for note in artifact.notes)
    assert "The engine is in `artifact/engine`" in device.card(artifact)


def test_a_builder_that_fails_says_why_and_how_to_repeat_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quant = _quant(tmp_path, "llama", WIDE, "int8")
    _builder(tmp_path / "bin", monkeypatch, fails=True)
    out = _room(tmp_path / "out")
    with pytest.raises(RuntimeCrash, match=r"ended with status 1") as raised:
        _device().export(quant, out)
    assert "no GPU here" in str(raised.value)
    assert "line 29" in str(raised.value)
    assert "line 3\n" not in str(raised.value)
    assert f"trtllm-build --checkpoint_dir {out}" in str(raised.value)


def test_without_the_builder_the_step_is_skipped_and_the_card_has_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    device = _device(tensor_parallel=2, max_batch_size=8)
    artifact = device.export(_quant(tmp_path, "llama", WIDE, "int8"), _room(tmp_path / "out"))
    assert any(note.startswith("trtllm-build skipped: needs tensorrt-llm 1.2") for note in artifact.notes)
    card = device.card(artifact)
    assert "The step `trtllm-build` was skipped here: needs tensorrt-llm 1.2" in card
    assert " ".join(command(device, Path("artifact"))) in card
    assert "--gpt_attention_plugin auto --gemm_plugin auto --max_batch_size 8" in card
    assert "On the machine with 2 GPUs" in card


def test_numbers_that_are_none_are_refused() -> None:
    for flag in ("tensor_parallel", "pipeline_parallel", "max_batch_size", "max_seq_len"):
        with pytest.raises(TapeoutError, match=f"--{flag.replace('_', '-')} is 0; what fits: 1 or more"):
            _device(**{flag: 0})
    with pytest.raises(TapeoutError, match=r"--max-shard-size is not of the format trtllm"):
        _device(max_shard_size="1G")


def test_memory_counts_key_heads_that_ranks_share(tmp_path: Path) -> None:
    config = load(write_model(tmp_path / "model", config=WIDE | {"num_key_value_heads": 2})).decoder
    one, four = _device().memory(config, 256), _device(tensor_parallel=4).memory(config, 256)
    assert one.cache == 2 * 2 * (2 * 16) * 2 * 256
    assert four.cache == 2 * one.cache


RECIPE = "tokens = 64\nlimits = {kl = 1e3, top1 = 0.0, perplexity = 1e3}\n"


def test_int8_for_two_gpus_with_plugins_is_one_command(tmp_path: Path) -> None:
    model, out = write_model(tmp_path / "model", config=WIDE), tmp_path / "out"
    (tmp_path / "recipe.toml").write_text(RECIPE)
    flags = (
        "--format",
        "trtllm",
        "--scheme",
        "int8",
        "--tensor-parallel",
        "2",
        "--gpt-attention-plugin",
        "float16",
        "--gemm-plugin",
        "float16",
    )
    options = ("--recipe", tmp_path / "recipe.toml", "--out", out, "--json")
    report = json.loads(tapeout("export", "nvidia", model, *flags, *options, status=0).stdout)
    gates = {gate["name"]: gate["status"] for gate in report["gates"]}
    assert report["passed"]
    assert {"integrity", "codes", "lowering/weights", "lowering/runtime", "decode", "tokenizer"} <= {
        n for n, s in gates.items() if s == "passed"
    }
    said = json.loads((out / "artifact" / "config.json").read_text())
    assert (said["dtype"], said["quantization"]["quant_algo"], said["mapping"]["tp_size"]) == (
        "float16",
        "W8A16",
        2,
    )
    assert sorted(path.name for path in (out / "artifact").glob("rank*")) == [
        "rank0.safetensors",
        "rank1.safetensors",
    ]
    card = (out / "README.md").read_text()
    assert "--gpt_attention_plugin float16 --gemm_plugin float16" in card
    rank = out / "artifact" / "rank1.safetensors"
    rank.write_bytes(rank.read_bytes()[:-1] + b"\x55")
    assert "rank1.safetensors differs" in tapeout("verify", out, status=2).stderr


def _wait_until(true: Callable[[], bool]) -> None:
    for _ in range(200):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError
