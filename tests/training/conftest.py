import dataclasses

import jax
import pytest

from repvgg_jax.training import PRESETS, loop, train_and_evaluate


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("tfds"))


@pytest.fixture(scope="session")
def tiny(data_dir):
    """The digits preset, cut to a network and a schedule that train in seconds."""
    return dataclasses.replace(
        PRESETS["digits"],
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
