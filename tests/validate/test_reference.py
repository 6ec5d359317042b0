from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tapeout.errors import ModelError, PackageError, TapeoutError
from tapeout.models import load
from tapeout.models.graph import decoder
from tapeout.models.torch_ops import TorchOps
from tapeout.quantize import QuantTensor, quantize
from tapeout.validate import reference

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

MakeModel = Callable[..., Path]
IDS = [(i * 37 + 11) % 256 for i in range(60)]
# float32 sums in another order: 2^-24 for each of about 10^2 terms, in units of logits near 1.
CLOSE = 2e-5


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
def test_original_is_transformers_itself(make_model: MakeModel, model_type: str) -> None:
    directory = make_model(model_type)
    plain = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        expected = plain(torch.tensor([IDS])).logits[0].numpy()
    session = reference.open_session(str(directory))
    assert session.facts.context == 256
    assert session.facts.runtime.startswith("transformers ")
    logits = session.prefill(IDS)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, atol=CLOSE)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scheme", ["int4-g32-asym", "nf4"])
def test_store_is_a_state_dict_made_by_hand(make_model: MakeModel, scheme: str, tied: bool) -> None:
    directory = make_model("llama", tie_word_embeddings=tied)
    quant = quantize(load(directory), scheme)
    by_hand = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    state = by_hand.state_dict()
    for name in quant:
        tensor = quant[name]
        if not isinstance(tensor, QuantTensor):
            continue
        codes, scale = tensor.codes(), np.repeat(tensor.scale.astype(np.float32), tensor.group, axis=1)
        zero = (
            0
            if tensor.zero_point is None
            else np.repeat(tensor.zero_point.astype(np.float32), tensor.group, axis=1)
        )
        state[name].copy_(torch.from_numpy((tensor.codebook[codes] - zero) * scale))
    with torch.inference_mode():
        expected = by_hand(torch.tensor([IDS])).logits[0].numpy()
    session = reference.open_session(str(directory), store=str(quant.directory))
    head, embedding = session._network.lm_head.weight, session._network.model.embed_tokens.weight
    assert (head.data_ptr() == embedding.data_ptr()) == tied
    np.testing.assert_allclose(session.prefill(IDS), expected, atol=CLOSE)
    original = reference.open_session(str(directory)).prefill(IDS)
    assert np.abs(original - expected).max() > 0.05


