"""MIL's operations in numpy, by their names and with their parameters, as coremltools defines them for iOS 17 and 18.

A kernel computes in the precision of the floats that it is given and knows nothing of rounding: the machine rounds its result, once.
What one operation does inside (the sum of a matmul, the mean of a layer_norm, the scores of an attention) is therefore held in
that precision too, as hardware with wide accumulators does; a device that accumulates in float16 is worse than this.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from tapeout.validate.mil.registry import Registry

__all__ = ["MOVES", "OPS", "TUPLES"]

Array = npt.NDArray[Any]

OPS = Registry()
_op = OPS.add
TUPLES = frozenset({"values", "ref_tensors", "begins", "ends", "end_masks"})  # parameters of several values
MOVES = frozenset(
    {
        "concat",
        "expand_dims",
        "gather",
        "gather_along_axis",
        "gather_nd",
        "identity",
        "reshape",
        "reverse",
        "select",
        "slice_by_index",
        "slice_by_size",
        "slice_update",
        "sliding_windows",
        "split",
        "squeeze",
        "stack",
        "tile",
        "transpose",
    }
)
"""What gives only numbers that it was given."""


# Element by element


def _unary(name: str, function: Callable[..., Any]) -> None:
    @_op(name)
    def kernel(x: Array) -> Any:
        return function(x)


def _binary(name: str, function: Callable[..., Any]) -> None:
    @_op(name)
    def kernel(x: Array, y: Array) -> Any:
        return function(x, y)


def _sigmoid(x: Array) -> Any:
    return 1 / (1 + np.exp(-x))


def _erf(x: Array) -> Array:
    """Of each element: numpy has none."""
    return np.asarray(np.frompyfunc(math.erf, 1, 1)(x), x.dtype)


def _erfc(x: Array) -> Array:
    """``1 - erf(x)``, which keeps its digits where that has none."""
    return np.asarray(np.frompyfunc(math.erfc, 1, 1)(x), x.dtype)


_UNARY: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "acos": np.arccos,
    "asin": np.arcsin,
    "atan": np.arctan,
    "atanh": np.arctanh,
    "ceil": np.ceil,
    "cos": np.cos,
    "cosh": np.cosh,
    "erf": _erf,
    "exp": np.exp,
    "exp2": np.exp2,
    "floor": np.floor,
    "identity": lambda x: x,
    "logical_not": np.logical_not,
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "round": np.round,  # halves to even
    "sigmoid": _sigmoid,
    "sign": np.sign,
    "silu": lambda x: x * _sigmoid(x),
    "sin": np.sin,
    "sinh": np.sinh,
    "softplus": lambda x: np.logaddexp(0, x).astype(x.dtype),
    "softsign": lambda x: x / (1 + np.abs(x)),
    "sqrt": np.sqrt,
    "square": np.square,
    "tan": np.tan,
    "tanh": np.tanh,
}
for _name, _function in _UNARY.items():
    _unary(_name, _function)

_BINARY: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "equal": np.equal,
    "floor_div": np.floor_divide,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    "logical_xor": np.logical_xor,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "mod": np.mod,  # of the divisor's sign
    "mul": np.multiply,
    "not_equal": np.not_equal,
    "pow": np.power,
    "sub": np.subtract,
}
for _name, _function in _BINARY.items():
    _binary(_name, _function)


@_op("real_div")
def _real_div(x: Array, y: Array) -> Any:
    if x.dtype.kind != "f" or y.dtype.kind != "f":
        raise ValueError(
            "divides integers, of which no document says what comes out; cast them, or use floor_div"
        )
    return x / y


@_op("log")
def _log(x: Array, epsilon: Any = 1e-45) -> Any:
    return np.log(x + epsilon)


@_op("rsqrt")
def _rsqrt(x: Array, epsilon: Any = 1e-12) -> Any:
    return 1 / np.sqrt(x + epsilon)


@_op("inverse")
def _inverse(x: Array, epsilon: Any = 1e-4) -> Any:
    return 1 / (x + epsilon)


@_op("clip")
def _clip(x: Array, alpha: Array, beta: Array) -> Any:
    return np.minimum(np.maximum(x, alpha), beta)


@_op("threshold")
def _threshold(x: Array, alpha: Array) -> Any:
    return np.maximum(x, alpha)


@_op("leaky_relu")
def _leaky_relu(x: Array, alpha: Array) -> Any:
    return np.where(x < 0, alpha * x, x)


@_op("elu")
def _elu(x: Array, alpha: Array) -> Any:
    return np.where(x < 0, alpha * np.expm1(x), x)


@_op("gelu")
def _gelu(x: Array, mode: str = "EXACT") -> Any:
    if mode == "EXACT":
        return 0.5 * x * _erfc(x * -(0.5**0.5))
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + np.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
    if mode == "SIGMOID_APPROXIMATION":
        return x * _sigmoid(1.702 * x)
    raise ValueError(f"mode '{mode}'; known: EXACT, TANH_APPROXIMATION, SIGMOID_APPROXIMATION")


@_op("cast")
def _cast(x: Array, dtype: str) -> Any:
    """To ``dtype``; of floats the machine makes what their type says."""
    if dtype in ("fp16", "fp32"):
        return x if x.dtype.kind == "f" else x.astype(np.float64)
    if dtype == "bool":
        return x != 0
    if dtype not in ("int8", "uint8", "int16", "uint16", "int32"):
        raise ValueError(f"casts to {dtype}; known: fp16, fp32, bool and integers of 8 … 32 bits")
    return x.astype(dtype)  # towards zero


@_op("select")
def _select(cond: Array, a: Array, b: Array) -> Array:
    return np.where(cond, a, b)


# Reductions


def _axes(axes: Array | None) -> tuple[int, ...] | None:
    return None if axes is None else tuple(int(axis) for axis in np.atleast_1d(axes))


def _log_sum_exp(x: Array, axis: Any, keepdims: bool) -> Any:
    most = np.max(x, axis=axis, keepdims=True)
    found = np.log(np.sum(np.exp(x - most), axis=axis, keepdims=True)) + most
    return found if keepdims else np.squeeze(found, axis)


def _reduction(name: str, function: Callable[..., Any]) -> None:
    @_op(name)
    def kernel(x: Array, axes: Array | None = None, keep_dims: Any = False) -> Any:
        return function(x, axis=_axes(axes), keepdims=bool(keep_dims))


_REDUCTIONS: dict[str, Callable[..., Any]] = {
    "reduce_l1_norm": lambda x, **of: np.sum(np.abs(x), **of),
    "reduce_l2_norm": lambda x, **of: np.sqrt(np.sum(np.square(x), **of)),
    "reduce_log_sum": lambda x, **of: np.log(np.sum(x, **of)),
    "reduce_log_sum_exp": _log_sum_exp,
    "reduce_max": np.max,
    "reduce_mean": np.mean,
    "reduce_min": np.min,
    "reduce_prod": np.prod,
    "reduce_sum": np.sum,
    "reduce_sum_square": lambda x, **of: np.sum(np.square(x), **of),
}
for _name, _function in _REDUCTIONS.items():
    _reduction(_name, _function)


@_op("reduce_argmax")
def _argmax(x: Array, axis: Any = -1, keep_dims: Any = False, output_dtype: str = "int32") -> Any:
    return np.argmax(x, int(axis), keepdims=bool(keep_dims)).astype(output_dtype)


@_op("reduce_argmin")
def _argmin(x: Array, axis: Any = -1, keep_dims: Any = False, output_dtype: str = "int32") -> Any:
    return np.argmin(x, int(axis), keepdims=bool(keep_dims)).astype(output_dtype)


@_op("cumsum")
def _cumsum(x: Array, axis: Any = 0, exclusive: Any = False, reverse: Any = False) -> Array:
    turned = np.flip(x, int(axis)) if reverse else x
    sums = np.cumsum(turned, int(axis), dtype=x.dtype)
    sums = _shifted(sums, int(axis)) if exclusive else sums
    return np.flip(sums, int(axis)) if reverse else sums


def _shifted(sums: Array, axis: int) -> Array:
    """One along ``axis``, a zero first."""
    first = np.zeros_like(np.take(sums, [0], axis))
    return np.concatenate([first, np.take(sums, range(sums.shape[axis] - 1), axis)], axis)


# Normalization and attention


@_op("softmax")
def _softmax(x: Array, axis: Any = -1) -> Any:
    parts = np.exp(x - np.max(x, int(axis), keepdims=True))
    return parts / np.sum(parts, int(axis), keepdims=True)


@_op("layer_norm")
def _layer_norm(
    x: Array,
    axes: Array | None = None,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: Any = 1e-5,
) -> Any:
    over = tuple(sorted(axis % x.ndim for axis in (_axes(axes) or range(x.ndim))))
    centred = x - np.mean(x, over, keepdims=True)
    normal = centred / np.sqrt(np.mean(np.square(centred), over, keepdims=True) + epsilon)
    shape = [size if axis in over else 1 for axis, size in enumerate(x.shape)]
    scaled = normal if gamma is None else normal * gamma.reshape(shape)
    return scaled if beta is None else scaled + beta.reshape(shape)


@_op("l2_norm")
def _l2_norm(x: Array, epsilon: Any = 1e-6) -> Any:
    return x / np.sqrt(np.sum(np.square(x), (-3, -2, -1), keepdims=True) + epsilon)


@_op("scaled_dot_product_attention")
def _attention(query: Array, key: Array, value: Array, attn_mask: Array | None = None) -> Any:
    if query.shape[:-2] != key.shape[:-2] or key.shape[:-1] != value.shape[:-1]:
        raise ValueError(
            f"query {query.shape}, key {key.shape} and value {value.shape} differ in batch, heads or length"
        )
    scores = np.matmul(query, np.swapaxes(key, -1, -2)) / np.asarray(query.shape[-1] ** 0.5, query.dtype)
    if attn_mask is not None:
        scores = scores + attn_mask if attn_mask.dtype.kind == "f" else np.where(attn_mask, scores, -np.inf)
    return np.matmul(_softmax(scores), value)


# Products


@_op("linear")
def _linear(x: Array, weight: Array, bias: Array | None = None) -> Any:
    product = (x.reshape(-1, x.shape[-1]) @ weight.T).reshape(*x.shape[:-1], len(weight))
    return product if bias is None else product + bias


@_op("matmul")
def _matmul(x: Array, y: Array, transpose_x: Any = False, transpose_y: Any = False) -> Any:
    return np.matmul(
        np.swapaxes(x, -1, -2) if transpose_x else x, np.swapaxes(y, -1, -2) if transpose_y else y
    )


@_op("einsum")
def _einsum(values: Sequence[Array], equation: str) -> Any:
    """The two equations that MIL has, ``nchw,nwhu->nchu`` and ``chw,whr->chr`` in any letters; axes of 1 broadcast."""
    if _numbered(equation) not in ("0123,0324->0124", "012,213->013"):
        raise ValueError(f"equation '{equation}'; known: nchw,nwhu->nchu and chw,whr->chr")
    first, second = (np.swapaxes(each, -3, -2) for each in values)  # [(n,) h, c, w], [(n,) h, w, u]
    return np.swapaxes(np.matmul(first, second), -3, -2)


def _numbered(equation: str) -> str:
    """Letters in the order in which they come, as digits."""
    letters = [each for each in dict.fromkeys(equation) if each.isalpha()]
    return "".join(str(letters.index(each)) if each in letters else each for each in equation if each != " ")


@_op("conv")
def _conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    strides: Array | None = None,
    pad_type: str = "valid",
    pad: Array | None = None,
    dilations: Array | None = None,
    groups: Any = 1,
) -> Array:
    """X [n, in, *size], weight [out, in / groups, *kernel] -> [n, out, *size]: one product over all windows."""
    rank, kernel, count = x.ndim - 2, weight.shape[2:], int(groups)
    steps = [1] * rank if strides is None else [int(each) for each in strides]
    apart = [1] * rank if dilations is None else [int(each) for each in dilations]
    spans = [(size - 1) * each + 1 for size, each in zip(kernel, apart, strict=True)]
    x = np.pad(x, [(0, 0), (0, 0), *_padding(pad_type, pad, x.shape[2:], spans, steps)])
    axes = tuple(range(2, 2 + rank))
    windows = np.lib.stride_tricks.sliding_window_view(x, spans, axes)
    whole = [slice(None)] * 2
    windows = windows[(*whole, *(slice(None, None, each) for each in [*steps, *apart]))]
    sizes = windows.shape[2 : 2 + rank]
    columns = np.moveaxis(windows.reshape(len(x), count, -1, *sizes, *kernel), 2, 2 + rank)
    columns = columns.reshape(len(x), count, math.prod(sizes), -1)
    product = np.matmul(columns, np.swapaxes(weight.reshape(count, len(weight) // count, -1), 1, 2))
    found: Array = np.swapaxes(product, 2, 3).reshape(len(x), len(weight), *sizes)
    return found if bias is None else found + bias.reshape(-1, *[1] * rank)


def _padding(
    kind: str, pad: Array | None, sizes: Sequence[int], spans: Sequence[int], steps: Sequence[int]
) -> list[tuple[int, int]]:
    """Before and after each axis; ``same`` gives an odd element to the end, ``same_lower`` to the beginning."""
    if kind == "valid":
        return [(0, 0)] * len(sizes)
    if kind == "custom":
        both = [0] * (2 * len(sizes)) if pad is None else [int(each) for each in pad]
        return list(zip(both[::2], both[1::2], strict=True))
    if kind not in ("same", "same_lower"):
        raise ValueError(f"pad_type '{kind}'; known: valid, custom, same, same_lower")
    needs = [
        max(0, -(-size // step) * step - size + span - step)
        for size, span, step in zip(sizes, spans, steps, strict=True)
    ]
    halves = [(each // 2, each - each // 2) for each in needs]
    return halves if kind == "same" else [(after, before) for before, after in halves]


# Shapes


@_op("shape")
def _shape(x: Array) -> Array:
    return np.array(x.shape, np.int32)


@_op("reshape")
def _reshape(x: Array, shape: Array) -> Array:
    """0: that axis of x, counted from the last, or 1 beyond its rank; -1: what is left."""
    wanted = [int(each) for each in shape]
    for back in range(1, len(wanted) + 1):
        if wanted[-back] == 0:
            wanted[-back] = x.shape[-back] if back <= x.ndim else 1
    return x.reshape(wanted)


@_op("transpose")
def _transpose(x: Array, perm: Array) -> Array:
    return np.transpose(x, [int(axis) for axis in perm])


@_op("expand_dims")
def _expand_dims(x: Array, axes: Array) -> Array:
    return np.expand_dims(x, _axes(axes) or ())


@_op("squeeze")
def _squeeze(x: Array, axes: Array | None = None) -> Array:
    """Axes of another size than 1 stay."""
    of = range(x.ndim) if axes is None else [axis % x.ndim for axis in _axes(axes) or ()]
    return np.squeeze(x, tuple(axis for axis in of if x.shape[axis] == 1))


@_op("reverse")
def _reverse(x: Array, axes: Array | None = None) -> Array:
    return np.flip(x, _axes(axes))


@_op("concat")
def _concat(values: Sequence[Array], axis: Any, interleave: Any = False) -> Array:
    if interleave:
        axis = int(axis) % values[0].ndim
        stacked = np.stack(values, axis + 1)
        return stacked.reshape(*stacked.shape[:axis], -1, *stacked.shape[axis + 2 :])
    return np.concatenate([np.atleast_1d(each) for each in values], int(axis))


@_op("stack")
def _stack(values: Sequence[Array], axis: Any) -> Array:
    return np.stack(values, int(axis))


@_op("split")
def _split(
    x: Array, axis: Any, num_splits: Any = None, split_sizes: Array | None = None
) -> tuple[Array, ...]:
    if split_sizes is None:
        if num_splits is None:
            raise ValueError("lacks num_splits and split_sizes")
        return tuple(np.split(x, int(num_splits), int(axis)))
    ends = np.cumsum(split_sizes)
    if ends[-1] != x.shape[int(axis)]:
        raise ValueError(f"split_sizes {list(split_sizes)} of an axis of {x.shape[int(axis)]}")
    return tuple(np.split(x, ends[:-1], int(axis)))


@_op("tile")
def _tile(x: Array, reps: Array) -> Array:
    return np.tile(x, [int(each) for each in reps])


@_op("pad")
def _pad(x: Array, pad: Array, mode: str = "constant", constant_val: Any = 0.0) -> Array:
    """Before and after each of the last axes."""
    pairs = [(0, 0)] * (x.ndim - len(pad) // 2) + [
        (int(each[0]), int(each[1])) for each in pad.reshape(-1, 2)
    ]
    if mode == "constant":
        return np.pad(x, pairs, constant_values=constant_val)
    if mode == "reflect":
        return np.pad(x, pairs, "reflect")
    if mode == "replicate":
        return np.pad(x, pairs, "edge")
    raise ValueError(f"mode '{mode}'; known: constant, reflect, replicate")


@_op("sliding_windows")
def _sliding_windows(x: Array, axis: Any, size: Any, stride: Any = 1) -> Array:
    axis = int(axis) % x.ndim
    windows = np.lib.stride_tricks.sliding_window_view(x, int(size), axis)
    return np.moveaxis(np.take(windows, range(0, windows.shape[axis], int(stride)), axis), -1, axis + 1)


def _slices(
    x: Array,
    begin: Array,
    end: Array,
    stride: Array | None,
    begin_mask: Array | None,
    end_mask: Array | None,
    squeeze_mask: Array | None,
) -> tuple[slice | int, ...]:
    """Numpy's index: negative bounds count from the end, a masked one is left out, a squeezed axis has one element."""
    found: list[slice | int] = []
    for axis in range(x.ndim):
        first = None if begin_mask is not None and begin_mask[axis] else int(begin[axis])
        last = None if end_mask is not None and end_mask[axis] else int(end[axis])
        step = 1 if stride is None else int(stride[axis])
        squeezed = squeeze_mask is not None and bool(squeeze_mask[axis])
        found.append((first or 0) if squeezed else slice(first, last, step))
    return tuple(found)


