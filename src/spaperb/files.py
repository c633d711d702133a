"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a path to write to, and move it to ``path`` once it is written.

    A process that is killed meanwhile leaves ``path`` as it was, and a folder ``.spaperb-...`` beside it that may be deleted.

    Parameters
    ----------
    path
        Where the file is to be; its folder is made if it is missing.
    overwrite
        Whether to replace a file that is there by then.

    Raises
    ------
    FileExistsError
        If a file is there and is not to be replaced; it stays as it is.
    OSError
        If it cannot be written: no rights, a full disk. A file that was there stays as it is.
    """
    with _folder_beside(path) as folder:
        whole = folder / path.name
        try:
            yield whole
        except (OSError, RuntimeError) as error:  # HDF5 and PyTorch raise either
            was = "is as it was" if path.exists() else "was not made"
            raise OSError(f"{path} could not be written, and {was}: {error}") from error
        if overwrite:
            os.replace(whole, path)
        else:
            _move_to_new(whole, path)


def check_writable(path: Path) -> None:
    """Check that a file can be written whole, before hours of work go into it.

    Parameters
    ----------
    path
        Where the file is to be; its folder is made if it is missing.

    Raises
    ------
    OSError
        If no file can be made in the folder, or the path is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder. Give the path of a file.")
    with _folder_beside(path):
        pass


@contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=".spaperb-")
    except OSError as error:
        raise OSError(
            f"{path} cannot be written, because no file can be made in {path.parent}: "
            f"{error.strerror}. Choose another folder."
        ) from error
    with folder as name:
        yield Path(name)


def _move_to_new(whole: Path, path: Path) -> None:
    """Move a file to where none may be."""
    there = f"{path} was made by another process meanwhile, and stays as it is."
    try:
        os.link(whole, path)  # unlike a rename, refuses to replace a file
    except FileExistsError as error:
        raise FileExistsError(there) from error
    except OSError as error:  # some file systems have no links
        if path.exists():
            raise FileExistsError(there) from error
        os.rename(whole, path)
