"""Small random models on disk, made by transformers, and what llama.cpp computes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from tapeout.models import Model, load

Logits = npt.NDArray[np.float32]

VOCAB = 320


def _byte_level_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["the cat sat on the mat and then it ran to the hat"] * 9, trainer)
    tokenizer.save(str(path))


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Model]:
    """Make a random model: ``make_model("llama", num_key_value_heads=1)``; two layers, norms and biases spread."""

    def make(model_type: str = "llama", **fields: Any) -> Model:
        import torch
        import transformers

        config = {
            "vocab_size": VOCAB,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128,
            "bos_token_id": 0,
            "eos_token_id": 1,
            **fields,
        }
        directory = tmp_path / f"random-{model_type}"
        generator = torch.Generator().manual_seed(7)
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(model_type, **config))
        with torch.no_grad():
            for name, weight in model.named_parameters():
                # Larger than at initialisation: attention is sharp, and a norm or bias left out is seen.
                spread = torch.randn(weight.shape, generator=generator)
                weight.copy_(1 + 0.3 * spread if "norm" in name else 0.2 * spread)
        model.save_pretrained(directory)
        _byte_level_tokenizer(directory / "tokenizer.json")
        return load(directory)

    return make


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
