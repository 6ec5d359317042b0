"""bitsandbytes' NF4 and FP4 (blocks of 64) through transformers' own loading, on the CPU."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from peers.result import Float, arguments, checkpoint_tensors, each_alone

VARIANTS = {"NF4": ("nf4", False), "NF4+double": ("nf4", True), "FP4": ("fp4", False)}


def main() -> None:
    options = arguments(__doc__)

    def run(variant: str) -> tuple[dict[str, Float], dict[str, int], dict[str, Any]]:
        import torch
        from bitsandbytes.functional import dequantize_4bit
        from bitsandbytes.nn import Linear4bit
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        kind, double = VARIANTS[variant]
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=kind,
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=torch.float32,
        )
        model = AutoModelForCausalLM.from_pretrained(
            options.model, dtype=torch.float16, quantization_config=config, device_map="cpu"
        )
        weights = checkpoint_tensors(options.model)
        bits = {name: 16 * weight.size for name, weight in weights.items()}
        for module_name, module in model.named_modules():
            if isinstance(module, Linear4bit):
                state = module.weight.quant_state
                # The 16 levels and the 256 of the nested scales are constants of the format: not counted.
                held = [module.weight.data, state.absmax]
                if state.nested:
                    held += [state.state2.absmax, state.offset]
                state.dtype = torch.float32  # else rounded to the checkpoint's float16
                weights[f"{module_name}.weight"] = dequantize_4bit(module.weight.data, state).numpy()
                bits[f"{module_name}.weight"] = sum(8 * t.numel() * t.element_size() for t in held)
        return weights, bits, {"container": "float16 embedding, norms"}

    each_alone(options, f"bitsandbytes {importlib.metadata.version('bitsandbytes')}", VARIANTS, run)


if __name__ == "__main__":
    main()
