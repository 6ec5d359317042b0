"""IREE's module: on an AMD GPU that HIP finds; elsewhere its twin, which iree-base-compiler makes of the same text for this processor."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from tapeout.targets.data.check.common import ARTIFACT, Array, Decoder, Runtime

# Codes stay codes: without the first two the compiler would unpack parameters when it sees that nothing else reads them.
TWIN = (
    "--iree-opt-const-eval=false", "--iree-opt-const-expr-hoisting=false", "--iree-hal-target-device=local",
    "--iree-hal-local-target-device-backends=llvm-cpu", "--iree-llvmcpu-target-cpu=host",
)  # fmt: skip


def compiler() -> str | None:
    """Where ``iree-compile`` is."""
    beside = Path(sysconfig.get_path("scripts"), "iree-compile")
    return str(beside) if beside.exists() else shutil.which("iree-compile")


def hip() -> Any:
    """The first GPU that HIP finds; None: there is none, or no HIP."""
    import iree.runtime as rt

    try:
        driver = rt.get_driver("hip")
        return driver.create_default_device() if driver.query_available_devices() else None
    except Exception:  # the binding's own, where the library is absent
        return None


class IreeDecoder(Decoder):
    """A module over its parameter archive."""

    def __init__(self, root: Path, code: Path, device: Any) -> None:
        import iree.runtime as rt

        place = root / ARTIFACT
        said = json.loads((place / "model.json").read_text(encoding="utf-8"))
        self.context, self.chunk, self.vocab, self.past = (
            said["context"],
            said["chunk"],
            said["vocab_size"],
            0,
        )
        index = rt.ParameterIndex()
        index.load(str(place / "model.irpa"))
        config = rt.Config(device=device) if device else rt.Config("local-task")
        self.kept = (index, config)
        self.module = rt.load_vm_modules(
            rt.create_io_parameters_module(config.vm_instance, index.create_provider("model")),
            rt.create_hal_module(config.vm_instance, config.device),
            rt.VmModule.copy_buffer(config.vm_instance, code.read_bytes()),
            config=config,
        )[-1]
        self.runtime = f"IREE {importlib.metadata.version('iree-base-runtime')}"

    def begin(self, function: str) -> None:
        """What is in the caches is not looked at."""
        self.past = 0

    def step(self, function: str, ids: list[int]) -> Array:
        """See Decoder."""
        given = np.zeros(1 if function == "decode" else self.chunk, np.int32)
        given[: len(ids)] = ids
        out = getattr(self.module, "append" if function == "prefill" else function)(
            given, self.past, len(ids)
        )
        self.past += len(ids)
        return np.array(out.to_host())  # a copy: what is mapped goes with it

    def rows(self, ids: list[int]) -> Array:
        """See Decoder."""
        return self.step("prefill", ids) if len(ids) == 1 else self.every(ids)

    def every(self, ids: list[int]) -> Array:
        """By the function that gives all rows."""
        given = np.zeros(self.chunk, np.int32)
        given[: len(ids)] = ids
        out = np.array(self.module.prefill(given, self.past, len(ids)).to_host())
        self.past += len(ids)
        return out[: len(ids)]


class Iree(Runtime):
    """See Runtime."""

    formats = ("iree",)
    needs = ("iree.runtime", "numpy")
    install = "pip install iree-base-runtime numpy"

    def units(self, root: Path, manifest: dict[str, Any]) -> list[str]:
        """The GPU, or the processor."""
        return ["gpu" if hip() else "cpu"]

    def opened(self, root: Path, manifest: dict[str, Any], unit: str) -> Any:
        """The module that was compiled for the GPU, or its twin."""
        if unit == "gpu":
            (code,) = (root / ARTIFACT).glob("model_*.vmfb")
            return IreeDecoder(root, code, hip())
        iree_compile = compiler()
        if iree_compile is None:
            raise RuntimeError(
                "HIP finds no AMD GPU, and iree-compile, which makes the twin for a processor, is not here"
            )
        with tempfile.TemporaryDirectory() as scratch:
            twin = Path(scratch, "twin.vmfb")
            command = [iree_compile, str(root / ARTIFACT / "model.mlir"), "-o", str(twin), *TWIN]
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
            if done.returncode:
                raise RuntimeError(f"iree-compile ended with {done.returncode}: {done.stderr.strip()[-300:]}")
            return IreeDecoder(root, twin, None)


RUNTIME: Runtime = Iree()
