"""TensorRT-LLM's engine, which trtllm-build makes of the ranks. It tells tokens, not logits, unless it was built to gather them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from tapeout.targets.data.check.common import (
    ARTIFACT,
    GOLDEN,
    Gate,
    Runtime,
    attempt,
    failure,
    golden_of,
    verdict,
)

ENGINE = "engine"


class Engine:
    """An engine, and the token that it takes next."""

    def __init__(self, root: Path) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        import tensorrt_llm
        import torch
        from tensorrt_llm._tensorrt_engine import LLM

        self.model = LLM(model=str(root / ARTIFACT / ENGINE), skip_tokenizer_init=True)
        self.one = tensorrt_llm.SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, end_id=-1)
        self.runtime, self.chip = f"TensorRT-LLM {tensorrt_llm.__version__}", torch.cuda.get_device_name()

    def next(self, ids: list[int]) -> int:
        """The likeliest token."""
        return int(self.model.generate(list(ids), self.one).outputs[0].token_ids[0])

    def try_out(self, ids: list[int]) -> None:
        """The first call."""
        self.next(ids)

    def gates(self, root: Path, limit: float) -> list[Gate]:
        """The likeliest token of each prompt."""

        def measured() -> Gate:
            pairs = golden_of(root)
            if not pairs:
                return failure(
                    "golden-token", f"the package has no {GOLDEN} that can be used here.", "skipped"
                )
            wrong = sum(self.next(ids) != int(row[0].argmax()) for ids, row in pairs)
            told = f"{wrong} of {len(pairs)} prompts of {GOLDEN} go on with another token; its logits the engine does not tell."
            return verdict("golden-token", "prompts with another likeliest token", wrong, 0, told)

        return [attempt("golden-token", measured)]

    def speed(self, contexts: list[int]) -> dict[str, Any]:
        """trtllm-bench measures it."""
        return {}


class Trtllm(Runtime):
    """See Runtime."""

    formats = ("trtllm",)
    needs = ("tensorrt_llm", "torch", "numpy")
    install = "pip install 'tensorrt-llm>=1.2,<1.3'"

    def unable(self, root: Path, manifest: dict[str, Any]) -> str | None:
        """Without an engine."""
        if any((root / ARTIFACT / ENGINE).glob("*.engine")):
            return None
        return "There is no engine yet: README.md has the command of trtllm-build that builds it."

    def units(self, root: Path, manifest: dict[str, Any]) -> list[str]:
        """The GPUs together."""
        return ["gpu"]

    def opened(self, root: Path, manifest: dict[str, Any], unit: str) -> Any:
        """The engine."""
        return Engine(root)


RUNTIME: Runtime = Trtllm()
