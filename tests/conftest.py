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


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="session")
def tiny(data_dir):
    """The digits preset, cut to a network and a schedule that train in seconds."""
    from repvgg_jax.training import PRESETS

    return PRESETS["digits"].replace(
        data_dir=data_dir,
        depths=(1, 2, 1, 1),
        width_multiplier=(0.25, 0.125, 0.0625, 0.0625),
        strides=(1, 2, 1, 2, 1),
        epochs=2,
        warmup_epochs=0,
        checkpoint_every=1,
    )


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """A finished run of `tiny`; tests that change it copy it first."""
    from repvgg_jax.training import train_and_evaluate

    return train_and_evaluate(tiny, tmp_path_factory.mktemp("runs") / "finished")


class BegunError(Exception):
    """Has the state and the batch of a run's first step."""


class FirstStep:
    """In place of a compiled training step."""

    def lower(self, *_):
        return self

    def compile(self):
        return self

    def __call__(self, state, batch):
        raise BegunError(state, batch)


@pytest.fixture
def begin(monkeypatch):
    """Starts a run: (config, workdir) -> the state and the batch that its first step would be given."""
    from repvgg_jax.training import loop, train_and_evaluate

    def start(config, workdir):
        with monkeypatch.context() as patch, pytest.raises(BegunError) as begun:
            patch.setattr(loop, "make_train_step", lambda *_, **__: FirstStep())
            train_and_evaluate(config, workdir)
        state, batch = begun.value.args
        # The step donates its state, and must not be given one array twice.
        leaves = jax.tree.leaves(state)
        assert len({leaf.addressable_shards[0].data.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)
        return jax.device_get(state), jax.device_get(batch)

    return start


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
    longest = {"cli", "training", "interop"}
    items.sort(key=lambda item: item.path.parent.name != "tests" and longest.isdisjoint(item.path.parts))
