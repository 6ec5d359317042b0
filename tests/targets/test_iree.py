"""The format iree of target rocm: modules that are compiled, their twins that are run, and what goes wrong."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapeout import targets
from tapeout.build import target
from tapeout.conformance import lowered
from tapeout.errors import MissingToolchain, PackageError, RuntimeCrash, TapeoutError
from tapeout.exporters import Artifact, iree
from tapeout.exporters.iree.emitter import IreeOps, Weights
from tapeout.exporters.iree.mlir import Module, Value
from tapeout.generated import write_model
from tapeout.models import load
from tapeout.quantize import Quantized, quantize
from tapeout.targets import Progress, iree_compiler
from tapeout.targets.iree import open_session
from tapeout.targets.rocm import Rocm
from tapeout.validate import gates
from tapeout.validate.evidence import Evidence

pytest.importorskip("iree.runtime")
pytest.importorskip("iree.compiler")
pytest.importorskip("transformers")

WIDE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 256}
EXPERTS = WIDE | {"moe_intermediate_size": 128}
LATENT = EXPERTS | {"q_lora_rank": 128, "kv_lora_rank": 128, "v_head_dim": 16}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 16 for i in range(8)],
    "long_factor": [2.0 + i / 2 for i in range(8)],
    "original_max_position_embeddings": 32,
}
# Of the prompts one is longer than a chunk, one than the length that LongRoPE was trained on, one a token.
SEQUENCES = [
    [(i * i * 7 + i * 31 + j * 13) % 256 for i in range(length)] for j, length in enumerate((61, 1, 24))
]
TINY = WIDE | {"num_hidden_layers": 1}


def quantized(
    work: Path, family: str = "llama", fields: dict[str, Any] = TINY, scheme: str = "int4-g32"
) -> Quantized:
    return quantize(
        load(write_model(work / "model", family, fields, dtype="F32")), scheme, out=work / "codes"
    )


def written(work: Path, **how: Any) -> tuple[Quantized, Artifact]:
    """Not compiled for a chip: what is run here is the twin."""
    quant = quantized(work, **how)
    return quant, iree.write(quant, work / "artifact", iree.Options(chunk=16))


class Twin(Rocm):
    """Without the compiler's run for a chip, which takes longer than all that is looked at here."""

    def export(self, quant: Quantized, out: Path, progress: Progress | None = None) -> Artifact:
        return iree.write(quant, out, iree.Options(self.context, self.prefill_chunk))


# What is computed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "fields", "scheme"),
    [
        ("gemma2", WIDE, "int8"),  # windows in some layers, soft caps, sandwich norms
        ("qwen3", WIDE, "nf4"),  # norms of queries and keys; codes that are looked up
        ("phi3", WIDE | {"num_key_value_heads": 8, "rope_scaling": LONG, "max_position_embeddings": 1024}, "int4-g128"),
        ("qwen2_moe", EXPERTS | {"shared_expert_intermediate_size": 128}, "int4-g32-asym"),
        ("deepseek_v3", LATENT, "int4-g32"),  # latents, groups of experts
    ],
)  # fmt: skip
def test_families(tmp_path: Path, family: str, fields: dict[str, Any], scheme: str) -> None:
    """The twin's logits are transformers' with the same codes, past windows and chunks; of the last family the chip's module is made too."""
    device = (Rocm if family == "deepseek_v3" else Twin)("iree", prefill_chunk=16)
    said = lowered(device, quantized(tmp_path, family, fields, scheme), tmp_path, SEQUENCES)
    assert "**" not in said, said


def test_one_session_by_every_road(tmp_path: Path) -> None:
    """Chunks of any size, token by token, the last logits alone, and again after a reset: the same numbers."""
    quant, artifact = written(tmp_path, family="mistral", fields=TINY | {"sliding_window": 24})
    session = open_session(str(artifact.directory), "")
    ids = SEQUENCES[0]
    whole = session.prefill(ids)
    # Of one order of sums or another, in float32: sqrt(256) 2^-24 of a logit, and ten times that for a layer's four products.
    bound = 40 * 2**-24 * np.abs(whole).max()
    session.reset()
    parts = [session.prefill(ids[:7]), session.prefill(ids[7:40]), session.append(ids[40:50])]
    assert np.allclose(parts[0], whole[:7], rtol=0, atol=bound)
    assert np.allclose(parts[1], whole[7:40], rtol=0, atol=bound)
    assert np.allclose(parts[2], whole[49:50], rtol=0, atol=bound)
    for place in range(50, 61):
        assert np.allclose(session.decode(ids[place]), whole[place], rtol=0, atol=bound)
    assert session.facts.emulated
    assert quant.model.decoder.vocab_size == whole.shape[1]
    session.close()
    session.close()


