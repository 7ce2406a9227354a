"""Structural re-parameterization as a transformation of functions, as `jax.grad` is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax import lax

from repvgg_jax.ops import conv_general_dilated
from repvgg_jax.transform.merging.program import Program
from repvgg_jax.transform.merging.reading.constants import Constant
from repvgg_jax.transform.merging.reading.interpreter import interpret
from repvgg_jax.transform.merging.report import Change, describe, totals
from repvgg_jax.transform.tracing import abstract, require_arrays, signature


class Reparameterized:
    """A function of parameters and inputs whose convolutions are merged. `reparameterize` makes it.

    Attributes:
      params: The parameters by name: folded kernels and biases, and those variables that are used as they are.
    """

    params: dict[str, jax.Array]

    def __init__(
        self,
        function: Callable[..., Any],
        variables: Any,
        inputs: Sequence[Any],
        convolution: Callable[..., jax.Array],
        fewest: bool,
    ):
        leaves, self._structure = jax.tree.flatten(variables)
        require_arrays(leaves, "reparameterize", "the fold is computed once, in float64 on the host")
        self._function, self._convolution, self._fewest = function, convolution, fewest
        self._variables = list(map(abstract, leaves))
        self._programs: dict[Any, tuple[Program, Any]] = {}
        self._first, _ = self._program(inputs, leaves)
        self.params = {name: jax.device_put(value) for name, value in self._first.take_parameters().items()}

    def __call__(self, params: dict[str, jax.Array], *inputs: Any) -> Any:
        """Compute what the original function computes of its variables and these inputs.

        Args:
          params: `self.params`, or other arrays of the same names and shapes.
          *inputs: Inputs of any shapes that the original function takes. It is traced anew for each combination of
            shapes.

        Returns:
          What the original function returns.

        Raises:
          ValueError: If `params` are not those of this function, or if inputs of these shapes need other parameters.
        """
        program, structure = self._program(inputs, None)
        differing = {
            name: (np.shape(params[name]) if name in params else "missing", constant.stored_shape)
            for name, constant in program.parameters.items()
            if name not in params or np.shape(params[name]) != constant.stored_shape
        }
        if differing:
            raise ValueError(
                "the parameters are not those of this function: "
                + "; ".join(f"{name} is {found}, expected {wanted}" for name, (found, wanted) in differing.items())
            )
        outputs = program.run(params, jax.tree.leaves(inputs))
        return jax.tree.unflatten(structure, outputs)

    def __repr__(self) -> str:
        convolutions = self.totals["convolutions"]
        return f"<reparameterized function, {convolutions.before} convolutions in {convolutions.after}>"

    @property
    def totals(self) -> dict[str, Change]:
        """What merging changed in 'convolutions', 'multiply-adds' and 'array elements', each before and after.

        Multiply-adds are counted for the inputs that the function was reparameterized with. Array elements are those of
        the variables before, and of the parameters after.
        """
        before = sum(int(np.prod(variable.shape)) for variable in self._variables)
        return totals(self._first, Change(before, sum(param.size for param in self.params.values())))

    def report(self) -> str:
        """Return a text that says what was merged, what was left apart and why, with the totals before and after."""
        return describe(self._first, self.totals)

    def _program(self, inputs: Sequence[Any], leaves: Sequence[Any] | None) -> tuple[Program, Any]:
        """Return the program for inputs of these shapes, and the structure of its results.

        The values of the variables are needed for the first program alone.
        """
        flat, tree = jax.tree.flatten(tuple(inputs))
        avals = tuple(map(abstract, flat))
        key = signature(tree, avals)
        if key not in self._programs:
            program, structure = self._interpret(tree, avals, leaves)
            if leaves is None:
                self._require_known(program)
            self._programs[key] = program, structure
        return self._programs[key]

    def _require_known(self, program: Program) -> None:
        """Raise a ValueError where a program for other inputs needs other parameters than there are."""
        known = {name: constant.fingerprint for name, constant in self._first.parameters.items()}
        unknown = [
            f"{name} {constant.stored_shape}"
            for name, constant in program.parameters.items()
            if known.get(name) != constant.fingerprint
        ]
        if unknown:
            raise ValueError(
                "for these inputs the function folds to other parameters than when it was reparameterized: "
                f"{', '.join(unknown)}. It computes with their sizes, pads by them (strides under 'SAME' do, between "
                "even and odd), or is traced in another way (some exporters replace what libraries call). "
                "Reparameterize once for each such size, with inputs of it"
            )

    def _interpret(self, tree: Any, avals: Sequence[Any], leaves: Sequence[Any] | None) -> tuple[Program, Any]:
        variables = jax.tree.unflatten(self._structure, self._variables)
        trace = jax.make_jaxpr(self._function, return_shape=True)
        closed, shapes = trace(variables, *jax.tree.unflatten(tree, avals))

        def constant(index: int, aval: Any) -> Constant:
            def value() -> Any:
                assert leaves is not None, "what is folded is decided by shapes alone"
                return leaves[index]

            return Constant(aval.shape, aval.dtype, value, derivation=("variable", index))

        constants = [constant(index, aval) for index, aval in enumerate(self._variables)]
        program = interpret(closed, constants, convolution=self._convolution, fewest=self._fewest)
        return program, jax.tree.structure(shapes)


def reparameterize(
    function: Callable[..., Any],
    variables: Any,
    *inputs: Any,
    fewest_convolutions: bool = False,
    ops: Literal["auto", "xla"] = "auto",
) -> Reparameterized:
    """Merge the convolutions of a function, whatever library wrote it.

    The function is traced and read as a program. What does not depend on the inputs is computed once, in float64.
    Convolutions, batch norms in evaluation, scales, shifts, sums, padding by zeros and means over windows are affine:
    chains and sums of them around a convolution become one convolution of the value that they start from, where that
    takes no more multiply-adds. Two convolutions in a row are merged only if one of them has a single tap and neither
    is grouped or transposed. Everything else stays as it is.

    Args:
      function: A function of variables and inputs that JAX can trace, e.g.
        `lambda v, x: model.apply(v, x, train=False)`.
      variables: The variables, a pytree of arrays.
      *inputs: Examples of the inputs, as pytrees of arrays or `jax.ShapeDtypeStruct`. Later inputs may have other
        shapes, as long as the function takes them.
      fewest_convolutions: Whether to apply these merges also where they take more multiply-adds: 1×3 + 3×1 as a 3×3, a
        bottleneck of 1×1 convolutions as one, a mean over windows as a larger kernel.
      ops: "auto" computes with the fast lowerings of `repvgg_jax.ops`, "xla" with XLA's own convolutions, which
        exporters to other formats can read.

    Returns:
      A function `fused`. `fused(fused.params, *inputs)` equals `function(variables, *inputs)` up to rounding, and
      `fused.report()` says what was merged.

    Raises:
      ValueError: If the variables are tracers, or `ops` is neither.

    References:
      Ding et al., *RepVGG*, CVPR 2021, arXiv:2101.03697, section 3.3, and *Diverse Branch Block*, CVPR 2021,
      arXiv:2103.13425, section 3, for the algebra. The interpreter follows "Autodidax" (JAX's documentation).

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from repvgg_jax import reparameterize
      >>> def network(v, x):
      ...     y = jax.lax.conv(x, v["kernel"], (1, 1), "SAME")
      ...     return jax.nn.relu((y - v["mean"][:, None, None]) * v["scale"][:, None, None] + x)
      >>> v = {"kernel": jnp.ones((3, 3, 1, 1)), "mean": jnp.ones(3), "scale": jnp.full(3, 2.0)}
      >>> fused = reparameterize(network, v, jax.ShapeDtypeStruct((1, 3, 8, 8), jnp.float32))
      >>> [(name, param.shape) for name, param in fused.params.items()]
      [('convolution/kernel', (1, 1, 3, 3)), ('convolution/bias', (3,))]
    """
    if ops not in ("auto", "xla"):
        raise ValueError(f"ops is {ops!r}: expected 'auto' or 'xla'")
    convolution = conv_general_dilated if ops == "auto" else lax.conv_general_dilated
    return Reparameterized(function, variables, inputs, convolution, fewest_convolutions)
