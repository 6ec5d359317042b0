"""Calibration text: what a model is shown so that its rounding knows which weights matter."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import MissingToolchain, ModelError, RecipeError
from tapeout.models import EncoderConfig, Model


@dataclass(frozen=True)
class Calibration:
    """Which text, and how much of it.

    Attributes:
        text: a UTF-8 text file, a .jsonl file whose objects have a ``text``, or a directory that Hugging Face datasets saved;
            None: the model's own ``calibration.txt``, or the text that ships with tapeout.
        sequences: most windows of the text that are shown.
        length: tokens of a window; the model's context when that is shorter.
        seed: which windows are taken when the text has more.
    """

    text: Path | None = None
    sequences: int = 128
    length: int = 512
    seed: int = 0

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - read by pydantic, no field

    def tokens(self, model: Model) -> npt.NDArray[np.int32]:
        """Windows of the text, int32 [sequences, length]; an encoder's begin and end with the tokens that belong there.

        Raises:
            RecipeError: the text cannot be read, is not UTF-8 or too short, or a number is not positive.
            ModelError: the model has no tokenizer.json, or its ids go beyond the vocabulary.
        """
        if self.sequences < 1 or self.length < 2:
            raise RecipeError(
                f"calibration wants at least 1 sequence of 2 tokens; found {self.sequences} of {self.length}."
            )
        path = self._path(model)
        ids = _encode(model, _read(path))
        length = min(self.length, model.config.max_position_embeddings)
        count = len(ids) // length
        if not count:
            raise RecipeError(
                f"the calibration text {path} has {len(ids)} tokens for {model.name}; at least {length} are needed: give a longer "
                "text, or a shorter length."
            )
        if ids.max() >= model.config.vocab_size:
            raise ModelError(
                f"the tokenizer of {model.name} gives the id {ids.max()} for {path}; its vocabulary has {model.config.vocab_size}."
            )
        windows = ids[: count * length].reshape(count, length)
        if count > self.sequences:
            chosen = np.random.default_rng(self.seed).choice(count, self.sequences, replace=False)
            windows = windows[np.sort(chosen)]
        if isinstance(model.config, EncoderConfig):
            around = _tokenizer(model).encode("", add_special_tokens=True).ids
            if len(around) == 2:
                windows[:, [0, -1]] = around
        return windows

    def text_sha256(self, model: Model) -> str:
        """SHA-256 of the text, as UTF-8; RecipeError when it cannot be read."""
        return hashlib.sha256(_read(self._path(model)).encode()).hexdigest()

    def _path(self, model: Model) -> Path:
        own = model.directory / "calibration.txt"
        ours = Path(str(files("tapeout.quantize") / "data" / "calibration.txt"))
        return self.text or (own if own.exists() else ours)


def digest(tokens: npt.NDArray[np.int32]) -> str:
    """SHA-256 of the windows: what the codes depend on."""
    return hashlib.sha256(str(tokens.shape).encode() + tokens.tobytes()).hexdigest()


def torch_device(device: str | None = None) -> tuple[str, str]:
    """The torch device that calibration runs on, and what it is called: ``cpu``, or the GPU's own name.

    None: the GPU that torch sees, else the CPU. Float32 is float32 there: no TF32.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cpu":
        return device, device
    torch.set_float32_matmul_precision("highest")
    return device, torch.cuda.get_device_name(device)


def _read(path: Path) -> str:
    try:
        if path.is_dir():
            return "\n".join(_dataset(path))
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            return "\n".join(json.loads(line)["text"] for line in text.splitlines() if line.strip())
    except UnicodeDecodeError as error:
        raise RecipeError(
            f"the calibration text {path} is not UTF-8: {error.reason} at byte {error.start}."
        ) from error
    except OSError as error:
        raise RecipeError(f"the calibration text {path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise RecipeError(f"{path} is not JSON lines of objects with a 'text': {error!r}.") from error
    return text


def _dataset(path: Path) -> list[str]:
    try:
        from datasets import load_from_disk
    except ImportError:
        raise MissingToolchain(
            f"{path} is a directory: to read a saved dataset, pip install datasets; a text file needs nothing."
        ) from None
    try:
        found = load_from_disk(str(path))
        rows = found["train"] if isinstance(found, dict) else found
        return [str(text) for text in rows["text"]]
    except (FileNotFoundError, KeyError) as error:
        raise RecipeError(f"{path} is not a saved dataset with a column 'text': {error}.") from error


def _encode(model: Model, text: str) -> npt.NDArray[np.int32]:
    return np.array(_tokenizer(model).encode(text, add_special_tokens=False).ids, np.int32)


def _tokenizer(model: Model) -> Any:
    from tokenizers import Tokenizer

    path = model.directory / "tokenizer.json"
    if not path.exists():
        raise ModelError(f"{path} is absent; calibration needs it to read a text.")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
