"""Winograd: 3×3 convolutions at stride 1 with a quarter of the multiplications.

Along one axis, a tile of outputs is `out @ ((kernel @ k) * (into @ x))` with three constant matrices. Two axes are the
same with both sets of matrices, and the sum over channels turns the `*` into one matrix product per point. The
transforms are sums of shifted copies of the image with constant weights: XLA:CPU makes one loop of each, which needs no
transposition. The points 0, ±3/4, ±3/2, ∞ cost no more here than the usual 0, ±1, ±2, ∞ and err a third as much. Inside
one jit the forward pass and the kernel gradient share the transformed image.

References:
  Lavin & Gray, *Fast Algorithms for Convolutional Neural Networks*, arXiv:1509.09308; Barabasz et al., *Error Analysis
  and Improving the Accuracy of Winograd Convolution*, arXiv:1803.10986, for the choice of points.
"""

from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from repvgg_jax.ops.lowerings.base import Lowering, Shape, Window
from repvgg_jax.ops.materialize import materialize

_POINTS = {2: (0.0, 1.0, -1.0), 4: (0.0, 0.75, -0.75, 1.5, -1.5)}


class _Axis(NamedTuple):
    """How one axis is cut into tiles.

    Attributes:
      into: Transform of the image, (points, rows read per tile).
      kernel: Transform of the kernel, (points, 3).
      out: Transform of the products, (rows made per tile, points).
      tiles: Number of tiles.
      low: Number of zeros before the first row.
    """

    into: np.ndarray
    kernel: np.ndarray
    out: np.ndarray
    tiles: int
    low: int


