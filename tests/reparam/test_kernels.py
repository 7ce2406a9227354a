import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.reparam import Convolution, fold_batch_norm, identity_kernel, merge_branches, pad_kernel


def convolve(x, kernel, *, stride=1, padding=None, groups=1, dilation=1):
    padding = kernel.shape[0] // 2 * dilation if padding is None else padding
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(padding, padding)] * 2, rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups,
    )  # fmt: skip


def relative_error(expected, found):
    return float(np.abs(np.asarray(expected) - np.asarray(found)).max() / np.abs(np.asarray(expected)).max())


def norm_leaves(rng, channels):
    return dict(
        mean=rng.normal(size=channels),
        var=rng.uniform(0.2, 2, channels),
        scale=rng.uniform(0.5, 1.5, channels),
        bias=rng.normal(size=channels),
    )


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("absent", [(), ("scale",), ("bias",), ("scale", "bias"), ("conv_bias",)])
@pytest.mark.parametrize(("size", "groups", "dilation", "stride"), [(1, 1, 1, 2), (3, 2, 1, 1), (5, 1, 2, 2)])
def test_folding_a_batch_norm_preserves_the_output(size, groups, dilation, stride, absent):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 9, 8, 4)), rng.normal(size=(size, size, 4 // groups, 6))
    leaves = {**norm_leaves(rng, 6), "conv_bias": rng.normal(size=6)}
    for name in absent:
        leaves[name] = None
    settings = dict(stride=stride, groups=groups, dilation=dilation)

    y = convolve(x, kernel, **settings) + (0 if leaves["conv_bias"] is None else leaves["conv_bias"])
    scale = 1 if leaves["scale"] is None else leaves["scale"]
    bias = 0 if leaves["bias"] is None else leaves["bias"]
    expected = (y - leaves["mean"]) / np.sqrt(leaves["var"] + 1e-5) * scale + bias
    folded = fold_batch_norm(kernel, **leaves, epsilon=1e-5)
    assert relative_error(expected, convolve(x, folded.kernel, **settings) + folded.bias) < 1e-13

    wrong = fold_batch_norm(kernel, **leaves, epsilon=1e-3)
    assert relative_error(expected, convolve(x, wrong.kernel, **settings) + wrong.bias) > 1e-5


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("height", [7, 8])
def test_a_padded_kernel_computes_what_the_small_one_did(stride, height):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, height, 9, 3)), rng.normal(size=(1, 1, 3, 5))
    expected = convolve(x, kernel, stride=stride)
    assert relative_error(expected, convolve(x, pad_kernel(kernel, (3, 3)), stride=stride)) < 1e-14
    assert relative_error(expected, convolve(x, pad_kernel(kernel, (5, 5)), stride=stride)) < 1e-14
    in_the_corner = np.pad(kernel, [(0, 2), (0, 2), (0, 0), (0, 0)])
    assert relative_error(expected, convolve(x, in_the_corner, stride=stride)) > 0.1


@pytest.mark.parametrize(
    ("size", "target"),
    [((3, 3), (1, 1)), ((2, 2), (3, 3)), ((1, 1), (3, 2)), ((1, 1), (3,)), ((1, 1), (3, 3, 3)), ((1,), (3, 3))],
)
def test_padding_without_a_common_centre_is_refused(size, target):
    before, after = ("x".join(map(str, each)) for each in (size, target))
    with pytest.raises(ValueError, match=f"a {before} kernel to {after} .*even number in every direction"):
        pad_kernel(np.ones((*size, 2, 2)), target)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("size", [(1, 1), (3, 3), (3, 5)])
def test_the_identity_kernel_returns_its_input(groups, size):
    x = np.random.default_rng(0).normal(size=(2, 6, 5, 8))
    kernel = identity_kernel(8, groups=groups, size=size)
    assert kernel.shape == (*size, 8 // groups, 8)
    y = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), [(s // 2, s // 2) for s in size], dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )  # fmt: skip
    np.testing.assert_array_equal(y, x)


def test_groups_that_do_not_divide_the_channels_are_refused():
    with pytest.raises(ValueError, match=r"channels \(=6\) must be divisible by groups \(=4\)"):
        identity_kernel(6, groups=4)


@pytest.mark.usefixtures("float64")
def test_merged_branches_compute_the_sum():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 8, 4))
    branches = [Convolution(rng.normal(size=(k, k, 4, 6)), rng.normal(size=6)) for k in (3, 1, 5)]
    merged = merge_branches(branches)
    expected = sum(convolve(x, kernel) + bias for kernel, bias in branches)
    assert merged.kernel.shape == (5, 5, 4, 6)
    assert relative_error(expected, convolve(x, merged.kernel) + merged.bias) < 1e-14


