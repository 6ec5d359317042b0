"""Phones and tablets: the files and runtimes of a CPU, with what a phone has room for as the default."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from tapeout.errors import TapeoutError
from tapeout.exporters import Artifact, onnx
from tapeout.models import DecoderConfig
from tapeout.quantize import Quantized
from tapeout.targets import Progress
from tapeout.targets.local import Local, parse_size
from tapeout.validate.throughput import cores

_GGUF_CARD = """On Android, in [Termux](https://termux.dev):

```
pkg install llama-cpp
llama-cli {flags}
```

An app links llama.cpp's library: on Android as its `examples/llama.android` does, on iOS and iPadOS with its `llama.xcframework`
(`examples/llama.swiftui`). Give it `n_ctx = {context}` and `n_threads = {threads}`."""

_ONNX_CARD = """An app links ONNX Runtime, `com.microsoft.onnxruntime:onnxruntime-android` from Maven or the pod `onnxruntime-c` on iOS, version 1.32 or
newer, and opens `artifact/model.onnx` with {threads} intra-op threads; onnxruntime-genai reads `artifact/` as it is. A build of its
own that leaves out operators must keep these: {operators}."""

_NOTE = (
    "the gates ran these files on the same runtime on the CPU of the machine that made the package (report.json says which), not on a "
    "phone; golden.safetensors is for the check there"
)


@dataclass(frozen=True)
class Mobile(Local):
    """Phones and tablets (arm64).

    Attributes:
        threads: Threads of the runtime. Default: 4, since a phone's slow cores hold up its fast ones.
        context: Longest context to run with, in tokens. Default: 4096, since keys and values must fit beside the weights.
        max_memory: Refuse a package that needs more than this (500M, 4G). Default: 4G, half of a phone of 8 GB.
    """

    threads: int | None = 4
    context: int | None = 4096
    max_memory: str = "4G"

    name: ClassVar[str] = "mobile"
    summary: ClassVar[str] = "Phones and tablets (arm64), through GGUF on llama.cpp or ONNX on ONNX Runtime."
    default_scheme: ClassVar[str] = (
        "int4-g32"  # of 4 bits the one that both formats hold, and Arm kernels are fastest in
    )

    def __post_init__(self) -> None:
        """TapeoutError for a size that is none."""
        super().__post_init__()
        parse_size(self.max_memory)

    @property
    def needs(self) -> str:
        """The format's runtime, built for the phone."""
        return f"{super().needs}, for arm64"

    @property
    def session_threads(self) -> int | None:
        """Of the phone's threads as many as this machine has cores."""
        return min(self.threads, cores()) if self.threads else None

    def export(self, quant: Quantized, out: Path, progress: Progress | None = None) -> Artifact:
        """Write the format's files; TapeoutError when they and a full context need more than ``max_memory``."""
        artifact = super().export(quant, out, progress)
        size = sum((out / file).stat().st_size for file in artifact.files)
        room, config = parse_size(self.max_memory), quant.model.config
        needed = size
        if isinstance(config, DecoderConfig):
            needed += sum(vars(self.memory(config, artifact.context)).values())
        if needed > room:
            raise TapeoutError(
                f"{quant.model.name} as {quant.scheme} needs {needed / 1e9:.2f} GB at {artifact.context} tokens, more than the "
                f"{self.max_memory} of --max-memory. {self._what_fits(quant, size, artifact.context, room)}"
            )
        return replace(artifact, notes=(*artifact.notes, _NOTE))

    def _what_fits(self, quant: Quantized, size: int, context: int, room: int) -> str:
        config = quant.model.config
        if isinstance(config, DecoderConfig):
            for tokens in _halves(context):
                if size + sum(vars(self.memory(config, tokens)).values()) <= room:
                    return f"What fits: --context {tokens}."
        return f"Its weights alone take {size / 1e9:.2f} GB: fewer bits fit, or a smaller model."

    def card(self, artifact: Artifact) -> str:
        """How to run it in an app, and in a terminal on Android."""
        if self.format == "onnx":
            operators = sorted(onnx.describe(artifact.directory / artifact.files[0])["operators"])
            return _ONNX_CARD.format(threads=self.threads, operators=", ".join(operators))
        flags = f"{self.flags(artifact)} -t {self.threads}"
        return _GGUF_CARD.format(flags=flags, context=artifact.context, threads=self.threads)


def _halves(context: int) -> Iterator[int]:
    """Shorter and shorter contexts, down to what a short talk takes."""
    while (context := context // 2) >= 256:
        yield context
