"""Exponential moving average of a network's variables."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def update_ema(ema: Any, variables: Any, step: jax.Array, decay: float) -> Any:
    """Move the average towards the variables.

    The decay of a step is min(decay, (1 + step) / (10 + step)). Early on, the average therefore forgets its start
    quickly, as in TensorFlow's `ExponentialMovingAverage`.

    Args:
      ema: The average so far, a tree of floating-point arrays.
      variables: A tree of the same structure.
      step: Number of updates made before this one, a scalar.
      decay: Decay of all later steps, in [0, 1).

    Returns:
      decay · ema + (1 - decay) · variables, of the same dtypes. What does not change stays as it is to the last bit.
    """
    now = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda old, new: (old + (1 - now) * (new - old)).astype(old.dtype), ema, variables)
