"""The decoder, written once, is every family's: its logits are transformers', whatever the prompt, cache and position."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from tapeout.generated import ENCODERS, write_model
from tapeout.models import Model, load, trace
from tapeout.models.decoder import Moe
from tapeout.models.families import known
from tapeout.models.graph import EMBEDDING, HEAD, NORM, decoder
from tapeout.models.rope import Rope
from tapeout.models.torch_ops import Cache, TorchOps

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Logits of size 1 come out of two layers of five matmuls in a row, of up to 128 products of size 1 each: a sum of n of them is
# off by about sqrt(n) 2^-24, here and in transformers, and the largest of some thousand such errors by four times that.
TOLERANCE = 10 * 128**0.5 * 2**-24 * 4

DECODERS = [
    family for family in known() if family not in {*ENCODERS, "t5"}
]  # t5: tests/models/test_seq2seq.py
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 5.0, 9.0]}
LONGROPE = {"rope_type": "longrope"} | FACTORS
CASES: list[tuple[str, dict[str, Any]]] = [
    *[(family, {}) for family in DECODERS],
    *[
        (family, {"num_key_value_heads": heads})
        for family in ("llama", "gemma2", "phi3", "qwen3")
        for heads in (8, 1)
    ],
    ("llama", {"attention_bias": True, "mlp_bias": True, "hidden_act": "gelu"}),
    ("llama", {"head_dim": 24, "tie_word_embeddings": True}),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    ("llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 32}),
    ("llama", {"rope_scaling": LLAMA3}),
    ("llama", {"rope_scaling": YARN}),
    (
        "llama",
        {"rope_scaling": YARN | {"truncate": False, "beta_fast": 8, "beta_slow": 2, "attention_factor": 1.5}},
    ),
    ("llama", {"rope_scaling": LONGROPE, "original_max_position_embeddings": 48}),
    ("mistral", {"sliding_window": 24}),
    ("mistral", {"sliding_window": 2}),
    ("mixtral", {"sliding_window": 24, "num_experts_per_tok": 1}),
    ("gemma", {"attention_bias": True, "hidden_act": "gelu"}),
    ("gemma2", {"attention_bias": True, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.0}),
    ("gemma2", {"layer_types": ["full_attention", "sliding_attention"], "attn_logit_softcapping": None}),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "final_logit_softcapping": 2.0}),
    (
        "gemma3_text",
        {
            "rope_theta": None,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            },
            "layer_types": ["full_attention", "sliding_attention"],
        },
    ),
    ("phi3", {"sliding_window": 24, "hidden_act": "gelu_pytorch_tanh"}),
    (
        "phi3",
        {
            "rope_scaling": {"type": "su", "original_max_position_embeddings": 48} | FACTORS,
            "original_max_position_embeddings": 48,
        },
    ),
    (
        "phi3",
        {
            "partial_rotary_factor": 0.5,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [2.0, 5.0]},
            "original_max_position_embeddings": 48,
        },
    ),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1}),
    (
        "qwen3",
        {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 0, "attention_bias": True},
    ),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 24, "norm_topk_prob": True}),
    ("qwen2_moe", {"mlp_only_layers": [0], "qkv_bias": False}),
    ("qwen3_moe", {"decoder_sparse_step": 2, "norm_topk_prob": False}),
    ("deepseek_v2", {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "attention_bias": True}),
    (
        "deepseek_v2",
        {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7}, "routed_scaling_factor": 3.0},
    ),
    ("deepseek_v3", {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}, "num_hidden_layers": 3}),
    ("deepseek_v3", {"rope_interleave": False, "norm_topk_prob": False, "first_k_dense_replace": 0}),
]


@pytest.fixture(autouse=True, scope="module")
def one_core() -> Iterator[None]:
    """Matrices this small are done before a second thread has woken up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def named(case: tuple[str, dict[str, Any]]) -> str:
    return "-".join(
        [case[0], *(f"{key}={value}" for key, value in case[1].items() if not isinstance(value, dict))]
    )[:80]


