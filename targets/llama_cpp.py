"""Sessions on llama.cpp, through the low-level API of llama-cpp-python: what the cpu target runs its GGUF files with."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np
import psutil

from tapeout.errors import MissingToolchain, PackageError, RuntimeCrash, TapeoutError, nearest
from tapeout.models import gguf_header
from tapeout.targets.llama_cpp_trace import Tracer
from tapeout.validate.encoders import check_batch
from tapeout.validate.given import check_ids, encoded
from tapeout.validate.session import KV_BITS, Facts, KvCache, Logits, Shown

__all__ = ["LlamaCpp", "LlamaCppEncoder", "cache_bytes", "open_session"]

_CACHE_TYPES: dict[KvCache, int] = {"kv-f32": 0, "kv-f16": 1, "kv-int8": 8, "kv-int4": 2}  # of ggml_type
_WARNING, _CONTINUED = 3, 5  # of ggml_log_level
_INT32_MIN = -(2**31)
_CELLS = 256  # a cache has a multiple of these


class LlamaCpp:
    """A Session on llama.cpp; see ``open_session``."""

    facts: Facts

    def __init__(
        self, facts: Facts, model: int, context: int, batch_size: int, tracer: Tracer | None = None
    ) -> None:
        llama = library()
        self._tracer = tracer
        self.facts = facts
        self._model, self._context = model, context
        self.cache_bytes: Callable[..., int]
        self._vocab = llama.llama_model_get_vocab(model)
        self._vocab_size = int(llama.llama_vocab_n_tokens(self._vocab))
        self._space_prefix = llama.llama_vocab_type(self._vocab) in (
            llama.LLAMA_VOCAB_TYPE_SPM,
            llama.LLAMA_VOCAB_TYPE_UGM,
        ) and (_metadata(model, b"tokenizer.ggml.add_space_prefix") != "false")
        self._pieces: dict[tuple[int, bool], bytes] = {}
        self._length = 0
        self._batch_size = batch_size
        self._batch = llama.llama_batch_init(batch_size, 0, 1)
        fields = ("token", "pos", "logits", "n_seq_id")
        views = [np.ctypeslib.as_array(getattr(self._batch, field), (batch_size,)) for field in fields]
        self._token, self._position, self._output, sequences = views
        sequences[:] = 1  # every token belongs to one sequence, number 0
        for i in range(batch_size):
            self._batch.seq_id[i][0] = 0

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Append tokens to the sequence at once; return float32 [tokens, vocab], the logits after each."""
        self._check(ids)
        logits = np.empty((len(ids), self._vocab_size), np.float32)
        for at in range(0, len(ids), self._batch_size):
            chunk = ids[at : at + self._batch_size]
            logits[at : at + len(chunk)] = self._decode(chunk, outputs=len(chunk))
        return logits

    def append(self, ids: Sequence[int]) -> Logits:
        """``prefill`` for those who want the last token's logits only, float32 [1, vocab]."""
        self._check(ids)
        last = np.empty((0, self._vocab_size), np.float32)
        for at in range(0, len(ids), self._batch_size):
            chunk = ids[at : at + self._batch_size]
            last = self._decode(chunk, outputs=int(at + len(chunk) == len(ids)))
        return last.copy()

    def decode(self, token: int) -> Logits:
        """Append one token; return float32 [vocab]."""
        self._check([token])
        return cast(Logits, self._decode([token], outputs=1)[0].copy())

    def reset(self) -> None:
        """Begin a new sequence with an empty cache."""
        llama = library()
        llama.llama_memory_clear(llama.llama_get_memory(self._context), True)
        self._length = 0

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text``; special tokens in it are recognised, none are added."""
        return _tokenized(self._vocab, text, around=False)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens kept; bytes that are not UTF-8 become U+FFFD.

        Token by token, as llama.cpp's programs print: its ``llama_detokenize`` also drops spaces before punctuation.
        """
        check_ids(ids, self._vocab_size)
        pieces = []
        for at, token in enumerate(ids):
            strip = self._space_prefix and at == 0
            if (token, strip) not in self._pieces:
                self._pieces[token, strip] = _piece(self._vocab, token, strip=strip)
            pieces.append(self._pieces[token, strip])
        return b"".join(pieces).decode("utf-8", "replace")

    def trace(self, ids: Sequence[int], out: str) -> dict[str, Shown]:
        """As TracedSession says; TapeoutError when the session was not opened for it, or for ids that one batch has no room for."""
        if self._tracer is None or len(ids) > self._batch_size:
            raise TapeoutError(
                f"{len(ids)} tokens cannot be traced in batches of {self._batch_size}, or not at all."
            )
        self.reset()
        with self._tracer.into(out) as found:
            self.prefill(ids)
        return found

    def close(self) -> None:
        """Free the model; may be called twice."""
        if self._context:
            llama = library()
            llama.llama_batch_free(self._batch)
            llama.llama_free(self._context)
            llama.llama_model_free(self._model)
            self._context = self._model = 0

    def _check(self, ids: Sequence[int]) -> None:
        check_ids(ids, self._vocab_size)
        length = self._length + len(ids)
        if length > self.facts.context:
            raise TapeoutError(
                f"{length} tokens do not fit the context of {self.facts.context}; that is the package's own, or what half of "
                "the free memory has room for."
            )

    def _decode(self, ids: Sequence[int], outputs: int) -> Logits:
        """Run one batch; return a view of llama.cpp's own logits of the last ``outputs`` tokens, float32."""
        llama, batch, count = library(), self._batch, len(ids)
        batch.n_tokens = count
        self._token[:count] = ids
        self._position[:count] = np.arange(self._length, self._length + count)
        self._output[:count] = np.arange(count) >= count - outputs
        status = computed(llama.llama_decode, self._context, batch)
        if status:
            why = "found no room in its cache for" if status == 1 else f"gave {status} for"
            raise RuntimeCrash(f"llama_decode {why} {count} tokens at position {self._length}.{log_tail()}")
        self._length += count
        if not outputs:
            return np.empty((0, self._vocab_size), np.float32)
        return np.ctypeslib.as_array(llama.llama_get_logits(self._context), (outputs, self._vocab_size))


