"""Perturbations that others have published: arrays and tensors in a file, or in the files of a folder or zip, in a given unit."""

import io
import json
import logging
import math
import re
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch
from pyarrow import fs
from scipy.io import loadmat
from torch import Tensor

from uap_dist.data.locations import STORE_ERRORS, explain, locate, split_query
from uap_dist.errors import ClassifierError, PerturbationError
from uap_dist.foreign_text import first_few, first_line
from uap_dist.method.norms import measure
from uap_dist.models.names import tell_apart
from uap_dist.models.weights_file import choose_one, load_tensors, split_key
from uap_dist.perturbations.reading import KINDS, read, written_as

UNITS = {"1": 255.0, "255": 1.0}  # pixels per unit, by the largest value of the scale
EXTENSIONS = (".npy", ".mat", ".pth", ".pt", ".tar", ".bin", ".safetensors")
NAMELESS = ("model", "pytorch_model", "checkpoint", "perturbation")  # files that their folder names
LIMITS = "config.json"  # beside a perturbation, in XTransferBench's zoo
NUM_BYTES_SHOWN = 24
SMALLEST = 0.1  # pixels; a smaller perturbation has probably been read in the wrong unit
AS_TANH = "delta_param"  # XTransferBench stores those of its l2 attacks as atanh of themselves
SAVE_ALONE = "save the perturbation's tensor alone: torch.save(v, 'perturbation.pth')"

logger = logging.getLogger(__name__)


def split_unit(location: str) -> tuple[str, float | None]:
    """A location without its unit, and the pixels per unit; None where it has none, as this package's own files.

    Raises:
        PerturbationError: a file that only others write is given without a unit, or with an unknown one.
    """
    path, query = split_query(location)
    found = re.fullmatch(r"(.+):(\w*)", path)
    if found and found[2] in UNITS:
        return found[1] + query, UNITS[found[2]]
    place = found[1] if found and _is_foreign(found[1]) else path
    if _is_foreign(place):
        raise PerturbationError(
            f"{location}: give the unit of its values: {place}:255 for pixels of 0..255, or :1 for 0..1"
        )
    return location, None


def load_published(location: str, unit: float) -> dict[str, Tensor]:
    """Perturbations (C×H×W float32, pixels) by name; "" names the only one of a file.

    A file is .npy, .mat, .safetensors or of torch.save (.pth, .pt, .bin, .pth.tar), and holds arrays [1×]3×H×W or H×W×3, RGB, or one
    of M×3×H×W; FILE#KEY takes one. Others beside them are left out if only one is a perturbation. In a folder or zip, those of all
    such files are taken, and the `epsilon` in a config.json beside one limits its values, as in XTransferBench's zoo.

    Args:
        location: without its unit; local, s3://, gs:// or in MLflow.
        unit: pixels per unit.

    Raises:
        PerturbationError: a file cannot be read, holds no perturbation, or several that are not all it holds; or its unit is wrong.
    """
    path, key = split_key(location)
    place = split_query(path)[0].lower()
    if PurePosixPath(place).suffix in EXTENSIONS:
        found = _take(_parse(read(path), path), key, path)
        return {name: _in_pixels(v, unit, f"{path} {name}".strip()) for name, v in found.items()}
    files = _unzip(read(path), path) if place.endswith(".zip") else dict(_folder(path))
    return _load_files(files, unit, path)


def _is_foreign(path: str) -> bool:
    place = path.partition("#")[0]
    return PurePosixPath(place.lower()).suffix in {*EXTENSIONS, ".zip"} - {".safetensors"}


