"""Weights files: reading and writing them without pickle, loading them into a network, and digests of weights."""

import hashlib
import io
import json
import platform
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from uap_dist.data.locations import is_url, read_file
from uap_dist.errors import ClassifierError
from uap_dist.foreign_text import first_line

WRAPPERS = ("module", "_orig_mod")  # components that DataParallel and torch.compile add to keys
UNUSED = re.compile(r"(^|\.)(num_batches_tracked|n_averaged)$")  # counters that inference does not need
SAVE_ALONE = "save its tensors alone: torch.save(network.state_dict(), 'weights.pth')"


@dataclass(frozen=True)
class WeightsFile:
    """Contents of a weights file.

    Attributes:
        path: as it was given.
        sha256: of the file (hex).
        states: the dictionaries of tensors in the file, by the keys that lead to each, joined by dots; "" is the whole file.
        provenance: stored by `write_weights`; empty for other files.
    """

    path: str
    sha256: str
    states: Mapping[str, dict[str, Tensor]]
    provenance: Mapping[str, Any]


def open_weights(path: str) -> WeightsFile:
    """Read a .safetensors or weights-only .pth file, local, s3:// or gs://. Its format is recognised by its content.

    Raises:
        ClassifierError: there is no such file, or it has no tensors that can be read without pickle.
    """
    if not is_url(path) and not Path(path).is_file():
        raise ClassifierError(f"no weights file {path} on {platform.node()}")
    try:
        data = read_file(path)
    except OSError as error:
        raise ClassifierError(f"cannot read weights file {error}") from error
    if data[8:9] == b"{":
        states, provenance = {"": _load_safetensors(data, path)}, _provenance(data)
    else:
        states, provenance = dict(_find_states(_load_pickle(data, path))), {}
    if not any(states.values()):
        raise ClassifierError(f"{path} holds no dictionary of tensors; {SAVE_ALONE}")
    return WeightsFile(path, hashlib.sha256(data).hexdigest(), states, provenance)


def read_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a file with a single dictionary of them.

    Raises:
        ClassifierError: see `open_weights`; or the file has several dictionaries.
    """
    states = open_weights(path).states
    if len(states) > 1:
        raise ClassifierError(_choose_one(path, list(states)))
    return next(iter(states.values()))


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
        raise ClassifierError(_choose_one(file.path, list(fitting)))
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
        raise ClassifierError(f"{path} does not fit the network: keys {listed}")
    network.load_state_dict(state, strict=False)


def _complaints(network: nn.Module, state: Mapping[str, Tensor]) -> dict[str, list[str]]:
    own = {key: value for key, value in network.state_dict().items() if isinstance(value, Tensor)}
    both = own.keys() & state.keys()
    found = {
        "missing": [key for key in own.keys() - state.keys() if not UNUSED.search(key)],
        "unexpected": [key for key in state.keys() - own.keys() if not UNUSED.search(key)],
        "of another shape": [key for key in both if own[key].shape != state[key].shape],
        "of integers, as quantised weights are": [
            key for key in both if own[key].is_floating_point() and not state[key].is_floating_point()
        ],
    }
    return {what: sorted(keys) for what, keys in found.items() if keys}


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


def _choose_one(path: str, names: list[str]) -> str:
    listed = ", ".join(name or "the whole file" for name in names)
    keys = "".join(f"[{key!r}]" for key in names[-1].split("."))
    return (
        f"{path} holds several dictionaries of weights that could be meant: {listed}; save the right one alone, with "
        f"torch.save(torch.load({Path(path).name!r}){keys}, 'weights.pth')"
    )


def _load_safetensors(data: bytes, path: str) -> dict[str, Tensor]:
    try:
        return load(data)
    except Exception as error:  # the library has its own error types
        raise ClassifierError(
            f"{path} is a truncated or damaged safetensors file ({first_line(error)}); fetch it again"
        ) from error


def _provenance(data: bytes) -> Mapping[str, Any]:
    length = int.from_bytes(data[:8], "little")
    try:
        provenance = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["provenance"])
    except (KeyError, ValueError, TypeError):  # written by another program
        return {}
    return provenance if isinstance(provenance, dict) else {}


def _load_pickle(data: bytes, path: str) -> Any:
    """Contents of a file of torch.save with only tensors and plain values; nothing else is unpickled, because that runs code."""
    wrong = _name_other_kind(data)
    if wrong is not None:
        raise ClassifierError(f"{path} {wrong}")
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # pickle and torch raise errors of many types, which mean the same to the user
        names = _name_classes(data, str(error))
        if any(name.startswith("torch.nn.modules.") for name in names):
            raise ClassifierError(
                f"{path} holds a whole pickled network, which is not read because unpickling runs code; {SAVE_ALONE}"
            ) from error
        if names:
            raise ClassifierError(
                f"{path} holds objects of {', '.join(names)}, which are not read because unpickling runs code; if you trust it, "
                f"save its tensors alone: torch.save(torch.load({Path(path).name!r}, weights_only=False)['KEY'], 'weights.pth'), "
                "with the KEY of the dictionary of tensors"
            ) from error
        raise ClassifierError(
            f"{path} is not a readable .safetensors or weights-only .pth file; {SAVE_ALONE}"
        ) from error


def _name_classes(data: bytes, complaint: str) -> list[str]:
    """Names of the classes in a file that `torch.load(weights_only=True)` does not unpickle."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)))
    except Exception:  # files in an older format
        return re.findall(r"Unsupported global: GLOBAL (\S+)", complaint)


