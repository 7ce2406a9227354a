"""Arrays inside of `jax.shard_map`: along a mesh axis, an array either is the same on all devices or varies."""

import jax
from jax import lax


def varying_alike(*arrays: jax.Array) -> list[jax.Array]:
    """Return the arrays, each varying along every mesh axis along which one of them varies.

    Custom gradients must have the types of what they are gradients of. Where a kernel is the same on all devices and
    the images are not, its gradient differs by device, and the transpose of this function sums it over the devices.
    """
    varying = frozenset[str]().union(*map(_varying, arrays))
    return [lax.pcast(array, tuple(sorted(varying - _varying(array))), to="varying") for array in arrays]


def _varying(array: jax.Array) -> frozenset[str]:
    return jax.typeof(array).manual_axis_type.varying
