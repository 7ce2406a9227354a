"""Data sets that TFDS has prepared, read without TensorFlow."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from repvgg_jax.data.dataset import ImageDataset, Record
from repvgg_jax.data.images import read_image
from repvgg_jax.data.sources.locate import locate
from repvgg_jax.data.sources.memory import keep_if_small


def load_prepared(name: str, data_dir: str | os.PathLike[str] | None = None) -> ImageDataset:
    """Open a prepared TFDS data set with an `image` and a `label`.

    The test split is `test`, or `validation` where there is no `test` or it has no labels (label -1, as in
    `imagenet2012`). Images that share one size and take at most 512 MiB are decoded only once.

    Args:
      name: `NAME[/CONFIG][:VERSION]`.
      data_dir: Directory that TFDS prepares into, or None for its default.

    Returns:
      The data set.

    Raises:
      FileNotFoundError: If it is not prepared there. The message gives the command that prepares it.
      ValueError: If the name is unknown, the file format cannot be read, or features or splits do not fit.
    """
    import tensorflow_datasets as tfds

    directory = locate(name, data_dir)
    builder = _open(directory)
    channels, image_shape, class_names = _read_features(name, builder.info.features)
    sizes = {split: info.num_examples for split, info in builder.info.splits.items()}

    def open_split(split: str) -> TfdsSplit:
        if not sizes[split]:
            raise ValueError(f"{name} {split}: the split is empty; prepare {directory} again")
        records = builder.as_data_source(split=split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
        return TfdsSplit(records, f"{name} {split}", len(class_names), channels, image_shape)

    held_out = [split for split in ("test", "validation") if split in sizes]
    if "train" not in sizes or not held_out:
        raise ValueError(
            f"data set {name!r} has the splits {', '.join(sorted(sizes)) or '(none)'}; "
            "expected 'train', and 'test' or 'validation'"
        )
    tests = [open_split(split) for split in held_out]
    test = next((split for split in tests if split.is_labelled()), tests[0])
    return ImageDataset(
        name=name,
        train=keep_if_small(open_split("train"), image_shape, channels),
        test=keep_if_small(test, image_shape, channels),
        class_names=class_names,
        channels=channels,
        image_shape=image_shape,
    )


class TfdsSplit:
    """One split of a prepared data set, decoded by `read_image`."""

    def __init__(
        self,
        records: Any,
        name: str,
        num_classes: int,
        channels: int,
        image_shape: tuple[int, int] | None,
    ):
        self._records = records
        self._name = name
        self._num_classes = num_classes
        self._channels = channels
        self._image_shape = image_shape

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> Record:
        index = range(len(self))[index]
        return self._decode(index, self._records[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Record]:
        indices = list(indices)
        return [self._decode(i, raw) for i, raw in zip(indices, self._read(indices), strict=True)]

    def is_labelled(self) -> bool:
        """Whether the first record has a label: TFDS marks unlabelled splits with -1."""
        return _parse(self._records[0])[1] >= 0

    def _read(self, indices: list[int]) -> Sequence[bytes]:
        # Reading in bulk starts threads: ten times faster for many records, ten times slower for one.
        return [self._records[indices[0]]] if len(indices) == 1 else self._records.__getitems__(indices)

    def _decode(self, index: int, raw: bytes) -> Record:
        encoded, label = _parse(raw)
        if not 0 <= label < self._num_classes:
            raise ValueError(
                f"{self._name} record {index}: label {label} is outside [0, {self._num_classes}); "
                "prepare the data set again, or repair its labels"
            )
        try:
            image = read_image(encoded, self._channels)
        except ValueError as error:
            raise ValueError(f"{self._name} record {index}: {error}") from error
        if self._image_shape is not None and image.shape[:2] != self._image_shape:
            raise ValueError(
                f"{self._name} record {index}: the image is {image.shape[:2]}, but the data set declares "
                f"{self._image_shape} for all; declare (None, None, {self._channels}) or resize the image"
            )
        return {"image": image, "label": label}


def _parse(raw: bytes) -> tuple[bytes, int]:
    from tensorflow_datasets.proto import tf_example_pb2

    feature = tf_example_pb2.Example.FromString(raw).features.feature
    return feature["image"].bytes_list.value[0], feature["label"].int64_list.value[0]


def _open(directory: Path) -> Any:
    import tensorflow_datasets as tfds

    info = tfds.builder_from_directory(directory).info
    stored = (info.file_format, *info.alternative_file_formats)
    formats = [getattr(each, "value", "an unknown format") for each in stored]
    if "array_record" not in formats:
        raise ValueError(
            f"{directory} is prepared as {', '.join(formats)}; only array_record "
            "can be read without TensorFlow. Convert it once:\n"
            f"pip install tensorflow && tfds convert_format --dataset_version_dir={directory} "
            "--out_file_format=array_record"
        )
    return tfds.builder_from_directory(directory, file_format="array_record")


def _read_features(name: str, features: Any) -> tuple[int, tuple[int, int] | None, tuple[str, ...]]:
    import tensorflow_datasets as tfds

    found = dict(features.items()) if hasattr(features, "items") else {"": features}
    image, label = found.get("image"), found.get("label")
    if not isinstance(image, tfds.features.Image) or not isinstance(label, tfds.features.ClassLabel):
        listed = ", ".join(f"{key!r} ({type(feature).__name__})" for key, feature in sorted(found.items()))
        raise ValueError(
            f"data set {name!r} has the features {listed}; expected 'image' (Image) and 'label' (ClassLabel)"
        )
    if np.dtype(image.np_dtype) not in (np.uint8, np.uint16):
        raise ValueError(f"data set {name!r}: images are {np.dtype(image.np_dtype)}, expected uint8 or uint16")
    if not label.num_classes:
        raise ValueError(f"data set {name!r}: feature 'label' declares no number of classes")
    height, width, channels = image.shape
    shape = None if height is None or width is None else (height, width)
    return (1 if channels == 1 else 3), shape, tuple(label.names)
