import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import zarr
from helpers import small_cells

from spaperb._files import (
    atomic_write,
    check_annotations,
    check_writable,
    read_cells,
    write_cells,
)


@pytest.fixture
def old(tmp_path):
    path = tmp_path / "out.txt"
    path.write_text("old")
    return path


def write(
    path: Path, text: str = "new", overwrite: bool = True, then: Callable = lambda: None
) -> None:
    with atomic_write(path, overwrite=overwrite) as whole:
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


def test_an_existing_file_is_refused_before_any_work(old):
    def never():
        raise AssertionError("work was done")

    with pytest.raises(FileExistsError, match=r"out\.txt exists; pass overwrite=True"):
        write(old, overwrite=False, then=never)
    assert untouched(old)


class TestFolders:
    """As zarr stores are."""

    @pytest.fixture
    def store(self, tmp_path):
        return make_folder(tmp_path / "out.zarr", "old")

    def write(self, path, overwrite=True, then=lambda: None):
        with atomic_write(path, overwrite=overwrite) as whole:
            make_folder(whole, "new")
            then()

    def content(self, path) -> dict[str, str]:
        files = [file for file in path.rglob("*") if file.is_file()]
        return {str(file.relative_to(path)): file.read_text() for file in files}

    def test_new(self, tmp_path):
        path = tmp_path / "out.zarr"
        self.write(path, overwrite=False)
        assert self.content(tmp_path) == {"out.zarr/new": "new", "out.zarr/zarr.json": "new"}

    def test_replaced_whole(self, store):
        seen = []
        self.write(store, then=lambda: seen.append(self.content(store)))
        assert seen == [{"old": "old", "zarr.json": "old"}]
        assert self.content(store.parent) == {"out.zarr/new": "new", "out.zarr/zarr.json": "new"}

    def test_existing_one_is_refused(self, store):
        with pytest.raises(FileExistsError, match=r"out\.zarr exists; pass overwrite=True"):
            self.write(store, overwrite=False)
        assert self.content(store.parent) == {"out.zarr/old": "old", "out.zarr/zarr.json": "old"}

    def test_one_made_meanwhile_stays(self, tmp_path):
        path = tmp_path / "out.zarr"
        with pytest.raises(FileExistsError, match=r"out\.zarr was made by another process"):
            self.write(path, overwrite=False, then=lambda: make_folder(path, "old"))
        assert self.content(tmp_path) == {"out.zarr/old": "old", "out.zarr/zarr.json": "old"}

    @pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
    @pytest.mark.parametrize("at", [1, 2])
    def test_a_rename_that_fails_leaves_the_old_one(self, store, monkeypatch, at, error):
        rename, calls = os.rename, []

        def fail(*args):
            calls.append(args)
            if len(calls) == at:
                raise error
            rename(*args)

        monkeypatch.setattr(os, "rename", fail)
        with pytest.raises(type(error)):
            self.write(store)
        assert self.content(store.parent) == {"out.zarr/old": "old", "out.zarr/zarr.json": "old"}

    @pytest.mark.slow
    @pytest.mark.parametrize("at", [0, 1, 2, 3])
    def test_a_kill_loses_neither(self, store, at):
        """Before and after each rename, and before the old one is deleted."""
        code = (
            "import os, shutil, sys, tempfile; from pathlib import Path\n"
            "from spaperb._files import atomic_write\n"
            "at, calls = int(sys.argv[2]), 0\n"
            "def killed(function):\n"
            "    def call(*args, **kwargs):\n"
            "        global calls\n"
            "        if calls == at: os._exit(9)\n"
            "        calls += 1\n"
            "        return function(*args, **kwargs)\n"
            "    return call\n"
            "with atomic_write(Path(sys.argv[1]), overwrite=True) as whole:\n"
            "    whole.mkdir()\n"
            "    for name in ('new', 'zarr.json'): (whole / name).write_text('new')\n"
            "    os.rename, shutil.rmtree = killed(os.rename), killed(shutil.rmtree)\n"
            "    tempfile._shutil.rmtree = shutil.rmtree\n"
        )
        done = subprocess.run([sys.executable, "-c", code, store, str(at)])
        assert done.returncode == (0 if at == 3 else 9)
        found = self.content(store.parent)
        whole = [name for name in ("old", "new") if any(Path(x).name == name for x in found)]
        assert len(found) == 2 * len(whole)
        assert whole == (["new"] if at == 3 else ["old", "new"])
        assert store.exists() == (at != 1)


