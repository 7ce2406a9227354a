import pytest

from repvgg_jax.data import load_dataset
from repvgg_jax.data.sources.locate import locate, tfds_directory


def prepare(directory):
    directory.mkdir(parents=True)
    (directory / "dataset_info.json").touch()


def test_the_newest_version_is_taken(tmp_path):
    for version in ("1.0.0", "3.0.2", "10.0.0", "incomplete.ABCDEF_11.0.0"):
        prepare(tmp_path / "some" / version)
    (tmp_path / "some" / "12.0.0").mkdir()
    assert locate("some", tmp_path).name == "10.0.0"
    assert locate("some:3.*.*", tmp_path).name == "3.0.2"
    assert locate("some:1.0.0", str(tmp_path)).name == "1.0.0"


def test_a_config_is_found_by_name_or_where_it_is_the_only_one(tmp_path):
    prepare(tmp_path / "some" / "small-v1.5" / "1.0.0")
    expected = tmp_path / "some" / "small-v1.5" / "1.0.0"
    assert locate("some/small-v1.5:1.0.0", tmp_path) == expected
    assert locate("some", tmp_path) == expected


def test_several_configs_ask_for_a_choice(tmp_path):
    prepare(tmp_path / "some" / "large" / "1.0.0")
    prepare(tmp_path / "some" / "small" / "1.0.0")
    with pytest.raises(ValueError, match=r"several configs .* choose one of 'some/large', 'some/small'"):
        locate("some", tmp_path)


def test_what_has_not_been_prepared_comes_with_its_command(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        load_dataset("cifar10", data_dir=str(tmp_path))
    assert "'cifar10' has not been prepared in " in str(error.value)
    assert f"tfds.builder('cifar10', data_dir='{tmp_path}', file_format='array_record').download_and_prepare()" in str(
        error.value
    )


def test_another_version_is_listed_as_found(tmp_path):
    prepare(tmp_path / "some" / "1.0.0")
    with pytest.raises(FileNotFoundError, match=r"'some:2\.0\.0' has not been prepared .*found: some/1\.0\.0"):
        locate("some:2.0.0", tmp_path)


def test_a_missing_data_dir_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data_dir .*nowhere does not exist"):
        locate("cifar10", tmp_path / "nowhere")


@pytest.mark.parametrize(("typo", "meant"), [("cifar_10", "cifar10"), ("digit", "digits"), ("MNIST", "mnist")])
def test_a_typo_is_answered_with_what_was_meant(tmp_path, typo, meant):
    with pytest.raises(ValueError, match=rf"unknown data set '{typo}': did you mean .*'{meant}'"):
        locate(typo, tmp_path)


def test_prepared_data_sets_of_ones_own_are_offered_too(tmp_path):
    prepare(tmp_path / "my_very_own_pictures" / "1.0.0")
    with pytest.raises(ValueError, match="'my_very_own_pictures'"):
        locate("my_very_own_picture", tmp_path)


def test_what_resembles_nothing_gets_no_suggestion(tmp_path):
    with pytest.raises(ValueError, match="nothing has a similar name"):
        locate("qqqqzzzzxxxx", tmp_path)


@pytest.mark.parametrize("name", ["", "../etc", "a b", "some:1", "huggingface:some", "images/../.."])
def test_what_is_no_name_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match="is no data set name; expected 'digits', 'folder:PATH'"):
        locate(name, tmp_path)


def test_the_default_directory_is_that_of_tfds(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    prepare(tmp_path / "some" / "1.0.0")
    assert locate("some", None) == tmp_path / "some" / "1.0.0"
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert tfds_directory(None).parts[-1] == "tensorflow_datasets"


def test_an_unknown_home_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"~nobody-of-that-name/x begins with the home directory"):
        locate("some", "~nobody-of-that-name/x")
    monkeypatch.setenv("TFDS_DATA_DIR", "~nobody-of-that-name")
    with pytest.raises(FileNotFoundError, match="write the directory out"):
        load_dataset("digits")


def test_a_directory_whose_name_begins_with_a_tilde_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prepare(tmp_path / "~nobody-of-that-name" / "some" / "1.0.0")
    assert locate("some", "./~nobody-of-that-name") == tmp_path / "~nobody-of-that-name" / "some" / "1.0.0"
    assert len(load_dataset("digits", data_dir="./~nobody-of-that-name").train) == 1437


@pytest.mark.parametrize("name", ["some", "digits"])
def test_a_directory_that_is_not_utf_8_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"caf\\xe9 is not UTF-8: array_record files can neither be written nor read"):
        load_dataset(name, data_dir=f"{tmp_path}/caf\udce9")
