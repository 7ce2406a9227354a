"""A function whose convolutions train as parallel branches, and what it becomes afterwards."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr

from repvgg_jax.ops import compiler_options
from repvgg_jax.transform.expanding.branched import Branched, Init, Named, Norms, branched
from repvgg_jax.transform.expanding.branches import Branch, by_channel
from repvgg_jax.transform.expanding.interpreter import Convolve, interpret
from repvgg_jax.transform.expanding.listing import Position
from repvgg_jax.transform.expanding.reading import read
from repvgg_jax.transform.expanding.report import describe
from repvgg_jax.transform.tracing import abstract, require_arrays, signature

Where = Callable[[str, tuple[int, ...]], bool]


class _Program(NamedTuple):
    """A traced function, the structure of its results, its convolutions with branches, and the others with reasons."""

    closed: ClosedJaxpr
    structure: Any
    convolutions: dict[str, Branched]
    left: list[tuple[str, str]]


class Expanded:
    """A function whose convolutions train as parallel branches. `expand` makes it.

    Attributes:
      params: What is trained: 'variables', the caller's tree, and 'branches', the arrays of the branches by the path of
        the kernel, the name of the branch and their own.
      state: What is kept beside it, by the same names: the running variances, or, without norms, the gains.
    """

    params: dict[str, Any]
    state: dict[str, Named]

    def __init__(
        self,
        function: Callable[..., Any],
        variables: Any,
        inputs: Sequence[Any],
        *,
        branches: Sequence[Branch],
        where: Where | None,
        init: Init,
        norms: Norms | None,
        key: jax.Array,
        convolution: Callable[..., jax.Array],
    ):
        self._function, self._branches, self._where = function, tuple(branches), where
        self._norms, self._convolution = norms, convolution
        leaves = jax.tree_util.tree_leaves_with_path(variables)
        require_arrays([leaf for _, leaf in leaves], "expand", "the branches begin once, with arrays of their own")
        self._names = [jax.tree_util.keystr(path, simple=True, separator="/") or "kernel" for path, _ in leaves]
        self._structure = jax.tree.structure(variables)
        self._variables = [abstract(leaf) for _, leaf in leaves]
        self._programs: dict[Hashable, _Program] = {}
        self._first = self._program(inputs)
        self.params, self.state = self._begin(variables, inputs, init, key)
        self._expected = jax.tree.map(np.shape, {"params": self.params, "state": self.state})

    def __call__(self, params: Any, state: Any, *inputs: Any, train: bool) -> tuple[Any, dict[str, Named]]:
        """Compute the function with branches in the place of its convolutions.

        Args:
          params: `self.params`, trained or not.
          state: `self.state`, or what a call returned.
          *inputs: Inputs of any shapes that the function takes. It is traced anew for each combination of shapes.
          train: Whether the norms of the branches scale by the variances of this batch, which then also move the
            running ones. Otherwise they scale by the running ones.

        Returns:
          What the function returns, and the state after it.

        Raises:
          ValueError: If `params` or `state` are not those of this function, or if for inputs of these shapes its
            convolutions are others.
        """
        self._require_expected(params, state)
        return self._run(params, state, inputs, lambda each: partial(each.apply, train=train))

    def collapse(self, params: Any, state: Any) -> Any:
        """Return the caller's own variables, with each kernel the one that its branches have become.

        The function of them is `self(params, state, …, train=False)`, up to rounding. It is pure, and works in jit,
        vmap and grad.

        Args:
          params: `self.params`, trained or not.
          state: The state after training.

        Returns:
          A tree of the structure, shapes and dtypes of the variables.

        Raises:
          ValueError: If `params` or `state` are not those of this function.
        """
        self._require_expected(params, state)
        leaves = jax.tree.leaves(params["variables"])
        for name, each in self._first.convolutions.items():
            variable = leaves[each.found.leaf]
            kernel = each.found.ordered(variable)
            merged = each.merged(params["branches"].get(name, {}), state[name], kernel)
            leaves[each.found.leaf] = each.found.restored(merged, variable)
        return jax.tree.unflatten(self._structure, leaves)

    def gradient_multipliers(self, state: Any = None) -> Any:
        """Return what to multiply gradients of the plain function by, so that SGD trains it as it trains the branches.

        The kernel that branches with constant gains become moves in a step of SGD as a plain kernel whose gradient is
        multiplied, element by element, by the sum of the squares of those gains that reach it. Momentum changes nothing
        in that, nor does decay that is added behind the multipliers: see `repvgg_jax.optimizers.scale_by_branches`.

        Args:
          state: The state, whose gains may be others than at the start. The default is `self.state`.

        Returns:
          A tree of the structure of the variables: an array for a kernel that has branches, and 1 for all else.

        Raises:
          ValueError: If the branches have norms, or one is a `Chain`.

        References:
          Ding et al., *Re-parameterizing Your Optimizers rather than Architectures*, ICLR 2023, arXiv:2205.15242,
          section 3.2.
        """
        if self._norms is not None:
            raise ValueError(
                "the branches have norms, whose scale depends on the batch: expected expand(…, norms=False), where the "
                "gains are constant"
            )
        state = self.state if state is None else state
        leaves: list[Any] = [jnp.ones((), variable.dtype) for variable in self._variables]
        for name, each in self._first.convolutions.items():
            variable = self._variables[each.found.leaf]
            leaves[each.found.leaf] = each.found.restored(each.multiplier(state[name]), variable)
        return jax.tree.unflatten(self._structure, leaves)

    def __repr__(self) -> str:
        expanded, left = len(self._first.convolutions), len(self._first.left)
        return f"<expanded function, {expanded} of {expanded + left} convolutions have branches>"

    def report(self) -> str:
        """Return a text that says which convolutions became which branches, and which were left, and why."""
        before = sum(int(np.prod(variable.shape)) for variable in self._variables)
        after = sum(np.size(leaf) for leaf in jax.tree.leaves(self.params))
        return describe(list(self._first.convolutions.values()), self._first.left, (before, after))

    def _begin(
        self, variables: Any, inputs: Sequence[Any], init: Init, key: jax.Array
    ) -> tuple[dict[str, Any], dict[str, Named]]:
        leaves = jax.tree.leaves(variables)
        seed = np.ravel(jax.random.key_data(key)).tolist()
        branches: dict[str, Named] = {}
        state: dict[str, Named] = {}
        for name, each in self._first.convolutions.items():
            leaf = leaves[each.found.leaf] = jnp.asarray(leaves[each.found.leaf])
            # By its name, so that a convolution begins alike whatever else is expanded; on the host, where nothing is
            # compiled.
            draw = np.random.default_rng([*seed, zlib.crc32(name.encode())])
            made, state[name] = each.create(draw, init, jnp.promote_types(leaf.dtype, jnp.float32))
            if made:
                branches[name] = made
            if self._norms is None and init == "same":
                kernel = each.found.ordered(leaf)
                kernel = by_channel(kernel, 1 / state[name][each.own.name]["gain"], kernel.ndim - 1)
                leaves[each.found.leaf] = each.found.restored(kernel, leaf)
        params = {"variables": jax.tree.unflatten(self._structure, leaves), "branches": branches}
        if self._norms is None:
            return params, state
        if not any(isinstance(leaf, jax.ShapeDtypeStruct | jax.core.Tracer) for leaf in jax.tree.leaves(inputs)):
            measured = jax.jit(partial(self._measured, init=init), compiler_options=compiler_options())
            state = measured(params, state, tuple(inputs))
        if init == "same":
            for name, each in self._first.convolutions.items():
                branches[name] |= each.passing(state[name])
        return params, state

    def _measured(self, params: Any, state: Any, inputs: Sequence[Any], init: Init) -> dict[str, Named]:
        """Return the variances that the branches have on these inputs, where the function is the one to begin with."""
        _, after = self._run(params, state, inputs, lambda each: partial(each.measure, plain=init == "same"))
        return after

    def _run(
        self, params: Any, state: Any, inputs: Sequence[Any], way: Callable[[Branched], Callable[..., Any]]
    ) -> tuple[Any, dict[str, Named]]:
        """Compute the function, its convolutions in a way: a function of their parameters, state, source and kernel."""
        program = self._program(inputs)
        convolutions: dict[Position, Convolve] = {}
        names: dict[Position, str] = {}
        for name, each in program.convolutions.items():
            names[each.found.position] = name
            given = params["branches"].get(name, {}), state[name]
            convolutions[each.found.position] = partial(way(each), *given)
        arguments = [*jax.tree.leaves(params["variables"]), *jax.tree.leaves(inputs)]
        outputs, kept = interpret(program.closed, arguments, convolutions)
        after = {names[position]: each for position, each in kept.items()}
        return jax.tree.unflatten(program.structure, outputs), {name: after[name] for name in state}

    def _program(self, inputs: Sequence[Any]) -> _Program:
        flat, tree = jax.tree.flatten(tuple(inputs))
        avals = tuple(map(abstract, flat))
        key = signature(tree, avals)
        if key not in self._programs:
            program = self._traced(tree, avals)
            if self._programs:
                self._require_same(program)
            self._programs[key] = program
        return self._programs[key]

    def _traced(self, tree: Any, avals: Sequence[Any]) -> _Program:
        variables = jax.tree.unflatten(self._structure, self._variables)
        trace = jax.make_jaxpr(self._function, return_shape=True)
        closed, shapes = trace(variables, *jax.tree.unflatten(tree, avals))
        found, others = read(closed, len(self._variables))
        left = [(self._names[each.leaf] if each.leaf is not None else each.scope, each.reason) for each in others]
        convolutions = {}
        for each in found:
            name = self._names[each.leaf]
            if self._where is not None and not self._where(name, each.shape):
                left.append((name, "`where` leaves it out"))
                continue
            made = branched(name, each, self._branches, self._norms, self._convolution)
            if isinstance(made, str):
                left.append((name, made))
            else:
                convolutions[name] = made
        return _Program(closed, jax.tree.structure(shapes), convolutions, left)

    def _require_same(self, program: _Program) -> None:
        """Raise a ValueError where the convolutions for other inputs are not those that there are parameters for."""

        def described(convolutions: Mapping[str, Branched]) -> dict[str, Any]:
            return {name: (each.found.shape, each.names) for name, each in convolutions.items()}

        first, now = described(self._first.convolutions), described(program.convolutions)
        differing = [name for name in first | now if first.get(name) != now.get(name)]
        if differing:
            raise ValueError(
                f"for inputs of these shapes the function convolves otherwise than when it was expanded, with "
                f"{', '.join(differing)}: expected the same kernels, each used once and at the same stride. Expand it "
                "once for each such shape"
            )

    def _require_expected(self, params: Any, state: Any) -> None:
        found = jax.tree.map(np.shape, {"params": params, "state": state})
        if found == self._expected:
            return
        wanted, given = (
            {jax.tree_util.keystr(path, simple=True, separator="/"): shape for path, shape in _shapes(tree)}
            for tree in (self._expected, found)
        )
        differing = [
            f"{name} is {given.get(name, 'missing')}, expected {wanted.get(name, 'nothing')}"
            for name in wanted | given
            if wanted.get(name) != given.get(name)
        ]
        raise ValueError(f"params and state are not those of this function: {'; '.join(differing[:5])}")


def _shapes(tree: Any) -> list[Any]:
    return jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda each: isinstance(each, tuple))
