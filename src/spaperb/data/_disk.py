"""Expression that stays on disk.

Training draws its pairs from all cells, in an order that no file has, so it needs any row at any
time: a memory map gives it, and the operating system keeps what fits. Prediction goes through the
cells in their order: dask reads a block, predicts it and lets it go.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

import anndata as ad
import h5py
import numpy as np
import numpy.typing as npt
import zarr
from anndata import AnnData
from anndata.compat import DaskArray
from scipy import sparse
from scvi.utils import track

from spaperb._files import ANNOTATIONS, check_readable
from spaperb._types import Expression

if TYPE_CHECKING:
    import dask.array

COPIED_VALUES = 4_000_000
"""Values copied at a time."""
BLOCK_VALUES = 20_000_000
"""Values of a block of a dask array, dense.

80 MB. Smaller blocks than a zarr store's make it write its own again and again.
"""


def read_mapped(path: str | Path, scratch: str | Path | None = None) -> AnnData:
    """Read an AnnData whose expression stays on disk.

    ``X`` and the layers are memory maps, NumPy arrays or SciPy CSR matrices, from which any row
    can be read without the others. A dense matrix of an uncompressed h5ad file is mapped where it
    is. All others come in compressed or separate pieces and are first copied to a scratch file,
    which goes away with the AnnData. What is not expression is read into memory; ``raw`` is left
    out.

    Parameters
    ----------
    path
        File ``.h5ad`` or store ``.zarr`` that AnnData wrote.
    scratch
        Folder for scratch files, on a local disk; ``None`` for the system's.

    Returns
    -------
    anndata.AnnData
        AnnData that trains and is predicted like any other; it must not be written to the file it
        comes from.

    Raises
    ------
    ValueError
        If the file is neither, or holds a CSC matrix, whose cells cannot be read one by one.
    FileNotFoundError
        If there is no such file.
    """
    path = Path(path)
    check_readable(path)
    if path.suffix == ".zarr":
        return _read(zarr.open_group(path, mode="r"), path, scratch)
    with h5py.File(path) as file:
        return _read(file, path, scratch)


def is_on_disk(x: Expression) -> bool:
    """Tell whether a matrix is a dask array or a memory map."""
    if isinstance(x, DaskArray):
        return True
    base: Any = x.data if sparse.issparse(x) else x
    while base is not None and not isinstance(base, np.memmap):
        base = getattr(base, "base", None)
    return base is not None


def rows_of_block(n_genes: int) -> int:
    """Rows of a block of cells."""
    return max(1, BLOCK_VALUES // n_genes)


def as_dask(x: Expression) -> dask.array.Array:
    """Dask array of a matrix on disk, in blocks of whole rows."""
    from dask import array as da

    chunks = rows_of_block(x.shape[1]), x.shape[1]
    if isinstance(x, DaskArray):
        return x.rechunk(chunks)
    # Without a name of its own dask would read all of it to make one.
    return da.from_array(x, chunks=chunks, asarray=False, name=False)


def in_memory(x: Expression) -> Expression:
    """Read a dask array; anything else is there already."""
    return x.compute() if isinstance(x, DaskArray) else x


def backed_matrix(x: Any) -> dask.array.Array:
    """Dask array of the matrix of a backed AnnData."""
    return as_dask(ad.experimental.read_elem_lazy(getattr(x, "group", x)))


def _read(store: Any, path: Path, scratch: str | Path | None) -> AnnData:
    """Map expression and read all else."""
    layers = store["layers"].keys() if "layers" in store else []
    names = [name for name in ("X", *(f"layers/{layer}" for layer in layers)) if name in store]
    mapped = {name: _mapped(name, store[name], path, scratch) for name in names}
    return AnnData(
        mapped.get("X"),
        layers={name.removeprefix("layers/"): x for name, x in mapped.items() if name != "X"},
        **{name: ad.io.read_elem(store[name]) for name in ANNOTATIONS if name in store},
    )


def _mapped(name: str, elem: Any, path: Path, scratch: str | Path | None) -> Expression:
    """Map a matrix of a file."""
    encoding = elem.attrs.get("encoding-type", "array" if hasattr(elem, "dtype") else "group")
    if encoding == "null":  # how some versions of anndata write that there is no X
        return None
    if encoding == "array":
        return _map(elem, elem.dtype, path, scratch)
    if encoding != "csr_matrix":
        raise ValueError(
            f"{name} in {path} is a {encoding}, from which single cells cannot be read. Write it "
            "as CSR: `adata.X = adata.X.tocsr()`, `adata.write_h5ad(path)`."
        )
    shape = tuple(elem.attrs["shape"])
    n_values = elem["data"].shape[0]
    # The type that SciPy would otherwise convert to, in memory.
    index = sparse.get_index_dtype(maxval=max(n_values, *shape))
    types = {"data": elem["data"].dtype, "indices": index, "indptr": index}
    parts = [_map(elem[part], dtype, path, scratch) for part, dtype in types.items()]
    return sparse.csr_matrix(tuple(parts), shape=shape, copy=False)


def _map(array: Any, dtype: npt.DTypeLike, path: Path, scratch: str | Path | None) -> npt.NDArray:
    """Map an HDF5 or zarr array where it is, or a copy of it."""
    if not array.size:
        return np.empty(array.shape, dtype)
    offset = array.id.get_offset() if isinstance(array, h5py.Dataset) else None
    if offset is not None and array.dtype == dtype:
        return _for_any_row(np.memmap(path, dtype, "r", offset, array.shape))
    # On POSIX systems the file has no name, and is gone when nothing maps it.
    with TemporaryFile(dir=scratch) as file:
        copy = np.memmap(file, dtype, "w+", shape=array.shape)
    step = max(1, COPIED_VALUES // max(1, array[:1].size))
    starts = range(0, array.shape[0], step)
    for start in track(starts, description=f"Copying {array.name}", disable=len(starts) < 20):
        copy[start : start + step] = array[start : start + step]
    return _for_any_row(copy)


def _for_any_row(array: np.memmap) -> np.memmap:
    """Keep the system from reading on where a row ends.

    Its 128 kB are ten times what a cell takes, and are read in vain.
    """
    mapping: Any = array.base
    if hasattr(mmap, "MADV_RANDOM"):
        mapping.madvise(mmap.MADV_RANDOM)
    return array
