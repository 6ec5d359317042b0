"""The road through optimum: the graph of a Hugging Face family that has no file here, made in the worker environment ``optimum``."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from tapeout import environments
from tapeout.errors import MissingToolchain, ModelError
from tapeout.files import cache_directory, lock, writing
from tapeout.models import optimum_worker, traced
from tapeout.models.checkpoint import Checkpoint

__all__ = ["SCRIPT", "graph_of", "place_of", "read_export"]

SCRIPT = Path(optimum_worker.__file__)
_CONTEXT = 2048  # where a configuration has no longest context (ALiBi)
_NOTHING = "'{0}' is no family that tapeout has a file for, and its graph could not be made by optimum: {1}"


def graph_of(directory: Path, model_type: str, checkpoint: Checkpoint) -> traced.TracedConfig:
    """The graph of a checkpoint, from the cache or made now.

    Raises:
        MissingToolchain: the worker environment is not there. ModelError: optimum cannot export the model; in its words.
    """
    place, environment = place_of(directory, checkpoint), environments.get("optimum")
    with lock(place, wait=True), writing(place):
        if not (place / traced.FACTS).exists():
            if not environment.installed:
                raise MissingToolchain(
                    f"'{model_type}' is no family that tapeout has a file for. optimum can make its graph, in the worker environment "
                    f"'{environment.name}', which is not on this machine: {environment.command}"
                )
            python = environments.python(environment.name)
            versions = environment.facts["versions"]
            maker = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
            with tempfile.TemporaryDirectory(prefix="tapeout-optimum-") as scratch:
                _export(python, directory, Path(scratch), model_type)
                read_export(Path(scratch), place, model_type, maker, checkpoint)
    return traced.read(place)


def place_of(directory: Path, checkpoint: Checkpoint) -> Path:
    """Where the graph of a checkpoint is kept."""
    return cache_directory() / "graph" / f"{directory.name}-{_key(directory, checkpoint)}"


def read_export(export: Path, place: Path, model_type: str, maker: str, checkpoint: Checkpoint) -> None:
    """Tidy what ``optimum_worker`` wrote into ``place``; ModelError when the graph has no matmul to quantize or no cache."""
    ir, _ = traced.libraries()
    facts = json.loads((export / "facts.json").read_text(encoding="utf-8"))
    model = ir.load(export / "model.onnx")
    tidied = traced.tidy(
        model,
        {name: tensor.shape for name, tensor in checkpoint.items() if tensor.dtype in ("F32", "F16", "BF16")},
        lambda name: checkpoint[name].float32(),
    )
    if not any(each.role.is_matrix for each in tidied.tensors.values()):
        raise ModelError(
            _NOTHING.format(
                model_type,
                "none of its matmuls has a weight of the checkpoint; there is nothing to quantize.",
            )
        )
    past = [value for value in model.graph.inputs if value.name.startswith("past_key_values.")]
    if not past or any(value.shape.rank() != 4 for value in past):
        raise ModelError(
            _NOTHING.format(
                model_type, "the graph has no cache of keys and values [batch, heads, tokens, width]."
            )
        )
    eos = facts["eos_token_id"]
    facts |= {
        "max_position_embeddings": facts["max_position_embeddings"] or _CONTEXT,
        "eos_token_id": tuple(eos) if isinstance(eos, list) else eos,
    }
    config = traced.TracedConfig(
        family=model_type,
        road="optimum",
        maker=maker,
        directory=place,
        tensors=tidied.tensors,
        same=tidied.same,
        folded=tidied.folded,
        cache_values=sum(math.prod(value.shape[at] for at in (1, 3)) for value in past),
        **facts,
    )
    place.mkdir(parents=True, exist_ok=True)
    traced.write(place, tidied, config)


def _key(directory: Path, checkpoint: Checkpoint) -> str:
    """What the graph is made from, without reading every weight: files, their sizes and times."""
    files = sorted({tensor.file for tensor in checkpoint.values()} | {directory / "config.json"})
    lines: list[Any] = [environments.get("optimum").requirements, str(directory)]
    lines += [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:16]


def _export(python: Path, directory: Path, out: Path, model_type: str) -> None:
    given = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # The checkpoint alone: what stands beside it is for others, and nothing may be written there.
    with tempfile.TemporaryDirectory(prefix="tapeout-optimum-") as source:
        for file in directory.iterdir():
            if file.suffix in (".json", ".safetensors"):
                (Path(source) / file.name).symlink_to(file.resolve())
        script = shutil.copy(SCRIPT, Path(source) / "export.py")
        done = subprocess.run(
            [python, "-I", script, source, out],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env=given | offline,
        )
    if done.returncode:
        last = [line for line in done.stderr.strip().splitlines() if line.strip()]
        raise ModelError(_NOTHING.format(model_type, (last or ["it died without a word."])[-1]))
