"""The examples in docstrings run and print what they say."""

import doctest
import importlib

import pytest

from tests.docs.pages import ROOT

MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "repvgg_jax").rglob("*.py"))
    if ">>> " in path.read_text()
]


@pytest.mark.long
@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_run(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0
