import dataclasses

import pytest

from repvgg_jax.training import PRESETS, train_and_evaluate


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
