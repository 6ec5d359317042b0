"""Other quantizers on the same model, each in its own environment, and the judge that compares them with the original.

Environments are made once, under the cache; results are kept by content.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
from onnx_decode import ENVIRONMENTS

from tapeout.files import file_sha256

_HERE = Path(__file__).resolve().parent
SAMPLES, LENGTH = 128, 512

# Script to the packages of its environment; none: the project's own. Of the alternatives (GPTQModel, AutoAWQ) none was
# needed: llm-compressor's GPTQ and AWQ run on a CPU.
_TORCH = ("torch==2.13.0", "transformers==5.23.0", "accelerate==1.15.0")
PEERS: dict[str, tuple[str, ...]] = {
    "llama_cpp": (),
    "llm_compressor": ("torch==2.13.0", "llmcompressor==0.14.0.1"),
    "hqq_peer": (*_TORCH, "hqq==0.2.8.post1"),
    "bitsandbytes_peer": (*_TORCH, "bitsandbytes==0.50.2"),
    "genai": ENVIRONMENTS["genai"],
}


def peers(model: Path, calibration: Path, work: Path) -> list[tuple[dict[str, Any], Path]]:
    """Every peer's variants of a model: what each says of itself, and its dequantized weights.

    A variant that cannot be had here has ``failed`` among its facts, and no file.
    """
    found: list[tuple[dict[str, Any], Path]] = []
    for name, packages in PEERS.items():
        out = work / f"{name}-{_key(name, model, calibration)}"
        if not out.exists():
            print(f"running {name}", file=sys.stderr)
            partial = out.with_name(out.name + ".partial")
            shutil.rmtree(partial, ignore_errors=True)
            try:
                _run(name, packages, model, calibration, partial)
            except (SystemExit, subprocess.CalledProcessError) as error:  # not kept: it may work tomorrow
                found.append(({"peer": name, "variant": "all", "failed": str(error)}, partial))
                continue
            partial.rename(out)
        paths = sorted(out.glob("*.json"))
        found += [(json.loads(path.read_text()), path.with_suffix(".safetensors")) for path in paths]
    return found


def _run(name: str, packages: tuple[str, ...], model: Path, calibration: Path, out: Path) -> None:
    words: list[str | Path] = ["--model", model, "--calibration", calibration, "--out", out]
    # Scripts find one another from here, and are no module themselves: their names are those of what they import.
    variables = {"PYTHONPATH": str(_HERE), "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"}
    script = _HERE / "peers" / f"{name}.py"
    python = common.environment(name, packages)
    common.run(
        python, script, *words, "--samples", str(SAMPLES), "--length", str(LENGTH), environment=variables
    )


def _key(name: str, model: Path, calibration: Path) -> str:
    """Digest of all that a peer's result depends on."""
    digest = hashlib.sha256(repr((PEERS[name], SAMPLES, LENGTH)).encode())
    read = [*sorted(model.glob("*.safetensors")), *sorted(model.glob("*.json")), calibration]
    scripts = [_HERE / "peers" / f"{name}.py", _HERE / "peers" / "result.py"]
    for path in read + scripts + ([] if PEERS[name] else [_HERE / "common.py"]):
        digest.update(file_sha256(path).encode())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Quality:
    """What is left of a model, over all positions of all windows."""

    mean_kl: float
    """nats, original to variant"""
    top1: float
    """fraction of positions at which both find the same token likeliest"""
    perplexity: float


class Judge:
    """Compares variants with the original in float32, on windows of the held-out text."""

    def __init__(self, model: Path, text: str, length: int = LENGTH) -> None:
        import torch
        from tokenizers import Tokenizer
        from transformers import AutoModelForCausalLM

        ids = Tokenizer.from_file(str(model / "tokenizer.json")).encode(text, add_special_tokens=False).ids
        count = len(ids) // length
        self._windows = torch.tensor(ids[: count * length]).view(count, length)
        self._model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        self._original = {name: weight.clone() for name, weight in self._model.state_dict().items()}
        self._judged = [self._prepared(logits) for logits in self._logits()]

    def original(self) -> float:
        """The original's perplexity."""
        return self._judge(self._original).perplexity

    def judge(self, weights: Path) -> tuple[Quality, Quality]:
        """Measure a file of weights; then again with the original's embedding and head, as many peers leave them."""
        from safetensors.torch import load_file

        ends = ("model.embed_tokens.weight", "lm_head.weight")
        held = load_file(weights)
        if self._model.config.tie_word_embeddings:
            held["lm_head.weight"] = held["model.embed_tokens.weight"]
        whole = self._judge(held)
        if all(held[name].equal(self._original[name]) for name in ends):
            return whole, whole
        return whole, self._judge(held | {name: self._original[name] for name in ends})

    def divergence(self, weights: dict[str, Any]) -> float:
        """Mean KL where only these weights, as numpy arrays, are not the original's."""
        import torch

        held = {name: torch.from_numpy(weight) for name, weight in weights.items()}
        return self._judge(self._original | held).mean_kl

    def _logits(self) -> Iterator[Any]:
        """Of a few windows after the other, float64 [windows, tokens, vocabulary]."""
        import torch

        for windows in self._windows.split(4):
            with torch.inference_mode():
                yield self._model(windows).logits.double()

    def _prepared(self, logits: Any) -> tuple[Any, float, Any]:
        """What the original says of some windows: probabilities, the sum of their entropies, the likeliest tokens."""
        log = logits.log_softmax(-1)
        p = log.exp()
        return p, -float((p * log).sum()), logits.argmax(-1)

    def _judge(self, weights: dict[str, Any]) -> Quality:
        """The last position of a window has no next token, so perplexity is over one position less."""
        self._model.load_state_dict(weights)
        kl = same = surprise = 0.0
        for ids, (p, entropy, likeliest), q in zip(
            self._windows.split(4), self._judged, self._logits(), strict=True
        ):
            whole = q.logsumexp(-1)
            surprise += float((whole[:, :-1] - q[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]).sum())
            same += int((likeliest == q.argmax(-1)).sum())
            kl += float(whole.sum() - p.mul(q).sum()) - entropy
        count, length = self._windows.shape
        return Quality(
            kl / (count * length), same / (count * length), math.exp(surprise / (count * (length - 1)))
        )
