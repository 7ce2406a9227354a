"""Fields of a record checked against their annotations and bounds, and the JSON that they are read from."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union

_LARGEST = 3.4e38  # of a float32
_NAMES = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text", types.NoneType: "None"}


def require_types(record: Any) -> None:
    """Check that each field of a dataclass or a NamedTuple holds what its annotation says.

    A float is finite as a float32, and may be given as a whole number. A bool is no number.

    Raises:
      ValueError: If one does not. It is named, with what it is and what was expected.
    """
    for name, hint in typing.get_type_hints(type(record)).items():
        value = getattr(record, name)
        if not _fits(value, hint):
            raise ValueError(f"{name} is {shown(value)}: expected {_described(hint)}")


class Bound(NamedTuple):
    """What a value is held to, and how that is said.

    Attributes:
      holds: Whether a value is within the bound.
      expected: The bound in words.
    """

    holds: Callable[[Any], bool]
    expected: str


def at_least(bound: int) -> Bound:
    """Return the bound of values from `bound` on, included."""
    return Bound(lambda value: value >= bound, f"at least {bound}")


def within(low: float, high: float) -> Bound:
    """Return the bound of values from `low` to `high`, both included."""
    return Bound(lambda value: low <= value <= high, f"in [{low}, {high}]")


def below(low: float, high: float) -> Bound:
    """Return the bound of values from `low`, included, to `high`, excluded."""
    return Bound(lambda value: low <= value < high, f"in [{low}, {high})")


def bounded(default: Any, bound: Bound) -> Any:
    """Return a field of a dataclass with a default and a bound, which `require_bounds` holds it to."""
    return dataclasses.field(default=default, metadata={"bound": bound})


def require_bounds(record: Any) -> None:
    """Check that each field that is `bounded` and is not None is within its bound.

    Raises:
      ValueError: If one is not. It is named, with what it is and what was expected.
    """
    for field in dataclasses.fields(record):
        bound, value = field.metadata.get("bound"), getattr(record, field.name)
        if bound is not None and value is not None and not bound.holds(value):
            raise ValueError(f"{field.name} is {shown(value)}: expected {bound.expected}")


def check_fields(record: Any) -> None:
    """Turn lists in the fields of a frozen dataclass into tuples, and check types and bounds.

    Raises:
      ValueError: If `require_types` or `require_bounds` raises one.
    """
    for name, value in vars(record).items():
        if isinstance(value, list):
            object.__setattr__(record, name, tuple(value))
    require_types(record)
    require_bounds(record)


def require(record: Any, name: str, holds: bool, expected: str) -> None:
    """Raise a ValueError, which says what a field is and what was expected, unless something holds."""
    if not holds:
        raise ValueError(f"{name} is {shown(getattr(record, name))}: expected {expected}")


def read_json(text: str | bytes) -> Any:
    """Parse JSON that holds finite numbers alone.

    Raises:
      ValueError: If it is not JSON, or holds NaN or Infinity, which JSON has not, or a fraction that no float64 holds,
        as 1e999.
    """
    try:
        return json.loads(text, parse_constant=_refuse, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"no JSON: {error}") from None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object. Its lists become tuples.

    Raises:
      ValueError: If it holds something else.
    """
    value = read_json(path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError(f"it holds {shown(value)}, expected a JSON object")
    return {name: tuple(each) if isinstance(each, list) else each for name, each in value.items()}


def shown(value: Any) -> str:
    """Return a value as it is shown in a message, cut to 60 characters."""
    text = str(value) if isinstance(value, str) and value else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _refuse(constant: str) -> Any:
    raise ValueError(f"{shown(constant)} is no number")


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _refuse(text)


def _fits(value: Any, hint: Any) -> bool:
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind in (Union, types.UnionType):
        return any(_fits(value, each) for each in arguments)
    if kind is Literal:
        return any(value == each and type(value) is type(each) for each in arguments)
    if kind is tuple:
        if not isinstance(value, tuple):
            return False
        hints = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        return len(value) == len(hints) and all(map(_fits, value, hints))
    if hint in (int, float) and isinstance(value, bool):
        return False
    if hint is float:
        return isinstance(value, int | float) and abs(value) <= _LARGEST  # which NaN is not
    return isinstance(value, hint)


def _described(hint: Any) -> str:
    kind, arguments = typing.get_origin(hint), typing.get_args(hint)
    if kind in (Union, types.UnionType):
        return " or ".join(map(_described, arguments))
    if kind is Literal:
        return " or ".join(map(str, arguments))
    if kind is tuple:
        return f"a list of {'' if arguments[-1] is ... else f'{len(arguments)}, each '}{_described(arguments[0])}"
    return _NAMES.get(hint) or f"a {hint.__name__}"
