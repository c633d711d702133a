import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from spaperb.files import check_writable, written_whole


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")
    return path


def write(
    path: Path, text: str = "new", overwrite: bool = True, then: Callable = lambda: None
) -> None:
    with written_whole(path, overwrite=overwrite) as whole:
        whole.write_text(text)
        then()


def untouched(path):
    return path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == [path.name]


def test_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "out.txt"
    write(path, overwrite=False)
    assert path.read_text() == "new"


def test_the_old_file_is_there_until_the_new_one_is_whole(old):
    seen = []
    write(old, then=lambda: seen.append(old.read_text()))
    assert seen == ["old"]
    assert old.read_text() == "new"
    assert [p.name for p in old.parent.iterdir()] == [old.name]


@pytest.mark.parametrize("error", [OSError("disk full"), RuntimeError("file write failed")])
def test_what_fails_leaves_the_old_file(old, error):
    def fail():
        raise error

    with pytest.raises(OSError, match=r"out\.txt could not be written, and is as it was: .* f"):
        write(old, "half", then=fail)
    assert untouched(old)


def test_file_size_limit(old):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"as it was: .*File too large"):
            write(old, "x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert untouched(old)


def test_a_file_made_meanwhile_stays(tmp_path):
    path = tmp_path / "out.txt"
    with pytest.raises(FileExistsError, match=r"out\.txt was made by another process"):
        write(path, overwrite=False, then=lambda: path.write_text("old"))
    assert untouched(path)


class TestWithoutLinks:
    """As on exFAT and some network drives."""

    @pytest.fixture(autouse=True)
    def _no_links(self, monkeypatch):
        def refuse(*args):
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)

    def test_new_file(self, tmp_path):
        write(tmp_path / "out.txt", overwrite=False)
        assert (tmp_path / "out.txt").read_text() == "new"

    def test_a_file_made_meanwhile_stays(self, old):
        with pytest.raises(FileExistsError):
            write(old, overwrite=False)
        assert untouched(old)


class TestCheckWritable:
    def test_leaves_nothing(self, tmp_path):
        check_writable(tmp_path / "out.txt")
        assert not list(tmp_path.iterdir())

    def test_folder_in_place_of_the_file(self, tmp_path):
        with pytest.raises(IsADirectoryError, match="is a folder"):
            check_writable(tmp_path)

    def test_file_in_place_of_the_folder(self, old):
        with pytest.raises(OSError, match=r"no file can be made in .*out\.txt: "):
            check_writable(old / "out.txt")
        assert untouched(old)

    @pytest.mark.skipif(not hasattr(os, "seteuid"), reason="there are no users to be")
    def test_read_only_folder(self, old, monkeypatch):
        # Relative, because another user may not come through the folders above.
        monkeypatch.chdir(old.parent)
        old.parent.chmod(0o555)
        user = os.geteuid()
        if user == 0:  # may write everywhere
            os.seteuid(65534)
        try:
            with pytest.raises(OSError, match=r"no file can be made in \.: Permission denied"):
                check_writable(old.relative_to(old.parent))
        finally:
            os.seteuid(user)
            old.parent.chmod(0o755)
        assert untouched(old)
