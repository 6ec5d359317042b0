"""What llama.cpp computes, for the tests of GGUF."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

Logits = npt.NDArray[np.float32]


@pytest.fixture
def llama_cpp_logits() -> Callable[..., Logits]:
    """Logits [tokens, vocab] of a GGUF file: ``llama_cpp_logits(path, ids, swa_full=True)``."""

    def run(path: Path, ids: list[int], *, batch: int = 512, **options: Any) -> Logits:
        import llama_cpp

        # Caches in float32 and no flash attention, so that the arithmetic is float32 all the way.
        runtime = llama_cpp.Llama(
            str(path), n_ctx=len(ids), n_batch=batch, n_ubatch=batch, n_threads=2, n_threads_batch=2, logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32, flash_attn=False, verbose=False, **options,
        )  # fmt: skip
        try:
            runtime.eval(ids)
            return np.array(runtime.scores[: len(ids)])
        finally:
            runtime.close()

    return run
