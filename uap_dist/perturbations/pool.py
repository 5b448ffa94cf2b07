"""Pools: perturbations of one classifier as a single file with a manifest."""

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import combinations
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

from uap_dist.data.locations import split_query
from uap_dist.errors import ConfigError, PerturbationError
from uap_dist.foreign_text import first_line
from uap_dist.method.norms import check_ball
from uap_dist.models.names import name_rest, parts_of, plain_key, refuse_twins
from uap_dist.models.weights_file import metadata_of
from uap_dist.perturbations.files import Perturbation, check_radius, digest_values, split_name
from uap_dist.perturbations.published import load_published, split_unit
from uap_dist.perturbations.reading import POOL_FILE, read_own

MANIFEST_FILE = "pool.json"
SHARED = ("model", "weights_digest", "norm", "radius")  # the provenance that all members have in common
MAX_NAME_BYTES = 200  # file systems allow 255 with the extension
DIVERSE = 0.1  # the paper's criterion (section 3.2): largest normalised inner product of two members


@dataclass(frozen=True)
class PerturbationPool:
    """Perturbations of one classifier in the same ball.

    Attributes:
        perturbations: M×C×H×W float32, pixels (0..255).
        shared: what all members have in common: model, weights_digest, norm, radius.
        members: M mappings with a member's `name` and its own provenance: seed, digests, fooling rates, versions.

    Raises:
        PerturbationError: a member's name is not unique, or cannot be the name of an exported file.
    """

    perturbations: Tensor
    shared: Mapping[str, Any]
    members: Sequence[Mapping[str, Any]]

    def __post_init__(self) -> None:
        """Validate the members' names, which exports use as file names."""
        names = [member.get("name") for member in self.members]
        for name in names:
            if not _is_plain(name):
                raise PerturbationError(
                    f"the member name {name!r} is not a plain name for a file (no path, not hidden, at most {MAX_NAME_BYTES} bytes)"
                )
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise PerturbationError(f"two members are named {twice}; names within a pool must differ")

    @classmethod
    def of(cls, perturbations: Sequence[Perturbation]) -> "PerturbationPool":
        """A pool of perturbations written by jobs/compute.py.

        Raises:
            PerturbationError: there are none, some have no provenance, or they differ in size or in what a pool shares.
        """
        if not perturbations:
            raise PerturbationError("a pool needs perturbations")
        first = perturbations[0]
        for other in perturbations:
            for key in SHARED:
                if key not in other.provenance:
                    raise PerturbationError(
                        f"{other.name} does not say its {key}; make pools of perturbations written by jobs/compute.py"
                    )
                if other.provenance[key] != first.provenance[key]:
                    raise PerturbationError(
                        f"{other.name} does not belong to the pool of {first.name}: its {key} is {other.provenance[key]}, "
                        f"not {first.provenance[key]}"
                    )
            if other.v.shape != first.v.shape:
                raise PerturbationError(
                    f"{other.name} is {tuple(other.v.shape)}, {first.name} {tuple(first.v.shape)}: members of a pool have one size"
                )
        members = [{"name": p.name} | {k: v for k, v in p.provenance.items() if k not in SHARED} for p in perturbations]
        return cls(torch.stack([p.v for p in perturbations]), {key: first.provenance[key] for key in SHARED}, members)

    @classmethod
    def load(cls, location: str | Path) -> "PerturbationPool":
        """Load a pool from its folder or file, local, s3://, gs:// or in MLflow (runs:/RUN/pool), and verify it.

        LOCATION:UNIT makes a pool of perturbations that others have published, see `load_published`. Such a pool names no network,
        and its ball is the smallest under ℓ∞.

        Raises:
            PerturbationError: it is not a pool, does not match its manifest, or has values that are not finite or outside the ball.
        """
        location, unit = split_unit(str(location))
        if unit is not None:
            return cls._of_published(load_published(location, unit), location)
        location, data = read_own(location, POOL_FILE)
        try:
            perturbations = load(data)["perturbations"]
            manifest = json.loads(metadata_of(data)["manifest"])
            shared, members, digest, said = (
                manifest[key] for key in ("shared", "members", "sha256", "manifest_sha256")
            )
            _, _, norm, radius = (shared[key] for key in SHARED)
            check_ball(norm, radius)
            pool = cls(perturbations.float(), shared, members)
        except Exception as error:
            raise PerturbationError(f"{location} is not a pool: {first_line(error)}") from error
        if pool.digest != digest or len(members) != len(perturbations):
            raise PerturbationError(f"{location} is damaged: its values do not match its digest")
        if _digest_text(shared, members) != said:
            raise PerturbationError(f"{location} is damaged: its manifest does not match its digest")
        for member, v in zip(members, perturbations, strict=True):
            check_radius(v, shared["norm"], shared["radius"], f"{location}, member {member['name']},")
        return pool

    @classmethod
    def _of_published(cls, found: Mapping[str, Tensor], location: str) -> "PerturbationPool":
        shapes = {tuple(v.shape) for v in found.values()}
        if len(shapes) > 1:
            raise PerturbationError(
                f"{location} holds perturbations of {sorted(shapes)}: members of a pool have one size"
            )
        stacked = torch.stack(list(found.values()))
        shared = {"model": None, "weights_digest": None, "norm": "linf", "radius": float(stacked.abs().max())}
        name = PurePosixPath(split_query(location)[0]).stem
        return cls(stacked, shared, [{"name": own or name} for own in found])

    def save(self, folder: Path) -> None:
        """Write pool.safetensors with the manifest in its metadata, and a readable copy of the manifest as pool.json."""
        folder.mkdir(parents=True, exist_ok=True)
        manifest = {
            "shared": self.shared,
            "members": self.members,
            "unit": "pixels 0..255, RGB, M×C×H×W float32",
            "shape": list(self.perturbations.shape),
            "sha256": self.digest,
            "manifest_sha256": _digest_text(self.shared, self.members),
            "largest_inner_product": max((product for product, _ in self.nearest_pairs()), default=0.0),
        }
        metadata = {"manifest": json.dumps(manifest, sort_keys=True)}
        (folder / POOL_FILE).write_bytes(save({"perturbations": self.perturbations.contiguous()}, metadata))
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

    def export(self, folder: Path) -> None:
        """Write each member as NAME.npy (C×H×W float32, pixels) and NAME.png (128 + v, rounded)."""
        folder.mkdir(parents=True, exist_ok=True)
        for member, v in zip(self.members, self.perturbations.numpy(), strict=True):
            array, image = (folder / f"{member['name']}.{extension}" for extension in ("npy", "png"))
            for path in (array, image):  # an existing link would be followed
                path.unlink(missing_ok=True)
            np.save(array, v)
            picture = np.clip(np.rint(128 + v.transpose(1, 2, 0)), 0, 255).astype(np.uint8)
            Image.fromarray(picture).save(image)

    def check_classifier(self, weights_digest: str) -> None:
        """Raise PerturbationError if the pool was computed for another network."""
        if self.shared["weights_digest"] is None:
            raise PerturbationError("the pool does not say for which network it was computed, as published ones do not")
        if weights_digest != self.shared["weights_digest"]:
            raise PerturbationError(
                f"the pool was computed for {self.shared['model']} with weights {self.shared['weights_digest'][:12]}…, "
                f"this network has {weights_digest[:12]}…"
            )

    def to_perturbations(self) -> list[Perturbation]:
        """The members as single perturbations."""
        return [
            Perturbation(member["name"], v, dict(self.shared) | dict(member))
            for member, v in zip(self.members, self.perturbations, strict=True)
        ]

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over the values of all members."""
        return digest_values(self.perturbations)

    def take(self, first: int, last: int) -> "PerturbationPool":
        """Members `first` to `last` − 1."""
        return replace(self, perturbations=self.perturbations[first:last], members=self.members[first:last])

    def resized(self, shape: Sequence[int]) -> Tensor:
        """The members at an input size (C×H×W), M×C×H×W; see `Perturbation.resized`."""
        return torch.stack([Perturbation("", v).resized(shape) for v in self.perturbations])

    def inner_products(self) -> Tensor:
        """Normalised inner products of the members: M×M float64, v_i · v_j / (‖v_i‖2 ‖v_j‖2).

        Source: Moosavi-Dezfooli et al., "Universal adversarial perturbations", CVPR 2017, section 3.2.
        """
        flat = self.perturbations.flatten(1).double()
        directions = flat / flat.norm(dim=1, keepdim=True)
        return directions @ directions.T

    def nearest_pairs(self) -> list[tuple[float, tuple[str, str]]]:
        """Normalised inner product and names of each pair of members, the largest first; above DIVERSE the pool is not diverse."""
        products = self.inner_products()
        names = [member["name"] for member in self.members]
        pairs = [(float(products[i, j]), (names[i], names[j])) for i, j in combinations(range(len(names)), 2)]
        return sorted(pairs, reverse=True)


def load_members(specifications: Sequence[str], taken: Collection[str]) -> list[Perturbation]:
    """All members of pools given as `[NAME=]LOCATION`, under unique names.

    Members of a pool with a NAME are named "NAME, member". Members of a pool without one keep their names in the pool; if one of
    these is used elsewhere, all members of the pool are named "pool, member", where pool is its folder, preceded by as much of the
    path as it takes to be unique.

    Args:
        specifications: of pools, see `PerturbationPool.load`.
        taken: names of other things in the same tables.

    Raises:
        PerturbationError: see `PerturbationPool.load`.
        ConfigError: a pool or a name is given twice.
    """
    given, locations = zip(*map(split_name, specifications), strict=True) if specifications else ((), ())
    pools = [PerturbationPool.load(location) for location in locations]
    digests = [pool.digest for pool in pools]
    for number, digest in enumerate(digests):
        if digest in digests[:number]:
            first = locations[digests.index(digest)]
            raise ConfigError(
                f"pools {first} and {locations[number]} hold the same perturbations; leave one of them out"
            )
    places = [split_query(split_unit(location)[0])[0] for location in locations]
    places = [re.sub(rf"(/{POOL_FILE}|\.safetensors|\.zip)$", "", place) for place in places]
    names = name_rest("pools", given, [parts_of(place) for place in places])
    keys = [[plain_key(member["name"]) for member in pool.members] for pool in pools]
    known = Counter(map(plain_key, taken))
    for has_name, own in zip(given, keys, strict=True):
        known.update(own if not has_name else ())
    found = []
    for has_name, name, pool, own in zip(given, names, pools, keys, strict=True):
        is_known = any(known[key] > 1 for key in own)
        prefix = f"{name}, " if has_name or is_known else ""
        found += [replace(p, name=f"{prefix}{p.name}", pool=name) for p in pool.to_perturbations()]
    refuse_twins("perturbations", [perturbation.name for perturbation in found], taken)
    return found


def _is_plain(name: Any) -> bool:
    """Whether it can be the name of a file in any folder, and cannot lead out of that folder."""
    return (
        isinstance(name, str)
        and name.isprintable()
        and not name.startswith(".")
        and not {"/", "\\"} & set(name)
        and 0 < len(name.encode()) <= MAX_NAME_BYTES
    )


def _digest_text(shared: Mapping[str, Any], members: Sequence[Mapping[str, Any]]) -> str:
    """SHA-256 (hex) of a manifest's contents."""
    return sha256(json.dumps([dict(shared), [dict(m) for m in members]], sort_keys=True).encode()).hexdigest()
