"""Rounding with data: what it computes, that it is worth it, and that nothing but its inputs decides the bytes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapeout.errors import ModelError, RecipeError, SchemeError
from tapeout.generated import write_model
from tapeout.models import load
from tapeout.models.graph import decoder
from tapeout.models.torch_ops import TorchOps, one_core_each
from tapeout.quantize import SCHEMES, Calibration, Quantized, quantize
from tapeout.quantize.lattice import Floats, dequantize, fit, nearest, tensor_scale

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from tapeout.quantize import gptq  # noqa: E402 - needs torch

TEXT = "".join(chr(32 + (i * 37 + i * i // 7) % 95) for i in range(4000))
ROUNDED = [name for name, scheme in SCHEMES.items() if scheme.kind != "none"]


@pytest.fixture
def text(tmp_path: Path) -> Calibration:
    (tmp_path / "text.txt").write_text(TEXT)
    return Calibration(tmp_path / "text.txt", sequences=12, length=48)


@pytest.fixture(scope="module")
def pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(2, initializer=one_core_each)


def hessian(rows: int, into: int, seed: int = 0) -> tuple[Any, Any]:
    """Inputs [rows, in] whose columns hang together and differ in size, as a trained network's do, and their Σ x xᵀ."""
    random = np.random.default_rng(seed)
    x = random.standard_normal((rows, into)) @ random.standard_normal((into, into)) * into**-0.5
    x *= np.exp(random.normal(0, 1, into))
    x = torch.from_numpy(x.astype(np.float32))
    return x, x.T @ x


# GPTQ


@pytest.mark.parametrize("into", [40, 512, 1100])  # less than a tile, one, and two and a bit
def test_the_factor_is_that_of_the_inverse(pool: ThreadPoolExecutor, into: int) -> None:
    _, h = hessian(2 * into, into)
    factor = gptq.factorize(h.clone(), pool)
    assert list(np.diff(h.diagonal().numpy()[factor.order]) <= 0) == [True] * (into - 1)
    damped = h.double().numpy()[np.ix_(factor.order, factor.order)]
    damped += np.eye(into) * factor.damping * float(h.diagonal().double().mean())
    upper = factor.upper.double().numpy()
    assert np.array_equal(upper, np.triu(upper))
    # float32: errors of 2^-24 times the condition number, which damping by 1 % of the mean bounds by a few thousands.
    assert np.abs(upper.T @ upper @ damped - np.eye(into)).max() < 2e-3
    assert factor.importance[factor.order] == pytest.approx(np.diag(upper) ** -2, rel=1e-5)


