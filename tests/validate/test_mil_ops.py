"""Each operation of the interpreter against torch, against coremltools' own constant folding, and in emulated float16."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from tapeout.validate import mil
from tapeout.validate.mil.ops import OPS

Save = Callable[..., Path]
RNG = np.random.default_rng(7)


def _half(x: Any) -> Any:
    """As float64, what float16 and float32 hold exactly: constants and inputs lose nothing in a file."""
    return np.asarray(x).astype(np.float16).astype(np.float64)


def _random(*shape: int) -> Any:
    return _half(RNG.standard_normal(shape))


X = _half(RNG.standard_normal((2, 3, 5)) * 3)
Y = _half(RNG.standard_normal((2, 1, 5)) * 2)
POSITIVE = _half(np.abs(X) + 0.1)
UNIT = _half(np.tanh(X) * 0.9)
WIDE = _random(2, 3, 4, 5)
INTS = RNG.integers(-9, 9, (2, 3, 5)).astype(np.int32)
TRUTH = INTS > 0
PLACES = np.array([[4, 0], [2, 3]], np.int32)


@dataclass(frozen=True)
class Case:
    """``takes`` are the function's inputs, ``fixed`` the constants; ``says`` is what torch makes of the inputs, in float64."""

    op: str
    takes: dict[str, Any]
    says: Callable[..., Any]
    fixed: dict[str, Any] = field(default_factory=dict)
    folds: bool = True  # whether coremltools folds it, and rightly
    exact: bool = False  # gives numbers that it was given, which float16 does not round


def _unary(op: str, x: Any, says: Callable[..., Any], **more: Any) -> tuple[str, Case]:
    return op, Case(op, {"x": x}, says, **more)


def _pad_same(x: Any, low: bool) -> Any:
    """TensorFlow's SAME: 5 -> 3 by a kernel of 2 with stride 2 needs one element, at the end or at the beginning."""
    return functional.pad(x, (1, 0) if low else (0, 1))


def _softmax_attention(query: Any, key: Any, value: Any, mask: Any = None) -> Any:
    return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def _scattered(data: Any, indices: Any, updates: Any, combine: Callable[..., Any]) -> Any:
    """Slices of axis 1, one after another."""
    data = data.clone()
    for at, index in enumerate(indices.tolist()):
        data[:, index] = combine(data[:, index], updates[:, at])
    return data


QUERY, KEY, VALUE = (_random(*shape) for shape in [(1, 2, 3, 4), (1, 2, 5, 4), (1, 2, 5, 6)])
MASK = np.where(RNG.random((1, 1, 3, 5)) < 0.7, 0.0, -1e4)
MASK[..., 0] = 0.0
IMAGE = _random(2, 4, 5, 7)

