"""Model files: what ``save`` and ``export`` write.

Both hold the same plain content: dictionaries and lists of text, numbers and arrays of numbers. No
class of pandas or NumPy is in a file, so that no release of theirs can break it, and PyTorch reads
it without calling anything.

A saved model is scvi-tools' file, a pickle, whose arrays are tensors. An exported model is one
safetensors file: its tensors are the networks' weights and the content's arrays; its metadata
holds a JSON text with everything else, in which an array is given by its name, and a checksum of
both.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
import torch
from anndata import AnnData, read_h5ad
from safetensors.numpy import save
from scipy import sparse
from scvi.model.base import BaseModelClass

from spaperb._files import (
    NUMBERS,
    READ_ERRORS,
    atomic_write,
    check_pickle,
    plain,
    read_safetensors,
)
from spaperb.model._base import SpaPerbBase
from spaperb.model._state import State

FORMAT = 1
"""Version of the content: a file of a higher one is refused."""
WEIGHTS = "weights."
"""Prefix of the names of the networks' tensors."""
CONTENT = "content_"
"""Name of the content among the attributes that scvi-tools saves."""
ARRAY = "spaperb array"
"""Key of a dictionary that stands for an array, and names it."""

Tensors = dict[str, np.ndarray]


class Exported(NamedTuple):
    """What a file of a model holds."""

    weights: Tensors
    """State of the networks, by name."""
    content: dict[str, Any]
    """All else, see :meth:`FilesMixin._content`."""


