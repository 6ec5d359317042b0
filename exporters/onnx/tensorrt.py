"""The graph as TensorRT's ONNX parser takes it, for a strongly typed network.

What the parser knows was seen with that of TensorRT-RTX 1.7.1: DequantizeLinear of INT4 in blocks, INT8 and E4M3 by rows, and E2M1
under E4M3; Attention with one output and neither a cache, a soft cap nor values of another width. The cache grows by Concat: past keys and values go in, past and present ones come out.
"""

from __future__ import annotations

from dataclasses import dataclass

from tapeout.exporters import Carry, Exact, Refused
from tapeout.exporters.onnx.blocks import FLOAT4, FLOAT8, NONE, Container, Floats, Linear
from tapeout.exporters.onnx.graph import library
from tapeout.exporters.onnx.typed import TypedOps
from tapeout.models.decoder import Attention
from tapeout.models.rope import Rope
from tapeout.quantize import Scheme

_GROUPS = range(16, 257)  # weights in a block of INT4
_HEADS = range(16, 257, 8)  # elements of a head that kernels for Attention are there for


@dataclass
class TensorRtOps(TypedOps):
    """``Ops`` that writes what TensorRT parses."""

    @staticmethod
    def held(scheme: Scheme, *, turned: bool) -> Container | Refused:
        """What holds a matrix of the scheme."""
        return held(scheme, turned=turned)

    def _cached(self, layer: int, part: str, new: str, heads: int, width: int) -> str:
        g, info = self.graph, library().helper.make_tensor_value_info
        past, present = f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"
        g.inputs.append(info(past, self._half, ["batch", heads, "past", width]))
        g.outputs.append(info(present, self._half, ["batch", heads, "kept", width]))
        return g.node("Concat", [past, new], present, axis=2)

    def _turn(self, name: str, x: str, heads: int, rope: Rope) -> str:
        cos, sin, position = self._by_position(rope)
        return self.graph.node(
            "RotaryEmbedding", [x, cos, sin, position], name,
            num_heads=heads, rotary_embedding_dim=rope.dim, interleaved=int(rope.interleaved),
        )  # fmt: skip

    def _attended(self, name: str, inputs: tuple[str, str, str], spec: Attention, window: int | None) -> str:
        if spec.softcap or spec.head_dim not in _HEADS:
            return self._composed(name, inputs, spec, window)
        q = self._split_heads(f"{name}.query", inputs[0], spec.heads, spec.head_dim)
        given = [q, *inputs[1:], self._mask(window)]
        y = self.graph.node("Attention", given, f"{name}.heads", scale=spec.scale)
        y = self.graph.node("Transpose", [y], f"{name}.tokens", perm=[0, 2, 1, 3])
        return self._shaped(y, (0, 0, -1), name)

    def _mask(self, window: int | None) -> str:
        self._total()
        return super()._mask(window)


def held(scheme: Scheme, *, turned: bool) -> Container | Refused:
    """What holds a matrix of the scheme, or why nothing does."""
    group = scheme.group or 0
    if scheme.activations == "int8":
        return Refused("TensorRT rounds inputs under calibrated scales only.", "w8a8-static")
    if scheme.activations == "e2m1-static":
        return Refused(
            "TensorRT rounds inputs to E2M1 by an operator of its own, TRT_FP4DynamicQuantize, which is not written.",
            "nvfp4",
        )
    if scheme.scales == "super" or scheme.kind == "affine":
        return Refused("TensorRT has no scales under scales, and no minimum.", "int4-g32")
    if scheme.kind == "asymmetric":
        nearest = f"int4-g{group}" if scheme.bits == 4 else "int8"
        return Refused("TensorRT takes no zero point but 0, and no UINT4.", nearest)
    if scheme.levels == "nf4":
        return Refused(
            "TensorRT has no levels of NF4: a table would unpack it to 32 bits a weight.", "int4-g64"
        )
    if scheme.kind == "codebook":
        if scheme.levels == "e4m3" and scheme.scales == "float16" and scheme.group is None:
            return Floats(8, turned)
        if scheme.activations == "e4m3-static":
            return Floats(8, turned, static=True)
        if scheme.levels == "e2m1" and scheme.scales == "e4m3":
            return Floats(4, turned)
        if scheme.levels == "e4m3":
            return Refused("float8 under one scale a tensor is written of what has inputs to round.", "fp8")
        return Refused("TensorRT's blocks of E2M1 are 16 weights under E4M3.", "nvfp4")
    if scheme.bits <= 4 and group in _GROUPS:
        return Linear(4, group, False, turned, scales="FLOAT16")
    if scheme.bits in (6, 8) and scheme.group is None and scheme.scales == "float16":
        static = scheme.activations == "int8-static"
        return Linear(8, None, False, turned, static, "FLOAT" if static else "FLOAT16")
    return Refused("TensorRT's blocks of integers are INT4, of 16 to 256 weights under a float16.", "int8")


def carries(scheme: Scheme) -> Carry:
    """How TensorRT's operators hold a scheme."""
    if scheme.kind == "none":
        return Exact(NONE)
    found = held(scheme, turned=True)
    if isinstance(found, Refused):
        return found
    if isinstance(found, Floats) and found.static:
        return Exact(f"{FLOAT8}, inputs too, their scale calibrated")
    if isinstance(found, Floats):
        return Exact(f"{FLOAT4} under {FLOAT8}" if found.bits == 4 else FLOAT8)
    assert isinstance(found, Linear)
    if found.static:
        return Exact("INT8, inputs too, their scale calibrated")
    if found.block is None:
        return Exact("INT8")
    bits = 4 + 16 / found.block
    return Exact("INT4" + (f", at {bits:g} bits" if scheme.bits < 4 else ""), bits)
