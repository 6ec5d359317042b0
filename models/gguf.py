"""GGUF files as checkpoints: config and tokenizer from the header into a directory, tensors where they lie in the file.

Arch ``llama`` only: it is what llama.cpp makes of the families that are known here. A file says what it says: llama.cpp drops
the sliding window of a Mistral, so it is none when it comes back.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tapeout.errors import MissingToolchain, ModelError
from tapeout.files import cache_directory, canonical_json, lock, writing
from tapeout.models import gguf_header, gguf_tokenizer
from tapeout.models.checkpoint import SourceTensor
from tapeout.models.decoder import DecoderConfig, TensorSpec
from tapeout.models.rope import Rope, divisors

# llama.cpp's converter folds llama3's scaling into a table; what it was made from is one of these (Llama 3.1 and 3.2).
_LLAMA3: list[dict[str, Any]] = [
    {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    for factor in (8.0, 32.0)
]


def directory_of(file: Path) -> Path:
    """The directory that stands for a GGUF file, made in the cache when it is not there.

    Raises:
        ModelError: no whole GGUF file, another arch, or a tokenizer that cannot be rebuilt.
    """
    state = file.stat()
    key = hashlib.sha256(f"{file}\n{state.st_size}\n{state.st_mtime_ns}".encode()).hexdigest()
    directory = cache_directory() / "gguf" / key[:16] / file.stem
    with lock(directory, wait=True), writing(directory):
        if not directory.exists():
            partial = directory.with_name(f".{directory.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            header = _open(file)
            _write(partial / "config.json", _config(file, header))
            for name, content in gguf_tokenizer.files(file, header.fields).items():
                if isinstance(content, Path):
                    shutil.copyfile(content, partial / name)
                else:
                    _write(partial / name, content)
            partial.rename(directory)
    return directory


def tensors(file: Path, config: DecoderConfig, specs: Mapping[str, TensorSpec]) -> Mapping[str, SourceTensor]:
    """The tensors of a GGUF file by their Hugging Face names.

    Raises:
        ModelError: one is missing, unexpected, or of another shape.
    """
    import gguf

    header = _open(file)
    found = {tensor.name: tensor for tensor in header.tensors if tensor.name != "rope_freqs.weight"}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_layers)
    wanted = {names.get_name(name, try_suffixes=(".weight", ".bias")): name for name in specs}
    wrong = [f"missing: {name}" for name in sorted(wanted.keys() - found.keys())]
    wrong += [f"unexpected: {name}" for name in sorted(found.keys() - wanted.keys())]
    tensors = {}
    for name, source in wanted.items():
        if name not in found:
            continue
        shape = tuple(int(n) for n in reversed(found[name].shape))
        if shape != specs[source].shape:
            wrong.append(f"{name} is {list(shape)} where the header says {list(specs[source].shape)}")
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(source.split(".")[-2], 0)
        kind, at = found[name].tensor_type.name, int(found[name].data_offset)
        tensors[source] = SourceTensor(source, kind, shape, file, at, int(found[name].n_bytes), heads)
    if wrong:
        more = f" … and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ModelError(f"the tensors in {file} do not fit its header: {'; '.join(wrong[:5])}{more}.")
    return tensors


@cache
def _open_at(file: Path, size: int, time: int) -> Any:
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise MissingToolchain("GGUF files need the gguf library: pip install 'tapeout[cpu]'.") from None
    try:
        header = gguf_header.read(file)
    # What a damaged file raises depends on where it is cut: numpy's errors, KeyError, …
    except Exception as error:
        raise ModelError(
            f"{file} ({size} bytes) is not a whole GGUF file: {error}. Fetch the file again."
        ) from error
    if header.byte_order == "S":
        raise ModelError(f"{file} is of the other byte order; tapeout reads little-endian GGUF files.")
    return header


def _open(file: Path) -> Any:
    """The library's reader; kept, since it takes seconds to walk a large vocabulary."""
    if not file.exists():
        raise ModelError(f"{file} is gone: the model was loaded from it.")
    state = file.stat()
    return _open_at(file, state.st_size, state.st_mtime_ns)


def _write(path: Path, value: Any) -> None:
    path.write_text(value if isinstance(value, str) else canonical_json(value), encoding="utf-8")


def _config(file: Path, header: Any) -> dict[str, Any]:
    """``config.json`` of a file of arch ``llama``."""
    fields: Mapping[str, Any] = header.fields
    arch = _value(fields, "general.architecture")
    if arch != "llama":
        raise ModelError(f"{file} has the arch '{arch}'; of GGUF files tapeout reads the arch 'llama'.")
    if (shards := _value(fields, "split.count", 1)) > 1:
        raise ModelError(f"{file} is one of {shards} shards; join them with `llama-gguf-split --merge`.")

    def number(name: str, default: Any = ...) -> Any:
        value = _value(fields, f"llama.{name}", default)
        if value is ...:
            raise ModelError(f"{file} lacks llama.{name}, which a llama model needs.")
        # A float32 that stands for a decimal: 9.999999747378752e-06 was written as 1e-5.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    shapes = {t.name: tuple(int(n) for n in reversed(t.shape)) for t in header.tensors}
    if "token_embd.weight" not in shapes:
        raise ModelError(f"{file} has no token_embd.weight: it holds no language model.")
    for name in (
        "expert_count",
        "attention.sliding_window",
        "attention.clamp_kqv",
        "rope.scaling.attn_factor",
    ):
        if number(name, None):
            raise ModelError(f"{file} has llama.{name} = {number(name)}, which a llama model does not.")
    heads, hidden = number("attention.head_count"), number("embedding_length")
    head_dim = number("attention.key_length", hidden // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if number(name, head_dim) != head_dim:
            raise ModelError(f"{file} has llama.{name} = {number(name)} where a head has {head_dim}.")
    special = {
        f"{name}_token_id": _value(fields, f"tokenizer.ggml.{key}_token_id", None)
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"))
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": number("feed_forward_length"),
        "num_hidden_layers": number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": number("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(file, header, number, head_dim),
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
        "tie_word_embeddings": "output.weight" not in shapes,
        **special,
        "quantization_config": {"quant_method": "gguf", "file": str(file)},
    }


def _rope_scaling(file: Path, header: Any, number: Any, head_dim: int) -> dict[str, Any] | None:
    kind = number("rope.scaling.type", "none")
    factor = number("rope.scaling.factor", number("rope.scale_linear", 1.0))
    table = [tensor.data for tensor in header.tensors if tensor.name == "rope_freqs.weight"]
    if table:
        theta = number("rope.freq_base", 10000.0)
        for scaling in _LLAMA3:
            # Computed in float32 by llama.cpp's converter, in float64 here: apart by a few units in the last place.
            expected = divisors(Rope(theta, "llama3", scaling, dim=head_dim))
            if np.allclose(table[0], expected, rtol=1e-5, atol=0):
                return scaling
        raise ModelError(
            f"{file} has rope_freqs.weight, a table of factors that is none of Llama 3.1's and 3.2's: config.json could not "
            "say what made it."
        )
    if kind == "linear" or (kind == "none" and factor != 1.0):
        return {"rope_type": "linear", "factor": factor}
    if kind != "none":
        raise ModelError(
            f"{file} scales RoPE by '{kind}', which is not handled; known: none, linear, llama3."
        )
    return None


def _value(fields: Mapping[str, Any], name: str, default: Any = None) -> Any:
    return fields[name].contents() if name in fields else default
