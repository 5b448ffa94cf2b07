"""Perturbations as files: this package's own, checked against what they say of themselves, and published ones."""

import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from scipy.io import loadmat
from torch import Tensor
from torch.nn.functional import interpolate

from uap_dist.data.locations import read_file, split_query
from uap_dist.errors import ConfigError, PerturbationError
from uap_dist.foreign_text import first_line
from uap_dist.method.norms import Norm, measure
from uap_dist.perturbations.names import Parts, canonical, name_rest, parts_of

PERTURBATION_FILE = "perturbation.safetensors"
UNITS = {"1": 255.0, "255": 1.0}  # what a value of that scale is in pixels
MLFLOW_SCHEMES = ("runs:/", "models:/")
SMALLEST = 0.1  # pixels; what is smaller comes of a wrong unit
ROUNDING = 1e-5  # of a norm, relative: v is kept in float32


@dataclass(frozen=True)
class Perturbation:
    """A perturbation and where it comes from.

    Attributes:
        name: in tables; no two of a job are the same.
        v: C×H×W float32, pixels (0..255), RGB.
        provenance: what its file says of it; empty for published ones.
    """

    name: str
    v: Tensor
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def resized(self, shape: Sequence[int]) -> Tensor:
        """V at another input size (C×H×W): bilinear, antialiased; pixel values stay as large as they are, the ℓ2 norm does not."""
        if tuple(self.v.shape) == tuple(shape):
            return self.v
        return interpolate(self.v[None], size=tuple(shape[1:]), mode="bilinear", antialias=True)[0]


def load_perturbations(specifications: Sequence[str], taken: Collection[str] = ()) -> list[Perturbation]:
    """The perturbations of files: `[NAME=]LOCATION`, for .npy and .mat `[NAME=]LOCATION:UNIT`.

    Those without a name are called as the folder of jobs/compute.py, or as the file; where that is another's name, with more of
    their path before it.

    Args:
        specifications: LOCATION is a perturbation.safetensors or its folder, an .npy, or a .mat with one array (local, s3://, gs://,
            runs:/RUN/PATH of MLflow).
            The arrays of the last two are 3×H×W or H×W×3, RGB, and UNIT says what they are in: 255 for pixels 0..255, 1 for
            the scale 0..1.
        taken: names of other things in the same tables.

    Raises:
        PerturbationError: a file that is none, is not what it says, or does not say its unit.
        ConfigError: a file that is there twice, or a name that is given twice.
    """
    given, locations = zip(*map(split_name, specifications), strict=True) if specifications else ((), ())
    places = [canonical(split_query(location)[0].removesuffix(f"/{PERTURBATION_FILE}")) for location in locations]
    for location, place in zip(locations, places, strict=True):
        if places.count(place) > 1:
            raise ConfigError(f"perturbation {location} is there twice")
    names = name_rest("perturbations", given, [_parts(location) for location in locations], taken=taken)
    return [_load(name, location) for name, location in zip(names, locations, strict=True)]


def save_perturbation(path: Path, v: Tensor, provenance: Mapping[str, Any]) -> None:
    """Write v (C×H×W float32, pixels) as the tensor "perturbation", its provenance as JSON in the file's metadata.

    Args:
        path: of the .safetensors file.
        v: the perturbation.
        provenance: where it comes from; what is read back wants its perturbation_sha256, norm and radius.
    """
    metadata = {"provenance": json.dumps(provenance, sort_keys=True), "unit": "pixels 0..255, RGB, C×H×W"}
    path.write_bytes(save({"perturbation": v.contiguous()}, metadata))  # save_file would let its owner alone read it


def split_name(text: str) -> tuple[str, str]:
    """NAME and the rest of NAME=REST; no name where the = belongs to a path or to a URL's options."""
    name, equals, rest = text.partition("=")
    return (name, rest) if equals and "/" not in name and "?" not in name else ("", text)


