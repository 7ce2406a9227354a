"""What a traced function computes without its inputs: known later, in float64 on the host, and only if asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]

# One value of each operand makes one value of the result.
_NAMES = """abs add add_any ceil convert_element_type copy cos div eq erf exp exp2 expm1 floor ge gt integer_pow
    is_finite le log
    log1p logistic lt max min mul ne neg not pow rem round rsqrt select_n sign sin sqrt square sub tanh"""
_ELEMENTWISE = frozenset(_NAMES.split())
_DTYPE_PARAMETERS = ("new_dtype", "preferred_element_type", "dtype")


class Constant:
    """An array that does not depend on the inputs.

    Attributes:
      shape: as the traced program sees it.
      dtype: likewise; floating-point values are computed in float64 all the same.
      compact: the shape it is kept in: axes along which nothing changes are 1.
      variable: whether it depends on the variables, and is worth a parameter of its own.
      base: the constant that this one is, but for axes along which nothing changes; often itself.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: Any,
        compute: Callable[[], np.ndarray],
        *,
        compact: Sequence[int] | None = None,
        variable: bool = True,
    ):
        # Keys of jax.random have a dtype that NumPy does not know.
        extended = jax.dtypes.issubdtype(dtype, jax.dtypes.extended)
        self.shape, self.dtype, self.variable = tuple(shape), dtype if extended else np.dtype(dtype), variable
        self.compact = self.shape if compact is None else tuple(compact)
        self.base: Constant = self
        self._compute: Callable[[], np.ndarray] | None = compute
        self._value: np.ndarray | None = None

    @property
    def value(self) -> np.ndarray:
        """In the compact shape; float64 where the dtype is floating point."""
        if self._value is None:
            assert self._compute is not None
            self._value = lift(self._compute()).reshape(self.compact)
            self._compute = None
        return self._value

    def forget(self) -> None:
        """Drop the value, once all that depends on it is computed; the shapes are kept."""
        self._value = None

    def map(self, function: Callable[..., np.ndarray], *others: Constant, shape: Sequence[int]) -> Constant:
        """The constant `function(self.value, *(other.value …))`, of this dtype."""
        variable = any(each.variable for each in (self, *others))
        compute = lambda: function(self.value, *(other.value for other in others))  # noqa: E731
        return Constant(shape, self.dtype, compute, variable=variable)

    def vector(self, rank: int, axis: int) -> Constant | None:
        """The values along one axis, `(size,)` or `(1,)`, of a constant that varies along no other; else None."""
        compact = (1,) * (rank - len(self.compact)) + self.compact
        if any(size != 1 for index, size in enumerate(compact) if index != axis):
            return None
        size = compact[axis]
        return self.map(lambda value: value.reshape(size), shape=(size,))


def lift(value: Any) -> np.ndarray:
    """On the host, in float64 where it is floating point."""
    array = np.asarray(value)
    return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array


def evaluate(equation: Any, operands: Sequence[Constant]) -> list[Constant]:
    """The results of one equation of constants."""
    name, outputs = equation.primitive.name, [variable.aval for variable in equation.outvars]
    variable = any(operand.variable for operand in operands)

    def constant(index: int, compute: Callable[[], np.ndarray], compact: Sequence[int] | None = None) -> Constant:
        aval = outputs[index]
        return Constant(aval.shape, aval.dtype, compute, compact=compact, variable=variable)

    compact: Sequence[int]
    if name == "broadcast_in_dim":
        sizes = dict(zip(equation.params["broadcast_dimensions"], operands[0].compact, strict=True))
        compact = [sizes.get(axis, 1) for axis in range(len(outputs[0].shape))]
        broadcast = constant(0, lambda: operands[0].value, compact)
        broadcast.base = operands[0].base
        return [broadcast]
    if name == "transpose":
        permutation = equation.params["permutation"]
        compact = [operands[0].compact[axis] for axis in permutation]
        return [constant(0, lambda: operands[0].value.transpose(permutation), compact)]
    if name == "squeeze":
        gone = {axis % len(operands[0].shape) for axis in equation.params["dimensions"]}
        compact = [size for axis, size in enumerate(operands[0].compact) if axis not in gone]
        return [constant(0, lambda: operands[0].value, compact)]
    if name in _ELEMENTWISE:
        rank = len(outputs[0].shape)
        padded = [(1,) * (rank - len(operand.compact)) + operand.compact for operand in operands]
        compact = np.broadcast_shapes(*padded)
        return [constant(0, lambda: _bind(equation, [np.broadcast_to(o.value, compact) for o in operands])[0], compact)]

    results: list[np.ndarray] = []

    def result(index: int) -> np.ndarray:
        if not results:
            results.extend(_bind(equation, [np.broadcast_to(operand.value, operand.shape) for operand in operands]))
        return results[index]

    return [constant(index, lambda index=index: result(index)) for index in range(len(outputs))]  # type: ignore[misc]


def _bind(equation: Any, values: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Computes in float64 where the primitive can, else in the dtypes of the program."""
    target = equation.outvars[0].aval.dtype
    if equation.primitive.name == "convert_element_type" and jnp.issubdtype(target, jnp.floating):
        # Rounding to float32 is what the fold leaves out; a narrower type rounds the program's own constants.
        narrow = jnp.finfo(target).bits < 32
        return [values[0].astype(target) if narrow else values[0].astype(np.float64)]
    if not any(hasattr(value, "jaxpr") or hasattr(value, "eqns") for value in equation.params.values()):
        lifted = {
            key: np.dtype(np.float64) if key in _DTYPE_PARAMETERS and value == np.float32 else value
            for key, value in equation.params.items()
        }
        try:
            with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
                return _on_host(equation, values, lifted)
        except (TypeError, ValueError):
            # A primitive that fixes its dtypes by other means.
            return _as_declared(equation, values)
    return _as_declared(equation, values)


def _as_declared(equation: Any, values: Sequence[np.ndarray]) -> list[np.ndarray]:
    declared = [value.astype(v.aval.dtype) for value, v in zip(values, equation.invars, strict=True)]
    return _on_host(equation, declared, equation.params)


def _on_host(equation: Any, values: Sequence[np.ndarray], parameters: dict[str, Any]) -> list[np.ndarray]:
    # The program may be read while something else is traced; its constants are computed all the same.
    with jax.ensure_compile_time_eval():
        return [np.asarray(each) for each in bind(equation, list(map(jnp.asarray, values)), parameters)]


def bind(equation: Any, values: Sequence[jax.Array], parameters: dict[str, Any]) -> Sequence[jax.Array]:
    """Compute one equation, on arrays or on tracers."""
    primitive = equation.primitive
    with equation.ctx.manager:
        results = primitive.bind(*values, **primitive.get_bind_params(parameters))
    return results if primitive.multiple_results else [results]
