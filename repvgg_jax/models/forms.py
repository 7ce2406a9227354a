"""The way from the training form of a network to its deploy form, and back to one that can be trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from repvgg_jax.models.repvgg import RepVGG
from repvgg_jax.reparam import fuse

Tree = dict[str, Any]
Variables = TypeVar("Variables", bound=Mapping[str, Any])


def fuse_model(model: RepVGG, variables: Variables) -> tuple[RepVGG, Variables]:
    """Fuse a model and its variables. The epsilon of the batch norms is read from the model.

    Args:
      model: The network in its training form.
      variables: Its variables, `{'params', 'batch_stats'}`.

    Returns:
      The model in its deploy form and its variables, ready for `apply`.

    Raises:
      ValueError: If the model is in its deploy form already, or `fuse` raises one.

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


def reopen_model(
    model: RepVGG, variables: Mapping[str, Any], images: jax.Array, *, key: jax.Array
) -> tuple[RepVGG, Tree]:
    """Turn a deploy form into a training form that computes the same function.

    What the branches were before they were fused is lost. The 3×3 branch gets the fused kernel and a batch norm that
    changes nothing: its statistics are those of `images`, and its scale and bias undo them. The network is therefore
    the same function both with running statistics and, on these images, with those of the batch. The norms of the other
    branches begin with scale 0, and training gives them their share. Auxiliary heads are new. `fuse_model` leads back
    to the deploy form.

    Args:
      model: The network in its deploy form.
      variables: Its variables, `{'params'}`.
      images: `(batch, height, width, channels)`, normalised: a batch such as training will see.
      key: Random key for the kernels of the 1×1 branches and for auxiliary heads.

    Returns:
      The model in its training form and its variables, `{'params', 'batch_stats'}`.

    Raises:
      ValueError: If the model is in its training form.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from repvgg_jax import create_model, reopen_model
      >>> model = create_model("repvgg_a0", num_classes=10, depths=(1, 1, 1, 1), deploy=True)
      >>> images = jax.random.normal(jax.random.key(0), (4, 32, 32, 3))
      >>> variables = model.init(jax.random.key(1), images, train=False)
      >>> training_model, training_variables = reopen_model(model, variables, images, key=jax.random.key(2))
      >>> sorted(training_variables)
      ['batch_stats', 'params']
    """
    if not model.deploy:
        raise ValueError("the model is in its training form: expected the deploy form, deploy=True")
    training = model.clone(deploy=False)
    fresh = training.init(key, images[:1], train=False)
    _, captured = model.apply(
        variables,
        images,
        train=False,
        capture_intermediates=lambda module, _: module.name == "reparam",
        mutable=["intermediates"],
    )
    params, batch_stats = dict(fresh["params"]), dict(fresh["batch_stats"])
    for name, node in variables["params"].items():
        if "reparam" not in node:
            params[name] = node
            continue
        (output,) = captured["intermediates"][name]["reparam"]["__call__"]
        opened, batch_stats[name] = _open(params[name], batch_stats[name], node["reparam"], output, model.epsilon)
        params[name] = {**node, **opened}
        del params[name]["reparam"]
    return training, {"params": params, "batch_stats": batch_stats}


def require_deploy_form(model: RepVGG) -> None:
    """Raise a ValueError if a model is in its training form."""
    if not model.deploy:
        raise ValueError("the model is in its training form: fuse first, fuse_model(model, variables)")


def _open(params: Tree, batch_stats: Tree, fused: Tree, output: jax.Array, epsilon: float) -> tuple[Tree, Tree]:
    """Return the branches of one block and their statistics; `output` is what the fused convolution computes."""
    dtype = fused["kernel"].dtype
    output = output.astype(jnp.promote_types(dtype, jnp.float32))
    mean, var = output.mean((0, 1, 2)) - fused["bias"], output.var((0, 1, 2))
    branch = {
        "conv": {"kernel": fused["kernel"]},
        "bn": {"scale": jnp.sqrt(var + epsilon).astype(dtype), "bias": (fused["bias"] + mean).astype(dtype)},
    }
    pointwise = params["branch_1x1"]
    opened = {
        "branch_3x3": branch,
        "branch_1x1": {**pointwise, "bn": {**pointwise["bn"], "scale": jnp.zeros_like(pointwise["bn"]["scale"])}},
    }
    if "branch_identity" in params:
        norm = params["branch_identity"]
        opened["branch_identity"] = {**norm, "scale": jnp.zeros_like(norm["scale"])}
    return opened, {**batch_stats, "branch_3x3": {"bn": {"mean": mean.astype(dtype), "var": var.astype(dtype)}}}
