"""Directories of quantized weights on transformers, in float32 where there is no GPU."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from tapeout.targets.data.check.common import ARTIFACT, Array, Decoder, Runtime, torch_gpu


def config_of(root: Path) -> dict[str, Any]:
    """``config.json`` of the directory."""
    said: dict[str, Any] = json.loads((root / ARTIFACT / "config.json").read_text(encoding="utf-8"))
    return said


class TransformersDecoder(Decoder):
    """A directory on transformers, by its own loader.

    Args:
        root: of the package.
        context: most tokens of a sequence.
        unit: ``gpu``: as the directory says, on the first one; else in float32 on the processor.
    """

    def __init__(self, root: Path, context: int, unit: str) -> None:
        os.environ["HF_HUB_OFFLINE"] = "1"
        import torch
        import transformers

        transformers.logging.set_verbosity_error()
        said, place = config_of(root), root / ARTIFACT
        method = (said.get("quantization_config") or {}).get("quant_method")
        settings = (
            {"dtype": torch.float32, "attn_implementation": "eager"}
            if unit == "cpu"
            else {"device_map": "cuda:0"}
        )
        network, found = transformers.AutoModelForCausalLM.from_pretrained(
            place, local_files_only=True, output_loading_info=True, **settings
        )
        wrong = {key: sorted(map(str, names)) for key, names in found.items() if names}
        if wrong:
            raise RuntimeError(f"transformers loads {place} otherwise than it is: {wrong}")
        if unit == "cpu" and method == "bitsandbytes":  # whose products on processors are of bfloat16
            from bitsandbytes.nn import Linear4bit

            for module in network.modules():
                if isinstance(module, Linear4bit):
                    module.weight.quant_state.dtype = torch.float32
            network = network.dequantize(torch.float32).float()
        self.torch, self.transformers, self.network = torch, transformers, network.eval()
        self.context, self.window = context, int(said.get("sliding_window") or 0)
        self.chip = torch.cuda.get_device_name() if unit == "gpu" else ""
        self.runtime = f"transformers {transformers.__version__}, torch {torch.__version__}"

    def begin(self, function: str) -> None:
        """With an empty cache."""
        self.cache = self.transformers.DynamicCache(config=self.network.config)

    def last(self, ids: list[int], wanted: int) -> Array:
        """Logits of the last tokens."""
        given = self.torch.tensor([ids], device=self.network.device)
        with self.torch.inference_mode():
            out = self.network(
                input_ids=given, past_key_values=self.cache, use_cache=True, logits_to_keep=wanted
            )
        return np.asarray(out.logits[0].float().cpu().numpy())


class Transformers(Runtime):
    """See Runtime."""

    formats: tuple[str, ...] = ("bitsandbytes",)
    needs: tuple[str, ...] = ("torch", "transformers", "accelerate", "bitsandbytes", "numpy")
    install = "pip install torch transformers accelerate bitsandbytes numpy"

    def served(self) -> bool:
        """Whether a server takes the place of transformers."""
        return False

    def unable(self, root: Path, manifest: dict[str, Any]) -> str | None:
        """What transformers 5.23 does not load of compressed-tensors."""
        said = config_of(root)
        quantized = said.get("quantization_config") or {}
        groups = (quantized.get("config_groups") or {}).values()
        if self.served():
            return None
        if not all(group["weights"]["symmetric"] for group in groups):
            return "transformers does not load zero points of compressed-tensors: check it with vLLM (pip install vllm) on the GPU."
        if quantized and any(
            said.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts")
        ):
            return "transformers does not load experts of this format: check it with vLLM (pip install vllm) on the GPU."
        return None

    def units(self, root: Path, manifest: dict[str, Any]) -> list[str]:
        """The GPU that torch sees, of either vendor, or the processor."""
        return ["gpu" if torch_gpu() else "cpu"]

    def opened(self, root: Path, manifest: dict[str, Any], unit: str) -> Any:
        """By transformers' own loader."""
        return TransformersDecoder(root, manifest["artifact"]["context"], unit)


RUNTIME: Runtime = Transformers()
