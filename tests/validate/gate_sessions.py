"""What the tests of the gates run in workers: a small network on real weights, and a device of it with a defect on demand."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from tapeout.errors import MissingToolchain
from tapeout.exporters import plain
from tapeout.models import load
from tapeout.quantize import open_store
from tapeout.validate.session import Facts, Logits, Shown

Weights = Mapping[str, npt.NDArray[np.float32]]
Array = npt.NDArray[np.float64]

STEPS = 31.0  # of the toy's rounding: coarse, so that what it costs stands above the floor of the gates


class Toy:
    """Residual layers that see the mean of all tokens so far: the cache is one sum a layer.

    Every token takes the same road, so that prefill in any batches and decode give the same bits.
    """

    def __init__(
        self,
        directory: str,
        weights: Weights,
        layers: int,
        arithmetic: str = "float32",
        kv_cache: str | None = None,
    ) -> None:
        config = json.loads((Path(directory) / "config.json").read_text())
        self.facts = Facts("toy 1", "numpy", 0.0, 0, config["max_position_embeddings"])
        self._weights = {name: weight.astype(np.float64) for name, weight in weights.items()}
        self._layers = layers
        self._arithmetic = arithmetic
        self._kv_cache = kv_cache
        self._seen: list[list[Array]] = [[] for _ in range(layers + 1)]
        self._tokenizer = Tokenizer.from_file(str(Path(directory) / "tokenizer.json"))
        self.reset()

    def reset(self) -> None:
        self._sums = [np.zeros(64) for _ in range(self._layers)]
        self._length = 0

    def prefill(self, ids: Sequence[int]) -> Logits:
        return np.array([self._step(token) for token in ids], np.float32)

    def decode(self, token: int) -> Logits:
        return self._step(token).astype(np.float32)

    def trace(self, ids: Sequence[int], out: str) -> dict[str, Shown]:
        """What goes into the first layer and what each gives, as ``Reference.trace`` writes it."""
        self.reset()
        self._seen = [[] for _ in range(self._layers + 1)]
        logits = self.prefill(ids)
        names = ["embedding", *(f"layers.{k}" for k in range(self._layers)), "logits"]
        for name, rows in zip(names, [*self._seen, logits], strict=True):
            np.save(Path(out) / f"{name}.npy", np.array(rows, np.float32))
        self.reset()
        return {name: Shown("layer") for name in names}

    def tokenize(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def detokenize(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def close(self) -> None:
        pass

    def _step(self, token: int) -> Array:
        self._length += 1
        x = self._weights["model.embed_tokens.weight"][token]
        self._seen[0].append(x)
        for k in range(self._layers):
            layer = f"model.layers.{k}"
            self._sums[k] = self._sums[k] + x
            mean = self._sums[k] / self._length
            if self._kv_cache == "kv-int4":
                unit = np.abs(mean).max() / 7
                mean = np.round(mean / unit) * unit
            seen = self._rounded(mean * self._weights[f"{layer}.input_layernorm.weight"])
            inner = np.tanh(self._weights[f"{layer}.mlp.up_proj.weight"] @ seen)
            x = x + self._weights[f"{layer}.mlp.down_proj.weight"] @ inner
            self._seen[k + 1].append(x)
        logits: Array = self._weights["lm_head.weight"] @ (x * self._weights["model.norm.weight"])
        return logits

    def _rounded(self, x: Array, steps: float = STEPS, offset: float = 0.0) -> Array:
        if self._arithmetic in ("float32", "float64"):  # it computes in float64 anyway
            return x
        unit = np.abs(x).max() / steps
        return (np.round(x / unit + offset) - offset) * unit


class Defective(Toy):
    """A Toy with the defect that ``defect`` names."""

    def __init__(
        self,
        directory: str,
        weights: Weights,
        layers: int,
        arithmetic: str,
        kv_cache: str | None,
        defect: str,
    ) -> None:
        self._defect, self._flipped, self._calls = defect, False, 0
        super().__init__(directory, weights, layers, arithmetic, kv_cache)

    def reset(self) -> None:
        super().reset()
        self._calls = 0

    def prefill(self, ids: Sequence[int]) -> Logits:
        if self._defect == "forgets between batches" and self._calls:
            super().reset()
        self._calls += 1
        logits = super().prefill(ids)
        if self._defect == "NaN":
            logits[5, 7] = np.nan
        elif self._defect == "pads the vocabulary":
            logits = np.pad(logits, ((0, 0), (0, 8)))
        elif self._defect == "last token only":
            logits = logits[-1:]
        elif self._defect == "dies":
            os.kill(os.getpid(), signal.SIGSEGV)
        elif self._defect == "its runtime":
            logits[:, 3] += 0.1
        return logits

    def peaks(self) -> dict[str, float]:
        """Of values that it would hold as float16 if it were a device that does; the largest come last."""
        if self._defect == "tells nothing":
            return {}
        found = {f"layers.{k}.mlp": float(np.abs(self._sums[k]).max()) for k in range(self._layers)}
        if self._defect == "half":
            found["layers.1.mlp"] = 65504 / 2
        elif self._defect == "large":
            found["layers.1.mlp"], found["layers.3.mlp"] = np.nextafter(65504 / 2, np.inf), 1e5
        elif self._defect == "all large":
            found = {f"value.{k}": 4e4 + k for k in range(30)}
        return found

    def decode(self, token: int) -> Logits:
        if self._defect == "forgets":
            super().reset()
        logits = super().decode(token)
        second, best = np.argsort(logits)[-2:]
        lead = logits[best] - logits[second]
        one = self._defect == "flips one" and 0.1 < lead < 0.2 and not self._flipped
        if one or self._defect == "flips":
            logits[[second, best]] = logits[[best, second]]
            self._flipped = True
        return logits

    def _rounded(self, x: Array, steps: float = STEPS, offset: float = 0.0) -> Array:
        # "another draw": the same step, but other errors, as a runtime that sums in another order has.
        steps, offset = {"coarse": (STEPS / 4, 0.0), "another draw": (STEPS, 0.25)}.get(
            self._defect, (steps, offset)
        )
        return super()._rounded(x, steps, offset)


def reference(
    model: str,
    store: str | None,
    arithmetic: str,
    kv_cache: str | None,
    halves: Sequence[str] = (),
    values: Sequence[str] = (),
) -> Toy:
    """What ``tapeout.validate.reference:open_session`` is for transformers."""
    source = load(model)
    if store is None:
        weights = {name: source.checkpoint[name].float32() for name in source.specs}
    else:
        quant = open_store(Path(store), source)
        weights = {name: quant.float32(name) for name in quant}
    weights |= {name: weights[name].astype(np.float16).astype(np.float32) for name in (*halves, *values)}
    return Toy(model, weights, source.config.num_layers, arithmetic, kv_cache)


def device(
    directory: str,
    defect: str = "",
    arithmetic: str = "float32",
    kv_cache: str | None = None,
) -> Toy:
    """Run what the plain files of ``directory`` hold."""
    if defect == "not installed":
        raise MissingToolchain("the toy runtime is not installed: pip install toy")
    layers = json.loads((Path(directory) / "config.json").read_text())["num_hidden_layers"]
    weights = dict(plain.read_weights(Path(directory)))
    return Defective(directory, weights, layers, arithmetic, kv_cache, defect)
