import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repvgg_jax.ops import compiler_options
from repvgg_jax.ops.xla_options import _WANTED, _known


def test_xla_on_cpu_takes_the_options():
    assert compiler_options("cpu") == _WANTED["cpu"] != {}
    jax.jit(jnp.sin, compiler_options=compiler_options("cpu")).lower(jnp.zeros(())).compile()


@pytest.mark.parametrize("options", [{}, compiler_options("cpu")], ids=["by default", "with our options"])
@pytest.mark.parametrize(("dtype", "count"), [(np.float32, 32_769), (np.float64, 16_385)])
def test_a_product_and_then_a_sum_are_right(options, dtype, count):
    """Wrong in jaxlib 0.10.2 by default: https://github.com/jax-ml/jax/issues/39103."""
    rows = np.zeros((count, 3), dtype)
    rows[:, 0] = np.arange(count)
    with jax.enable_x64(dtype == np.float64):

        def lengths(rows):
            return jax.vmap(lambda row: jnp.sum((jnp.eye(3, dtype=dtype) @ row) ** 2))(rows)

        found = jax.jit(lengths, compiler_options=options)(rows)
    np.testing.assert_allclose(found, rows[:, 0].astype(np.float64) ** 2, rtol=1e-6)


def test_options_that_this_jaxlib_does_not_know_are_left_out(monkeypatch):
    monkeypatch.setitem(_WANTED, "cpu", {"xla_cpu_no_such_option": True, **_WANTED["cpu"]})
    assert not _known("cpu", "xla_cpu_no_such_option", True)
    assert "xla_cpu_no_such_option" not in compiler_options("cpu")
    assert compiler_options("cpu")


def test_other_platforms_are_told_nothing():
    assert compiler_options("tpu") == compiler_options("gpu") == {}
