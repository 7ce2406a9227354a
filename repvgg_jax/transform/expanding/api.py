"""Convolutions trained as parallel branches, as a transformation of functions: the inverse of `reparameterize`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
from jax import lax

from repvgg_jax.ops import conv_general_dilated
from repvgg_jax.transform.expanding.branched import Init, Norms
from repvgg_jax.transform.expanding.branches import PUBLISHED, Branch, Kernel
from repvgg_jax.transform.expanding.expanded import Expanded, Where


def expand(
    function: Callable[..., Any],
    variables: Any,
    *inputs: Any,
    branches: str | Sequence[Branch] = "repvgg",
    where: Where | None = None,
    init: Init = "same",
    norms: bool = True,
    momentum: float = 0.9,
    epsilon: float = 1e-5,
    key: jax.Array | None = None,
    ops: Literal["auto", "xla"] = "auto",
) -> Expanded:
    """Let the convolutions of a function train as parallel branches, whatever library wrote it.

    The function is traced and read as a program. A convolution whose kernel is one of the variables, perhaps
    transposed, reshaped or cast, and used nowhere else, becomes the sum of branches. All else stays as it is. After
    training, `collapse` puts the one kernel that the branches have become where the caller's was.

    A branch is a linear map with a norm that only scales: `y / √(var(y) + ε) × gain` for each output channel, with the
    variance over batch and pixels. The mean is not subtracted, and there is no bias, so that a branch is a kernel and
    nothing else. Where a batch norm follows the convolution, it subtracts the mean of the sum. Outputs and gradients in
    training are then those of branches with full batch norms.

    Args:
      function: A function of variables and inputs that JAX can trace, as it is trained, e.g. `lambda v, x:
        model.apply(v, x, train=True, mutable=["batch_stats"])`.
      variables: The variables, a pytree of arrays. What is not trained, like running statistics, can be one of the
        inputs.
      *inputs: Examples of the inputs, as pytrees of arrays or `jax.ShapeDtypeStruct`. The variances of the branches are
        measured on a batch of arrays, and are 1 otherwise. Later inputs may have other shapes.
      branches: The branches, as values of `repvgg_jax.transform` with one `Kernel()` among them, or a published set:
        "repvgg", "acnet", "dbb" or "mobileone". Those that do not fit a kernel are left out.
      where: A function of the path of a kernel in the variables, e.g. 'params/Conv_0/kernel', and its shape
        `(spatial…, in/groups, out)` that returns whether to expand it. The default expands all.
      init: "same" begins exactly with the function as it is: the other branches begin at zero. "published" begins as in
        the papers, with the gains of the branches, which are 1 by default.
      norms: Whether branches have norms. Without, their gains are constants.
      momentum: The share of itself that a running variance keeps in a step of training.
      epsilon: Added to a variance.
      key: Key of the random kernels of branches. The default is `jax.random.key(0)`.
      ops: "auto" convolves with the fast lowerings of `repvgg_jax.ops`, "xla" with XLA's own convolutions, which have
        gradients in forward mode, too.

    Returns:
      A function `wide`. `wide(wide.params, wide.state, *inputs, train=True)` returns what the function returns, and the
      next state. `wide.collapse(params, state)` returns variables, and `wide.report()` says what became what.

    Raises:
      ValueError: If the variables are tracers, an argument has no such value, there is not one `Kernel()` among the
        branches, or no convolution of the function can be expanded.

    References:
      Ding et al., *RepVGG*, CVPR 2021, arXiv:2101.03697; *ACNet*, ICCV 2019, arXiv:1908.03930; *Diverse Branch Block*,
      CVPR 2021, arXiv:2103.13425. Vasu et al., *MobileOne*, CVPR 2023, arXiv:2206.04040.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from repvgg_jax import expand
      >>> def network(v, x):
      ...     return jax.nn.relu(jax.lax.conv(x, v["kernel"], (1, 1), "SAME") + v["bias"][:, None, None])
      >>> v = {"kernel": jnp.ones((3, 3, 3, 3)), "bias": jnp.zeros(3)}
      >>> wide = expand(network, v, jax.ShapeDtypeStruct((1, 3, 8, 8), jnp.float32))
      >>> sorted(wide.params["branches"]["kernel"])
      ['1x1', 'identity', 'kernel']
      >>> {name: leaf.shape for name, leaf in wide.collapse(wide.params, wide.state).items()}
      {'bias': (3,), 'kernel': (3, 3, 3, 3)}
    """
    chosen = _chosen(branches)
    for name, value, expected in (
        ("init", init, ("same", "published")),
        ("ops", ops, ("auto", "xla")),
    ):
        if value not in expected:
            raise ValueError(f"{name} is {value!r}: expected {expected[0]!r} or {expected[1]!r}")
    if not 0 <= momentum <= 1 or not epsilon > 0:
        raise ValueError(f"momentum is {momentum} and epsilon {epsilon}: expected 0 to 1, and a positive number")
    wide = Expanded(
        function,
        variables,
        inputs,
        branches=chosen,
        where=where,
        init=init,
        norms=Norms(momentum, epsilon) if norms else None,
        key=jax.random.key(0) if key is None else key,
        convolution=conv_general_dilated if ops == "auto" else lax.conv_general_dilated,
    )
    if not wide.state:
        raise ValueError(f"no convolution of the function can be expanded. {wide.report()}")
    return wide


def _chosen(branches: str | Sequence[Branch]) -> tuple[Branch, ...]:
    if isinstance(branches, str):
        if branches not in PUBLISHED:
            raise ValueError(
                f"branches is {branches!r}: expected one of {', '.join(PUBLISHED)}, or a tuple of branches"
            )
        return PUBLISHED[branches]
    strange = [branch for branch in branches if not isinstance(branch, Branch)]
    if strange:
        raise ValueError(
            f"branches has {strange[0]!r}: expected Kernel, Conv, Identity and Chain, an Average in a Chain"
        )
    if sum(isinstance(branch, Kernel) for branch in branches) != 1:
        raise ValueError(
            f"branches is {tuple(branches)}: expected one Kernel() among them, for the caller's own kernel"
        )
    return tuple(branches)
