from pathlib import Path

import numpy as np
import pytest

from repvgg_jax.data import load_dataset
from repvgg_jax.data.folder import load_folder
from tests.data.tiny_data import encode, noise


def write_images(directory: Path, count: int, suffix: str = ".png", channels: int = 3) -> None:
    directory.mkdir(parents=True)
    for index in range(count):
        file_format = {".jpg": "JPEG", ".jpeg": "JPEG"}.get(suffix.lower(), suffix.lower()[1:].upper())
        image = noise(6, 8, channels, seed=index)
        (directory / f"{index:02}{suffix}").write_bytes(encode(image, file_format))


def files(source) -> list[str]:
    return [str(Path(file).relative_to(Path(file).parents[1])) for file in source._files]


def test_given_splits_are_read_as_they_are(tmp_path):
    for name in ("cat", "ant", "bee"):
        write_images(tmp_path / "train" / name, 3)
    write_images(tmp_path / "test" / "bee", 2)
    dataset = load_dataset(f"folder:{tmp_path}")
    assert dataset.class_names == ("ant", "bee", "cat")
    assert (dataset.channels, dataset.image_shape) == (3, None)
    assert [record["label"] for record in dataset.train] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [record["label"] for record in dataset.test] == [1, 1]
    assert dataset.train[0]["image"].shape == (6, 8, 3)


@pytest.mark.parametrize("name", ["test", "validation", "val"])
def test_the_held_out_split_has_several_names(tmp_path, name):
    write_images(tmp_path / "train" / "a", 2)
    write_images(tmp_path / name / "a", 1)
    assert len(load_folder(tmp_path).test) == 1


def test_the_drawn_split_is_a_stratified_fifth_fixed_by_the_seed(tmp_path):
    for name, count in (("a", 20), ("b", 10), ("c", 2)):
        write_images(tmp_path / name, count)
    first, again, other = load_folder(tmp_path), load_folder(tmp_path), load_folder(tmp_path, seed=1)
    assert np.bincount([record["label"] for record in first.test]).tolist() == [4, 2, 1]
    assert sorted(files(first.train) + files(first.test)) == sorted(
        f"{name}/{index:02}.png" for name, count in (("a", 20), ("b", 10), ("c", 2)) for index in range(count)
    )
    assert files(first.test) == files(again.test)
    assert files(first.test) != files(other.test)


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".png", ".webp", ".BMP"])
def test_every_extension_is_read_in_any_case(tmp_path, suffix):
    write_images(tmp_path / "a", 2, suffix)
    assert len(load_folder(tmp_path).train) == 1
    assert load_folder(tmp_path).train[0]["image"].shape == (6, 8, 3)


def test_grey_files_are_read_as_rgb(tmp_path):
    write_images(tmp_path / "a", 2, channels=1)
    assert load_folder(tmp_path).train[0]["image"].shape == (6, 8, 3)


def test_hidden_and_foreign_files_are_passed_over(tmp_path):
    write_images(tmp_path / "a", 2)
    write_images(tmp_path / ".cache", 2)
    (tmp_path / "a" / "._00.png").write_bytes(b"resource fork")
    (tmp_path / "a" / "notes.txt").write_text("no image")
    dataset = load_folder(tmp_path)
    assert dataset.class_names == ("a",)
    assert len(dataset.train) + len(dataset.test) == 2


def test_a_class_may_be_called_train(tmp_path):
    write_images(tmp_path / "train", 2)
    write_images(tmp_path / "plane", 2)
    assert load_folder(tmp_path).class_names == ("plane", "train")


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_dataset(f"folder:{tmp_path / 'nowhere'}")


def test_a_folder_without_classes_says_what_was_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no class directories; expected .*/CLASS/IMAGE"):
        load_folder(tmp_path)


def test_empty_classes_are_named(tmp_path):
    write_images(tmp_path / "a", 2)
    (tmp_path / "b").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no images in the class directories b; expected .*\.jpg"):
        load_folder(tmp_path)


def test_train_without_a_test_split_is_an_error(tmp_path):
    write_images(tmp_path / "train" / "a", 2)
    with pytest.raises(FileNotFoundError, match="none of test/, validation/ and val/"):
        load_folder(tmp_path)


def test_test_classes_must_be_known_from_training(tmp_path):
    write_images(tmp_path / "train" / "a", 2)
    write_images(tmp_path / "test" / "b", 2)
    with pytest.raises(ValueError, match=r"classes that .*train lacks: b; train has a"):
        load_folder(tmp_path)


def test_a_class_of_one_image_cannot_be_split(tmp_path):
    write_images(tmp_path / "a", 1)
    with pytest.raises(ValueError, match=r"class 'a' has 1 image .*at least 2"):
        load_folder(tmp_path)


def test_a_file_that_is_no_image_is_named_on_reading(tmp_path):
    write_images(tmp_path / "a", 2)
    for path in (tmp_path / "a").iterdir():
        path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"a/0[01]\.png: cannot be decoded"):
        load_folder(tmp_path).train[0]