CASES: dict[str, Case] = dict(
    [
        _unary("abs", X, torch.abs, exact=True),
        _unary("acos", UNIT, torch.acos),
        _unary("asin", UNIT, torch.asin),
        _unary("atan", X, torch.atan),
        _unary("atanh", UNIT, torch.atanh),
        _unary("ceil", X, torch.ceil, exact=True),
        _unary("cos", X, torch.cos),
        _unary("cosh", X, torch.cosh),
        _unary("erf", X, torch.erf),
        _unary("exp", X, torch.exp),
        _unary("exp2", X, torch.exp2),
        _unary("floor", X, torch.floor, exact=True),
        _unary("identity", X, lambda x: x, exact=True),
        _unary("relu", X, torch.relu, exact=True),
        _unary("relu6", X * 2, functional.relu6, exact=True),
        _unary("round", np.array([[0.5, 1.5, -2.5, 2.4]]), torch.round, exact=True),
        _unary("sigmoid", X, torch.sigmoid),
        _unary("sign", X, torch.sign, exact=True),
        _unary("silu", X, functional.silu, folds=False),
        _unary("sin", X, torch.sin),
        _unary("sinh", X, torch.sinh),
        _unary("softplus", X, functional.softplus),
        _unary("softsign", X, functional.softsign),
        _unary("sqrt", POSITIVE, torch.sqrt),
        _unary("square", X, torch.square),
        _unary("tan", UNIT, torch.tan),
        _unary("tanh", X, torch.tanh),
        *(
            (op, Case(op, {"x": X, "y": Y}, says))
            for op, says in {
                "add": torch.add,
                "sub": torch.sub,
                "mul": torch.mul,
                "real_div": torch.div,
            }.items()
        ),
        *(
            (op, Case(op, {"x": X, "y": Y}, says, exact=True))
            for op, says in {
                "maximum": torch.maximum,
                "minimum": torch.minimum,
                "floor_div": torch.floor_divide,
            }.items()
        ),
        ("mod", Case("mod", {"x": X, "y": Y}, torch.remainder)),
        ("pow", Case("pow", {"x": POSITIVE, "y": Y}, torch.pow)),
        *(
            (op, Case(op, {"x": INTS, "y": INTS[:, ::-1]}, says))
            for op, says in {
                "equal": torch.eq,
                "not_equal": torch.ne,
                "less": torch.lt,
                "less_equal": torch.le,
                "greater": torch.gt,
                "greater_equal": torch.ge,
            }.items()
        ),
        *(
            (
                f"{op}-int",
                Case(
                    op,
                    {"x": INTS, "y": np.where(INTS[:, ::-1] == 0, 4, INTS[:, ::-1]).astype(np.int32)},
                    says,
                ),
            )
            for op, says in {
                "add": torch.add,
                "mul": torch.mul,
                "sub": torch.sub,
                "floor_div": torch.floor_divide,
                "mod": torch.remainder,
                "maximum": torch.maximum,
            }.items()
        ),
        *(
            (op, Case(op, {"x": TRUTH, "y": TRUTH[:, ::-1]}, says))
            for op, says in {
                "logical_and": torch.logical_and,
                "logical_or": torch.logical_or,
                "logical_xor": torch.logical_xor,
            }.items()
        ),
        ("logical_not", Case("logical_not", {"x": TRUTH}, torch.logical_not)),
    ]
)
CASES |= {
    "log": Case("log", {"x": POSITIVE}, lambda x: torch.log(x + 0.25), {"epsilon": 0.25}),
    "rsqrt": Case("rsqrt", {"x": POSITIVE}, lambda x: torch.rsqrt(x + 0.25), {"epsilon": 0.25}),
    "inverse": Case("inverse", {"x": POSITIVE}, lambda x: 1 / (x + 0.25), {"epsilon": 0.25}),
    "clip": Case("clip", {"x": X}, lambda x: x.clip(-0.5, 1.5), {"alpha": -0.5, "beta": 1.5}, exact=True),
    "threshold": Case("threshold", {"x": X}, lambda x: x.clip(-0.5), {"alpha": -0.5}, exact=True),
    "leaky_relu": Case("leaky_relu", {"x": X}, lambda x: functional.leaky_relu(x, 0.125), {"alpha": 0.125}, exact=True),
    "elu": Case("elu", {"x": X}, lambda x: functional.elu(x, 0.5), {"alpha": 0.5}),
    "gelu": Case("gelu", {"x": X}, functional.gelu),
    "gelu-tanh": Case("gelu", {"x": X}, lambda x: functional.gelu(x, approximate="tanh"), {"mode": "TANH_APPROXIMATION"}),
    "gelu-sigmoid": Case("gelu", {"x": X}, lambda x: x * torch.sigmoid(1.702 * x), {"mode": "SIGMOID_APPROXIMATION"}),
    "cast-int32": Case("cast", {"x": X}, lambda x: x.to(torch.int32), {"dtype": "int32"}),
    "cast-int8": Case("cast", {"x": X}, lambda x: x.to(torch.int8), {"dtype": "int8"}),
    "cast-bool": Case("cast", {"x": INTS}, lambda x: x.bool(), {"dtype": "bool"}),
    "cast-fp32": Case("cast", {"x": INTS}, lambda x: x.double(), {"dtype": "fp32"}),
    "select": Case("select", {"cond": TRUTH, "a": X, "b": Y}, torch.where, exact=True),
    "reduce_mean": Case("reduce_mean", {"x": X}, lambda x: x.mean((0, 2)), {"axes": [0, 2]}),
    "reduce_mean-keep": Case("reduce_mean", {"x": X}, lambda x: x.mean(-1, True), {"axes": [-1], "keep_dims": True}),
    "reduce_sum": Case("reduce_sum", {"x": X}, lambda x: x.sum((1,)), {"axes": [1]}),
    "reduce_sum-int": Case("reduce_sum", {"x": INTS}, lambda x: x.sum(1), {"axes": [1]}),
    "reduce_max": Case("reduce_max", {"x": X}, lambda x: x.amax((0, 1)), {"axes": [0, 1]}, exact=True),
    "reduce_min": Case("reduce_min", {"x": X}, lambda x: x.amin(-1), {"axes": [-1]}, exact=True),
    "reduce_prod": Case("reduce_prod", {"x": X}, lambda x: x.prod(1), {"axes": [1]}),
    "reduce_sum_square": Case("reduce_sum_square", {"x": X}, lambda x: x.square().sum(1), {"axes": [1]}),
    "reduce_l1_norm": Case("reduce_l1_norm", {"x": X}, lambda x: x.abs().sum(2), {"axes": [2]}),
    "reduce_l2_norm": Case("reduce_l2_norm", {"x": X}, lambda x: x.norm(dim=2), {"axes": [2]}),
    "reduce_log_sum": Case("reduce_log_sum", {"x": POSITIVE}, lambda x: x.sum(2).log(), {"axes": [2]}),
    "reduce_log_sum_exp": Case("reduce_log_sum_exp", {"x": X}, lambda x: x.logsumexp(1), {"axes": [1]}),
    "reduce_log_sum_exp-keep": Case("reduce_log_sum_exp", {"x": X}, lambda x: x.logsumexp(1, True), {"axes": [1], "keep_dims": True}),
    "reduce_argmax": Case("reduce_argmax", {"x": X}, lambda x: x.argmax(1), {"axis": 1}),
    "reduce_argmin": Case("reduce_argmin", {"x": X}, lambda x: x.argmin(-1, True), {"axis": -1, "keep_dims": True}),
    "cumsum": Case("cumsum", {"x": X}, lambda x: x.cumsum(1), {"axis": 1}),
    "cumsum-reverse": Case("cumsum", {"x": X}, lambda x: x.flip(2).cumsum(2).flip(2), {"axis": 2, "reverse": True}),
    # coremltools' folding calls np.zeros with an array as its type.
    "cumsum-exclusive": Case("cumsum", {"x": X}, lambda x: x.cumsum(2) - x, {"axis": 2, "exclusive": True}, folds=False),
    "softmax": Case("softmax", {"x": X * 8}, lambda x: x.softmax(1), {"axis": 1}),
    "layer_norm": Case(
        "layer_norm",
        {"x": X},
        lambda x: functional.layer_norm(x, (3, 5), torch.from_numpy(POSITIVE[0]), torch.from_numpy(X[0]), 0.0625),
        {"axes": [1, 2], "gamma": POSITIVE[0], "beta": X[0], "epsilon": 0.0625},
    ),
    "layer_norm-middle": Case(
        "layer_norm",
        {"x": X},
        lambda x: functional.layer_norm(x.mT, (3,), torch.from_numpy(POSITIVE[0, :, 0]), None, 0.0625).mT,
        {"axes": [1], "gamma": POSITIVE[0, :, 0], "epsilon": 0.0625},
    ),
    "l2_norm": Case("l2_norm", {"x": WIDE}, lambda x: x / (x.square().sum((1, 2, 3), True) + 0.0625).sqrt(), {"epsilon": 0.0625}),
    "attention": Case("scaled_dot_product_attention", {"query": QUERY, "key": KEY, "value": VALUE}, _softmax_attention),
    "attention-mask": Case(
        "scaled_dot_product_attention", {"query": QUERY, "key": KEY, "value": VALUE, "attn_mask": MASK}, _softmax_attention
    ),
    "attention-bool": Case(
        "scaled_dot_product_attention", {"query": QUERY, "key": KEY, "value": VALUE, "attn_mask": MASK == 0}, _softmax_attention
    ),
    "linear": Case(
        "linear",
        {"x": X},
        lambda x: functional.linear(x, torch.from_numpy(WIDE[0, 0]), torch.from_numpy(WIDE[0, 0, :, 0])),
        {"weight": WIDE[0, 0], "bias": WIDE[0, 0, :, 0]},
    ),
    "matmul": Case("matmul", {"x": X, "y": Y.repeat(4, 1)}, lambda x, y: x @ y.mT, {"transpose_y": True}),
    "matmul-transposed": Case("matmul", {"x": WIDE, "y": WIDE[:, :1]}, lambda x, y: x.mT @ y, {"transpose_x": True}),
    "einsum": Case(
        "einsum",
        {"values": (WIDE, _random(1, 5, 4, 6))},
        lambda x, y: torch.einsum("nchw,nwhu->nchu", x, y.expand(2, 5, 4, 6)),
        {"equation": "abcd,adce->abce"},
    ),
    "einsum-3": Case(
        "einsum",
        {"values": (X, _random(5, 3, 4))},
        lambda x, y: torch.einsum("chw,whr->chr", x, y),
        {"equation": "chw,whr->chr"},
    ),
    "conv-1x1": Case(
        "conv",
        {"x": IMAGE, "weight": _random(6, 4, 1, 1)},
        functional.conv2d,
        folds=False,
    ),
    "conv": Case(
        "conv",
        {"x": IMAGE, "weight": _random(6, 2, 2, 3)},
        lambda x, w: functional.conv2d(
            functional.pad(x, (2, 1, 0, 1)), w, torch.from_numpy(X[0, 0, [0, 1, 2, 3, 4, 0]]), (2, 1), groups=2
        ),
        {"strides": [2, 1], "pad_type": "custom", "pad": [0, 1, 2, 1], "groups": 2, "bias": X[0, 0, [0, 1, 2, 3, 4, 0]]},
        folds=False,
    ),
    "conv-dilated": Case(
        "conv",
        {"x": IMAGE},
        lambda x: functional.conv2d(x, torch.from_numpy(IMAGE[:, :, :2, :2]), dilation=(1, 3)),
        {"weight": IMAGE[:, :, :2, :2], "dilations": [1, 3]},
        folds=False,
    ),
    "conv-same": Case(
        "conv",
        {"x": X, "weight": _random(4, 3, 2)},
        lambda x, w: functional.conv1d(_pad_same(x, False), w, stride=2),
        {"strides": [2], "pad_type": "same"},
        folds=False,
    ),
    "conv-same-lower": Case(
        "conv",
        {"x": X, "weight": _random(4, 3, 2)},
        lambda x, w: functional.conv1d(_pad_same(x, True), w, stride=2),
        {"strides": [2], "pad_type": "same_lower"},
        folds=False,
    ),
    "shape": Case("shape", {"x": X}, lambda x: torch.tensor(x.shape)),
    "reshape": Case("reshape", {"x": X}, lambda x: x.reshape(3, 10), {"shape": [3, -1]}, exact=True),
    "reshape-zeros": Case("reshape", {"x": X}, lambda x: x[None], {"shape": [0, 0, -1, 0]}, exact=True),
    "transpose": Case("transpose", {"x": X}, lambda x: x.permute(2, 0, 1), {"perm": [2, 0, -2]}, exact=True),
    "expand_dims": Case("expand_dims", {"x": X}, lambda x: x[:, None, :, :, None], {"axes": [1, -1]}, exact=True),
    "squeeze": Case("squeeze", {"x": Y}, lambda x: x[:, 0], {"axes": [1]}, exact=True),
    "reverse": Case("reverse", {"x": X}, lambda x: x.flip(0, 2), {"axes": [0, -1]}, exact=True),
    "concat": Case("concat", {"values": (X, Y, X)}, lambda x, y, z: torch.cat([x, y, z], 1), {"axis": 1}, exact=True),
    # coremltools' folding forgets to interleave.
    "concat-interleave": Case(
        "concat",
        {"values": (X, POSITIVE)},
        lambda x, y: torch.stack([x, y], 2).reshape(2, 6, 5),
        {"axis": -2, "interleave": True},
        folds=False,
        exact=True,
    ),
    "stack": Case("stack", {"values": (X, POSITIVE)}, lambda x, y: torch.stack([x, y], 1), {"axis": 1}, exact=True),
    "split": Case("split", {"x": X}, lambda x: x.split([1, 4], 2), {"split_sizes": [1, 4], "axis": 2}, exact=True),
    "split-even": Case("split", {"x": X}, lambda x: x.split(1, 1), {"num_splits": 3, "axis": -2}, exact=True),
    "tile": Case("tile", {"x": X}, lambda x: x.tile(1, 3, 2), {"reps": [1, 3, 2]}, exact=True),
    "pad": Case("pad", {"x": X}, lambda x: functional.pad(x, (1, 2, 3, 0), value=1.5), {"pad": [3, 0, 1, 2], "constant_val": 1.5}, exact=True),
    "pad-reflect": Case("pad", {"x": X}, lambda x: functional.pad(x, (1, 2), "reflect"), {"pad": [0, 0, 1, 2], "mode": "reflect"}, exact=True),
    "pad-replicate": Case("pad", {"x": X}, lambda x: functional.pad(x, (1, 2), "replicate"), {"pad": [1, 2], "mode": "replicate"}, exact=True),
    "sliding_windows": Case(
        "sliding_windows", {"x": X}, lambda x: x.unfold(2, 2, 3), {"axis": 2, "size": 2, "stride": 3}, folds=False, exact=True
    ),
    "slice_by_index": Case(
        "slice_by_index",
        {"x": WIDE},
        lambda x: x[1, 1:, :-1, 0:5:2],
        {
            "begin": [1, 1, 2, 0],
            "end": [0, 0, -1, 5],
            "stride": [1, 1, 1, 2],
            "begin_mask": [False, False, True, False],
            "end_mask": [False, True, False, False],
            "squeeze_mask": [True, False, False, False],
        },
        exact=True,
    ),
    "slice_by_index-back": Case(
        "slice_by_index", {"x": X}, lambda x: x.flip(2)[:, :1, 1:3], {"begin": [0, 0, -2], "end": [2, 1, 1], "stride": [1, 1, -1]}, exact=True
    ),
    "slice_update": Case(
        "slice_update",
        {"x": X, "update": Y[:, 0]},
        lambda x, update: torch.cat([x[:, :2], update[:, None]], 1),
        {"begin": [0, 2, 0], "end": [2, 0, 0], "squeeze_mask": [False, True, False], "end_mask": [False, False, True]},
        exact=True,
    ),
    "slice_by_size": Case("slice_by_size", {"x": X}, lambda x: x[1:2, :, 3:5], {"begin": [1, 0, -2], "size": [1, -1, 2]}, exact=True),
    "fill": Case("fill", {}, lambda: torch.full((2, 3), 1.5), {"shape": [2, 3], "value": 1.5}, exact=True),
    "fill_like": Case("fill_like", {"ref_tensor": X}, lambda x: torch.full((2, 3, 5), 1.5), {"value": 1.5}, exact=True),
    "range_1d": Case("range_1d", {}, lambda: torch.arange(3, 19, 4), {"start": 3, "end": 19, "step": 4}),
    "one_hot": Case(
        "one_hot",
        {"indices": PLACES},
        lambda at: functional.one_hot(at.long(), 6).permute(0, 2, 1) * 3 - 1,
        {"one_hot_vector_size": 6, "axis": 1, "on_value": 2, "off_value": -1},
        folds=False,
    ),
    "band_part": Case("band_part", {"x": WIDE}, lambda x: x.triu(-1).tril(2), {"lower": 1, "upper": 2}, exact=True),
    "band_part-all": Case("band_part", {"x": WIDE}, lambda x: x.tril(0), {"lower": -1, "upper": 0}, exact=True),
    "non_zero": Case("non_zero", {"x": INTS}, torch.nonzero),
    "argsort": Case("argsort", {"x": X}, lambda x: x.argsort(1, True), {"axis": 1}),
    "argsort-ascending": Case("argsort", {"x": X}, lambda x: x.argsort(-1), {"axis": -1, "ascending": True}),
    "topk": Case("topk", {"x": X}, lambda x: x.topk(2, 1), {"k": 2, "axis": 1}, exact=True),
    "topk-ascending": Case("topk", {"x": X}, lambda x: x.topk(3, 2, False)[:1], {"k": 3, "ascending": True, "return_indices": False}, exact=True),
    "gather": Case("gather", {"x": X, "indices": PLACES}, lambda x, at: x[:, :, at], {"axis": -1}, exact=True),
    "gather-batch": Case(
        "gather",
        {"x": X, "indices": PLACES},
        lambda x, at: torch.stack([x[0][:, at[0]], x[1][:, at[1]]]),
        {"axis": 2, "batch_dims": 1},
        exact=True,
    ),
    "gather_along_axis": Case(
        "gather_along_axis",
        {"x": X, "indices": np.abs(INTS[:, :, :4]) % 5},
        lambda x, at: x.gather(2, at.long()),
        {"axis": 2},
        exact=True,
    ),
    "gather_nd": Case("gather_nd", {"x": X, "indices": PLACES % 2}, lambda x, at: x[at[:, 0], at[:, 1]], folds=False, exact=True),
    "gather_nd-batch": Case(
        "gather_nd",
        {"x": X, "indices": np.array([[[2]], [[1]]], np.int32)},
        lambda x, at: torch.stack([x[0, [2]], x[1, [1]]]),
        {"batch_dims": 1},
        folds=False,
        exact=True,
    ),
    **{
        f"scatter-{mode}": Case(
            "scatter",
            {"data": X, "indices": np.array([2, 0, 2], np.int32), "updates": POSITIVE},
            lambda data, at, updates, combine=combine: _scattered(data, at, updates, combine),
            {"axis": 1, "mode": mode},
            folds=False,
            exact=mode in ("max", "min", "update"),
        )
        for mode, combine in {
            "add": torch.add,
            "div": torch.div,
            "max": torch.maximum,
            "min": torch.minimum,
            "mul": torch.mul,
            "sub": torch.sub,
            "update": lambda _, new: new,
        }.items()
    },
    # coremltools' folding sets where it is told to add.
    "scatter_along_axis": Case(
        "scatter_along_axis",
        {"data": X, "indices": np.abs(INTS[:, :, :4]) % 5, "updates": POSITIVE[:, :, :4]},
        lambda data, at, updates: data.scatter_add(2, at.long(), updates),
        {"axis": 2, "mode": "add"},
        folds=False,
    ),
    "scatter_nd": Case(
        "scatter_nd",
        {"data": X, "indices": np.array([[1, 2], [0, 0]], np.int32), "updates": POSITIVE[0, :2]},
        lambda data, at, updates: data.index_put((at[:, 0], at[:, 1]), updates, True),
        {"mode": "add"},
        folds=False,
    ),
    "quantize": Case(
        "quantize",
        {"input": X},
        lambda x: (
            torch.round(x / torch.tensor([0.25, 0.5, 0.125])[:, None]) + torch.tensor([3, -2, 1])[:, None]
        ).clip(-128, 127),
        {"scale": np.array([0.25, 0.5, 0.125]), "zero_point": np.array([3, -2, 1], np.int8), "axis": 1, "output_dtype": "int8"},
    ),
    "dequantize": Case(
        "dequantize",
        {"input": INTS.astype(np.int8)},
        lambda codes: (codes - torch.tensor([3, -2, 1])[:, None]) * torch.tensor([0.25, 0.5, 0.125])[:, None],
        {"scale": np.array([0.25, 0.5, 0.125]), "zero_point": np.array([3, -2, 1], np.int8), "axis": 1},
        folds=False,
        exact=True,
    ),
}  # fmt: skip
COMPUTED = {
    name: case for name, case in CASES.items() if not case.exact and name not in ("cast-int32", "cast-int8")
}


