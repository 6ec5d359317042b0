"""Sessions on transformers for directories of quantized weights: by its own loader, or by the format's library where it has none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import psutil

from tapeout.errors import MissingToolchain, ModelError, TapeoutError
from tapeout.exporters import huggingface
from tapeout.models.decoder import ConfigReader
from tapeout.models.families import family
from tapeout.targets import served
from tapeout.validate import pretrained, primitives, reference

_EMPTY: Mapping[str, Any] = {}


def why_not_loaded(directory: Path) -> str | None:
    """Why transformers' own loader does not take a directory; None: it does."""
    said = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config = said.get("quantization_config") or _EMPTY
    groups = (config.get("config_groups") or _EMPTY).values()
    if not all(group["weights"]["symmetric"] for group in groups):
        return "transformers 5.23 does not load zero points of compressed-tensors"
    experts = any(said.get(key) for key in ("num_local_experts", "num_experts", "n_routed_experts"))
    if config and experts:
        return "transformers 5.23 keeps experts as one tensor a layer, which compressed-tensors does not decompress there"
    return None


def open_session(
    directory: str, inputs: bool = True, threads: int | None = None, device: Literal["cpu"] | None = None
) -> Any:
    """Load a directory; called in a worker process.

    Where torch sees a GPU, onto it: by vLLM if it is installed and the format is its own, else by transformers with kernels of ours.
    Elsewhere in float32 on the CPU.

    Args:
        directory: with config.json, safetensors files and the tokenizer.
        inputs: whether inputs are rounded where the directory says so.
        threads: of torch; None: its own choice.
        device: ``cpu``: there, whatever else is here.

    Raises:
        MissingToolchain: transformers or the format's library is absent. ModelError: the loader does not find every weight.
    """
    path = Path(directory)
    reference.prepare(threads)
    said = json.loads((path / "config.json").read_text(encoding="utf-8"))
    method = (said.get("quantization_config") or _EMPTY).get("quant_method")
    if device is None and (there := served.on_gpu(path, () if method == "bitsandbytes" else ("vllm",))):
        return there
    if why_not_loaded(path):
        session = reference.open_weights(path, huggingface.read_weights(path), threads=threads)
    else:
        session = _loaded(path, method, inputs)
    facts = session.facts
    library = f", {method} {version(method)}" if method else ""
    session.facts = replace(facts, runtime=facts.runtime + library, emulated=True)
    return session


def _loaded(path: Path, method: str | None, inputs: bool) -> reference.Reference:
    """By transformers' loader."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    before, begin = psutil.Process().memory_info().rss, perf_counter()
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    try:
        network, found = pretrained.loaded(AutoModelForCausalLM, path, config)
    except ImportError as error:
        raise MissingToolchain(
            f"transformers cannot load {path}: {error}. pip install 'tapeout[rocm]'"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise TapeoutError(f"transformers does not load {path}: {error}") from error
    wrong = {key: sorted(map(str, names)) for key, names in found.items() if names}
    if wrong:
        raise ModelError(f"transformers loads {path} otherwise than it is: {wrong}.")
    if method == "bitsandbytes":
        from bitsandbytes.nn import Linear4bit

        for module in network.modules():
            if isinstance(module, Linear4bit):
                module.weight.quant_state.dtype = torch.float32
        network = network.dequantize(torch.float32).float()  # its floats stay as the file has them
    elif method:
        _widen(network, path)
    if method and method != "bitsandbytes" and not inputs:
        for module in network.modules():
            module.quantization_enabled = False
    return reference.Reference(
        path, network.eval(), reference.facts(before, begin, int(config.max_position_embeddings))
    )


def _widen(network: Any, path: Path) -> None:
    """Bring float4 weights, which the library unpacks to bfloat16, to float32; and let it round inputs without compiling first."""
    import torch

    float4 = {
        f"{name}.weight": module
        for name, module in network.named_modules()
        if hasattr(module, "weight_global_scale")
    }
    if not float4:
        return
    torch.compiler.set_stance("force_eager")
    network.hf_quantizer.compressor.decompress_model(network)  # which the first pass would do
    for name, weight in huggingface.read_weights(path):
        if name in float4:
            float4[name].weight.data = torch.from_numpy(weight)


def open_traced(directory: str) -> primitives.Primitives:
    """What the files mean in our graph, each primitive's value in sight; called in a worker process."""
    path = Path(directory)
    raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    config = family(raw["model_type"]).config(ConfigReader(raw))
    weights: dict[str, npt.NDArray[np.float32]] = dict(huggingface.read_weights(path))
    return primitives.open_weights(config, lambda name: weights[name], path)
