"""Files of tensors as training scripts leave them, read without running code: what is in them, and which entry is meant."""

import argparse
import hashlib
import io
import json
import logging
import os
import platform
import re
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PosixPath
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from uap_dist.data.locations import is_url, read_file, split_query
from uap_dist.errors import ClassifierError
from uap_dist.foreign_text import first_line, nearest

SAVE_ALONE = "save its tensors alone: torch.save(network.state_dict(), 'weights.pth')"
PLAIN = (argparse.Namespace, PosixPath)  # classes that scripts save beside tensors, and that hold nothing but values

logger = logging.getLogger(__name__)


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


def open_weights(location: str) -> WeightsFile:
    """Read a .safetensors or weights-only .pth file, local or at a URL. Its format is recognised by its content.

    Args:
        location: of the file. FILE#KEY takes only the tensors under KEY, which is made of the keys that lead to them, joined by
            dots, and may end with the beginning of their names: checkpoint.pth#state_dict_ema, or #model.module.

    Raises:
        ClassifierError: there is no such file, it has no tensors that can be read without pickle, or none under KEY.
    """
    path, key = split_key(location)
    if not is_url(path) and not os.path.isfile(path):
        raise ClassifierError(f"no weights file {path} on {platform.node()}" + ": it is a folder" * os.path.isdir(path))
    try:
        data = read_file(path)
    except OSError as error:
        raise ClassifierError(f"cannot read weights file {error}") from error
    states, provenance = dict(find_states(load_tensors(data, path, SAVE_ALONE))), _provenance(data)
    if not any(states.values()):
        raise ClassifierError(f"{path} holds no dictionary of tensors; {SAVE_ALONE}")
    if key:
        states = {"": _take(states, key, path)}
    return WeightsFile(location, hashlib.sha256(data).hexdigest(), states, provenance)


def read_weights(path: str) -> dict[str, Tensor]:
    """The tensors of a file with a single dictionary of them.

    Raises:
        ClassifierError: see `open_weights`; or the file has several dictionaries.
    """
    states = open_weights(path).states
    if len(states) > 1:
        raise ClassifierError(choose_one(path, list(states)))
    return next(iter(states.values()))


def split_key(location: str) -> tuple[str, str]:
    """The file and the key of FILE#KEY; no key where a file of the whole name exists."""
    if not is_url(location) and os.path.exists(location):
        return location, ""
    place, query = split_query(location)
    path, mark, key = place.rpartition("#")
    return (path + query, key) if mark else (location, "")


def choose_one(path: str, names: list[str]) -> str:
    """A message for a file with several dictionaries, or tensors, that could be meant."""
    listed = ", ".join(name or "the whole file" for name in names)
    return (
        f"{path} holds several that could be meant: {listed}; choose one by its key, as {path.rstrip('#')}#{names[-1]}"
    )


def load_tensors(data: bytes, path: str, advice: str) -> Any:
    """Contents of a .safetensors file, or of one of torch.save with tensors and plain values. No other class is unpickled.

    Args:
        data: the whole file.
        path: for messages.
        advice: what to do about a file of another kind.

    Raises:
        ClassifierError: it is neither, or holds objects of other classes, which are named, because unpickling runs their code.
    """
    if data[8:9] == b"{":
        try:
            return load(data)
        except Exception as error:  # the library has its own error types
            raise ClassifierError(
                f"{path} is a truncated or damaged safetensors file ({first_line(error)}); fetch it again"
            ) from error
    wrong = _name_other_kind(data)
    if wrong is not None:
        raise ClassifierError(f"{path} {wrong}")
    _warn_of_damage(data, path)
    with torch.serialization.safe_globals(list(PLAIN)):
        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:  # pickle and torch raise errors of many types, which mean the same to the user
            raise ClassifierError(f"{path} {_why_refused(data, path, str(error), advice)}") from error


def _why_refused(data: bytes, path: str, complaint: str, advice: str) -> str:
    names = _name_classes(data, complaint)
    if any(name.startswith("torch.nn.modules.") for name in names):
        return f"holds a whole pickled network, which is not read because unpickling runs code; {advice}"
    if names:
        return (
            f"holds objects of {', '.join(names)}, which are not read because unpickling runs code; if you trust it, "
            f"save its tensors alone: torch.save(torch.load({Path(path).name!r}, weights_only=False)['KEY'], 'weights.pth'), "
            "with the KEY of the dictionary of tensors"
        )
    return f"is not a readable .safetensors or weights-only .pth file; {advice}"


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
        return "is a Git LFS pointer, not the tensors themselves; fetch those with git lfs pull"
    if data.lstrip()[:1] == b"<":
        return (
            "is a web page (HTML or XML), not a file of tensors; download the file itself, not the page that shows it"
        )
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


def _warn_of_damage(data: bytes, path: str) -> None:
    """Warn of a checksum that does not match: torch does not look at them, and can be told to save none."""
    if not data.startswith(b"PK"):  # an older format, which has none
        return
    try:
        damaged = zipfile.ZipFile(io.BytesIO(data)).testzip()
    except zipfile.BadZipFile:  # torch will say so
        return
    if damaged is not None:
        logger.warning(
            "%s: %s does not match its checksum; unless it was saved without one, the file is damaged", path, damaged
        )


def find_states(value: Any, name: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Dictionaries of tensors within the contents of a file; those of optimisers are skipped, which have integers as keys."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return
    tensors = {key: each for key, each in value.items() if isinstance(each, Tensor)}
    # tensors among other entries are a network's only if some are named MODULE.TENSOR
    if tensors and (len(tensors) == len(value) or any("." in key for key in tensors)):
        yield name, tensors
    for key, each in value.items():
        yield from find_states(each, f"{name}.{key}" if name else key)


def _take(states: Mapping[str, dict[str, Tensor]], key: str, path: str) -> dict[str, Tensor]:
    """The tensors whose full names begin with the key, without it."""
    full = {f"{name}.{k}".lstrip("."): each for name, state in states.items() for k, each in state.items()}
    found = {name.removeprefix(f"{key}."): each for name, each in full.items() if name.startswith(f"{key}.")}
    if not found:
        groups = sorted({*filter(None, states), *(name.rpartition(".")[0] for name in full if "." in name)}, key=len)
        raise ClassifierError(f"{path} has no tensors under {key!r}; nearest keys: {nearest(key, groups, groups)}")
    return found


def metadata_of(data: bytes) -> dict[str, str]:
    """Metadata of a safetensors file in memory (the library reads metadata only from files); none of any other file."""
    metadata = header_of(data).get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def header_of(data: bytes) -> dict[str, Any]:
    """What a safetensors file in memory holds, by name; nothing of any other file."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length]) if data[8:9] == b"{" else {}
    except ValueError:
        return {}
    return header if isinstance(header, dict) else {}


def _provenance(data: bytes) -> Mapping[str, Any]:
    try:
        provenance = json.loads(metadata_of(data)["provenance"])
    except (KeyError, ValueError, TypeError):  # written by another program
        return {}
    return provenance if isinstance(provenance, dict) else {}
