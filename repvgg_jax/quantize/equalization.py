"""Make the channels of a deploy form alike, without changing what the network computes.

The deploy form of a plain variant is a chain: convolution, ReLU, convolution, ReLU, …, mean, dense. A ReLU is
positively homogeneous, max(0, y / s) = max(0, y) / s for s > 0, and so is the mean. Dividing channel c of a layer's
output by s and multiplying what the next layer reads from it by s therefore changes nothing:

    W2 ∗ ReLU(W1 ∗ x + b1) = (W2 · s) ∗ ReLU((W1 / s) ∗ x + b1 / s)

A number of 8 bits has 255 steps for the largest channel and few for a small one. The scales are chosen so that the
channels of each layer have equal shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from repvgg_jax.models import RepVGG
from repvgg_jax.models.forms import require_deploy_form

_SWEEPS = 40
# Wider than any use, and far from what overflows or vanishes in float32.
_SMALLEST, _LARGEST = 2.0**-30, 2.0**30


def equalize(
    model: RepVGG, variables: Mapping[str, Any], *, ranges: Mapping[str, jax.Array] | None = None
) -> dict[str, Any]:
    """Scale the channels of a deploy form so that quantization loses less, and the network stays the same function.

    Without `ranges` the weights decide (Nagel et al.). Each channel gets the same largest weight where it is written
    and where it is read. With `ranges` the activations decide (Xiao et al., for transformers). Each channel gets a
    largest value that equals the largest weight that reads it.

    The function is pure and works under `jit` and `vmap`.

    Args:
      model: The model, in its deploy form and without squeeze-and-excitation.
      variables: Its variables, `{'params'}`.
      ranges: The largest value of each channel behind each ReLU, `(channels,)` by the name of the block, as
        `activation_ranges` gives them. A channel that is 0 for all images keeps its scale.

    Returns:
      Variables of the same tree, shapes and dtypes.

    Raises:
      ValueError: If the model is in its training form, or has squeeze-and-excitation units, whose sigmoid is not
        homogeneous.

    References:
      Nagel et al., *Data-Free Quantization Through Weight Equalization and Bias Correction*, arXiv:1906.04721, section
      4.1. Xiao et al., *SmoothQuant*, arXiv:2211.10438.
    """
    require_plain_deploy_form(model)
    params = variables["params"]
    names = [block.name for block in model.blocks]
    groups = [block.groups for block in model.blocks] + [1]
    kernels = [params[name]["reparam"]["kernel"] for name in names]
    kernels.append(params["head"]["kernel"][None, None])
    largest = [_largest(kernel, group) for kernel, group in zip(kernels, groups, strict=True)]
    written = None if ranges is None else [_wide(ranges[name]) for name in names]
    scales = _balance(largest, written)

    one = jnp.ones(kernels[0].shape[2], largest[0].dtype)
    equal: dict[str, Any] = dict(params)
    for name, kernel, group, read, write in zip(names, kernels, groups, [one, *scales], scales, strict=False):
        node = params[name]
        bias = node["reparam"]["bias"]
        scaled = {
            "kernel": (_scale_inputs(kernel, read, group) / write[None, None, None]).astype(kernel.dtype),
            "bias": (_wide(bias) / write).astype(bias.dtype),
        }
        equal[name] = {**node, "reparam": {**node["reparam"], **scaled}}
    head = params["head"]
    kernel = (_wide(head["kernel"]) * scales[-1][:, None]).astype(head["kernel"].dtype)
    equal["head"] = {**head, "kernel": kernel}
    return {**variables, "params": equal}


def require_plain_deploy_form(model: RepVGG) -> None:
    """Raise a ValueError unless a model is a chain of convolutions and ReLUs."""
    require_deploy_form(model)
    if model.squeeze_excite is not None:
        raise ValueError(
            f"squeeze_excite is {model.squeeze_excite!r}: expected None, a plain variant; the sigmoid of a "
            "squeeze-and-excitation unit does not keep the scale of a channel"
        )


def _balance(largest: list[jax.Array], written: list[jax.Array] | None) -> list[jax.Array]:
    """The scale of each channel between two layers; `largest[i]` is |W| by input and output of layer i."""
    between = range(len(largest) - 1)
    scales = [jnp.ones(largest[i].shape[1], largest[i].dtype) for i in between]

    def sweep(_: int, scales: list[jax.Array]) -> list[jax.Array]:
        scales = list(scales)
        for i in between:
            following = largest[i + 1] / scales[i + 1][None] if i + 1 < len(scales) else largest[i + 1]
            read = following.max(1)
            if written is None:
                before = largest[i] * scales[i - 1][:, None] if i else largest[i]
                write = before.max(0)
            else:
                write = written[i]
            alive = (write > 0) & (read > 0)
            ratio = jnp.sqrt(jnp.where(alive, write, 1)) / jnp.sqrt(jnp.where(alive, read, 1))
            scales[i] = jnp.clip(ratio, _SMALLEST, _LARGEST)
        return scales

    return list(jax.lax.fori_loop(0, _SWEEPS, sweep, scales))


def _largest(kernel: jax.Array, groups: int) -> jax.Array:
    """|W| at its largest tap, by input and output channel, `(inputs, outputs)`; 0 between different groups."""
    taps = jnp.abs(_wide(kernel)).max((0, 1))
    inputs, outputs = taps.shape
    whole = jnp.zeros((groups, inputs, groups, outputs // groups), taps.dtype)
    own = jnp.arange(groups)
    # Outputs are ordered by group: (inputs, groups, outputs of a group).
    whole = whole.at[own, :, own].set(taps.reshape(inputs, groups, -1).swapaxes(0, 1))
    return whole.reshape(groups * inputs, outputs)


def _scale_inputs(kernel: jax.Array, scale: jax.Array, groups: int) -> jax.Array:
    """A kernel whose input channels are multiplied by a scale."""
    height, width, inputs, outputs = kernel.shape
    grouped = _wide(kernel).reshape(height, width, inputs, groups, outputs // groups)
    return (grouped * scale.reshape(groups, inputs).T[None, None, :, :, None]).reshape(kernel.shape)


def _wide(x: jax.Array) -> jax.Array:
    """In at least float32."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
