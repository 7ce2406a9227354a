import importlib.util

import pytest


@pytest.fixture
def require():
    """Skip a test whose library is missing; it is not imported, for Keras would choose its backend then."""

    def skip_without(module):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f'{module} is not installed: pip install -e ".[foreign]"')

    return skip_without
