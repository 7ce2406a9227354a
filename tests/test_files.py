import errno
import os
import stat

import pytest

from repvgg_jax.files import replace_whole, require_writable, write_whole


@pytest.mark.parametrize(("content", "written"), [("für\n", "für\n".encode()), (b"\xff", b"\xff")])
def test_texts_and_bytes_take_the_place_of_what_was_there(content, written, tmp_path):
    (tmp_path / "x").write_text("before")
    write_whole(tmp_path / "x", content)
    assert (tmp_path / "x").read_bytes() == written
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_what_fails_leaves_the_old_file_alone(error, tmp_path):
    def write(partial):
        partial.write_text("half")
        raise error

    (tmp_path / "x").write_text("before")
    with pytest.raises(type(error)) as caught:
        replace_whole(tmp_path / "x", write)
    assert (tmp_path / "x").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    if isinstance(error, OSError):
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "x"))


def test_a_disk_without_room_is_named_with_its_file(tmp_path):
    if not os.path.exists("/dev/full"):
        pytest.skip("/dev/full is of Linux: run the tests there")
    (tmp_path / "x.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*x'$"):
        write_whole(tmp_path / "x", "text")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("write", [require_writable, lambda path: write_whole(path, "")])
def test_a_device_is_not_replaced_by_a_file(write, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"something other than a file of this name: '.*pipe'$"):
        write(tmp_path / "pipe")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]


def test_a_look_at_whether_a_file_can_be_written_leaves_nothing(tmp_path):
    require_writable(tmp_path / "x")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError, match=r"'.*nowhere/x'$"):
        require_writable(tmp_path / "nowhere" / "x")
