"""Sessions on ONNX Runtime's CPU provider: what the cpu target runs its ONNX files with."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from platform import machine
from time import perf_counter
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import psutil

from tapeout.errors import MissingToolchain, PackageError, RuntimeCrash, TapeoutError
from tapeout.exporters.onnx import check_size
from tapeout.models.module import SAMPLES
from tapeout.targets.onnxruntime_batched import OnnxBatched
from tapeout.validate.encoders import check_batch
from tapeout.validate.given import check_ids, encoded
from tapeout.validate.modules import Samples, rows
from tapeout.validate.session import Facts, Logits

__all__ = [
    "OnnxEncoder",
    "OnnxGrown",
    "OnnxModule",
    "OnnxRuntime",
    "OnnxSeq2Seq",
    "cache_bytes",
    "open_session",
]


class OnnxRuntime:
    """A Session on onnxruntime; see ``open_session``.

    Past and present of a layer are the same memory: a step writes its keys and values where they stay, and nothing is copied. A long
    prompt is computed chunk by chunk, so that what a step takes beside the cache does not grow with it.
    """

    facts: Facts

    def __init__(self, facts: Facts, session: Any, tokenizer: Any, chunk: int) -> None:
        self.facts = facts
        self._session, self._tokenizer, self._chunk = session, tokenizer, chunk
        self._binding = session.io_binding()
        self._vocab_size = int(session.get_outputs()[0].shape[2])
        self._mask = np.ones(facts.context, np.int64)
        self._ids = np.zeros(chunk, np.int64)
        self._first = np.zeros(1, np.int64)
        latents = "tapeout.latent_cache" in session.get_modelmeta().custom_metadata_map
        self._cache: list[npt.NDArray[np.float32]] = []
        self._layers: list[
            tuple[int | None, int]
        ] = []  # of each cache its window and the elements of a token
        for each in session.get_inputs():
            if each.name.startswith("past_"):
                # Values that are the keys once more take no memory of their own.
                again = latents and each.name.endswith(".value")
                self._cache.append(self._bind(each, self._cache[-1] if again else None))
        self._length = 0

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Append tokens to the sequence at once; return float32 [tokens, vocab], the logits after each."""
        logits = np.empty((len(ids), self._vocab_size), np.float32)
        for at, chunk in self._chunks(ids):
            self._run(chunk, logits[at : at + len(chunk)])
        return logits

    def append(self, ids: Sequence[int]) -> Logits:
        """``prefill`` for those who want the last token's logits only, float32 [1, vocab]."""
        last = np.empty((1, self._vocab_size), np.float32)
        for at, chunk in self._chunks(ids):
            self._run(chunk, last[: at + len(chunk) == len(ids)])
        return last

    def decode(self, token: int) -> Logits:
        """Append one token; return float32 [vocab]."""
        return cast(Logits, self.prefill([token])[0])

    def reset(self) -> None:
        """Begin a new sequence: what is in the cache is not looked at."""
        self._length = 0

    def cache_bytes(self, tokens: int) -> int:
        """Bytes of keys and values of that many tokens."""
        return cache_bytes(self._layers, tokens)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text``; special tokens in it are recognised, none are added."""
        encoded(text)
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens kept; bytes that are not UTF-8 become U+FFFD."""
        check_ids(ids, self._vocab_size)
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def close(self) -> None:
        """Free the model; may be called twice."""
        self._binding = self._session = None
        self._cache = []

    def _bind(self, value: Any, given: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.float32]:
        """Memory for a layer's keys or values [1, heads, tokens, width], given as past and taken as present."""
        _, heads, length, width = value.shape
        window = None
        if isinstance(length, str) and length.startswith("window_"):
            window = int(length.removeprefix("window_"))
        if given is None:
            self._layers.append((window, heads * width))
        cache = _room((1, heads, _rows(window, self.facts.context), width)) if given is None else given
        for bind, name in (
            (self._binding.bind_input, value.name),
            (self._binding.bind_output, value.name.replace("past_key_values", "present")),
        ):
            bind(name, "cpu", 0, np.float32, cache.shape, cache.ctypes.data)
        return cache

    def _chunks(self, ids: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
        check_ids(ids, self._vocab_size)
        length = self._length + len(ids)
        if length > self.facts.context:
            raise TapeoutError(f"{length} tokens do not fit the context of {self.facts.context}.")
        for at in range(0, len(ids), self._chunk):
            yield at, ids[at : at + self._chunk]

    def _run(self, ids: Sequence[int], logits: Logits) -> None:
        """One step; the logits of its last tokens go into ``logits`` [wanted, vocab]."""
        count, binding = len(ids), self._binding
        total = self._length + count
        self._ids[:count] = ids
        self._first[0] = count - len(logits)
        for name, array, shape in (
            ("input_ids", self._ids, (1, count)),
            ("attention_mask", self._mask, (1, total)),
            ("first_logits", self._first, (1,)),
        ):
            binding.bind_input(name, "cpu", 0, np.int64, shape, array.ctypes.data)
        if len(logits):
            shape = (1, *logits.shape)
            binding.bind_output("logits", "cpu", 0, np.float32, shape, logits.ctypes.data)
        else:
            binding.bind_output("logits")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # its own tree, rooted in Exception
            raise RuntimeCrash(
                f"onnxruntime cannot run {count} tokens at position {self._length}: {error}"
            ) from error
        self._length = total


class OnnxGrown(OnnxRuntime):
    """A Session on a graph that optimum made: its cache is handed back and forth, and grows by what it is given."""

    def __init__(self, facts: Facts, session: Any, tokenizer: Any, chunk: int) -> None:
        self.facts = facts
        self._session, self._tokenizer, self._chunk = session, tokenizer, chunk
        self._vocab_size = int(session.get_outputs()[0].shape[2])
        self._given = {each.name: each for each in session.get_inputs()}
        self._names = [each.name for each in session.get_outputs()]
        self._layers = [
            (None, each.shape[1] * each.shape[3])
            for name, each in self._given.items()
            if name.startswith("past_")
        ]
        self._past: dict[str, npt.NDArray[Any]] = {}
        self.reset()

    def reset(self) -> None:
        """Begin a new sequence with an empty cache."""
        self._length = 0
        self._past = {
            name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32)
            for name, each in self._given.items()
            if name.startswith("past_")
        }

    def close(self) -> None:
        """Free the model; may be called twice."""
        self._session = None
        self._past = {}

    def _run(self, ids: Sequence[int], logits: Logits) -> None:
        count = len(ids)
        total = self._length + count
        known = {
            "input_ids": np.array([list(ids)], np.int64),
            "attention_mask": np.ones((1, total), np.int64),
            "position_ids": np.arange(self._length, total, dtype=np.int64)[None],
        }
        feeds = {name: value for name, value in known.items() if name in self._given} | self._past
        try:
            found = dict(zip(self._names, self._session.run(None, feeds), strict=True))
        except Exception as error:  # its own tree, rooted in Exception
            raise RuntimeCrash(
                f"onnxruntime cannot run {count} tokens at position {self._length}: {error}"
            ) from error
        logits[:] = found.pop("logits")[0, count - len(logits) :]
        self._past = {name.replace("present", "past_key_values"): value for name, value in found.items()}
        self._length = total