class LlamaCppEncoder:
    """An EncoderSession on llama.cpp, which runs sequence by sequence; see ``open_session``."""

    facts: Facts

    def __init__(self, facts: Facts, model: int, context: int) -> None:
        llama = library()
        self.facts = facts
        self._model, self._context = model, context
        self._vocab = llama.llama_model_get_vocab(model)
        self._vocab_size = int(llama.llama_vocab_n_tokens(self._vocab))
        self._width = int(llama.llama_model_n_embd(model))
        self._pooled = llama.llama_pooling_type(context) != llama.LLAMA_POOLING_TYPE_NONE
        self._normalize = _metadata(model, b"tapeout.normalize") == "true"
        self._batch = llama.llama_batch_init(facts.context, 0, 1)

    def encode(self, ids: Sequence[Sequence[int]], mask: Sequence[Sequence[int]]) -> Logits:
        """What the model gives of a batch, 0 at padding; see EncoderSession."""
        rows, seen = check_batch(ids, mask, self._vocab_size, self.facts.context)
        found = np.zeros((len(rows), rows.shape[1], self._width), np.float32)
        if self._pooled:
            found = found[:, 0]
        for row, real, out in zip(rows, seen == 1, found, strict=True):
            places = np.flatnonzero(real)
            out[... if self._pooled else real] = self._run(row[real], places)
        if self._pooled and self._normalize:
            found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)
        return found

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text`` as the model takes it, the tokens around it too."""
        return _tokenized(self._vocab, text, around=True)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens kept: what WordPiece has lost of it stays lost."""
        return b"".join(_piece(self._vocab, token, strip=False) for token in ids).decode("utf-8", "replace")

    def close(self) -> None:
        """Free the model; may be called twice."""
        if self._context:
            llama = library()
            llama.llama_batch_free(self._batch)
            llama.llama_free(self._context)
            llama.llama_model_free(self._model)
            self._context = self._model = 0

    def _run(self, ids: Any, places: Any) -> Logits:
        """States [tokens, width] of one sequence, or its embedding [width]."""
        llama, batch = library(), self._batch
        batch.n_tokens = len(ids)
        for i, (token, place) in enumerate(zip(ids.tolist(), places.tolist(), strict=True)):
            batch.token[i], batch.pos[i], batch.logits[i] = token, place, 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if status := computed(llama.llama_encode, self._context, batch):
            raise RuntimeCrash(f"llama_encode gave {status} for {len(ids)} tokens.{log_tail()}")
        if self._pooled:
            given = llama.llama_get_embeddings_seq(self._context, 0)
            return np.ctypeslib.as_array(given, (self._width,)).copy()
        given = llama.llama_get_embeddings(self._context)
        return np.ctypeslib.as_array(given, (len(ids), self._width)).copy()