def _as(dtype: str, value: Any) -> Any:
    """Floats in the type that the program has."""
    kind = np.float16 if dtype == "fp16" else np.float32
    if isinstance(value, tuple):
        return tuple(_as(dtype, each) for each in value)
    if isinstance(value, float):
        return kind(value)
    return value.astype(kind) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value


def _built(save: Save, case: Case, dtype: str, widen: bool = False) -> tuple[Path, dict[str, Any], list[Any]]:
    """A package with the case alone, the function's inputs, and what torch is given; bools and bytes come and go as integers."""
    from coremltools.converters.mil import Builder as mb  # noqa: N813
    from coremltools.converters.mil.mil import types

    taken: dict[str, Any] = {}
    for parameter, value in case.takes.items():
        several = value if isinstance(value, tuple) else (value,)
        taken |= {f"{parameter}_{index}": _as(dtype, each) for index, each in enumerate(several)}
    kinds = {"f": types.fp16 if dtype == "fp16" else types.fp32, "i": types.int32, "b": types.int32}
    inputs = {
        name: value if value.dtype.kind == "f" else value.astype(np.int32) for name, value in taken.items()
    }

    def body(*placeholders: Any) -> Any:
        given = {}
        for name, placeholder in zip(
            taken, placeholders, strict=False
        ):  # a function without inputs has an idle one
            kind = taken[name].dtype
            given[name] = (
                mb.cast(x=placeholder, dtype=kind.name) if kind.name in ("bool", "int8") else placeholder
            )
        arguments = {
            parameter: tuple(given[f"{parameter}_{index}"] for index in range(len(value)))
            if isinstance(value, tuple)
            else given[f"{parameter}_0"]
            for parameter, value in case.takes.items()
        }
        fixed = {parameter: _as(dtype, value) for parameter, value in case.fixed.items()}
        found = getattr(mb, case.op)(**arguments, **fixed)
        found = found if isinstance(found, (tuple, list)) else [found]
        outputs = []
        for index, each in enumerate(found):
            if each.dtype in (types.bool, types.int8):
                each = mb.cast(x=each, dtype="int32")
            elif widen and each.dtype == types.fp16:
                each = mb.cast(x=each, dtype="fp32")
            outputs.append(mb.identity(x=each, name=f"out_{index}"))
        return tuple(outputs)

    specs = {name: mb.TensorSpec(value.shape, kinds[value.dtype.kind]) for name, value in taken.items()}
    path = save(body, specs or {"idle": mb.TensorSpec((1,), types.fp32)})
    wide = [each.astype(np.float64) if each.dtype.kind == "f" else each for each in taken.values()]
    given = [torch.from_numpy(np.ascontiguousarray(each)) for each in wide]
    return path, inputs or {"idle": np.zeros(1, np.float32)}, given


