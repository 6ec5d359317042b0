"""NVIDIA's format ``onnx-trt``: a graph for TensorRT's strongly typed networks, and an engine of it where something here builds one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from tapeout.errors import TapeoutError
from tapeout.exporters import Artifact, Carry, onnx
from tapeout.exporters.onnx import tensorrt
from tapeout.models import DecoderConfig
from tapeout.quantize import Quantized, QuantTensor, Scheme
from tapeout.targets import Memory, Progress, graph_width, onnx_typed
from tapeout.targets import tensorrt_engine as engines
from tapeout.targets.local import parse_size
from tapeout.validate.session import SessionSpec

if TYPE_CHECKING:
    from tapeout.targets.nvidia import Nvidia

_RUN = "tapeout.targets.tensorrt_run:open_session"
_CHECKED = "checked on onnxruntime on a CPU; not run on NVIDIA hardware"


class OnnxTrt(onnx_typed.TypedGraph):
    """The road of the format; see ``Road``."""

    default_scheme: ClassVar[str] = "int4-g64"
    dialect: ClassVar[onnx.Dialect] = "tensorrt"
    needs: ClassVar[str] = "TensorRT 10.13 or newer, or TensorRT-RTX 1.7"
    runtimes: ClassVar[tuple[str, ...]] = ("tensorrt", "tensorrt-rtx")
    flags: ClassVar[tuple[str, ...]] = (
        "context",
        "max_batch",
        "prefill_chunk",
        "engine",
        "workspace",
        "builder_level",
        "timing_cache",
    )
    checks: ClassVar[tuple[str, ...]] = ("onnx.py", "tensorrt.py")

    @staticmethod
    def carries(scheme: Scheme) -> Carry:
        return tensorrt.carries(scheme)

    @staticmethod
    def missing() -> str | None:
        return onnx_typed.missing("nvidia")

    @staticmethod
    def memory(device: Nvidia, config: DecoderConfig, context: int) -> Memory:
        """Keys and values of all tokens in half floats, past and present ones apart; scores where attention is written out."""
        chunk = min(device.prefill_chunk, context)
        written = config.mla is not None or config.attention_softcap is not None
        scores = 6 * config.num_heads * chunk * context if written else 0
        work = 4 * chunk * graph_width(config) + scores + 4 * config.vocab_size
        return Memory(2 * onnx_typed.cache_bytes(config, context), work)

    @staticmethod
    def export(device: Nvidia, quant: Quantized, out: Path, progress: Progress | None) -> Artifact:
        who = engines.builder(device.engine)
        artifact = onnx.write(quant, out, dialect="tensorrt", context=device.context, progress=progress)
        graph = onnx.inputs(out)
        made = engines.profiles(
            graph,
            batch=device.max_batch,
            chunk=min(device.prefill_chunk, artifact.context),
            context=artifact.context,
        )
        files = engines.prepare(
            out,
            made,
            workspace_bytes=parse_size(device.workspace) if device.workspace else None,
            builder_level=device.builder_level,
        )
        if isinstance(who, str):
            said = f"skipped: an engine beside the graph: {who}"
        else:
            cache = Path(device.timing_cache) if device.timing_cache else None
            said = engines.build(who, out, cache)
            files = (*files, engines.PLAN, engines.FOUND)
        return replace(artifact, files=(*artifact.files, *files), notes=(*artifact.notes, said, _CHECKED))

    @classmethod
    def session(cls, device: Nvidia, artifact: Artifact) -> SessionSpec:
        """The engine where TensorRT runs it; elsewhere the graph on onnxruntime."""
        spec = super().session(device, artifact)
        if engines.PLAN in artifact.files and engines.runs(artifact.directory):
            return replace(spec, factory=_RUN)
        return spec

    @classmethod
    def read_codes(
        cls, artifact: Artifact, quant: Quantized
    ) -> Iterator[tuple[str, QuantTensor | npt.NDArray[np.float32]]]:
        """From the graph by onnx; and those that the engine held when it was built must stand in it still."""
        if engines.PLAN in artifact.files:
            engines.check_plan(artifact.directory)
        return super().read_codes(artifact, quant)

    @staticmethod
    def card(device: Nvidia, artifact: Artifact) -> str:
        built = (
            "`artifact/model.plan` was built by TensorRT-RTX without a GPU, for TensorRT-RTX 1.7.1 alone. For TensorRT, build"
            if engines.PLAN in artifact.files
            else "Build"
        )
        return (
            f"{built} the engine on the machine whose GPU runs it (kernels are chosen there):\n\n```\n"
            "pip install tensorrt\npython artifact/build_engine.py --timing-cache timing.cache\n```\n\n"
            f"`artifact/engine.json` has its profiles: prompts of up to {min(device.prefill_chunk, artifact.context)} tokens at once and "
            f"single tokens, {device.max_batch} sequence{'s' * (device.max_batch > 1)}, a context of {artifact.context}. Every step takes "
            "`input_ids`, `position_ids`, `attention_mask` (of past and new tokens), `logits_at` (the new tokens whose logits are wanted) "
            "and `past_key_values.N.key` and `.value` in float16, and gives `logits` in float32 and `present.N.key` and `.value`, the past "
            "of the next step. `tapeout run . --prompt TEXT` does so, on TensorRT where it is installed beside PyTorch for CUDA.\n\n"
            f"This package was {_CHECKED}."
        )


def check(device: Nvidia) -> None:
    """TapeoutError for flags of the format that say nothing."""
    if device.workspace:
        parse_size(device.workspace)
    if device.builder_level is not None and not 0 <= device.builder_level <= 5:
        raise TapeoutError(f"--builder-level is {device.builder_level}; what fits: 0 … 5.")
