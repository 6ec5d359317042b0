"""compressed-tensors: on vLLM where that and a GPU are, else on transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tapeout.targets.data.check.common import Runtime, installed, torch_gpu
from tapeout.targets.data.check.served import Vllm
from tapeout.targets.data.check.transformers import Transformers


class CompressedTensors(Transformers):
    """See Runtime."""

    formats = ("compressed-tensors",)
    needs: tuple[str, ...] = ("torch", "transformers", "compressed_tensors", "numpy")
    install = "pip install torch transformers accelerate compressed-tensors numpy, or pip install vllm"

    def served(self) -> bool:
        """Whether vLLM and a GPU are here."""
        return installed("vllm") and torch_gpu()

    def opened(self, root: Path, manifest: dict[str, Any], unit: str) -> Any:
        """By vLLM, or by transformers' own loader."""
        return (
            Vllm(root, manifest["artifact"]["context"])
            if self.served()
            else super().opened(root, manifest, unit)
        )


RUNTIME: Runtime = CompressedTensors()