def _tokenized(vocab: int, text: str, *, around: bool) -> list[int]:
    """Token ids of a text, special tokens in it recognised; ``around``: with those that the file puts there."""
    data = encoded(text)
    llama, room = library(), len(data) + 16
    while True:
        buffer = (ctypes.c_int32 * room)()
        count = llama.llama_tokenize(vocab, data, len(data), buffer, room, around, True)
        if count >= 0:
            return list(buffer[:count])
        if count == _INT32_MIN or -count <= room:
            raise RuntimeCrash(f"llama.cpp does not tokenize a text of {len(data)} bytes.{log_tail()}")
        room = -count


def _piece(vocab: int, token: int, *, strip: bool) -> bytes:
    """The bytes of one token, without its leading space if ``strip``."""
    llama, room = library(), 64
    while True:
        buffer = ctypes.create_string_buffer(room)
        count = llama.llama_token_to_piece(vocab, token, buffer, room, int(strip), True)
        if count >= 0:
            return buffer.raw[:count]
        if -count <= room:
            raise RuntimeCrash(f"llama.cpp has no text for token {token}.{log_tail()}")
        room = -count


def open_session(
    model: str,
    context: int | None = None,
    threads: int | None = None,
    kv_cache: KvCache = "kv-f16",
    flash_attention: bool | None = None,
    swa_full: bool = False,
    repack: bool = True,
    batch: int = 512,
    ubatch: int = 512,
    traced: bool = False,
    sequences: int = 1,
) -> LlamaCpp | LlamaCppEncoder:
    """Load a GGUF file (or the first of its shards) on the CPU. The defaults are those of llama.cpp's own tools.

    Args:
        model: path of the file.
        context: most tokens of a sequence; None: what the model was trained for. Less when their cache would take more than
            half of the free memory: ``facts.context`` says how many it is.
        threads: None: as many as this process has cores.
        kv_cache: what keys and values are kept in; codes of 8 or 4 bits need heads of whole blocks of 32 elements.
        flash_attention: None: llama.cpp decides (a cache of codes needs it).
        swa_full: keep the whole sequence in the cache of layers with a sliding window, not the window alone.
        repack: let llama.cpp store weights anew in the order that this CPU's kernels like.
        batch: most tokens given to llama.cpp at once.
        ubatch: most tokens that it computes at once.
        traced: see what it computes on its way (a TracedSession, besides); slower.
        sequences: more than 1: a BatchedSession, besides, with room for so many of ``context`` tokens each.

    Raises:
        MissingToolchain: llama-cpp-python is not installed. PackageError: no such file.
        RuntimeCrash: llama.cpp refuses the file; in its own words.
    """
    llama = library()
    if kv_cache not in _CACHE_TYPES:
        raise TapeoutError(f"'{kv_cache}' is not a cache of llama.cpp{nearest(kv_cache, _CACHE_TYPES)}.")
    if not Path(model).is_file():
        raise PackageError(f"{model} is absent; llama.cpp has nothing to load.")
    threads = threads or len(os.sched_getaffinity(0))
    before, begin = psutil.Process().memory_info().rss, perf_counter()
    wanted = llama.llama_model_default_params()
    wanted.n_gpu_layers = 0
    wanted.use_extra_bufts = repack and not (_has_amx() and _has_short_rows(Path(model)))
    _LOG.clear()
    loaded = llama.llama_model_load_from_file(os.fsencode(model), wanted)
    if not loaded:
        raise RuntimeCrash(f"llama.cpp refuses {model}.{log_tail()}")
    own = context or int(llama.llama_model_n_ctx_train(loaded))
    layers = _layers(loaded)
    length = _fits(layers, own, min(ubatch, batch), kv_cache, sequences)
    given = llama.llama_context_default_params()
    encodes = _metadata(loaded, b"general.architecture") == "bert"
    if encodes:  # a sequence at once, and as long as the file says: there is no cache
        given.embeddings, length = True, own
        batch = ubatch = own
    given.n_ctx, given.n_batch, given.n_ubatch = length * sequences, batch, min(ubatch, batch)
    given.n_seq_max = sequences
    given.n_threads = given.n_threads_batch = threads
    given.type_k = given.type_v = _CACHE_TYPES[kv_cache]
    given.flash_attn_type = -1 if flash_attention is None else int(flash_attention)
    given.swa_full = swa_full
    given.offload_kqv = given.op_offload = False
    tracer = None
    if traced:
        neighbours = llama.llama_model_rope_type(loaded) == llama.LLAMA_ROPE_TYPE_NORM
        tracer = Tracer(neighbours)
        given.cb_eval = tracer.callback
    opened = llama.llama_init_from_model(loaded, given)
    if not opened:
        llama.llama_model_free(loaded)
        raise RuntimeCrash(f"llama.cpp makes no context of {length} tokens for {model}.{log_tail()}")
    load_s = perf_counter() - begin
    version = f"llama.cpp {llama.llama_version().decode()} (llama-cpp-python {llama.__version__})"
    device = f"cpu, {threads} threads"
    session: LlamaCpp | LlamaCppEncoder
    # Weights are mapped, and count as resident only once they were read.
    if encodes:
        session = LlamaCppEncoder(Facts(version, device, load_s, 0, length), loaded, opened)
        session.encode([[0]], [[1]])
    else:
        facts = Facts(version, device, load_s, 0, length)
        if sequences > 1:
            from tapeout.targets.llama_cpp_batched import LlamaCppBatched

            session = LlamaCppBatched(facts, loaded, opened, batch, sequences)
        else:
            session = LlamaCpp(facts, loaded, opened, batch, tracer)
        session.cache_bytes = lambda tokens: cache_bytes(layers, tokens, min(ubatch, batch), kv_cache)
        session.decode(0)
        session.reset()
    resident = max(0, psutil.Process().memory_info().rss - before)
    session.facts = Facts(version, device, load_s, resident, length)
    return session


