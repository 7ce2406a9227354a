import jax
import jax.numpy as jnp

from repvgg_jax.ops import compiler_options
from repvgg_jax.ops.xla_options import _WANTED, _known


def test_xla_on_cpu_takes_the_options():
    assert compiler_options("cpu") == _WANTED["cpu"] != {}
    jax.jit(jnp.sin, compiler_options=compiler_options("cpu")).lower(jnp.zeros(())).compile()


def test_options_that_this_jaxlib_does_not_know_are_left_out(monkeypatch):
    monkeypatch.setitem(_WANTED, "cpu", {"xla_cpu_no_such_option": True, **_WANTED["cpu"]})
    assert not _known("cpu", "xla_cpu_no_such_option", True)
    assert "xla_cpu_no_such_option" not in compiler_options("cpu")
    assert compiler_options("cpu")


def test_other_platforms_are_told_nothing():
    assert compiler_options("tpu") == compiler_options("gpu") == {}
