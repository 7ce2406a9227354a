"""What a traced function computes without its inputs: known later, in float64 on the host, and only if asked for."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Shape = tuple[int, ...]

# Elementwise: one value of each operand makes one value of the result. Continuous ones, and then steps.
_CONTINUOUS = """abs add add_any convert_element_type copy cos div erf exp exp2 expm1 integer_pow log log1p logistic
    max min mul neg pow rsqrt select_n sin sqrt square sub tanh"""
_STEPS = "ceil eq floor ge gt is_finite le lt ne nextafter not rem round sign"
_OTHERS = """broadcast_in_dim concatenate conv_general_dilated cumsum dot_general dynamic_slice gather pad reduce_max
    reduce_min reduce_sum reduce_window_sum reshape rev slice squeeze stop_gradient transpose"""
_ELEMENTWISE = frozenset(f"{_CONTINUOUS} {_STEPS}".split())
# These float64 makes more exact; all else is computed in the dtypes of the program, as it would be there.
_LIFTED = frozenset(f"{_CONTINUOUS} {_OTHERS}".split())
# NumPy computes these as XLA does, and compiles nothing: a network has a few for every one of its shapes.
_ON_HOST: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "add_any": np.add,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "neg": np.negative,
    "rsqrt": lambda value: 1 / np.sqrt(value),
    "sqrt": np.sqrt,
    "square": np.square,
    "sub": np.subtract,
}
_DTYPE_PARAMETERS = ("new_dtype", "preferred_element_type", "dtype")


class Constant:
    """An array that does not depend on the inputs.

    Attributes:
      shape: as the traced program sees it.
      dtype: likewise; floating-point values are computed in float64 all the same.
      compact: the shape it is kept in: axes along which nothing changes are 1.
      variable: whether it depends on the variables, and is worth a parameter of its own.
      recipe: how it is computed, as a digest: the same for the same function of the same variables, whatever they hold.
      base: the constant that this one is, but for axes along which nothing changes; often itself.
    """

    def __init__(
        self,
        shape: Sequence[int],
        dtype: Any,
        compute: Callable[[], np.ndarray],
        *,
        recipe: Sequence[Any],
        compact: Sequence[int] | None = None,
        variable: bool = True,
    ):
        self.shape, self.dtype, self.variable = tuple(shape), dtype if is_key(dtype) else np.dtype(dtype), variable
        self.compact = self.shape if compact is None else tuple(compact)
        self.recipe = hashlib.blake2b(repr((*recipe, self.compact)).encode(), digest_size=16).hexdigest()
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

    def map(
        self, name: str, function: Callable[..., np.ndarray], *others: Constant, shape: Sequence[int], by: Any = None
    ) -> Constant:
        """The constant `function(self.value, *(other.value …))`, of this dtype.

        Args:
          name: of the function, for the recipe.
          function: of values.
          others: further constants.
          shape: of the result.
          by: all that the function closes over.
        """
        variable = any(each.variable for each in (self, *others))
        compute = lambda: function(self.value, *(other.value for other in others))  # noqa: E731
        recipe = (name, by, *(each.recipe for each in (self, *others)))
        return Constant(shape, self.dtype, compute, recipe=recipe, variable=variable)

    def vector(self, rank: int, axis: int) -> Constant | None:
        """The values along one axis, `(size,)` or `(1,)`, of a constant that varies along no other; else None."""
        compact = (1,) * (rank - len(self.compact)) + self.compact
        if any(size != 1 for index, size in enumerate(compact) if index != axis):
            return None
        size = compact[axis]
        return self.map("vector", lambda value: value.reshape(size), shape=(size,))


def is_key(dtype: Any) -> bool:
    """Whether it is the dtype of `jax.random.key`, which NumPy does not know."""
    return bool(jax.dtypes.issubdtype(dtype, jax.dtypes.extended))


def is_static(shape: Sequence[Any]) -> bool:
    """Whether no size of it is a symbol."""
    return all(isinstance(size, int | np.integer) for size in shape)


def can_evaluate(equation: Any, operands: Sequence[Constant]) -> bool:
    """Whether the results of an equation of constants are constants, too.

    Keys are not, nor what is a function of symbolic sizes, nor what takes a stretched constant apart: a token that is
    tiled to the batch, say, which would be kept once for each image.
    """
    avals = [variable.aval for variable in (*equation.invars, *equation.outvars)]
    if any(not hasattr(aval, "shape") or is_key(aval.dtype) for aval in avals):
        return False
    name = equation.primitive.name
    if name in _ELEMENTWISE or name in ("broadcast_in_dim", "transpose", "squeeze"):
        return True
    stretched = any(operand.compact != operand.shape for operand in operands)
    return name != "dim_as_value" and not stretched and all(is_static(aval.shape) for aval in avals)


def lift(value: Any) -> Any:
    """On the host, in float64 where it is floating point; keys as they are."""
    if is_key(getattr(value, "dtype", np.float64)):
        return value
    array = np.asarray(value)
    return array.astype(np.float64) if jnp.issubdtype(array.dtype, jnp.floating) else array


def evaluate(equation: Any, operands: Sequence[Constant]) -> list[Constant]:
    """The results of one equation of constants."""
    name, outputs = equation.primitive.name, [variable.aval for variable in equation.outvars]
    variable = any(operand.variable for operand in operands)
    if name == "convert_element_type" and operands[0].dtype == outputs[0].dtype:
        return list(operands)  # a weak type became a strong one: the same values

    def constant(
        index: int, compute: Callable[[], np.ndarray], compact: Sequence[int] | None = None, by: Any = None
    ) -> Constant:
        aval, recipe = outputs[index], (name, index, by, *(operand.recipe for operand in operands))
        return Constant(aval.shape, aval.dtype, compute, recipe=recipe, compact=compact, variable=variable)

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
        return [constant(0, lambda: operands[0].value.transpose(permutation), compact, by=permutation)]
    if name == "squeeze":
        gone = {axis % len(operands[0].shape) for axis in equation.params["dimensions"]}
        compact = [size for axis, size in enumerate(operands[0].compact) if axis not in gone]
        return [constant(0, lambda: operands[0].value, compact)]
    if name in _ELEMENTWISE:
        rank = len(outputs[0].shape)
        padded = [(1,) * (rank - len(operand.compact)) + operand.compact for operand in operands]
        compact = np.broadcast_shapes(*padded)
        return [
            constant(
                0,
                lambda: _bind(equation, [np.broadcast_to(o.value, compact) for o in operands])[0],
                compact,
                by=_canonical(equation.params),
            )
        ]

    results: list[np.ndarray] = []

    def result(index: int) -> np.ndarray:
        if not results:
            results.extend(_bind(equation, [np.broadcast_to(operand.value, operand.shape) for operand in operands]))
        return results[index]

    by = (_canonical(equation.params), [operand.shape for operand in operands])
    return [constant(index, lambda index=index: result(index), by=by) for index in range(len(outputs))]  # type: ignore[misc]


def _canonical(parameters: dict[str, Any]) -> str:
    """The parameters of an equation in words that are the same whenever it is traced."""
    # Printed, large arrays are shortened.
    arrays = [value for value in parameters.values() if isinstance(value, np.ndarray | jax.Array)]
    arrays += [each for value in parameters.values() for each in getattr(value, "consts", ())]
    held = [np.asarray(each).tobytes() for each in arrays]
    # On the host all is computed exactly, whatever precision an accelerator was to have.
    named = sorted(item for item in parameters.items() if item[0] != "precision")
    return re.sub(r" at 0x[0-9a-f]+", "", repr((named, held)))


def _bind(equation: Any, values: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Compute in float64 where the primitive can, else in the dtypes of the program."""
    target = equation.outvars[0].aval.dtype
    if equation.primitive.name == "convert_element_type" and jnp.issubdtype(target, jnp.floating):
        # Rounding to float32 is what the fold leaves out; a narrower type rounds the program's own constants.
        narrow = jnp.finfo(target).bits < 32
        return [values[0].astype(target) if narrow else values[0].astype(np.float64)]
    wide = all(
        jnp.finfo(v.aval.dtype).bits >= 32
        for v in (*equation.invars, *equation.outvars)
        if jnp.issubdtype(v.aval.dtype, jnp.floating)
    )
    if wide and all(value.dtype == np.float64 for value in values):
        if equation.primitive.name in _ON_HOST:
            with np.errstate(all="ignore"):
                return [np.asarray(_ON_HOST[equation.primitive.name](*values))]
        if equation.primitive.name == "reshape" and equation.params["dimensions"] is None:
            return [values[0].reshape(equation.params["new_sizes"])]
    to_integers = equation.primitive.name == "convert_element_type" and not jnp.issubdtype(target, jnp.inexact)
    if equation.primitive.name in _LIFTED and wide and not to_integers:
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
