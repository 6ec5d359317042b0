"""Generated checkpoints: any shape of a known family with random weights and a byte-level tokenizer.

For tests, the conformance suite and benchmarks, where no hub is in reach. Norms and biases are spread away from 1 and 0:
a plain initialisation hides a dropped one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors

from tapeout.models.decoder import ConfigReader, Role, TensorSpec
from tapeout.models.families import family

_SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}

SMALL: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "eos_token_id": 256,
    "bos_token_id": None,
}

_MOE = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
_DEEPSEEK = {
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 8,
}
SMALL_ENCODER: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 0,
}
_CLASSES = {"id2label": {"0": "world", "1": "sports", "2": "business", "3": "science"}}
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": SMALL_ENCODER | {"architectures": ["BertModel"], "type_vocab_size": 2},
    "roberta": SMALL_ENCODER | {"architectures": ["RobertaModel"], "type_vocab_size": 1, "pad_token_id": 1},
    "distilbert": {
        "architectures": ["DistilBertModel"],
        "vocab_size": 272,
        "dim": 64,
        "hidden_dim": 128,
        "n_layers": 2,
        "n_heads": 4,
        "max_position_embeddings": 96,
        "pad_token_id": 0,
    },
    "efficient_encoder_v1": SMALL_ENCODER | _CLASSES,
    "efficient_encoder_v2": SMALL_ENCODER | _CLASSES | {"rope_theta": 10000.0},
}
"""Fields of small encoders, by family."""

SEQ2SEQ: dict[str, dict[str, Any]] = {
    "t5": {
        "architectures": ["T5ForConditionalGeneration"],
        "vocab_size": 272,
        "d_model": 64,
        "d_kv": 24,
        "d_ff": 128,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_heads": 4,
        "relative_attention_num_buckets": 16,
        "relative_attention_max_distance": 40,
        "n_positions": 192,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
}
"""Fields of small encoder-decoders, by family."""

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {
        "tie_word_embeddings": True,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 24,
    },
    "gemma3_text": {
        "tie_word_embeddings": True,
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 24,
        "sliding_window_pattern": 2,
    },
    "phi3": {"original_max_position_embeddings": 256, "pad_token_id": 256},
    "qwen3": {"head_dim": 16},
    "qwen2_moe": _MOE | {"shared_expert_intermediate_size": 64},
    "qwen3_moe": _MOE | {"head_dim": 16, "norm_topk_prob": True},
    "deepseek_v2": _DEEPSEEK | {"n_shared_experts": 2, "topk_method": "group_limited_greedy"},
    "deepseek_v3": _DEEPSEEK | {"n_shared_experts": 1},
}
"""Fields of small models that a family wants besides those of SMALL, or instead of them."""

# The shapes of TinyLlama 1.1B, of LLaMA 2 7B and of Llama 3 8B.
LLAMA_1B = SMALL | {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
LLAMA_7B = LLAMA_1B | {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
}

LLAMA_8B = LLAMA_7B | {
    "vocab_size": 128256,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
}


MIXTRAL_8X7B = LLAMA_8B | {
    "vocab_size": 32000,
    "max_position_embeddings": 32768,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rope_theta": 1000000.0,
}


def write_config(directory: Path, model_type: str, config: Mapping[str, Any], *, dtype: str = "BF16") -> Path:
    """Write ``config.json`` of a decoder alone: what a plan is made from."""
    directory.mkdir(parents=True, exist_ok=True)
    said = {
        "model_type": model_type,
        "hidden_act": "silu",
        "torch_dtype": _SAFETENSORS_DTYPES[dtype],
        **config,
    }
    (directory / "config.json").write_text(json.dumps(said, indent=1))
    return directory


def write_model(
    directory: Path,
    model_type: str = "llama",
    config: dict[str, Any] | None = None,
    *,
    dtype: str = "BF16",
    shard_bytes: int | None = None,
    seed: int = 0,
) -> Path:
    """Write a Hugging Face directory with random weights; memory stays near one shard.

    Args:
        directory: made when absent.
        model_type: a known family.
        config: fields over those of SMALL and of FAMILIES, or of ENCODERS or SEQ2SEQ.
        dtype: F32, F16 or BF16 (truncated from float32).
        shard_bytes: begin a new file after this many bytes; None: one file.
        seed: the same seed gives the same bytes.

    Returns:
        ``directory``.
    """
    directory.mkdir(parents=True, exist_ok=True)
    other = (ENCODERS | SEQ2SEQ).get(model_type)
    name = model_type.removesuffix("_text").title().replace("_", "")
    named = {"model_type": model_type, "architectures": [f"{name}ForCausalLM"]}
    raw = {
        **named,
        **(other or SMALL | FAMILIES.get(model_type, {})),
        **(config or {}),
    }
    (directory / "config.json").write_text(json.dumps(raw, indent=1))
    kind = family(model_type)
    if model_type in ENCODERS:
        (_write_roberta_tokenizer if model_type == "roberta" else _write_wordpiece)(directory, raw)
    elif other:
        _write_t5_tokenizer(directory)
    else:
        (directory / "generation_config.json").write_text(
            json.dumps({"eos_token_id": raw["eos_token_id"], "max_new_tokens": 16})
        )
        _write_tokenizer(directory)
    read = kind.config(ConfigReader(raw))
    shards = list(_shards(dict(kind.tensors(read)), dtype, shard_bytes))
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if shard_bytes is None:
        names = ["model.safetensors"]
    else:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        (directory / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    random = np.random.default_rng(seed)
    for file, shard in zip(names, shards, strict=True):
        arrays = {name: _data(spec, dtype, random, read) for name, spec in shard.items()}
        tensors = {
            name: safetensors.TensorSpec(
                dtype=_SAFETENSORS_DTYPES[dtype], shape=a.shape, data_ptr=a.ctypes.data, data_len=a.nbytes
            )
            for name, a in arrays.items()
        }
        safetensors.serialize_file(tensors, directory / file, {"format": "pt"})
    return directory


def _shards(
    specs: dict[str, TensorSpec], dtype: str, shard_bytes: int | None
) -> Iterator[dict[str, TensorSpec]]:
    width = 4 if dtype == "F32" else 2
    shard: dict[str, TensorSpec] = {}
    size = 0
    for name, spec in specs.items():
        nbytes = int(np.prod(spec.shape)) * width
        if shard and shard_bytes and size + nbytes > shard_bytes:
            yield shard
            shard, size = {}, 0
        shard[name] = spec
        size += nbytes
    yield shard


def _data(spec: TensorSpec, dtype: str, random: np.random.Generator, config: Any) -> npt.NDArray[Any]:
    values = random.standard_normal(spec.shape, np.float32)
    if spec.role is Role.NORM:
        values = np.float32(1 - getattr(config, "norm_offset", 0.0)) + np.float32(0.2) * values
    elif spec.role is Role.BIAS:
        values *= np.float32(0.2)
    else:
        # Keeps activations near unit size; logits then have a spread that a comparison can be made on.
        embedding = 0.5 / getattr(config, "embedding_scale", 1.0)
        looked_up = spec.role in (Role.EMBEDDING, Role.POSITION)
        values *= np.float32(embedding if looked_up else spec.shape[-1] ** -0.5)
    if dtype == "BF16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(_SAFETENSORS_DTYPES[dtype])


def _write_tokenizer(directory: Path) -> None:
    """A byte-level BPE without merges, and ``<eos>``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True, normalized=False)])
    tokenizer.save(str(directory / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(described, indent=1))


def _write_wordpiece(directory: Path, raw: dict[str, Any]) -> None:
    """BERT's tokenizer over characters: each letter, digit and mark at a word's begin and inside it."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    marks = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    inside = [f"##{mark}" for mark in marks if mark.isalnum()]
    pieces = [*special, *marks, *inside, "the", "##ing", "##ed", "and", "##er", "of", "##s"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    if len(vocabulary) > raw["vocab_size"]:
        raise ValueError(f"vocab_size = {raw['vocab_size']}; the tokenizer has {len(vocabulary)} tokens.")
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(directory / "tokenizer.json"))
    named = dict(zip(("pad", "unk", "cls", "sep", "mask"), special, strict=True))
    _describe_tokenizer(directory, {f"{name}_token": token for name, token in named.items()})


def _write_roberta_tokenizer(directory: Path, raw: dict[str, Any]) -> None:
    """A byte-level BPE without merges behind RoBERTa's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(directory / "tokenizer.json"))
    named = {
        "bos": "<s>",
        "pad": "<pad>",
        "eos": "</s>",
        "unk": "<unk>",
        "mask": "<mask>",
        "cls": "<s>",
        "sep": "</s>",
    }
    _describe_tokenizer(directory, {f"{name}_token": token for name, token in named.items()})


def _write_t5_tokenizer(directory: Path) -> None:
    """A byte-level BPE without merges behind T5's special tokens; ``</s>`` ends a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    special = ["<pad>", "</s>", "<unk>"]
    pieces = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(directory / "tokenizer.json"))
    _describe_tokenizer(directory, {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"})


def _describe_tokenizer(directory: Path, special: dict[str, str]) -> None:
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **special,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(described, indent=1))
