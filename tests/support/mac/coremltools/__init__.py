"""Core ML as far as it is called here, for machines that have none: models run the interpreter in float16.

FAULT says what goes wrong, and on which unit: ``nan ALL``.
"""

import enum
import importlib.machinery
import os
import sys
import types
import warnings
from pathlib import Path

# What is not here is the real one's: its protobuf messages.
own = str(Path(__file__).parent.parent)
real = importlib.machinery.PathFinder.find_spec("coremltools", [path for path in sys.path if path != own])
__path__ = list(real.submodule_search_locations)
__version__ = "9.0"

ComputeUnit = enum.Enum("ComputeUnit", "ALL CPU_AND_GPU CPU_AND_NE CPU_ONLY")


class MLState:
    def __init__(self, package, function, values):
        self.package, self.function, self.values = package, function, values


class MLModel:
    def __init__(self, path, function_name=None, compute_units=ComputeUnit.ALL):
        from tapeout.validate import mil

        fault, _, where = os.environ.get("FAULT", "").partition(" ")
        self.fault = fault if compute_units.name == where else ""
        if self.fault == "abort":
            os.abort()
        if self.fault == "load":
            said = "You will not be able to run predict() on this Core ML model. Underlying exception message was: no plan"
            warnings.warn(said, RuntimeWarning, stacklevel=2)
        program = mil.load(Path(path))
        self.path, self.function = path, function_name or program.default
        self.machine = mil.Machine(program, "float16")
        self.user_defined_metadata = program.metadata

    def make_state(self):
        return MLState(self.path, self.function, self.machine.new_state())

    def predict(self, data, state=None):
        if state is not None and state.package != self.path:
            raise RuntimeError("the state is of another package")
        if state is not None and state.function != self.function:
            if self.fault == "owner":
                raise RuntimeError("the state is of another model")
            if self.fault == "fresh":
                state = self.make_state()
        found = self.machine.run(self.function, data, state and state.values)
        if self.fault == "noise":
            found = {
                name: value + 3 * (value.argsort() % 3).astype(value.dtype) for name, value in found.items()
            }
        if self.fault == "nan":
            found = {name: value * float("nan") for name, value in found.items()}
        return found


models = types.SimpleNamespace(MLModel=MLModel)