@_op("slice_by_index")
def _slice_by_index(
    x: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    return np.asarray(x[_slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)])


@_op("slice_update")
def _slice_update(
    x: Array,
    update: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Array:
    """X with ``update`` in that slice of it, which must have its shape."""
    where = _slices(x, begin, end, stride, begin_mask, end_mask, squeeze_mask)
    if x[where].shape != update.shape:
        raise ValueError(f"an update {list(update.shape)} for a slice {list(x[where].shape)}")
    found = x.copy()
    found[where] = update
    return found


@_op("slice_by_size")
def _slice_by_size(x: Array, begin: Array, size: Array) -> Array:
    """-1: all that is left."""
    firsts = [int(each) % length for each, length in zip(begin, x.shape, strict=True)]
    counts = [int(each) for each in size]
    found = x[
        tuple(slice(first, None if n < 0 else first + n) for first, n in zip(firsts, counts, strict=True))
    ]
    if any(n >= 0 and n != got for n, got in zip(counts, found.shape, strict=True)):
        raise ValueError(f"size {counts} from {firsts} of {list(x.shape)} leaves {list(found.shape)}")
    return found


# Making values


@_op("fill")
def _fill(shape: Array, value: Any = 0.0) -> Array:
    return np.full([int(each) for each in shape], value)


@_op("fill_like")
def _fill_like(ref_tensor: Array, value: Any = 0.0) -> Array:
    return np.full(ref_tensor.shape, value)


@_op("range_1d")
def _range(end: Array, start: Array, step: Array) -> Array:
    return np.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


@_op("one_hot")
def _one_hot(
    indices: Array, one_hot_vector_size: Array, axis: Any = -1, on_value: Any = 1, off_value: Any = 0
) -> Array:
    """An index beyond the size gives no ``on_value``."""
    places = np.arange(int(one_hot_vector_size))
    place = int(axis) % (indices.ndim + 1)
    on = np.expand_dims(indices, place) == places.reshape(
        [-1 if each == place else 1 for each in range(indices.ndim + 1)]
    )
    return np.asarray(np.where(on, on_value, off_value))


@_op("band_part")
def _band_part(x: Array, lower: Any = -1, upper: Any = -1) -> Array:
    below = np.arange(x.shape[-2])[:, None] - np.arange(x.shape[-1])
    keep = ((lower < 0) | (below <= lower)) & ((upper < 0) | (-below <= upper))
    return np.where(keep, x, np.zeros((), x.dtype))


@_op("non_zero")
def _non_zero(x: Array) -> Array:
    return np.argwhere(x).astype(np.int32)


# Sorting


def _sorted(x: Array, axis: int, ascending: bool) -> Array:
    """Indices; equal elements in their order."""
    keys = x if x.dtype.kind == "f" else x.astype(np.int64)
    return np.argsort(keys if ascending else -keys, axis, kind="stable")


@_op("argsort")
def _argsort(x: Array, axis: Any = -1, ascending: Any = False) -> Array:
    return _sorted(x, int(axis), bool(ascending)).astype(np.int32)


@_op("topk")
def _topk(
    x: Array,
    k: Any = 1,
    axis: Any = -1,
    ascending: Any = False,
    sort: Any = True,
    return_indices: Any = True,
    output_indices_dtype: str = "int32",
) -> tuple[Array, ...]:
    """Sorted, whether or not ``sort`` asks for it; k of -1: all."""
    axis = int(axis)
    count = x.shape[axis] if int(k) == -1 else int(k)
    if not 0 < count <= x.shape[axis]:
        raise ValueError(f"k {count} of an axis of {x.shape[axis]}")
    indices = np.take(_sorted(x, axis, bool(ascending)), range(count), axis)
    values = np.take_along_axis(x, indices, axis)
    return (values, indices.astype(output_indices_dtype)) if return_indices else (values,)


# Gathering and scattering. Since iOS 17 a negative index is out of bounds, and what comes of one is undefined: it stops here.


def _within(indices: Array, size: int) -> Array:
    if indices.size and not (indices.min() >= 0 and indices.max() < size):
        raise ValueError(f"indices {indices.min()} … {indices.max()} of an axis of {size}")
    return indices


@_op("gather")
def _gather(
    x: Array, indices: Array, axis: Any = 0, batch_dims: Any = 0, validate_indices: Any = False
) -> Any:
    """The first ``batch_dims`` axes of x and indices go together."""
    axis, shared = int(axis) % x.ndim, int(batch_dims)
    _within(indices, x.shape[axis])
    if not shared:
        return np.take(x, indices, axis)
    batch = x.shape[:shared]
    pairs = zip(x.reshape(-1, *x.shape[shared:]), indices.reshape(-1, *indices.shape[shared:]), strict=True)
    found = np.stack([np.take(one, where, axis - shared) for one, where in pairs])
    return found.reshape(*batch, *found.shape[1:])


@_op("gather_along_axis")
def _gather_along_axis(x: Array, indices: Array, axis: Any = 0, validate_indices: Any = False) -> Array:
    return np.take_along_axis(x, _within(indices, x.shape[int(axis)]).astype(np.intp), int(axis))


@_op("gather_nd")
def _gather_nd(x: Array, indices: Array, batch_dims: Any = 0, validate_indices: Any = False) -> Any:
    shared = int(batch_dims)
    batch = np.indices(indices.shape[:-1], sparse=True)[:shared]
    return x[(*batch, *_coordinates(indices, x.shape[shared:]))]


def _coordinates(indices: Array, shape: Sequence[int]) -> tuple[Array, ...]:
    """Indices [..., k] into the first k axes."""
    return tuple(_within(indices[..., axis], shape[axis]) for axis in range(indices.shape[-1]))


_MODES: dict[str, Any] = {
    "add": np.add,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "sub": np.subtract,
}


def _scattered(data: Array, where: Any, updates: Array, mode: str) -> Array:
    """Updates of the same place come one after another."""
    found = data.copy()
    if mode == "update":
        found[where] = updates
    elif mode in _MODES:
        _MODES[mode].at(found, where, updates)
    else:
        raise ValueError(f"mode '{mode}'; known: update, {', '.join(_MODES)}")
    return found


@_op("scatter")
def _scatter(
    data: Array,
    indices: Array,
    updates: Array,
    axis: Any = 0,
    mode: str = "add",
    validate_indices: Any = False,
) -> Array:
    axis = int(axis) % data.ndim
    where = (*[slice(None)] * axis, _within(indices, data.shape[axis]))
    return _scattered(data, where, updates, mode)


@_op("scatter_along_axis")
def _scatter_along_axis(
    data: Array,
    indices: Array,
    updates: Array,
    axis: Any = 0,
    mode: str = "add",
    validate_indices: Any = False,
) -> Array:
    where: list[Array] = list(np.indices(indices.shape, sparse=True))
    where[int(axis)] = _within(indices, data.shape[int(axis)])
    return _scattered(data, tuple(where), updates, mode)


@_op("scatter_nd")
def _scatter_nd(
    data: Array, indices: Array, updates: Array, mode: str = "add", validate_indices: Any = False
) -> Array:
    return _scattered(data, _coordinates(indices, data.shape), updates, mode)


# Activations in codes


def _held(x: Array, rank: int, axis: Any) -> Array:
    return x if x.ndim == 0 else x.reshape([-1 if each == int(axis) % rank else 1 for each in range(rank)])


@_op("quantize")
def _quantize(
    input: Array,  # noqa: A002 - MIL's name
    scale: Array,
    output_dtype: str,
    zero_point: Array | None = None,
    axis: Any = None,
) -> Array:
    """``clip(round(input / scale) + zero_point)``."""
    codes = np.round(input / _held(scale, input.ndim, axis))
    if zero_point is not None:
        codes = codes + _held(zero_point, input.ndim, axis)
    bounds = np.iinfo(output_dtype)
    return np.clip(codes, bounds.min, bounds.max).astype(output_dtype)


@_op("dequantize")
def _dequantize(
    input: Array,  # noqa: A002 - MIL's name
    scale: Array,
    zero_point: Array | None = None,
    axis: Any = None,
) -> Any:
    """``scale * (input - zero_point)``."""
    codes = input.astype(scale.dtype)
    if zero_point is not None:
        codes = codes - _held(zero_point, input.ndim, axis).astype(scale.dtype)
    return _held(scale, input.ndim, axis) * codes
