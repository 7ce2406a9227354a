"""A function before and after it was merged: same results, counted primitives."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np

from repvgg_jax.transform import reparameterize
from tests.random_variables import random_images


def primitives(function, *arguments):
    """How often each primitive stands in the traced program, calls included."""
    count = Counter()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            count[equation.primitive.name] += 1
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else [value]:
                    walk(inner.jaxpr if hasattr(inner, "jaxpr") else inner) if hasattr(inner, "eqns") or hasattr(
                        inner, "jaxpr"
                    ) else None

    walk(jax.make_jaxpr(function)(*arguments).jaxpr)
    return count


def drawn(module, shape):
    """Random variables of a linen module that takes no `train`."""
    template = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float64))
    rng = np.random.default_rng(0)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.asarray(
            rng.uniform(0.5, 1.5, leaf.shape) if path[-1].key in ("scale", "var") else rng.normal(0, 0.3, leaf.shape)
        ),
        template,
    )


def compare(function, variables, shape, dtype=np.float64, any_size=False, **options):
    """Merge, compare on the images traced with and on more (and larger ones), and count primitives before and after."""
    images = random_images(shape, dtype)
    fused = reparameterize(function, variables, images, **options)
    both = jax.jit(lambda v, params, x: (function(v, x), fused(params, x)))
    more = (shape[0] + 1, *(size + 4 * any_size for size in shape[1:-1]), shape[-1])
    for batch in (images, random_images(more, dtype, seed=2)):
        expected, found = both(variables, fused.params, batch)
        assert jax.tree.structure(expected) == jax.tree.structure(found)
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            np.testing.assert_allclose(b, a, atol=1e-12 * float(jnp.abs(a).max()), rtol=0)
    # Other parameters are another function: negative control.
    expected, found = both(variables, {name: 1.01 * value for name, value in fused.params.items()}, images)
    leaves = zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True)
    assert any(float(abs(a - b).max()) > 1e-6 for a, b in leaves)
    before, after = primitives(function, variables, images), primitives(fused, fused.params, images)
    return before, after