def _said(case: Case, given: list[Any]) -> list[np.ndarray[Any, Any]]:
    found = case.says(*given)
    return [np.asarray(each) for each in (found if isinstance(found, (tuple, list)) else (found,))]


def test_every_operation_has_a_case() -> None:
    assert {case.op for case in CASES.values()} == set(OPS)


@pytest.mark.parametrize("name", CASES)
def test_float64_is_what_torch_says(save: Save, name: str) -> None:
    path, inputs, given = _built(save, CASES[name], "fp32")
    found = mil.Machine(mil.load(path), "float64").run(None, inputs)
    expected = _said(CASES[name], given)
    assert len(found) == len(expected)
    for index, each in enumerate(expected):
        # Both are float64: some tens of operations of 2**-53 each.
        np.testing.assert_allclose(found[f"out_{index}"], each, rtol=1e-14, atol=1e-14)
        assert found[f"out_{index}"].shape == each.shape


@pytest.mark.parametrize("name", CASES)
def test_coremltools_folds_it_to_the_same(save: Save, name: str) -> None:
    """What the Builder makes of the operation when all its inputs are constants; every operation that it folds is compared."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb  # noqa: N813

    case = CASES[name]
    folded: list[Any] = []

    def body(idle: Any) -> Any:
        arguments = {
            parameter: _as("fp32", value) for parameter, value in {**case.takes, **case.fixed}.items()
        }
        try:
            found = getattr(mb, case.op)(**arguments)
        except TypeError:
            if case.folds:
                raise
            return idle
        folded.extend(each.val for each in (found if isinstance(found, (tuple, list)) else [found]))
        return idle

    mb.program(input_specs=[mb.TensorSpec((1,))], opset_version=ct.target.iOS18)(body)
    path, inputs, _ = _built(save, case, "fp32")
    found = mil.Machine(mil.load(path), "float64").run(None, inputs)
    same = bool(folded) and all(
        each is not None
        and np.allclose(found[f"out_{index}"], each, rtol=1e-5, atol=1e-5)  # it folds in float32
        for index, each in enumerate(folded)
    )
    assert same == case.folds


@pytest.mark.parametrize("name", COMPUTED)
def test_float16_is_rounded_once_after_each_operation(save: Save, name: str) -> None:
    """The next operation reads what a float16 holds, and that is the float64 result rounded, to one step of float16."""
    case = CASES[name]
    path, inputs, given = _built(save, case, "fp16", widen=True)
    found = mil.Machine(mil.load(path), "float16").run(None, inputs)
    for index, each in enumerate(_said(case, given)):
        value = found[f"out_{index}"]
        if value.dtype.kind != "f" or name == "cast-fp32":
            np.testing.assert_array_equal(value, each)
            continue
        assert value.dtype == np.float32
        np.testing.assert_array_equal(
            value, value.astype(np.float16), "a value that no float16 holds came through"
        )
        # Half a step of float16, and float32's own error, some operations of 2**-24 of the largest value each.
        step = np.spacing(np.abs(each).astype(np.float16)).astype(np.float64)
        assert np.all(np.abs(value - each) <= step / 2 + 2.0**-21 * np.abs(each).max())
        assert np.any(value != each.astype(np.float32)), "the case does not show a rounding"


def test_kernels_take_their_parameters_by_the_names_that_coremltools_has() -> None:
    import coremltools as ct
    from coremltools.converters.mil.mil.ops.registry import SSAOpRegistry

    for op, kernel in OPS.items():
        known = _newest(SSAOpRegistry.core_ops[op], ct.target.iOS18)
        assert set(inspect.signature(kernel).parameters) == set(known.input_spec.input_types), op


def _newest(versions: dict[Any, Any], target: Any) -> Any:
    return versions[max((each for each in versions if each <= target), key=lambda each: each.value)]