def cache_bytes(
    layers: Iterable[tuple[int | None, int]], context: int, ubatch: int, kv_cache: KvCache
) -> int:
    """Bytes that llama.cpp keeps keys and values in: all of them are taken when a context is made.

    Args:
        layers: of each its sliding window (None: it has none) and the elements of a token's keys and values.
        context: tokens.
        ubatch: tokens computed at once, for which a window has room behind it.
        kv_cache: what they are kept in.
    """

    def padded(cells: int) -> int:
        return -(-cells // _CELLS) * _CELLS

    whole = padded(context)
    elements = sum(
        width * (whole if window is None else min(whole, padded(window + ubatch))) for window, width in layers
    )
    return int(elements * KV_BITS[kv_cache] / 8)


def computed(function: Callable[..., int], *arguments: Any) -> int:
    """Call what multiplies, on a thread where nothing else does if the CPU has AMX.

    ggml configures a thread's tiles once; torch configures them for itself and releases them, and ggml's next product on that
    thread is an illegal instruction.
    """
    return int(_alone().submit(function, *arguments).result() if _has_amx() else function(*arguments))


@functools.cache
def _alone() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "llama.cpp")


@functools.cache
def _has_amx() -> bool:
    with contextlib.suppress(OSError):  # only Linux tells
        return " amx_tile" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    return False


