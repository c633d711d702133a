"""Model files: what ``save`` and ``export`` write, and a check of pickles before they are loaded.

Both hold the same plain values: tensors, text, numbers, lists and dictionaries. Whatever is of
another kind (an array, a tuple, a table) is a dictionary whose only key tells the kind: see
``_encode``. No class of pandas or NumPy is in a file, so that no release of theirs can break it,
and PyTorch reads it without calling anything.

A saved model is scvi-tools' file, a pickle. An exported model is one safetensors file: its tensors
are the networks' weights and the arrays of what training learned; its metadata holds a JSON text
with everything else, in which a tensor is given by its name, and a checksum of both.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pandas as pd
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from scvi.model.base import BaseModelClass

from spaperb._files import NUMBERS, atomic_write, check_pickle, plain

FORMAT = 1
"""Version of the format: a file of a higher one is refused."""
WEIGHTS = "weights."
"""Prefix of the names of the networks' tensors."""
READ_FIRST = {"registry_", "init_params_"}
"""Attributes of a saved model that scvi-tools takes as they are in the file."""

Tensors = dict[str, np.ndarray]


class Exported(NamedTuple):
    """What a file of a model holds."""

    weights: Tensors
    """State of the networks, by name."""
    attributes: dict[str, Any]
    """Attributes of the model that are saved, by name."""


class SavingMixin(BaseModelClass):
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
            If the registry holds other than numbers and text (dates as conditions, say).
        """
        # scvi-tools saves what it finds on a model, so it is handed one with plain attributes.
        plain_model = copy.copy(self)
        for name, value in self._saved_attributes().items():
            plain_model.__dict__[name] = _encode(value, lambda array, _: torch.tensor(array), name)
        var_names = self.get_var_names().tolist()
        plain_model.__dict__["get_var_names"] = lambda **_: var_names
        super(SavingMixin, plain_model).save(str(dir_path), *args, **kwargs)

    def _saved_attributes(self) -> dict[str, Any]:
        """Attributes that are saved, those plain that scvi-tools reads before `load` can."""
        attributes = {name: value for name, value in vars(self).items() if is_saved(name)}
        return {k: plain(v) if k in READ_FIRST else v for k, v in attributes.items()}

    def export(self, path: str | Path, overwrite: bool = False) -> None:
        """Write the model to a file to be shared, which :meth:`load_exported` reads anywhere.

        It holds the networks, what training measured in the contexts, the registry, the names of
        genes, cell types and perturbations, and the history: all that predicting takes. Of cells it
        holds no names, but with the in-context objective
        the mean of each cell type, and up to 30 principal components of up to 1,000 control cells a type with their loadings, from which
        expression can be computed back in part (in whole where cells are few).
        It is one safetensors file, with a JSON text in its metadata, and reading it runs nothing.

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
            If the registry holds other than numbers and text (dates as conditions, say).
        """
        weights = {k: tensor.cpu().numpy() for k, tensor in self.module.state_dict().items()}
        content = Exported(weights, self._saved_attributes())
        write_export(Path(path), content, overwrite)

    @classmethod
    def load_exported(cls, path: str | Path) -> Self:
        """Load a model written by :meth:`export`, without data: to predict new cells on the CPU (else see ``to_device``).

        Parameters
        ----------
        path
            The file.

        Raises
        ------
        FileNotFoundError
            If there is no file.
        ValueError
            If the path is a folder, or the file is no exported model of this class, was damaged or changed since it was written, or was written by a later version with
            another format.
        """
        if Path(path).is_dir():
            raise ValueError(
                f"{path} is a folder, and `load_exported` reads the file that `model.export` wrote. A "
                f"folder that `model.save` wrote is read by `{cls.__name__}.load({str(path)!r}, adata)`."
            )
        weights, attributes = read_export(Path(path))
        try:
            registry, init = attributes["registry_"], attributes["init_params_"]
            if (found := registry["model_name"]) != cls.__name__:
                raise ValueError(f"it holds a {found}, not a {cls.__name__}")
            # Without memory of their own: the sizes are the file's word, and the weights have to fit them first.
            with torch.device("meta"):
                module_kwargs = init["kwargs"]["module_kwargs"]
                model = cls(registry=registry, **init["non_kwargs"], **module_kwargs)
            tensors = {name: torch.tensor(array) for name, array in weights.items()}
            model.module.load_state_dict(tensors, assign=True)
            for name in filter(is_saved, attributes):
                setattr(model, name, attributes[name])
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
            data, it holds another model, the genes of ``adata`` are not those of the model in their order, or ``adata.X``
            is sparse and without a value.
        """
        if Path(dir_path).is_file():
            raise ValueError(
                f"{dir_path} is a file, and `load` reads the folder that `model.save` wrote. A file "
                f"that `model.export` wrote is read by `{cls.__name__}.load_exported({str(dir_path)!r})`."
            )
        path = Path(dir_path) / f"{prefix or ''}model.pt"
        if kwargs.get("backup_url") is not None:
            raise ValueError(
                "`backup_url` is not supported: a file that comes from there would be unpickled unseen. Download it, then load it."
            )
        if path.is_file():
            check_pickle(path)
        try:
            model = super().load(str(dir_path), *args, prefix=prefix, **kwargs)
        except ValueError as error:
            if "minified" in str(error):
                raise ValueError(
                    "adata.X holds nothing but zeros, which scvi-tools takes for cells whose expression was taken out. Load "
                    "with `adata=False` to predict other cells, or with a dense X: adata.X = adata.X.toarray()."
                ) from error
            if "different class" not in str(error):
                raise
            found = cls.load_registry(str(dir_path), prefix=prefix)["model_name"]
            raise ValueError(
                f"{path} holds a {found}, not a {cls.__name__}. Load it with {found}.load()."
            ) from error
        saved = torch.load(path, map_location="cpu", weights_only=True)["attr_dict"]
        for name in saved.keys() - READ_FIRST:
            setattr(model, name, _decode(saved[name], torch.Tensor.numpy))
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
    """Whether an attribute of a model is saved with it: by scvi-tools' custom, if its name ends in an underscore."""
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
    with atomic_write(path, overwrite=overwrite) as whole:
        tensors = {f"{WEIGHTS}{name}": weight for name, weight in model.weights.items()}

        def keep(array: np.ndarray, name: str) -> str:
            name = f"{name}.{len(tensors)}"  # unique, whatever keys may be
            tensors[name] = np.asarray(array, order="C")
            return name

        attributes = _encode(model.attributes, keep, "attributes")
        content = {"format": FORMAT, "version": version("spaperb"), "attributes": attributes}
        text = json.dumps(content)
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
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        text = metadata["spaperb"]
        if _checksum(text, tensors) != metadata["sha256"]:
            raise ValueError("its checksum is not that of its content")
        content = json.loads(text)
        if content["format"] > FORMAT:
            raise ValueError(
                f"it is of format {content['format']}, written by spaperb {content['version']}, and this "
                f"version reads up to format {FORMAT}; a newer spaperb reads it"
            )
        attributes = _decode(content["attributes"], tensors.__getitem__)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(
            f"{path} could not be read as an exported model: {error}. If it is truncated or damaged, copy or "
            "export it again."
        ) from error
    weights = {k.removeprefix(WEIGHTS): t for k, t in tensors.items() if k.startswith(WEIGHTS)}
    return Exported(weights, attributes)


