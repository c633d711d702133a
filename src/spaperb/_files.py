"""Files that are written whole or not at all, and AnnData in them."""

from __future__ import annotations

import itertools
import json
import os
import pickle
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import torch
import zarr
from anndata import AnnData
from safetensors import SafetensorError, safe_open

from spaperb._messages import format_list

SUFFIXES = (".h5ad", ".zarr")
"""Of files of cells that are read and written."""
NUMBERS = "biuf"
"""Kinds of NumPy data types that safetensors stores."""
READ_ERRORS = (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError)
"""What reading a safetensors file may raise."""
ANNOTATIONS = ("obs", "var", "uns", "obsm", "varm", "obsp", "varp")
"""What an AnnData holds beside expression."""


def read_cells(path: Path) -> AnnData:
    """Read an AnnData into memory.

    Parameters
    ----------
    path
        File ``.h5ad`` or store ``.zarr`` (format 2 or 3) that AnnData wrote.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If it is something else, or cannot be read.
    """
    check_readable(path)
    try:
        return ad.read_zarr(path) if path.suffix == ".zarr" else ad.read_h5ad(path)
    except Exception as error:
        raise ValueError(
            f"{path} could not be read as an AnnData: {described(error)}. If it is "
            "truncated or damaged, copy or write it again."
        ) from error


def check_readable(path: Path) -> None:
    """Check that a path is a file or a store of cells, by its name and kind.

    Parameters
    ----------
    path
        The path.

    Raises
    ------
    FileNotFoundError
        If there is nothing.
    ValueError
        If it is something else; says how to convert it.
    """
    if not path.exists():
        raise FileNotFoundError(f"There is no file {path}.")
    if not (path.suffix == ".h5ad" and path.is_file()) and not _is_store(path):
        raise ValueError(
            f"{path} is neither an .h5ad file nor a .zarr store, and only these are read. "
            f"{_conversion(path)}"
        )


def write_cells(adata: AnnData, path: Path, *, overwrite: bool) -> None:
    """Write an AnnData whole or not at all; its columns stay what they are.

    Parameters
    ----------
    adata
        The AnnData.
    path
        File ``.h5ad`` or store ``.zarr`` to write.
    overwrite
        Whether to replace one that is there.

    Raises
    ------
    FileExistsError
        If one is there and is not to be replaced.
    OSError
        If it cannot be written; one that was there stays as it is.
    """
    with atomic_write(path, overwrite=overwrite) as whole:
        if path.suffix == ".zarr":
            group = _new_zarr(whole)
            _write(group, "/", adata)
            zarr.consolidate_metadata(group.store)
            return
        with _hdf5_in_memory() as file:
            _write(file, "/", adata)
            file.flush()
            whole.write_bytes(file.id.get_file_image())


def check_annotations(adata: AnnData, path: Path) -> None:
    """Check that all but expression can be written, by writing it to memory.

    Parameters
    ----------
    adata
        The AnnData.
    path
        File ``.h5ad`` or store ``.zarr`` to be written.

    Raises
    ------
    ValueError
        If a part is of a kind that such a file cannot hold.
    """
    parts = {name: getattr(adata, name) for name in ANNOTATIONS}
    if adata.raw is not None:
        parts |= {"raw/var": adata.raw.var, "raw/varm": adata.raw.varm}
    # HDF5 for a zarr store too, which takes what is no text and no number for text.
    stores = [_hdf5_in_memory(), *([_new_zarr({})] if path.suffix == ".zarr" else [])]
    for store, (name, part) in itertools.product(stores, parts.items()):
        try:
            # anndata 0.13 takes no slash in the name of what it writes.
            key = name.replace("/", "_")
            _write(store, key, dict(part) if isinstance(part, Mapping) else part)
        except Exception as error:
            raise ValueError(
                f"{path} could not be written in the end, because {name} holds something that a "
                f"{path.suffix} file cannot: {described(error)}. Take it out of the AnnData, or "
                "convert it."
            ) from error


def described(error: Exception) -> str:
    """What an error says, with anndata's notes of where it was."""
    return ". ".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", [])])


