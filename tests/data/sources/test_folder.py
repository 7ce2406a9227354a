import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from repvgg_jax.data import load_dataset
from repvgg_jax.data.sources.folder import load_folder
from tests.data.tiny_data import encode, lock_directories, noise


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


@pytest.fixture(params=[False, True], ids=["by name", "backwards"])
def listed(request, tmp_path, monkeypatch):
    """Have the file system list directories by name and backwards: it may list them in any order."""
    scandir = os.scandir

    @contextmanager
    def ordered(path):
        with scandir(path) as entries:
            yield iter(sorted(entries, key=lambda entry: entry.name, reverse=request.param))

    monkeypatch.setattr(os, "scandir", ordered)


@pytest.mark.usefixtures("listed")
def test_images_come_by_class_and_then_by_path_in_whatever_order_they_are_listed(tmp_path):
    for path in ("b/2.png", "b/10.png", "a/z.png", "a/m/1.png", "a/B.png", "a/m/0/7.png", "a/n/0.png"):
        (tmp_path / "train" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / path).write_bytes(encode(noise(2, 2, 3)))
    write_images(tmp_path / "test" / "b", 2)
    for name in ("y.tif", "x.tif"):
        (tmp_path / "train" / "b" / name).write_bytes(b"")
    dataset = load_folder(tmp_path)
    assert [str(Path(file).relative_to(tmp_path / "train")) for file in dataset.train._files] == [
        "a/B.png", "a/m/0/7.png", "a/m/1.png", "a/n/0.png", "a/z.png", "b/10.png", "b/2.png",
    ]  # fmt: skip
    assert [record["label"] for record in dataset.train] == [0, 0, 0, 0, 0, 1, 1]
    assert files(dataset.test) == ["b/00.png", "b/01.png"]
    assert dataset.left_out.endswith("2 left out: 2 .tif (train/b/x.tif, …)")


@pytest.mark.usefixtures("listed")
@pytest.mark.parametrize(
    ("seed", "drawn"),
    [
        ({}, ["a/04.png", "a/06.png", "b/01.png", "c/00.png", "d/01.png", "d/03.png"]),
        ({"seed": 0}, ["a/04.png", "a/06.png", "b/01.png", "c/00.png", "d/01.png", "d/03.png"]),
        ({"seed": 1}, ["a/04.png", "a/08.png", "b/01.png", "c/01.png", "d/00.png", "d/03.png"]),
    ],
    ids=str,
)
def test_the_drawn_images_are_these_on_every_machine(tmp_path, seed, drawn):
    counts = {"a": 10, "b": 5, "c": 2, "d": 8}
    for name, count in counts.items():
        write_images(tmp_path / name, count)
    dataset = load_folder(tmp_path, **seed)
    assert files(dataset.test) == drawn
    everything = [f"{name}/{index:02}.png" for name, count in counts.items() for index in range(count)]
    assert files(dataset.train) == [file for file in everything if file not in drawn]


@pytest.mark.parametrize(
    ("there", "read"),
    [
        (("val", "validation", "test"), "test"),
        (("val", "test"), "test"),
        (("validation", "test"), "test"),
        (("val", "validation"), "validation"),
    ],
)
def test_of_several_held_out_splits_test_wins_and_then_validation(tmp_path, there, read):
    for name in ("train/a", "train/b", *(f"{split}/a" for split in there)):
        write_images(tmp_path / name, 2)
    dataset = load_folder(tmp_path)
    assert {Path(file).parts[-3] for file in dataset.test._files} == {read}
    assert dataset.left_out == ""


@pytest.mark.parametrize("name", ["test", "validation", "val"])
def test_the_held_out_split_has_several_names(tmp_path, name):
    write_images(tmp_path / "train" / "a", 2)
    write_images(tmp_path / "train" / "b", 2)
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
    write_images(tmp_path / "b", 2, suffix)
    assert len(load_folder(tmp_path).train) == 2
    assert load_folder(tmp_path).train[0]["image"].shape == (6, 8, 3)


def test_grey_files_are_read_as_rgb(tmp_path):
    write_images(tmp_path / "a", 2, channels=1)
    write_images(tmp_path / "b", 2)
    assert load_folder(tmp_path).train[0]["image"].shape == (6, 8, 3)


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
    with pytest.raises(FileNotFoundError, match="has train/, but none of test/, validation/ and val/"):
        load_folder(tmp_path)


