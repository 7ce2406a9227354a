"""Numbers of 8 bits simulated in floating point, as ONNX Runtime computes them, with gradients that pass straight.

A weight is `scale · q` with q from −127 to 127, one scale for each output channel of a kernel. An activation is
`scale · (q − zero)` with q from 0 to 255. A bias is `scale · q` with q of 32 bits, and the scale is that of the input
times that of the kernel, so that products and bias are sums of integers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from repvgg_jax.models import RepVGG
from repvgg_jax.quantize.equalization import require_plain_deploy_form
from repvgg_jax.quantize.layers import Change, run_layers
from repvgg_jax.quantize.ranges import Range

_LEVELS = 255
# As ONNX Runtime: 7 of 8 bits, where products would saturate.
_LARGEST, _LARGEST_REDUCED = 127, 64


def fake_quantize(x: jax.Array, range_: Range) -> jax.Array:
    """Round an array to the 256 values that 8 bits have for a range.

    Args:
      x: The array.
      range_: Its range. What lies outside of it becomes its nearest end.

    Returns:
      The rounded array, of the same dtype. Its gradient is that of the array within the range, and 0 outside of it.

    References:
      Jacob et al., arXiv:1712.05877, section 3.
    """
    low, high = (jax.lax.stop_gradient(end).astype(x.dtype) for end in range_)
    scale = _positive((high - low) / _LEVELS)
    zero = jnp.round(-low / scale)
    clipped = jnp.clip(x, -zero * scale, (_LEVELS - zero) * scale)
    return _straight_through(clipped, jnp.round(clipped / scale) * scale)


def fake_quantize_weights(
    model: RepVGG,
    variables: Mapping[str, Any],
    ranges: Mapping[str, Range],
    *,
    reduce_range: bool = False,
    keep_float: Sequence[str] = (),
) -> dict[str, Any]:
    """Round the kernels of a deploy form to 8 bits, and its biases to 32.

    Args:
      model: The model, in its deploy form and without squeeze-and-excitation.
      variables: Its variables, `{'params'}`.
      ranges: Ranges of the activations, from `tensor_ranges`. The scales of the biases follow from them.
      reduce_range: Use 7 of the 8 bits of the kernels.
      keep_float: Names of blocks, or 'head', that are not rounded.

    Returns:
      Variables of the same tree, shapes and dtypes. Their gradients are those of `variables`.

    Raises:
      ValueError: If the model is in its training form, or has squeeze-and-excitation units.
    """
    require_plain_deploy_form(model)
    params = dict(variables["params"])
    largest = _LARGEST_REDUCED if reduce_range else _LARGEST
    read = "images"
    for block in model.blocks:
        if block.name not in keep_float:
            node = params[block.name]
            params[block.name] = {**node, "reparam": _quantize_layer(node["reparam"], ranges[read], largest)}
        read = block.name
    if "head" not in keep_float:
        params["head"] = _quantize_layer(params["head"], ranges["pooled"], largest)
    return {**variables, "params": params}


def rounded_activations(model: RepVGG, keep_float: Sequence[str] = ()) -> set[str]:
    """Return the names of the activations that a layer in 8 bits computes or reads, as in `tensor_ranges`."""
    layers = [*(block.name for block in model.blocks), "head"]
    quantized = [name for name in layers if name not in keep_float]
    read = dict(zip(layers, ["images", *layers[:-2], "pooled"], strict=True))
    inside = {"pooled", "logits"} if "head" in quantized else set()
    return inside | {read[name] for name in quantized} | set(quantized) - {"head"}


def simulate(
    model: RepVGG,
    variables: Mapping[str, Any],
    images: jax.Array,
    ranges: Mapping[str, Range],
    *,
    reduce_range: bool = False,
    keep_float: Sequence[str] = (),
    watch: Change = lambda name, y: y,
    sum_: Change = lambda name, y: y,
) -> jax.Array:
    """Compute the logits that a deploy form has in 8 bits.

    Args:
      model: The model, in its deploy form and without squeeze-and-excitation.
      variables: Its variables, `{'params'}`, in floating point.
      images: Normalised images, `(batch, height, width, channels)`.
      ranges: Ranges of the activations, from `tensor_ranges`.
      reduce_range: Use 7 of the 8 bits of the kernels.
      keep_float: Names of blocks, or 'head', that stay in float.
      watch: Is given the name and the value of each activation before it is rounded, and returns it, or another.
      sum_: Is given the name and the output of each layer before its ReLU, as for `run_layers`.

    Returns:
      The logits, `(batch, num_classes)`.

    Raises:
      ValueError: If the model is in its training form, or has squeeze-and-excitation units.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from repvgg_jax import create_model
      >>> from repvgg_jax.quantize import simulate, tensor_ranges
      >>> model = create_model("repvgg_a0", num_classes=10, depths=(1, 1, 1, 1), deploy=True)
      >>> images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
      >>> variables = model.init(jax.random.key(1), images, train=False)
      >>> simulate(model, variables, images, tensor_ranges(model, variables, images)).shape
      (2, 10)
    """
    quantized = fake_quantize_weights(model, variables, ranges, reduce_range=reduce_range, keep_float=keep_float)
    rounded = rounded_activations(model, keep_float)

    def activation(name: str, y: jax.Array) -> jax.Array:
        y = watch(name, y)
        return fake_quantize(y, ranges[name]) if name in rounded else y

    return run_layers(model, quantized, images, activation=activation, sum_=sum_)


def _quantize_layer(layer: Mapping[str, jax.Array], read: Range, largest: int) -> dict[str, jax.Array]:
    kernel, bias = layer["kernel"], layer["bias"]
    scale = _positive(jnp.abs(kernel).max(tuple(range(kernel.ndim - 1))) / largest)
    of_bias = scale * _positive((read.high - read.low) / _LEVELS).astype(scale.dtype)
    wide = jnp.expand_dims(scale, range(kernel.ndim - 1))
    return {
        **layer,
        "kernel": _straight_through(kernel, jnp.round(kernel / wide) * wide),
        "bias": _straight_through(bias, jnp.round(bias / of_bias) * of_bias),
    }


def _straight_through(x: jax.Array, rounded: jax.Array) -> jax.Array:
    return x + jax.lax.stop_gradient(rounded - x)


def _positive(scale: jax.Array) -> jax.Array:
    """1 in place of the scale of a tensor that is 0 everywhere."""
    return jax.lax.stop_gradient(jnp.where(scale > 0, scale, 1))