def _checksum(text: str, tensors: Tensors) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tensor.shape}".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()


def _encode(value: Any, keep: Callable[[np.ndarray, str], Any], name: str) -> Any:
    """Turn a value into what JSON knows; ``keep`` takes arrays, and says what stands for them."""

    def encode_all(values: Any) -> list[Any]:
        return [_encode(v, keep, f"{name}.{i}") for i, v in enumerate(values)]

    match value:
        case np.generic() if value.dtype.kind in NUMBERS:
            return {"scalar": [value.dtype.name, _encode(value.item(), keep, name)]}
        case float() if not math.isfinite(value):
            return {"float": repr(value)}
        case str():
            return str(value)  # of NumPy's too
        case None | bool() | int() | float():
            return value
        case np.ndarray() if value.dtype.kind in NUMBERS:
            return {"tensor": keep(value, name)}
        case np.ndarray() if value.dtype.kind in "OUT" and value.ndim == 1:
            return {"array": encode_all(value.tolist())}
        case list():
            return encode_all(value)
        case tuple():
            return {"tuple": encode_all(value)}
        case dict():
            encoded = {k: _encode(v, keep, f"{name}.{k}") for k, v in value.items()}
            if all(isinstance(k, str) and k not in _TAGS for k in value):
                return {str(k): v for k, v in encoded.items()}
            return {"dict": [[_encode(k, keep, name), v] for k, v in encoded.items()]}
        case pd.DataFrame():
            columns = {c: value[c].to_numpy() for c in value}
            index = [value.index.name, value.index.to_numpy()]
            return {"frame": [_encode(v, keep, f"{name}.frame") for v in (columns, *index)]}
        case _:
            raise TypeError(
                f"{name} is a {type(value).__name__}, which a model's file cannot hold. Make it "
                "numbers or text."
            )


def _decode(value: Any, fetch: Callable[[Any], np.ndarray]) -> Any:
    """Turn back what :func:`_encode` made."""
    match value:
        case list():
            return [_decode(v, fetch) for v in value]
        case {"tensor": content}:
            return fetch(content)
        case dict() if kinds := value.keys() & _KINDS.keys():
            (kind,) = kinds
            return _KINDS[kind](_decode(value[kind], fetch))
        case dict():
            return {k: _decode(v, fetch) for k, v in value.items()}
        case _:
            return value


def _scalar(content: list[Any]) -> np.generic:
    dtype = np.dtype(content[0])
    if dtype.kind not in NUMBERS:
        raise ValueError(f"{dtype} is no type of numbers")
    return dtype.type(content[1])


def _array(content: list[Any]) -> np.ndarray:
    array = np.empty(len(content), dtype=object)
    array[:] = content
    return array


def _frame(content: list[Any]) -> pd.DataFrame:
    columns, name, index = content
    return pd.DataFrame(columns, index=pd.Index(index, name=name))


_KINDS: dict[str, Callable[[Any], Any]] = {
    "scalar": _scalar,
    "float": float,
    "array": _array,
    "tuple": tuple,
    "dict": dict,
    "frame": _frame,
}
_TAGS = {"tensor", *_KINDS}
