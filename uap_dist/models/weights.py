"""Weights files: reading and writing them without pickle, putting them into a network, and their digest."""

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

WRAPPERS = ("module", "_orig_mod")  # parts of keys that DataParallel and torch.compile add
UNUSED = re.compile(r"(^|\.)(num_batches_tracked|n_averaged)$")  # counters, which inference does not need
SAVE_ALONE = "save its tensors alone: torch.save(network.state_dict(), 'weights.pth')"


@dataclass(frozen=True)
class WeightsFile:
    """What a weights file holds.

    Attributes:
        path: as it was given.
        sha256: of the file (hex).
        states: dictionaries of tensors by the keys that lead to them, joined by dots; the whole file's is "".
        provenance: what a file that `write_weights` wrote says of itself; else empty.
    """

    path: str
    sha256: str
    states: Mapping[str, dict[str, Tensor]]
    provenance: Mapping[str, Any]


def open_weights(path: str) -> WeightsFile:
    """Read a .safetensors or weights-only .pth file, local, s3:// or gs://; what it is is told from its content.

    Raises:
        ClassifierError: no such file, or one without tensors that can be read without pickle.
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
    """The tensors of a file that holds one dictionary of them.

    Raises:
        ClassifierError: as `open_weights`; or there are several dictionaries.
    """
    states = open_weights(path).states
    if len(states) > 1:
        raise ClassifierError(_choose_one(path, list(states)))
    return next(iter(states.values()))


def write_weights(path: Path, network: nn.Module, provenance: Mapping[str, Any]) -> None:
    """The network's parameters and buffers as a .safetensors file that `read_weights` reads, with where they come from as JSON in it."""
    state = {key: value.detach().cpu().clone().contiguous() for key, value in network.state_dict().items()}
    path.write_bytes(save(state, {"provenance": json.dumps(provenance, sort_keys=True)}))


def fill_from(network: nn.Module, file: WeightsFile) -> None:
    """Put the one dictionary of a file that fits the network into it; what training wrappers add to keys is taken off.

    Raises:
        ClassifierError: none fits, or several do.
    """
    unwrapped = {name: _unwrap(state, network) for name, state in file.states.items()}
    fitting = {name: state for name, state in unwrapped.items() if not _complaints(network, state)}
    if len(fitting) > 1:
        raise ClassifierError(_choose_one(file.path, list(fitting)))
    own = network.state_dict().keys()
    name = next(iter(fitting)) if fitting else max(unwrapped, key=lambda name: len(unwrapped[name].keys() & own))
    fill(network, unwrapped[name], f"{file.path} ({name})" if name else file.path)


def fill(network: nn.Module, state: dict[str, Tensor], path: str) -> None:
    """Put the tensors of a weights file into the network; those of another floating-point type are cast to the network's.

    Raises:
        ClassifierError: keys that are missing, unexpected, of another shape or of integers instead of floats, by name.
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
    """The state under keys that the network knows, where a wrapper's name is all that keeps it from them."""
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
        f"{path} holds several dictionaries of weights that could be meant: {listed}; save the right one alone, as "
        f"torch.save(torch.load({Path(path).name!r}){keys}, 'weights.pth')"
    )


def _load_safetensors(data: bytes, path: str) -> dict[str, Tensor]:
    try:
        return load(data)
    except Exception as error:  # the library's own kinds
        raise ClassifierError(
            f"{path} is a safetensors file that is cut short or damaged ({first_line(error)}); fetch it again"
        ) from error


def _provenance(data: bytes) -> Mapping[str, Any]:
    length = int.from_bytes(data[:8], "little")
    try:
        provenance = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["provenance"])
    except (KeyError, ValueError, TypeError):  # another program wrote it
        return {}
    return provenance if isinstance(provenance, dict) else {}


