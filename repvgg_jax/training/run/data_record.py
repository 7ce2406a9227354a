"""`dataset.json` of a run: what a later look at the run must find again of its data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from repvgg_jax.data import ImageDataset
from repvgg_jax.fields import read_object, require_types
from repvgg_jax.files import write_whole
from repvgg_jax.preprocess import Normalization, require_normalization


class TrainingData(NamedTuple):
    """A data set, and how its images are normalised."""

    dataset: ImageDataset
    normalization: Normalization


class DataRecord(NamedTuple):
    """The data that a run was trained on.

    Attributes:
      train_images: Number of training images.
      test_images: Number of test images.
      channels: 1 (grey) or 3 (RGB).
      class_names: One name for each class.
      mean: Means of the channels, for pixels in [0, 1].
      std: Standard deviations of the channels, for pixels in [0, 1].
    """

    train_images: int
    test_images: int
    channels: int
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, data: TrainingData) -> DataRecord:
        """Return the record of the data of a run."""
        dataset, normalization = data
        return cls(len(dataset.train), len(dataset.test), dataset.channels, tuple(dataset.class_names), *normalization)

    @property
    def normalization(self) -> Normalization:
        """The normalisation of the images, given or measured when the run began."""
        return Normalization(self.mean, self.std)

    @classmethod
    def load(cls, workdir: Path) -> DataRecord:
        """Read the record of a run.

        Raises:
          FileNotFoundError: If there is none.
          ValueError: If it is damaged. File and field are named.
        """
        path = workdir / "dataset.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist: restore it from a copy of the run, or train anew")
        try:
            fields = read_object(path)
            if set(fields) != set(cls._fields):
                raise ValueError(f"the fields are {', '.join(fields) or 'none'}: expected {', '.join(cls._fields)}")
            record = cls(**fields)
            require_types(record)
            require_normalization(record.normalization, record.channels)
            if not record.class_names:
                raise ValueError("class_names is empty: expected at least one name")
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): restore it from a copy of the run") from None
        return record

    def save(self, workdir: Path) -> None:
        """Write the record of a run."""
        write_whole(workdir / "dataset.json", json.dumps(self._asdict(), indent=2) + "\n")

    def require(self, workdir: Path) -> None:
        """Raise a ValueError if the data are not those that the run in a directory began with."""
        earlier = DataRecord.load(workdir)._asdict()
        changed = [
            f"{name} was {earlier[name]}, is {now}" for name, now in self._asdict().items() if earlier[name] != now
        ]
        if changed:
            raise ValueError(
                f"the data are not those of the run in {workdir} ({'; '.join(changed)}): give it the old data, or "
                "train anew"
            )
