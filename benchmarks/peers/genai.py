"""onnxruntime-genai's model builder: its INT4 files for the CPU, which ask for no text to look at. A tied embedding is its INT4 head."""

from __future__ import annotations

import importlib.metadata
import re
import tempfile
from pathlib import Path
from typing import Any

from peers.onnx_export import genai
from peers.result import Float, arguments, checkpoint_tensors, each_alone

# How it rounds, and its groups; alone it takes ``default`` and 32.
VARIANTS = {f"{way}-int4-g{group}": (way, group) for way in ("default", "k_quant") for group in (32, 64, 128)}


def main() -> None:
    options = arguments(__doc__)

    def run(variant: str) -> tuple[dict[str, Float], dict[str, int], dict[str, Any]]:
        way, group = VARIANTS[variant]
        original = checkpoint_tensors(options.model)
        original.pop("lm_head.weight", None)
        with tempfile.TemporaryDirectory(dir=options.out) as name:
            genai(options.model, Path(name), group, way)
            layers, bits = read(Path(name) / "model.onnx", original)
        return (
            original | layers,
            {name: 32 * w.size for name, w in original.items()} | bits,
            {"container": "ONNX"},
        )

    each_alone(options, f"genai builder {importlib.metadata.version('onnxruntime-genai')}", VARIANTS, run)


def read(path: Path, original: dict[str, Float]) -> tuple[dict[str, Float], dict[str, int]]:
    """Its matrices in float32 under the checkpoint's names, and the bits of each in the file. Its q, k and v are one matrix."""
    import numpy as np
    import onnx

    graph = onnx.load(path).graph
    assert any(node.op_type == "GatherBlockQuantized" for node in graph.node), "its embedding is not tied"
    arrays = {each.name: onnx.numpy_helper.to_array(each) for each in graph.initializer}
    weights: dict[str, Float] = {}
    bits: dict[str, int] = {}
    for node in graph.node:
        if node.op_type != "MatMulNBits":
            continue
        said = {each.name: onnx.helper.get_attribute_value(each) for each in node.attribute}
        rows, columns, group = said["N"], said["K"], said["block_size"]
        groups = -(-columns // group)
        held = [arrays[name] for name in node.input[1:4] if name]
        codes, scales = held[0].reshape(rows, groups, -1), held[1].reshape(rows, groups)
        nibbles = np.stack([codes & 15, codes >> 4], -1).reshape(rows, groups, group).astype(np.float32)
        zeros = np.full((rows, groups), 8, np.uint8)
        if len(held) > 2:
            pairs = held[2].reshape(rows, -1)
            zeros = np.stack([pairs & 15, pairs >> 4], -1).reshape(rows, -1)[:, :groups]
        whole = ((nibbles - zeros[..., None]) * scales[..., None]).reshape(rows, -1)[:, :columns]
        at = 0
        for name in names(node.name):
            height = len(original[name])
            weights[name] = np.ascontiguousarray(whole[at : at + height], np.float32)
            bits[name] = 8 * sum(each.nbytes for each in held) * height // rows
            at += height
        assert at == rows, node.name
    assert weights.keys() == {name for name, weight in original.items() if weight.ndim == 2}
    return weights, bits


def names(node: str) -> list[str]:
    """The checkpoint's names of the matrices that a node multiplies with, one below the other."""
    if node.startswith("/lm_head/"):
        return ["model.embed_tokens.weight"]
    found = re.match(r"/model/layers\.(\d+)/(attn|mlp)/(\w+)_proj/", node)
    assert found, node
    layer, block, kind = found.groups()
    kinds = kind if kind == "qkv" else [kind]
    return [f"model.layers.{layer}.{block.replace('attn', 'self_attn')}.{each}_proj.weight" for each in kinds]


if __name__ == "__main__":
    main()