def _load_pickle(data: bytes, path: str) -> Any:
    """What torch.save wrote, if it is of tensors and plain values; nothing else is unpickled, because that runs code."""
    wrong = _name_other_kind(data)
    if wrong is not None:
        raise ClassifierError(f"{path} {wrong}")
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # pickle and torch raise many kinds, all of them mean the same to the user
        names = _name_classes(data, str(error))
        if any(name.startswith("torch.nn.modules.") for name in names):
            raise ClassifierError(
                f"{path} holds a whole pickled network, which is not read because unpickling runs code; {SAVE_ALONE}"
            ) from error
        if names:
            raise ClassifierError(
                f"{path} holds objects of {', '.join(names)}, which are not read because unpickling runs code; where you trust it, "
                f"save its tensors alone: torch.save(torch.load({Path(path).name!r}, weights_only=False)['KEY'], 'weights.pth'), "
                "KEY being that of the dictionary of tensors"
            ) from error
        raise ClassifierError(
            f"{path} is not a readable .safetensors or weights-only .pth file; {SAVE_ALONE}"
        ) from error


def _name_classes(data: bytes, complaint: str) -> list[str]:
    """Classes in a file of torch.save that it does not unpickle by itself."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(io.BytesIO(data)))
    except Exception:  # older files
        return re.findall(r"Unsupported global: GLOBAL (\S+)", complaint)


def _name_other_kind(data: bytes) -> str | None:
    """What a file is that torch.load would call broken in its own words."""
    if not data:
        return "is empty (0 bytes); fetch it again"
    if data.startswith(b"version https://git-lfs"):
        return "is a pointer of Git LFS, not the weights themselves; fetch those by git lfs pull"
    if data.lstrip()[:1] == b"<":
        return "is a web page (HTML or XML), not a weights file; download the file itself, not the page that shows it"
    if data.startswith(b"\x1f\x8b"):
        return "is compressed (gzip); unpack it"
    if data.startswith(b"PK"):
        try:
            names = zipfile.ZipFile(io.BytesIO(data)).namelist()
        except zipfile.BadZipFile:
            return "is cut short or damaged; fetch it again"
        if any(name.endswith("constants.pkl") for name in names):
            return (
                "is a TorchScript archive, not a dictionary of tensors; save them alone: "
                "torch.save(torch.jit.load(FILE).state_dict(), 'weights.pth')"
            )
    return None


def _find_states(value: Any, name: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Dictionaries of tensors in what a training script saved; an optimiser's have numbers for keys."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return
    tensors = {key: each for key, each in value.items() if isinstance(each, Tensor)}
    # beside other entries single tensors are no network's; a network's are named by module and tensor
    if tensors and (len(tensors) == len(value) or any("." in key for key in tensors)):
        yield name, tensors
    for key, each in value.items():
        yield from _find_states(each, f"{name}.{key}" if name else key)


def digest_weights(network: nn.Module) -> str:
    """SHA-256 (hex) over names, dtypes, shapes and bytes of every tensor that the network holds.

    Beside its state these are buffers that are not saved, and tensors that are plain attributes of its modules.
    """
    digest = hashlib.sha256()
    state = {key: value for key, value in network.state_dict().items() if isinstance(value, Tensor)}
    for key, value in sorted((_plain_tensors(network) | dict(network.named_buffers()) | state).items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        # as bytes, because NumPy has no bfloat16
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def check_same_weights(model: str, weights: str | None, found: str, expected: str, who: str) -> None:
    """Refuse a process that has loaded other weights than the driver.

    Args:
        model: as `load_classifier` took it.
        weights: likewise.
        found: digest of what was loaded there.
        expected: digest of what the driver loaded.
        who: loaded them, for the message.

    Raises:
        ClassifierError: the digests differ.
    """
    if found == expected:
        return
    others = f"{who} loaded other weights of {model} than the driver (digest {found[:12]} instead of {expected[:12]})"
    if weights is not None:
        others += f"; keep {weights} as it is while the job runs, and the same on every node"
    if ":" in model:
        cause = "makes other ones in every process" if weights is None else "may add tensors of its own at random"
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
