"""llama.cpp's tools, with the types that they choose: convert_hf_to_gguf.py, llama-imatrix, llama-quantize.

Runs in the project's own environment, which has gguf.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import subprocess
from collections import Counter
from pathlib import Path

import common
from peers.result import Float, arguments, fail, leave

PLAIN = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL", "Q3_K_M", "Q2_K")
WITH_IMATRIX = ("Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL", "IQ4_XS", "Q3_K_M", "Q2_K")

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def main() -> None:
    options = arguments(__doc__)
    peer = f"llama.cpp {importlib.metadata.version('llama-cpp-python')}"
    f16, imatrix = options.out / "f16.gguf", options.out / "imatrix.gguf"
    convert = common.convert_by_peer(options.model, f16)
    tools = build_tools()
    chunks = ["-c", str(options.length), "--chunks", str(options.samples), "-t", str(common.cores())]
    importance = common.run(
        tools / "llama-imatrix", "-m", f16, "-f", options.calibration, "-o", imatrix, "--no-ppl", *chunks
    )
    for kind, with_imatrix in [(kind, False) for kind in PLAIN] + [(kind, True) for kind in WITH_IMATRIX]:
        variant = f"{kind}+imatrix" if with_imatrix else kind
        file = options.out / f"{variant}.gguf"
        extra = ["--imatrix", imatrix] if with_imatrix else []
        try:
            quantize = common.run(tools / "llama-quantize", *extra, f16, file, kind, str(common.cores()))
        except SystemExit as error:
            fail(options, peer, variant, str(error))
            continue
        runs = {"convert": convert, "quantize": quantize} | ({"imatrix": importance} if with_imatrix else {})
        facts = {
            "peer": peer,
            "variant": variant,
            "wall_s": round(sum(ran.wall_s for ran in runs.values()), 2),
            "peak_rss_bytes": max(ran.peak_bytes for ran in runs.values()),
            "wall_parts_s": {name: round(ran.wall_s, 2) for name, ran in runs.items()},
        }
        weights, bits, facts["types"] = read(file, options)
        leave(options, facts, weights, bits)


def build_tools() -> Path:
    """The folder of llama-quantize and llama-imatrix."""
    build = common.peer() / "build"
    if not (build / "bin" / "llama-imatrix").exists():
        command = ["cmake", "--build", str(build), "-j2", "--target", "llama-imatrix"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return build / "bin"


def read(file: Path, options: argparse.Namespace) -> tuple[dict[str, Float], dict[str, int], dict[str, int]]:
    """The GGUF's weights in float32 as transformers orders them, the bits of each, how many are of each type."""
    import gguf
    import numpy as np

    heads = json.loads((options.model / "config.json").read_text())
    weights, bits, types = {}, {}, Counter[str]()
    for tensor in gguf.GGUFReader(file).tensors:
        block, _, part = re.fullmatch(r"(?:blk\.(\d+)\.)?((\w+)\.weight)", tensor.name).groups()  # type: ignore[union-attr]
        name = (f"model.layers.{block}." if block else "") + _NAMES[part] + ".weight"
        # gguf lists the fastest axis first; it dequantizes row by row, in the order of numpy.
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        weight = weight.reshape(tensor.shape[::-1].tolist())
        if part in ("attn_q", "attn_k"):
            count = heads["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
            weight = interleaved_to_halves(weight, count)
        weights[name], bits[name] = weight, int(tensor.n_bytes) * 8
        types[tensor.tensor_type.name] += 1
    return weights, bits, dict(types)


def interleaved_to_halves(weight: Float, heads: int) -> Float:
    """Undo the converter's order of a head's rows [heads * dim, in]: RoPE pairs (i, i + dim/2), not (2i, 2i + 1)."""
    return weight.reshape(heads, -1, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


if __name__ == "__main__":
    main()
