"""One convolution as the sum of its branches: what it computes, and the kernel that it becomes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from repvgg_jax.transform.expanding.branches import Average, Branch, Kernel, Params, by_channel
from repvgg_jax.transform.expanding.places import Place, composed
from repvgg_jax.transform.expanding.reading import Found
from repvgg_jax.transform.expanding.steps import Step, steps

Init = Literal["same", "published"]
Named = dict[str, Params]
"""Arrays by the name of a step and then their own: 'kernel', 'gain' and 'scale', or 'var'."""


class Norms(NamedTuple):
    """Norms that only scale: by the gain over the deviation of each channel, whose mean is not subtracted.

    Attributes:
      momentum: The share of itself that a running variance keeps in a step of training.
      epsilon: Added to a variance.
    """

    momentum: float
    epsilon: float

    def deviation(self, var: jax.Array) -> jax.Array:
        """Return what a channel of this variance is divided by."""
        return jnp.sqrt(var + self.epsilon)


@dataclasses.dataclass(frozen=True)
class Branched:
    """A convolution of a traced function as the sum of branches.

    Attributes:
      name: Path of its kernel in the variables.
      found: The convolution.
      branches: The steps of each branch.
      norms: What the norms share; None where the gains are constant.
    """

    name: str
    found: Found
    branches: tuple[tuple[Step, ...], ...]
    norms: Norms | None

    @property
    def names(self) -> list[str]:
        """Names of the branches."""
        return [branch[0].name.split("/")[0] for branch in self.branches]

    def create(self, draw: np.random.Generator, init: Init, dtype: Any) -> tuple[Named, Named]:
        """Return parameters and state to begin with.

        With the init "same" all branches but the kernel's begin at zero. With norms, the gain of the kernel's branch
        must yet be set to the deviation of what it computes.
        """
        params: Named = {}
        state: Named = {}
        for branch in self.branches:
            created = []
            for step in branch:
                created.append(step.create(draw, dtype))
                gain = jnp.full(step.place.out, step.map.gain, dtype)
                if self.norms:
                    created[-1].pop("scale", None)  # the gain is one already
                    created[-1]["gain"] = gain
                state[step.name] = {"var": jnp.ones_like(gain)} if self.norms else {"gain": gain}
            if init == "same" and not isinstance(branch[0].map, Kernel):
                _silence(created)
            params.update((step.name, made) for step, made in zip(branch, created, strict=True) if made)
        return params, state

    def apply(
        self, params: Named, state: Named, source: jax.Array, kernel: jax.Array, *, train: bool
    ) -> tuple[jax.Array, Named]:
        """Return the sum of the branches, and the state after it.

        Args:
          params: The parameters.
          state: The state.
          source: What is convolved.
          kernel: The kernel of the convolution, as the function has it.
          train: Whether the norms scale by the variance of the batch, and not by the running one.
        """
        own = kernel.transpose(self.found.order)
        total, after = None, {}
        for branch in self.branches:
            y = source
            for step in branch:
                y = step.map.apply(step.place, self._given(step, params, own), y.astype(source.dtype))
                y = y.astype(jnp.promote_types(y.dtype, jnp.float32))
                after[step.name] = state[step.name]
                var = after[step.name].get("var")
                if self.norms and train:
                    var = _variance(y, step.place.window.axes[1])
                    after[step.name] = {"var": self._running(after[step.name]["var"], var)}
                y = by_channel(y, self._factor(step, params, state, var), step.place.window.axes[1])
            total = y if total is None else total + y
        assert total is not None
        return total.astype(self.found.result_dtype), after

    def measure(
        self, params: Named, state: Named, source: jax.Array, kernel: jax.Array, *, plain: bool
    ) -> tuple[jax.Array, Named]:
        """Return what `apply` does in training, with the variances of the batch in the place of the running ones.

        With `plain` the result is what the convolution itself computes, and not the sum.
        """
        assert self.norms is not None
        at_once = dataclasses.replace(self, norms=self.norms._replace(momentum=0.0))
        y, after = at_once.apply(params, state, source, kernel, train=True)
        if plain:
            window, place = self.found.window, self.branches[0][0].place
            y = window.convolve(place.convolution, source, kernel.transpose(self.found.order))
        return y, after

    @property
    def own(self) -> Step:
        """The step of the caller's own kernel."""
        return next(branch[0] for branch in self.branches if isinstance(branch[0].map, Kernel))

    def passing(self, state: Named) -> Named:
        """Return the gain with which the branch of the kernel computes what the convolution does."""
        assert self.norms is not None
        return {self.own.name: {"gain": self.norms.deviation(state[self.own.name]["var"])}}

    def merged(self, params: Named, state: Named, kernel: jax.Array) -> jax.Array:
        """Return the one kernel that computes `apply` after training, of the kernel in our order."""
        total: Any = 0
        for branch in self.branches:
            whole = None
            for step in branch:
                factor = self._factor(step, params, state, state[step.name].get("var"))
                mapped = step.map.kernel(step.place, self._given(step, params, kernel))
                mapped = by_channel(mapped, factor, mapped.ndim - 1)
                whole = mapped if whole is None else composed(whole, mapped, self.found.window.groups)
            total = total + whole
        return total

    def multiplier(self, state: Named) -> jax.Array:
        """Return what a gradient of the merged kernel is multiplied by where the branches are trained by SGD.

        Raises:
          ValueError: If a branch has two steps, so that the merged kernel is no linear function of its parameters.
        """
        total: Any = 0
        for branch in self.branches:
            if len(branch) > 1:
                raise ValueError(
                    f"{self.name} has the branch {branch[0].name.split('/')[0]}, whose gradient is no multiple of the "
                    "kernel's: expected no Chain among the branches"
                )
            (step,) = branch
            assert not isinstance(step.map, Average), "it ends a chain"
            trained = step.map.trained(step.place)
            total = total + by_channel(trained, state[step.name]["gain"] ** 2, trained.ndim - 1)
        return total

    def _given(self, step: Step, params: Named, kernel: jax.Array) -> Params:
        given = params.get(step.name, {})
        return {**given, "kernel": kernel} if isinstance(step.map, Kernel) else given

    def _factor(self, step: Step, params: Named, state: Named, var: jax.Array | None) -> jax.Array:
        if self.norms is None:
            return state[step.name]["gain"]
        assert var is not None
        return params[step.name]["gain"] / self.norms.deviation(var)

    def _running(self, before: jax.Array, var: jax.Array) -> jax.Array:
        assert self.norms is not None
        keep = self.norms.momentum
        return lax.stop_gradient(keep * before + (1 - keep) * var.astype(before.dtype))


