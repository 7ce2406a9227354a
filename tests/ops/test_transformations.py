"""The convolution and the batch norm under jit, grad, vmap, remat, eval_shape, export and a sharded batch."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from repvgg_jax.ops import batch_norm_train, conv_general_dilated
from repvgg_jax.ops.choose import LOWERINGS, choose
from repvgg_jax.ops.lowerings.base import Window
from repvgg_jax.ops.materialize import materialize

ONE = ((1, 1), (1, 1))
SHAPES = {
    "winograd": ((8, 8, 8, 80), (3, 3, 80, 64), (1, 1), ONE),
    "winograd, large map": ((8, 32, 32, 32), (3, 3, 32, 16), (1, 1), ONE),
    "winograd, grouped": ((8, 16, 16, 64), (3, 3, 32, 48), (1, 1), ONE, 2),
    "winograd, pair": ((8, 2, 2, 32), (3, 3, 32, 32), (1, 1), ONE),
    "im2col": ((8, 4, 4, 32), (3, 3, 32, 48), (2, 2), ONE),
    "plain, im2col": ((8, 32, 32, 32), (3, 3, 32, 48), (2, 2), ONE),
    "depthwise": ((8, 14, 14, 32), (3, 3, 1, 32), (1, 1), ONE, 32),
    "depthwise, strided, two outputs a channel": ((8, 7, 7, 12), (5, 5, 1, 24), (2, 2), ((2, 2), (2, 2)), 12),
    "many groups": ((8, 14, 14, 32), (3, 3, 2, 32), (1, 1), ONE, 16),
    "pointwise": ((8, 8, 8, 32), (1, 1, 32, 48), (1, 1), ((0, 0), (0, 0))),
    "pointwise, strided": ((8, 8, 8, 32), (1, 1, 32, 48), (2, 2), ((0, 0), (0, 0))),
}
cases = pytest.mark.parametrize("case", SHAPES.values(), ids=SHAPES)


def ours(x, kernel, strides, padding, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers, feature_group_count=groups)


def plain(x, kernel, strides, padding, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers, feature_group_count=groups)


def arrays(case, seed=0):
    random = np.random.default_rng(seed)
    return [random.normal(0.3, 1, shape).astype(np.float32) for shape in case[:2]]


def block(convolve, case):
    """Convolution, batch norm, a loss that is not linear: what a train step is made of."""

    def loss(x, kernel, scale, bias):
        y = convolve(x, kernel, *case[2:])
        y, mean, var = batch_norm_train(y, scale, bias, 1e-5)
        return jnp.sin(y).mean() + mean.sum() + var.mean()

    return loss


def scale_and_bias(case):
    return np.linspace(0.5, 2, case[1][-1], dtype=np.float32), np.linspace(-1, 1, case[1][-1], dtype=np.float32)


def assert_close(found, expected, tolerance=2e-5):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


def test_the_cases_reach_every_lowering_that_is_chosen():
    reached = {
        name for images, kernel, *rest in SHAPES.values() for name in choose(images, kernel, Window(*rest))["cpu"].names
    }
    assert reached == set(LOWERINGS) - {"winograd_f2", "space_to_depth", "block_diagonal"}


@cache
def step(case):
    """The loss of a block and its gradients, compiled once for the tests that compare with it."""
    return jax.jit(jax.value_and_grad(block(ours, case), (0, 1, 2, 3)))


@cases
def test_the_gradient_of_a_block_is_that_of_the_plain_block(case):
    inputs = (*arrays(case), *scale_and_bias(case))
    expected = jax.jit(jax.value_and_grad(block(plain, case), (0, 1, 2, 3)))(*inputs)
    assert_close(step(case)(*inputs), expected, 1e-4)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=[] if name in ("winograd", "im2col", "depthwise") else pytest.mark.long)
        for name, case in SHAPES.items()
    ],
)
def test_rematerialised_gradients_are_the_same(case):
    inputs = (*arrays(case), *scale_and_bias(case))
    found = jax.jit(jax.grad(jax.checkpoint(block(ours, case)), (0, 1, 2, 3)))(*inputs)
    assert_close(found, step(case)(*inputs)[1])


@cases
def test_vmap_over_images_and_kernels_is_a_loop(case):
    """Over the plain convolution."""
    x, kernel = (np.stack(pair) for pair in zip(arrays(case), arrays(case, 1), strict=True))

    def gradients(convolve):
        return jax.value_and_grad(lambda x, kernel: jnp.sin(convolve(x, kernel, *case[2:])).sum(), (0, 1))

    @jax.jit
    def run(x, kernel):
        shared = jax.vmap(lambda x, kernel: ours(x, kernel, *case[2:]), (0, None))
        return jax.vmap(gradients(ours))(x, kernel), shared(x, kernel[0])

    found, shared = run(x, kernel)
    one, other = map(jax.jit(gradients(plain)), x, kernel)
    assert_close(found, jax.tree.map(lambda *leaves: np.stack(leaves), one, other), 1e-4)
    assert_close(shared, np.stack([plain(each, kernel[0], *case[2:]) for each in x]))


@cases
def test_eval_shape_eager_calls_and_an_export_for_cpu_and_cuda_agree(case):
    x, kernel = arrays(case)
    convolve = lambda x, kernel: ours(x, kernel, *case[2:])  # noqa: E731
    expected = plain(x, kernel, *case[2:])
    y = convolve(x, kernel)
    promised = jax.eval_shape(convolve, x, kernel)
    assert (promised.shape, promised.dtype) == (y.shape, y.dtype)
    assert_close(y, expected)
    exported = jax.export.export(jax.jit(convolve), platforms=["cpu", "cuda"])(x, kernel)
    assert_close(exported.call(x, kernel), expected)


@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("sizes", ["n", "n, h, w"])
@cases
def test_an_export_of_symbolic_sizes_serves_them_all(case, sizes):
    x, kernel = arrays(case)
    symbolic = jax.export.symbolic_shape(sizes)
    shape = (*symbolic, *x.shape[len(symbolic) :])
    convolve = jax.jit(lambda x: ours(x, kernel, *case[2:]))
    exported = jax.export.export(convolve)(jax.ShapeDtypeStruct(shape, x.dtype))
    for images in (x, x[:3]):
        assert_close(exported.call(images), plain(images, kernel, *case[2:]))


@cases
def test_a_sharded_batch_gives_what_one_device_gives(case):
    """Batch over 8 devices, parameters replicated; gradients and statistics are those of the whole batch."""
    mesh = jax.make_mesh((8,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    x, *parameters = (*arrays(case), *scale_and_bias(case))
    x += np.arange(8, dtype=np.float32)[:, None, None, None]  # so that local statistics would differ
    expected = step(case)(x, *parameters)
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("batch")))
    replicated = jax.device_put(parameters, NamedSharding(mesh, PartitionSpec()))
    compiled = step(case).lower(sharded, *replicated).compile()
    assert_close(compiled(sharded, *replicated), expected, 1e-4)
    text = compiled.as_text()
    assert "all-reduce" in text
    assert "all-to-all" not in text
    assert "all-gather" not in text


@pytest.mark.parametrize("check", [True, False], ids=["types checked", "unchecked"])
@pytest.mark.parametrize(
    "case",
    [
        ((4, 4, 4, 3), (3, 3, 3, 4), (1, 1), ONE),
        ((4, 4, 4, 3), (1, 1, 3, 4), (2, 2), ((0, 0), (0, 0))),
        ((4, 5, 5, 4), (3, 3, 1, 8), (2, 2), ONE, 4),
        ((4, 2, 2, 18), (3, 3, 2, 18), (2, 2), ONE, 9),
    ],
    ids=["plain", "pointwise", "depthwise", "many groups"],
)
def test_gradients_go_through_shard_map(case, check):
    """Parameters are the same on both devices, images are not: the gradients of the parameters are summed."""
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    here, split = PartitionSpec(), PartitionSpec("batch")

    def half(convolve, x, kernel, scale, bias):
        y, mean, _ = batch_norm_train(convolve(x, kernel, *case[2:]), scale, bias, 1e-5)
        return y * y + mean

    def sharded(*inputs):
        specs = (split, here, here, here)
        function = lambda *inputs: half(ours, *inputs)  # noqa: E731
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=split, check_vma=check)(*inputs).sum()

    def halves(x, *parameters):
        return sum(half(plain, each, *parameters).sum() for each in jnp.split(x, 2))

    inputs = (*arrays(case), *scale_and_bias(case))
    found, expected = (jax.jit(jax.grad(function, (0, 1, 2, 3)))(*inputs) for function in (sharded, halves))
    assert_close(found, expected, 1e-4)


def test_materialize_keeps_a_residual_stack_from_recomputing_its_past():
    """Without it, the loop of the sixth block reads the products of all six."""

    def widest_loop(wall):
        def stack(x, kernels):
            for kernel in kernels:
                x = wall(x)
                x = jnp.maximum(x - x.mean((0, 1, 2)) + x @ kernel, 0)
            return x

        text = jax.jit(stack).lower(jnp.ones((4, 4, 4, 8)), [jnp.ones((8, 8))] * 6).compile().as_text()
        return max(line.split("kind=kLoop")[0].count("%") for line in text.splitlines() if "kind=kLoop" in line)

    assert widest_loop(materialize) <= 5
    assert widest_loop(lambda x: x) > 10


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@cases
def test_exports_for_accelerators_hold_plain_convolutions_only(case, platform):
    x, kernel = arrays(case)

    def step(x, kernel):
        return jax.value_and_grad(lambda *both: jnp.sin(ours(*both, *case[2:])).sum(), (0, 1))(x, kernel)

    text = str(jax.export.export(jax.jit(step), platforms=[platform])(x, kernel).mlir_module())
    assert text.count("stablehlo.convolution") == 3
    assert "dot_general" not in text
    assert "inlineable" not in text


@pytest.mark.parametrize(
    "differentiate",
    [
        lambda f, x: jax.jvp(f, (x,), (x,)),
        lambda f, x: jax.jvp(jax.jit(f), (x,), (x,)),
        lambda f, x: jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(x),
        lambda f, x: jax.jacfwd(lambda factor: f(factor * x).sum())(1.0),
        lambda f, x: jax.hessian(lambda factor: f(factor * x).sum())(1.0),
        lambda f, x: jax.linearize(f, x)[1](x),
    ],
    ids=["jvp", "jvp of jit", "jit of jvp", "jacfwd", "hessian", "linearize"],
)
@pytest.mark.parametrize("function", ["convolution of images", "convolution with a kernel", "batch norm"])
def test_forward_mode_is_refused_with_the_remedy(function, differentiate):
    case = SHAPES["pointwise"]
    x, kernel = arrays(case)
    functions = {
        "convolution of images": (lambda x: ours(x, kernel, *case[2:]), x),
        "convolution with a kernel": (lambda kernel: ours(x, kernel, *case[2:]), kernel),
        "batch norm": (lambda x: batch_norm_train(x, None, None, 1e-5)[0], x),
    }
    with pytest.raises(TypeError, match='expected ops="xla"'):
        differentiate(*functions[function])


def test_forward_mode_of_plain_convolutions_works():
    """In float64, which no lowering takes: nothing is refused that could be computed."""
    with jax.enable_x64(True):
        x, kernel = (each.astype(np.float64) for each in arrays(SHAPES["pointwise"]))
        jax.jvp(lambda x: ours(x, kernel, (1, 1), ((0, 0), (0, 0))), (x,), (x,))
