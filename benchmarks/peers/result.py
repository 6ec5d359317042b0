"""What every peer's script takes and leaves, so that one evaluation reads them all.

``NAME.safetensors``: the weights dequantized to float32, under Hugging Face's names and in its row order; no tied head.
``NAME.json``: what they cost in the peer's own file, or ``{"failed": reason}``.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

Float = NDArray[np.float32]


def arguments(purpose: str | None) -> argparse.Namespace:
    """The command line that all scripts share."""
    parser = argparse.ArgumentParser(description=purpose)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--calibration", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--variant", help="only this one, in this process")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def calibration_tokens(options: argparse.Namespace) -> NDArray[np.int64]:
    """The text's first tokens [samples, length], without special ones: what llama-imatrix takes too."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(options.model / "tokenizer.json"))
    ids = tokenizer.encode(options.calibration.read_text(), add_special_tokens=False).ids
    needed = options.samples * options.length
    if len(ids) < needed:
        sys.exit(f"{options.calibration} has {len(ids)} tokens; {needed} are needed")
    return np.array(ids[:needed], np.int64).reshape(options.samples, options.length)


def checkpoint_tensors(model: Path) -> dict[str, Float]:
    """The original weights in float32."""
    tensors: dict[str, Float] = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "pt") as file:  # numpy has no bfloat16
            tensors |= {name: file.get_tensor(name).float().numpy() for name in file.keys()}  # noqa: SIM118
    return tensors


def leave(
    options: argparse.Namespace,
    facts: Mapping[str, Any],
    weights: Mapping[str, Float],
    bits: Mapping[str, int],
) -> None:
    """Write one variant. ``bits``: of each weight in the peer's file, with all that its decoder needs of it."""
    original = checkpoint_tensors(options.model)
    original.pop("lm_head.weight", None)
    for name, weight in original.items():
        assert weights[name].shape == weight.shape, name
        assert weights[name].dtype == np.float32, name
    assert weights.keys() == bits.keys() == original.keys()
    linear = [name for name in weights if name.endswith("_proj.weight")]
    whole = {
        "bits": sum(bits.values()),
        "weights": sum(weight.size for weight in weights.values()),
        "linear_bits": sum(bits[name] for name in linear),
        "linear_weights": sum(weights[name].size for name in linear),
    }
    stem = options.out / file_name(facts["peer"], facts["variant"])
    save_file({name: np.ascontiguousarray(weight) for name, weight in weights.items()}, f"{stem}.safetensors")
    Path(f"{stem}.json").write_text(json.dumps({**facts, **whole}, indent=1) + "\n")


def fail(options: argparse.Namespace, peer: str, variant: str, reason: str) -> None:
    """Record that a variant cannot be had here."""
    path = options.out / f"{file_name(peer, variant)}.json"
    path.write_text(json.dumps({"peer": peer, "variant": variant, "failed": reason}, indent=1) + "\n")


def file_name(peer: str, variant: str) -> str:
    return f"{peer} {variant}".replace(" ", "-")


def each_alone(
    options: argparse.Namespace,
    peer: str,
    variants: Mapping[str, Any],
    run: Callable[[str], tuple[dict[str, Float], dict[str, int], dict[str, Any]]],
) -> None:
    """Run every variant in a process of its own, so that its peak of memory is its own and its crash ends nothing else."""
    if options.variant:
        begin = time.perf_counter()
        weights, bits, facts = run(options.variant)
        facts = {"wall_s": round(time.perf_counter() - begin, 2), "peak_rss_bytes": peak_rss()} | facts
        leave(options, {"peer": peer, "variant": options.variant} | facts, weights, bits)
        return
    for variant in variants:
        command = [sys.executable, *sys.argv, "--variant", variant]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if done.returncode:
            lines = done.stdout.strip().splitlines() or [f"exit status {done.returncode}"]
            reason = next((line for line in reversed(lines) if "Error" in line), lines[-1])
            fail(options, peer, variant, reason)
            print(f"{peer} {variant} failed:\n" + "\n".join(lines[-30:]), file=sys.stderr)


def peak_rss() -> int:
    """This process's peak resident bytes (ru_maxrss would count what it was forked from)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not tell the peak of resident memory")
