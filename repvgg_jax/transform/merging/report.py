"""What `reparameterize` did, in words and figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tabulate import tabulate

from repvgg_jax.transform.merging.interpreter import Interpreter


class Change(NamedTuple):
    """A figure before and after."""

    before: int
    after: int


def totals(interpreter: Interpreter, elements: Change) -> dict[str, Change]:
    """Convolutions, multiply-adds and array elements, before and after."""
    steps = interpreter.program.steps
    convolutions = sum(step.convolutions for step in steps)
    return {
        "convolutions": Change(interpreter.convolutions, convolutions),
        "multiply-adds": Change(interpreter.multiply_adds, sum(step.multiply_adds for step in steps)),
        "array elements": elements,
    }


def describe(interpreter: Interpreter, figures: Mapping[str, Change]) -> str:
    """Tables of the totals and of the groups, and what was left, with the reason."""
    rows = [(name, f"{change.before:,}", f"{change.after:,}") for name, change in figures.items()]
    lines = [tabulate(rows, ("", "before", "after"), colalign=("left", "right", "right"))]
    merged = [group for group in interpreter.groups if group.before > group.after]
    if merged:
        lines.append(tabulate(merged, ("merged", "convolutions before", "after")))
    for reason, scopes in interpreter.left.items():
        shown = ", ".join(scopes[:3]) + (f" and {len(scopes) - 3} more" if len(scopes) > 3 else "")
        lines.append(f"left apart in {shown}: {reason}")
    return "\n\n".join(lines)