def _name_other_kind(data: bytes) -> str | None:
    """Description of a common kind of file that torch.load would report as broken; None for others."""
    if not data:
        return "is empty (0 bytes); fetch it again"
    if data.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the weights themselves; fetch those with git lfs pull"
    if data.lstrip()[:1] == b"<":
        return "is a web page (HTML or XML), not a weights file; download the file itself, not the page that shows it"
    if data.startswith(b"\x1f\x8b"):
        return "is compressed (gzip); unpack it"
    if data.startswith(b"PK"):
        try:
            names = zipfile.ZipFile(io.BytesIO(data)).namelist()
        except zipfile.BadZipFile:
            return "is truncated or damaged; fetch it again"
        if any(name.endswith("constants.pkl") for name in names):
            return (
                "is a TorchScript archive, not a dictionary of tensors; save them alone: "
                "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')"
            )
    return None


def _find_states(value: Any, name: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Dictionaries of tensors within the contents of a file; those of optimisers are skipped, which have integers as keys."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return
    tensors = {key: each for key, each in value.items() if isinstance(each, Tensor)}
    # tensors among other entries are a network's only if some are named MODULE.TENSOR
    if tensors and (len(tensors) == len(value) or any("." in key for key in tensors)):
        yield name, tensors
    for key, each in value.items():
        yield from _find_states(each, f"{name}.{key}" if name else key)


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


def check_same_weights(model: str, weights: str | None, found: str, expected: str, who: str) -> None:
    """Check that a process has loaded the same weights as the driver.

    Args:
        model: as given to `load_classifier`.
        weights: as given to `load_classifier`.
        found: digest of the weights in that process.
        expected: digest of the driver's weights.
        who: names the process in the message.

    Raises:
        ClassifierError: the digests differ.
    """
    if found == expected:
        return
    others = f"{who} loaded other weights of {model} than the driver (digest {found[:12]} instead of {expected[:12]})"
    if weights is not None:
        others += f"; keep {weights} as it is while the job runs, and the same on every node"
    if ":" in model:
        cause = "makes others in every process" if weights is None else "may add random tensors of its own"
        others += f"; its factory {cause}: give --weights, or seed the factory with torch.manual_seed"
    elif weights is None:
        others += "; the published weights differ between nodes: give --weights"
    raise ClassifierError(others)


def _plain_tensors(network: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{attribute}".lstrip("."): value
        for name, module in network.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, Tensor)
    }
