"""llm-compressor's GPTQ and AWQ, saved as compressed-tensors; embedding and head stay float16, as in its examples."""

from __future__ import annotations

import importlib.metadata
import re
import tempfile
from pathlib import Path
from typing import Any

from peers.result import Float, arguments, calibration_tokens, checkpoint_tensors, each_alone

# method, bits, group (None: per channel), symmetric. GPTQ's presets are symmetric, AWQ's example is not.
VARIANTS = {
    "GPTQ-int8": ("gptq", 8, None, True),
    "GPTQ-int4-g128": ("gptq", 4, 128, True),
    "GPTQ-int4-g64": ("gptq", 4, 64, True),
    "GPTQ-int4-g32": ("gptq", 4, 32, True),
    "GPTQ-int4-g32-asym": ("gptq", 4, 32, False),
    "GPTQ-int3-g64": ("gptq", 3, 64, True),
    "AWQ-int4-g128": ("awq", 4, 128, False),
    "AWQ-int4-g32": ("awq", 4, 32, False),
    "RTN-int4-g128": ("rtn", 4, 128, True),
    "RTN-int4-g32": ("rtn", 4, 32, True),
}


def main() -> None:
    options = arguments(__doc__)

    def run(variant: str) -> tuple[dict[str, Float], dict[str, int], dict[str, Any]]:
        import torch
        from llmcompressor import oneshot
        from llmcompressor.pipelines.cache import IntermediatesCache
        from transformers import AutoModelForCausalLM

        IntermediatesCache.pin_memory = lambda *_, **__: (
            None
        )  # AWQ's preparation for a GPU, which fails without one
        ids = torch.from_numpy(calibration_tokens(options))
        batches = [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in ids]
        loader: Any = torch.utils.data.DataLoader(batches, batch_size=None)
        model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=torch.float16
        )  # its scales become it too
        oneshot(model=model, dataset=loader, recipe=recipe(*VARIANTS[variant]), max_seq_length=options.length)
        with tempfile.TemporaryDirectory(dir=options.out) as name:
            model.save_pretrained(name, save_compressed=True)
            weights, bits = read(Path(name), VARIANTS[variant][1])
        norms = [name for name in weights if "norm" in name]
        original = checkpoint_tensors(options.model)
        rescaled = sum(bool((weights[name] != original[name]).any()) for name in norms)
        return weights, bits, {"container": "float16 embedding, norms", "rescaled_norms": rescaled}

    each_alone(options, f"llm-compressor {importlib.metadata.version('llmcompressor')}", VARIANTS, run)


def recipe(method: str, bits: int, group: int | None, symmetric: bool) -> list[Any]:
    """What its own examples for these methods ask for."""
    from llmcompressor.modifiers.gptq import GPTQModifier
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.awq import AWQModifier

    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric} | strategy
    scheme = {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}}, "ignore": ["lm_head"]}
    if method == "gptq":
        return [GPTQModifier(**scheme)]
    return [AWQModifier(duo_scaling="both")] * (method == "awq") + [QuantizationModifier(**scheme)]


def read(directory: Path, num_bits: int) -> tuple[dict[str, Float], dict[str, int]]:
    """The saved directory's weights in float32, and the bits of each in the file."""
    import torch
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from safetensors.torch import load_file

    held: dict[str, Any] = {}
    for path in directory.glob("*.safetensors"):
        held |= load_file(path)
    weights, bits = {}, {}
    for name, tensor in held.items():
        if name.endswith("_packed"):
            weight = name.removesuffix("_packed")
            shape = held[f"{weight}_shape"].tolist()
            scale = held[f"{weight}_scale"]
            codes = unpack_from_int32(tensor, num_bits, torch.Size(shape)).float()
            parts = [tensor, scale]
            if f"{weight}_zero_point" in held:
                parts.append(held[f"{weight}_zero_point"])
                zero = unpack_from_int32(parts[-1], num_bits, scale.shape, packed_dim=0)
                codes -= zero.float().repeat_interleave(shape[1] // scale.shape[1], 1)
            weights[weight] = (codes * scale.float().repeat_interleave(shape[1] // scale.shape[1], 1)).numpy()
            bits[weight] = sum(8 * t.numel() * t.element_size() for t in parts)
        elif not re.search(r"\.weight_(shape|scale|zero_point)$", name) and name != "lm_head.weight":
            weights[name] = tensor.float().numpy()
            bits[name] = 8 * tensor.numel() * tensor.element_size()
    return weights, bits


if __name__ == "__main__":
    main()
