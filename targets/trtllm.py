"""The format ``trtllm`` of target ``nvidia``: rank checkpoints for TensorRT-LLM's ``trtllm-build``, and the engine where that is installed."""

from __future__ import annotations

import importlib.util
import logging
import math
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from tapeout.errors import RuntimeCrash
from tapeout.exporters import Artifact, Carry, trtllm
from tapeout.exporters.streamed import ADDED_ERROR
from tapeout.models import DecoderConfig
from tapeout.quantize import Quantized, QuantTensor, Scheme
from tapeout.targets import Memory, Progress, graph_width
from tapeout.validate.session import Arithmetic, KvCache, Lowering, SessionSpec

if TYPE_CHECKING:
    from tapeout.targets.nvidia import Nvidia

_OPEN = "tapeout.targets.trtllm_ranks:open_session"
_TRACED = "tapeout.targets.trtllm_trace:open_traced"
# Ranks of one machine meet on its own interface, whatever its name resolves to.
_ENVIRONMENT = {"GLOO_SOCKET_IFNAME": "lo"}

BUILDER = "trtllm-build"
ENGINE = "engine"
_NEEDS = "tensorrt-llm 1.2 (the last release with trtllm-build)"
_BUILD_S = 6 * 3600  # a 70B model on a slow disk takes one
_LAST_LINES = 20
_CHUNK = 8192  # tokens of a pass: trtllm-build's own max_num_tokens

_CHECKED = "checked on our own ranks in float32 on a CPU; not run on NVIDIA hardware, nor by TensorRT-LLM"
_WEIGHTS_DERIVATION = (
    "The same codes in float32, the sums of each linear in as many parts as there are ranks: sums of K products taken in another order "
    "differ by about sqrt(K) 2^-24 of their size, below 1e-5 for K = 16384; ten times that for the layers they pass through."
)
_NORMS_DERIVATION = (
    "{} Norms are held as 1 + w in {}, off by up to {} of themselves: their {} in a row add up to the square root of that many, "
    "and the largest of thousands of logits is four deviations away."
)
_ZEROS_DERIVATION = (
    "{} A group's zero term is rounded to float16, 0.02 % of its weights at most: {} linears in a row add up to the square root of that "
    "many, and the largest of thousands of logits is four deviations away."
)
_RUNTIME_DERIVATION = (
    "The ranks in float32. Inputs are rounded to int8 where the algorithm says so, in each rank its own share; nothing else is rounded but "
    "embeddings, head, norms and biases, to float16: 2^-12 of themselves, an eighth of bfloat16's, which the floor of 5e-5 nats is made for."
)
_HALF_STEPS = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24}


