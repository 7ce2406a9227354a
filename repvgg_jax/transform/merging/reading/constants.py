"""Values that a traced function computes without its inputs: known later, in float64 on the host, if asked for."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]


class Constant:
    """An array that does not depend on the inputs.

    Attributes:
      shape: The shape that the traced program sees.
      dtype: The dtype that the traced program sees. Floating-point values are computed in float64 all the same.
      stored_shape: The shape that it is kept in. Axes along which nothing changes are 1.
      variable: Whether it depends on the variables, and is worth a parameter of its own.
      fingerprint: Hash of its derivation: the same for the same function of the same variables, whatever they hold.
      stretched_from: The constant that this one is, but for axes along which nothing changes; often itself.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: Any,
        compute: Callable[[], np.ndarray],
        *,
        derivation: Sequence[Any],
        stored_shape: Sequence[int] | None = None,
        variable: bool = True,
    ):
        self.shape, self.dtype, self.variable = tuple(shape), dtype if is_key(dtype) else np.dtype(dtype), variable
        self.stored_shape = self.shape if stored_shape is None else tuple(stored_shape)
        derived = repr((*derivation, self.stored_shape)).encode()
        self.fingerprint = hashlib.blake2b(derived, digest_size=16).hexdigest()
        self.stretched_from: Constant = self
        self._compute: Callable[[], np.ndarray] | None = compute
        self._value: np.ndarray | None = None

    @property
    def value(self) -> np.ndarray:
        """The value in the shape that it is stored in; float64 where the dtype is floating point."""
        if self._value is None:
            assert self._compute is not None
            self._value = lift(self._compute()).reshape(self.stored_shape)
            self._compute = None
        return self._value

    def forget(self) -> None:
        """Drop the value once all that depends on it is computed. The shapes are kept."""
        self._value = None

    def rounded(self) -> Any:
        """Return the value in the dtype of the program."""
        return self.value if is_key(self.dtype) else self.value.astype(self.dtype)

    def map(
        self,
        name: str,
        function: Callable[..., np.ndarray],
        *others: Constant,
        shape: Sequence[int],
        static: Any = None,
    ) -> Constant:
        """Return the constant `function(self.value, *(other.value …))`, of this dtype.

        Args:
          name: Name of the function, for the fingerprint.
          function: The function of the values.
          *others: Further constants.
          shape: Shape of the result.
          static: All that the function closes over.
        """
        variable = any(each.variable for each in (self, *others))
        compute = lambda: function(self.value, *(other.value for other in others))  # noqa: E731
        derivation = (name, static, *(each.fingerprint for each in (self, *others)))
        return Constant(shape, self.dtype, compute, derivation=derivation, variable=variable)

    def stored_in_rank(self, rank: int) -> Shape:
        """Return the stored shape with axes of size one in front, as broadcasting puts them."""
        return (1,) * (rank - len(self.stored_shape)) + self.stored_shape

    def vector(self, rank: int, axis: int) -> Constant | None:
        """Return the values along one axis, `(size,)` or `(1,)`; None where the constant varies along another."""
        sizes = self.stored_in_rank(rank)
        if any(size != 1 for index, size in enumerate(sizes) if index != axis):
            return None
        size = sizes[axis]
        return self.map("vector", lambda value: value.reshape(size), shape=(size,))


def is_key(dtype: Any) -> bool:
    """Whether it is the dtype of `jax.random.key`, which NumPy does not know."""
    return bool(jax.dtypes.issubdtype(dtype, jax.dtypes.extended))


def is_static(shape: Sequence[Any]) -> bool:
    """Whether no size of a shape is a symbol."""
    return all(isinstance(size, int | np.integer) for size in shape)


def lift(value: Any) -> Any:
    """Return a value on the host, in float64 where it is floating point; keys stay as they are."""
    if is_key(getattr(value, "dtype", np.float64)):
        return value
    array = np.asarray(value)
    return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array