def _parts(location: str) -> Parts:
    """Of the place, the last one naming the perturbation."""
    *folders, last = parts_of(split_query(location)[0])
    if last == PERTURBATION_FILE and folders:
        return tuple(folders)
    extension = PurePosixPath(last).suffix.partition(":")[0]
    return (*folders, last.removesuffix(".safetensors") if extension not in (".npy", ".mat") else last.split(".")[0])


def _load(name: str, location: str) -> Perturbation:
    path = PurePosixPath(split_query(location)[0])
    extension, colon, unit = path.suffix.partition(":")
    if extension in (".npy", ".mat"):
        if unit not in UNITS:
            raise PerturbationError(
                f"{location}: say what its values are in: {location.removesuffix(colon + unit)}:255 for pixels 0..255, or :1 for 0..1"
            )
        location = location.replace(f"{extension}:{unit}", extension, 1)
        return Perturbation(name, _published(location, extension, UNITS[unit]))
    if extension != ".safetensors":
        location, query = split_query(location)
        location = f"{location.rstrip('/')}/{PERTURBATION_FILE}{query}"
    return _own(name, location)


def _own(name: str, location: str) -> Perturbation:
    data = read(location)
    try:
        v = load(data)["perturbation"].float()
        provenance = json.loads(metadata_of(data)["provenance"])
        digest, norm, radius = (provenance[key] for key in ("perturbation_sha256", "norm", "radius"))
    except Exception as error:
        raise PerturbationError(
            f"{location} is no perturbation that jobs/compute.py has written: {first_line(error)}"
        ) from error
    if sha256(v.numpy().tobytes()).hexdigest() != digest:
        raise PerturbationError(f"{location} is damaged: its values do not have the digest that it says")
    check_radius(v, norm, radius, location)
    return Perturbation(name, v, provenance)


def metadata_of(data: bytes) -> dict[str, str]:
    """What a safetensors file says beside its tensors (safetensors itself reads it from files only)."""
    length = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return metadata


def check_radius(v: Tensor, norm: Norm, radius: float, location: str) -> None:
    """Raise PerturbationError if v has values that are not finite, or lies outside its ball."""
    if not v.isfinite().all():
        raise PerturbationError(f"{location} holds values that are not finite")
    if measure(v, norm) > radius * (1 + ROUNDING):
        raise PerturbationError(
            f"{location} has {norm} norm {measure(v, norm):g}, more than the radius {radius:g} that it says"
        )


def _published(location: str, extension: str, unit: float) -> Tensor:
    file = io.BytesIO(read(location))
    try:
        named = {"array": np.load(file)} if extension == ".npy" else loadmat(file)
    except Exception as error:
        raise PerturbationError(f"{location} cannot be read: {first_line(error)}") from error
    arrays = [value for key, value in named.items() if not key.startswith("__")]
    array = np.squeeze(arrays[0]) if len(arrays) == 1 else np.zeros(0)
    places = [axis for axis in (0, 2) if array.ndim == 3 and array.shape[axis] == 3]
    if len(places) != 1:
        raise PerturbationError(
            f"{location} does not hold one array of shape 3×H×W or H×W×3, but {[a.shape for a in arrays]}"
        )
    v = unit * torch.tensor(np.moveaxis(array, places[0], 0).astype(np.float32))
    if not SMALLEST <= measure(v, "linf") <= 255:  # nan as well
        raise PerturbationError(f"{location} reaches ±{measure(v, 'linf'):g} pixels of 255; is its unit right?")
    return v


def read(location: str) -> bytes:
    """A whole file, local, s3://, gs:// or in MLflow (runs:/, models:/); PerturbationError or TrackingError where that fails."""
    if location.startswith(MLFLOW_SCHEMES):
        from uap_dist.tracking.mlflow_server import fetch  # here, because MLflow is needed for these only

        location = fetch(location)
    try:
        return read_file(location)
    except OSError as error:
        raise PerturbationError(f"cannot read {error}") from error
