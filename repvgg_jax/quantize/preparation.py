"""A deploy form made ready for 8 bits on images: equal channels first, then corrected biases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from repvgg_jax.models import RepVGG
from repvgg_jax.ops import compiler_options
from repvgg_jax.quantize.bias_correction import bias_errors, correct_biases
from repvgg_jax.quantize.equalization import equalize, require_plain_deploy_form
from repvgg_jax.quantize.processor import saturates
from repvgg_jax.quantize.ranges import activation_ranges, tensor_ranges, widen

_BATCH = 64


class Prepared(NamedTuple):
    """A deploy form that is ready to be quantized.

    Attributes:
      equalized: Variables that compute the same function as before, with channels made alike.
      corrected: The same with biases that take back the mean error of 8 bits. Quantize these.
    """

    equalized: dict[str, Any]
    corrected: dict[str, Any]


def prepare(
    model: RepVGG,
    variables: Mapping[str, Any],
    images: jax.Array,
    *,
    equal_channels: bool = True,
    corrected_biases: bool = True,
    reduce_range: bool | None = None,
    keep_float: Sequence[str] = (),
) -> Prepared:
    """Make a deploy form ready for 8 bits.

    The steps are those of `equalize`, by the ranges of the activations, and of `correct_biases`.

    Args:
      model: The model, in its deploy form and without squeeze-and-excitation.
      variables: Its variables, `{'params'}`.
      images: Normalised training images, `(images, height, width, channels)`. Some hundred are enough. They are
        computed in batches of 64; of more than 64, an incomplete last batch corrects no bias.
      equal_channels: Whether to make channels alike.
      corrected_biases: Whether to correct biases.
      reduce_range: Whether the kernels will have 7 of 8 bits. The default is what the processor at hand needs.
      keep_float: Names of blocks, or 'head', that will stay in float.

    Returns:
      The variables after each step.

    Raises:
      ValueError: If there are no images, the model is in its training form, or it has squeeze-and-excitation units.
    """
    require_plain_deploy_form(model)
    if not len(images):
        raise ValueError("images are none: expected at least one to calibrate with")
    equal: dict[str, Any] = dict(variables)
    if equal_channels:
        largest = _over(partial(activation_ranges, model), images, partial(jax.tree.map, jnp.maximum), equal)
        equal = equalize(model, equal, ranges=largest)
    if not corrected_biases:
        return Prepared(equal, equal)
    ranges = _over(partial(tensor_ranges, model), images, widen, equal)
    whole = images[: len(images) // _BATCH * _BATCH] if len(images) > _BATCH else images
    reduce_range = saturates() if reduce_range is None else reduce_range
    measure = partial(bias_errors, model, reduce_range=reduce_range, keep_float=keep_float)
    sums = _over(measure, whole, partial(jax.tree.map, jnp.add), equal, ranges)
    batches = -(-len(whole) // _BATCH)
    return Prepared(equal, correct_biases(equal, jax.tree.map(lambda error: error / batches, sums)))


def _over(
    measure: Callable[..., Any], images: jax.Array, combine: Callable[[Any, Any], Any], variables: Any, *others: Any
) -> Any:
    """Measure something on every batch of images, compiled, and combine what is found."""
    compiled = jax.jit(measure, compiler_options=compiler_options())
    found = compiled(variables, images[:_BATCH], *others)
    for start in range(_BATCH, len(images), _BATCH):
        found = combine(found, compiled(variables, images[start : start + _BATCH], *others))
    return found
