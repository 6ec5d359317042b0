"""A model as it comes: configuration, lazily mapped tensors, tokenizer files, generation defaults."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tapeout import embedded
from tapeout.errors import ModelError
from tapeout.models import gguf, hollow, sentence, traced
from tapeout.models import module as plain
from tapeout.models.checkpoint import Checkpoint, SourceTensor, has_weights
from tapeout.models.decoder import ConfigReader, DecoderConfig, Role, TensorSpec
from tapeout.models.encoder import EncoderConfig
from tapeout.models.families import family, known
from tapeout.models.seq2seq import Seq2SeqConfig
from tapeout.models.traced import TracedConfig

if TYPE_CHECKING:
    import torch

__all__ = [
    "Checkpoint",
    "DecoderConfig",
    "EncoderConfig",
    "Generation",
    "Model",
    "Role",
    "Seq2SeqConfig",
    "SourceTensor",
    "TensorSpec",
    "TracedConfig",
    "load",
    "load_module",
]

# What travels with a model besides its weights, under the names that Hugging Face gives it.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)

# Texts that a licence asks to be passed on, at the top of a model's directory.
_LICENCE_FILES = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*", "USE_POLICY*")
_LICENCE_BYTES = 4 << 20

# Where a checkpoint that somebody quantized says how, besides config.json; and who writes such a file.
_QUANTIZATION_FILES = {
    "hf_quant_config.json": "modelopt",
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
}


@dataclass(frozen=True)
class Generation:
    """Generation defaults as ``generation_config.json`` states them; temperature 0 is greedy."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class Model:
    """A checkpoint on disk and what is known of it.

    Attributes:
        name: the directory's name, or the embedded model's.
        raw_config: ``config.json`` as it stands, but for what it says of quantization.
        specs: every expected tensor with role and shape, in file order; each is in ``checkpoint`` with that shape, unless the
            checkpoint is quantized.
        quantization: what a checkpoint that is quantized already says of it, with ``quant_method``; see ``quantize.foreign``.
    """

    name: str
    directory: Path
    raw_config: Mapping[str, Any]
    config: DecoderConfig | EncoderConfig | Seq2SeqConfig | TracedConfig
    specs: Mapping[str, TensorSpec]
    checkpoint: Checkpoint
    quantization: Mapping[str, Any] | None = None

    @property
    def decoder(self) -> DecoderConfig:
        """The config of a decoder of a family that has a file here; ModelError if it is none."""
        if isinstance(self.config, TracedConfig):
            raise ModelError(
                f"{self.name} is of no family that tapeout has a file for ({self.config.family}): its graph comes from "
                f"{self.config.road}, and that goes to ONNX only, without calibration: use target cpu with --format onnx."
            )
        if not isinstance(self.config, DecoderConfig):
            raise ModelError(f"{self.name} is {self.kind}, and this is done to decoders only.")
        return self.config

    @property
    def graph(self) -> str:
        """Which road its graph takes into a format that needs one: ``built`` here, ``torch.export`` or ``optimum``."""
        return self.config.road if isinstance(self.config, TracedConfig) else "built"

    @property
    def kind(self) -> str:
        """What it is, in words, with its family."""
        kinds = {EncoderConfig: "an encoder", Seq2SeqConfig: "an encoder-decoder", DecoderConfig: "a decoder"}
        return f"{kinds.get(type(self.config), 'of no family with a file here')} ({self.config.family})"

    def tokenizer_files(self) -> list[Path]:
        """The files of TOKENIZER_FILES that the model has."""
        return [self.directory / name for name in TOKENIZER_FILES if (self.directory / name).exists()]

    def licence_files(self) -> list[Path]:
        """LICENSE, NOTICE, USE_POLICY and the like, sorted; ModelError for one that no licence is as long as."""
        found = sorted(
            {
                file
                for pattern in _LICENCE_FILES
                for file in self.directory.glob(pattern)
                if file.is_file() and re.fullmatch(r"[\w.-]+", file.name, re.ASCII)
            }
        )
        for file in found:
            if (size := file.stat().st_size) > _LICENCE_BYTES:
                raise ModelError(
                    f"{file} has {size} bytes, and a package would carry it along as a licence; what fits: {_LICENCE_BYTES} bytes."
                )
        return found

    @cached_property
    def tokenizer_config(self) -> Mapping[str, Any]:
        """``tokenizer_config.json``, or nothing."""
        return _read_json(self.directory / "tokenizer_config.json", optional=True)

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja source of the chat template, from its own file or the tokenizer's configuration."""
        own = self.directory / "chat_template.jinja"
        if own.exists():
            return own.read_text(encoding="utf-8")
        template = self.tokenizer_config.get("chat_template")
        if isinstance(template, list):  # several named templates: transformers takes "default"
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        return template

    @cached_property
    def generation(self) -> Generation:
        """Generation defaults; what the file does not say is transformers' default (greedy unless ``do_sample``)."""
        raw = _read_json(self.directory / "generation_config.json", optional=True)
        sample = bool(raw.get("do_sample", False))
        eos = raw.get("eos_token_id", self.config.eos_token_id)
        try:
            return Generation(
                temperature=float(raw.get("temperature") or 1.0) if sample else 0.0,
                top_p=float(raw.get("top_p") or 1.0),
                top_k=int(raw.get("top_k") or (50 if sample else 0)),
                repetition_penalty=float(raw.get("repetition_penalty") or 1.0),
                max_new_tokens=int(raw.get("max_new_tokens") or Generation.max_new_tokens),
                stop_token_ids=()
                if eos is None
                else tuple(map(int, eos if isinstance(eos, list | tuple) else [eos])),
            )
        except (TypeError, ValueError, OverflowError) as error:
            raise ModelError(
                f"{self.directory / 'generation_config.json'} has a value of the wrong type: {error}."
            ) from error

    @cached_property
    def licence(self) -> str | None:
        """The licence that the model card's front matter names (an SPDX or Hugging Face id), if any."""
        card = self.directory / "README.md"
        if not card.exists():
            return None
        front = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), re.DOTALL)
        named = (
            re.search(r"^license:[ \t]*['\"]?([^\s'\"]{1,100})", front[1], re.MULTILINE) if front else None
        )
        return named[1] if named and named[1].isprintable() else None


