"""Sessions on the servers that load a directory: vLLM and TensorRT-LLM, each through its own ``LLM`` class.

Both take whole prompts. A session therefore asks for the sequence so far and the new tokens; the server's cache of prefixes, which is
on, computes only what is new. vLLM tells log-probabilities: logits but for a constant of each token, which no gate of ``runtime`` sees.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, Protocol, cast

import numpy as np

from tapeout.errors import MissingToolchain, TapeoutError
from tapeout.models.decoder import ConfigReader
from tapeout.models.families import family
from tapeout.validate import pretrained
from tapeout.validate.given import check_ids
from tapeout.validate.session import Facts, Logits, Session

Server = Literal["vllm", "tensorrt_llm"]

_NAMES: Mapping[Server, str] = {"vllm": "vLLM", "tensorrt_llm": "TensorRT-LLM"}


def on_gpu(path: Path, servers: Sequence[Server]) -> Session | None:
    """The directory on this machine's GPU: by the first of these servers that is installed, else by transformers with kernels of ours.

    None: torch sees no GPU. Called in a worker process.

    Raises:
        MissingToolchain: neither a server nor what the kernels need is installed.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    if server := next((name for name in servers if importlib.util.find_spec(name)), None):
        return open_session(path, server)
    absent = [name for name in ("triton", "accelerate") if importlib.util.find_spec(name) is None]
    if absent:
        raise MissingToolchain(
            f"a GPU is here, and running {path} on it needs {' and '.join(absent)}: pip install {' '.join(absent)}. "
            "CUDA_VISIBLE_DEVICES= keeps to the CPU."
        )
    from tapeout.targets import gpu

    return gpu.open_session(path)


def open_session(path: Path, server: Server) -> Served:
    """Load a directory onto the machine's GPU by a server; called in a worker process.

    Raises:
        TapeoutError: the server does not load it; with its words.
    """
    raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config = family(raw["model_type"]).config(ConfigReader(raw))
    begin = perf_counter()
    try:
        kind: type[_Vllm] | type[_TensorRt] = _Vllm if server == "vllm" else _TensorRt
        engine: Engine = kind(path, config.max_position_embeddings)
    except Exception as error:  # what it raises depends on what it lacks
        raise TapeoutError(f"{_NAMES[server]} does not load {path}: {error}") from error
    facts = Facts(
        runtime=f"{_NAMES[server]} {importlib.import_module(server).__version__}",
        device=engine.device,
        load_s=perf_counter() - begin,
        resident_bytes=engine.resident_bytes,
        context=config.max_position_embeddings,
    )
    return Served(path, engine, config.vocab_size, facts)


class Engine(Protocol):
    """A server's side: logits of a prompt's tokens, from ``first`` on, float32 [tokens - first, vocab]."""

    device: str
    resident_bytes: int

    def logits(self, ids: Sequence[int], first: int, vocab: int) -> Logits:
        """See above."""

    def close(self) -> None:
        """Free the model."""


class Served(pretrained.Words):
    """A Session on a server; see ``open_session``."""

    facts: Facts

    def __init__(self, directory: Path, engine: Engine, vocab_size: int, facts: Facts) -> None:
        self.facts = facts
        self.words, self._engine, self._vocab = directory, engine, vocab_size
        self._ids: list[int] = []

    def prefill(self, ids: Sequence[int]) -> Logits:
        """Append tokens to the sequence at once; return float32 [tokens, vocab], the logits after each."""
        self._room(ids)
        first = len(self._ids)
        self._ids += ids
        return self._engine.logits(self._ids, first, self._vocab)

    def append(self, ids: Sequence[int]) -> Logits:
        """``prefill`` for those who want the last token's logits only, float32 [1, vocab]."""
        *before, last = ids
        self._room(ids)
        self._ids += before
        return self.prefill([last])

    def decode(self, token: int) -> Logits:
        """Append one token; return float32 [vocab]."""
        return cast(Logits, self.prefill([token])[0])

    def reset(self) -> None:
        """Begin a new sequence."""
        self._ids = []

    def close(self) -> None:
        """Free the model."""
        self._engine.close()

    def _room(self, ids: Sequence[int]) -> None:
        length = len(self._ids) + len(ids)
        if length >= self.facts.context:  # a server wants room for the token that it makes of a prompt
            raise TapeoutError(
                f"{length} tokens and one more do not fit the context of {self.facts.context}."
            )
        check_ids(ids, self._vocab)


class _Vllm:
    """vLLM: log-probabilities of the whole vocabulary, of a prompt's tokens and of the one that it makes."""

    def __init__(self, path: Path, context: int) -> None:
        import torch
        from vllm import LLM, SamplingParams

        self._llm: Any = LLM(
            model=str(path),
            max_model_len=context,
            max_logprobs=-1,
            enable_prefix_caching=True,
            seed=0,
        )
        self._all = SamplingParams(
            max_tokens=1, temperature=0.0, logprobs=-1, prompt_logprobs=-1, detokenize=False
        )
        self._last = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, detokenize=False)
        self.device = torch.cuda.get_device_name()
        free, total = torch.cuda.mem_get_info()
        self.resident_bytes = total - free

    def logits(self, ids: Sequence[int], first: int, vocab: int) -> Logits:
        """See ``Engine``. Of the last token alone the prompt's own are not asked for: then prefixes are not computed again."""
        single = first == len(ids) - 1
        prompt = [{"prompt_token_ids": list(ids)}]
        (answer,) = self._llm.generate(prompt, self._last if single else self._all, use_tqdm=False)
        rows = [] if single else list(answer.prompt_logprobs[first + 1 :])
        return np.stack([_dense(row, vocab) for row in (*rows, answer.outputs[0].logprobs[0])])

    def close(self) -> None:
        """Free the model."""
        self._llm = None


def _dense(row: Mapping[int, Any], vocab: int) -> Logits:
    """Log-probabilities by token as a vector; tokens that the server pads its vocabulary with are left out."""
    found = np.full(vocab, -np.inf, np.float32)
    for token, told in row.items():
        if token < vocab:
            found[token] = told.logprob
    return found


class _TensorRt:
    """TensorRT-LLM: the logits of a prompt's tokens, its context."""

    def __init__(self, path: Path, context: int) -> None:
        import torch
        from tensorrt_llm import LLM, SamplingParams

        self._llm: Any = LLM(model=str(path), max_seq_len=context)
        self._all = SamplingParams(max_tokens=1, temperature=0.0, return_context_logits=True)
        self.device = torch.cuda.get_device_name()
        free, total = torch.cuda.mem_get_info()
        self.resident_bytes = total - free

    def logits(self, ids: Sequence[int], first: int, vocab: int) -> Logits:
        """See ``Engine``. Prefixes that the cache holds have no logits in its answer."""
        answer = self._llm.generate(list(ids), self._all)
        found = np.asarray(answer.context_logits.float().cpu().numpy(), np.float32)[..., :vocab]
        if len(found) < len(ids) - first:
            raise TapeoutError(
                f"TensorRT-LLM told {len(found)} rows of logits, of {len(ids) - first} that were asked for."
            )
        return found[first - len(ids) :]

    def close(self) -> None:
        """Free the model."""
        self._llm.shutdown()
