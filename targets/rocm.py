"""AMD GPUs under ROCm: what vLLM, transformers and MIGraphX load, and modules that IREE compiles."""

# Annotations are values here: the fields are the target's flags.
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from tapeout.targets import check_counts
from tapeout.targets.directories import Bitsandbytes, CompressedTensors
from tapeout.targets.iree import Iree, check_chip
from tapeout.targets.local import parse_size
from tapeout.targets.migraphx import MiGraphX
from tapeout.targets.roads import Road, Roads


@dataclass(frozen=True)
class Rocm(Roads):
    """AMD GPUs under ROCm.

    Attributes:
        format: What is written: compressed-tensors, which vLLM and transformers load; bitsandbytes (NF4), for transformers; iree, a module
            that is compiled ahead of time; or migraphx, a graph.
        max_shard_size: Of directories: split the weights into files of at most this size (500M, 2G).
        arch: Of iree: the chip that the module is compiled for (gfx90a, gfx942, gfx950, gfx1100, gfx1201).
        context: Of iree and migraphx: tokens that the caches have room for. Default: the model's own, 4096 at most.
        prefill_chunk: Of iree and migraphx: tokens of a prompt that are computed at once.
    """

    format: Literal["compressed-tensors", "bitsandbytes", "iree", "migraphx"] = "compressed-tensors"
    max_shard_size: str = "5G"
    arch: str = "gfx942"
    context: int | None = None
    prefill_chunk: int = 128

    name: ClassVar[str] = "rocm"
    summary: ClassVar[str] = (
        "AMD GPUs, through a directory that vLLM and transformers load, a compiled module, or a graph for MIGraphX."
    )
    roads: ClassVar[Mapping[str, type[Road]]] = {
        "compressed-tensors": CompressedTensors,
        "bitsandbytes": Bitsandbytes,
        "iree": Iree,
        "migraphx": MiGraphX,
    }

    def __post_init__(self) -> None:
        """TapeoutError for a flag of another format, and a size, a number or a chip that is none."""
        self.check_flags()
        parse_size(self.max_shard_size)
        check_counts(self, "context", "prefill_chunk")
        check_chip(self.arch)
