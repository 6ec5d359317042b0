"""Core ML, through coremltools on a Mac."""

from __future__ import annotations

import platform
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from tapeout.targets.data.check.common import ARTIFACT, Array, Decoder, Encoder, Runtime

MODEL = "model.mlpackage"
UNITS = {"all": "ALL", "cpu-and-gpu": "CPU_AND_GPU", "cpu-and-ne": "CPU_AND_NE", "cpu-only": "CPU_ONLY"}


def packages(root: Path) -> list[Path]:
    """``model.mlpackage``, or those that a model was cut into, in the order in which they are called."""
    artifact = root / ARTIFACT
    first = sorted(artifact.glob("model_1_of_*.mlpackage"))
    if not first:
        return [artifact / MODEL]
    count = int(first[0].stem.rpartition("_")[2])
    return [artifact / f"model_{part}_of_{count}.mlpackage" for part in range(1, count + 1)]


def load(package: Path, unit: str, function: str | None) -> Any:
    """A function of a package on a compute unit, compiled and ready."""
    import coremltools as ct

    with warnings.catch_warnings():
        # coremltools only warns when Core ML refuses a model, and fails at the first prediction in other words.
        warnings.filterwarnings("error", message="You will not be able to run predict")
        return ct.models.MLModel(
            str(package), function_name=function, compute_units=getattr(ct.ComputeUnit, UNITS[unit])
        )


def facts_of(model: Any) -> dict[str, int]:
    """What the package says of itself under ``co.tapeout.``: context, batch, chunk and window."""
    said = dict(model.user_defined_metadata)
    names = ("context", "batch", "chunk", "window")
    return {name: int(said[f"co.tapeout.{name}"]) for name in names if f"co.tapeout.{name}" in said}


class CoreMlDecoder(Decoder):
    """The functions ``prefill`` and ``decode``, of each package in turn."""

    def __init__(self, models: dict[str, list[Any]]) -> None:
        self.models, facts = models, facts_of(models["prefill"][0])
        self.context, self.chunk, self.batch = facts["context"], facts["chunk"], facts["batch"]
        self.window = facts.get("window", 0)

    def begin(self, function: str) -> None:
        """In states that the models of this function make."""
        self.states, self.past = [model.make_state() for model in self.models[function]], 0

    def step(self, function: str, ids: list[int]) -> Array:
        """See Decoder. The mask is zeros: the program itself hides what comes later."""
        total = self.past + len(ids)
        mask = np.zeros((self.batch, 1, len(ids), total), np.float16)
        name, out = "inputIds", np.tile(np.array(ids, np.int32), (self.batch, 1))
        for model, state in zip(self.models[function], self.states):
            (out,) = model.predict({name: out, "fullAttentionMask": mask}, state).values()
            name = "hiddenStates"  # of the next package
        self.past = total
        return np.asarray(out, np.float32)[0]

    def rows(self, ids: list[int]) -> Array:
        """See Decoder."""
        return self.step("prefill", ids)


class CoreMlEncoder(Encoder):
    """The function ``main``."""

    def __init__(self, models: dict[str, list[Any]]) -> None:
        (self.model,) = models["main"]
        facts = facts_of(self.model)
        self.context, self.batch = facts["context"], facts["batch"]

    def encode(self, ids: list[int]) -> Array:
        """See Encoder."""
        shape = (self.batch, 1)
        inputs = {
            "inputIds": np.tile(np.array(ids, np.int32), shape),
            "attentionMask": np.tile(np.ones(len(ids), np.int32), shape),
        }
        (out,) = self.model.predict(inputs).values()
        out = np.asarray(out, np.float32)
        return out.reshape(-1, out.shape[-1])[:1]


class CoreMl(Runtime):
    """See Runtime."""

    formats = ("coreml",)
    needs = ("coremltools", "numpy")
    install = "pip install coremltools numpy"
    named = tuple(UNITS)

    def unable(self, root: Path, manifest: dict[str, Any]) -> str | None:
        """Away from macOS."""
        if platform.system() == "Darwin":
            return None
        return f"Core ML runs on macOS only, and this is {platform.system()}."

    def units(self, root: Path, manifest: dict[str, Any]) -> list[str]:
        """All of them: one that fails fails the report."""
        return list(UNITS)

    def opened(self, root: Path, manifest: dict[str, Any], unit: str) -> Any:
        """All functions of all packages."""
        import coremltools as ct

        is_encoder = "output" in manifest["model"]
        functions = {"main": None} if is_encoder else {"prefill": "prefill", "decode": "decode"}
        models = {
            name: [load(package, unit, function) for package in packages(root)]
            for name, function in functions.items()
        }
        model: Any = CoreMlEncoder(models) if is_encoder else CoreMlDecoder(models)
        model.runtime = f"coremltools {ct.__version__}"
        return model


RUNTIME = CoreMl()
