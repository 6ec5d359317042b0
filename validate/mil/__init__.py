"""Runs a saved Core ML package without a Mac: an interpreter of MIL in numpy.

It reads the files alone and shares nothing with what writes them.
"""

from tapeout.validate.mil.machine import LARGEST, Machine, Precision, State
from tapeout.validate.mil.program import Constant, Function, Input, Operation, Program, Type, load

__all__ = [
    "LARGEST",
    "Constant",
    "Function",
    "Input",
    "Machine",
    "Operation",
    "Precision",
    "Program",
    "State",
    "Type",
    "load",
]
