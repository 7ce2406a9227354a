import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax import create_model
from repvgg_jax.data import load_dataset, normalize
from repvgg_jax.training.run.data_record import DataRecord
from repvgg_jax.training.start.whitening import whiten_stem


def digits(data_dir, count, channels):
    source = load_dataset("digits", data_dir=data_dir).train
    images = np.stack(
        [np.asarray(source[index]["image"]).reshape(*source[index]["image"].shape[:2], -1) for index in range(count)]
    )
    images = jnp.asarray(np.repeat(images[..., :1], channels, -1))
    return normalize(images, (0.5,) * channels, (0.5,) * channels)


def correlations(variables, images):
    """Of the stem's 3×3 branch, where the kernel sees no padding."""
    kernel = variables["params"]["stem"]["branch_3x3"]["conv"]["kernel"]
    y = jax.lax.conv_general_dilated(images, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return np.corrcoef(np.asarray(y, np.float64).reshape(-1, y.shape[-1]).T)


@pytest.fixture
def setting(data_dir):
    model = create_model(
        "repvgg_a0", num_classes=10, depths=(1, 1, 1, 1), width_multiplier=(0.25,) * 4, strides=(1,) * 5
    )
    images = digits(data_dir, 64, 1)
    return model.init(jax.random.key(0), images[:1], train=False), images


def test_the_channels_of_a_whitened_stem_are_uncorrelated_or_opposite(setting):
    variables, images = setting
    after, before = correlations(whiten_stem(variables, images), images), correlations(variables, images)
    half = 8
    assert np.abs(after[:half, :half] - np.eye(half)).max() < 1e-3
    np.testing.assert_allclose(np.diag(after[:half, half : 2 * half]), -1, atol=1e-6)
    # The stem as it is initialised: negative control.
    assert np.abs(before[:half, :half] - np.eye(half)).max() > 0.5


def test_a_whitened_stem_differs_in_kernel_and_scale_alone_and_keeps_its_size(setting):
    variables, images = setting
    whitened = whiten_stem(variables, images)
    different = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for (path, old), new in zip(
            jax.tree_util.tree_leaves_with_path(variables), jax.tree.leaves(whitened), strict=True
        )
        if not np.array_equal(old, new)
    ]
    assert different == ["params/stem/branch_1x1/bn/scale", "params/stem/branch_3x3/conv/kernel"]
    kernels = [tree["params"]["stem"]["branch_3x3"]["conv"]["kernel"] for tree in (variables, whitened)]
    norms = [float(jnp.linalg.norm(kernel)) for kernel in kernels]
    np.testing.assert_allclose(norms[1], norms[0], rtol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_largest_components_come_first_and_channels_beyond_them_stay(channels):
    rng = np.random.default_rng(0)
    pixels = 6 * 6 * channels
    mixed = rng.normal(size=(256, pixels)) @ rng.normal(size=(pixels, pixels)) / 8
    images = jnp.asarray(mixed.reshape(256, 6, 6, channels) + 3, jnp.float32)
    components, features = 9 * channels, 64
    kernel = rng.normal(size=(3, 3, channels, features)).astype(np.float32)
    norm = {"bn": {"scale": jnp.ones(features)}}

    def whitened(kernel):
        stem = {"branch_3x3": {"conv": {"kernel": jnp.asarray(kernel)}}, "branch_1x1": norm}
        found = jax.jit(whiten_stem)({"params": {"stem": stem}}, images)
        return np.asarray(found["params"]["stem"]["branch_3x3"]["conv"]["kernel"])

    found = whitened(kernel)
    np.testing.assert_array_equal(found[..., 2 * components :], kernel[..., 2 * components :])
    assert 2 * components < features
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(images, np.float64), (3, 3), (1, 2))
    y = np.einsum("nhwcij,ijco->nhwo", windows, found[..., : 2 * components]).reshape(-1, 2 * components)
    covariance = np.cov(y.T)
    variances = np.diag(covariance)[:components]
    assert (np.diff(variances) < 0).all()
    expected = np.kron([[1, -1], [-1, 1]], np.diag(variances))
    np.testing.assert_allclose(covariance, expected, atol=1e-3 * variances[0])
    # Where there is room for two only, those are the largest.
    few = whitened(kernel[..., :4]).reshape(-1, 4)
    along = few / np.linalg.norm(few, axis=0), found.reshape(-1, features)[:, :2]
    np.testing.assert_allclose(np.abs(np.diag(along[0].T @ along[1])), np.linalg.norm(along[1], axis=0), rtol=1e-3)


def test_a_run_begins_with_a_whitened_stem_and_the_same_data(tiny, begin, tmp_path):
    state, batch = begin(tiny.replace(whiten_stem=True), tmp_path / "run")
    plain, same_batch = begin(tiny, tmp_path / "plain")
    assert np.abs(state.params["stem"]["branch_1x1"]["bn"]["scale"]).max() < 1e-6
    assert np.abs(plain.params["stem"]["branch_1x1"]["bn"]["scale"]).min() > 0.99
    chex.assert_trees_all_equal(batch, same_batch)
    images = normalize(batch["image"], *DataRecord.load(tmp_path / "run").normalization)
    found = correlations({"params": state.params}, images)
    assert np.abs(found[:8, :8] - np.eye(8)).max() < 1e-3


def test_images_smaller_than_a_patch_are_not_whitened(tiny):
    with pytest.raises(ValueError, match="image_size is 2: expected at least 3 to whiten"):
        tiny.replace(whiten_stem=True, image_size=2)


def test_a_stem_that_comes_with_weights_is_not_whitened(tiny):
    with pytest.raises(ValueError, match=r"whiten_stem is True: expected False \(--no-whiten-stem"):
        tiny.replace(whiten_stem=True, init_from="somewhere")