@pytest.mark.slow
def test_a_context_that_is_full(tmp_path: Path) -> None:
    """The last chunk is padded beyond the context; one token more is refused, and changes nothing."""
    quant = quantized(tmp_path)
    artifact = iree.write(quant, tmp_path / "artifact", iree.Options(context=40, chunk=16))
    session = open_session(str(artifact.directory), "")
    ids = SEQUENCES[0][:40]
    whole = session.prefill(ids)
    with pytest.raises(TapeoutError, match=r"41 tokens do not fit the context of 40"):
        session.decode(1)
    with pytest.raises(TapeoutError, match=r"token ids from 9999 to 9999 are not all in the vocabulary"):
        session.prefill([9999])
    session.reset()
    session.prefill(ids[:39])
    assert np.allclose(session.decode(ids[39]), whole[39], rtol=0, atol=40 * 2**-24 * np.abs(whole).max())
    session.close()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "failed"), [("scale", ["codes", "lowering/weights"]), ("module", ["codes", "lowering/weights"])]
)
def test_planted_defects(tmp_path: Path, what: str, failed: list[str]) -> None:
    quant, artifact = written(tmp_path)
    evidence = Evidence(artifact, quant.model, quant, Rocm("iree"), tmp_path)
    evidence.sequences = SEQUENCES[:1]
    if what == "scale":
        name = "model.layers.0.mlp.down_proj.weight"
        path = artifact.directory / iree.ARCHIVE
        data, scale = bytearray(path.read_bytes()), np.asarray(quant[name].scale)
        at = data.index(scale.tobytes())
        data[at : at + 2] = (scale[:1, 0] * np.float16(4)).tobytes()
        path.write_bytes(data)
    else:  # tokens look at what comes after them
        path = artifact.directory / iree.MLIR
        path.write_text(path.read_text().replace("arith.cmpi ule", "arith.cmpi uge"))
    try:
        found = [
            *gates.guarded("codes", gates.codes, evidence),
            *gates.guarded("lowering", gates.lowering, evidence),
        ]
    finally:
        evidence.close()
    assert [gate.name for gate in found if gate.status == "failed"][: len(failed)] == failed, found


# The compiler


@pytest.mark.slow
@pytest.mark.parametrize("arch", sorted(iree_compiler.CHIPS))
def test_every_chip(tmp_path: Path, arch: str) -> None:
    """A product with codes, as the graph has it, becomes the chip's own code."""
    quant, module = quantized(tmp_path), Module()
    for name, tokens in (("prefill", 16), ("decode", 1)):
        ops = IreeOps(Weights(quant, 64, 16), module, tokens, last=False)
        y = ops.linear(
            "layers.0.attention.q", Value("%x", (tokens, 128)), "model.layers.0.self_attn.q_proj.weight", None
        )
        ops.f.finish(name, {"x": f"tensor<{tokens}x128xf32>"}, y)
    (tmp_path / "model.mlir").write_text(module.text())
    assert arch.encode() in iree_compiler.compiled(tmp_path / "model.mlir", arch).read_bytes()


@pytest.mark.slow
def test_a_module_that_was_altered(tmp_path: Path) -> None:
    """What was compiled is what the compiler makes of the text: the twin is of the same module."""
    quant, device = quantized(tmp_path), Rocm("iree", arch="gfx1201", prefill_chunk=16)
    (tmp_path / "artifact").mkdir()
    artifact = device.export(quant, tmp_path / "artifact")
    assert "model_gfx1201.vmfb" in artifact.files
    list(device.read_codes(artifact, quant))
    path = artifact.directory / "model_gfx1201.vmfb"
    path.write_bytes(path.read_bytes()[:-100] + bytes(100))
    with pytest.raises(PackageError, match=r"model_gfx1201\.vmfb is not what iree-base-compiler .* makes of"):
        list(device.read_codes(artifact, quant))