def repacked_bytes(kind: str, each: float, stacked: bool) -> float:
    """Bytes that a weight of a block type takes in the copy that llama.cpp makes for this CPU's kernels; 0: it makes none.

    Args:
        kind, each: GGUF's name of the type, and its bytes a weight.
        stacked: whether it is one of experts that are a tensor together, which AMX's kernels do not take.
    """
    if _has_amx() and not stacked:
        # Tiles of Q8_0 have an int32 a block besides (``TILE_SIZE`` in ggml-cpu/amx/mmq.cpp).
        return {"Q4_0": each, "Q8_0": each + 4 / 32, "Q4_K": each, "Q5_K": each, "Q6_K": each}.get(kind, 0.0)
    return each if kind == "Q4_0" else 0.0


def _has_short_rows(model: Path) -> bool:
    """Whether codes stand in rows of a single block of 32, of which llama.cpp's AMX kernels (0.3.36) compute nonsense."""
    from gguf import GGMLQuantizationType as Kind

    plain = (Kind.F32, Kind.F16, Kind.BF16)
    with contextlib.suppress(Exception):  # llama.cpp says what is wrong with a file
        return any(
            len(each.shape) > 1 and each.shape[0] == 32 and each.tensor_type not in plain
            for each in gguf_header.read(model).tensors
        )
    return False


def _fits(
    layers: Sequence[tuple[int | None, int]], context: int, ubatch: int, kv_cache: KvCache, sequences: int
) -> int:
    """The context, or what of it has a cache of no more than half of the memory that is free, for so many sequences."""
    room = int(psutil.virtual_memory().available // 2 // sequences)
    lengths: list[int] = [*range(_CELLS, context, _CELLS), context]
    found = bisect_right(lengths, room, key=lambda tokens: cache_bytes(layers, tokens, ubatch, kv_cache))
    return lengths[max(0, found - 1)]


def _layers(model: int) -> list[tuple[int | None, int]]:
    """Of each layer its window and the elements of a token's keys and values, as the file says."""
    llama = library()
    arch = _metadata(model, b"general.architecture") or ""

    def stated(key: str) -> str | None:
        return _metadata(model, f"{arch}.attention.{key}".encode())

    share = llama.llama_model_n_embd(model) // llama.llama_model_n_head(model)
    width = sum(int(stated(f"{part}_length") or share) for part in ("key", "value"))
    width *= int(llama.llama_model_n_head_kv(model))
    # Which layers have the window llama.cpp tells for no arch: where not all have it (Gemma), all count as whole.
    window = int(llama.llama_model_n_swa(model)) if arch == "granite_swa" else None
    return [(window, width)] * int(llama.llama_model_n_layer(model))


def _metadata(model: int, key: bytes) -> str | None:
    """The value of a key of the file as llama.cpp prints it (booleans as ``true`` and ``false``); None when it is absent."""
    buffer = ctypes.create_string_buffer(64)
    length = library().llama_model_meta_val_str(model, key, buffer, len(buffer))
    return None if length < 0 else buffer.value.decode("utf-8", "replace")


_LOG: deque[str] = deque(maxlen=20)
"""The last warnings and errors of llama.cpp, which has one log for the whole process."""


@functools.cache
def library() -> Any:
    """llama_cpp, its log turned into ``_LOG``."""
    try:
        import llama_cpp
    except (
        ImportError,
        OSError,
        RuntimeError,
    ) as error:  # the last two: its shared library is missing or does not load
        needs = f"llama.cpp cannot be loaded ({error}): pip install 'tapeout[cpu]'"
        raise MissingToolchain(needs) from error

    level = 0

    def log(new_level: int, text: bytes, _: object) -> None:
        nonlocal level
        if new_level != _CONTINUED:
            level = new_level
        if level >= _WARNING and (line := text.decode("utf-8", "replace").strip()):
            _LOG.append(line)

    global _CALLBACK
    _CALLBACK = llama_cpp.llama_log_callback(log)
    llama_cpp.llama_log_set(_CALLBACK, ctypes.c_void_p(0))
    return llama_cpp


_CALLBACK: Any = None  # llama.cpp keeps a bare pointer to it, so it must never be collected


def log_tail() -> str:
    return f" Its log: {' | '.join(_LOG)}" if _LOG else ""
