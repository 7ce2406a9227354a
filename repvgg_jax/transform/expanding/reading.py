"""The reader of a traced function: its convolutions, where each kernel comes from, and what stands behind each."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, JaxprEqn

from repvgg_jax.transform.equations import aval, bind, convolutions
from repvgg_jax.transform.expanding.listing import IN_PLACE, Listing, Position, Written, moves
from repvgg_jax.transform.expanding.shifts import shift_behind, varying_axes
from repvgg_jax.transform.windows import Window, kernel_order, read_window


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
        self.listing = listing = Listing(closed)
        self.varying = varying_axes(listing)
        # Of a value: the variable whose elements it has, and how they were moved.
        self.origins: dict[int, tuple[int, tuple[JaxprEqn, ...]]] = {leaf: (leaf, ()) for leaf in range(variables)}
        # Of a value: the variables that it was computed from; None once it depends on an input.
        self.sources: dict[int, frozenset[int] | None] = {
            value: frozenset({value}) if value < variables else None for value in listing.arguments
        }
        self.uses: Counter[int] = Counter()
        for each in listing.equations:
            self._trace(each)
        self.uses.update(self.origins[value][0] for value in listing.outputs if value in self.origins)

    def _trace(self, written: Written) -> None:
        equation, operands = written.equation, written.operands
        known = [self.sources.get(each, frozenset()) for each in operands if each is not None]
        all_of = None if None in known else frozenset().union(*known)  # type: ignore[arg-type]
        self.sources.update((result, all_of) for result in written.results)
        name, taken = equation.primitive.name, operands[0] if operands else None
        if len(operands) == 1 and taken in self.origins and moves(equation):
            leaf, before = self.origins[taken]
            self.origins[written.results[0]] = leaf, before if name in IN_PLACE else (*before, equation)
            return
        self.uses.update(self.origins[each][0] for each in operands if each in self.origins)

    def convolutions(self) -> tuple[list[Found], list[Left]]:
        found, left = [], []
        for written in self.listing.equations:
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

    def _refusal(self, written: Written) -> str | None:
        kernel, params = written.operands[1], written.equation.params
        if kernel not in self.origins:
            sources = self.sources.get(kernel, frozenset()) if kernel is not None else frozenset()
            if sources is None:
                return "its kernel depends on the inputs"
            if not sources:
                return "its kernel is held by the function and is no variable"
            computed = self.listing.producers[kernel].equation.primitive.name  # type: ignore[index]
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

    def _found(self, written: Written) -> Found:
        leaf, moves = self.origins[written.operands[1]]  # type: ignore[index]
        params, order = written.equation.params, kernel_order(written.equation.params)
        kernel = aval(written.equation.invars[1])
        (result,), channel = written.results, params["dimension_numbers"].out_spec[1]
        return Found(
            position=written.position,
            leaf=leaf,
            moves=moves,
            order=order,
            shape=tuple(kernel.shape[axis] for axis in order),
            window=read_window(params),
            dtype=kernel.dtype,
            result_dtype=aval(written.equation.outvars[0]).dtype,
            shift=shift_behind(self.listing, self.varying, result, channel) or "nothing",
        )

    def _kernels_inside(self, written: Written) -> list[int]:
        """Return the variables that an equation takes, and that could be kernels, stacked or not."""
        return [
            self.origins[each][0]
            for each in written.operands
            if each in self.origins and len(self.listing.avals[self.origins[each][0]].shape) > 2
        ]
