"""A wall that XLA:CPU's fusion cannot look through, and that costs nothing.

XLA:CPU fuses a cheap elementwise producer into each of its consumers, again and again: in a stack of residual blocks
the fourteenth block would compute the thirteen before it anew. `lax.optimization_barrier` does not help, because it is
gone before fusion. A call that must not be inlined does: it is not elementwise, and its result is its operand.

Behind a product the wall also keeps YNNPACK from computing product and sum in one. Where a pooling window leaves a row
out, that writes outside of its memory in jaxlib 0.10.0 and 0.10.1.
"""

import jax
from jax.experimental.xla_metadata import set_xla_metadata

from repvgg_jax.ops.platform import by_platform


@jax.jit
def _itself(x: jax.Array) -> jax.Array:
    return x * 1  # JAX would drop a bare identity; XLA drops the product


def _walled(x: jax.Array) -> jax.Array:
    with set_xla_metadata(inlineable="false"):
        return _itself(x)


def materialize(x: jax.Array) -> jax.Array:
    """Return `x`, written to memory once for all its readers where the program is lowered for CPU."""
    return by_platform(x, cpu=_walled, default=lambda x: x)
