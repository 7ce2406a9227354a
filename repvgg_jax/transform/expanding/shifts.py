"""What stands behind a convolution and shifts its channels: it takes the place of the means and biases of branches."""

from __future__ import annotations

from collections.abc import Mapping

from jax.extend.core import JaxprEqn

from repvgg_jax.transform.equations import aval
from repvgg_jax.transform.expanding.listing import IN_PLACE, MOVES, Listing, moves

_SHIFTS = ("add", "add_any", "sub")
_SCALES = ("mul", "div")


def varying_axes(listing: Listing) -> dict[int, set[int]]:
    """Return, for each value, the axes along which its elements can differ."""
    found = {
        value: {axis for axis, size in enumerate(getattr(shaped, "shape", ())) if size != 1}
        for value, shaped in enumerate(listing.avals)
    }
    for written in listing.equations:
        name, (first, *_) = written.equation.primitive.name, (*written.operands, None)
        if name in MOVES and first is not None:
            carried = _carried(written.equation, found[first])
        elif name in (*_SHIFTS, *_SCALES, "neg"):
            carried = set().union(*(found[each] for each in written.operands if each is not None))
        else:
            continue
        if carried is not None:
            found[written.results[0]] &= carried
    return found


def shift_behind(listing: Listing, varying: Mapping[int, set[int]], value: int, channel: int) -> str | None:
    """Return what shifts each channel of a value before anything else is done with it: "batch norm" or "bias".

    Args:
      listing: The function.
      varying: Its `varying_axes`.
      value: The value.
      channel: The axis of its channels.
    """
    found = set()
    for written in listing.consumers[value]:
        name = written.equation.primitive.name
        if moves(written.equation):
            moved = _carried(written.equation, {channel})
            if moved is not None and len(moved) == 1:
                found.add(shift_behind(listing, varying, written.results[0], *moved))
            continue
        others = [each for each in written.operands if each != value]
        if name not in (*_SHIFTS, *_SCALES) or len(others) != 1:
            continue
        (other,) = others
        if other is not None and not varying[other] <= {channel}:
            continue
        if name in _SCALES:
            found.add(shift_behind(listing, varying, written.results[0], channel))
        elif other is not None:
            found.add("batch norm" if _comes_from(listing, other, value) else "bias")
    return next((shift for shift in ("batch norm", "bias") if shift in found), None)


def _comes_from(listing: Listing, value: int, origin: int) -> bool:
    """Whether a value is computed from another one, as the mean of a batch is."""
    seen: set[int] = set()
    ahead = [value]
    while ahead:
        each = ahead.pop()
        if each == origin:
            return True
        if each not in seen and each in listing.producers:
            ahead.extend(operand for operand in listing.producers[each].operands if operand is not None)
        seen.add(each)
    return False


def _carried(equation: JaxprEqn, axes: set[int]) -> set[int] | None:
    """Return where an equation puts axes of its operand; None where it cuts them up."""
    name, params = equation.primitive.name, equation.params
    before, after = (aval(each).shape for each in (equation.invars[0], equation.outvars[0]))
    if name == "transpose":
        return {params["permutation"].index(axis) for axis in axes}
    if name == "broadcast_in_dim":
        return {params["broadcast_dimensions"][axis] for axis in axes}
    if name in IN_PLACE or name == "rev":
        return set(axes)
    long_before, long_after = ([axis for axis, size in enumerate(shape) if size != 1] for shape in (before, after))
    if [before[axis] for axis in long_before] != [after[axis] for axis in long_after]:
        return None
    return {place for axis, place in zip(long_before, long_after, strict=True) if axis in axes}
