"""Look-alikes, side by side: functions that one convolution can compute, and functions that only look like it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.transform.merging.networks import convolve

# All axes are equally long: an axis that is mistaken for another makes no error of shapes, but a wrong result.
SIZE = 4
SHAPES = {
    "full": (3, 3, 4, 4), "other": (3, 3, 4, 4), "point": (1, 1, 4, 4), "second": (1, 1, 4, 4), "wide": (1, 3, 4, 4),
    "even": (2, 2, 4, 4), "large": (5, 5, 4, 4), "paired": (3, 3, 2, 4), "each": (3, 3, 1, 4), "single": (1, 1, 1, 4),
    "two": (1, 1, 2, 4), "down": (1, 1, 4, 1), "up": (1, 1, 1, 4), "fewer": (3, 3, 4, 3), "more": (3, 3, 4, 5),
    "scale": (4,), "shift": (4,), "bias": (4,), "rows": (4, 1, 1), "images": (4, 1, 1, 1), "map": (4, 4), "one": (1,),
}  # fmt: skip


def variables():
    rng = np.random.default_rng(0)
    drawn = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in SHAPES.items()}
    return drawn | {"number": jnp.asarray(1.5)}


def pad(x, axis, low, high):
    return jnp.pad(x, [(low, high) if each == axis else (0, 0) for each in range(x.ndim)])


def layout(x, kernel, numbers):
    return lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)


def pool(x, size=2, strides=(1, 1, 1, 1), padding="SAME", **dilations):
    return lax.reduce_window(x, 0.0, lax.add, (1, size, size, 1), strides, padding, **dilations)


def transposed(x, kernel, padding=((1, 2), (1, 2)), stride=1, along=(2, 2)):
    return convolve(x, kernel, padding, stride, lhs_dilation=along)


def batch_grouped(x, kernel):
    return convolve(x, kernel, batch_group_count=2)


class Case(NamedTuple):
    network: Callable[..., Any]
    convolutions: int
    """Of the cheapest program."""
    fewest: int
    """Of the one that was asked for the fewest."""


def case(network, convolutions, fewest=None):
    return Case(network, convolutions, convolutions if fewest is None else fewest)


VALID, NEXT = "VALID", ((0, 0), (-1, 1))
COMBINATIONS = {
    # Views of one value are not one another.
    "neighbours": case(lambda v, x: x[:, 1:] - x[:, :-1], 0),
    "neighbours along the width, added": case(lambda v, x: x[:, :, 1:] + x[:, :, :-1], 0),
    "neighbouring channels": case(lambda v, x: x[..., 1:] - x[..., :-1], 0),
    "neighbouring images": case(lambda v, x: x[1:] - x[:-1], 0),
    "pads at other ends": case(lambda v, x: pad(x, 1, 1, 0) + pad(x, 1, 0, 1), 0),
    "pads along other axes": case(lambda v, x: pad(x, 1, 1, 0)[:, :4] - pad(x, 2, 1, 0)[:, :, :4], 0),
    "even and odd pixels": case(lambda v, x: x[:, ::2] - x[:, 1::2], 0),
    "every second and the first": case(lambda v, x: x[:, ::2] + x[:, :2], 0),
    "a value and its mirror": case(lambda v, x: x - x[:, ::-1], 0),
    "scaled neighbours": case(lambda v, x: x[:, 1:] * v["scale"] + x[:, :-1] * v["shift"], 0),
    "one view twice": case(lambda v, x: x[:, 1:] * v["scale"] + x[:, 1:], 0),
    "views beside a convolution": case(
        lambda v, x: convolve(x, v["point"], ((-1, 0), (0, 0))) + x[:, 1:] + x[:, :-1], 1
    ),
    "the value beside a view": case(lambda v, x: x + pad(x[:, 1:], 1, 0, 1), 0),
    # Views of channels and of the batch are no identity kernels, and no padding of a convolution.
    "a part of the channels beside": case(lambda v, x: convolve(x, v["fewer"]) + x[..., 1:], 1),
    "padded channels beside": case(lambda v, x: convolve(x, v["more"]) + pad(x, 3, 0, 1), 1),
    "every second channel before": case(lambda v, x: convolve(x[..., ::2], v["two"]), 1),
    "padded channels before": case(lambda v, x: convolve(pad(x[..., 1:], 3, 0, 1), v["full"]), 1),
    "padded images before": case(lambda v, x: convolve(pad(x, 0, 1, 0), v["full"]), 1),
    "every second image before": case(lambda v, x: convolve(x[::2], v["full"]), 1),
    "every second pixel before": case(lambda v, x: convolve(x[:, ::2], v["point"], VALID), 1),
    "padded before": case(lambda v, x: convolve(pad(x, 1, 2, 1), v["full"]), 1),
    "cropped at one end and padded at the other before": case(
        lambda v, x: convolve(lax.pad(x, 0.0, [(0, 0, 0), (-1, 1, 0), (1, -1, 0), (0, 0, 0)]), v["full"]), 1
    ),
    "padded and scaled before": case(lambda v, x: convolve(pad(x, 1, 2, 1) * v["scale"], v["full"], VALID), 1),
    "padded and shifted before": case(lambda v, x: convolve(pad(x, 1, 2, 1) + v["shift"], v["full"], VALID), 1),
    "padded before a transposed one": case(
        lambda v, x: transposed(pad(x, 1, 1, 0), v["full"]), 1
    ),
    "padded with ones": case(lambda v, x: convolve(jnp.pad(x, 1, constant_values=1.0)[1:5, ..., 1:5], v["full"]), 1),
    "padded with a variable": case(
        lambda v, x: convolve(lax.pad(x, v["number"], [(0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)]), v["full"]), 1
    ),
    "zeros between": case(
        lambda v, x: convolve(lax.pad(x, 0.0, [(0, 0, 0), (1, 1, 1), (1, 1, 1), (0, 0, 0)]), v["full"], VALID), 1
    ),
    "cropped by a pad": case(
        lambda v, x: convolve(lax.pad(x, 0.0, [(0, 0, 0), (-1, 1, 0), (0, 0, 0), (0, 0, 0)]), v["full"]), 1
    ),
    "all but the first row, padded in front": case(lambda v, x: convolve(x[:, 1:], v["even"], ((1, 0), (0, 0))), 1),
    "all but the last row, padded behind": case(lambda v, x: convolve(x[:, :-1], v["even"], ((0, 1), (0, 0))), 1),
    "all but the first column, padded": case(lambda v, x: convolve(x[:, :, 1:], v["full"]), 1),
    "all but the last column, padded": case(lambda v, x: convolve(x[:, :, :-1], v["full"]), 1),
    "a part, unpadded": case(lambda v, x: convolve(x[:, 1:, :-1], v["even"], VALID), 1),
    # What is scaled or shifted before a convolution.
    "scaled before": case(lambda v, x: convolve(x * v["scale"], v["full"]), 1),
    "shifted before": case(lambda v, x: convolve(x * v["scale"] + v["shift"], v["full"], VALID), 1),
    "shifted before a cropping one": case(lambda v, x: convolve(x + v["shift"], v["point"], ((-1, 0), (0, -1))), 1),
    "shifted before padding": case(lambda v, x: convolve(x + v["shift"], v["full"]), 1),
    "shifted before padding in front alone": case(
        lambda v, x: convolve(x + v["shift"], v["even"], ((0, 0), (1, 0))), 1
    ),
    "shifted before padding behind alone": case(
        lambda v, x: convolve(x + v["shift"], v["even"], ((0, 0), (0, 1))), 1
    ),
    "shifted before a transposed one": case(
        lambda v, x: transposed(x * v["scale"] + v["shift"], v["full"], ((0, 0), (0, 0))), 1
    ),
    "shifted before one transposed along the width": case(
        lambda v, x: transposed(x + v["shift"], v["full"], ((0, 0), (0, 0)), along=(1, 2)), 1
    ),
    "scaled before a transposed one": case(
        lambda v, x: convolve(x * v["scale"], v["full"], ((2, 2), (2, 2)), lhs_dilation=(2, 2)), 1
    ),
    "scaled before groups": case(lambda v, x: convolve(x * v["scale"], v["paired"], feature_group_count=2), 1),
    "shifted before groups": case(
        lambda v, x: convolve(x + v["shift"], v["paired"], VALID, feature_group_count=2) * v["scale"], 1
    ),
    "scaled before groups of the batch": case(lambda v, x: batch_grouped(x * v["scale"], v["full"]), 1),
    "a norm after groups of the batch": case(
        lambda v, x: batch_grouped(x, v["full"]) * v["scale"] + v["shift"], 1
    ),
    "rows scaled before": case(lambda v, x: convolve(x * v["rows"], v["full"]), 1),
    "rows shifted before": case(lambda v, x: convolve(x * v["scale"] + v["rows"], v["full"], VALID), 1),
    "shifted by one number before": case(lambda v, x: convolve(x + v["number"], v["full"], VALID), 1),
    "scaled by one number before": case(lambda v, x: convolve(x * v["number"], v["full"]), 1),
    "scaled by a number of the program before": case(lambda v, x: convolve(x * 0.5, v["full"]), 1),
    "scaled by numbers of the program before": case(lambda v, x: convolve(x * jnp.arange(1.0, 5.0), v["full"]), 1),
    # What is scaled or shifted after it.
    "rows scaled after": case(lambda v, x: convolve(x, v["full"]) * v["rows"], 1),
    "rows shifted after": case(lambda v, x: convolve(x, v["full"]) + v["rows"], 1),
    "images scaled after": case(lambda v, x: convolve(x, v["full"]) * v["images"], 1),
    "a map of pixels and channels after": case(lambda v, x: convolve(x, v["full"]) * v["map"], 1),
    "rows of the value beside": case(lambda v, x: convolve(x, v["full"]) + x * v["rows"], 1),
    "shifted rows of the value beside": case(lambda v, x: convolve(x, v["full"]) + (x + v["rows"]), 1),
    "an affine sum": case(lambda v, x: (convolve(x, v["full"]) + x + v["shift"]) * v["scale"] - v["bias"], 1),
    "one minus it": case(lambda v, x: v["shift"] - (convolve(x, v["full"]) + x / v["scale"]), 1),
    "divided by it": case(lambda v, x: v["shift"] / (jnp.square(convolve(x, v["full"])) + 1), 1),
    "two shifts and scales": case(
        lambda v, x: (convolve(x, v["full"]) + v["shift"]) * v["scale"] + (convolve(x, v["point"]) - v["bias"]) / 2, 1
    ),
    "the value twice beside": case(lambda v, x: convolve(x, v["full"]) + x * v["scale"] + x, 1),
    # Layouts and precisions.
    "another layout beside": case(
        lambda v, x: convolve(x, v["full"]) + layout(x, v["full"], ("NCHW", "HWIO", "NCHW")), 2
    ),
    "a layout that changes, beside the value": case(
        lambda v, x: layout(x, v["full"], ("NHWC", "HWIO", "NCHW")) + x, 1
    ),
    "another layout after": case(
        lambda v, x: layout(convolve(x, v["point"]), v["full"], ("NCHW", "HWIO", "NCHW")), 2
    ),
    "a layout that changes, and on": case(
        lambda v, x: layout(layout(x, v["point"], ("NHWC", "HWIO", "NCHW")), v["full"], ("NCHW", "HWIO", "NWHC")), 1
    ),
    "a layout that changes last": case(
        lambda v, x: layout(convolve(x, v["full"]), v["point"], ("NHWC", "HWIO", "CNWH")), 1
    ),
    "another precision beside": case(
        lambda v, x: convolve(x, v["full"]) + convolve(x, v["point"], precision="highest"), 2
    ),
    "another precision after": case(
        lambda v, x: convolve(convolve(x, v["full"], precision="highest"), v["point"]), 2
    ),
    "another accumulator beside": case(
        lambda v, x: convolve(x, v["full"]) + convolve(x, v["point"], preferred_element_type=jnp.float64), 1
    ),
    # Two in a row.
    "1×1, then 3×3": case(lambda v, x: convolve(convolve(x, v["point"]), v["full"]), 1),
    "3×3, then 1×1": case(lambda v, x: convolve(convolve(x, v["full"]), v["point"]), 1),
    "3×3, then 3×3": case(lambda v, x: convolve(convolve(x, v["full"]), v["other"]), 2),
    "1×1 and shifts, then 3×3": case(
        lambda v, x: convolve(convolve(x + v["bias"], v["point"]) + v["shift"], v["full"], VALID) + v["scale"], 1
    ),
    "shift, 1×1, then a padded 3×3": case(lambda v, x: convolve(convolve(x + v["bias"], v["point"]), v["full"]), 2),
    "3×3 and shifts, then 1×1": case(
        lambda v, x: (convolve(convolve(x + v["bias"], v["full"], VALID) + v["shift"], v["point"])) * v["scale"], 1
    ),
    "padded 1×1, then 3×3": case(
        lambda v, x: convolve(convolve(x, v["point"], ((1, 2), (0, 1))), v["full"], VALID), 1
    ),
    "1×1 of stride 2, then 3×3": case(lambda v, x: convolve(convolve(x, v["point"], stride=2), v["full"]), 2),
    "1×1 that crops, then 3×3": case(
        lambda v, x: convolve(convolve(x, v["point"], ((-1, 0), (0, 0))), v["full"]), 2
    ),
    "1×1, then 3×3 of stride 2, dilated": case(
        lambda v, x: convolve(convolve(x, v["point"]), v["full"], ((2, 1), (3, 2)), 2, rhs_dilation=(2, 1)), 1
    ),
    "dilated 3×3 of stride 2, then 1×1": case(
        lambda v, x: convolve(convolve(x, v["full"], ((2, 1), (3, 2)), 2, rhs_dilation=(2, 1)), v["point"]), 1
    ),
    "3×3, then 1×1 of stride 2": case(lambda v, x: convolve(convolve(x, v["full"]), v["point"], stride=2), 2),
    "3×3, then 1×1 that pads": case(
        lambda v, x: convolve(convolve(x, v["full"]), v["point"], ((0, 1), (1, 0))), 2
    ),
    "3×3, then 1×1 that crops": case(
        lambda v, x: convolve(convolve(x, v["full"]), v["point"], ((0, -1), (0, 0))), 2
    ),
    "groups, then 1×1": case(
        lambda v, x: convolve(convolve(x, v["paired"], feature_group_count=2), v["point"]), 2
    ),
    "1×1, then groups": case(
        lambda v, x: convolve(convolve(x, v["point"]), v["paired"], feature_group_count=2), 2
    ),
    "groups of the batch, then 1×1": case(lambda v, x: convolve(batch_grouped(x, v["full"]), v["point"]), 2),
    "1×1, then groups of the batch": case(lambda v, x: batch_grouped(convolve(x, v["point"]), v["full"]), 2),
    "transposed 3×3, then 1×1": case(
        lambda v, x: convolve(transposed(x, v["full"]), v["point"]), 2
    ),
    "1×1, then transposed 3×3": case(
        lambda v, x: transposed(convolve(x, v["point"]), v["full"]), 2
    ),
    "a residual sum, then 1×1": case(lambda v, x: convolve(convolve(x, v["full"]) + x, v["point"]), 1),
    "branches, then 1×1": case(
        lambda v, x: convolve(convolve(x, v["full"]) + convolve(x, v["point"]), v["second"]), 1
    ),
    "branches that stay two, then 1×1": case(
        lambda v, x: convolve(
            convolve(x, v["full"], rhs_dilation=(2, 2)) + convolve(x, v["other"], ((1, 1), (1, 1))), v["point"]
        ), 3,
    ),
    "a residual that stays, then 1×1": case(
        lambda v, x: convolve(convolve(x, v["point"], NEXT) + x, v["second"]), 2, 1
    ),
    "a bottleneck, scaled": case(
        lambda v, x: (convolve(convolve(x, v["down"]), v["up"]) * v["scale"] + v["shift"]) * 2, 2, 1
    ),
    "a bottleneck with a shift, scaled": case(
        lambda v, x: convolve(convolve(x, v["down"]) + v["one"], v["up"]) * v["scale"] + v["shift"], 2, 1
    ),
    "a bottleneck beside the value": case(
        lambda v, x: convolve(convolve(x, v["down"]), v["up"]) * v["scale"] + x, 2, 1
    ),
    # Sums of two.
    "3×3 + 1×1 that pads less": case(lambda v, x: convolve(x, v["full"]) + convolve(x, v["point"]), 1),
    "1×1 + 3×3 below a 5×5": case(
        lambda v, x: convolve(x, v["point"]) + convolve(x, v["full"]) + convolve(x, v["large"]), 1
    ),
    "2×2 at either end": case(
        lambda v, x: convolve(x, v["even"], ((1, 0), (1, 0))) + convolve(x, v["full"]) + convolve(
            x, v["even"], ((0, 1), (0, 1))
        ), 1,
    ),
    "dilated alike": case(
        lambda v, x: convolve(x, v["full"], rhs_dilation=(2, 2)) + convolve(x, v["other"], rhs_dilation=(2, 2)), 1
    ),
    "dilated otherwise": case(
        lambda v, x: convolve(x, v["full"], rhs_dilation=(2, 2)) + convolve(x, v["other"]), 2
    ),
    "dilated, over the taps of a larger one": case(
        lambda v, x: convolve(x, v["large"]) + convolve(x, v["full"], rhs_dilation=(2, 2)), 2
    ),
    "dilated, below another's taps": case(
        lambda v, x: convolve(x, v["full"], rhs_dilation=(2, 2)) + convolve(x, v["wide"], ((0, 0), (2, 0))), 2
    ),
    "two taps, of no dilation that counts": case(
        lambda v, x: convolve(x, v["point"], NEXT, rhs_dilation=(3, 3)) + convolve(x, v["second"], rhs_dilation=(2, 2)),
        1,
    ),
    "one tap, and two dilated": case(
        lambda v, x: convolve(x, v["point"]) + convolve(x, v["even"], ((0, 2), (0, 2)), rhs_dilation=(2, 2)), 1
    ),
    "two dilated taps beside three": case(
        lambda v, x: convolve(x, v["full"]) + convolve(x, v["even"], ((1, 1), (1, 1)), rhs_dilation=(2, 2)), 2
    ),
    "dilated by three alike": case(
        lambda v, x: convolve(x, v["full"], ((2, 4), (2, 4)), rhs_dilation=(3, 3)) + convolve(
            x, v["other"], ((2, 4), (2, 4)), rhs_dilation=(3, 3)
        ), 1,
    ),
    "dilated along one axis": case(
        lambda v, x: convolve(x, v["wide"], rhs_dilation=(1, 2)) + convolve(x, v["wide"]), 2
    ),
    "dilated, and one tap": case(
        lambda v, x: convolve(x, v["full"], rhs_dilation=(2, 2)) + convolve(x, v["point"], rhs_dilation=(3, 3)), 1
    ),
    "dilated, and one tap between its own": case(
        lambda v, x: convolve(x, v["full"], rhs_dilation=(2, 2)) + convolve(x, v["point"], NEXT), 2
    ),
    "dilated, and the value": case(lambda v, x: convolve(x, v["full"], rhs_dilation=(2, 2)) + x * v["scale"], 1),
    "another stride": case(
        lambda v, x: convolve(x, v["full"], ((1, 1), (1, 1)), 2) + convolve(x, v["full"], VALID), 2
    ),
    "another stride, beside a part": case(
        lambda v, x: convolve(x, v["point"], stride=2) + x[:, :2, :2] * v["scale"], 1
    ),
    "strides of 2": case(
        lambda v, x: convolve(x, v["full"], ((1, 1), (1, 1)), 2) + convolve(x, v["point"], VALID, 2), 1
    ),
    "strides of 2 that see the last pixel": case(
        lambda v, x: convolve(x, v["even"], ((0, 0), (0, 0)), 2) + convolve(x, v["point"], ((0, -1), (0, 0)), 2), 1
    ),
    "groups of two and of four": case(
        lambda v, x: convolve(x, v["paired"], feature_group_count=2) + convolve(x, v["single"], feature_group_count=4),
        1,
    ),
    "groups and the value": case(lambda v, x: convolve(x, v["paired"], feature_group_count=2) + x * v["scale"], 1),
    "depthwise and full": case(
        lambda v, x: convolve(x, v["each"], feature_group_count=4) + convolve(x, v["full"]), 1
    ),
    "groups of the batch beside themselves": case(
        lambda v, x: batch_grouped(x, v["full"]) + batch_grouped(x, v["point"]), 2
    ),
    "groups of the batch beside none": case(
        lambda v, x: batch_grouped(x, v["full"]) + convolve(x, v["other"], stride=1)[:2], 2
    ),
    "transposed alike": case(
        lambda v, x: transposed(x, v["full"]) + transposed(x, v["other"]), 1
    ),
    "transposed, at other places": case(
        lambda v, x: convolve(x, v["full"], ((1, 1), (1, 1)), lhs_dilation=(2, 2)) + convolve(
            x, v["full"], ((0, 2), (2, 0)), lhs_dilation=(2, 2)
        ), 1,
    ),
    "transposed, of other sizes": case(
        lambda v, x: convolve(x, v["full"], ((1, 1), (1, 1)), lhs_dilation=(2, 2)) + convolve(
            x, v["point"], ((0, 0), (0, 0)), lhs_dilation=(2, 2)
        ), 1,
    ),
    "transposed and not": case(
        lambda v, x: convolve(x, v["full"], ((2, 1), (2, 1)), 2, lhs_dilation=(2, 2)) + convolve(x, v["full"]), 2
    ),
    "transposed and cropped, and not": case(
        lambda v, x: transposed(x, v["full"], ((0, -1), (0, -1))) + convolve(x, v["large"]), 2
    ),
    "not transposed, and transposed and cropped": case(
        lambda v, x: convolve(x, v["point"]) + transposed(x, v["full"], ((0, -1), (0, -1))), 2
    ),
    "transposed, beside a pixel that it leaves out": case(
        lambda v, x: transposed(x, v["point"], ((-3, 0), (-3, 0)), 4) + x[:, 3::4, 3::4], 1
    ),
    "transposed, beside the value": case(
        lambda v, x: convolve(x, v["full"], ((2, 1), (2, 1)), 2, lhs_dilation=(2, 2)) + x, 1
    ),
    "a norm after a transposed one": case(
        lambda v, x: (transposed(x, v["full"]) - v["shift"]) * v["scale"], 1
    ),
    # Means over windows.
    "a mean over windows": case(lambda v, x: pool(convolve(x, v["point"])) * v["scale"] + v["shift"], 1),
    "a mean over windows, scaled twice": case(lambda v, x: pool(convolve(x, v["point"])) * v["scale"] / v["bias"], 1),
    "a strided mean": case(lambda v, x: pool(convolve(x, v["down"]), 3, (1, 2, 2, 1)), 1),
    "a mean of a shifted value": case(
        lambda v, x: pool(convolve(x, v["point"]) + v["shift"], padding=VALID) * v["scale"], 1
    ),
    "a padded mean of a shifted value": case(lambda v, x: pool(convolve(x, v["point"]) + v["shift"]), 1),
    "a dilated mean": case(
        lambda v, x: pool(
            convolve(x, v["point"]), padding=((0, 0), (1, 1), (2, 0), (0, 0)), window_dilation=(1, 2, 2, 1)
        ), 1,
    ),
    "a mean with zeros between": case(
        lambda v, x: pool(convolve(x, v["point"]), padding=((0, 0),) * 4, base_dilation=(1, 2, 2, 1)), 1
    ),
    "a mean over channels": case(
        lambda v, x: lax.reduce_window(convolve(x, v["point"]), 0.0, lax.add, (1, 1, 1, 2), (1,) * 4, "SAME"), 1
    ),
    "a mean over images": case(
        lambda v, x: lax.reduce_window(convolve(x, v["point"]), 0.0, lax.add, (2, 1, 1, 1), (1,) * 4, "SAME"), 1
    ),
    "every second channel of a mean": case(
        lambda v, x: pool(convolve(x, v["point"]), strides=(1, 1, 1, 2)), 1
    ),
    "padded channels of a mean": case(
        lambda v, x: pool(convolve(x, v["point"]), padding=((0, 0), (0, 0), (0, 0), (1, 0))), 1
    ),
    "a mean beside what it is taken of": case(
        lambda v, x: pool(convolve(x, v["point"])) + convolve(x, v["full"]) + x, 1
    ),
    "a mean of branches": case(lambda v, x: pool(convolve(x, v["point"]) + convolve(x, v["full"])), 1),
    "the largest in a window": case(
        lambda v, x: lax.reduce_window(convolve(x, v["point"]), -jnp.inf, lax.max, (1, 2, 2, 1), (1,) * 4, "SAME"), 1
    ),
    # Signs and gradients.
    "a negated branch": case(lambda v, x: -convolve(x, v["full"]) + convolve(x, v["point"]), 1),
    "a branch less another": case(lambda v, x: convolve(x, v["full"]) - convolve(x, v["point"]), 1),
    "the gradient of two branches": case(
        lambda v, x: jax.vjp(lambda y: (convolve(y, v["full"]), convolve(y, v["point"])), x)[1]((x, x))[0], 1
    ),
    # Values that are read twice, and operands that are stretched.
    "read twice": case(lambda v, x: (y := convolve(x, v["full"])) + convolve(y, v["point"]), 2),
    "times itself": case(lambda v, x: (y := convolve(x, v["full"])) * y, 1),
    "stretched over channels": case(lambda v, x: convolve(x, v["down"]) + x, 1),
    "a kernel that is an input": case(lambda v, x: convolve(x, x), 1),
}  # fmt: skip
