"""Compile the kernels ahead of time for chips that are not here: ``python gpu_ahead.py CHIP…``; run without TRITON_INTERPRET."""

import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tapeout.targets import gpu_kernels

POINTERS = {"x": "*fp16", "packed": "*u8", "scale": "*fp16", "zero": "*u8", "table": "*fp32", "y": "*fp16"}
COUNTS = {"out": "i32", "into": "i32", "group": "i32"}
WHAT = {"KIND": "linear", "LOWEST": -8.0, "NIBBLES": True, "ZERO": False, "PART": 16}  # int4-g32
STEPS = {
    gpu_kernels._times: {"ROWS": 4, "BLOCKS": 16, "WHOLE": True, "UNROLL": 4},
    gpu_kernels._widen: {"BLOCKS": 64},
}
for chip in sys.argv[1:]:
    narrow = chip.startswith(("gfx11", "gfx12"))
    target = (
        GPUTarget("hip", chip, 32 if narrow else 64)
        if chip[:3] == "gfx"
        else GPUTarget("cuda", int(chip), 32)
    )
    for kernel, step in STEPS.items():
        constants = WHAT | step
        kinds = {name: kind for name, kind in (POINTERS | COUNTS).items() if name in kernel.arg_names}
        source = ASTSource(kernel, kinds | dict.fromkeys(constants, "constexpr"), constants)
        made = triton.compile(source, target=target, options={"num_warps": 2})
        binary = made.asm["hsaco" if target.backend == "hip" else "cubin"]
        print(chip, kernel.__name__, binary[:4] == b"\x7fELF", len(binary))
