from collections.abc import Callable
from pathlib import Path

import pytest

from repvgg_jax.data import ImageDataset, load_dataset
from tests.data.tiny_data import noise


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="session")
def digits(data_dir: Path) -> ImageDataset:
    return load_dataset("digits", data_dir=str(data_dir))


@pytest.fixture
def numbered() -> Callable[[int], list]:
    """Makes records that can be told apart: record i is labelled i and holds its own noise."""

    def make(count: int, height: int = 4, width: int = 4, channels: int = 3) -> list:
        return [{"image": noise(height, width, channels, seed=i), "label": i} for i in range(count)]

    return make
