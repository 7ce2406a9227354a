"""Words and figures for what `expand` did."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from repvgg_jax.transform.expanding.branched import Branched

NO_SHIFT = (
    "directly behind {names} nothing shifts the channels: in training the sum of branches with full batch norms would "
    "differ from theirs by a constant of each channel"
)


def describe(expanded: Sequence[Branched], left: Sequence[tuple[str, str]], elements: tuple[int, int]) -> str:
    """Return a table of the convolutions that became branches, and what was left as it is, with the reason.

    Args:
      expanded: The convolutions with branches.
      left: Names and reasons of the others.
      elements: Array elements of the variables, and of the parameters.
    """
    total = len(expanded) + len(left)
    lines = [f"{len(expanded)} of {total} convolutions expanded, {elements[0]:,} array elements in {elements[1]:,}"]
    if expanded:
        rows = [
            (each.name, "x".join(map(str, each.found.shape)), " + ".join(each.names), each.found.shift)
            for each in expanded
        ]
        lines.append(tabulate(rows, ("convolution", "kernel", "branches", "shifted by")))
    reasons: dict[str, list[str]] = {}
    for name, reason in left:
        reasons.setdefault(reason, []).append(name)
    lines += [f"left as it is, {_some(names)}: {reason}" for reason, names in reasons.items()]
    bare = [each.name for each in expanded if each.found.shift == "nothing"]
    if bare:
        lines.append(NO_SHIFT.format(names=_some(bare)))
    return "\n\n".join(lines)


def _some(names: Sequence[str]) -> str:
    names = list(dict.fromkeys(name or "a convolution" for name in names))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
