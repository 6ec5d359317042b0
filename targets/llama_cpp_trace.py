"""What llama.cpp computes on its way, by the graph's own names: its scheduler shows every tensor to a callback (``cb_eval``).

A tensor is known by the weight that made it, whose name the file states, and only where no weight did by the name that llama.cpp's
graph gives it: those are debug names, and many tensors have none.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.errors import RuntimeCrash
from tapeout.models.graph import inside
from tapeout.validate.primitives import save
from tapeout.validate.session import Shown

# By the name of a tensor in the file, without blk.N and .weight or .bias.
_OF_WEIGHTS = {
    "attn_norm": "attention.norm",
    "attn_q": "attention.q",
    "attn_k": "attention.k",
    "attn_v": "attention.v",
    "attn_qkv": "attention.qkv",
    "attn_q_a": "attention.q_a",
    "attn_q_a_norm": "attention.q_norm",
    "attn_q_b": "attention.q",
    "attn_kv_a_mqa": "attention.kv_a",
    "attn_kv_a_norm": "attention.kv_norm",
    "attn_q_norm": "attention.q_norm",
    "attn_k_norm": "attention.k_norm",
    "attn_output": "attention.out",
    "post_attention_norm": "attention.post_norm",
    "ffn_norm": "mlp.norm",
    "ffn_gate": "mlp.gate",
    "ffn_up": "mlp.up",
    "ffn_down": "mlp.out",
    "post_ffw_norm": "mlp.post_norm",
    "ffn_gate_inp": "mlp.router",
    "ffn_gate_shexp": "mlp.shared.gate",
    "ffn_up_shexp": "mlp.shared.up",
    "ffn_down_shexp": "mlp.shared.out",
    "ffn_gate_inp_shexp": "mlp.shared.gate_logit",
}
_AROUND = {"output_norm": "norm", "output": "head", "token_embd": "head"}
# By the name that llama.cpp's graph gives a tensor, without -N.
_OF_GRAPH = {
    "kqv_out": "attention.context",
    "ffn_inp": "attention.residual",
    "sa_out": "attention.residual",
    "ffn_swiglu": "mlp.inner",
    "ffn_geglu": "mlp.inner",
    "ffn_moe_out": "mlp.experts",
    "l_out": "out",
}
_WHOLE = {"embd": "embedding", "inp_scaled": "embedding", "result_output": "logits"}
_OF_F16_TABLE = 2.0**-11  # GELU is looked up by a float16, and is one


class _Tensor(ctypes.Structure):
    """``struct ggml_tensor`` of ggml.h."""


_Tensor._fields_ = [
    ("type", ctypes.c_int),
    ("buffer", ctypes.c_void_p),
    ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4),
    ("op", ctypes.c_int),
    ("op_params", ctypes.c_int32 * 16),
    ("flags", ctypes.c_int32),
    ("src", ctypes.POINTER(_Tensor) * 10),
    ("view_src", ctypes.POINTER(_Tensor)),
    ("view_offs", ctypes.c_size_t),
    ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64),
]


@cache
def _ggml() -> Any:
    from llama_cpp import llama_cpp

    found = llama_cpp._lib  # finds what it was linked with, too
    found.ggml_get_name.argtypes = found.ggml_op_desc.argtypes = [ctypes.c_void_p]
    found.ggml_get_name.restype = found.ggml_op_desc.restype = ctypes.c_char_p
    found.ggml_backend_tensor_get.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_size_t,
    ]
    return found


class Tracer:
    """Writes down values while ``into`` is open.

    Attributes:
        callback: for ``cb_eval`` of a context; must outlive it.
    """

    def __init__(self, neighbours: bool) -> None:
        """``neighbours``: RoPE turns elements 2 i and 2 i + 1 of a head, so that rows of queries and keys stand in that order."""
        import llama_cpp

        self._neighbours = neighbours
        self._out: str | None = None
        self._shown: dict[str, Shown] = {}
        self._scores: dict[bytes, npt.NDArray[np.float32]] = {}
        self._latent = self._fused = False
        self._error: Exception | None = None
        self.callback = llama_cpp.ggml_backend_sched_eval_callback(self._see)

    @contextmanager
    def into(self, out: str) -> Iterator[dict[str, Shown]]:
        """Values go to the directory ``out``; what is yielded holds their names in order, in the end."""
        self._shown, self._scores, self._out, self._error = {}, {}, out, None
        try:
            yield self._shown
        finally:
            self._out = None
        if self._error:
            raise self._error

    def _see(self, at: int, ask: bool, _: object) -> bool:
        if self._out is None:
            return False
        if not ask:
            try:
                self._write(at, ctypes.cast(at, ctypes.POINTER(_Tensor)).contents)
            except Exception as error:  # Python drops an exception that is raised in a callback
                self._error = error
                return False
        return True

    def _write(self, at: int, tensor: _Tensor) -> None:
        name, op = _ggml().ggml_get_name(at), _ggml().ggml_op_desc(at).decode()
        if name != tensor.name:
            raise RuntimeCrash(
                "this llama.cpp lays its tensors out in another way: its values cannot be read."
            )
        graph, _, layer = name.decode().rpartition("-")
        if op in ("RESHAPE", "VIEW", "PERMUTE", "TRANSPOSE") or tensor.type != 0:
            return
        if graph in ("kq", "kq_scaled_2"):
            self._scores = {name: _array(at, tensor)}
        elif op == "SOFT_MAX" and tensor.src[0].contents.name in self._scores:
            self._write_scores(int(layer), tensor)
        elif op == "ROPE" and graph in ("Kcur", "k_pe"):
            keys = _array(at, tensor)[0]
            if self._neighbours and graph == "Kcur" and not self._latent:
                keys = np.stack((keys[..., ::2], keys[..., 1::2]), -2)
            self._save(inside(f"layers.{layer}.attention.context", "rope"), keys.reshape(len(keys), -1), op)
        elif stable := self._stable(name.decode(), graph, layer, op, tensor):
            rounding = _OF_F16_TABLE if op == "GEGLU" else 0.0
            values = _array(at, tensor)
            tokens = tensor.ne[2] if tensor.ne[2] > 1 and tensor.ne[3] == 1 else tensor.ne[1]
            self._save(stable, values.reshape(tokens, -1), op, rounding)

    def _stable(self, name: str, graph: str, layer: str, op: str, tensor: _Tensor) -> str | None:
        """The graph's own name of a tensor; None: it has none, or the file has its elements in another order."""
        if name in _WHOLE:
            return _WHOLE[name]
        if graph in _OF_GRAPH:
            return f"layers.{layer}.{_OF_GRAPH[graph]}"
        for source in tensor.src[:2]:
            weight = source.contents.name.decode() if source else ""
            block, found = weight.partition(".weight")[0].partition(".bias")[0], None
            if block.startswith("blk."):
                _, layer, block = block.split(".", 2)
                found = _OF_WEIGHTS.get(block)
                self._latent |= block == "attn_kv_a_mqa"
                self._fused |= block == "attn_qkv"
                if self._fused and block == "ffn_up":
                    found = "mlp.gate_up"
                if self._neighbours and not self._latent and block in ("attn_q", "attn_k"):
                    found = None
                return f"layers.{layer}.{found}" if found else None
            if block in _AROUND and op in ("MUL_MAT", "MUL"):
                return _AROUND[block]
        return None

    def _write_scores(self, layer: int, tensor: _Tensor) -> None:
        """What softmax is taken of, which scales it first; without the room that the cache has for more tokens."""
        scale = np.frombuffer(bytes(tensor.op_params), np.float32)[0]
        (scores,) = self._scores.values()
        tokens = scores.shape[2]
        mask = _array(ctypes.addressof(tensor.src[1].contents), tensor.src[1].contents)[0, 0]
        seen = np.isfinite(mask[:tokens, :tokens])
        scores = np.where(seen, scores[0, :, :, :tokens] * scale, np.nan)
        self._save(inside(f"layers.{layer}.attention.context", "scores"), scores, "SOFT_MAX")

    def _save(self, name: str, values: npt.NDArray[np.float32], op: str, rounding: float = 0.0) -> None:
        assert self._out is not None
        if save(self._out, name, values):
            self._shown[name] = Shown(op, rounding)


def _array(at: int, tensor: _Tensor) -> npt.NDArray[np.float32]:
    """A contiguous float32 tensor, outermost axis first."""
    values = np.empty(tuple(reversed(tensor.ne)), np.float32)
    _ggml().ggml_backend_tensor_get(at, values.ctypes.data, 0, values.nbytes)
    return values