class OnnxModule:
    """A ModuleSession on onnxruntime."""

    facts: Facts

    def __init__(self, facts: Facts, session: Any, samples: Samples) -> None:
        self.facts = facts
        self._session, self._samples = session, samples
        self._last: tuple[int, list[Logits]] = (-1, [])

    def infer(self, sample: int, output: int) -> Logits:
        """What the module gives of a sample; see ModuleSession."""
        if self._last[0] != sample:
            given = self._samples[sample]
            try:
                found = self._session.run(None, given)
            except Exception as error:  # its own tree, rooted in Exception
                shapes = {name: list(value.shape) for name, value in given.items()}
                raise RuntimeCrash(f"onnxruntime cannot run inputs {shapes}: {error}") from error
            self._last = sample, [rows(each) for each in found]
        return self._last[1][output]

    def close(self) -> None:
        """Free the module; may be called twice."""
        self._session = None


class OnnxEncoder:
    """An EncoderSession on onnxruntime; see ``open_session``."""

    facts: Facts

    def __init__(self, facts: Facts, session: Any, tokenizer: Any) -> None:
        self.facts = facts
        self._session, self._tokenizer = session, tokenizer
        self._vocab_size = int(session.get_modelmeta().custom_metadata_map["tapeout.vocab_size"])
        # What a tokenizer.json cuts and pads to is the habit of whoever saved it.
        tokenizer.no_truncation()
        tokenizer.no_padding()

    def encode(self, ids: Sequence[Sequence[int]], mask: Sequence[Sequence[int]]) -> Logits:
        """What the model gives of a batch; see EncoderSession."""
        rows, seen = check_batch(ids, mask, self._vocab_size, self.facts.context)
        try:
            (out,) = self._session.run(None, {"input_ids": rows, "attention_mask": seen})
        except Exception as error:  # its own tree, rooted in Exception
            raise RuntimeCrash(
                f"onnxruntime cannot run a batch of {list(rows.shape)} tokens: {error}"
            ) from error
        return cast(Logits, out)

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text`` as the model takes it, the tokens around it too."""
        encoded(text)
        return list(self._tokenizer.encode(text, add_special_tokens=True).ids)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens kept."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def close(self) -> None:
        """Free the model; may be called twice."""
        self._session = None


class OnnxSeq2Seq:
    """A Session on onnxruntime of an encoder-decoder; see ``open_session``.

    The first tokens after ``reset`` are the source; what is appended then is the target, behind the token that begins it.
    """

    facts: Facts

    def __init__(self, facts: Facts, encoder: Any, decoder: Any, tokenizer: Any) -> None:
        self.facts = facts
        self._encoder, self._decoder, self._tokenizer = encoder, decoder, tokenizer
        self._start = int(decoder.get_modelmeta().custom_metadata_map["tapeout.start"])
        self._vocab_size = int(decoder.get_outputs()[0].shape[2])
        self._outputs = [each.name for each in decoder.get_outputs()]
        self._empty = {
            each.name: np.zeros((1, each.shape[1], 0, each.shape[3]), np.float32)
            for each in decoder.get_inputs()
            if each.name.startswith("past_")
        }
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._source: dict[str, Any] = {}
        self._past, self._length = self._empty, 0

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Take the source, and return what follows the target's begin, float32 [1, vocab]; or append tokens to the target."""
        if self._source:
            return self._step(ids)
        self._check(ids, 0)
        given = np.array([ids], np.int64)
        mask = np.ones_like(given)
        names = [each.name for each in self._encoder.get_outputs()]
        crossed = ran(self._encoder, names, {"input_ids": given, "attention_mask": mask})
        self._source = dict(zip(names, crossed, strict=True)) | {"encoder_attention_mask": mask}
        return self._step([self._start])

    def decode(self, token: int) -> Logits:
        """Append one token to the target; return float32 [vocab]."""
        return cast(Logits, self._step([token])[0])

    def reset(self) -> None:
        """Begin anew: the next tokens are a source."""
        self._source, self._past, self._length = {}, self._empty, 0

    def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text`` as the model takes it, with the token that ends it."""
        encoded(text)
        return list(self._tokenizer.encode(text, add_special_tokens=True).ids)

    def detokenize(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens kept."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def close(self) -> None:
        """Free the model; may be called twice."""
        self._encoder = self._decoder = None
        self._source = self._past = {}

    def _step(self, ids: Sequence[int]) -> Logits:
        self._check(ids, self._length)
        feed = {"input_ids": np.array([ids], np.int64)} | self._source | self._past
        logits, *present = ran(self._decoder, self._outputs, feed)
        names = [name.replace("present", "past_key_values") for name in self._outputs[1:]]
        self._past = dict(zip(names, present, strict=True))
        self._length += len(ids)
        return cast(Logits, logits[0])

    def _check(self, ids: Sequence[int], before: int) -> None:
        if not ids or before + len(ids) > self.facts.context:
            raise TapeoutError(
                f"{before + len(ids)} tokens do not fit the context of {self.facts.context}, or there are none."
            )
        check_ids(ids, self._vocab_size)


def ran(session: Any, outputs: list[str], feed: dict[str, Any]) -> list[Any]:
    """Outputs of a run on ``input_ids`` [batch, tokens]; RuntimeCrash in the runtime's own words."""
    try:
        found: list[Any] = session.run(outputs, feed)
    except Exception as error:  # its own tree, rooted in Exception
        raise RuntimeCrash(f"onnxruntime cannot run {feed['input_ids'].shape[1]} tokens: {error}") from error
    return found