def _matrices(points: tuple[float, ...], outputs: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the three matrices of a tile.

    Toom and Cook multiply polynomials by their values at the points and at infinity; Winograd transposes it.
    """
    count = len(points) + 1
    into, kernel, out = np.zeros((count, count)), np.zeros((count, 3)), np.zeros((outputs, count))
    for j, point in enumerate(points):
        others = [other for other in points if other != point]
        into[j, :-1] = np.polynomial.polynomial.polyfromroots(others)
        kernel[j] = point ** np.arange(3) / np.prod(point - np.array(others))
        out[:, j] = point ** np.arange(outputs)
    into[-1] = np.polynomial.polynomial.polyfromroots(points)
    kernel[-1, -1] = out[-1, -1] = 1
    return into, kernel, out


@lru_cache
def _axis(size: int, padding: tuple[int, int], tile: int) -> _Axis:
    outputs = size + sum(padding) - 2
    if (size, padding) == (1, (1, 1)):
        return _Axis(np.ones((1, 1)), np.array([[0, 1, 0]]), np.ones((1, 1)), 1, 0)
    if (size, padding) == (2, (1, 1)):  # y0 = k1 (x0 + x1) + (k2 - k1) x1 and y1 = k1 (x0 + x1) + (k0 - k1) x0
        into, kernel, out = [[1, 1], [0, 1], [1, 0]], [[0, 1, 0], [0, -1, 1], [1, -1, 0]], [[1, 1, 0], [1, 0, 1]]
        return _Axis(np.array(into), np.array(kernel), np.array(out), 1, 0)
    matrices = _matrices(_POINTS[tile], tile)
    if outputs <= tile:  # one tile: what would meet the padding is left out of the matrices
        return _Axis(matrices[0][:, padding[0] : padding[0] + size], matrices[1], matrices[2][:outputs], 1, 0)
    return _Axis(*matrices, -(-outputs // tile), padding[0])


def _axes(input_shape: Shape, window: Window, tile: int) -> tuple[_Axis, _Axis]:
    rows, columns = (_axis(size, padding, tile) for size, padding in zip(input_shape[1:3], window.padding, strict=True))
    return rows, columns


def _combine(matrix: np.ndarray, terms: list[jax.Array], axis: int) -> jax.Array:
    """Return, row by row, the sums of the terms weighted by the row, along a new axis."""
    shape = tuple(-1 if i == axis else 1 for i in range(terms[0].ndim + 1))
    weighted = [
        jnp.asarray(column.reshape(shape), term.dtype) * jnp.expand_dims(term, axis)
        for column, term in zip(matrix.T, terms, strict=True)
        if column.any()
    ]
    return sum(weighted[1:], weighted[0])


def _strips(x: jax.Array, axis: int, rows: int, stride: int, tiles: int) -> list[jax.Array]:
    """Return, for every row of a tile, that row of all tiles."""
    return [lax.slice_in_dim(x, row, row + (tiles - 1) * stride + 1, stride, axis=axis) for row in range(rows)]


def _padded(x: jax.Array, rows: tuple[int, int], columns: tuple[int, int]) -> jax.Array:
    """Put zeros around the image, written to memory: inside a loop they would be a branch per element."""
    if not any((*rows, *columns)):
        return x
    return materialize(jnp.pad(x, ((0, 0), rows, columns, (0, 0))))


def _image_points(x: jax.Array, rows: _Axis, columns: _Axis) -> jax.Array:
    """Turn (N, H, W, C) into (points, points, N, tiles, tiles, C)."""
    reach = [
        (axis.low, (axis.tiles - 1) * len(axis.out) + axis.into.shape[1] - axis.low - size)
        for axis, size in zip((rows, columns), x.shape[1:3], strict=True)
    ]
    x = _padded(x, *reach)
    x = _combine(rows.into, _strips(x, 1, rows.into.shape[1], len(rows.out), rows.tiles), 0)
    x = materialize(x)
    x = _combine(columns.into, _strips(x, 3, columns.into.shape[1], len(columns.out), columns.tiles), 1)
    return materialize(x)


def _output_points(dy: jax.Array, rows: _Axis, columns: _Axis) -> jax.Array:
    """Turn (N, H, W, C) into (points, points, N, tiles, tiles, C): the transpose of `_image`, without its cropping."""
    down, across = len(rows.out), len(columns.out)
    dy = _padded(dy, (0, rows.tiles * down - dy.shape[1]), (0, columns.tiles * across - dy.shape[2]))
    dy = materialize(_combine(rows.out.T, _strips(dy, 1, down, down, rows.tiles), 0))
    return materialize(_combine(columns.out.T, _strips(dy, 3, across, across, columns.tiles), 1))


def _image(points: jax.Array, rows: _Axis, columns: _Axis, size: tuple[int, int]) -> jax.Array:
    """Turn (points, points, N, tiles, tiles, C) into (N, H, W, C)."""
    batch, down, across, channels = points.shape[2:]
    tiled = materialize(_combine(rows.out, list(points), 3))
    tiled = _combine(columns.out, list(tiled), 4)
    image = tiled.reshape(batch, down * len(rows.out), across * len(columns.out), channels)
    return image[:, : size[0], : size[1]]


def _kernel_points(kernel: jax.Array, rows: _Axis, columns: _Axis) -> jax.Array:
    both = np.einsum("pk,ql->pqkl", rows.kernel, columns.kernel)
    return jnp.einsum("pqkl,klio->pqio", jnp.asarray(both, kernel.dtype), kernel)


def _forward(x: jax.Array, kernel: jax.Array, window: Window, tile: int) -> jax.Array:
    rows, columns = _axes(x.shape, window, tile)
    points = _image_points(x, rows, columns)
    products = jnp.einsum("pqntui,pqio->pqntuo", points, _kernel_points(kernel, rows, columns))
    return _image(products, rows, columns, window.output_size(x.shape, kernel.shape))


def _input_gradient(dy: jax.Array, kernel: jax.Array, window: Window, input_shape: Shape, tile: int) -> jax.Array:
    backwards = window.backwards(kernel.shape)
    assert backwards is not None  # by `supports`
    return _forward(dy, kernel[::-1, ::-1].swapaxes(2, 3), backwards, tile)


def _kernel_gradient(x: jax.Array, dy: jax.Array, window: Window, kernel_shape: Shape, tile: int) -> jax.Array:
    rows, columns = _axes(x.shape, window, tile)
    points, dy_points = _image_points(x, rows, columns), _output_points(dy, rows, columns)
    products = jnp.einsum("pqntui,pqntuo->pqio", points, dy_points)
    both = np.einsum("pk,ql->klpq", rows.kernel, columns.kernel)
    return jnp.einsum("klpq,pqio->klio", jnp.asarray(both, x.dtype), products)


def supports(input_shape: Shape, kernel_shape: Shape, window: Window) -> bool:
    """Return whether a 3×3 kernel is ungrouped, at stride 1, and padded by two at most."""
    return (
        kernel_shape[:2] == (3, 3)
        and window.strides == (1, 1)
        and window.groups == 1
        and max(*window.padding[0], *window.padding[1]) <= 2
        and min(window.output_size(input_shape, kernel_shape)) > 0
    )


def _lowering(tile: int) -> Lowering:
    return Lowering(
        f"winograd_f{tile}",
        supports,
        partial(_forward, tile=tile),
        partial(_input_gradient, tile=tile),
        partial(_kernel_gradient, tile=tile),
    )


f2 = _lowering(2)
f4 = _lowering(4)
