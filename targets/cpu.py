"""CPUs: through GGUF on llama.cpp, or ONNX on ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tapeout.targets.local import Local


@dataclass(frozen=True)
class Cpu(Local):
    """Intel, AMD and Arm CPUs."""

    name: ClassVar[str] = "cpu"
    summary: ClassVar[str] = "Intel, AMD and Arm CPUs, through GGUF on llama.cpp or ONNX on ONNX Runtime."