def test_decode_is_prefill_past_the_window(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = make_model("mistral", sliding_window=24)
    session = reference.open_session(str(directory))
    at_once = session.prefill(IDS)
    session.reset()
    np.testing.assert_allclose([session.decode(token) for token in IDS], at_once, atol=CLOSE)
    assert session._cache.layers[0].keys.shape[2] < 24  # the cache never grows past the window
    # Chunks that begin inside and outside the window.
    for size in (7, 24, 40):
        monkeypatch.setattr(reference, "_CHUNK", size)
        session.reset()
        np.testing.assert_allclose(session.prefill(IDS), at_once, atol=CLOSE)
        session.reset()
        np.testing.assert_allclose(session.append(IDS), at_once[-1:], atol=CLOSE)
    whole = reference.open_session(str(make_model("mistral", name="whole", sliding_window=None)))
    other = whole.prefill(IDS)
    np.testing.assert_allclose(other[:24], at_once[:24], atol=CLOSE)
    assert np.abs(other[24:] - at_once[24:]).max() > 0.05


def test_first_layers_only(make_model: MakeModel) -> None:
    directory = make_model("llama")
    quant = quantize(load(directory), "int4-g32")
    cut = reference.open_session(str(directory), store=str(quant.directory), layers=1)
    full = reference.open_session(str(directory), store=str(quant.directory))
    full._network.model.layers = full._network.model.layers[:1]
    np.testing.assert_allclose(cut.prefill(IDS), full.prefill(IDS), atol=CLOSE)


def test_q8_0_is_gguf_q8_0_but_for_ties() -> None:
    gguf_quants = pytest.importorskip("gguf.quants")
    kind = pytest.importorskip("gguf").GGMLQuantizationType.Q8_0
    random = np.random.default_rng(0)
    x = (random.standard_normal((50, 256)) * 10.0 ** random.integers(-6, 3, (50, 1))).astype(np.float32)
    x[0] = 0
    x[1, :32] = np.arange(32) * 2.0  # amax 62: multiples of 127 / 62 * 2, no ties
    expected = gguf_quants.dequantize(gguf_quants.quantize(x, kind), kind)
    found = reference.round_q8_0(torch.from_numpy(x)).numpy()
    step = np.repeat(np.abs(x.reshape(50, 8, 32)).max(-1) / 127, 32, axis=1)
    # gguf multiplies by 1/d and not by 127/amax: a value within float32's error of a tie may go the other way.
    apart = np.abs(found - expected) > 1e-3 * step
    fraction = np.abs(x / np.where(step == 0, 1, step)) % 1
    assert np.all(np.abs(fraction[apart] - 0.5) < 1e-4)
    assert apart.mean() < 1e-3
    # Ties: to even here, as ggml's kernels for x86 and ARM do; away from zero in gguf.
    ties = np.zeros((1, 32), np.float32)
    ties[0, :5] = [127, 0.5, 1.5, -0.5, -2.5]
    assert reference.round_q8_0(torch.from_numpy(ties))[0, :5].tolist() == [127, 0, 2, 0, -2]
    assert gguf_quants.dequantize(gguf_quants.quantize(ties, kind), kind)[0, :5].tolist() == [
        127,
        1,
        2,
        -1,
        -3,
    ]


@pytest.mark.parametrize("tied", [False, True])
def test_q8_0_rounds_the_inputs_of_quantized_matmuls(make_model: MakeModel, tied: bool) -> None:
    directory = make_model("llama", tie_word_embeddings=tied, num_hidden_layers=1)
    overrides = {"*.down_proj": "none"}
    quant = quantize(load(directory), "int4-g32", overrides=overrides)
    session = reference.open_session(str(directory), store=str(quant.directory), arithmetic="ggml")
    seen: dict[str, int] = {}
    for name, module in session._network.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            # Runs after the hook that rounds: how many distinct values a block has.
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.__setitem__(
                    name, int(args[0].is_floating_point() and is_rounded(args[0]))
                )
            )
    session.prefill(IDS)
    rounded = {name.split(".")[-1] for name, yes in seen.items() if yes}
    assert rounded == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "lm_head"}
    assert seen["model.layers.0.mlp.down_proj"] == seen["model.embed_tokens"] == 0


def is_rounded(x: torch.Tensor) -> bool:
    """Whether every block of 32 is made of multiples of a float16 near amax / 127."""
    blocks = x.unflatten(-1, (-1, 32))
    scale = blocks.abs().amax(-1, keepdim=True) / 127
    codes = blocks / scale
    return bool(((codes - codes.round()).abs() < 1e-3).all())


def test_float64_is_the_same_numbers_more_exactly(make_model: MakeModel) -> None:
    directory = str(make_model("llama"))
    ids = [(i * 29 + 3) % 256 for i in range(50)]
    single = reference.open_session(directory).prefill(ids)
    double = reference.open_session(directory, arithmetic="float64").prefill(ids)
    assert double.dtype == np.float32
    difference = np.abs(single - double).max() / double.std()
    # Not the same computation, and no other model: float32's rounding of sums of a few hundred products.
    assert 0 < difference < 1e-5


def test_tokenizer(make_model: MakeModel) -> None:
    session = reference.open_session(str(make_model("llama")))
    text = "def f(x):\n\treturn '漢字 🙂'  # <eos>é"
    ids = session.tokenize(text)
    assert session.detokenize(ids) == text
    assert ids.count(256) == 1
    assert session.tokenize("") == []
    assert session.detokenize(session.tokenize("é")[:1]) == "�"