class FilesMixin(SpaPerbBase):
    """What a model does with files."""

    def save(self, dir_path: str | Path, *args: Any, **kwargs: Any) -> None:
        """Save the model, to go on with by :meth:`load`.

        The file holds numbers and text alone, and no class of any library, so that it can be read
        with other versions of pandas and NumPy.

        Parameters
        ----------
        dir_path
            Folder to save to.
        *args, **kwargs
            Further arguments of :meth:`scvi.model.base.BaseModelClass.save`: ``prefix``,
            ``overwrite``, ``save_anndata``.

        Raises
        ------
        ValueError
            If the folder is there and ``overwrite`` is not set.
        TypeError
            If the registry, or an attribute of your own whose name ends in an underscore, holds
            other than numbers, text, arrays of numbers, and lists and dictionaries of these.
        """
        # scvi-tools saves the attributes that it finds on a model, so it is handed another one.
        content = with_arrays(
            self._content(), lambda array, _: torch.tensor(np.array(array, order="C"))
        )
        plain_model = copy.copy(self)
        for name in filter(is_saved, vars(self)):
            del plain_model.__dict__[name]
        var_names = self.get_var_names().tolist()
        plain_model.__dict__ |= {
            "registry_": content["registry"],
            "init_params_": content["init_params"],
            "is_trained_": self.is_trained,
            CONTENT: {k: v for k, v in content.items() if k not in ("registry", "init_params")},
            "get_var_names": lambda **_: var_names,
        }
        super(FilesMixin, plain_model).save(str(dir_path), *args, **kwargs)

    def _content(self) -> dict[str, Any]:
        """All that is saved beside the weights."""
        own = {name: value for name, value in vars(self).items() if is_saved(name)}
        registry, init_params = own.pop("registry_"), own.pop("init_params_")
        history = {
            name: [
                table.index.name,
                table.index.to_numpy(),
                {column: table[column].to_numpy(dtype=float) for column in table},
            ]
            for name, table in (own.pop("history_", None) or {}).items()
        }
        return {
            "format": FORMAT,
            "version": version("spaperb"),
            # scvi-tools takes these as they are in the file, before `load` can.
            "registry": storable(plain(registry), "registry_"),
            "init_params": storable(plain(init_params), "init_params_"),
            "attributes": {name: storable(value, name) for name, value in own.items()},
            "history": history,
            "state": storable(self.state.to_plain(), "state"),
        }

    def _restore(self, content: dict[str, Any]) -> None:
        """Take what :meth:`_content` gave, but for the registry and the arguments."""
        for name, value in content["attributes"].items():
            if is_saved(name):
                setattr(self, name, value)
        self.history_ = (
            None
            if not content["history"]
            else {
                name: pd.DataFrame(columns, index=pd.Index(index, name=of_index))
                for name, (of_index, index, columns) in content["history"].items()
            }
        )
        self.state = State.from_plain(content["state"], self.module)

    def export(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the model to a file to be shared, which :meth:`load_exported` reads anywhere.

        It holds the networks, what training measured in the contexts, the registry, the names of
        genes, cell types and perturbations, and the history: all that predicting takes. Of cells
        it holds no names, but with the in-context objective the mean of each cell type, and up to
        30 principal components of up to 1,000 control cells a type with their loadings, from which
        expression can be computed back in part (in whole where cells are few). It is one
        safetensors file, with a JSON text in its metadata, and reading it runs nothing.

        Parameters
        ----------
        path
            The file, by custom ``*.safetensors``.
        overwrite
            Whether to replace a file that is there.

        Raises
        ------
        FileExistsError
            If a file is there and ``overwrite`` is not set.
        TypeError
            If the registry, or an attribute of your own whose name ends in an underscore, holds
            other than numbers, text, arrays of numbers, and lists and dictionaries of these.
        """
        weights = {k: tensor.cpu().numpy() for k, tensor in self.module.state_dict().items()}
        write_export(Path(path), Exported(weights, self._content()), overwrite)

    @classmethod
    def load_exported(cls, path: str | Path) -> Self:
        """Load a model written by :meth:`export`, to predict new cells.

        It has no data, and is on the CPU (else see ``to_device``).

        Parameters
        ----------
        path
            The file.

        Raises
        ------
        FileNotFoundError
            If there is no file.
        ValueError
            If the path is a folder, or the file is no exported model of this class, was damaged or
            changed since it was written, or was written by a later version with another format.
        """
        if Path(path).is_dir():
            raise ValueError(
                f"{path} is a folder, and `load_exported` reads the file that `model.export` "
                "wrote. A folder that `model.save` wrote is read by "
                f"`{cls.__name__}.load({str(path)!r}, adata)`."
            )
        weights, content = read_export(Path(path))
        try:
            registry, init = content["registry"], content["init_params"]
            if (found := registry["model_name"]) != cls.__name__:
                raise ValueError(f"it holds a {found}, not a {cls.__name__}")
            # Without memory of their own: the sizes are the file's word, and the weights have to
            # fit them first.
            with torch.device("meta"):
                module_kwargs = init["kwargs"]["module_kwargs"]
                model = cls(registry=registry, **init["non_kwargs"], **module_kwargs)
            tensors = {name: torch.tensor(array) for name, array in weights.items()}
            model.module.load_state_dict(tensors, assign=True)
            model._restore(content)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{path} does not describe a {cls.__name__}: {error}.") from error
        model.module.eval()
        return model

    @classmethod
    def load(cls, dir_path: str, *args: Any, prefix: str | None = None, **kwargs: Any) -> Self:
        """Load a model saved by :meth:`~scvi.model.base.BaseModelClass.save`, to go on with.

        The file is a pickle, which could run code: it is looked through first, and refused if it
        holds anything but numbers and text. For sharing use :meth:`export`.

        Parameters
        ----------
        dir_path
            Folder that the model was saved to.
        *args, **kwargs
            Further arguments of :meth:`scvi.model.base.BaseModelClass.load`, ``adata`` first;
            ``adata=False`` loads the model without data, to predict new cells.
        prefix
            Prefix of the file names.

        Raises
        ------
        ValueError
            If the path is a file, there is no model file, it cannot be read, it holds more than
            data, it holds another model, the genes of ``adata`` are not those of the model in
            their order, or ``adata.X`` is sparse and without a value.
        """
        if Path(dir_path).is_file():
            raise ValueError(
                f"{dir_path} is a file, and `load` reads the folder that `model.save` wrote. A "
                "file that `model.export` wrote is read by "
                f"`{cls.__name__}.load_exported({str(dir_path)!r})`."
            )
        path = Path(dir_path) / f"{prefix or ''}model.pt"
        if kwargs.get("backup_url") is not None:
            raise ValueError(
                "`backup_url` is not supported: a file that comes from there would be unpickled "
                "unseen. Download it, then load it."
            )
        if not path.is_file():
            raise ValueError(f"There is no model file {path}. Give the folder that `save` wrote.")
        check_pickle(path)
        saved = torch.load(path, map_location="cpu", weights_only=True).get("attr_dict", {})
        if (found := saved.get("registry_", {}).get("model_name")) != cls.__name__:
            what = "no model" if found is None else f"a {found}, not a {cls.__name__}"
            with_ = "" if found is None else f" Load it with {found}.load()."
            raise ValueError(f"{path} holds {what}.{with_}")
        if CONTENT not in saved or saved[CONTENT]["format"] > FORMAT:
            raise ValueError(
                f"{path} was written by a version of spaperb with another format than {FORMAT}. "
                "Load it with that version, or train the model anew."
            )
        adata = kwargs.pop("adata", args[0] if args else None)
        kept = Path(dir_path) / f"{prefix or ''}adata.h5ad"
        if adata is None and kept.is_file():
            adata = read_h5ad(kept)
        if isinstance(adata, AnnData) and sparse.issparse(adata.X) and adata.X.nnz == 0:
            raise ValueError(
                "adata.X holds nothing but zeros, which scvi-tools takes for cells whose "
                "expression was taken out. Load with `adata=False` to predict other cells, or "
                "with a dense X: adata.X = adata.X.toarray()."
            )
        model = super().load(str(dir_path), adata, *args[1:], prefix=prefix, **kwargs)
        delattr(model, CONTENT)
        model._restore(with_arrays(saved[CONTENT], lambda tensor, _: tensor.numpy(), torch.Tensor))
        return model

    @staticmethod
    def load_registry(dir_path: str, prefix: str | None = None) -> dict:
        """Load the registry of a model saved by :meth:`~scvi.model.base.BaseModelClass.save`.

        Parameters
        ----------
        dir_path
            Folder that the model was saved to.
        prefix
            Prefix of the file names.

        Raises
        ------
        ValueError
            If the file is damaged, or holds more than data.
        OSError
            If there is none.
        """
        check_pickle(Path(dir_path) / f"{prefix or ''}model.pt")
        return BaseModelClass.load_registry(str(dir_path), prefix=prefix)


def is_saved(name: str) -> bool:
    """Whether an attribute of a model is saved with it, by scvi-tools' custom."""
    return name.endswith("_") and not name.startswith("_")


def write_export(path: Path, model: Exported, overwrite: bool) -> None:
    """Write a model.

    Parameters
    ----------
    path
        The file.
    model
        The model.
    overwrite
        Whether to replace a file that is there.

    Raises
    ------
    FileExistsError
        If a file is there and is not to be replaced.
    TypeError
        If an attribute is of a kind that the format does not know.
    """
    tensors = {f"{WEIGHTS}{name}": weight for name, weight in model.weights.items()}

    def keep(array: np.ndarray, name: str) -> dict[str, str]:
        name = f"{name}.{len(tensors)}"  # unique, whatever keys may be
        tensors[name] = np.asarray(array, order="C")
        return {ARRAY: name}

    text = json.dumps(with_arrays(model.content, keep))
    with atomic_write(path, overwrite=overwrite) as whole:
        metadata = {"spaperb": text, "sha256": _checksum(text, tensors)}
        # Not by safetensors' own writing, whose file nobody else may read.
        whole.write_bytes(save(tensors, metadata))


def read_export(path: Path) -> Exported:
    """Read a model; nothing in the file is run.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    FileNotFoundError
        If there is no file.
    ValueError
        If the file is no exported model, is damaged or was changed, or is of a later format.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        content, tensors = read_safetensors(path, "numpy", _checksum, FORMAT)
        content = _named(content, tensors)
    except READ_ERRORS as error:
        raise ValueError(
            f"{path} could not be read as an exported model: {error}. If it is truncated or "
            "damaged, copy or export it again."
        ) from error
    weights = {k.removeprefix(WEIGHTS): t for k, t in tensors.items() if k.startswith(WEIGHTS)}
    return Exported(weights, content)


def _checksum(text: str, tensors: Tensors) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def storable(value: Any, name: str) -> Any:
    """Turn tuples into lists and NumPy's numbers into Python's; leave arrays of numbers.

    Raises
    ------
    TypeError
        If a value is neither number nor text, nor made of them.
    """
    match value:
        case np.ndarray() if value.dtype.kind in NUMBERS:
            return value
        case np.ndarray() | np.generic():
            return storable(value.tolist(), name)
        case str():
            return str(value)  # of NumPy's too
        case None | bool() | int() | float():
            return value
        case dict():
            if others := [key for key in value if not isinstance(key, str) or key == ARRAY]:
                raise TypeError(f"{name} has the key {others[0]!r}; a model's file takes text.")
            return {str(key): storable(v, f"{name}.{key}") for key, v in value.items()}
        case list() | tuple():
            return [storable(v, f"{name}.{i}") for i, v in enumerate(value)]
    raise TypeError(
        f"{name} is a {type(value).__name__}, which a model's file cannot hold. Make it numbers "
        "or text."
    )


def with_arrays(
    value: Any, change: Callable[[Any, str], Any], kind: type = np.ndarray, name: str = "content"
) -> Any:
    """Change all arrays, or tensors, in dictionaries and lists, given with their paths."""
    if isinstance(value, kind):
        return change(value, name)
    match value:
        case dict():
            return {k: with_arrays(v, change, kind, f"{name}.{k}") for k, v in value.items()}
        case list():
            return [with_arrays(v, change, kind, f"{name}.{i}") for i, v in enumerate(value)]
    return value


def _named(value: Any, tensors: Tensors) -> Any:
    """Put arrays in the places of their names."""
    match value:
        case dict() if value.keys() == {ARRAY}:
            return tensors[value[ARRAY]]
        case dict():
            return {key: _named(v, tensors) for key, v in value.items()}
        case list():
            return [_named(v, tensors) for v in value]
    return value
