from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tapeout.errors import MissingToolchain, PackageError, RuntimeCrash, TapeoutError
from tapeout.exporters import gguf
from tapeout.models import load
from tapeout.quantize import quantize
from tapeout.targets import llama_cpp
from tapeout.targets.cpu import Cpu
from tapeout.targets.llama_cpp import cache_bytes
from tapeout.validate import reference

pytest.importorskip("llama_cpp")
pytest.importorskip("transformers")

MakeModel = Callable[..., Path]
Open = Callable[..., llama_cpp.LlamaCpp]
IDS = [(i * 37 + 11) % 256 for i in range(60)]
EXACT: dict[str, Any] = {"kv_cache": "kv-f32", "flash_attention": False}
# In units of the logits' standard deviation. float32 sums in another order: 2^-24 for each of some hundred terms, and
# llama.cpp's own exp.
CLOSE = 1e-4
# What llama.cpp's archs compute whatever the config says.
GEMMA2 = {"sliding_window": 24, "query_pre_attn_scalar": 16, "rms_norm_eps": 1e-6}
DEEPSEEK = {"rms_norm_eps": 1e-6}
GGUF: dict[str, dict[str, Any]] = {
    "llama": {}, "mistral": {"sliding_window": 24}, "gemma2": GEMMA2, "deepseek_v3": DEEPSEEK
}  # fmt: skip


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Open]:
    opened: list[llama_cpp.LlamaCpp] = []

    # One thread each: two runtimes whose idle threads spin, in one process, take turns for seconds.
    def session(
        directory: Path, scheme: str = "int4-g32", *, write: Any = None, **arguments: Any
    ) -> llama_cpp.LlamaCpp:
        out = tmp_path / f"gguf-{len(opened)}"
        artifact = gguf.write(quantize(load(directory), scheme), out, **(write or {}))
        opened.append(llama_cpp.open_session(str(out / artifact.files[0]), **{"threads": 1, **arguments}))
        return opened[-1]

    yield session
    for one in opened:
        one.close()


def apart(a: Any, b: Any) -> float:
    """Largest difference in units of the standard deviation."""
    return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.std(a))


def test_torch_may_use_the_cpus_tiles_on_the_same_thread(make_model: MakeModel, start: Open) -> None:
    """On a CPU with AMX both configure them, and each takes the other's for its own: an illegal instruction."""
    import torch

    session = start(make_model("llama", hidden_size=256, intermediate_size=512), "int8")
    before = session.prefill(IDS)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        square = torch.randn(256, 256).bfloat16()
        assert torch.isfinite(square @ square).all()
    finally:
        torch.set_num_threads(threads)
    session.reset()
    assert np.array_equal(session.prefill(IDS), before)


@pytest.mark.parametrize(("model_type", "fields"), [("llama", {}), ("mistral", {"sliding_window": 24})])
def test_float32_twin_is_the_reference(
    make_model: MakeModel, start: Open, model_type: str, fields: dict[str, Any]
) -> None:
    """All at once, in pieces and token by token; with a window past it."""
    directory = make_model(model_type, **fields)
    store = quantize(load(directory), "int4-g32").directory
    expected = reference.open_session(str(directory), store=str(store), threads=1).prefill(IDS)
    session = start(directory, write={"as_float32": True}, batch=32, ubatch=7, **EXACT)
    logits = session.prefill(IDS)
    assert logits.dtype == np.float32
    assert apart(expected, logits) < CLOSE
    session.reset()
    assert apart(expected, [session.decode(token) for token in IDS]) < CLOSE
    session.reset()
    assert apart(expected[[-1]], session.append(IDS)) < CLOSE


