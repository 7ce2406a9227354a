"""The linear maps that a branch is made of, each at its place."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from repvgg_jax.transform.expanding.branches import Average, Branch, Chain, Conv, Map, Params
from repvgg_jax.transform.expanding.places import Place


class Step(NamedTuple):
    """One linear map of a branch, at its place.

    Attributes:
      name: Name of its parameters, and of what its norm keeps.
      map: The map.
      place: Where it stands.
      begins_as_identity: Whether its kernel begins as the identity's, and is not drawn.
    """

    name: str
    map: Map
    place: Place
    begins_as_identity: bool = False

    def create(self, draw: np.random.Generator, dtype: Any) -> Params:
        """Return the parameters that the map begins with."""
        if self.begins_as_identity:
            return {"kernel": self.place.identity().astype(dtype)}
        return self.map.create(self.place, draw, dtype)


def steps(branch: Branch, place: Place) -> tuple[Step, ...] | str:
    """Return the maps of a branch at a place, or why it does not fit."""
    if not isinstance(branch, Chain):
        return branch.refusal(place) or (Step(branch.name(place), branch, place),)
    if math.prod(place.size) == 1:
        return "no chain of two convolutions of one tap"
    between = place.out if isinstance(branch.last, Average) else place.channels
    first, second = place.pointwise(between), place.after(between)
    refusal = branch.last.refusal(second)
    if refusal:
        return refusal
    # The 1×1 before a convolution begins as the identity: the official implementation, `IdentityBasedConv1x1`.
    as_identity = isinstance(branch.last, Conv)
    names = Conv(1).name(first), branch.last.name(second)
    return (
        Step(f"{'_'.join(names)}/{names[0]}", Conv(1), first, as_identity),
        Step(f"{'_'.join(names)}/{names[1]}", branch.last, second),
    )
