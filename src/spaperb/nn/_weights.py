"""Files of pretrained in-context networks."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import torch
from safetensors.torch import save

from spaperb._files import READ_ERRORS, read_safetensors
from spaperb._messages import format_list
from spaperb.evidence import EVIDENCE_FEATURES, RELATIONS, STATE_FEATURES
from spaperb.nn._genes import Constants, InContextNetwork

FORMAT = 1
"""Version of the format: a file of a higher one is refused."""
INPUTS = {
    "state": list(STATE_FEATURES),
    "evidence": list(EVIDENCE_FEATURES),
    "relations": list(RELATIONS),
}
"""Inputs that weights are of: those of others would be wrong without a word."""
SAID = {"format", "n_networks", "n_latent", "n_hidden", "inputs", "data_sets"}
"""What a file says of its weights."""


def shipped_weights() -> Path:
    """File of the weights that come with the package."""
    return Path(str(files("spaperb") / "weights" / "spaperb.safetensors"))


def write_weights(
    networks: Sequence[InContextNetwork], path: Path, data_sets: Sequence[str]
) -> None:
    """Write networks.

    Parameters
    ----------
    networks
        Networks of one size.
    path
        The file.
    data_sets
        Names of the data sets that they were trained on.
    """
    tensors = {
        f"{i}.{name}": tensor.detach().cpu().contiguous()
        for i, network in enumerate(networks)
        for name, tensor in network.state_dict().items()
    }
    content = {
        "format": FORMAT,
        "n_networks": len(networks),
        "n_latent": networks[0].n_latent,
        "n_hidden": networks[0].n_hidden,
        "inputs": INPUTS,
        "data_sets": list(data_sets),
    }
    text = json.dumps(content)
    path.write_bytes(
        _in_order(save(tensors, {"spaperb": text, "sha256": _checksum(text, tensors)}))
    )


def read_weights(path: str | Path) -> list[InContextNetwork]:
    """Read networks; nothing in the file is run.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    FileNotFoundError
        If there is no file.
    ValueError
        If the file holds no weights, is damaged, or is of a version with other inputs.
    """
    content, tensors = _read(Path(path))
    if content["inputs"] != INPUTS:
        raise ValueError(
            f"The weights in {path} are of networks with other inputs, of another version of "
            "spaperb. Use that version, or train them anew (see `pretraining/` in the repository)."
        )
    networks = []
    try:
        for i in range(content["n_networks"]):
            network = InContextNetwork(Constants.none(), content["n_latent"], content["n_hidden"])
            prefix = f"{i}."
            network.load_state_dict(
                {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
            )
            networks.append(network.eval())
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path} does not hold the weights that it says: {error}.") from error
    if not networks:
        raise ValueError(f"{path} holds no network.")
    return networks


def data_sets_of(path: str | Path) -> list[str]:
    """Names of the data sets that weights were trained on."""
    return _read(Path(path))[0]["data_sets"]


def _read(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    if not path.is_file():
        raise FileNotFoundError(
            f"There is no file {path}. Pass `pretrained=True` for the weights that come with "
            "spaperb, or `pretrained=False` for none."
        )
    try:
        content, tensors = read_safetensors(path, "pt", _checksum, FORMAT)
        if missing := SAID - content.keys():
            raise ValueError(f"it does not say its {format_list(sorted(missing))}")
        return content, tensors
    except READ_ERRORS as error:
        raise ValueError(
            f"{path} could not be read as pretrained weights: {error}. If it is truncated or "
            "damaged, copy it again."
        ) from error


def _in_order(content: bytes) -> bytes:
    """Sort the header of a file, whose order safetensors leaves to chance."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[end:]


def _checksum(text: str, tensors: dict[str, torch.Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].numpy().tobytes())
    return digest.hexdigest()
