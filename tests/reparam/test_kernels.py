import jax
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


@pytest.mark.parametrize(("size", "target"), [((3, 3), (1, 1)), ((2, 2), (3, 3)), ((1, 1), (3, 2))])
def test_padding_without_a_common_centre_is_refused(size, target):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} kernel to {target[0]}x{target[1]}.*even number"):
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


def test_branches_of_different_channels_are_refused():
    branches = [
        Convolution(np.ones((3, 3, 4, 6)), np.ones(6)),
        Convolution(np.ones((1, 1, 2, 6)), np.ones(6)),
    ]
    with pytest.raises(ValueError, match=r"\(3, 3, 4, 6\), \(1, 1, 2, 6\).*same in/groups and out"):
        merge_branches(branches)
    with pytest.raises(ValueError, match="no branch"):
        merge_branches([])


def test_numpy_folds_in_float64_even_where_jax_is_limited_to_float32():
    rng = np.random.default_rng(0)
    with jax.enable_x64(False):
        folded = fold_batch_norm(rng.normal(size=(3, 3, 2, 4)), **norm_leaves(rng, 4))
        merged = merge_branches([folded, folded])
    assert isinstance(merged.kernel, np.ndarray)
    assert merged.kernel.dtype == merged.bias.dtype == np.float64


def test_a_vector_of_the_wrong_length_is_named():
    leaves = norm_leaves(np.random.default_rng(0), 4)
    with pytest.raises(ValueError, match=r"mean has shape \(3,\), expected \(4,\)"):
        fold_batch_norm(np.ones((1, 1, 2, 4)), **{**leaves, "mean": np.zeros(3)})
