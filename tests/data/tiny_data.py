"""Tiny images and data sets."""

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image


def encode(image: np.ndarray | Image.Image, file_format: str = "PNG") -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    buffer = io.BytesIO()
    image.save(buffer, file_format)
    return buffer.getvalue()


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def lock_directories(monkeypatch) -> None:
    """Refuses the directories called 'locked', as the system does to those who may not read them; root may read all."""
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)


def write_tfds(
    data_dir: Path,
    splits: dict[str, list[tuple[bytes, int]]],
    *,
    features=None,
    num_classes: int = 5,
    called: str = "tiny",
) -> Path:
    """Prepares a TFDS data set; returns its version directory."""
    import tensorflow_datasets as tfds

    from repvgg_jax.data.sources.digits import _quiet

    chosen = features or {
        "image": tfds.features.Image(shape=(None, None, 3)),
        "label": tfds.features.ClassLabel(num_classes=num_classes),
    }

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        name = called
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(chosen))

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(records) for split, records in splits.items()}

        def _generate_examples(self, records):
            image, label = list(chosen)[:2]
            for index, (encoded, value) in enumerate(records):
                yield index, {image: io.BytesIO(encoded), label: value}

    with _quiet():
        builder = Tiny(data_dir=str(data_dir), file_format="array_record")
        builder.download_and_prepare()
    return Path(builder.data_dir)
