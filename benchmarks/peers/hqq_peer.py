"""HQQ, groups along the input (its default, axis 1) and along the output (axis 0, which it calls more accurate)."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from peers.result import Float, arguments, checkpoint_tensors, each_alone

VARIANTS = {
    f"int{bits}-g{group}{'-axis0' if axis == 0 else ''}": (bits, group, axis)
    for axis in (1, 0)
    for bits, group in ((8, 64), (4, 64), (3, 64), (2, 64), (2, 16))
}


def main() -> None:
    options = arguments(__doc__)

    def run(variant: str) -> tuple[dict[str, Float], dict[str, int], dict[str, Any]]:
        import torch
        from hqq.core.quantize import BaseQuantizeConfig, HQQLinear, Quantizer
        from hqq.models.hf.base import AutoHQQHFModel
        from transformers import AutoModelForCausalLM

        nbits, group, axis = VARIANTS[variant]
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float16)
        AutoHQQHFModel.quantize_model(
            model,
            quant_config=BaseQuantizeConfig(nbits=nbits, group_size=group, axis=axis),
            compute_dtype=torch.float16,  # also what scales and zero points are kept in
            device="cpu",
        )
        weights = checkpoint_tensors(options.model)
        bits = {name: 16 * weight.size for name, weight in weights.items()}
        for module_name, module in model.named_modules():
            if isinstance(module, HQQLinear):
                meta = module.meta
                held = (module.W_q, meta["scale"], meta["zero"])
                assert meta["scale"].dtype == meta["zero"].dtype == torch.float16
                # In float32, so that the runtime's float16 arithmetic is not taken for the codes' error.
                exact = meta | {
                    "compute_dtype": torch.float32,
                    "scale": meta["scale"].float(),
                    "zero": meta["zero"].float(),
                }
                weights[f"{module_name}.weight"] = Quantizer.dequantize(module.W_q.data, exact).numpy()
                bits[f"{module_name}.weight"] = sum(8 * t.numel() * t.element_size() for t in held)
        return weights, bits, {"container": "float16 embedding, norms"}

    each_alone(options, f"hqq {importlib.metadata.version('hqq')}", VARIANTS, run)


if __name__ == "__main__":
    main()
