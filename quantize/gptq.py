"""GPTQ: columns are rounded one after the other, and each one's error is made good by those that follow.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers" (arXiv:2210.17323),
algorithm 1, with the columns in order of falling diagonal and the grids fixed beforehand (act-order with static groups).

The paper takes the Cholesky factor of the inverse Hessian. With H = R Rᵀ, R upper triangular (a Cholesky factorization from
the last column to the first), H⁻¹ = (R⁻¹)ᵀ R⁻¹: that factor is R⁻¹, and H is never inverted.

Everything is cut into tiles of a fixed size, each computed on one core, so that the codes do not depend on how many there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tapeout.quantize import kernels, lattice
from tapeout.quantize.lattice import Floats, Grid
from tapeout.quantize.scheme import Scheme

if TYPE_CHECKING:
    import torch

_TILE = 512  # of a factorization
_ROWS = 128  # of a weight that one task rounds
_BLOCK = 64  # columns between two updates of all that follow
DAMPINGS = (0.01, 0.1, 1.0)  # shares of the mean diagonal


class NotPositiveDefinite(ValueError):
    """The Hessian has no factor under any damping."""


@dataclass(frozen=True)
class Factor:
    """A Hessian made ready for rounding.

    Attributes:
        order: the column that is rounded k-th, [in].
        upper: R⁻¹ in that order, float32 [in, in], upper triangular.
        importance: of each column, what an error there costs after all that follow have made it good: float32 [in].
        damping: share of the mean diagonal that was added to the diagonal.
        dead: columns that no data reached.
    """

    order: npt.NDArray[np.intp]
    upper: torch.Tensor
    importance: Floats
    damping: float
    dead: int


def factorize(hessian: torch.Tensor, pool: Executor) -> Factor:
    """Order, damp and factorize ``Σ x xᵀ``, float32 [in, in] (upper triangle), which is destroyed.

    Raises:
        NotPositiveDefinite: with a damping of the whole mean diagonal still.
    """
    import torch

    diagonal = hessian.diagonal().double()
    dead = int((diagonal <= 0).sum())
    mean = float(diagonal.mean()) or 1.0
    if not np.isfinite(mean):
        raise NotPositiveDefinite("it holds NaN or infinity")
    order = torch.argsort(diagonal, descending=True, stable=True)
    full = hessian.triu() + hessian.triu(1).T
    ordered = full[order][:, order]
    del full
    for damping in DAMPINGS:
        damped = ordered.clone()
        damped.diagonal().add_(damping * mean)
        try:
            upper = _inverse_factor(damped, pool)
        except torch.linalg.LinAlgError:
            continue
        if not bool(torch.isfinite(upper).all()):
            continue
        importance = np.empty(len(order), np.float32)
        importance[order.numpy()] = (upper.diagonal().double() ** -2).float().numpy()
        return Factor(order.numpy(), upper, importance, damping, dead)
    raise NotPositiveDefinite(f"under a damping of {DAMPINGS[-1]:.0%} of its mean diagonal still")


def round_gptq(
    weight: Floats, scheme: Scheme, factor: Factor, grid: Grid, pool: Executor
) -> npt.NDArray[np.uint8]:
    """Codes of a weight [out, in] under a grid, uint8 [out, in]."""
    out, into = weight.shape
    codes = np.empty((out, into), np.uint8)

    def rows(first: int) -> None:
        chosen = slice(first, min(out, first + _ROWS))
        codes[chosen] = _round_rows(weight[chosen], scheme, factor, grid.rows(chosen))

    list(pool.map(rows, range(0, out, _ROWS)))
    return codes


def _round_rows(weight: Floats, scheme: Scheme, factor: Factor, grid: Grid) -> npt.NDArray[np.uint8]:
    import torch

    rows, into = weight.shape
    left = torch.from_numpy(np.ascontiguousarray(weight[:, factor.order]))
    group = (factor.order // (scheme.group or into)).astype(np.int64)
    values = kernels.Lattice(*lattice.searched(scheme, grid))
    codes = np.empty((rows, into), np.uint8)
    error = torch.empty((rows, _BLOCK), dtype=torch.float32)
    for first in range(0, into, _BLOCK):
        last = min(first + _BLOCK, into)
        width = last - first
        block = left[:, first:last].contiguous()
        found = np.empty((rows, width), np.uint8)
        corner = factor.upper[first:last, first:last].contiguous()
        kernels.round_block(block.numpy(), corner.numpy(), group[first:last], *values, found, error.numpy())
        codes[:, first:last] = found
        if last < into:
            left[:, last:].addmm_(error[:, :width], factor.upper[first:last, last:], alpha=-1)
    unordered = np.empty_like(codes)
    unordered[:, factor.order] = codes
    return unordered


def _inverse_factor(h: torch.Tensor, pool: Executor) -> torch.Tensor:
    """R⁻¹ of h = R Rᵀ, both upper triangular [n, n]; h is destroyed. Right-looking, by tiles from the last to the first."""
    import torch

    n = len(h)
    tiles = [slice(at, min(at + _TILE, n)) for at in range(0, n, _TILE)]
    identity = [torch.eye(t.stop - t.start) for t in tiles]
    for k in range(len(tiles) - 1, -1, -1):
        here = tiles[k]
        corner = h[here, here]
        # A Cholesky factor from the last column to the first: of the reversed tile, reversed.
        root = torch.linalg.cholesky(corner.flip(0, 1)).flip(0, 1)
        h[here, here] = root

        def solve(above: slice, here: slice = here, root: torch.Tensor = root) -> None:
            # h[above, here] = X Rᵀ
            h[above, here] = torch.linalg.solve_triangular(root.T, h[above, here], upper=False, left=False)

        list(pool.map(solve, tiles[:k]))

        def update(pair: tuple[slice, slice], here: slice = here) -> None:
            i, j = pair
            h[i, j] -= h[i, here] @ h[j, here].T

        list(pool.map(update, ((tiles[i], tiles[j]) for i, j in _upper(k))))
    # R⁻¹ by columns of tiles: X[i, j] = -R[i, i]⁻¹ Σ R[i, m] X[m, j], i < m ≤ j.
    inverse = torch.zeros_like(h)

    def column(j: int) -> None:
        there = tiles[j]
        inverse[there, there] = torch.linalg.solve_triangular(h[there, there], identity[j], upper=True)
        for i in range(j - 1, -1, -1):
            between = slice(tiles[i].stop, there.stop)
            sums = h[tiles[i], between] @ inverse[between, there]
            inverse[tiles[i], there] = -torch.linalg.solve_triangular(h[tiles[i], tiles[i]], sums, upper=True)

    list(pool.map(column, range(len(tiles) - 1, -1, -1)))
    return inverse


def _upper(k: int) -> Iterator[tuple[int, int]]:
    return ((i, j) for i in range(k) for j in range(i, k))