def test_the_codes_are_those_of_the_papers_algorithm(pool: ThreadPoolExecutor) -> None:
    """A second implementation, column by column in float64 with the inverse itself, as equation (3) of the paper has it."""
    scheme, into = SCHEMES["int4-g32"], 160
    weight = np.random.default_rng(3).standard_normal((150, into)).astype(np.float32)
    _, h = hessian(400, into)
    factor = gptq.factorize(h.clone(), pool)
    grid = fit(weight, scheme, factor.importance)
    found = gptq.round_gptq(weight, scheme, factor, grid, pool)
    damped = h.double().numpy() + np.eye(into) * factor.damping * float(h.diagonal().double().mean())
    left, codes = weight.astype(np.float64), np.zeros(weight.shape, int)
    remaining = list(factor.order)
    for column in factor.order:
        inverse = np.linalg.inv(damped[np.ix_(remaining, remaining)])
        scale = grid.scale[:, column // 32].astype(np.float64)
        codes[:, column] = np.clip(np.rint(left[:, column] / scale), -8, 7) + 8
        error = (left[:, column] - (codes[:, column] - 8) * scale) / inverse[0, 0]
        left[:, remaining] -= error[:, None] * inverse[0]
        remaining.pop(0)
    # A weight within float32's rounding of the middle between two codes may fall to either side, and moves what follows.
    assert (found != codes).mean() < 2e-3


@pytest.mark.parametrize("name", ROUNDED)
def test_made_good_errors_are_smaller_on_every_lattice(pool: ThreadPoolExecutor, name: str) -> None:
    scheme = SCHEMES[name]
    weight = np.random.default_rng(1).standard_normal((64, 256)).astype(np.float32)
    x, h = hessian(600, 256)
    factor = gptq.factorize(h, pool)
    whole = tensor_scale(float(np.abs(weight).max()), scheme)
    grid = fit(weight, scheme, factor.importance, tensor_scale=whole)

    def loss(codes: Any) -> float:
        off = torch.from_numpy(dequantize(codes, scheme, grid) - weight)
        return float((x @ off.T).pow(2).sum())

    codes = gptq.round_gptq(weight, scheme, factor, grid, pool)
    assert loss(codes) < 0.8 * loss(nearest(weight, scheme, grid))


def test_a_hessian_that_has_no_factor_is_damped_more_then_given_up(pool: ThreadPoolExecutor) -> None:
    good = torch.eye(8)
    good[0, 1] = 1.05  # not positive definite; a damping of 10 % of the mean diagonal makes it so
    assert gptq.factorize(good.clone(), pool).damping == 0.1
    good[0, 1] = 9.0
    with pytest.raises(gptq.NotPositiveDefinite, match="100% of its mean diagonal still"):
        gptq.factorize(good, pool)
    with pytest.raises(gptq.NotPositiveDefinite, match="NaN"):
        gptq.factorize(torch.full((4, 4), float("nan")), pool)


# A whole model


def distance(quant: Quantized, calibration: Calibration) -> float:
    """Squared difference of the logits from the original model's, on the calibration windows."""
    tokens = torch.from_numpy(calibration.tokens(quant.model).astype(np.int64))
    own = {name: torch.from_numpy(quant.float32(name)) for name in quant}
    original = {name: torch.from_numpy(quant.model.checkpoint[name].float32()) for name in quant}
    total = 0.0
    with torch.inference_mode():
        for ids in tokens:
            one, other = (decoder(TorchOps(w.__getitem__), quant.model.config, ids) for w in (original, own))
            total += float((one - other).pow(2).mean())
    return total / len(tokens)


def test_data_is_worth_it(tmp_path: Path, text: Calibration) -> None:
    model = load(write_model(tmp_path / "tiny", "llama", dtype="F32"))
    found = {}
    for rounding, data in (("rtn", None), ("rtn+data", text), ("gptq", text), ("awq", text)):
        quant = quantize(model, "int4-g32", rounding=rounding.split("+")[0], calibration=data)
        found[rounding] = distance(quant, text)
    assert found["gptq"] < 0.8 * found["rtn"]
    assert found["rtn+data"] < found["rtn"]
    assert found["awq"] < 1.1 * found["rtn"]  # random weights have no outliers for it to find


@pytest.mark.parametrize("rounding", ["awq", "smoothquant"])
@pytest.mark.parametrize(
    ("family", "fields", "folded"),
    [
        ("llama", {}, ["0.input", "1.post_attention"]),
        ("llama", {"num_key_value_heads": 8, "attention_bias": True, "mlp_bias": True}, ["0.input"]),
        ("gemma3_text", {}, ["0.input", "1.pre_feedforward"]),
        ("phi3", {"num_key_value_heads": 2}, ["0.input", "1.post_attention"]),
        ("qwen2_moe", {"mlp_only_layers": [0]}, ["0.post_attention", "1.input"]),
        ("deepseek_v2", {}, ["0.post_attention", "1.self_attn.q_a", "1.self_attn.kv_a"]),
    ],
)
def test_folded_scales_leave_the_function(
    tmp_path: Path, text: Calibration, rounding: str, family: str, fields: dict[str, Any], folded: list[str]
) -> None:
    """At 8 bits next to nothing is lost, so a scale that is not taken off where it should be would show."""
    model = load(write_model(tmp_path / "tiny", family, fields, dtype="F32"))
    quant = quantize(model, "int8-g32", rounding=rounding, calibration=text)
    for norm in folded:
        name = f"model.layers.{norm}_layernorm.weight"
        assert name in quant.folded
        assert not np.array_equal(quant.float32(name), model.checkpoint[name].float32())
    routed = model.config.routed(1)
    assert ("model.layers.1.post_attention_layernorm.weight" in quant.folded) == (
        routed is None and family != "gemma3_text"  # experts have no scale that suits them all
    )
    plain = quantize(model, "int8-g32")
    assert distance(quant, text) < 4 * distance(plain, text)


# Experts


def test_an_expert_is_rounded_by_its_own_tokens(tmp_path: Path, text: Calibration) -> None:
    """The Hessian of one expert, by hand, gives the codes that the store has."""
    model = load(write_model(tmp_path / "tiny", "mixtral", {"num_hidden_layers": 1}, dtype="F32"))
    plan = {"*": "none", "*.experts.2.w1": "int4-g32"}  # nothing before it is rounded
    quant = quantize(model, "int4-g32", rounding="gptq", calibration=text, overrides=plan)
    seen: dict[str, Any] = {}

    class Watched(TorchOps):
        def linear(self, name: str, x: Any, weight: str, bias: str | None) -> Any:
            seen.setdefault(weight, []).append(x)
            return super().linear(name, x, weight, bias)

    name = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    for ids in text.tokens(model):
        ops = Watched(lambda name: torch.from_numpy(model.checkpoint[name].float32()))
        decoder(ops, model.config, torch.from_numpy(ids.astype(np.int64)))
    x = torch.cat(seen[name])
    tokens = text.tokens(model).size
    assert 0.1 * tokens < len(x) < 0.9 * tokens
    with ThreadPoolExecutor(1, initializer=one_core_each) as pool:
        factor = gptq.factorize(x.T @ x, pool)
        weight = model.checkpoint[name].float32()
        grid = fit(weight, SCHEMES["int4-g32"], factor.importance)
        codes = gptq.round_gptq(weight, SCHEMES["int4-g32"], factor, grid, pool)
    off = dequantize(codes, SCHEMES["int4-g32"], grid)
    # The Hessian is summed in another order: a weight in the middle between two codes may fall to either side.
    assert (np.abs(quant.float32(name) - off) > 1e-6).mean() < 2e-3


@pytest.mark.parametrize(
    ("rounding", "scheme"), [("gptq", "int4-g32"), ("awq", "int4-g32"), ("rtn", "w8a8-static")]
)
def test_experts_that_few_tokens_reach_are_rounded_without_data_and_told(
    tmp_path: Path, text: Calibration, rounding: str, scheme: str
) -> None:
    model = write_model(tmp_path / "tiny", "mixtral", {"num_hidden_layers": 1}, dtype="F32")

    def prefer(values: Floats) -> None:
        values[[0, 3]] = values[1]  # one score for three: two at most are chosen, and never the last

    edit(model, "model.layers.0.block_sparse_moe.gate.weight", prefer)
    quant = quantize(load(model), scheme, rounding=rounding, calibration=text)
    (note,) = [note for note in quant.notes if "experts" in note]
    assert "model.layers.0.block_sparse_moe.experts.*: rounded without data, since fewer than 12.5%" in note
    assert re.search(r"them: 3 \(0\) \(tokens\)", note)
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in quant
    if scheme == "int4-g32":
        lone = quantize(load(model), scheme)
        for part in ("w1", "w2", "w3"):
            name = f"model.layers.0.block_sparse_moe.experts.3.{part}.weight"
            assert np.array_equal(quant.float32(name), lone.float32(name))
    else:
        name = "model.layers.0.block_sparse_moe.experts.{}.w1.weight"
        assert quant[name.format(3)].input_scale >= quant[name.format(1)].input_scale > 0


def test_data_is_worth_it_to_experts(tmp_path: Path, text: Calibration) -> None:
    model = load(write_model(tmp_path / "tiny", "qwen3_moe", {"num_hidden_layers": 1}, dtype="F32"))
    loss = []
    for rounding in ("rtn", "gptq"):
        quant = quantize(
            model, "int4-g32", rounding=rounding, calibration=text, overrides={"*self_attn*": "none"}
        )
        plain = quantize(model, "int4-g32", overrides={"*self_attn*": "none"})
        loss.append(distance(quant, text) / distance(plain, text))
    assert loss[1] < 0.85
    assert loss[1] < loss[0] < 1.0


@pytest.mark.parametrize(
    ("rounding", "scheme"), [("gptq", "int4-g32"), ("awq", "int4-g32-asym"), ("rtn", "w8a8-static")]
)
def test_the_same_bytes_for_any_number_of_threads(
    tmp_path: Path, text: Calibration, rounding: str, scheme: str
) -> None:
    model = load(
        write_model(tmp_path / "tiny", "mistral", {"sliding_window": 20, "tie_word_embeddings": True})
    )
    digests = {
        quantize(
            model, scheme, rounding=rounding, calibration=text, threads=threads, out=tmp_path / f"{threads}"
        ).digest
        for threads in (1, 2, 5)
    }
    assert len(digests) == 1
    assert not (tmp_path / "1" / ".calibration").exists()


def test_static_activations_keep_the_range_of_their_inputs(tmp_path: Path, text: Calibration) -> None:
    model = load(write_model(tmp_path / "tiny", "llama", dtype="F32"))
    quant = quantize(model, "w8a8-static", calibration=text, overrides={"lm_head": "int8"})
    tensor = quant["model.layers.0.self_attn.q_proj.weight"]
    ids = text.tokens(model)
    x = model.checkpoint["model.embed_tokens.weight"].float32()[ids]
    # The embedding stays float while the layers are calibrated.
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    normed *= model.checkpoint["model.layers.0.input_layernorm.weight"].float32()
    assert tensor.input_scale == pytest.approx(np.abs(normed).max() / 127, rel=1e-5)
    # Rounding does not change what the inputs of the first layer are.
    again = quantize(model, "w8a8-static", rounding="gptq", calibration=text, overrides={"lm_head": "int8"})
    assert again["model.layers.0.self_attn.q_proj.weight"].input_scale == tensor.input_scale
    with pytest.raises(SchemeError, match=r"of model\.embed_tokens\.weight needs .* an embedding has none"):
        quantize(model, "w8a8-static", calibration=text, overrides={"model.embed_tokens": "w8a8-static"})


def test_the_device_is_part_of_the_store(tmp_path: Path, text: Calibration) -> None:
    model = load(write_model(tmp_path / "tiny", "llama"))
    quant = quantize(model, "int4-g32", rounding="gptq", calibration=text, device="cpu")
    assert quant.device == "cpu"
    assert quantize(model, "int4-g32").device is None
    assert quantize(model, "int4-g32", rounding="gptq", calibration=text).device == (
        torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    )


def test_codes_that_another_device_chose_are_taken_as_they_stand(
    tmp_path: Path, text: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cell on a GPU's machine finds the codes that a machine without one made; who names a device gets what it computes."""
    model = load(write_model(tmp_path / "tiny", "llama"))

    def made(device: str | None = None, scheme: str = "int4-g32") -> Quantized:
        return quantize(model, scheme, rounding="gptq", calibration=text, device=device)

    here = made("cpu")
    monkeypatch.setattr("tapeout.quantize.torch_device", lambda device: ("cpu", "some GPU"))
    assert (made().digest, made().device) == (here.digest, "cpu")
    assert made(scheme="int4-g64").device == "some GPU"  # of which there are none yet
    there = made("cuda")
    assert (there.device, there.directory) == ("some GPU", made().directory)
    shutil.rmtree(there.directory)
    next((here.directory / "tensors").iterdir()).write_bytes(b"")  # damaged, and so none
    assert made().device == "some GPU"


@pytest.mark.device
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use")
@pytest.mark.parametrize("rounding", ["gptq", "awq"])
def test_a_gpu_chooses_the_same_codes_but_for_ties(tmp_path: Path, text: Calibration, rounding: str) -> None:
    model = load(write_model(tmp_path / "tiny", "llama", {"hidden_size": 256}, dtype="F32"))
    here, there = (
        quantize(model, "int4-g32", rounding=rounding, calibration=text, device=device)
        for device in ("cpu", "cuda")
    )
    assert (here.device, there.device) == ("cpu", torch.cuda.get_device_name())
    changed = total = 0
    for name, scheme in here.schemes.items():
        if scheme.kind != "none":
            mine, theirs = here[name].codes(), there[name].codes()
            changed, total = changed + int((mine != theirs).sum()), total + mine.size
    # A float32 sum in another order moves a weight by 1e-6 of its size, a code is some 0.1 of it: a turned code is rare, but in
    # GPTQ the columns after it differ by what is made good, and a clipping factor that ties moves a group.
    assert changed < 0.02 * total
    assert distance(there, text) == pytest.approx(distance(here, text), rel=0.05)


KILLED = """
import json, os, signal, sys
from pathlib import Path
from tapeout.models import load
from tapeout.quantize import Calibration, quantize, store
left = int(sys.argv[4])
write = store.write_parts
def counted(*args):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(*args)
store.write_parts = counted
quant = quantize(load(sys.argv[1]), "int4-g32", rounding=sys.argv[3], calibration=Calibration(Path(sys.argv[2]), 4, 32))
print(json.dumps([quant.digest, list(quant.notes), dict(quant.fallbacks)]))
"""


# Before the n-th tensor that a run writes: in the first layer, then in the second, then at the head. AWQ writes norms as well.
@pytest.mark.slow
@pytest.mark.parametrize(("rounding", "points"), [("gptq", (2, 9, 9)), ("awq", (2, 13, 11))])
def test_a_killed_run_reaches_the_same_digest(
    tmp_path: Path, text: Calibration, rounding: str, points: tuple[int, ...]
) -> None:
    model = write_model(tmp_path / "tiny", "llama", dtype="F32")
    # Things to tell of the first layer, which the last of the killed runs does not see any more.
    edit(model, "model.layers.0.input_layernorm.weight", lambda values: values.__setitem__(3, 0))
    edit(model, "model.layers.0.self_attn.k_proj.weight", lambda values: values.__setitem__((5, 6), 1e7))

    def run(cache: str, kill_at: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-P", "-c", KILLED, model, text.text, rounding, kill_at]
        return subprocess.run(
            [str(word) for word in command],
            env=os.environ | {"TAPEOUT_CACHE": str(tmp_path / cache)},
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    undisturbed = json.loads(run("whole", 0).stdout)
    digest, notes, fallbacks = undisturbed
    assert len(digest) == 64
    assert fallbacks.keys() == {"model.layers.0.self_attn.k_proj.weight"}
    dead = "model.layers.0.self_attn.q_proj: 1 of 64 input channels are zero on all calibration data"
    assert (dead in notes) == (rounding == "gptq")
    for kill_at in points:
        assert run("cut", kill_at).returncode == -signal.SIGKILL
    assert json.loads(run("cut", 0).stdout) == undisturbed


def test_a_tensor_that_stays_float_keeps_the_scales_that_it_took_up(
    tmp_path: Path, text: Calibration
) -> None:
    model = write_model(tmp_path / "tiny", "llama", dtype="F32")
    # A gate of a channel that nothing reads.
    edit(model, "model.layers.0.mlp.gate_proj.weight", lambda values: values.__setitem__((5, 6), 1e7))
    edit(model, "model.layers.0.mlp.down_proj.weight", lambda values: values.__setitem__((slice(None), 5), 0))
    quant = quantize(load(model), "int8-g32", rounding="awq", calibration=text)
    assert quant.fallbacks.keys() == {"model.layers.0.mlp.gate_proj.weight"}
    assert "model.layers.0.mlp.gate_proj.weight" in quant.folded
    plain = quantize(load(model), "int8-g32")
    assert distance(quant, text) < 4 * distance(plain, text)


# Bad input


@pytest.mark.parametrize(
    ("content", "fields", "message"),
    [
        (b"", {}, "has 0 tokens for tiny; at least 48 are needed"),
        (b"short", {}, "has 5 tokens for tiny; at least 48"),
        (b"abc\xff", {}, "is not UTF-8: invalid start byte at byte 3"),
        (b"x" * 100, {"sequences": 0}, "at least 1 sequence"),
        (b"x" * 100, {"length": 1}, "of 2 tokens; found 12 of 1"),
    ],
)
def test_a_text_that_is_none(tmp_path: Path, content: bytes, fields: dict[str, Any], message: str) -> None:
    model = load(write_model(tmp_path / "tiny", "llama"))
    (tmp_path / "text.txt").write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        quantize(
            model,
            "int4-g32",
            rounding="gptq",
            calibration=Calibration(tmp_path / "text.txt", **{"sequences": 12, "length": 48, **fields}),
        )


def test_texts_of_other_kinds(tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "tiny", "llama"))
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": f"line {i} " * 9}) for i in range(9)))
    assert Calibration(tmp_path / "a.jsonl", 4, 32).tokens(model).shape == (4, 32)
    (tmp_path / "b.jsonl").write_text('{"words": 1}')
    with pytest.raises(RecipeError, match="is not JSON lines of objects with a 'text'"):
        Calibration(tmp_path / "b.jsonl").tokens(model)
    with pytest.raises(RecipeError, match="cannot be read: No such file"):
        Calibration(tmp_path / "absent.txt").tokens(model)
    first, again, other = (Calibration(tmp_path / "a.jsonl", 4, 32, seed).tokens(model) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    directory = write_model(tmp_path / "tiny", "llama", {"vocab_size": 100, "eos_token_id": 1})
    (tmp_path / "text.txt").write_text(TEXT)
    with pytest.raises(ModelError, match=r"gives the id \d+ for .*; its vocabulary has 100"):
        Calibration(tmp_path / "text.txt", 4, 32).tokens(load(directory))


def edit(model: Path, name: str, change: Any) -> None:
    """Change one tensor of a checkpoint in place."""
    tensor = load(model).checkpoint[name]
    values: Floats = np.array(tensor.float32())
    change(values)
    with tensor.file.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(values.tobytes())


def test_activations_that_are_no_numbers_name_the_first_module(tmp_path: Path, text: Calibration) -> None:
    model = write_model(tmp_path / "tiny", "llama", dtype="F32")

    def burst(values: Floats) -> None:
        values[:] = 3e38

    edit(model, "model.layers.1.self_attn.v_proj.weight", burst)
    with pytest.raises(
        ModelError, match=r"inputs of model\.layers\.1\.self_attn\.o_proj are NaN or infinite"
    ):
        quantize(load(model), "int4-g32", rounding="gptq", calibration=text, overrides={"*v_proj": "none"})


def test_a_dead_channel_is_told_and_survives(tmp_path: Path, text: Calibration) -> None:
    model = write_model(tmp_path / "tiny", "llama", dtype="F32")

    def silence(values: Floats) -> None:
        values[[3, 9]] = 0

    edit(model, "model.layers.0.input_layernorm.weight", silence)
    quant = quantize(load(model), "int4-g32", rounding="gptq", calibration=text)
    assert (
        "model.layers.0.self_attn.q_proj: 2 of 64 input channels are zero on all calibration data"
        in quant.notes
    )
    weight = quant.float32("model.layers.0.self_attn.q_proj.weight")
    assert np.isfinite(weight).all()
    assert np.abs(weight[:, 3]).max() > 0  # nothing says that it is zero on other data


def test_weights_that_are_no_numbers_are_named(tmp_path: Path, text: Calibration) -> None:
    model = write_model(tmp_path / "tiny", "llama", dtype="F32")
    edit(model, "lm_head.weight", lambda values: values.__setitem__((5, 6), np.nan))
    with pytest.raises(ModelError, match=r"lm_head\.weight in .* holds nan at \[5, 6\]"):
        quantize(load(model), "int4-g32", rounding="gptq", calibration=text)
