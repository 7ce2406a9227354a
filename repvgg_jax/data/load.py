"""Data sets by name."""

from __future__ import annotations

from repvgg_jax.data.dataset import ImageDataset
from repvgg_jax.data.sources.folder import load_folder


def load_dataset(name: str, *, data_dir: str | None = None, seed: int = 0) -> ImageDataset:
    """Open a data set.

    Args:
      name: 'digits', 'folder:PATH', or the name of a data set that TFDS has prepared as array_record, e.g. 'cifar10' or
        'NAME/CONFIG:VERSION'. The digits come with scikit-learn and are written to `data_dir` on first use.
        `load_folder` says how a folder is read, and `load_prepared` how the others are.
      data_dir: Directory in which TFDS data sets lie prepared. By default it is that of TFDS: `TFDS_DATA_DIR`, or else
        `~/tensorflow_datasets`.
      seed: Seed that draws the test images of a folder without a test split. The others have fixed splits.

    Returns:
      The data set.

    Raises:
      FileNotFoundError: If the data set, its directory or a split is missing. The message gives the remedy.
      OSError: If a directory of a folder cannot be read.
      ValueError: If the name is unknown, there are fewer than two classes, or the data do not fit.

    Example:
      >>> from repvgg_jax.data import load_dataset
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
