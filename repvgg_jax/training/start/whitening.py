"""A stem that decorrelates the pixels of small images from the first step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from repvgg_jax.training.start.near_identity import quieten


def whiten_stem(variables: dict[str, Any], images: jax.Array) -> dict[str, Any]:
    """Put the principal components of the images' patches into the stem's 3×3 kernel, each with both signs.

    The batch norm behind it divides them by their deviations, so that the stem begins with decorrelated channels
    instead of many that all follow brightness. The 1×1 branch begins with scale 0. Both are trained like the rest.
    Channels beyond twice the number of components stay as they are.

    Args:
      variables: Variables of a training form, freshly initialised.
      images: `(batch, height, width, channels)`, normalised as in training. Height and width are at least 3.

    Returns:
      Variables of the same shapes and dtypes.

    References:
      Jordan, *94% on CIFAR-10 in 3.29 Seconds on a Single GPU*, arXiv:2404.00498, section 3.2, where the kernel is
      scaled and frozen, for want of a batch norm.
    """
    stem = variables["params"]["stem"]
    kernel = stem["branch_3x3"]["conv"]["kernel"]
    patches = jax.lax.conv_general_dilated_patches(
        images, (3, 3), (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    ).reshape(-1, images.shape[-1] * 9)
    patches -= patches.mean(0, keepdims=True)
    _, vectors = jnp.linalg.eigh(jnp.matmul(patches.T, patches, precision="highest") / len(patches))
    components = vectors[:, ::-1][:, : kernel.shape[-1] // 2]
    # Patches come with the channel first.
    filters = jnp.concatenate([components, -components], 1).reshape(images.shape[-1], 3, 3, -1).transpose(1, 2, 0, 3)
    # As large as they were: with a batch norm behind them, size sets how fast they turn.
    filters *= jnp.linalg.norm(kernel) / jnp.sqrt(kernel.shape[-1])
    whitened = {
        **stem,
        "branch_3x3": {
            **stem["branch_3x3"],
            "conv": {"kernel": kernel.at[..., : filters.shape[-1]].set(filters.astype(kernel.dtype))},
        },
        "branch_1x1": quieten(stem["branch_1x1"], 0),
    }
    return {**variables, "params": {**variables["params"], "stem": whitened}}