def make_folder(path: Path, text: str) -> Path:
    path.mkdir()
    for name in (text, "zarr.json"):
        (path / name).write_text(text)
    return path


class TestCells:
    @pytest.fixture
    def cells(self):
        adata = small_cells()
        # Named, because pandas 2 and 3 have other ones for text.
        adata.obs_names = pd.Index(adata.obs_names, dtype="string")
        adata.var_names = pd.Index(adata.var_names, dtype="string")
        adata.raw = adata
        adata.obs["text"] = pd.array(["a", pd.NA, "b"] * 40, dtype="string")
        adata.obs["number"] = pd.array([1, pd.NA, 2] * 40, dtype="Int64")
        adata.obsm["X_pca"] = np.ones((120, 2))
        table = pd.DataFrame({"x": [1.0, 2.0]}, index=pd.Index(["a", "b"], dtype="string"))
        adata.uns["deep"] = {"none": None, "table": table}
        return adata

    @pytest.mark.parametrize("name", ["a.h5ad", "a.zarr"])
    @pytest.mark.parametrize("version", [2, 3])
    def test_they_come_back(self, cells, tmp_path, name, version):
        expected = cells.copy()
        with ad.settings.override(zarr_write_format=version):
            check_annotations(cells, tmp_path / name)
            assert not list(tmp_path.iterdir())
            write_cells(cells, tmp_path / name, overwrite=False)
        for found in (cells, read_cells(tmp_path / name)):  # what was given is as it was
            assert (found.X != expected.X).sum() == 0
            pd.testing.assert_frame_equal(found.obs, expected.obs)
            pd.testing.assert_frame_equal(found.var, expected.var)
            pd.testing.assert_frame_equal(found.raw.var, expected.raw.var)
            np.testing.assert_array_equal(found.obsm["X_pca"], expected.obsm["X_pca"])
            assert found.uns["deep"]["none"] is None
            pd.testing.assert_frame_equal(
                found.uns["deep"]["table"], expected.uns["deep"]["table"]
            )

    @pytest.mark.parametrize("name", ["a.h5ad", "a.zarr"])
    @pytest.mark.parametrize("part", ["obs", "uns", "raw/var"])
    def test_what_cannot_be_written(self, cells, tmp_path, name, part):
        check_annotations(cells, tmp_path / name)
        holder = cells.uns if part == "uns" else (cells.obs if part == "obs" else cells.raw.var)
        holder["odd"] = [object()] * len(holder) if part != "uns" else object()
        with pytest.raises(ValueError, match=f"(?s)because {part} holds something .*'odd'"):
            check_annotations(cells, tmp_path / name)
        assert not list(tmp_path.iterdir())


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

    def test_only_a_store_is_replaced_by_one(self, tmp_path):
        zarr.open_group(tmp_path / "3.zarr", mode="w", zarr_format=3)
        zarr.open_group(tmp_path / "2.zarr", mode="w", zarr_format=2)
        for name in ("2.zarr", "3.zarr", "new.zarr"):
            check_writable(tmp_path / name)
        (tmp_path / "notes.zarr").mkdir()
        with pytest.raises(IsADirectoryError, match=r"notes\.zarr is a folder"):
            check_writable(tmp_path / "notes.zarr")
        (tmp_path / "file.zarr").touch()
        with pytest.raises(NotADirectoryError, match=r"file\.zarr is a file"):
            check_writable(tmp_path / "file.zarr")

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