def branched(
    name: str,
    found: Found,
    branches: Sequence[Branch],
    norms: Norms | None,
    convolution: Callable[..., jax.Array],
) -> Branched | str:
    """Return a convolution as the sum of those branches that fit it, or why none does."""
    *size, within, out = found.shape
    place = Place(tuple(size), within, out, found.window, found.dtype, found.result_dtype, convolution)
    fitting, unfit, taken = [], [], Counter[str]()
    for branch in branches:
        made = steps(branch, place)
        if isinstance(made, str):
            unfit.append(made)
            continue
        stem = made[0].name.split("/")[0]
        taken[stem] += 1
        if taken[stem] > 1:
            made = tuple(step._replace(name=f"{stem}_{taken[stem]}{step.name[len(stem) :]}") for step in made)
        fitting.append(made)
    if unfit and len(fitting) == 1:
        return f"no branch fits: {'; '.join(dict.fromkeys(unfit))}"
    return Branched(name, found, tuple(fitting), norms)


def _variance(y: jax.Array, channel: int) -> jax.Array:
    return y.var([axis for axis in range(y.ndim) if axis != channel])


def _silence(created: list[Params]) -> None:
    """Let a branch begin at zero, by what its last trained step multiplies with."""
    last = next((params for params in reversed(created) if params), {})
    for name in ("gain", "scale", "kernel"):
        if name in last:
            last[name] = jnp.zeros_like(last[name])
            return
