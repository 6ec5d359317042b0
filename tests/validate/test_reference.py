from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tapeout.errors import ModelError, PackageError, TapeoutError
from tapeout.models import load
from tapeout.models.graph import decoder
from tapeout.models.torch_ops import TorchOps
from tapeout.quantize import Calibration, QuantTensor, quantize
from tapeout.validate import reference, rounding

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
    found = rounding.round_q8_0(torch.from_numpy(x)).numpy()
    step = np.repeat(np.abs(x.reshape(50, 8, 32)).max(-1) / 127, 32, axis=1)
    # gguf multiplies by 1/d and not by 127/amax: a value within float32's error of a tie may go the other way.
    apart = np.abs(found - expected) > 1e-3 * step
    fraction = np.abs(x / np.where(step == 0, 1, step)) % 1
    assert np.all(np.abs(fraction[apart] - 0.5) < 1e-4)
    assert apart.mean() < 1e-3
    # Ties: to even here, as ggml's kernels for x86 and ARM do; away from zero in gguf.
    ties = np.zeros((1, 32), np.float32)
    ties[0, :5] = [127, 0.5, 1.5, -0.5, -2.5]
    assert rounding.round_q8_0(torch.from_numpy(ties))[0, :5].tolist() == [127, 0, 2, 0, -2]
    assert gguf_quants.dequantize(gguf_quants.quantize(ties, kind), kind)[0, :5].tolist() == [
        127,
        1,
        2,
        -1,
        -3,
    ]


def test_q4_0_is_gguf_q4_0() -> None:
    gguf_quants = pytest.importorskip("gguf.quants")
    kind = pytest.importorskip("gguf").GGMLQuantizationType.Q4_0
    random = np.random.default_rng(0)
    x = (random.standard_normal((50, 256)) * 10.0 ** random.integers(-6, 3, (50, 1))).astype(np.float32)
    x[0] = 0
    x[1, :32] = np.arange(32) / 2 - 8  # halves of the step
    x[2, :2] = 9, -9  # the first of the largest decides about the sign
    x[3, :2] = -9, 9
    expected = gguf_quants.dequantize(gguf_quants.quantize(x, kind), kind)
    found = rounding.round_q4_0(torch.from_numpy(x)).numpy()
    assert np.array_equal(found, expected)
    assert found[2:4, :2].tolist() == [[9.0, -7.875], [-9.0, 7.875]]


@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("width", [32, 64, 128, 192])
def test_the_basis_of_the_cache_loses_nothing_itself(width: int, rotary: bool) -> None:
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((3, width)).astype(np.float32))
    seen: list[torch.Tensor] = []

    def store(stored: torch.Tensor) -> torch.Tensor:
        seen.append(stored)
        return stored

    back = rounding.as_cached(x, store, rotary=rotary)
    torch.testing.assert_close(back, x, atol=1e-5, rtol=0)
    torch.testing.assert_close(seen[0].norm(dim=-1), x.norm(dim=-1))
    # One element reaches as many others as it is turned with: none, or all of its 64 or 128.
    one = torch.eye(width)[:1]
    rounding.as_cached(one, store, rotary=rotary)
    turned = {32: 1, 64: 64, 128: 128 if rotary else 64, 192: 64}[width]
    assert int((seen[-1] != 0).sum()) == turned


def test_a_rounded_cache_rounds_attention_alone(make_model: MakeModel) -> None:
    directory = str(make_model("mistral", hidden_size=256, sliding_window=24))
    floats = reference.open_session(directory).prefill(IDS)
    coarse = reference.open_session(directory, kv_cache="kv-int4")
    fine = reference.open_session(directory, kv_cache="kv-int8").prefill(IDS)
    logits = coarse.prefill(IDS)
    # A step of 1/8 of the largest element against one of 1/127: about sixteen times the error.
    assert 5 < np.std(logits - floats) / np.std(fine - floats) < 40
    coarse.reset()
    np.testing.assert_allclose([coarse.decode(token) for token in IDS], logits, atol=0.05 * floats.std())
    with pytest.raises(TapeoutError, match="no cache 'kv-int3'; did you mean 'kv-int8'"):
        reference.open_session(directory, kv_cache="kv-int3")  # type: ignore[arg-type]


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


def test_int8_inputs_are_torchs_fake_quantize() -> None:
    """Scales are powers of two, so that x / scale and x * (1 / scale) are both exact: ties too must agree."""
    random = np.random.default_rng(0)
    step = 2.0 ** random.integers(-9, 5, 50)
    x = random.standard_normal((50, 256)) * 30 * step[:, None]
    x[:, :6] = [-127, 126.5, 0.5, -1.5, 2.5, 0] * step[:, None]
    x = torch.from_numpy(x.clip(-127 * step[:, None], 127 * step[:, None]).astype(np.float32))
    scale = torch.from_numpy(step.astype(np.float32))
    zero = torch.zeros(50, dtype=torch.int32)
    expected = torch.fake_quantize_per_channel_affine(x, scale, zero, 0, -128, 127)
    assert torch.equal(rounding.round_int8(x), expected)
    assert torch.equal(rounding.round_int8(x.reshape(5, 10, 256)), expected.reshape(5, 10, 256))
    for fixed in (0.125, 64.0):  # the smaller one saturates
        expected = torch.fake_quantize_per_tensor_affine(x, fixed, 0, -128, 127)
        assert torch.equal(rounding.round_int8(x, np.float32(fixed)), expected)
        assert bool((expected == -128 * fixed).any()) == (fixed == 0.125)
    assert not rounding.round_int8(torch.zeros(2, 8)).any()


@pytest.mark.parametrize(("scheme", "head"), [("w8a8", "int8"), ("w8a8-static", "w8a8")])
def test_the_scheme_says_which_inputs_are_rounded(make_model: MakeModel, scheme: str, head: str) -> None:
    directory = make_model("llama", num_hidden_layers=1)
    overrides = {"*.down_proj": "int8", "*.up_proj": "none", "lm_head": head}
    quant = quantize(load(directory), scheme, overrides=overrides, calibration=Calibration(None, 4, 64))
    session = reference.open_session(str(directory), store=str(quant.directory), arithmetic="scheme")
    steps: dict[str, torch.Tensor] = {}
    for name, module in session._network.named_modules():
        if isinstance(module, torch.nn.Linear):
            # Runs after the hook that rounds. The smallest distance of two values is the step, if they are its multiples.
            def look(_: object, args: tuple[torch.Tensor], name: str = name) -> None:
                rows = args[0].reshape(-1, args[0].shape[-1]).double()
                step = rows.abs().amax(-1, keepdim=True) / 127
                if (fixed := quant[f"{name}.weight"]) is not None and getattr(fixed, "input_scale", None):
                    step = torch.full_like(step, float(fixed.input_scale))
                if bool(((rows / step - (rows / step).round()).abs() < 1e-3).all()):
                    steps[name.split(".")[-1]] = step

            module.register_forward_pre_hook(look)
    session.prefill(IDS)
    expected = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"}
    assert set(steps) == expected | ({"lm_head"} if head == "w8a8" else set())
    # One scale a token, or one for all.
    assert (len(steps["q_proj"].unique()) == 1) == (scheme == "w8a8-static")


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
    for arithmetic in ("ggml", "scheme"):
        with pytest.raises(TapeoutError, match=f"arithmetic {arithmetic} is .* needs a store"):
            reference.open_session(directory, arithmetic=arithmetic)  # type: ignore[arg-type]
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
