"""What a package's card says of servers of Hugging Face directories: commands, a systemd unit, a container, for NVIDIA and AMD.

Flags are those of the servers' own argument parsers in 2026 (vLLM's ``engine/arg_utils.py``, TensorRT-LLM's ``commands/serve.py``,
SGLang's ``server_args.py``); their values come from the artifact.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tapeout.exporters import Artifact
from tapeout.models import DecoderConfig
from tapeout.quantize import Quantized
from tapeout.targets import Memory, graph_width

QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
"""For sessions on transformers: no bars of the libraries' own, no look at the hub."""

_GPU = 24e9  # bytes of the card that a package is first thought to fit
_SHARE = 0.9  # of a card's memory that servers take, their own default
_CHUNK = 2048  # tokens of a prompt that are computed at once, vLLM's own


def memory(config: DecoderConfig, context: int, bits: float) -> Memory:
    """Keys and values of every token in ``bits`` a number, in windows those of the window; of work a chunk of 2048 tokens."""
    tokens = sum(min(context, config.window(layer) or context) for layer in range(config.num_layers))
    chunk = min(_CHUNK, context)
    return Memory(
        int(config.cache_width * tokens * bits / 8), 2 * chunk * graph_width(config) + 4 * config.vocab_size
    )


def float_values(artifact: Artifact, quant: Quantized) -> tuple[str, ...]:
    """Tensors of codes that the files hold as their values in float16."""
    return tuple(
        name
        for name in quant
        if artifact.containers[name] == "F16" and getattr(quant[name], "dtype", "") != "F16"
    )


@dataclass(frozen=True)
class Served:
    """What a server is told.

    Attributes:
        context: tokens.
        gpus: cards of 24 GB among which the weights are split: the fewest that hold them with room for keys and values, of those
            numbers that divide the heads.
        gpu_gb: what each takes of the weights, GB.
        kv_cache: ``kv-fp8``, or None: the server's own choice.
    """

    context: int
    gpus: int
    gpu_gb: float
    kv_cache: str | None = None

    @classmethod
    def of(cls, artifact: Artifact, kv_cache: str | None = None) -> Served:
        """From the files of an artifact."""
        size = sum((artifact.directory / name).stat().st_size for name in artifact.files)
        heads = _heads(artifact.directory)
        fits = [count for count in (1, 2, 4, 8) if heads % count == 0]
        gpus = next((count for count in fits if size / count < 0.75 * _SHARE * _GPU), fits[-1])
        return cls(artifact.context, gpus, size / gpus / 1e9, kv_cache)

    @property
    def float8(self) -> bool:
        """Whether keys and values are float8."""
        return self.kv_cache == "kv-fp8"


def _heads(directory: Path) -> int:
    said = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return int(said.get("num_attention_heads", 1))


def _command(server: str, how: Served, directory: str = "./artifact") -> str:
    """The line that starts a server."""
    many = how.gpus > 1
    if server == "TensorRT-LLM":
        words = ["trtllm-serve", directory, "--max_seq_len", str(how.context)]
        words += ["--tp_size", str(how.gpus)] * many
        return " ".join([*words, "--kv_cache_free_gpu_memory_fraction", str(_SHARE)])
    if server == "vLLM":
        words = ["vllm serve", directory, "--max-model-len", str(how.context)]
        words += ["--kv-cache-dtype", "fp8"] * how.float8
        words += ["--tensor-parallel-size", str(how.gpus)] * many
        return " ".join([*words, "--gpu-memory-utilization", str(_SHARE)])
    words = ["python -m sglang.launch_server --model-path", directory, "--context-length", str(how.context)]
    words += ["--kv-cache-dtype", "fp8_e4m3"] * how.float8
    words += ["--tp-size", str(how.gpus)] * many
    return " ".join([*words, "--mem-fraction-static", str(_SHARE)])


_PORTS = {"TensorRT-LLM": 8000, "vLLM": 8000, "SGLang": 30000}


def server(name: str, how: Served) -> str:
    """How one of SERVERS is started and asked."""
    return (
        f"With {name}:\n\n```\n{_command(name, how)}\n"
        f"curl localhost:{_PORTS[name]}/v1/completions -H 'Content-Type: application/json' "
        '-d \'{"model": "./artifact", "prompt": "TEXT", "max_tokens": 64}\'\n```'
    )


def transformers(how: Served, packages: str) -> str:
    """In Python, with the most that each card may give.

    Args:
        how: see Served.
        packages: what pip installs beside PyTorch.
    """
    most = {f"cuda:{index}": f"{max(1, round(how.gpu_gb * 1.2 + 1))}GiB" for index in range(how.gpus)}
    return (
        f"With transformers (`pip install {packages}` beside PyTorch):\n\n```python\n"
        "from transformers import pipeline\n\n"
        f'memory = {json.dumps(most)}  # add "cpu" to let layers stay there\n'
        'generate = pipeline("text-generation", "artifact", device_map="auto", model_kwargs={"max_memory": memory})\n'
        'print(generate("TEXT", max_new_tokens=64)[0]["generated_text"])\n```'
    )


def unit(how: Served, server: str, *, directory: str = "/srv/model/artifact") -> str:
    """A systemd unit that keeps a server running."""
    return (
        "As a service (`/etc/systemd/system/model.service`, then `systemctl enable --now model`), the package at `/srv/model`:\n\n"
        "```ini\n[Unit]\nDescription=Language model server\nAfter=network-online.target\n\n"
        "[Service]\nUser=model\nWorkingDirectory=/srv/model\nEnvironment=HF_HUB_OFFLINE=1\n"
        f"ExecStart=/usr/bin/env {_command(server, how, directory)}\n"
        "Restart=on-failure\nTimeoutStartSec=900\n\n[Install]\nWantedBy=multi-user.target\n```"
    )


_IMAGES = {
    "TensorRT-LLM": ("nvcr.io/nvidia/tensorrt-llm/release:latest", ""),
    "vLLM": ("vllm/vllm-openai:latest", "vllm serve "),
    "SGLang": ("lmsysorg/sglang:latest", ""),
}


def container(how: Served, server: str, *, rocm: bool = False) -> str:
    """A container that runs a server."""
    image, entry = _IMAGES[server]
    devices = "--gpus all"
    if rocm:
        image, devices = "rocm/vllm:latest", "--device /dev/kfd --device /dev/dri --group-add video"
        entry = ""
    command = _command(server, how, "/model/artifact").removeprefix(entry)
    if server != "vLLM":  # which listens to all by itself
        command += " --host 0.0.0.0"
    port = _PORTS[server]
    return (
        "In a container:\n\n```\n"
        f'docker run --rm {devices} --ipc=host -p {port}:{port} -v "$PWD":/model:ro {image} \\\n  {command}\n```'
    )


SERVERS = tuple(_PORTS)
"""Their names, the one that is named first first."""