def _load_files(files: Mapping[str, bytes], unit: float, path: str) -> dict[str, Tensor]:
    members: dict[tuple[str, ...], Tensor] = {}
    others = []
    for name, data in files.items():
        file = PurePosixPath(name)
        if file.suffix.lower() not in EXTENSIONS:
            others += [name] * (file.name != LIMITS)
            continue
        where = f"{path}, {name}"
        limit = _epsilon(files.get(str(file.parent / LIMITS), b"{}"))
        stem = file.name.partition(".")[0] if file.suffix.lower() == ".tar" else file.stem
        parts = file.parent.parts if stem in NAMELESS and file.parent.parts else (*file.parent.parts, stem)
        for key, array in _take(_parse(data, where), "", where).items():
            member = (*parts[:-1], f"{parts[-1]}-{key}" if key else parts[-1])
            if member in members:
                raise PerturbationError(f"{where} has the name {member[-1]}, as another file there; rename one of them")
            members[member] = _in_pixels(array, unit, where, limit)
    if not members:
        raise PerturbationError(f"{path} holds no file of a perturbation ({', '.join(EXTENSIONS)})")
    if others:
        logger.warning(
            "%s: left out %d files that are not of a perturbation's kind: %s", path, len(others), first_few(others)
        )
    names = tell_apart(list(members), separator="-")
    return dict(zip(names, members.values(), strict=True))


def _epsilon(config: bytes) -> float:
    try:
        epsilon = json.loads(config).get("epsilon")
    except (ValueError, AttributeError):
        return math.inf
    return float(epsilon) if isinstance(epsilon, int | float) and epsilon > 0 else math.inf


def _unzip(data: bytes, path: str) -> dict[str, bytes]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = [each for each in archive.namelist() if not each.endswith("/") and _is_visible(each)]
            twice = next((name for name, count in Counter(names).items() if count > 1), None)
            if twice is not None:
                raise ValueError(f"it holds {twice} more than once")
            return {name: archive.read(name) for name in sorted(names)}
    except Exception as error:  # of the archive and of each compression: damaged, encrypted, unknown
        raise PerturbationError(f"{path} cannot be unpacked: {first_line(error)}") from error


def _folder(path: str) -> Iterator[tuple[str, bytes]]:
    """Name within the folder and content of each of its files, of subfolders too."""
    filesystem, place = locate(path)
    try:
        if filesystem.get_file_info(place).type != fs.FileType.Directory:
            raise PerturbationError(
                f"{path} is no folder, and no file of a kind that holds perturbations ({', '.join(EXTENSIONS)}, .zip)"
            )
        infos = filesystem.get_file_info(fs.FileSelector(place, recursive=True))
        for info in sorted(infos, key=lambda each: each.path):
            name = info.path.removeprefix(place.rstrip("/") + "/")
            if info.type == fs.FileType.File and _is_visible(name):
                with filesystem.open_input_stream(info.path, compression=None) as stream:
                    yield name, stream.read()
    except STORE_ERRORS as error:
        raise PerturbationError(f"cannot read {explain(path, error)}") from error


def _is_visible(name: str) -> bool:
    return not any(part.startswith((".", "__MACOSX")) for part in PurePosixPath(name).parts)


def _parse(data: bytes, path: str) -> Any:
    extension = PurePosixPath(split_query(path)[0]).suffix.lower()
    try:
        if extension == ".npy":
            return _load_npy(data)
        if extension == ".mat":
            return {key: value for key, value in loadmat(io.BytesIO(data)).items() if not key.startswith("__")}
        found = load_tensors(data, path, SAVE_ALONE)
        own = written_as(data)
        if own is not None:
            raise PerturbationError(
                "{} is {} of jobs/compute.py and knows its unit; leave that out, and give it as {}".format(
                    path, *KINDS[own]
                )
            )
        return found
    except PerturbationError:
        raise
    except ClassifierError as error:
        raise PerturbationError(str(error)) from error
    except Exception as error:  # of NumPy and SciPy
        raise PerturbationError(f"{path} cannot be read: {first_line(error)}") from error


def _load_npy(data: bytes) -> np.ndarray:
    if not data.startswith(b"\x93NUMPY"):  # NumPy would take it for a pickle, and advise to read that
        raise ValueError(f"it is not what numpy.save writes, it begins with {data[:NUM_BYTES_SHOWN]!r}")
    found: np.ndarray = np.load(io.BytesIO(data))
    return found