@pytest.mark.slow
def test_the_compiler_gives_the_same_bytes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the codes gate relies on where another machine has compiled the module."""
    module, made = tmp_path / "model.mlir", []
    module.write_text(
        "func.func @f(%x: tensor<64x64xf32>, %y: tensor<64x64xf32>, %z: tensor<64x64xf32>) -> tensor<64x64xf32> {\n"
        "  %s = linalg.matmul ins(%x, %y : tensor<64x64xf32>, tensor<64x64xf32>) outs(%z : tensor<64x64xf32>) -> tensor<64x64xf32>\n"
        "  return %s : tensor<64x64xf32>\n}"
    )
    for name in ("one", "two"):
        monkeypatch.setenv("TAPEOUT_CACHE", str(tmp_path / name))
        made.append(iree_compiler.compiled(module, "gfx1100").read_bytes())
    assert made[0] == made[1]


def test_a_module_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAPEOUT_CACHE", str(tmp_path))
    module = tmp_path / "model.mlir"
    module.write_text("func.func @f(%x: tensor<4xf32>) -> tensor<4xf32> { return %x : tensor<4xf32> }")
    first = iree_compiler.compiled(module, iree_compiler.HOST)
    before = first.stat().st_mtime_ns
    assert iree_compiler.compiled(module, iree_compiler.HOST) == first
    assert first.stat().st_mtime_ns == before


def test_a_compiler_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own words, and a command that does it again: the text is kept where the command finds it."""
    monkeypatch.setenv("TAPEOUT_CACHE", str(tmp_path / "cache"))
    module = tmp_path / "model.mlir"
    module.write_text("func.func @f() -> tensor<4xf32> { return %x : tensor<4xf32> }")
    with pytest.raises(
        RuntimeCrash, match=r"iree-compile ended with 1 for gfx942: .*undeclared SSA value"
    ) as error:
        iree_compiler.compiled(module, "gfx942")
    command = str(error.value).rpartition("To do it again: ")[2]
    again = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert again.returncode == 1
    assert "undeclared SSA value" in again.stderr


def test_a_compiler_that_takes_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAPEOUT_CACHE", str(tmp_path / "cache"))
    slow = tmp_path / "iree-compile"
    slow.write_text("#!/bin/sh\necho half way >&2\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(iree_compiler, "_command", lambda: slow)
    module = tmp_path / "model.mlir"
    module.write_text("")
    begin = time.monotonic()
    with pytest.raises(RuntimeCrash, match=r"was stopped after 1 s for gfx942: half way\. To do it again: "):
        iree_compiler.compiled(module, "gfx942", timeout_s=1)
    assert time.monotonic() - begin < 30


def test_without_the_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs none is written, and the package says what is not in it."""
    monkeypatch.setattr(iree_compiler, "_command", lambda: tmp_path / "absent")
    quant = quantized(tmp_path)
    (tmp_path / "artifact").mkdir()
    artifact = Rocm("iree").export(quant, tmp_path / "artifact")
    assert {iree.MLIR, iree.ARCHIVE} <= set(artifact.files)
    assert not list(artifact.directory.glob("*.vmfb"))
    assert any(
        "was not compiled for gfx942: iree-base-compiler is not installed: pip install" in note
        for note in artifact.notes
    )
    assert [name for name, _ in Rocm("iree").read_codes(artifact, quant)]
    with pytest.raises(MissingToolchain, match=r"pip install 'tapeout\[rocm\]'") as error:
        open_session(str(artifact.directory), "model_gfx942.vmfb")
    assert error.value.status == 3


# Flags


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"format": "iree", "arch": "gfx943"}, r"'gfx943' is not a chip .*did you mean 'gfx942'\?.*gfx1201"),
        ({"arch": "gfx1100"}, r"--arch is not of the format compressed-tensors\. It is of: iree\."),
        ({"format": "iree", "max_shard_size": "1G"}, r"--max-shard-size is not of the format iree"),
        ({"format": "iree", "prefill_chunk": 0}, r"--prefill-chunk is 0; what fits: 1 or more"),
    ],
)
def test_flags_that_do_not_fit(given: dict[str, Any], told: str) -> None:
    with pytest.raises(TapeoutError, match=told):
        target("rocm", **given)


def test_the_memory_of_a_context_is_that_of_its_caches(tmp_path: Path) -> None:
    """As the module declares them: the rows of the context and of one chunk."""
    quant, artifact = written(tmp_path, family="deepseek_v3", fields=LATENT)
    said = [
        line for line in (artifact.directory / iree.MLIR).read_text().split("\n") if "public mutable" in line
    ]
    shapes = [line.rpartition("tensor<")[2].removesuffix("xf32>").split("x") for line in said]
    expected = sum(4 * int(np.prod([int(size) for size in shape])) for shape in shapes)
    device = Rocm("iree", prefill_chunk=16)
    assert device.memory(quant.model.decoder, artifact.context).cache == expected


def test_the_card_names_the_files(tmp_path: Path) -> None:
    _, artifact = written(tmp_path)
    said = Rocm("iree", arch="gfx1201").card(artifact)
    for words in ("model_gfx1201.vmfb", "model.irpa", "RX 9070", "not run on AMD hardware", "np.zeros(16"):
        assert words in said


def test_targets_know_the_format() -> None:
    assert "rocm --format iree" in targets.variants("rocm")
