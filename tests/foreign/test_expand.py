"""Networks of other libraries train with branches, and their own trees come back."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import expand_libraries

# Convolutions, and how many of them have branches: a 1×1 has an identity alone, where it keeps its channels.
EXPANDED = {
    "keras": (52, 18),
    "haiku": (20, 17),
    "equinox": (20, 17),
    "flaxmodels": (20, 17),
    "nnx": (20, 17),
    "lax": (4, 4),
}
MODULES = {"nnx": "flax", "lax": "jax"}


@pytest.mark.long
@pytest.mark.usefixtures("float32")
@pytest.mark.parametrize("library", EXPANDED)
def test_a_network_of_another_library_trains_with_branches_and_collapses(library, require):
    require(MODULES.get(library, library))
    found = expand_libraries.measure(library, side=32)
    assert (found.convolutions, found.expanded) == EXPANDED[library]
    assert found.elements[1] > found.elements[0]
    assert found.start < 1e-4  # batch norms over eight images enlarge what is rounded
    assert found.end < 1e-5
    assert found.moved > 1e-2  # it has learned something, far more than the error that is allowed


def test_every_network_of_the_table_is_tested():
    assert set(expand_libraries.LIBRARIES) == set(EXPANDED)


@pytest.mark.usefixtures("float32")
def test_the_command_prints_a_row_for_each_library_and_names_what_is_missing(capsys, monkeypatch):
    def absent(side):
        raise ModuleNotFoundError("No module named 'absent'")

    libraries = {"lax": expand_libraries.LIBRARIES["lax"], "absent": ("Net", absent)}
    monkeypatch.setattr(expand_libraries, "LIBRARIES", libraries)
    expand_libraries.main(["--side", "8"])
    *_, header, rule, first, second = capsys.readouterr().out.strip().splitlines()
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert len(cells) == header.count("|") - 1 == rule.count("|") - 1
    assert cells[:4] == ["lax", "four convolutions", "4", "4"]
    assert float(cells[6]) < 1e-5
    assert "not run: No module named 'absent': pip install -e \".[foreign]\"" in second


@pytest.mark.usefixtures("float32")
def test_a_wrong_tree_and_a_wrong_kernel_are_seen(monkeypatch):
    expand = expand_libraries.expand

    def broken(change):
        def wrong(*arguments, **options):
            wide = expand(*arguments, **options)
            collapse = wide.collapse
            wide.collapse = lambda *given: jax.tree.map(change, collapse(*given))
            return wide

        return wrong

    monkeypatch.setattr(expand_libraries, "expand", broken(lambda leaf: leaf * 1.01))
    assert expand_libraries.measure("lax", side=8).end > 1e-3
    monkeypatch.setattr(expand_libraries, "expand", broken(lambda leaf: leaf.astype(jnp.bfloat16)))
    with pytest.raises(ValueError, match="not like the variables"):
        expand_libraries.measure("lax", side=8)
