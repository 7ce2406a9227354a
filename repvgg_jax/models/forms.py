"""The way from the training form of a network to its deploy form, and back to one that can be trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from repvgg_jax.models.repvgg import RepVGG
from repvgg_jax.reparam import fuse, identity_kernel
from repvgg_jax.reparam.networks import SUM_NORMS

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
    branches begin with scale 0, and training gives them their share. In quantizable blocks, the 1×1 branch begins with
    a kernel of 0, and the norm of the sum changes nothing either. Auxiliary heads are new. `fuse_model` leads back to
    the deploy form.

    A deploy form can be opened as blocks of the other kind: `model.clone(block="quantizable")`.

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
    blocks = [block.name for block in model.blocks]
    _, captured = model.apply(
        variables,
        images,
        train=False,
        capture_intermediates=lambda module, _: module.name in ("reparam", *blocks),
        mutable=["intermediates"],
    )
    read = images
    params, batch_stats = dict(fresh["params"]), dict(fresh["batch_stats"])
    for name in blocks:
        node, found = variables["params"][name], captured["intermediates"][name]
        (output,) = found["reparam"]["__call__"]
        opening = (params[name], batch_stats[name], node["reparam"])
        if model.block == "quantizable":
            opened, batch_stats[name] = _open_quantizable(*opening, read, output, model.epsilon)
        else:
            opened, batch_stats[name] = _open(*opening, output, model.epsilon)
        params[name] = {**{key: child for key, child in node.items() if key != "reparam"}, **opened}
        (read,) = found["__call__"]
    params["head"] = variables["params"]["head"]
    return training, {"params": params, "batch_stats": batch_stats}


def require_deploy_form(model: RepVGG) -> None:
    """Raise a ValueError if a model is in its training form."""
    if not model.deploy:
        raise ValueError("the model is in its training form: fuse first, fuse_model(model, variables)")


def _open(params: Tree, batch_stats: Tree, fused: Tree, output: jax.Array, epsilon: float) -> tuple[Tree, Tree]:
    """Return the branches of one block and their statistics; `output` is what the fused convolution computes."""
    norm, statistics = _silent_norm(output, fused["bias"], fused["bias"], epsilon)
    branch = {"conv": {"kernel": fused["kernel"]}, "bn": norm}
    pointwise = params["branch_1x1"]
    opened = {
        "branch_3x3": branch,
        "branch_1x1": {**pointwise, "bn": {**pointwise["bn"], "scale": jnp.zeros_like(pointwise["bn"]["scale"])}},
    }
    if "branch_identity" in params:
        norm = params["branch_identity"]
        opened["branch_identity"] = {**norm, "scale": jnp.zeros_like(norm["scale"])}
    return opened, {**batch_stats, "branch_3x3": {"bn": statistics}}


def _open_quantizable(
    params: Tree, batch_stats: Tree, fused: Tree, read: jax.Array, output: jax.Array, epsilon: float
) -> tuple[Tree, Tree]:
    """Return the branches of one quantizable block and their statistics; `read` is the input of the block."""
    kernel, bias, branch = fused["kernel"], fused["bias"], output
    (name,) = [norm for norm in SUM_NORMS if norm in params]
    if name == "bn_with_identity":
        # The input is in the sum already: the 3×3 branch is what the kernel does beside passing it.
        groups = kernel.shape[3] // kernel.shape[2]
        passing = identity_kernel(kernel.shape[3], groups=groups, size=kernel.shape[:2])
        kernel, branch = kernel - passing.astype(kernel.dtype), branch - read
    inner, inner_statistics = _silent_norm(branch, bias, jnp.zeros_like(bias), epsilon)
    outer, outer_statistics = _silent_norm(output, bias, bias, epsilon)
    opened = {
        "branch_3x3": {"conv": {"kernel": kernel}, "bn": inner},
        "branch_1x1": {"kernel": jnp.zeros_like(params["branch_1x1"]["kernel"])},
        name: outer,
    }
    return opened, {**batch_stats, "branch_3x3": {"bn": inner_statistics}, name: outer_statistics}


def _silent_norm(x: jax.Array, offset: jax.Array, bias: jax.Array, epsilon: float) -> tuple[Tree, Tree]:
    """Return a batch norm that adds `bias` to `x` without its `offset`, and does nothing else; and its statistics."""
    x = x.astype(jnp.promote_types(bias.dtype, jnp.float32))
    mean, var = x.mean((0, 1, 2)) - offset, x.var((0, 1, 2))
    norm = {"scale": jnp.sqrt(var + epsilon).astype(bias.dtype), "bias": (bias + mean).astype(bias.dtype)}
    return norm, {"mean": mean.astype(bias.dtype), "var": var.astype(bias.dtype)}