def _rows(window: int | None, context: int) -> int:
    """Tokens that a layer's cache has room for: behind a window for what is written before old rows are dropped, all at once."""
    return context if window is None else min(context, window + window // 8 + 1)


def cache_bytes(layers: Iterable[tuple[int | None, int]], context: int) -> int:
    """Bytes of keys and values of a sequence that fills the context.

    Args:
        layers: of each its sliding window (None: it has none) and the elements of a token's keys and values.
        context: tokens.
    """
    return sum(4 * _rows(window, context) * width for window, width in layers)


def _room(shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """Zeros that take memory as they are written, so that a short text does not pay for a long context.

    A head's rows are far from the next head's: with huge pages (which numpy asks for) the first token would take 2 MiB of each.
    """
    memory = mmap.mmap(-1, 4 * math.prod(shape))
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel that has none
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.float32).reshape(shape)


def _overflows() -> bool:
    """Whether pairs of int8 products are summed in 16 bits here: on x86 without VNNI, or where nothing says that it is there.

    Asked for others, onnxruntime takes slow kernels on any x86 CPU.
    """
    flags = Path("/proc/cpuinfo")
    return machine() in ("x86_64", "AMD64") and not (flags.exists() and "vnni" in flags.read_text())


def open_session(
    directory: str,
    context: int,
    graph: str | None = None,
    threads: int | None = None,
    chunk: int = 512,
    sequences: int = 1,
) -> OnnxRuntime | OnnxBatched | OnnxEncoder | OnnxModule | OnnxSeq2Seq:
    """Load ``model.onnx`` and its data on the CPU.

    Args:
        directory: where they stand, with ``tokenizer.json``, or ``samples.safetensors`` of a module.
        context: most tokens of a sequence; no more than the graph was made for. Of a module it says nothing.
        graph: path of another graph over the same data; None: ``model.onnx``.
        threads: None: as many as this process has cores.
        chunk: most tokens of a prompt that are computed at once.
        sequences: more than 1: a BatchedSession with room for so many of ``context`` tokens each.

    Raises:
        MissingToolchain: onnxruntime is not installed. PackageError: no such file.
        TapeoutError: the graph takes one sequence alone.
        RuntimeCrash: onnxruntime refuses the model; in its own words.
    """
    _library()
    model = Path(graph) if graph else Path(directory) / "model.onnx"
    samples, words = Path(directory) / SAMPLES, Path(directory) / "tokenizer.json"
    for path in (model, words if words.is_file() or not samples.is_file() else samples):
        if not path.is_file():
            raise PackageError(f"{path} is absent; onnxruntime has nothing to load.")
    check_size(model)
    tokenizer = tokenizer_of(directory) if words.is_file() else None
    before, begin = psutil.Process().memory_info().rss, perf_counter()
    loaded, version, device = load_graph(directory, model, model.read_bytes(), threads)
    said = loaded.get_modelmeta().custom_metadata_map
    source = None
    if "tapeout.start" in said:  # an encoder-decoder: two graphs over one data file
        beside = model.with_name("encoder.onnx")
        if not beside.is_file():
            raise PackageError(f"{beside} is absent; onnxruntime has nothing to load.")
        source, _, _ = load_graph(directory, beside, beside.read_bytes(), threads)
    load_s = perf_counter() - begin
    facts = Facts(version, device, load_s, 0, context)
    session: OnnxRuntime | OnnxBatched | OnnxEncoder | OnnxModule | OnnxSeq2Seq
    # What is mapped counts as resident only once it was read.
    if said.get("tapeout.graph") == "torch.export":
        from safetensors.numpy import load_file

        session = OnnxModule(facts, loaded, Samples(load_file(samples)))
        session.infer(0, 0)
    elif source is not None:
        session = OnnxSeq2Seq(facts, source, loaded, tokenizer)
        session.prefill([0])
        session.reset()
    elif "tapeout.output" in said:
        session = OnnxEncoder(facts, loaded, tokenizer)
        session.encode([[0]], [[1]])
    elif sequences > 1:
        if said.get("tapeout.graph") == "optimum":
            raise TapeoutError(
                "the cache of a graph that optimum made grows as a whole: it takes one sequence."
            )
        session = OnnxBatched(facts, loaded, chunk, sequences)
        session.step([(0, [0])])
        session.forget(0)
    else:
        kind = OnnxGrown if said.get("tapeout.graph") == "optimum" else OnnxRuntime
        session = kind(facts, loaded, tokenizer, chunk)
        session.decode(0)
        session.reset()
    resident = max(0, psutil.Process().memory_info().rss - before)
    session.facts = Facts(version, device, load_s, resident, context)
    return session


def load_graph(
    directory: str, model: Path, graph: bytes, threads: int | None, settings: Mapping[str, str] | None = None
) -> tuple[Any, str, str]:
    """An InferenceSession of a graph over the data in a directory, its version, and what it runs on.

    ``settings``: entries of the session's configuration.
    """
    onnxruntime = _library()
    threads = threads or len(os.sched_getaffinity(0))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # what is fatal is raised as well
    if _overflows():
        options.add_session_config_entry("session.x64quantprecision", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", directory)
    for name, value in (settings or {}).items():
        options.add_session_config_entry(name, value)
    try:
        loaded = onnxruntime.InferenceSession(graph, options, ["CPUExecutionProvider"])
    except Exception as error:  # its own tree, rooted in Exception
        raise RuntimeCrash(f"onnxruntime refuses {model}: {error}") from error
    return loaded, f"onnxruntime {onnxruntime.__version__}", f"cpu, {threads} threads"


def _library() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingToolchain(
            f"onnxruntime cannot be loaded ({error}): pip install 'tapeout[onnx]'"
        ) from error
    return onnxruntime


def tokenizer_of(directory: str) -> Any:
    """The tokenizer beside a graph; PackageError when there is none."""
    from tokenizers import Tokenizer

    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise PackageError(f"{path} is absent; onnxruntime has nothing to load.")
    return Tokenizer.from_file(str(path))