@pytest.mark.parametrize("scheme", ["int4-g32", "int4-g64-asym", "int8"])
def test_int8_arithmetic_of_one_layer_is_explained(make_model: MakeModel, start: Open, scheme: str) -> None:
    """The shipped types against the reference that rounds inputs as ggml does.

    A value within float32's error of a tie is rounded the other way now and then, and then that token differs by a
    whole step: so the median of the tokens, whose value is as close as float32 gets.
    """
    directory = make_model("llama", tie_word_embeddings=True)
    store = quantize(load(directory), scheme).directory
    arguments: dict[str, Any] = {"store": str(store), "layers": 1, "threads": 1}
    rounded = reference.open_session(str(directory), arithmetic="ggml", **arguments).prefill(IDS)
    exact = reference.open_session(str(directory), **arguments).prefill(IDS)
    device = start(directory, scheme, write={"layers": 1}, **EXACT).prefill(IDS)
    assert np.median(np.abs(rounded - device).max(1)) / rounded.std() < CLOSE
    assert np.median(np.abs(exact - device).max(1)) / rounded.std() > 50 * CLOSE


@pytest.mark.parametrize(
    ("family", "heads"), [("llama", 8), ("llama", 4), ("llama", 2), ("qwen2", 8), ("qwen2", 2)]
)
@pytest.mark.parametrize("kv_cache", ["kv-int8", "kv-int4"])
def test_a_rounded_cache_of_one_layer_is_explained(
    make_model: MakeModel, start: Open, kv_cache: Any, family: str, heads: int
) -> None:
    """Heads of 32 elements, and of 64 and 128, which llama.cpp turns before it rounds.

    Float weights, so that nothing but the cache rounds. The median, as above.
    """
    fields = {"hidden_size": 256, "num_attention_heads": heads, "num_key_value_heads": heads // 2}
    directory = make_model(family, **fields)
    store = quantize(load(directory), "int4-g32").directory
    arguments: dict[str, Any] = {"store": str(store), "layers": 1, "threads": 1}
    rounded = reference.open_session(str(directory), kv_cache=kv_cache, **arguments).prefill(IDS)
    floats = reference.open_session(str(directory), **arguments).prefill(IDS)
    session = start(directory, write={"layers": 1, "as_float32": True}, kv_cache=kv_cache)
    device = session.prefill(IDS)
    assert np.median(np.abs(rounded - device).max(1)) / rounded.std() < CLOSE
    assert np.median(np.abs(floats - device).max(1)) / rounded.std() > 50 * CLOSE
    session.reset()
    assert np.median(np.abs(device - [session.decode(token) for token in IDS]).max(1)) / rounded.std() < CLOSE


def test_as_many_tokens_as_their_cache_leaves_room_for(
    make_model: MakeModel, start: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 2 layers, 4 heads of 32 elements, keys and values: 512 elements a token. A MiB, half of which may be used.
    monkeypatch.setattr(llama_cpp.psutil, "virtual_memory", lambda: SimpleNamespace(available=1 << 20))
    directory = make_model("llama", hidden_size=256, max_position_embeddings=8192)
    rooms = {"kv-f32": 256, "kv-f16": 512, "kv-int8": 768, "kv-int4": 1792}  # down to a multiple of 256
    for kind, room in rooms.items():
        assert start(directory, kv_cache=kind).facts.context == room


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "deepseek_v3"])
@pytest.mark.parametrize("chunk", [1, 7, 128])
def test_a_prompt_in_chunks_is_the_prompt_at_once(
    make_model: MakeModel, start: Open, family: str, chunk: int
) -> None:
    """Chunks of one token, odd ones, and one that is longer than the prompt, which is bit for bit the prompt at once."""
    directory, ids = make_model(family, **GGUF[family]), [*IDS, *IDS]
    whole = start(directory, write={"as_float32": True}, **EXACT).prefill(ids)
    session = start(directory, write={"as_float32": True}, batch=chunk, ubatch=chunk, **EXACT)
    logits = session.prefill(ids)
    # Of gemma2 a value that GELU's table of float16 rounds the other way: cpu's bound of GELU, 4 2^-11 sqrt(2 L).
    assert apart(whole, logits) < (CLOSE if family != "gemma2" else 4 * 2**-11 * 2)
    assert apart(whole, logits) == 0 or chunk < len(ids)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {"head_dim": 64}),
        ("mistral", {"sliding_window": 600}),
        ("gemma2", {**GEMMA2, "sliding_window": 600}),
        ("deepseek_v3", DEEPSEEK),
    ],
)
@pytest.mark.parametrize("chunk", [512, 100])
def test_the_cache_is_as_large_as_llama_cpp_says(
    make_model: MakeModel, start: Open, family: str, fields: dict[str, Any], chunk: int
) -> None:
    """Heads of any width, windows in all layers and in some, keys wider than values: target and session know the bytes."""
    directory = make_model(family, max_position_embeddings=5000, **fields)
    said: list[str] = []
    library = llama_cpp.library()
    listen = library.llama_log_callback(lambda _, text, __: said.append(text.decode("utf-8", "replace")))
    library.llama_log_set(listen, None)
    try:
        session = start(directory, batch=chunk, ubatch=chunk)
    finally:
        library.llama_log_set(llama_cpp._CALLBACK, None)
    sizes = re.findall(r"KV buffer size = +([0-9.]+) MiB", "".join(said))
    expected = Cpu(prefill_chunk=chunk).memory(load(directory).decoder, 5000).cache
    # llama.cpp does not tell the session which layers have a window.
    known = cache_bytes(llama_cpp._layers(session._model), 5000, chunk, "kv-f16")
    assert known > expected if family == "gemma2" else known == expected
    assert sum(map(float, sizes)) == pytest.approx(expected / 2**20, abs=0.005 * len(sizes))  # two decimals
    work = re.findall(r"compute buffer size = +([0-9.]+) MiB", "".join(said))
    assert float(work[0]) * 2**20 <= Cpu(prefill_chunk=chunk).memory(load(directory).decoder, 5000).work


