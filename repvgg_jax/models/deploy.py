"""From a model in its training form to the same model in its deploy form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from repvgg_jax.models.repvgg import RepVGG
from repvgg_jax.reparam import fuse

Variables = TypeVar("Variables", bound=Mapping[str, Any])


def fuse_model(model: RepVGG, variables: Variables) -> tuple[RepVGG, Variables]:
    """Fuse a model and its variables; epsilon is read from the model.

    Args:
      model: in its training form.
      variables: of that model, `{'params', 'batch_stats'}`.

    Returns:
      The model in its deploy form and its variables, ready for `apply`.

    Raises:
      ValueError: the model is in its deploy form already, or as `fuse`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from repvgg_jax import create_model, fuse_model
      >>> model = create_model("repvgg_a0", num_classes=10, depths=(1, 1, 1, 1))
      >>> variables = model.init(jax.random.key(0), jnp.ones((1, 32, 32, 3)), train=False)
      >>> deploy_model, deploy_variables = fuse_model(model, variables)
      >>> deploy_model.apply(deploy_variables, jnp.ones((1, 32, 32, 3)), train=False).shape
      (1, 10)
    """
    if model.deploy:
        raise ValueError("the model is in its deploy form already: expected the training form, deploy=False")
    return model.clone(deploy=True), fuse(variables, epsilon=model.epsilon)