@pytest.mark.parametrize("name", ["valid", "Test", "testing"])
def test_a_split_of_another_name_is_named(tmp_path, name):
    write_images(tmp_path / "train" / "a", 2)
    write_images(tmp_path / name / "a", 2)
    with pytest.raises(FileNotFoundError, match=rf"has train/, {name}, but none of .*: add one, give one of them that"):
        load_folder(tmp_path)


def test_test_classes_must_be_known_from_training(tmp_path):
    write_images(tmp_path / "train" / "a", 2)
    write_images(tmp_path / "train" / "b", 2)
    write_images(tmp_path / "test" / "c", 2)
    with pytest.raises(ValueError, match=r"classes that .*train lacks: c; train has a, b"):
        load_folder(tmp_path)


def test_a_class_of_one_image_cannot_be_split(tmp_path):
    write_images(tmp_path / "a", 1)
    write_images(tmp_path / "b", 2)
    with pytest.raises(ValueError, match=r"class 'a' has 1 image .*at least 2"):
        load_folder(tmp_path)


def test_a_file_that_is_no_image_is_named_on_reading(tmp_path):
    write_images(tmp_path / "a", 2)
    write_images(tmp_path / "b", 2)
    for path in (tmp_path / "a").iterdir():
        path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match=r"a/0[01]\.png: cannot be decoded"):
        load_folder(tmp_path).train[0]


def test_images_below_a_class_directory_are_of_the_class(tmp_path):
    write_images(tmp_path / "a", 2)
    write_images(tmp_path / "a" / "2024" / "may", 3)
    write_images(tmp_path / "b" / "only" / "below", 3)
    dataset = load_folder(tmp_path)
    labels = [record["label"] for source in (dataset.train, dataset.test) for record in source]
    assert np.bincount(labels).tolist() == [5, 3]
    assert dataset.left_out == ""


def test_links_are_followed_and_circles_of_them_end(tmp_path):
    write_images(tmp_path / "elsewhere" / "cats", 3)
    write_images(tmp_path / "data" / "b", 2)
    write_images(tmp_path / "elsewhere" / "more", 2)
    (tmp_path / "data" / "a").symlink_to(tmp_path / "elsewhere" / "cats")
    (tmp_path / "data" / "b" / "more").symlink_to(tmp_path / "elsewhere" / "more")
    (tmp_path / "data" / "b" / "round").symlink_to(tmp_path / "data" / "b")
    (tmp_path / "elsewhere" / "more" / "back").symlink_to(tmp_path / "data" / "b")
    (tmp_path / "data" / "b" / "file.png").symlink_to(tmp_path / "elsewhere" / "cats" / "00.png")
    dataset = load_folder(tmp_path / "data")
    labels = [record["label"] for source in (dataset.train, dataset.test) for record in source]
    assert dataset.class_names == ("a", "b")
    assert np.bincount(labels).tolist() == [3, 5]


def test_what_is_not_read_is_counted_in_one_line(tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path / name, 2)
    for name in ("x.tif", "y.TIF", "z.jfif"):
        (tmp_path / "a" / name).write_bytes(b"an image all the same")
    (tmp_path / "b" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "b" / "self.png").symlink_to(tmp_path / "b" / "self.png")
    os.mkfifo(tmp_path / "b" / "pipe.png")
    (tmp_path / "lonely\n.png").write_bytes(b"of no class")
    dataset = load_folder(tmp_path)
    assert len(dataset.train) + len(dataset.test) == 4
    assert dataset.left_out == (
        f"{tmp_path}: 7 left out: 2 .tif (a/x.tif, …), 2 broken link (b/gone.png, …), "
        "1 image in no class directory (lonely\\n.png), 1 .jfif (a/z.jfif), 1 no regular file (b/pipe.png)"
    )


def test_names_of_the_system_and_hidden_names_are_passed_over(tmp_path):
    for name in ("a", "b", ".cache", "__MACOSX", "@eaDir", "System Volume Information", "a/.hidden", "a/__MACOSX"):
        write_images(tmp_path / name, 2)
    (tmp_path / "a" / "._00.png").write_bytes(b"resource fork")
    (tmp_path / ".DS_Store").write_bytes(b"")
    dataset = load_folder(f"{tmp_path}/")
    assert dataset.class_names == ("a", "b")
    assert len(dataset.train) + len(dataset.test) == 4
    assert dataset.left_out == ""