def load(source: str | Path, *, weights: bool = True) -> Model:
    """Load a model: a directory as Hugging Face writes it, a GGUF file, an embedded model's name, a hub id, or ``file.py:factory``.

    No weight is read: tensors are mapped when they are asked for. Of a GGUF file, config and tokenizer are written anew into
    the cache, which is the model's directory then. ``file.py:factory`` is called as ``load_module`` wants it. A family that has no
    file here, but one in transformers, gets its graph from optimum, in the worker environment of that name, once.

    Without ``weights`` a directory that holds none will do, and none are fetched: tensors have their shapes then, and the type that
    config.json names.

    Raises:
        ModelError: what was found, what was expected, in which file. MissingToolchain: the worker environment is not there.
    """
    directory = _locate(source, weights=weights)
    raw = _read_json(directory / "config.json")
    quantization = _quantization(directory, raw)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str):
        raise ModelError(f"{directory / 'config.json'} has no model_type.")
    if model_type == plain.MODEL_TYPE:
        return _traced(directory, raw, traced.read(directory), Checkpoint(directory), str(raw["name"]))
    if model_type not in known() and quantization is None and _in_transformers(model_type):
        from tapeout.models import optimum

        checkpoint = Checkpoint(directory, ignored=lambda name: True)
        return _traced(
            directory, raw, optimum.graph_of(directory, model_type, checkpoint), checkpoint, directory.name
        )
    kind = family(model_type)
    fields = ConfigReader(raw)
    try:
        config = kind.config(fields)
    except KeyError as error:
        raise ModelError(
            f"{directory / 'config.json'} lacks {error.args[0]}, which a {model_type} model needs."
        ) from error
    except (TypeError, ValueError) as error:
        raise ModelError(f"{directory / 'config.json'} has a field of the wrong type: {error}.") from error
    if left := fields.left():
        raise ModelError(
            f"{directory / 'config.json'} has {', '.join(f'{n} = {json.dumps(raw[n])}' for n in left)}, which the family "
            f"'{model_type}' does not handle; the model would not be the same without it."
        )
    if isinstance(config, EncoderConfig):
        config = sentence.applied(config, directory)
    specs = kind.tensors(config)
    if quantization is None and not weights and not has_weights(directory):
        checkpoint = hollow.checkpoint(directory, specs, hollow.dtype_of(raw))
    elif quantization is None:
        checkpoint = Checkpoint(directory, ignored=lambda name: kind.optional(config, name))
        _check_tensors(checkpoint, specs, {n for n in checkpoint if kind.optional(config, n)})
    elif quantization["quant_method"] == "gguf":
        checkpoint = Checkpoint(directory, gguf.tensors(Path(quantization["file"]), config, specs))
    else:
        checkpoint = Checkpoint(directory, quantized=True)
    return Model(_name(directory.name), directory, raw, config, specs, checkpoint, quantization)


