"""GGUF, through llama-cpp-python's low-level API."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Any

import numpy as np

from tapeout.targets.data.check.common import ARTIFACT, Array, Decoder, Encoder, Runtime, cores

CACHES = {"kv-f16": 1, "kv-int8": 8, "kv-int4": 2}  # of ggml_type
BATCH = 512  # tokens of a call, llama.cpp's own


class LlamaCpp:
    """A file of llama.cpp, opened on the processor; refused files raise with llama.cpp's last words.

    Args:
        model: the file, or the first of its shards.
        context: most tokens of a sequence.
        cache: what keys and values are kept in.
        batch: most tokens of a call.
        encodes: whether it gives states or embeddings instead of logits.
    """

    def __init__(self, model: Path, context: int, cache: int, batch: int, encodes: bool) -> None:
        import llama_cpp

        self.llama, said = llama_cpp, []

        def log(level: int, text: bytes, _: object) -> None:
            if level in (3, 4, 5):  # warnings, errors, and what goes on
                said.append(text.decode("utf-8", "replace").strip())

        self.callback = llama_cpp.llama_log_callback(log)  # llama.cpp keeps a bare pointer to it
        llama_cpp.llama_log_set(self.callback, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        wanted = llama_cpp.llama_model_default_params()
        wanted.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(model), wanted)
        if self.model and llama_cpp.llama_model_n_embd(self.model) == 32:
            # Rows of one block, of which llama.cpp's AMX kernels (0.3.36) compute nonsense: leave them as they are.
            llama_cpp.llama_model_free(self.model)
            wanted.use_extra_bufts = False
            self.model = llama_cpp.llama_model_load_from_file(os.fsencode(model), wanted)
        if not self.model:
            raise RuntimeError(f"llama.cpp refuses {model.name}: {' | '.join(said[-5:])}")
        given = llama_cpp.llama_context_default_params()
        given.n_ctx, given.n_batch, given.n_ubatch = context, batch, batch
        given.n_threads = given.n_threads_batch = cores()
        given.type_k = given.type_v = cache
        given.embeddings = encodes
        self.context = llama_cpp.llama_init_from_model(self.model, given)
        if not self.context:
            raise RuntimeError(f"llama.cpp makes no context of {context} tokens: {' | '.join(said[-5:])}")
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab = int(llama_cpp.llama_vocab_n_tokens(vocabulary))
        self.width = int(llama_cpp.llama_model_n_embd(self.model))
        self.batch = llama_cpp.llama_batch_init(batch, 0, 1)
        self.runtime = f"llama.cpp in llama-cpp-python {llama_cpp.__version__}"

    def metadata(self, key: bytes) -> str:
        """The value of a key of the file as text; empty when it is absent."""
        buffer = ctypes.create_string_buffer(64)
        length = self.llama.llama_model_meta_val_str(self.model, key, buffer, len(buffer))
        return "" if length < 0 else buffer.value.decode("utf-8", "replace")

    def run(self, function: Any, ids: list[int], past: int, outputs: int) -> None:
        """Tokens at their places, the last of which give something."""
        batch, count = self.batch, len(ids)
        batch.n_tokens = count
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, past + i, i >= count - outputs
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        if status := function(self.context, batch):
            raise RuntimeError(f"llama.cpp gives {status} for {count} tokens at position {past}")


class LlamaDecoder(Decoder):
    """See Decoder."""

    def __init__(self, opened: LlamaCpp, context: int) -> None:
        self.opened, self.context, self.runtime = opened, context, opened.runtime
        self.window, self.past = int(opened.llama.llama_model_n_swa(opened.model)), 0

    def begin(self, function: str) -> None:
        """With an empty cache."""
        llama = self.opened.llama
        llama.llama_memory_clear(llama.llama_get_memory(self.opened.context), True)
        self.past = 0

    def last(self, ids: list[int], outputs: int) -> Array:
        """Logits after the last tokens."""
        opened = self.opened
        opened.run(opened.llama.llama_decode, ids, self.past, outputs)
        self.past += len(ids)
        found = opened.llama.llama_get_logits(opened.context)
        return np.ctypeslib.as_array(found, (outputs, opened.vocab)).copy()


class LlamaEncoder(Encoder):
    """See Encoder."""

    def __init__(self, opened: LlamaCpp, context: int) -> None:
        self.opened, self.context, self.runtime = opened, context, opened.runtime
        llama = opened.llama
        self.pooled = llama.llama_pooling_type(opened.context) != llama.LLAMA_POOLING_TYPE_NONE
        self.normalize = opened.metadata(b"tapeout.normalize") == "true"

    def encode(self, ids: list[int]) -> Array:
        """See Encoder."""
        opened, llama = self.opened, self.opened.llama
        opened.run(llama.llama_encode, ids, 0, len(ids))
        if self.pooled:
            found = llama.llama_get_embeddings_seq(opened.context, 0)
        else:
            found = llama.llama_get_embeddings(opened.context)
        row = np.ctypeslib.as_array(found, (1, opened.width)).copy()
        return row / max(float(np.linalg.norm(row)), 1e-12) if self.pooled and self.normalize else row


class Gguf(Runtime):
    """See Runtime."""

    formats = ("gguf",)
    needs = ("llama_cpp", "numpy")
    install = "pip install llama-cpp-python"

    def opened(self, root: Path, manifest: dict[str, Any], unit: str) -> Any:
        """As llama.cpp's own tools open it, with the cache that was chosen."""
        said, options = manifest["artifact"], manifest["target"]["options"]
        context, encodes = said["context"], "output" in manifest["model"]
        cache = CACHES[options.get("kv_cache", "kv-f16")]
        batch = context if encodes else min(BATCH, context)
        opened = LlamaCpp(root / ARTIFACT / said["files"][0], context, cache, batch, encodes)
        return (LlamaEncoder if encodes else LlamaDecoder)(opened, context)


RUNTIME = Gguf()