def test_what_does_not_fit_is_an_error_by_name(make_model: MakeModel, tmp_path: Path) -> None:
    directory = str(make_model("llama"))
    session = reference.open_session(directory)
    with pytest.raises(TapeoutError, match="257 tokens do not fit the context of 256"):
        session.prefill([1] * 257)
    session.prefill([1] * 256)
    with pytest.raises(TapeoutError, match="257 tokens"):
        session.decode(1)
    session.reset()
    with pytest.raises(TapeoutError, match="from 3 to 272 are not all in the vocabulary of 272"):
        session.prefill([3, 272])
    with pytest.raises(TapeoutError, match="no arithmetic 'int8'"):
        reference.open_session(directory, arithmetic="int8")  # type: ignore[arg-type]
    with pytest.raises(TapeoutError, match="needs a store"):
        reference.open_session(directory, arithmetic="ggml")
    with pytest.raises(TapeoutError, match="has 2 layers; it cannot be cut to 3"):
        reference.open_session(directory, layers=3)
    with pytest.raises(PackageError, match="not a whole store"):
        reference.open_session(directory, store=str(tmp_path))
    (Path(directory) / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        session.tokenize("a")


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3", "phi3"])
def test_codes_of_experts_and_fused_tensors_reach_their_places(make_model: MakeModel, family: str) -> None:
    """transformers stacks experts in memory: the reference of a store equals the graph with the store's weights."""
    model = load(make_model(family, dtype="F32"))
    quant = quantize(model, "int4-g32")
    ids = [(i * 31 + 7) % 256 for i in range(20)]
    with torch.inference_mode():
        ops = TorchOps(lambda name: torch.from_numpy(quant.float32(name)))
        expected = decoder(ops, model.config, torch.tensor(ids)).numpy()
    found = reference.open_session(str(model.directory), str(quant.directory)).prefill(ids)
    plain = reference.open_session(str(model.directory)).prefill(ids)
    # float32 sums of up to 128 products, ten in a row, see tests/models/test_graph.py.
    assert np.abs(found - expected).max() < 3e-5 < 1e-2 < np.abs(plain - expected).max()
    whole = reference.open_weights(model.directory, ((name, quant.float32(name)) for name in quant))
    np.testing.assert_array_equal(whole.prefill(ids), found)
    name = next(n for n in quant if "experts.1." in n or "qkv_proj" in n)
    weight = model.checkpoint[name].float32()
    np.testing.assert_array_equal(whole.substitute(name, weight), quant.float32(name))
    assert not np.array_equal(whole.prefill(ids), found)
    np.testing.assert_array_equal(whole.substitute(name, quant.float32(name)), weight)
    with pytest.raises(ModelError, match=r"holds no .*model\.norm\.weight"):
        reference.open_weights(
            model.directory, ((n, quant.float32(n)) for n in quant if n != "model.norm.weight")
        )


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_rounded_inputs_of_experts_are_those_of_linears(make_model: MakeModel, family: str) -> None:
    """Each matmul's input is off by half a step of its block, a 254th of the largest: logits by about a hundredth."""
    model = load(make_model(family, dtype="F32"))
    quant = quantize(model, "int8-g32")
    ids = [(i * 31 + 7) % 256 for i in range(20)]
    exact = reference.open_session(str(model.directory), str(quant.directory)).prefill(ids)
    ggml = reference.open_session(str(model.directory), str(quant.directory), "ggml").prefill(ids)
    off = np.sqrt(((ggml - exact) ** 2).mean()) / exact.std()
    assert 1e-3 < off < 5e-2
    if family == "qwen2_moe":
        only = quantize(model, "none", overrides={"*.experts.*": "int8-g32"})
        exact = reference.open_session(str(model.directory), str(only.directory)).prefill(ids)
        ggml = reference.open_session(str(model.directory), str(only.directory), "ggml").prefill(ids)
        assert 3e-4 < np.sqrt(((ggml - exact) ** 2).mean()) / exact.std() < off
