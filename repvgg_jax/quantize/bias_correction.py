"""The mean error that rounding adds to each channel, taken back by its bias.

A kernel of a few large values rounds many small ones in the same direction. What it computes is then off by a mean,
which is the same for every pixel, and the bias of the layer can take it back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from repvgg_jax.models import RepVGG
from repvgg_jax.quantize.equalization import require_plain_deploy_form
from repvgg_jax.quantize.layers import run_layers
from repvgg_jax.quantize.ranges import Range
from repvgg_jax.quantize.simulation import simulate


def bias_errors(
    model: RepVGG,
    variables: Mapping[str, Any],
    images: jax.Array,
    ranges: Mapping[str, Range],
    *,
    reduce_range: bool = False,
    keep_float: Sequence[str] = (),
) -> dict[str, jax.Array]:
    """Measure by how much 8 bits move the mean of each channel that a layer puts out.

    Each layer reads what the corrected layers before it compute, so that an error is found where it arises. The
    function is pure and works under `jit`. Of several batches of one size, take the mean.

    Args:
      model: The model, in its deploy form and without squeeze-and-excitation.
      variables: Its variables, `{'params'}`, in floating point.
      images: Normalised images, `(batch, height, width, channels)`.
      ranges: Ranges of the activations, from `tensor_ranges`.
      reduce_range: Use 7 of the 8 bits of the kernels.
      keep_float: Names of blocks, or 'head', that stay in float.

    Returns:
      The errors `(channels,)` by the name of the block, and of the dense layer, 'head'.

    Raises:
      ValueError: If the model is in its training form, or has squeeze-and-excitation units.

    References:
      Nagel et al., arXiv:1906.04721, section 4.2, where the mean is computed of the weights; appendix D measures it on
      images, as is done here.
    """
    require_plain_deploy_form(model)
    means: dict[str, jax.Array] = {}
    errors: dict[str, jax.Array] = {}

    def mean(y: jax.Array) -> jax.Array:
        return y.mean(tuple(range(y.ndim - 1)))

    def watch(name: str, y: jax.Array) -> jax.Array:
        means[name] = mean(y)
        return y

    def correct(name: str, y: jax.Array) -> jax.Array:
        errors[name] = mean(y) - means[name]
        return y - jnp.expand_dims(errors[name], range(y.ndim - 1))

    run_layers(model, variables, images, sum_=watch)
    simulate(model, variables, images, ranges, reduce_range=reduce_range, keep_float=keep_float, sum_=correct)
    return errors


def correct_biases(variables: Mapping[str, Any], errors: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Subtract errors from the biases of a deploy form.

    Args:
      variables: Its variables, `{'params'}`.
      errors: The errors from `bias_errors`.

    Returns:
      Variables of the same tree, shapes and dtypes.
    """
    params = dict(variables["params"])
    for name, error in errors.items():
        node = params[name]
        layer = node.get("reparam", node)
        corrected = {**layer, "bias": (layer["bias"] - error).astype(layer["bias"].dtype)}
        params[name] = {**node, "reparam": corrected} if "reparam" in node else corrected
    return {**variables, "params": params}
