"""Weights files: reading and writing them without pickle, putting them into a network, and their digest."""

import hashlib
import io
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from uap_dist.errors import ClassifierError
from uap_dist.locations import is_url, read_file, split_query


def read_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors or weights-only .pth file, local, s3:// or gs://.

    Raises:
        ClassifierError: no such file, or not a state dictionary.
    """
    if not is_url(path) and not Path(path).is_file():
        raise ClassifierError(f"no weights file {path} on {platform.node()}")
    try:
        data = read_file(path)
    except OSError as error:
        raise ClassifierError(f"cannot read weights file {error}") from error
    try:
        if split_query(path)[0].endswith(".safetensors"):
            return load(data)
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # each library raises its own kinds, all of them mean the same to the user
        reason = str(error).splitlines()[0]
        raise ClassifierError(f"{path} is not a readable .safetensors or weights-only .pth file: {reason}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ClassifierError(f"{path} holds no dictionary of tensors")
    return state


def write_weights(path: Path, network: nn.Module, provenance: Mapping[str, Any]) -> None:
    """The network's parameters and buffers as a .safetensors file that `read_weights` reads, with where they come from as JSON in it."""
    state = {key: value.detach().cpu().clone().contiguous() for key, value in network.state_dict().items()}
    path.write_bytes(save(state, {"provenance": json.dumps(provenance, sort_keys=True)}))


def fill(network: nn.Module, state: dict[str, Tensor], path: str) -> None:
    """Put the tensors of a weights file into the network.

    Raises:
        ClassifierError: keys that are missing, unexpected or of another shape, by name.
    """
    own = network.state_dict()
    counters = {
        key for key in own if key.endswith("num_batches_tracked")
    }  # unused in inference, absent from many files
    complaints = {
        "missing": sorted(own.keys() - state.keys() - counters),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": sorted(k for k in own.keys() & state.keys() if own[k].shape != state[k].shape),
    }
    if any(complaints.values()):
        listed = "; ".join(
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' * (len(keys) > 3)})"
            for what, keys in complaints.items()
            if keys
        )
        raise ClassifierError(f"{path} does not fit the network: keys {listed}")
    network.load_state_dict(state, strict=False)


def digest_weights(network: nn.Module) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes of the network's state."""
    digest = hashlib.sha256()
    for key, value in sorted(network.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