@pytest.mark.usefixtures("float64")
def test_branches_wide_and_high_are_padded_to_a_kernel_that_holds_both():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 6, 7, 2))
    branches = [Convolution(rng.normal(size=(*size, 2, 3)), rng.normal(size=3)) for size in ((1, 3), (5, 1))]
    merged = merge_branches(branches)
    assert merged.kernel.shape == (5, 3, 2, 3)

    def apply(branch):
        padding = [(size // 2, size // 2) for size in branch.kernel.shape[:2]]
        return branch.bias + jax.lax.conv_general_dilated(
            x, branch.kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert relative_error(sum(map(apply, branches)), apply(merged)) < 1e-14


@pytest.mark.parametrize("channels", [(2, 6), (4, 1)], ids=str)
def test_branches_of_different_channels_are_refused(channels):
    branches = [
        Convolution(np.ones((3, 3, 4, 6)), np.ones(6)),
        Convolution(np.ones((1, 1, *channels)), np.ones(channels[1])),
    ]
    shapes = re.escape(f"(3, 3, 4, 6), {(1, 1, *channels)}")
    with pytest.raises(ValueError, match=rf"{shapes}.*same in/groups and out"):
        merge_branches(branches)


def test_without_branches_there_is_nothing_to_merge():
    with pytest.raises(ValueError, match="no branch"):
        merge_branches([])


def test_numpy_folds_in_float64_even_where_jax_is_limited_to_float32():
    rng = np.random.default_rng(0)
    with jax.enable_x64(False):
        folded = fold_batch_norm(rng.normal(size=(3, 3, 2, 4)), **norm_leaves(rng, 4))
        merged = merge_branches([folded, folded])
    assert isinstance(merged.kernel, np.ndarray)
    assert merged.kernel.dtype == merged.bias.dtype == np.float64
    padded = pad_kernel(np.full((1, 1, 1, 1), 1 / 3), (3, 3))
    assert (type(padded), padded.dtype, padded[1, 1, 0, 0]) == (np.ndarray, np.float64, 1 / 3)
    traced = jax.eval_shape(lambda kernel: pad_kernel(kernel, (3, 3)), jnp.ones((1, 1, 2, 4)))
    assert (traced.shape, traced.dtype) == ((3, 3, 2, 4), np.float32)


@pytest.mark.parametrize("name", ["mean", "var", "scale", "bias", "conv_bias"])
@pytest.mark.parametrize("shape", [(3,), (), (1, 4)], ids=str)
def test_a_vector_of_the_wrong_shape_is_named(name, shape):
    leaves = {**norm_leaves(np.random.default_rng(0), 4), "conv_bias": np.zeros(4), name: np.ones(shape)}
    with pytest.raises(ValueError, match=rf"^{name} has shape {re.escape(str(shape))}, expected \(4,\)"):
        fold_batch_norm(np.ones((1, 1, 2, 4)), **leaves)


@pytest.mark.parametrize("name", ["kernel", "mean", "var", "scale", "bias", "conv_bias"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16])
def test_what_is_narrower_than_float32_is_widened_before_the_fold(name, dtype):
    rng = np.random.default_rng(0)
    arrays = {"kernel": rng.normal(size=(3, 3, 2, 4)), **norm_leaves(rng, 4), "conv_bias": rng.normal(size=4)}
    narrow = {key: jnp.asarray(array, dtype if key == name else np.float32) for key, array in arrays.items()}
    wide = {key: array.astype(np.float32) for key, array in narrow.items()}
    all_narrow = {key: jnp.asarray(array, dtype) for key, array in arrays.items()}
    all_widened = {key: array.astype(np.float32) for key, array in all_narrow.items()}
    for low, high in ((narrow, wide), (all_narrow, all_widened)):
        found, expected = (fold_batch_norm(each.pop("kernel"), **each) for each in (low, high))
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == np.float32
            np.testing.assert_array_equal(one, other)


def test_epsilon_is_that_of_pytorch_and_the_papers_where_none_is_given():
    rng = np.random.default_rng(0)
    kernel, leaves = rng.normal(size=(1, 1, 2, 4)), norm_leaves(rng, 4)
    for found, expected in zip(
        fold_batch_norm(kernel, **leaves), fold_batch_norm(kernel, **leaves, epsilon=1e-5), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_an_identity_kernel_is_float64_and_one_pixel_where_nothing_else_is_asked_for():
    assert identity_kernel(2).dtype == np.float64
    np.testing.assert_array_equal(identity_kernel(2), np.eye(2)[None, None])
    assert identity_kernel(2, size=(3, 3), dtype=np.float32).dtype == np.float32