@contextmanager
def atomic_write(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Give a path to write to, and move it to ``path`` once it is written.

    A process that is killed meanwhile leaves ``path`` as it was, and a folder ``.spaperb-...``
    beside it that may be deleted. Only where a folder (a zarr store) replaces another, there is a
    moment between two renames when nothing is at ``path``; then both are in ``.spaperb-...``.

    Parameters
    ----------
    path
        Where the file (or folder) is to be; the folder it is in is made if it is missing.
    overwrite
        Whether to replace a file that is there.

    Raises
    ------
    FileExistsError
        If a file is there and is not to be replaced; it stays as it is.
    OSError
        If it cannot be written: no rights, a full disk. A file that was there stays as it is.
    """
    if not overwrite and path.exists():
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it.")
    with _folder_beside(path) as folder:
        whole = folder / path.name
        try:
            yield whole
        except (OSError, RuntimeError) as error:  # HDF5 and PyTorch raise either
            was = "is as it was" if path.exists() else "was not made"
            raise OSError(f"{path} could not be written, and {was}: {error}") from error
        if not overwrite:
            _move_to_new(whole, path)
        elif path.is_dir():
            _replace_folder(whole, path, folder / "replaced")
        else:
            os.replace(whole, path)


def check_writable(path: Path) -> None:
    """Check that a file can be written whole, before hours of work go into it.

    Parameters
    ----------
    path
        Where the file, or the zarr store, is to be; its folder is made if it is missing.

    Raises
    ------
    OSError
        If no file can be made in the folder, or what is at the path is no file (by the name
        ``.zarr`` no store), and must not be replaced by one.
    """
    if path.is_dir() and not _is_store(path):
        raise IsADirectoryError(f"{path} is a folder. Give the path of a file.")
    if path.suffix == ".zarr" and path.is_file():
        raise NotADirectoryError(f"{path} is a file, and a zarr store is a folder. Name another.")
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
    except OSError as error:  # some file systems have no links, and folders have none
        if path.exists():
            raise FileExistsError(there) from error
        os.rename(whole, path)


def _replace_folder(whole: Path, path: Path, replaced: Path) -> None:
    """Move a folder to where another one is, which goes to ``replaced``."""
    try:
        os.rename(path, replaced)
        os.rename(whole, path)
    except BaseException:  # Ctrl-C too: what stays at `replaced` is deleted
        if replaced.exists() and not path.exists():
            os.rename(replaced, path)
        raise


def _is_store(path: Path) -> bool:
    """Tell whether a path is a zarr store, of format 3 or 2, by its name and what is in it."""
    return path.suffix == ".zarr" and any((path / x).is_file() for x in ("zarr.json", ".zgroup"))


def _conversion(path: Path) -> str:
    """What to do with a file that is not read."""
    name = path.name.removesuffix(".gz")
    if name.endswith(SUFFIXES) and name != path.name:
        return f"Unpack it: `gunzip {path}`."
    if path.suffix == ".zarr":
        return "It holds no group at its top; give the path of a store that AnnData wrote."
    if path.is_dir():
        read = f"sc.read_10x_mtx({str(path)!r})"
    elif name.endswith(".mtx"):
        read = f"sc.read_10x_mtx({str(path.parent)!r})"
    elif name.endswith(".h5"):
        read = f"sc.read_10x_h5({str(path)!r})"
    else:
        read = f"sc.read({str(path)!r})"
    return f"Convert it: `import scanpy as sc; {read}.write_h5ad('cells.h5ad')`."


def _hdf5_in_memory() -> h5py.File:
    """HDF5 file in memory: writing to a disk that is full, HDF5 would crash the process."""
    return h5py.File("cells", "w", driver="core", backing_store=False)


def _new_zarr(store: Any) -> zarr.Group:
    with warnings.catch_warnings():
        # anndata 0.13 deprecates the setting, and honours it until 0.14.
        warnings.simplefilter("ignore", DeprecationWarning)
        zarr_format: Any = getattr(ad.settings, "zarr_write_format", 3)
    return zarr.open_group(store, mode="w", zarr_format=zarr_format)


def _write(store: h5py.Group | zarr.Group, name: str, elem: Any) -> None:
    options = {"compression": "gzip"} if isinstance(store, h5py.Group) else {}
    # By default anndata 0.12 does not write these, and 0.13 does with pandas 3 only; both read
    # them.
    with ad.settings.override(allow_write_nullable_strings=True):
        ad.io.write_elem(store, name, elem, dataset_kwargs=options)


def read_safetensors(
    path: Path, framework: str, checksum: Callable[[str, dict[str, Any]], str], latest: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Content and tensors of a safetensors file that holds a JSON text and a checksum of both.

    Nothing in the file is run.

    Parameters
    ----------
    path
        The file.
    framework
        What tensors are to be: ``"numpy"`` or ``"pt"``.
    checksum
        Checksum of a text and tensors.
    latest
        Latest format that is read.

    Raises
    ------
    SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError
        As READ_ERRORS lists them: if it is another file, was damaged or changed, or is of a later
        format.
    """
    with safe_open(path, framework=framework) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    text = metadata["spaperb"]
    if checksum(text, tensors) != metadata["sha256"]:
        raise ValueError("its checksum is not that of its content")
    content = json.loads(text)
    if content["format"] > latest:
        by = f", written by spaperb {content['version']}" if "version" in content else ""
        raise ValueError(f"it is of format {content['format']}{by}; a newer spaperb reads it")
    return content, tensors


def check_pickle(path: Path) -> None:
    """Read which names a file of ``torch.save`` calls up, without unpickling it, and refuse any.

    Those that PyTorch itself takes for safe (``torch.load(weights_only=True)``) are data.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    ValueError
        If the file names another, which could be code, or is damaged.
    OSError
        If it cannot be opened.
    """
    try:
        with zipfile.ZipFile(path) as file:
            # PyTorch reads changed numbers without a word.
            if (part := file.testzip()) is not None:
                raise zipfile.BadZipFile(f"{part} is not what was written")
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except (
        zipfile.BadZipFile,
        ValueError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        raise ValueError(
            f"{path} could not be read: {error}. If it is truncated or damaged, copy or save it "
            "again."
        ) from error
    if names:
        raise ValueError(
            f"{path} holds more than data: it calls {format_list(sorted(names))}, and loading it "
            "could run that. What spaperb saves calls nothing; a model of another package is "
            "loaded by that one. Models are shared as exports (`model.export`), which cannot hold "
            "code."
        )


def plain(value: Any) -> Any:
    """Turn NumPy's numbers, text and arrays into Python's, which PyTorch reads without a call."""
    match value:
        case np.ndarray() if value.dtype.kind in f"{NUMBERS}OUT":
            return plain(value.tolist())
        case np.generic():
            return value.item()
        case str():
            return str(value)
        case dict():
            return {plain(key): plain(v) for key, v in value.items()}
        case list():
            return [plain(v) for v in value]
        case tuple():
            return tuple(plain(v) for v in value)
    return value
