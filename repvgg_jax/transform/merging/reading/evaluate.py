"""Equations of constants: their results are constants, which are computed in float64 where that is more exact."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import JaxprEqn

from repvgg_jax.transform.equations import aval, bind, result_aval
from repvgg_jax.transform.merging.reading.constants import Constant, is_key, is_static

# Elementwise: one value of each operand makes one value of the result. Continuous ones, and then steps.
_CONTINUOUS = [
    "abs", "add", "add_any", "convert_element_type", "copy", "cos", "div", "erf", "exp", "exp2", "expm1",
    "integer_pow", "log", "log1p", "logistic", "max", "min", "mul", "neg", "pow", "rsqrt", "select_n", "sin", "sqrt",
    "square", "sub", "tanh",
]  # fmt: skip
_STEPS = ["ceil", "eq", "floor", "ge", "gt", "is_finite", "le", "lt", "ne", "nextafter", "not", "rem", "round", "sign"]
_ELEMENTWISE = [*_CONTINUOUS, *_STEPS]
# The values that are stored stay as they are, in their order or in another.
_ONLY_MOVED = ["broadcast_in_dim", "squeeze", "transpose"]
_OTHERS = [
    "concatenate", "conv_general_dilated", "cumsum", "dot_general", "dynamic_slice", "gather", "pad", "reduce_max",
    "reduce_min", "reduce_sum", "reduce_window_sum", "reshape", "rev", "slice", "stop_gradient",
]  # fmt: skip
# These float64 makes more exact; all else is computed in the dtypes of the program, as it would be there.
_LIFTED = [*_CONTINUOUS, *_ONLY_MOVED, *_OTHERS]
# NumPy computes these as XLA does, and compiles nothing: a network has a few for every one of its shapes.
_IN_NUMPY: dict[str, Callable[..., Any]] = {
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


def can_evaluate(equation: JaxprEqn, operands: Sequence[Constant]) -> bool:
    """Whether the results of an equation of constants are constants, too.

    Keys are not, nor what is a function of symbolic sizes, nor what takes a stretched constant apart: a token that is
    tiled to the batch, say, which would be kept once for each image.
    """
    avals = [aval(variable) for variable in (*equation.invars, *equation.outvars)]
    if any(not hasattr(each, "shape") or is_key(each.dtype) for each in avals):
        return False
    name = equation.primitive.name
    if name in _ELEMENTWISE or name in _ONLY_MOVED:
        return True
    stretched = any(operand.stored_shape != operand.shape for operand in operands)
    return name != "dim_as_value" and not stretched and all(is_static(each.shape) for each in avals)


def evaluate(equation: JaxprEqn, operands: Sequence[Constant]) -> list[Constant]:
    """Return the results of one equation of constants."""
    name = equation.primitive.name
    if name == "convert_element_type" and operands[0].dtype == result_aval(equation).dtype:
        return list(operands)  # a weak type became a strong one: the same values
    if name in _ONLY_MOVED:
        return [_moved(equation, operands[0])]
    if name in _ELEMENTWISE:
        rank = len(result_aval(equation).shape)
        shape = np.broadcast_shapes(*(operand.stored_in_rank(rank) for operand in operands))
        return [
            _result(
                equation,
                operands,
                lambda: _compute(equation, [np.broadcast_to(operand.value, shape) for operand in operands])[0],
                stored_shape=shape,
                static=_canonical(equation.params),
            )
        ]

    @cache
    def results() -> list[np.ndarray]:
        return _compute(equation, [np.broadcast_to(operand.value, operand.shape) for operand in operands])

    def result(index: int) -> np.ndarray:
        return results()[index]

    static = (_canonical(equation.params), [operand.shape for operand in operands])
    indices = range(len(equation.outvars))
    return [_result(equation, operands, partial(result, index), index=index, static=static) for index in indices]


def _result(
    equation: JaxprEqn,
    operands: Sequence[Constant],
    compute: Callable[[], np.ndarray],
    *,
    index: int = 0,
    stored_shape: Sequence[int] | None = None,
    static: Any = None,
) -> Constant:
    result = aval(equation.outvars[index])
    return Constant(
        result.shape,
        result.dtype,
        compute,
        derivation=(equation.primitive.name, index, static, *(operand.fingerprint for operand in operands)),
        stored_shape=stored_shape,
        variable=any(operand.variable for operand in operands),
    )


def _moved(equation: JaxprEqn, operand: Constant) -> Constant:
    """Return a constant with axes added, taken away or in another order."""
    name, sizes = equation.primitive.name, operand.stored_shape
    if name == "transpose":
        order = equation.params["permutation"]
        compute, shape = lambda: operand.value.transpose(order), [sizes[axis] for axis in order]
        return _result(equation, [operand], compute, stored_shape=shape, static=order)
    if name == "squeeze":
        gone = {axis % len(operand.shape) for axis in equation.params["dimensions"]}
        shape = [size for axis, size in enumerate(sizes) if axis not in gone]
        return _result(equation, [operand], lambda: operand.value, stored_shape=shape)
    placed = dict(zip(equation.params["broadcast_dimensions"], sizes, strict=True))
    shape = [placed.get(axis, 1) for axis in range(len(result_aval(equation).shape))]
    stretched = _result(equation, [operand], lambda: operand.value, stored_shape=shape)
    stretched.stretched_from = operand.stretched_from
    return stretched


def _canonical(parameters: dict[str, Any]) -> str:
    """Describe the parameters of an equation in words that are the same whenever it is traced."""
    # Printed, large arrays are shortened.
    arrays = [value for value in parameters.values() if isinstance(value, np.ndarray | jax.Array)]
    arrays += [each for value in parameters.values() for each in getattr(value, "consts", ())]
    held = [np.asarray(each).tobytes() for each in arrays]
    # On the host all is computed exactly, whatever precision an accelerator was to have.
    named = sorted(item for item in parameters.items() if item[0] != "precision")
    return re.sub(r" at 0x[0-9a-f]+", "", repr((named, held)))


def _compute(equation: JaxprEqn, values: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Compute an equation in float64 where the primitive can, else in the dtypes of the program."""
    target = result_aval(equation).dtype
    if equation.primitive.name == "convert_element_type" and jnp.issubdtype(target, jnp.floating):
        # Rounding to float32 is what the fold leaves out; a narrower type rounds the program's own constants.
        narrow = jnp.finfo(target).bits < 32
        return [values[0].astype(target) if narrow else values[0].astype(np.float64)]
    wide = all(
        jnp.finfo(aval(v).dtype).bits >= 32
        for v in (*equation.invars, *equation.outvars)
        if jnp.issubdtype(aval(v).dtype, jnp.floating)
    )
    if wide and all(value.dtype == np.float64 for value in values):
        if equation.primitive.name in _IN_NUMPY:
            with np.errstate(all="ignore"):
                return [np.asarray(_IN_NUMPY[equation.primitive.name](*values))]
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


def _as_declared(equation: JaxprEqn, values: Sequence[np.ndarray]) -> list[np.ndarray]:
    declared = [value.astype(aval(v).dtype) for value, v in zip(values, equation.invars, strict=True)]
    return _on_host(equation, declared, equation.params)


def _on_host(equation: JaxprEqn, values: Sequence[np.ndarray], parameters: dict[str, Any]) -> list[np.ndarray]:
    # The program may be read while something else is traced; its constants are computed all the same.
    with jax.ensure_compile_time_eval():
        return [np.asarray(each) for each in bind(equation, list(map(jnp.asarray, values)), parameters)]
