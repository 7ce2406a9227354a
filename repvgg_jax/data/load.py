"""A data set by name."""

from __future__ import annotations

from repvgg_jax.data.dataset import ImageDataset
from repvgg_jax.data.sources.folder import load_folder


def load_dataset(name: str, *, data_dir: str | None = None, seed: int = 0) -> ImageDataset:
    """Open a data set.

    Args:
      name: `digits` (comes with scikit-learn, written to `data_dir` on first use), `folder:PATH` (see
        `load_folder`), or a data set that TFDS has prepared as array_record: `cifar10`,
        `NAME/CONFIG:VERSION` (see `load_prepared`).
      data_dir: where TFDS data sets lie; TFDS' default when None.
      seed: draws the test images of a folder without a test split; the others have fixed splits.

    Raises:
      FileNotFoundError: the data set, its directory or a split is missing; the message gives the remedy.
      ValueError: unknown name, fewer than two classes, or data that do not fit.

    Example:
      >>> digits = load_dataset("digits")  # doctest: +SKIP
      >>> digits.train[0]["image"].shape, digits.num_classes  # doctest: +SKIP
      ((8, 8, 1), 10)
    """
    if name.startswith("folder:"):
        return load_folder(name.removeprefix("folder:"), seed=seed)
    # Importing TFDS and scikit-learn takes seconds that folders and predictions need not pay.
    from repvgg_jax.data.sources.tfds import load_prepared

    if name.partition(":")[0] == "digits":
        from repvgg_jax.data.sources.digits import prepare_digits

        prepare_digits(data_dir)
    return load_prepared(name, data_dir)
