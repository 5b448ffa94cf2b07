"""Perturbation files: those of this package, verified against their own provenance, and published ones with their unit."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor
from torch.nn.functional import interpolate

from uap_dist.data.locations import split_query
from uap_dist.errors import ConfigError, PerturbationError
from uap_dist.foreign_text import first_line
from uap_dist.method.norms import Norm, check_ball, measure
from uap_dist.method.rates import Goal
from uap_dist.models.names import Parts, canonical, name_rest, parts_of, refuse_twins
from uap_dist.models.weights_file import metadata_of
from uap_dist.perturbations.published import load_published, split_unit
from uap_dist.perturbations.reading import PERTURBATION_FILE, read_own

ENDING = r"\.(npy|mat|pth|pt|pth\.tar|bin|safetensors|zip)(?=#|$)"  # of published files
ROUNDING = 1e-5  # relative error allowed in a norm, because v is stored as float32


@dataclass(frozen=True)
class Perturbation:
    """A perturbation and its provenance.

    Attributes:
        name: in tables; unique within a job.
        v: C×H×W float32, pixels (0..255), RGB.
        provenance: stored in its file; empty for published ones.
        pool: name of the pool that it was loaded with as a member; empty if it was loaded alone.
    """

    name: str
    v: Tensor
    provenance: Mapping[str, Any] = field(default_factory=dict)
    pool: str = ""

    @property
    def goal(self) -> Goal:
        """What images shall be taken for under it; one without provenance is to fool all images."""
        return Goal.from_provenance(self.provenance)

    def is_for(self, weights_digest: str) -> bool:
        """Whether it was computed for the network with these weights, alone or with others."""
        said = self.provenance
        of_each = [said.get(f"weights_digest.{network}") for network in said.get("networks") or ()]
        return weights_digest in (said.get("weights_digest"), *of_each)

    def aimed(self, goal: Goal) -> "Perturbation":
        """With another goal."""
        return replace(self, provenance=dict(self.provenance) | goal.provenance())

    def resized(self, shape: Sequence[int]) -> Tensor:
        """V at another input size (C×H×W), bilinear and antialiased. This keeps the size of pixel values, not the ℓ2 norm."""
        if tuple(self.v.shape) == tuple(shape):
            return self.v
        return interpolate(self.v[None], size=tuple(shape[1:]), mode="bilinear", antialias=True)[0]


def load_perturbations(specifications: str | Sequence[str], taken: Collection[str] = ()) -> list[Perturbation]:
    """Load perturbations given as `[NAME=]LOCATION`, or `[NAME=]LOCATION:UNIT` for those that others have published.

    One without a name is named after its folder (files of jobs/compute.py) or its file, preceded by as much of the path as it takes
    to be unique.

    Args:
        specifications: one or several.
            LOCATION is a perturbation.safetensors or its folder, local, s3://, gs://, or runs:/RUN/PATH in MLflow. With a UNIT it is
            a file of arrays or tensors, or a folder or zip of such, see `load_published`; several are named "NAME, member". The
            UNIT of their values is 255 for pixels of 0..255, or 1 for values of 0..1.
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
    found = [each for pair in zip(names, locations, strict=True) for each in _load(*pair)]
    refuse_twins("perturbations", [each.name for each in found], taken)
    return found


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


def digest_values(v: Tensor) -> str:
    """SHA-256 (hex) of the values of perturbations, as provenance and manifests hold it."""
    return sha256(v.numpy().tobytes()).hexdigest()


def split_name(text: str) -> tuple[str, str]:
    """NAME and REST of NAME=REST; an empty name if the = belongs to a path or to a URL's options.

    Raises:
        ConfigError: there is no REST.
    """
    name, equals, rest = text.partition("=")
    name, rest = (name, rest) if equals and "/" not in name and "?" not in name else ("", text)
    if not rest.strip():
        raise ConfigError(f"no file or folder is given by {text!r}; if a variable of the shell is meant, it is not set")
    return name, rest


def _parts(location: str) -> Parts:
    """The parts of the location that may name the perturbation, the most specific one last."""
    place, unit = split_unit(location)
    *folders, last = parts_of(split_query(place)[0])
    if last == PERTURBATION_FILE and folders:
        return tuple(folders)
    return (
        *folders,
        last.removesuffix(".safetensors") if unit is None else re.sub(ENDING, "", last, flags=re.IGNORECASE),
    )


def _load(name: str, location: str) -> list[Perturbation]:
    place, unit = split_unit(location)
    if unit is not None:
        found = load_published(place, unit)
        return [Perturbation(name if len(found) == 1 else f"{name}, {own}", v) for own, v in found.items()]
    return [_own(name, *read_own(place, PERTURBATION_FILE))]


def _own(name: str, location: str, data: bytes) -> Perturbation:
    try:
        v = load(data)["perturbation"].float()
        provenance = json.loads(metadata_of(data)["provenance"])
        digest, norm, radius = (provenance[key] for key in ("perturbation_sha256", "norm", "radius"))
        check_ball(norm, radius)
    except Exception as error:
        raise PerturbationError(
            f"{location} is not a perturbation written by jobs/compute.py: {first_line(error)}; give others with the unit of their "
            "values, :255 or :1"
        ) from error
    if digest_values(v) != digest:
        raise PerturbationError(f"{location} is damaged: its values do not match its digest")
    check_radius(v, norm, radius, location)
    return Perturbation(name, v, provenance)


def check_radius(v: Tensor, norm: Norm, radius: float, location: str) -> None:
    """Raise PerturbationError if v has values that are not finite or is outside its ball (radius in pixels)."""
    if not v.isfinite().all():
        raise PerturbationError(f"{location} holds values that are not finite")
    if measure(v, norm) > radius * (1 + ROUNDING):
        raise PerturbationError(f"{location} has {norm} norm {measure(v, norm):g}, more than its radius {radius:g}")