def _take(value: Any, key: str, path: str) -> dict[str, np.ndarray]:
    """The perturbations (C×H×W) in a file's contents by their keys, "" for the only one."""
    try:
        arrays = dict(_arrays(value))
    except (TypeError, RuntimeError) as error:  # of tensors that are sparse, nested, quantised or without values
        raise PerturbationError(f"{path} holds a tensor that is no array: {first_line(error)}; {SAVE_ALONE}") from error
    if key:
        own = {name: array for name, array in arrays.items() if name == key or name.startswith(f"{key}.")}
        if not own:
            raise PerturbationError(f"{path} has nothing under {key!r}; its keys: {', '.join(arrays) or 'none'}")
        arrays = own
    found = {name: v for name, array in arrays.items() if (v := _to_chw(array)) is not None}
    if len(arrays) == 1 and not found:
        (several,) = arrays.values()
        stack = [_to_chw(array) for array in several] if several.ndim == 4 else []
        found = {str(number): v for number, v in enumerate(stack) if v is not None}
        if found:
            return found
    if len(found) == 1:
        return {"": next(iter(found.values()))}
    if found and len(found) == len(arrays):
        names = [name.replace("/", "-") for name in found]  # as they name files
        if len(set(names)) < len(names):
            raise PerturbationError(f"{path} has keys that differ by / and - only: {', '.join(found)}; rename them")
        return dict(zip(names, found.values(), strict=True))
    if found:
        raise PerturbationError(choose_one(path, list(found)))
    raise PerturbationError(
        f"{path} must hold one array of numbers, 3×H×W or H×W×3, but holds "
        + (first_few([f"{name} {a.dtype} {a.shape}".strip() for name, a in arrays.items()]) or "none")
        + (f" under {key}" if key else "")
    )


def _arrays(value: Any, name: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Arrays by the keys that lead to them; the state of optimisers is skipped, which has integers as keys."""
    if isinstance(value, Tensor):
        tensor = torch.tanh(value.detach()) if name.endswith(AS_TANH) else value.detach()
        yield name, (tensor.float() if tensor.is_floating_point() else tensor).numpy()  # which has no bfloat16
    elif isinstance(value, np.ndarray):
        yield name, value
    elif isinstance(value, Mapping | list | tuple):
        pairs = value.items() if isinstance(value, Mapping) else ((str(i), each) for i, each in enumerate(value))
        for key, each in pairs:
            if isinstance(key, str):
                yield from _arrays(each, f"{name}.{key}" if name else key)


def _to_chw(array: np.ndarray) -> np.ndarray | None:
    """The array as C×H×W, if it is a perturbation in either layout; None otherwise."""
    array = np.squeeze(array)
    places = [axis for axis in (0, 2) if array.ndim == 3 and array.shape[axis] == 3]
    return np.moveaxis(array, places[0], 0) if len(places) == 1 and array.dtype.kind in "iuf" else None


def _in_pixels(array: np.ndarray, unit: float, where: str, limit: float = math.inf) -> Tensor:
    if array.dtype.kind == "u":
        raise PerturbationError(
            f"{where} holds {array.dtype}, which cannot be negative; subtract what was added, as 128, and save floats"
        )
    with np.errstate(over="ignore"):  # what is too large is refused below
        v = unit * torch.tensor(array.astype(np.float32).clip(-limit, limit))
    if not v.isfinite().all():
        raise PerturbationError(f"{where} holds values that are not finite")
    if not v.any():
        raise PerturbationError(f"{where} holds zeros only")
    if not SMALLEST <= measure(v, "linf") <= 255:
        raise PerturbationError(f"{where} reaches ±{measure(v, 'linf'):g} pixels of 255; is its unit right?")
    if v.min() > 0:
        logger.warning("%s has positive values only; if 128 was added to them, or 0.5, subtract that", where)
    return v