def load_module(
    module: torch.nn.Module,
    example_inputs: Sequence[torch.Tensor] | Mapping[str, torch.Tensor],
    dynamic_shapes: Any = None,
    *,
    name: str | None = None,
) -> Model:
    """Load a plain ``torch.nn.Module`` that no family knows: torch.export traces it, and ONNX is what it can become.

    The program is held against the module on the example inputs, on others drawn from their values, and on other lengths where
    ``dynamic_shapes`` leaves them free; these samples are what the gates run too.

    Args:
        module: in eval mode, float32, on the CPU; it gives float tensors.
        example_inputs: tensors, in order or by argument.
        dynamic_shapes: as ``torch.export.export`` takes it: ``{"ids": {1: torch.export.Dim("tokens")}}``; None: shapes are fixed.
        name: of the model. Default: the module's class.

    Raises:
        ModelError: the module cannot be exported, with torch's first reason; it has no linear weight; the program differs from it.
        MissingToolchain: torch, onnx_ir or onnxscript is not installed.
    """
    return load(plain.prepare(module, example_inputs, dynamic_shapes, name=name))


def _traced(
    directory: Path, raw: dict[str, Any], config: TracedConfig, checkpoint: Checkpoint, name: str
) -> Model:
    specs, oriented = traced.specs(config, checkpoint)
    return Model(_name(name), directory, raw, config, specs, oriented)


def _name(given: str) -> str:
    """A name that can be that of a file, stand in a command and in a text, on every system: letters, digits, ``.``, ``_``, ``+`` and ``-``."""
    kept = re.sub(r"[^\w.+-]+", "-", unicodedata.normalize("NFC", given))
    return kept.strip(".-").encode()[:180].decode(errors="ignore") or "model"


def _in_transformers(model_type: str) -> bool:
    """Whether transformers has the family; not where it is not installed."""
    try:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    except ImportError:
        return False
    return model_type in CONFIG_MAPPING_NAMES


def _quantization(directory: Path, raw: dict[str, Any]) -> dict[str, Any] | None:
    """Take out of ``raw`` what it says of quantization, or find the file that says it; None: the weights are floats."""
    found = raw.pop("quantization_config", None) or raw.pop("compression_config", None)
    where = directory / "config.json"
    if not found:
        for name, method in _QUANTIZATION_FILES.items():
            if (directory / name).exists():
                where = directory / name
                found = {"quant_method": method, **_read_json(where)}
                break
    if not found:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("quant_method"), str):
        raise ModelError(f"{where} says that the weights are quantized, but not how: no quant_method.")
    return found


def _check_tensors(checkpoint: Checkpoint, specs: Mapping[str, TensorSpec], optional: set[str]) -> None:
    missing = sorted(specs.keys() - checkpoint.keys())
    unexpected = sorted(checkpoint.keys() - specs.keys() - optional)
    wrong = [
        f"{name} is {list(checkpoint[name].shape)} where config.json says {list(spec.shape)}"
        for name, spec in specs.items()
        if name in checkpoint and checkpoint[name].shape != spec.shape
    ]
    found = [f"missing: {name}" for name in missing] + [f"unexpected: {name}" for name in unexpected] + wrong
    if found:
        more = f" … and {len(found) - 5} more" if len(found) > 5 else ""
        raise ModelError(
            f"the tensors in {checkpoint.directory} do not fit config.json: {'; '.join(found[:5])}{more}."
        )


def _locate(source: str | Path, *, weights: bool = True) -> Path:
    path = Path(source)
    if path.is_dir():
        return path.resolve()
    text = str(source)
    if text in embedded.NAMES:
        return embedded.path(text)
    if plain.is_factory(text):
        return plain.from_factory(text)
    if path.suffix == ".gguf" and path.exists():
        return gguf.directory_of(path.resolve())
    if path.exists():
        raise ModelError(
            f"{path} is a file; a model is the directory that holds config.json, a .gguf file, or file.py:factory for a torch module."
        )
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text):
        return _download(text, weights=weights)
    raise ModelError(
        f"no model at '{text}': neither a directory, nor an embedded model ({', '.join(embedded.NAMES)}), nor a hub id "
        "(owner/name), nor file.py:factory."
    )


def _download(hub_id: str, *, weights: bool) -> Path:
    """Fetch a snapshot from the hub (cached by huggingface_hub); weights, if any, only as safetensors."""
    from huggingface_hub import snapshot_download

    wanted = ["config.json", "README.md", *(("*.safetensors", "*.safetensors.index.json") if weights else ())]
    wanted += [*TOKENIZER_FILES, *_QUANTIZATION_FILES, *_LICENCE_FILES]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted))
    except (
        Exception
    ) as error:  # the hub's client raises from four libraries' trees: all of them mean "not fetched"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"'{hub_id}' is not a directory here and could not be fetched from the hub: {reason} "
            "Without a network, give the path of a downloaded model."
        ) from error


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if not path.exists():
        if optional:
            return {}
        raise ModelError(f"{path} is absent; a model directory needs it.")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelError(f"{path} is not JSON: {error}.") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{path} holds {type(raw).__name__} where an object is expected.")
    return raw
