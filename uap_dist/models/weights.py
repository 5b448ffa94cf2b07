"""Weights of networks: written, loaded from what a file holds, and their digests."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from uap_dist.errors import ClassifierError
from uap_dist.models.weights_file import WeightsFile, choose_one

WRAPPERS = ("module", "_orig_mod")  # components that DataParallel and torch.compile add to keys
UNUSED = re.compile(r"(^|\.)(num_batches_tracked|n_averaged)$")  # counters that inference does not need


def write_weights(path: Path, network: nn.Module, provenance: Mapping[str, Any]) -> None:
    """Write a network's parameters and buffers as a .safetensors file, with their provenance as JSON in its metadata."""
    state = {key: value.detach().cpu().clone().contiguous() for key, value in network.state_dict().items()}
    path.write_bytes(save(state, {"provenance": json.dumps(provenance, sort_keys=True)}))


def fill_from(network: nn.Module, file: WeightsFile) -> None:
    """Load into the network the one dictionary of a file that fits it, after removing what training wrappers add to keys.

    Raises:
        ClassifierError: no dictionary fits, or several do.
    """
    unwrapped = {name: _unwrap(state, network) for name, state in file.states.items()}
    fitting = {name: state for name, state in unwrapped.items() if not _complaints(network, state)}
    if len(fitting) > 1:
        raise ClassifierError(choose_one(file.path, list(fitting)))
    own = network.state_dict().keys()
    name = next(iter(fitting)) if fitting else max(unwrapped, key=lambda name: len(unwrapped[name].keys() & own))
    fill(network, unwrapped[name], f"{file.path} ({name})" if name else file.path)


def fill(network: nn.Module, state: dict[str, Tensor], path: str) -> None:
    """Load tensors of a weights file into the network; other floating-point types are cast to the network's.

    Raises:
        ClassifierError: keys are missing or unexpected, or their tensors have another shape or integers instead of floats.
    """
    complaints = _complaints(network, state)
    if complaints:
        listed = "; ".join(
            f"{len(keys)} {what} ({', '.join(keys[:3])}{', …' * (len(keys) > 3)})" for what, keys in complaints.items()
        )
        raise ClassifierError(f"{path} does not fit the network: keys {listed}{_advise(network, state, complaints)}")
    network.load_state_dict(state, strict=False)


def _complaints(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    own = {key: value for key, value in network.state_dict().items() if isinstance(value, Tensor)}
    both = own.keys() & state.keys()
    arrays = {key for key in both if _is_array(state[key])}
    found = {
        "missing": [key for key in own.keys() - state.keys() if not UNUSED.search(key)],
        "unexpected": [key for key in state.keys() - own.keys() if not UNUSED.search(key)],
        "of tensors that are sparse, nested or without values": list(both - arrays),
        "of another shape": [key for key in arrays if own[key].shape != state[key].shape],
        "of integers, as quantised weights are": [
            key for key in arrays if own[key].is_floating_point() and not state[key].is_floating_point()
        ],
    }
    return {what: sorted(keys) for what, keys in found.items() if keys}


def _is_array(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not (tensor.is_meta or tensor.is_nested)


def _advise(network: nn.Module, state: Mapping[str, Tensor], complaints: Mapping[str, list[str]]) -> str:
    """What to do where nothing but shapes is wrong."""
    if list(complaints) != ["of another shape"]:
        return ""
    key, own = complaints["of another shape"][0], network.state_dict()
    found, expected = ("×".join(map(str, tensors[key].shape)) for tensors in (state, own))
    return (
        f": {key} is {found}, the network's {expected}. For another number of classes give a factory of your own that makes the "
        "network with it; for another input size, the name of the weights that have it (MODEL@WEIGHTS, or a tag of timm)"
    )


def _unwrap(state: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The state with wrappers' prefixes removed from its keys, if that makes more of them match the network's."""
    own = network.state_dict().keys()
    candidates = [state, {".".join(p for p in key.split(".") if p not in WRAPPERS): v for key, v in state.items()}]
    stripped = candidates[-1]
    while len({key.partition(".")[0] for key in stripped}) == 1 and all("." in key for key in stripped):
        stripped = {key.partition(".")[2]: value for key, value in stripped.items()}
        candidates.append(stripped)
    same_size = [each for each in candidates if len(each) == len(state)]  # no two keys became one
    return max(same_size, key=lambda each: len(each.keys() & own))


def digest_weights(network: nn.Module) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes of all tensors in the network.

    These are its state, buffers that are not saved, and tensors that are plain attributes of its modules.
    """
    digest = hashlib.sha256()
    state = {key: value for key, value in network.state_dict().items() if isinstance(value, Tensor)}
    for key, value in sorted((_plain_tensors(network) | dict(network.named_buffers()) | state).items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        # viewed as bytes because NumPy has no bfloat16
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _plain_tensors(network: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{attribute}".lstrip("."): value
        for name, module in network.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, Tensor)
    }