def prompt(tokens: int) -> Any:
    return torch.tensor([(i * 31 + i * i // 5 + 7) % 256 for i in range(tokens)])


def weights(model: Model) -> dict[str, Any]:
    return {name: torch.from_numpy(model.checkpoint[name].float32()) for name in model.specs}


def network(directory: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("case", CASES, ids=named)
@torch.inference_mode()
def test_logits_are_those_of_transformers(tmp_path: Path, case: tuple[str, dict[str, Any]]) -> None:
    model = load(write_model(tmp_path / "tiny", case[0], case[1], dtype="F32"))
    w, theirs = weights(model), network(model.directory)
    for tokens in (1, 2, 37, 75):  # 75: three windows of 24, past the trained context of every scaling
        ids = prompt(tokens)
        expected = theirs(ids[None]).logits[0]
        found = decoder(TorchOps(w.__getitem__), model.config, ids)
        assert float(expected.std()) > 0.3
        assert float((found - expected).abs().max()) < TOLERANCE
    # The last prompt once more, in steps: a single first token, an odd piece past the window, then one by one.
    ops, parts = TorchOps(w.__getitem__, Cache()), []
    cache = transformers.DynamicCache(config=theirs.config)
    for step in (ids[:1], ids[1:40], *ids[40:].split(1)):
        expected = theirs(step[None], past_key_values=cache, use_cache=True).logits[0]
        parts.append(decoder(ops, model.config, step))
        ops.cache.length += len(step)
        assert float((parts[-1] - expected).abs().max()) < TOLERANCE
    if model.config.rope.kind not in (
        "dynamic",
        "longrope",
    ):  # there what is cached was turned by other frequencies
        assert float((torch.cat(parts) - found).abs().max()) < TOLERANCE
    for layer, kept in ops.cache.kept.items():
        window = model.config.window(layer)
        assert kept[0].shape[1] == min(len(ids), window - 1 if window else len(ids))


@pytest.mark.parametrize("family", DECODERS)
def test_tensors_are_those_that_transformers_saves(tmp_path: Path, family: str) -> None:
    """What it has stacked in memory it saves as the Hub has it: a tensor for each expert."""
    model = load(write_model(tmp_path / "tiny", family, {"num_hidden_layers": 2}, dtype="F32"))
    network(model.directory).save_pretrained(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", "np") as saved:
        assert {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()} == {  # noqa: SIM118
            name: spec.shape for name, spec in model.specs.items()
        }
        for name in saved.keys():  # noqa: SIM118
            np.testing.assert_array_equal(saved.get_tensor(name), model.checkpoint[name].float32())
    again = load(tmp_path / "saved")  # its config, as transformers 5 writes one, says the same
    assert replace(again.config, pad_token_id=model.config.pad_token_id) == model.config


@pytest.mark.parametrize("family", DECODERS)
def test_the_graph_asks_for_every_tensor_and_names_every_value(tmp_path: Path, family: str) -> None:
    model = load(write_model(tmp_path / "tiny", family, {"num_hidden_layers": 2}, dtype="F32"))
    asked, names = {EMBEDDING, HEAD, NORM}, []
    for layer in range(model.config.num_layers):
        _, steps = trace.layer(model.config, layer)
        names += [step.name for step in steps]
        for step in steps:
            asked |= {arg for arg in step.args if isinstance(arg, str) and arg.startswith("model.")}
            if step.op == "experts":
                moe = step.args[-1]
                asked |= {name for e in range(moe.experts) for name in moe.weights(layer, e)}
    if model.config.tie_word_embeddings:
        asked.discard(HEAD)
    assert asked == set(model.specs)
    assert len(set(names)) == len(names)
    assert all(name.startswith(("layers.0.", "layers.1.")) for name in names)


def test_latents_are_what_is_cached(tmp_path: Path) -> None:
    model = load(write_model(tmp_path / "tiny", "deepseek_v3", {}, dtype="F32"))
    ops = TorchOps(weights(model).__getitem__, Cache())
    decoder(ops, model.config, prompt(9))
    for latent, key in ops.cache.kept.values():
        assert latent.shape == (1, 9, 32)
        assert key.shape == (1, 9, 8)


# Experts


def route(logits: list[list[float]], bias: list[float] | None = None, **fields: Any) -> tuple[Any, Any]:
    moe = Moe(len(logits[0]), fields.pop("top_k", 2), 8, (True,), **fields)
    ops = TorchOps(lambda name: torch.tensor(bias))
    return ops.route("", torch.tensor(logits), None if bias is None else "bias", moe)


def test_ties_go_to_the_lower_number() -> None:
    chosen, shares = route([[1.0, 3.0, 1.0, 3.0, 1.0], [0.0] * 5], top_k=3, renormalize=True)
    assert chosen.tolist() == [[1, 3, 0], [0, 1, 2]]
    assert shares[1].tolist() == pytest.approx([1 / 3] * 3)
    groups, _ = route([[0.0] * 8], top_k=2, groups=4, top_groups=2)
    assert groups.tolist() == [[0, 1]]


def test_a_bias_moves_the_choice_and_not_the_share() -> None:
    chosen, shares = route([[0.0, 1.0, 2.0, 3.0]], [9.0, 0.0, 0.0, 0.0], scoring="sigmoid", scale=2.0)
    assert chosen.tolist() == [[0, 3]]
    assert shares[0].tolist() == pytest.approx([2 * 0.5, 2 / (1 + np.exp(-3))])


def test_only_the_best_groups_compete() -> None:
    logits = [
        [5.0, -9.0, 3.0, 3.0, 4.0, -9.0]
    ]  # groups of two: best 5, 3, 4; best two 5, 6, 4 in order of sums of scores
    best, _ = route(logits, groups=3, top_groups=1, group_score="max")
    assert best.tolist() == [[0, 1]]
    both, _ = route(logits, groups=3, top_groups=1, group_score="top2", scoring="sigmoid")
    assert both.tolist() == [[2, 3]]


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "deepseek_v2", "deepseek_v3"])
@torch.inference_mode()
def test_experts_that_no_token_chose_and_scores_that_tie(tmp_path: Path, family: str) -> None:
    model = load(write_model(tmp_path / "tiny", family, {"num_hidden_layers": 2}, dtype="F32"))
    w, theirs = weights(model), network(model.directory)
    moe = model.config.moe
    state = theirs.state_dict()
    at = f"model.layers.1.{moe.router}.weight"
    # All experts' scores alike, and all experts: whichever are chosen, what they give is the same.
    w[at][:] = 0.0
    state[at.replace("block_sparse_moe", "mlp")][:] = 0.0
    if moe.correction_bias:
        w[f"model.layers.1.{moe.router}.e_score_correction_bias"][:] = 0.0
        state["model.layers.1.mlp.gate.e_score_correction_bias"][:] = 0.0
    for expert in range(1, moe.experts):
        for name, first in zip(moe.weights(1, expert), moe.weights(1, 0), strict=True):
            w[name][:] = w[first]
    for name in ("gate_up_proj", "down_proj"):
        state[f"model.layers.1.mlp.experts.{name}"][:] = state[f"model.layers.1.mlp.experts.{name}"][
            :1
        ].clone()
    ids, asked = prompt(11), []

    def ask(name: str) -> Any:
        asked.append(name)
        return w[name]

    found = decoder(TorchOps(ask), model.config, ids)
    assert float((found - theirs(ids[None]).logits[0]).abs().max()) < TOLERANCE
    # By the rule for ties the first experts are chosen, and no other is asked for its weights.
    used = {e for e in range(moe.experts) if moe.weights(1, e)[0] in asked}
    assert used == set(range(moe.top_k))


# Positions


ROPES = [
    Rope(5e5, dim=16),
    Rope(1e4, dim=8, interleaved=True),
    Rope(1e4, "linear", {"factor": 4.0}, dim=12),
]


@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope.kind)
def test_far_away_only_the_distance_counts(rope: Rope) -> None:
    """A property that float32 angles break: they are off by 200,000 · 2^-24 = 0.01 radians there."""
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 50, 16)).astype(np.float32))

    def scores(begin: int) -> Any:
        rotate: Callable[..., Any] = TorchOps(lambda name: None, Cache(begin))._rotate
        y = rotate(x, rope)
        return y @ y.mT

    # 16 products of sizes up to 10, whose cosines are rounded to float32.
    assert float((scores(200_000) - scores(0)).abs().max()) < 16 * 10 * 2**-24 * 4
    rotated: Any = TorchOps(lambda name: None, Cache(200_000))._rotate(x, rope)
    assert float((rotated - x).abs().max()) > 0.5
    assert torch.equal(rotated[..., rope.dim :], x[..., rope.dim :])
