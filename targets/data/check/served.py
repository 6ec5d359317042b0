"""Directories on the servers that load them: vLLM and TensorRT-LLM. They take whole prompts, so a step asks for the sequence so far."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from tapeout.targets.data.check.common import ARTIFACT, Array, Decoder, Runtime, installed, torch_gpu


def vocab_of(root: Path) -> int:
    """Tokens of the vocabulary, without what servers pad it with."""
    said = json.loads((root / ARTIFACT / "config.json").read_text(encoding="utf-8"))
    return int(said["vocab_size"])


class Vllm(Decoder):
    """vLLM, whose log-probabilities are logits but for a constant of each token, which KL does not see."""

    def __init__(self, root: Path, context: int) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        import vllm

        self.context = context - 1  # it wants room for the token that it makes of a prompt
        self.ids: list[int] = []
        self.model = vllm.LLM(
            model=str(root / ARTIFACT),
            max_model_len=context,
            max_logprobs=-1,
            enable_prefix_caching=True,
            seed=0,
        )
        self.all, self.one = (
            vllm.SamplingParams(
                max_tokens=1, temperature=0.0, logprobs=-1, prompt_logprobs=prompts, detokenize=False
            )
            for prompts in (-1, None)
        )
        self.vocab = vocab_of(root)
        self.runtime, self.chip = f"vLLM {vllm.__version__}", torch.cuda.get_device_name()

    def begin(self, function: str) -> None:
        """With no tokens."""
        self.ids = []

    def step(self, function: str, ids: list[int]) -> Array:
        """The last row."""
        self.ids += ids
        (answer,) = self.model.generate([{"prompt_token_ids": self.ids}], self.one, use_tqdm=False)
        return self.dense([answer.outputs[0].logprobs[0]])

    def rows(self, ids: list[int]) -> Array:
        """See Decoder."""
        first = len(self.ids)
        self.ids += ids
        (answer,) = self.model.generate([{"prompt_token_ids": self.ids}], self.all, use_tqdm=False)
        return self.dense([*answer.prompt_logprobs[first + 1 :], answer.outputs[0].logprobs[0]])

    def dense(self, rows: list[Any]) -> Array:
        """Log-probabilities by token as rows; what the vocabulary is padded with is left out."""
        found = np.full((len(rows), self.vocab), -1e4, np.float32)
        for at, row in enumerate(rows):
            for token, told in row.items():
                if token < self.vocab:
                    found[at, token] = max(told.logprob, -1e4)
        return found


class TensorRtLlm(Decoder):
    """TensorRT-LLM, whose answers have the logits of a prompt's tokens."""

    def __init__(self, root: Path, context: int) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        import tensorrt_llm
        import torch

        self.context = context - 1
        self.ids: list[int] = []
        self.model = tensorrt_llm.LLM(model=str(root / ARTIFACT), max_seq_len=context)
        self.all = tensorrt_llm.SamplingParams(max_tokens=1, temperature=0.0, return_context_logits=True)
        self.vocab = vocab_of(root)
        self.runtime, self.chip = f"TensorRT-LLM {tensorrt_llm.__version__}", torch.cuda.get_device_name()

    def begin(self, function: str) -> None:
        """With no tokens."""
        self.ids = []

    def step(self, function: str, ids: list[int]) -> Array:
        """The last row."""
        return self.rows(ids)[-1:]

    def rows(self, ids: list[int]) -> Array:
        """See Decoder."""
        self.ids += ids
        answer = self.model.generate(list(self.ids), self.all)
        return np.asarray(answer.context_logits.float().cpu().numpy(), np.float32)[-len(ids) :, : self.vocab]


class Served(Runtime):
    """See Runtime; ``servers`` in the order in which they are preferred."""

    formats = ("modelopt",)
    needs = ("torch", "numpy")
    servers: tuple[str, ...] = ("tensorrt_llm", "vllm")
    install = "pip install tensorrt-llm, or pip install vllm"

    def unable(self, root: Path, manifest: dict[str, Any]) -> str | None:
        """No server, or no GPU."""
        if not any(installed(name) for name in self.servers):
            return f"None of {', '.join(self.servers)} can be imported: {self.install}."
        return None if torch_gpu() else "The servers of this format need a GPU, and torch sees none."

    def units(self, root: Path, manifest: dict[str, Any]) -> list[str]:
        """The GPU."""
        return ["gpu"]

    def opened(self, root: Path, manifest: dict[str, Any], unit: str) -> Any:
        """By the first server that is installed."""
        server = next(name for name in self.servers if installed(name))
        return (Vllm if server == "vllm" else TensorRtLlm)(root, manifest["artifact"]["context"])


RUNTIME: Runtime = Served()
