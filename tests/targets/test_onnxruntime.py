from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tapeout.errors import MissingToolchain, PackageError, RuntimeCrash, TapeoutError
from tapeout.exporters import onnx
from tapeout.models import load
from tapeout.quantize import quantize
from tapeout.targets import onnxruntime
from tapeout.targets.cpu import Cpu
from tapeout.targets.onnxruntime import cache_bytes
from tapeout.validate import reference
from tapeout.validate.session import SessionSpec
from tapeout.validate.worker import open_session

pytest.importorskip("onnx")
runtime = pytest.importorskip("onnxruntime")
pytest.importorskip("transformers")

MakeModel = Callable[..., Path]
Open = Callable[..., onnxruntime.OnnxRuntime]
IDS = [(i * 37 + 11) % 256 for i in range(60)]
# In units of the logits' standard deviation. float32 sums in another order: 2^-24 for each of some hundred terms.
CLOSE = 1e-4


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Open]:
    opened: list[onnxruntime.OnnxRuntime] = []

    def session(
        directory: Path, scheme: str = "int4-g32", *, write: Any = None, **arguments: Any
    ) -> onnxruntime.OnnxRuntime:
        out = tmp_path / f"onnx-{len(opened)}"
        artifact = onnx.write(quantize(load(directory), scheme), out, **(write or {}))
        given = {"threads": 1, "context": artifact.context, **arguments}
        opened.append(onnxruntime.open_session(str(out), **given))
        return opened[-1]

    yield session
    for one in opened:
        one.close()


def apart(a: Any, b: Any) -> float:
    """Largest difference in units of the standard deviation."""
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.std(a))


