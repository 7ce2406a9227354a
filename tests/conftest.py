import gc
import importlib.metadata
import os
import tempfile

# Set before JAX starts. Eight virtual devices let one machine test what a pod does. The tests compile much and run
# little: without LLVM's optimisations, which change no program but its speed, they take two thirds of the time, and
# with XLA's older emitters, which compile faster, two thirds of that. Later jaxlibs end at the flag.
_OLDER_EMITTERS = importlib.metadata.version("jaxlib").startswith("0.10.")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        "--xla_cpu_use_fusion_emitters=false" if _OLDER_EMITTERS else "",
    ]
)
# The same small networks are compiled by many tests: once a session is enough.
_CACHE = tempfile.TemporaryDirectory(prefix="repvgg_jax-compiled-")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")

import jax  # noqa: E402
import pytest  # noqa: E402


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


@pytest.fixture(autouse=True, scope="module")
def forgotten():
    """What a file compiled is dropped at its end: a worker that keeps all of it grows to several gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()


def pytest_collection_finish():
    """Tracing makes and drops many objects: looking through those that stay, again and again, took a tenth of it."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


def pytest_collection_modifyitems(items):
    """The files that take longest come first, or one worker would be left alone with them in the end."""
    items.sort(key=lambda item: item.path.parent.name not in ("tests", "training", "interop"))
