"""What `reparameterize` did, in words and figures."""

from __future__ import annotations

from tabulate import tabulate

from repvgg_jax.trace.interpreter import Interpreter


def describe(interpreter: Interpreter, parameters_before: int, parameters_after: int) -> str:
    """Tables of the totals and of the groups, and the notes."""
    program = interpreter.program
    convolutions = [step for step in program.steps if step.name == "conv_general_dilated"]
    totals = [
        ("convolutions", interpreter.convolutions, len(convolutions)),
        ("multiply-adds", interpreter.multiply_adds, sum(step.multiply_adds for step in program.steps)),
        ("array elements", parameters_before, parameters_after),
    ]
    lines = [
        tabulate(
            [(name, f"{a:,}", f"{b:,}") for name, a, b in totals],
            ("", "before", "after"),
            colalign=("left", "right", "right"),
        )
    ]
    merged = [group for group in interpreter.groups if group.before > group.after]
    if merged:
        rows = [(group.scope, group.before, group.after) for group in merged]
        lines.append(tabulate(rows, ("merged", "convolutions before", "after")))
    lines += interpreter.notes
    return "\n\n".join(lines)