LONG = {
    "rope_type": "longrope",
    "short_factor": [1.0 + i / 8 for i in range(4)],
    "long_factor": [2.0 + i for i in range(4)],
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 16, "attention_bias": True, "mlp_bias": True}),
    "llama-narrow-heads": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "llama-heads-of-20": ("llama", {"head_dim": 20}),  # no multiple of 8: padded
    "mistral-heads-of-12": ("mistral", {"sliding_window": 8, "head_dim": 12}),
    "phi3-part-of-a-head": (
        "phi3",
        {"hidden_size": 96, "num_attention_heads": 8, "partial_rotary_factor": 0.5},
    ),
    "deepseek_v3-36": ("deepseek_v3", {"qk_rope_head_dim": 4}),  # a latent of 32 + 4
    "mistral": ("mistral", {"sliding_window": 8, "head_dim": 16, "num_key_value_heads": 8}),
    "gemma": ("gemma", {}),
    "gemma2": ("gemma2", {"sliding_window": 8}),
    "gemma3_text": ("gemma3_text", {"sliding_window": 8}),
    "phi3": ("phi3", {}),
    "phi3-longrope": (
        "phi3",
        {"rope_scaling": LONG, "original_max_position_embeddings": 32, "hidden_size": 64},
    ),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mixtral": ("mixtral", {"sliding_window": 8}),
    "qwen2_moe": ("qwen2_moe", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "deepseek_v2": ("deepseek_v2", {}),
    "deepseek_v3": ("deepseek_v3", {}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_family_is_the_reference(make_model: MakeModel, start: Open, case: str) -> None:
    """All at once, in pieces and token by token, past the window and past the length that positions were trained on."""
    family, fields = CASES[case]
    directory = make_model(family, **fields)
    store = quantize(load(directory), "int4-g32").directory
    expected = reference.open_session(str(directory), store=str(store), threads=1)
    # transformers switches long positions on for a whole forward pass: token by token is what generation does.
    wanted = np.array([expected.decode(token) for token in IDS])
    session = start(directory, write={"exact": True})
    assert apart(wanted, [session.decode(token) for token in IDS]) < CLOSE
    if case == "phi3-longrope":
        return
    session.reset()
    logits = session.prefill(IDS)
    assert logits.dtype == np.float32
    assert apart(wanted, logits) < CLOSE
    session.reset()
    parts = [session.prefill(IDS[:1]), session.prefill(IDS[1:30]), session.prefill(IDS[30:37])]
    assert apart(wanted, np.concatenate([*parts, session.prefill(IDS[37:])])) < CLOSE
    session.reset()
    assert apart(wanted[[-1]], session.append(IDS)) < CLOSE


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g32-asym"])
def test_experts_of_one_kernel_are_the_experts_one_by_one(
    make_model: MakeModel, start: Open, tmp_path: Path, family: str, scheme: str
) -> None:
    """QMoE as it ships, its inputs left alone: the same data, stacked, rows of gate and up taking turns."""
    import onnx as library

    directory = make_model(family)
    expected = start(directory, scheme, write={"exact": True}).prefill(IDS)
    start(directory, scheme)
    model = library.load(tmp_path / "onnx-1" / "model.onnx", load_external_data=False)
    experts = [node for node in model.graph.node if node.op_type == "QMoE"]
    assert len(experts) == (2 if family == "mixtral" else 1)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    (tmp_path / "level-0.onnx").write_bytes(model.SerializeToString())
    session = onnxruntime.open_session(
        str(tmp_path / "onnx-1"), context=256, graph=str(tmp_path / "level-0.onnx"), threads=1
    )
    assert apart(expected, session.prefill(IDS)) < CLOSE


def test_the_cache_of_a_window_stays_at_its_size(make_model: MakeModel, start: Open) -> None:
    """Three windows past the window, and whatever the context is; rows that are dropped are dropped by the kernel."""
    directory = make_model("mistral", sliding_window=16, max_position_embeddings=4096, head_dim=16)
    session = start(directory, write={"exact": True})
    assert {cache.shape for cache in session._cache} == {(1, 4, 16 + 2 + 1, 16)}
    store = quantize(load(directory), "int4-g32").directory
    expected = reference.open_session(str(directory), store=str(store), threads=1).prefill([*IDS, *IDS])
    assert apart(expected, [session.decode(token) for token in [*IDS, *IDS]]) < CLOSE


@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g64-asym", "int8", "int2-g64", "q3_k"])
def test_int8_arithmetic_of_one_layer_is_explained(make_model: MakeModel, start: Open, scheme: str) -> None:
    """The shipped graph against the reference that rounds inputs as MLAS does, token by token, each a sequence of its own.

    A value within float32's error of a tie is rounded the other way now and then, and then that token (and whatever
    attends to it) differs by whole steps: so the median, whose value is as close as float32 gets.
    """
    directory = make_model("llama", tie_word_embeddings=True, hidden_size=256, intermediate_size=512)
    store = quantize(load(directory), scheme).directory
    arguments: dict[str, Any] = {"store": str(store), "layers": 1, "threads": 1}
    sessions = [
        reference.open_session(str(directory), arithmetic="mlas", **arguments),
        reference.open_session(str(directory), **arguments),
        start(directory, scheme, write={"layers": 1}),
    ]
    logits = []
    for session in sessions:
        rows = []
        for token in IDS:
            session.reset()
            rows.append(session.decode(token))
        logits.append(np.array(rows))
    rounded, exact, device = logits
    assert np.median(np.abs(rounded - device).max(1)) / rounded.std() < CLOSE
    assert np.median(np.abs(exact - device).max(1)) / rounded.std() > 50 * CLOSE


@pytest.mark.parametrize("scheme", ["none", "nf4", "nf4-dq", "fp8"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_is_not_rounded_is_said_to_be_exact(
    make_model: MakeModel, start: Open, scheme: str, tied: bool
) -> None:
    """Embedding and head too, whose bytes are the same where they are tied."""
    directory = make_model("llama", hidden_size=128, tie_word_embeddings=tied)
    overrides = {"model.embed_tokens": scheme} | ({} if tied else {"lm_head": scheme})
    quant = quantize(load(directory), scheme, overrides=overrides)
    arguments: dict[str, Any] = {"store": str(quant.directory), "threads": 1}
    expected = reference.open_session(str(directory), arithmetic="mlas", **arguments).prefill(IDS)
    out = directory.parent / "out"
    onnx.write(quant, out)
    assert apart(expected, onnxruntime.open_session(str(out), context=256, threads=1).prefill(IDS)) < CLOSE


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "deepseek_v3"])
@pytest.mark.parametrize("chunk", [1, 7, 128])
def test_a_prompt_in_chunks_is_the_prompt_at_once(
    make_model: MakeModel, start: Open, family: str, chunk: int
) -> None:
    """Chunks of one token, odd ones, and one that is longer than the prompt.

    The same products, summed over blocks of keys that begin elsewhere: float32 in another order. Token by token is bit for bit
    what ``decode`` gives.
    """
    directory = make_model(family, **({"sliding_window": 24} if family in ("mistral", "gemma2") else {}))
    ids = [*IDS, *IDS]
    whole = start(directory, write={"exact": True}).prefill(ids)
    session = start(directory, write={"exact": True}, chunk=chunk)
    logits = session.prefill(ids)
    assert apart(whole, logits) < CLOSE
    if chunk > len(ids):
        assert np.array_equal(logits, whole)
    session.reset()
    assert apart(logits[-1], session.append(ids)[0]) < CLOSE  # the head's product is of one row
    if chunk == 1:
        session.reset()
        assert np.array_equal([session.decode(token) for token in ids], logits)


def test_the_cache_takes_memory_as_it_fills(make_model: MakeModel, start: Open, tmp_path: Path) -> None:
    """Of 262,144 tokens, 8 heads of 128 elements and 2 layers: 4.3 GB, of which a short prompt takes its rows' pages."""
    import psutil

    directory = make_model(
        "llama", head_dim=128, num_key_value_heads=8, max_position_embeddings=262144, num_hidden_layers=2
    )
    session = start(directory, write={"exact": True})
    whole = cache_bytes([(None, 2 * 8 * 128)] * 2, 262144)
    assert sum(cache.nbytes for cache in session._cache) == whole == 2 * 2 * 8 * 128 * 262144 * 4
    # In a process of its own: in this one other tests leave memory that is given back, or not.
    given = {"directory": str(tmp_path / "onnx-0"), "threads": 1, "context": 262144}
    with open_session(SessionSpec("tapeout.targets.onnxruntime:open_session", given)) as alone:
        process = psutil.Process(alone.pid)
        alone.prefill(IDS)  # so that the arena has what a chunk of this length takes
        before = process.memory_info().rss
        alone.reset()
        alone.append([1] * 2000)
        grown = process.memory_info().rss - before
    # 2,000 rows of each head are 250 pages of 4 KiB; the arena adds a chunk's activations, at most what the target says.
    rows = 2 * 2 * 8 * 128 * 2000 * 4
    work = Cpu(format="onnx").memory(load(directory).decoder, 262144).work
    answer = 2 * 2000 * 256 * 4  # logits of every token, and their copy on the way here
    assert 0.9 * rows < grown < rows + work + answer, (rows, grown, work)


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_latents_are_kept_once(make_model: MakeModel, start: Open, family: str) -> None:
    session = start(make_model(family))
    keys, values = session._cache[0], session._cache[1]
    assert np.shares_memory(keys, values)
    assert keys.shape == (1, 1, 256, 32 + 8)
    assert len({cache.ctypes.data for cache in session._cache}) == 2  # one a layer


def test_nothing_is_copied(make_model: MakeModel, start: Open) -> None:
    """Present is written into past's memory: there alone a step's keys appear, and only its rows change."""
    session = start(make_model("llama", head_dim=16))
    session.prefill(IDS[:5])
    before = [cache.copy() for cache in session._cache]
    session.decode(7)
    for old, new in zip(before, session._cache, strict=True):
        assert np.flatnonzero((old != new).any(axis=(0, 1, 3))).tolist() == [5]


def test_logits_are_ours(make_model: MakeModel, start: Open) -> None:
    session = start(make_model("llama"))
    first, second = session.append(IDS[:5]), session.decode(3)
    kept = first.copy(), second.copy()
    session.decode(4)
    assert np.array_equal(first, kept[0])
    assert np.array_equal(second, kept[1])


def test_another_runtime_needs_no_first_logits(make_model: MakeModel, start: Open, tmp_path: Path) -> None:
    """The input has a default: what knows the usual names alone gets the logits of every token, of a batch too."""
    expected = start(make_model("llama", head_dim=16)).prefill(IDS)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    session = runtime.InferenceSession(tmp_path / "onnx-0" / "model.onnx", options)
    assert [each.name for each in session.get_inputs()][:2] == ["input_ids", "attention_mask"]
    feed = {"input_ids": np.array([IDS] * 2), "attention_mask": np.ones((2, len(IDS)), np.int64)}
    # Right padding: the second sequence is 20 tokens shorter.
    feed["attention_mask"][1, 40:] = 0
    for each in session.get_inputs():
        if each.name.startswith("past_"):
            feed[each.name] = np.zeros((2, each.shape[1], 0, each.shape[3]), np.float32)
    logits, *_ = session.run(["logits"], feed)
    assert np.array_equal(logits[0], expected)
    assert np.array_equal(logits[1, :40], expected[:40])


def test_facts(make_model: MakeModel, start: Open) -> None:
    facts = start(make_model("llama"), threads=1).facts
    assert facts.runtime == f"onnxruntime {runtime.__version__}"
    assert facts.device == "cpu, 1 threads"
    assert facts.context == 256
    assert facts.load_s > 0
    assert facts.resident_bytes >= 0


def test_tokenizer(make_model: MakeModel, start: Open) -> None:
    directory = make_model("llama")
    session, expected = start(directory), reference.open_session(str(directory), threads=1)
    text = "def f(x):\n\treturn '漢字 🙂'\0 # <eos>é" * 9
    ids = session.tokenize(text)
    assert ids == expected.tokenize(text)
    assert session.detokenize(ids) == text
    assert session.tokenize("") == []
    assert session.detokenize([]) == ""
    assert session.detokenize(session.tokenize("é")[:1]) == "�"
    with pytest.raises(TapeoutError, match="not Unicode"):
        session.tokenize("\ud800")


def test_what_does_not_fit_is_an_error_by_name(make_model: MakeModel, start: Open) -> None:
    session = start(make_model("llama"), context=40)
    with pytest.raises(TapeoutError, match="41 tokens do not fit the context of 40"):
        session.prefill([1] * 41)
    session.prefill([1] * 40)
    with pytest.raises(TapeoutError, match="41 tokens"):
        session.decode(1)
    session.reset()
    with pytest.raises(TapeoutError, match="from -1 to 3 are not all in the vocabulary of 272"):
        session.prefill([3, -1])
    with pytest.raises(TapeoutError, match="are not all in the vocabulary"):
        session.detokenize([272])
    assert session.decode(1).shape == (272,)
    assert session.prefill([]).shape == (0, 272)


def test_refused_files(tmp_path: Path, make_model: MakeModel, start: Open) -> None:
    with pytest.raises(PackageError, match=r"model\.onnx is absent"):
        onnxruntime.open_session(str(tmp_path), context=8)
    start(make_model("llama"))
    out = tmp_path / "onnx-0"
    data = (out / "model.onnx.data").read_bytes()
    (out / "model.onnx.data").write_bytes(data[:-5000])
    with pytest.raises(RuntimeCrash, match=r"onnxruntime refuses .*model\.onnx"):
        onnxruntime.open_session(str(out), context=8)
    (out / "model.onnx").write_bytes(b"\x08\x09no model")
    with pytest.raises(RuntimeCrash, match=r"onnxruntime refuses .*model\.onnx"):
        onnxruntime.open_session(str(out), context=8)


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingToolchain, match=r"pip install 'tapeout\[onnx\]'"):
        onnxruntime.open_session("any", context=8)
