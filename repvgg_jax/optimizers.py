"""Optimizers that train a plain network as its branches would train."""

from __future__ import annotations

from typing import Any

import jax
import optax

__all__ = ["scale_by_branches"]


def scale_by_branches(multipliers: Any) -> optax.GradientTransformation:
    """Multiply the gradients of a plain network so that SGD moves its kernels as it would move their branches.

    The branches are convolutions with constant gains and without norms. The network itself has none: nothing is
    computed twice, and nothing is merged afterwards. Put what adds decay behind this transformation, and the momentum
    last: `optax.chain(scale_by_branches(multipliers), optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))`.

    Args:
      multipliers: The tree of `repvgg_jax.expand(…, norms=False).gradient_multipliers()`, or the part of it that is
        trained: arrays in the shape of the kernels, and the number 1 for all else.

    Returns:
      The transformation. It has no state.

    References:
      Ding et al., *Re-parameterizing Your Optimizers rather than Architectures*, ICLR 2023, arXiv:2205.15242, section
      3.2.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from repvgg_jax.optimizers import scale_by_branches
      >>> optimizer = optax.chain(scale_by_branches({"kernel": jnp.array([1.0, 2.0])}), optax.sgd(0.5))
      >>> kernel = {"kernel": jnp.zeros(2)}
      >>> updates, _ = optimizer.update({"kernel": jnp.ones(2)}, optimizer.init(kernel), kernel)
      >>> updates["kernel"].tolist()
      [-0.5, -1.0]
    """

    def multiply(updates: Any, _: Any = None) -> Any:
        return jax.tree.map(lambda update, by: update * by.astype(update.dtype), updates, multipliers)

    return optax.stateless(multiply)
