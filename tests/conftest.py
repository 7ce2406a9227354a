import os

# Eight virtual devices let one machine test what a pod does; set before JAX starts.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import pytest


@pytest.fixture
def float64():
    """Run the test in double precision, whatever JAX_ENABLE_X64 says."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def float32():
    """Run the test with JAX's default precision, whatever JAX_ENABLE_X64 says."""
    with jax.enable_x64(False):
        yield
