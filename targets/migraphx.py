"""AMD's format ``migraphx``: a graph that MIGraphX compiles, by itself or as a provider of ONNX Runtime for ROCm."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from tapeout.exporters import Artifact, Carry, onnx
from tapeout.exporters.onnx import migraphx
from tapeout.models import DecoderConfig
from tapeout.quantize import Quantized, Scheme
from tapeout.targets import Memory, Progress, graph_width, onnx_typed

if TYPE_CHECKING:
    from tapeout.targets.rocm import Rocm

_CONTEXT = 4096  # tokens that caches have room for where nobody says: it is taken from the start
_CHECKED = "checked on onnxruntime on a CPU; not run on AMD hardware, nor compiled by MIGraphX"


class MiGraphX(onnx_typed.TypedGraph):
    """See ``roads.Road``."""

    default_scheme: ClassVar[str] = "int4-g32"
    dialect: ClassVar[onnx.Dialect] = "migraphx"
    needs: ClassVar[str] = "ROCm 7 with MIGraphX, or onnxruntime-migraphx"
    runtimes: ClassVar[tuple[str, ...]] = ("onnxruntime-migraphx",)
    flags: ClassVar[tuple[str, ...]] = ("context", "prefill_chunk")
    checks: ClassVar[tuple[str, ...]] = ("onnx.py", "migraphx.py")

    @staticmethod
    def carries(scheme: Scheme) -> Carry:
        return migraphx.carries(scheme)

    @staticmethod
    def missing() -> str | None:
        return onnx_typed.missing("onnx")

    @staticmethod
    def memory(device: Rocm, config: DecoderConfig, context: int) -> Memory:
        """Caches of the whole context, past and present ones apart; scores of a chunk against all of it."""
        chunk = min(device.prefill_chunk, context)
        work = (
            4 * chunk * graph_width(config) + 8 * config.num_heads * chunk * context + 4 * config.vocab_size
        )
        return Memory(2 * onnx_typed.cache_bytes(config, context), work)

    @staticmethod
    def export(device: Rocm, quant: Quantized, out: Path, progress: Progress | None) -> Artifact:
        own = quant.model.config.max_position_embeddings
        context = min(device.context or _CONTEXT, own)
        artifact = onnx.write(quant, out, dialect="migraphx", context=context, progress=progress)
        notes = [*artifact.notes, _CHECKED]
        if context < own and not device.context:
            notes.insert(
                0,
                f"the context is {context} tokens, of {own} of the model: caches have their full size (--context)",
            )
        if "MatMulBnb4" in artifact.containers.values():
            notes.append(
                "onnxruntime-migraphx 1.27 leaves graphs with MatMulBnb4 to the CPU; MIGraphX itself parses them"
            )
        return replace(artifact, notes=tuple(notes))

    @staticmethod
    def card(device: Rocm, artifact: Artifact) -> str:
        """How to run it."""
        return (
            "On a machine with ROCm and MIGraphX (`pip install onnxruntime-migraphx` beside them):\n\n```python\n"
            "import onnxruntime\n\n"
            'session = onnxruntime.InferenceSession("artifact/model.onnx", providers=["MIGraphXExecutionProvider", "CPUExecutionProvider"])\n'
            "print([each.name for each in session.get_inputs()])\n```\n\n"
            f"Caches have room for {artifact.context} tokens: a step takes `input_ids`, `position_ids`, `cache_position` (where in the cache its tokens "
            "go), `attention_mask` (1 where a token stands, of the whole context), `logits_at` (the new tokens whose logits are wanted) and "
            "`past_key_values.N.key` and `.value` in float16, and gives `logits` and `present.N.key` and `.value`, the past of the next step. "
            "MIGraphX compiles a program for each set of shapes: give prompts in chunks of one length, and then single tokens. "
            "`migraphx-driver compile artifact/model.onnx` shows whether it takes the graph.\n\n"
            f"This package was {_CHECKED}."
        )