def test_logits_are_ours(make_model: MakeModel, start: Open) -> None:
    """llama.cpp writes the next ones over its own."""
    session = start(make_model("llama"))
    first, second = session.append(IDS[:5]), session.decode(3)
    kept = first.copy(), second.copy()
    session.decode(4)
    assert np.array_equal(first, kept[0])
    assert np.array_equal(second, kept[1])


def test_facts(make_model: MakeModel, start: Open) -> None:
    facts = start(make_model("llama"), threads=1).facts
    assert facts.runtime.startswith("llama.cpp ")
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
    assert session.detokenize([256] * 300) == "<eos>" * 300
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


def test_refused_files(tmp_path: Path, make_model: MakeModel, start: Open) -> None:
    with pytest.raises(PackageError, match=r"nothing\.gguf is absent"):
        llama_cpp.open_session(str(tmp_path / "nothing.gguf"))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(RuntimeCrash, match=r"refuses .*bad\.gguf\. Its log: .*bad GGUF version"):
        llama_cpp.open_session(str(tmp_path / "bad.gguf"))
    start(make_model("llama"))
    whole = next(tmp_path.glob("gguf-0/*.gguf")).read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[:-1000])
    with pytest.raises(RuntimeCrash, match=r"refuses .*cut\.gguf\. Its log: .*tensor"):
        llama_cpp.open_session(str(tmp_path / "cut.gguf"))
    with pytest.raises(TapeoutError, match=r"'kv-int3' is not a cache of llama\.cpp; did you mean 'kv-int8'"):
        llama_cpp.open_session(str(tmp_path / "cut.gguf"), kv_cache="kv-int3")  # type: ignore[arg-type]
    with pytest.raises(RuntimeCrash, match=r"no context of .* block size 32 does not divide n_embd_head_k=8"):
        start(make_model("llama"), kv_cache="kv-int8")


def test_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    llama_cpp.library.cache_clear()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(MissingToolchain, match=r"pip install 'tapeout\[cpu\]'"):
        llama_cpp.open_session("any.gguf")