@pytest.mark.parametrize(
    "names", [("train", "test"), ("train",), ("val",), ("Train/a", "Train/b", "Test/a"), ("test", "val", "plane")]
)
def test_splits_without_classes_are_not_taken_for_classes(tmp_path, names):
    for name in names:
        write_images(tmp_path / name, 3)
    with pytest.raises(ValueError, match=r"named as splits, not as classes: expected train/CLASS/IMAGE and test/CLASS"):
        load_folder(tmp_path)


def test_a_level_too_much_is_named(tmp_path):
    write_images(tmp_path / "pets" / "cat", 3)
    write_images(tmp_path / "pets" / "dog", 3)
    with pytest.raises(
        ValueError, match=r"one class directory pets: .* If cat, dog in it are the classes .*, name .*/pets$"
    ):
        load_folder(tmp_path)
    assert load_folder(tmp_path / "pets").class_names == ("cat", "dog")


@pytest.mark.parametrize("level", ["", "train"])
def test_one_class_is_refused(tmp_path, level):
    write_images(tmp_path / level / "only", 3)
    write_images(tmp_path / "test" / "only", 3) if level else None
    with pytest.raises(ValueError, match=r"one class directory only: expected two or more"):
        load_folder(tmp_path)


@pytest.mark.parametrize("test", ["test", "test/unknown"])
def test_a_test_split_without_the_classes_gives_way_to_a_validation_split(tmp_path, test):
    for name in ("train/a", "train/b", "val/a", "val/b"):
        write_images(tmp_path / name, 2)
    write_images(tmp_path / test, 3)
    dataset = load_folder(tmp_path)
    assert [record["label"] for record in dataset.test] == [0, 0, 1, 1]
    assert "held-out directory without classes, val/ is read instead (test)" in dataset.left_out


def test_a_flat_test_split_alone_says_what_was_expected(tmp_path):
    for name in ("train/a", "train/b", "test"):
        write_images(tmp_path / name, 2)
    with pytest.raises(FileNotFoundError, match=rf"test has no class directories \(2 images .*{tmp_path}/test/CLASS"):
        load_folder(tmp_path)


@pytest.mark.parametrize("link", ["first", "last", "train/last"])
def test_a_directory_that_is_read_as_another_class_is_no_class(tmp_path, link):
    level = tmp_path / "train" if link.startswith("train") else tmp_path
    for name in ("horse", "mouse"):
        write_images(level / name, 3)
        write_images(tmp_path / "test" / name, 3) if level != tmp_path else None
    (tmp_path / link).symlink_to(level / "horse")
    name = os.path.basename(link)
    with pytest.raises(FileNotFoundError, match=rf"in the class directories {name}; .* read already \({name}\)$"):
        load_folder(tmp_path)


def test_images_of_another_class_are_left_out_wherever_links_lead(tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path / name, 3)
    (tmp_path / "b" / "back").symlink_to(tmp_path / "a")
    dataset = load_folder(tmp_path)
    assert sorted(files(dataset.train) + files(dataset.test)) == [f"{c}/0{i}.png" for c in "ab" for i in range(3)]
    assert "or to a directory that is read already (b/back)" in dataset.left_out


def test_training_images_are_no_test_images(tmp_path):
    for name in ("a", "b"):
        write_images(tmp_path / "train" / name, 3)
    (tmp_path / "test").symlink_to("train")
    with pytest.raises(FileNotFoundError, match=r"test: no images in .* a, b; .* a directory that is read already"):
        load_folder(tmp_path)


def test_a_directory_that_cannot_be_read_is_no_smaller_data_set(tmp_path, monkeypatch):
    for name in ("a", "b", "b/locked"):
        write_images(tmp_path / name, 2)
    lock_directories(monkeypatch)
    with pytest.raises(OSError, match=r"b/locked cannot be read \(Permission denied\)"):
        load_folder(tmp_path)


def test_names_in_errors_command_no_terminal(tmp_path):
    write_images(tmp_path / "a", 2)
    (tmp_path / "b\x1b[2J").mkdir()
    with pytest.raises(FileNotFoundError, match=r"class directories b\\x1b\[2J; expected"):
        load_folder(tmp_path)


@pytest.mark.parametrize("path", ["", "~nobody-of-that-name/x"])
def test_no_directory_and_an_unknown_home_are_refused(path):
    with pytest.raises(FileNotFoundError, match=r"names no directory|home directory of a user, which is not known"):
        load_dataset(f"folder:{path}")


def test_a_folder_whose_name_begins_with_a_tilde_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_images(tmp_path / "~nobody-of-that-name" / name, 2)
    assert load_dataset("folder:./~nobody-of-that-name").class_names == ("a", "b")
