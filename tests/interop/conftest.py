import pytest

from repvgg_jax import VARIANTS

# As different from each other as the published depths, and as even: every other block is in groups.
SHORT = {(2, 4, 14, 1): (1, 2, 2, 1), (4, 6, 16, 1): (2, 2, 4, 1), (8, 14, 24, 1): (1, 3, 4, 1)}


@pytest.fixture(scope="module")
def short_variants():
    """The table of published networks with fewer blocks: how many there are is read off the table."""
    with pytest.MonkeyPatch.context() as patch:
        for name, variant in VARIANTS.items():
            patch.setitem(VARIANTS, name, variant._replace(depths=SHORT[variant.depths]))
        yield
