"""A deploy form run layer by layer, with something done to the output of each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen as nn

from repvgg_jax.models import RepVGG

Change = Callable[[str, jax.Array], jax.Array]


def run_layers(
    model: RepVGG,
    variables: Mapping[str, Any],
    images: jax.Array,
    *,
    activation: Change = lambda name, y: y,
    sum_: Change = lambda name, y: y,
) -> jax.Array:
    """Compute the logits of a deploy form, and change what lies between its layers.

    Args:
      model: The model, in its deploy form.
      variables: Its variables, `{'params'}`.
      images: Normalised images, `(batch, height, width, channels)`.
      activation: Is given the name and the value of each tensor that a layer reads or the network returns, in the order
        of computation: 'images', each block behind its ReLU, 'pooled', 'logits'. What it returns takes the place of
        the value.
      sum_: Is given the name and the output of each convolution, before its ReLU, by the name of the block, and of the
        dense layer, 'head'. What it returns takes the place of the output.

    Returns:
      The logits, `(batch, num_classes)`.
    """
    blocks = {block.name for block in model.blocks}

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if module.name == "head":
            return activation("logits", sum_("head", call(activation("pooled", args[0]))))
        if module.name == "reparam":
            return sum_(module.parent.name, call(*args, **kwargs))
        y = call(*args, **kwargs)
        return activation(module.name, y) if module.name in blocks else y

    with nn.intercept_methods(intercept):
        logits: Any = model.apply(variables, activation("images", images), train=False)
    return logits
