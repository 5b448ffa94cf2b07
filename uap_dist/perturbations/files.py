"""Perturbation files: those of this package, verified against their own provenance, and published ones (.npy, .mat)."""

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
UNITS = {"1": 255.0, "255": 1.0}  # pixels per unit, by the largest value of the scale
MLFLOW_SCHEMES = ("runs:/", "models:/")
SMALLEST = 0.1  # pixels; a smaller perturbation has probably been read in the wrong unit
ROUNDING = 1e-5  # relative error allowed in a norm, because v is stored as float32


@dataclass(frozen=True)
class Perturbation:
    """A perturbation and its provenance.

    Attributes:
        name: in tables; unique within a job.
        v: C×H×W float32, pixels (0..255), RGB.
        provenance: stored in its file; empty for published ones.
    """

    name: str
    v: Tensor
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def resized(self, shape: Sequence[int]) -> Tensor:
        """V at another input size (C×H×W), bilinear and antialiased. This keeps the size of pixel values, not the ℓ2 norm."""
        if tuple(self.v.shape) == tuple(shape):
            return self.v
        return interpolate(self.v[None], size=tuple(shape[1:]), mode="bilinear", antialias=True)[0]


def load_perturbations(specifications: str | Sequence[str], taken: Collection[str] = ()) -> list[Perturbation]:
    """Load perturbations given as `[NAME=]LOCATION`, or `[NAME=]LOCATION:UNIT` for .npy and .mat files.

    One without a name is named after its folder (files of jobs/compute.py) or its file, preceded by as much of the path as it takes
    to be unique.

    Args:
        specifications: one or several.
            LOCATION is a perturbation.safetensors or its folder, an .npy file, or a .mat file with one array; it may be
            local, s3://, gs://, or runs:/RUN/PATH in MLflow. Arrays in .npy and .mat files are 3×H×W or H×W×3, RGB; their UNIT is
            255 for pixels of 0..255, or 1 for values of 0..1.
        taken: names of other things in the same tables.

    Raises:
        PerturbationError: a file cannot be read, is damaged, contradicts its provenance, or is given without its unit.
        ConfigError: a file or a name is given twice.
    """
    specifications = [specifications] if isinstance(specifications, str) else specifications
    given, locations = zip(*map(split_name, specifications), strict=True) if specifications else ((), ())
    places = [canonical(split_query(location)[0].removesuffix(f"/{PERTURBATION_FILE}")) for location in locations]
    for location, place in zip(locations, places, strict=True):
        if places.count(place) > 1:
            raise ConfigError(f"perturbation {location} is given twice")
    names = name_rest("perturbations", given, [_parts(location) for location in locations], taken=taken)
    return [_load(name, location) for name, location in zip(names, locations, strict=True)]


def save_perturbation(path: Path, v: Tensor, provenance: Mapping[str, Any]) -> None:
    """Write v as the tensor "perturbation" of a .safetensors file, with its provenance as JSON in the metadata.

    Args:
        path: of the .safetensors file.
        v: C×H×W float32, pixels.
        provenance: must have perturbation_sha256, norm and radius, which `load_perturbations` verifies.
    """
    metadata = {"provenance": json.dumps(provenance, sort_keys=True), "unit": "pixels 0..255, RGB, C×H×W"}
    path.write_bytes(
        save({"perturbation": v.contiguous()}, metadata)
    )  # save_file would make it readable by its owner alone


def split_name(text: str) -> tuple[str, str]:
    """NAME and REST of NAME=REST; an empty name if the = belongs to a path or to a URL's options."""
    name, equals, rest = text.partition("=")
    return (name, rest) if equals and "/" not in name and "?" not in name else ("", text)


def _parts(location: str) -> Parts:
    """The parts of the location that may name the perturbation, the most specific one last."""
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
                f"{location}: give the unit of its values: {location.removesuffix(colon + unit)}:255 for pixels of 0..255, or :1 for 0..1"
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
            f"{location} is not a perturbation written by jobs/compute.py: {first_line(error)}"
        ) from error
    if sha256(v.numpy().tobytes()).hexdigest() != digest:
        raise PerturbationError(f"{location} is damaged: its values do not match its digest")
    check_radius(v, norm, radius, location)
    return Perturbation(name, v, provenance)


def metadata_of(data: bytes) -> dict[str, str]:
    """Metadata of a safetensors file in memory (the library reads metadata only from files)."""
    length = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return metadata


def check_radius(v: Tensor, norm: Norm, radius: float, location: str) -> None:
    """Raise PerturbationError if v has values that are not finite or is outside its ball (radius in pixels)."""
    if not v.isfinite().all():
        raise PerturbationError(f"{location} holds values that are not finite")
    if measure(v, norm) > radius * (1 + ROUNDING):
        raise PerturbationError(f"{location} has {norm} norm {measure(v, norm):g}, more than its radius {radius:g}")


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
            f"{location} must hold one array of shape 3×H×W or H×W×3, but holds {[a.shape for a in arrays]}"
        )
    v = unit * torch.tensor(np.moveaxis(array, places[0], 0).astype(np.float32))
    if not SMALLEST <= measure(v, "linf") <= 255:  # nan as well
        raise PerturbationError(f"{location} reaches ±{measure(v, 'linf'):g} pixels of 255; is its unit right?")
    return v


def read(location: str) -> bytes:
    """A whole file, local, s3://, gs:// or in MLflow (runs:/, models:/).

    Raises:
        PerturbationError: it cannot be read.
        TrackingError: MLflow cannot provide it.
    """
    if location.startswith(MLFLOW_SCHEMES):
        from uap_dist.tracking.mlflow_server import fetch  # imported here because only these locations need MLflow

        location = fetch(location)
    try:
        return read_file(location)
    except OSError as error:
        raise PerturbationError(f"cannot read {error}") from error
