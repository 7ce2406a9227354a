"""Words and figures for what `reparameterize` did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from tabulate import tabulate

from repvgg_jax.transform.merging.program import Program


class Change(NamedTuple):
    """A figure before and after merging.

    Attributes:
      before: The figure of the function.
      after: The figure of the program.
    """

    before: int
    after: int


def totals(program: Program, elements: Change) -> dict[str, Change]:
    """Return convolutions, multiply-adds and array elements, before and after."""
    return {
        "convolutions": Change(program.convolutions, sum(step.convolutions for step in program.steps)),
        "multiply-adds": Change(program.multiply_adds, sum(step.multiply_adds for step in program.steps)),
        "array elements": elements,
    }


def describe(program: Program, figures: Mapping[str, Change]) -> str:
    """Return tables of the totals and of the groups, and what was left apart, with the reason."""
    rows = [(name, f"{change.before:,}", f"{change.after:,}") for name, change in figures.items()]
    lines = [tabulate(rows, ("", "before", "after"), colalign=("left", "right", "right"))]
    merged = [group for group in program.groups if group.before > group.after]
    if merged:
        lines.append(tabulate(merged, ("merged", "convolutions before", "after")))
    for reason, scopes in program.reasons.items():
        shown = ", ".join(scopes[:3]) + (f" and {len(scopes) - 3} more" if len(scopes) > 3 else "")
        lines.append(f"left apart in {shown}: {reason}")
    return "\n\n".join(lines)
