import ast
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repvgg_jax
from repvgg_jax.ops import compiler_options
from repvgg_jax.ops.xla_options import _WANTED, _known


def test_xla_on_cpu_takes_the_options():
    assert compiler_options() == compiler_options("cpu") == _WANTED["cpu"] != {}
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


def without_options(source):
    """The lines of a file that name `jax.jit` and give it no `compiler_options`; exports compile nothing."""
    tree, told = ast.parse(source), set()
    for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
        if ast.unparse(call.func) == "export.export" or any(each.arg == "compiler_options" for each in call.keywords):
            told |= {node for part in (call.func, *call.args[:1]) for node in ast.walk(part)}
    jits = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and ast.unparse(node) == "jax.jit"]
    return [node.lineno for node in jits if node not in told]


def test_every_program_of_the_package_is_compiled_with_the_options():
    """But for those of `ops`, which stand inside of others."""
    package = Path(repvgg_jax.__file__).parent
    files = [path for path in package.rglob("*.py") if path.parent.name != "ops"]
    found = {path.name: without_options(path.read_text(encoding="utf-8")) for path in files}
    assert {name: lines for name, lines in found.items() if lines} == {}
    assert not any("import jit" in path.read_text(encoding="utf-8") for path in files)


@pytest.mark.parametrize(
    "forgotten", ["y = jax.jit(f)(x)", "@jax.jit\ndef f(x): ...", "@partial(jax.jit, donate_argnums=0)\ndef f(x): ..."]
)
def test_a_program_without_the_options_is_seen(forgotten):
    assert without_options(forgotten) == [1]
    assert without_options("y = jax.jit(f, compiler_options=compiler_options())(x)") == []