class Trtllm:
    """What ``Nvidia`` asks of a format."""

    default_scheme: ClassVar[str] = "int8"
    arithmetic: ClassVar[Arithmetic] = "scheme"
    cache: ClassVar[KvCache] = "kv-f16"
    needs: ClassVar[str] = f"an NVIDIA GPU a rank, and {_NEEDS}"
    runtimes: ClassVar[tuple[str, ...]] = ("tensorrt-llm",)
    flags: ClassVar[tuple[str, ...]] = (
        "tensor_parallel",
        "pipeline_parallel",
        "gpt_attention_plugin",
        "gemm_plugin",
        "max_batch_size",
        "max_input_len",
        "max_seq_len",
    )
    checks: ClassVar[tuple[str, ...]] = ("trtllm.py",)

    @staticmethod
    def carries(scheme: Scheme) -> Carry:
        """As the builder takes it, without an order of bytes that is one GPU's."""
        return trtllm.carries(scheme)

    @staticmethod
    def missing() -> str | None:
        """Whether what runs the ranks here is installed; TensorRT-LLM is not needed to write them."""
        absent = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
        return f"{', '.join(absent)} is not installed: pip install 'tapeout[nvidia]'." if absent else None

    @staticmethod
    def memory(device: Nvidia, config: DecoderConfig, context: int) -> Memory:
        """Keys and values in half floats, of key heads that ranks share once a rank; of work a pass of 8192 tokens."""
        heads = max(config.num_kv_heads, device.tensor_parallel)
        width = heads * (config.head_dim + config.value_dim)
        tokens = sum(min(context, config.window(layer) or context) for layer in range(config.num_layers))
        work = 2 * min(_CHUNK, context) * graph_width(config) + 4 * config.vocab_size
        return Memory(2 * width * tokens, work * device.tensor_parallel)

    @staticmethod
    def export(device: Nvidia, quant: Quantized, out: Path, progress: Progress | None) -> Artifact:
        """Write the ranks; build the engine where ``trtllm-build`` is installed.

        Raises:
            RuntimeCrash: the builder failed or took too long, with its last lines and the command.
        """
        artifact = trtllm.write(
            quant,
            out,
            tensor_parallel=device.tensor_parallel,
            pipeline_parallel=device.pipeline_parallel,
            progress=progress,
        )
        context = min(device.max_seq_len or artifact.context, artifact.context)
        artifact = replace(artifact, context=context, notes=(*artifact.notes, _CHECKED))
        builder = shutil.which(BUILDER)
        if builder is None:
            skipped = f"{BUILDER} skipped: needs {_NEEDS}, and none is on PATH; the card has the command"
            return replace(artifact, notes=(*artifact.notes, skipped))
        _build(builder, command(device, out), out)
        built = sorted(
            f"{ENGINE}/{path.relative_to(out / ENGINE)}"
            for path in (out / ENGINE).rglob("*")
            if path.is_file()
        )
        note = f"engine built by {builder}: for the GPU of this machine alone"
        return replace(artifact, files=(*artifact.files, *built), notes=(*artifact.notes, note))

    @staticmethod
    def session(device: Nvidia, artifact: Artifact) -> SessionSpec:
        """The ranks, each a process where there are several."""
        return SessionSpec(_OPEN, {"directory": str(artifact.directory)}, environment=_ENVIRONMENT)

    @staticmethod
    def read_codes(
        artifact: Artifact, quant: Quantized
    ) -> Iterator[tuple[str, QuantTensor | npt.NDArray[np.float32]]]:
        """Through safetensors, the shares of the ranks put together."""
        return trtllm.read_codes(artifact, quant)

    @staticmethod
    def lowerings(device: Nvidia, artifact: Artifact, quant: Quantized, scratch: Path) -> list[Lowering]:
        """The ranks with inputs left alone, and as they are deployed."""
        half = [name for name in quant if artifact.containers.get(name) == "F16"]
        values = tuple(name for name in half if quant.schemes[name].kind != "none")
        config = quant.model.decoder
        # Norms that are held as 1 + w are rounded as that, which their own bound is for.
        halves = tuple(
            name
            for name in half
            if quant.schemes[name].kind == "none"
            and getattr(quant[name], "dtype", "") != "F16"
            and not (config.norm_offset and "norm" in name.split(".")[-2])
        )
        deployed = Trtllm.session(device, artifact)
        exact = deployed
        if any(scheme.activations for scheme in quant.schemes.values()):
            exact = replace(deployed, arguments={**deployed.arguments, "inputs": False})
        derivation, limit = _bound(artifact, quant)
        return [
            Lowering("weights", exact, "max", derivation, limit, halves=halves, values=values),
            Lowering("runtime", deployed, "kl", _RUNTIME_DERIVATION),
        ]

    @staticmethod
    def traced(device: Nvidia, artifact: Artifact, scratch: Path) -> SessionSpec:
        """What the ranks mean together, in our own graph."""
        return SessionSpec(_TRACED, {"directory": str(artifact.directory)})

    @staticmethod
    def card(device: Nvidia, artifact: Artifact) -> str:
        """How the engine is built and served."""
        built = any(name.startswith(f"{ENGINE}/") for name in artifact.files)
        build = shlex.join(command(device, Path("artifact")))
        world = device.tensor_parallel * device.pipeline_parallel
        gpus = "a GPU" if world == 1 else f"{world} GPUs"
        first = (
            f"The engine is in `artifact/{ENGINE}`, built for the GPU of the machine that exported it. To build it for another one"
            if built
            else f"The step `{BUILDER}` was skipped here: needs {_NEEDS}. On the machine with {gpus}"
        )
        served = f"artifact/{ENGINE}"
        return (
            f"{first} (`pip install 'tensorrt-llm>=1.2,<1.3'`):\n\n"
            f"```\n{build}\n```\n\n"
            "The engine is for that GPU's generation and that release. Then:\n\n"
            f"```\ntrtllm-serve {served} --tokenizer artifact/{trtllm.WORDS} --backend tensorrt --max_seq_len {artifact.context}\n"
            "curl localhost:8000/v1/completions -H 'Content-Type: application/json' "
            f'-d \'{{"model": "{ENGINE}", "prompt": "TEXT", "max_tokens": 64}}\'\n```\n\n'
            f"This package was {_CHECKED}."
        )


def command(device: Nvidia, directory: Path) -> list[str]:
    """``trtllm-build`` with the target's flags; sizes that nobody gives are the builder's own."""
    found = [BUILDER, "--checkpoint_dir", str(directory), "--output_dir", str(directory / ENGINE)]
    for flag in Trtllm.flags[2:]:
        value = getattr(device, flag)
        if value is not None:
            found += [f"--{flag}", str(value)]
    return found


def _build(builder: str, words: list[str], out: Path) -> None:
    logging.getLogger(__name__).info("%s", shlex.join(words))
    try:
        done = subprocess.run(
            [builder, *words[1:]],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_BUILD_S,
            check=False,
        )
        status, said = f"ended with status {done.returncode}", done.stdout
    except subprocess.TimeoutExpired as error:
        status, said = f"was stopped after {_BUILD_S / 3600:g} hours", error.stdout or b""
    except OSError as error:
        status, said = f"cannot be started ({error.strerror})", b""
    if status != "ended with status 0" or not any((out / ENGINE).glob("*.engine")):
        lines = said.decode("utf-8", "replace").strip().splitlines()[-_LAST_LINES:]
        last = "\n".join(lines) or "nothing"
        raise RuntimeCrash(
            f"{builder} {status} without an engine. Its last lines:\n{last}\nTo repeat it: {shlex.join(words)}; without it on PATH the "
            "package is written with its command."
        )


def _bound(artifact: Artifact, quant: Quantized) -> tuple[str, float]:
    """The largest logit difference that rounding leaves, in deviations, and where it comes from."""
    config, found, limit = quant.model.decoder, _WEIGHTS_DERIVATION, 1e-4
    if config.norm_offset:
        dtype = {"F16": "float16", "BF16": "bfloat16"}.get(
            artifact.containers["model.norm.weight"], "float32"
        )
        norms = (4 if config.sandwich_norms else 2) * config.num_layers + 1
        step = _HALF_STEPS[dtype]
        limit = max(limit, 4 * step * math.sqrt(norms))
        found = _NORMS_DERIVATION.format(found, dtype, f"2^{round(math.log2(step))}", norms)
    if any(s.kind == "asymmetric" for s in quant.schemes.values()):
        linears = 4 * config.num_layers
        limit = math.hypot(limit, 4 * ADDED_ERROR * math.sqrt(linears))
        found = _ZEROS_DERIVATION.format(found, linears)
    return found, limit
