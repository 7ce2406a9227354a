"""The reader of a traced function: its convolutions, where each kernel comes from, and what stands behind each."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn, Literal

from repvgg_jax.transform.equations import aval, bind, body, convolutions
from repvgg_jax.transform.windows import Window, kernel_order, read_window

Position = tuple[int, ...]
"""Where an equation stands: its index, after those of the calls that it is in."""

# They leave the elements of their one operand where they are; the first in another dtype.
_IN_PLACE = ("convert_element_type", "copy", "optimization_barrier", "reverse_mode_only", "sharding_constraint")
_MOVES = (*_IN_PLACE, "broadcast_in_dim", "expand_dims", "reshape", "rev", "squeeze", "transpose")
_SHIFTS = ("add", "add_any", "sub")
_SCALES = ("mul", "div")


@dataclasses.dataclass(frozen=True)
class Found:
    """A convolution whose kernel is a variable that nothing else uses.

    Attributes:
      position: Where it stands.
      leaf: Number of the variable.
      moves: Equations that move the elements of the variable to where the kernel has them.
      order: Axes of the kernel in the order (spatial…, in/groups, out).
      shape: Shape of the kernel in that order.
      window: How it reads its source.
      dtype: Dtype of the kernel, as the convolution takes it.
      result_dtype: Dtype of its result.
      shift: What stands behind it and shifts each channel: "batch norm", "bias" or "nothing".
    """

    position: Position
    leaf: int
    moves: tuple[JaxprEqn, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]
    window: Window
    dtype: Any
    result_dtype: Any
    shift: str

    def ordered(self, variable: jax.Array) -> jax.Array:
        """Return a variable as the kernel in our order, in its own dtype."""
        for equation in self.moves:
            (variable,) = bind(equation, [variable], equation.params)
        return variable.transpose(self.order)

    def restored(self, kernel: jax.Array, variable: Any) -> jax.Array:
        """Return a kernel in our order in the shape and dtype of the variable.

        A map that only moves elements is undone by its transpose.
        """
        moved = jax.ShapeDtypeStruct(variable.shape, kernel.dtype)
        (restored,) = jax.linear_transpose(self.ordered, moved)(kernel)
        return restored.astype(variable.dtype)


class Left(NamedTuple):
    """Convolutions that are left as they are.

    Attributes:
      leaf: Number of the variable that holds the kernel, or None.
      scope: The scope of names that they stand in.
      reason: Why.
    """

    leaf: int | None
    scope: str
    reason: str


class _Written(NamedTuple):
    """An equation of the function with all calls written out. Values are numbered, literals are None."""

    position: Position
    scope: str
    equation: JaxprEqn
    operands: tuple[int | None, ...]
    results: tuple[int, ...]


def read(closed: ClosedJaxpr, variables: int) -> tuple[list[Found], list[Left]]:
    """Find the convolutions of a function.

    Args:
      closed: The function, of variables and then of inputs.
      variables: How many of its arguments are variables.

    Returns:
      Those that can be expanded, and the others.
    """
    return _Reading(closed, variables).convolutions()


class _Reading:
    def __init__(self, closed: ClosedJaxpr, variables: int):
        self.program: list[_Written] = []
        self.avals: list[Any] = []
        arguments = [self._value(each) for each in closed.in_avals]
        self.outputs = self._write_out(closed, arguments, (), "")
        self.producers = {value: each for each in self.program for value in each.results}
        self.consumers = defaultdict(list)
        for each in self.program:
            for operand in each.operands:
                self.consumers[operand].append(each)
        # Of a value: the variable whose elements it has, and how they were moved.
        self.origins: dict[int, tuple[int, tuple[JaxprEqn, ...]]] = {leaf: (leaf, ()) for leaf in range(variables)}
        # Of a value: the variables that it was computed from; None once it depends on an input.
        self.sources: dict[int, frozenset[int] | None] = {
            value: frozenset({value}) if value < variables else None for value in arguments
        }
        self.uses: Counter[int] = Counter()
        for each in self.program:
            self._trace(each)
        self.uses.update(self.origins[value][0] for value in self.outputs if value in self.origins)

    def _value(self, aval: Any) -> int:
        self.avals.append(aval)
        return len(self.avals) - 1

    def _write_out(
        self, closed: ClosedJaxpr, arguments: Sequence[int | None], prefix: Position, scope: str
    ) -> list[int | None]:
        jaxpr = closed.jaxpr
        numbers: dict[Any, int | None] = dict(zip(jaxpr.invars, arguments, strict=True))
        numbers.update((variable, self._value(variable.aval)) for variable in jaxpr.constvars)

        def number(variable: Any) -> int | None:
            return None if isinstance(variable, Literal) else numbers[variable]

        for index, equation in enumerate(jaxpr.eqns):
            operands = tuple(map(number, equation.invars))
            here, inside = (*prefix, index), "/".join(filter(None, (scope, str(equation.source_info.name_stack))))
            inner = body(equation)
            if inner is None:
                results = tuple(self._value(variable.aval) for variable in equation.outvars)
                self.program.append(_Written(here, inside, equation, operands, results))
            else:
                given = operands[len(operands) - len(inner.jaxpr.invars) :]
                results = tuple(self._write_out(inner, given, here, inside))  # type: ignore[arg-type]
            numbers.update(zip(equation.outvars, results, strict=True))
        return list(map(number, jaxpr.outvars))

    def _trace(self, written: _Written) -> None:
        equation, operands = written.equation, written.operands
        known = [self.sources.get(each, frozenset()) for each in operands if each is not None]
        all_of = None if None in known else frozenset().union(*known)  # type: ignore[arg-type]
        self.sources.update((result, all_of) for result in written.results)
        name, taken = equation.primitive.name, operands[0] if operands else None
        if len(operands) == 1 and taken in self.origins and _moves(equation):
            leaf, moves = self.origins[taken]
            in_place = name in _IN_PLACE
            self.origins[written.results[0]] = leaf, moves if in_place else (*moves, equation)
            return
        self.uses.update(self.origins[each][0] for each in operands if each in self.origins)

    def convolutions(self) -> tuple[list[Found], list[Left]]:
        found, left = [], []
        for written in self.program:
            if written.equation.primitive.name == "conv_general_dilated":
                reason = self._refusal(written)
                if reason is None:
                    found.append(self._found(written))
                else:
                    left.append(Left(self._leaf(written.operands[1]), written.scope, reason))
            elif convolutions(written.equation):
                name = written.equation.primitive.name
                where = "a loop" if name in ("scan", "while") else "other code"
                leaves: list[int | None] = [*self._kernels_inside(written)] or [None]
                reason = f"it stands in {where} (`{name}`), which is left as it is"
                left.extend(Left(leaf, written.scope, reason) for leaf in leaves)
        return found, left

    def _leaf(self, value: int | None) -> int | None:
        """Return the one variable that a value is computed from; None where there is not one."""
        sources = self.sources.get(value) if value is not None else None
        return next(iter(sources)) if sources and len(sources) == 1 else None

    def _refusal(self, written: _Written) -> str | None:
        kernel, params = written.operands[1], written.equation.params
        if kernel not in self.origins:
            sources = self.sources.get(kernel, frozenset()) if kernel is not None else frozenset()
            if sources is None:
                return "its kernel depends on the inputs"
            if not sources:
                return "its kernel is held by the function and is no variable"
            computed = self.producers[kernel].equation.primitive.name  # type: ignore[index]
            return f"its kernel is computed before use (`{computed}`)"
        uses = self.uses[self.origins[kernel][0]]
        if uses > 1:
            return f"its kernel is used {uses} times"
        if params["batch_group_count"] != 1:
            return "it has groups of the batch"
        if not jnp.issubdtype(aval(written.equation.outvars[0]).dtype, jnp.floating):
            return "its result is not floating point"
        if any(not isinstance(width, int) for widths in params["padding"] for width in widths):
            return "its padding is a symbol"
        return None

    def _found(self, written: _Written) -> Found:
        leaf, moves = self.origins[written.operands[1]]  # type: ignore[index]
        params, order = written.equation.params, kernel_order(written.equation.params)
        kernel = aval(written.equation.invars[1])
        (result,) = written.results
        return Found(
            position=written.position,
            leaf=leaf,
            moves=moves,
            order=order,
            shape=tuple(kernel.shape[axis] for axis in order),
            window=read_window(params),
            dtype=kernel.dtype,
            result_dtype=aval(written.equation.outvars[0]).dtype,
            shift=self._shift(result, params["dimension_numbers"].out_spec[1]) or "nothing",
        )

    def _kernels_inside(self, written: _Written) -> list[int]:
        """Return the variables that an equation takes, and that could be kernels, stacked or not."""
        return [
            self.origins[each][0]
            for each in written.operands
            if each in self.origins and len(self.avals[self.origins[each][0]].shape) > 2
        ]

    def _shift(self, value: int, channel: int) -> str | None:
        """Return what shifts each channel of a value before anything else is done with it."""
        found = set()
        for written in self.consumers[value]:
            name = written.equation.primitive.name
            if _moves(written.equation):
                moved = _carried(written.equation, {channel})
                if moved is not None and len(moved) == 1:
                    found.add(self._shift(written.results[0], *moved))
                continue
            others = [each for each in written.operands if each != value]
            if name not in (*_SHIFTS, *_SCALES) or len(others) != 1 or not self._varying(others[0]) <= {channel}:
                continue
            if name in _SCALES:
                found.add(self._shift(written.results[0], channel))
            elif others[0] is not None:
                found.add("bias" if name != "sub" and self.sources.get(others[0]) is not None else "batch norm")
        return next((shift for shift in ("batch norm", "bias") if shift in found), None)

    def _varying(self, value: int | None) -> set[int]:
        """Return the axes along which the elements of a value can differ."""
        if value is None:
            return set()
        sizes = {axis for axis, size in enumerate(self.avals[value].shape) if size != 1}
        written = self.producers.get(value)
        if written is None:
            return sizes
        name = written.equation.primitive.name
        if name in (*_SHIFTS, *_SCALES, "neg"):
            return sizes & set().union(*map(self._varying, written.operands))
        carried = _carried(written.equation, self._varying(written.operands[0])) if name in _MOVES else None
        return sizes if carried is None else carried


def _carried(equation: JaxprEqn, axes: set[int]) -> set[int] | None:
    """Return where an equation puts axes of its operand; None where it cuts them up."""
    name, params = equation.primitive.name, equation.params
    before, after = (aval(each).shape for each in (equation.invars[0], equation.outvars[0]))
    if name == "transpose":
        return {params["permutation"].index(axis) for axis in axes}
    if name == "broadcast_in_dim":
        return {params["broadcast_dimensions"][axis] for axis in axes}
    if name in _IN_PLACE or name == "rev":
        return set(axes)
    long_before, long_after = ([axis for axis, size in enumerate(shape) if size != 1] for shape in (before, after))
    if [before[axis] for axis in long_before] != [after[axis] for axis in long_after]:
        return None
    return {place for axis, place in zip(long_before, long_after, strict=True) if axis in axes}


def _moves(equation: JaxprEqn) -> bool:
    """Whether an equation keeps the elements of its one operand, in another order or another floating dtype."""
    if equation.primitive.name not in _MOVES or len(equation.invars) != 1:
        return False
    before, after = aval(equation.invars[0]), aval(equation.outvars[0])
    floating = jnp.issubdtype(before.dtype, jnp.floating) and jnp.issubdtype(after.dtype, jnp.floating)
    return floating and before.size == after.size
