"""Where a perturbation comes from: one dictionary, whose views are MLflow's parameters, the file's metadata and a run's identity."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from hashlib import sha256
from typing import Any

from rich.console import Console

from uap_dist.fleet.config import FleetConfig
from uap_dist.fleet.fleet import Fleet
from uap_dist.foreign_text import redact
from uap_dist.method.config import ComputeConfig
from uap_dist.models.classes import label_name
from uap_dist.models.classifier import Classifier
from uap_dist.models.loading import describe_weights
from uap_dist.tracking.checkpoint import JobRecord, check_identity
from uap_dist.versions import DECISIVE_VERSIONS, describe_code
from uap_dist.workers.accuracy import name_labels, top1
from uap_dist.workers.dataset import Dataset

DECISIVE = (
    "networks",
    "weights_digest",
    "train_digest",
    "val_digest",
    "fleet.threads_per_worker",
    "fleet.precision",
    "num_perturbations",
)
HELD_OUT_KEYS = (
    "val_digest",
    "val_shards",
    "num_bad_images",
    "num_shared_images",
    "top1.clean_val",
)  # see `describe_held_out`
GOAL = ("target", "only_classes", "spare_classes")  # labels in a config, which may be names at first


@dataclass(frozen=True)
class Setting:
    """What all perturbations of a job share.

    Attributes:
        classifier: the network, for its names.
        fleet: workers with that network.
        train: images to compute from.
        held_out: the others, which may still be decoded.
        provenance: network, data, config, versions; perhaps without the held-out images.
        console: for progress.
        commit_every_s: seconds between two commits of a perturbation.
    """

    classifier: Classifier
    fleet: Fleet
    train: Dataset
    held_out: Future[Dataset]
    provenance: Mapping[str, Any]
    console: Console
    commit_every_s: float

    @cached_property
    def class_names(self) -> Sequence[str]:
        """Names of the network's labels, see `name_labels`."""
        return name_labels(self.classifier, self.train)[0]


def describe_setup(classifier: Classifier, weights: str | None, fleet: FleetConfig) -> dict[str, Any]:
    """Network, fleet and versions."""
    return {
        "model": classifier.name,
        "weights": redact(describe_weights(classifier.given, weights)),
        "weights_digest": classifier.weights_digest,
        **_describe_networks(classifier),
        **{f"geometry.{key}": value for key, value in asdict(classifier.geometry).items()},
        **{f"fleet.{key}": value for key, value in asdict(fleet).items()},
        **describe_code(),
    }


def _describe_networks(classifier: Classifier) -> dict[str, Any]:
    """The names of several networks, and what each was loaded from."""
    if not classifier.networks:
        return {}
    found: dict[str, Any] = {"networks": list(classifier.networks)}
    for name, member in zip(classifier.networks, classifier.members, strict=True):
        found |= {f"model.{name}": member.name, f"weights_digest.{name}": member.weights_digest}
    return found


def describe_config(config: ComputeConfig) -> dict[str, Any]:
    """What decides the perturbation beside network and data, defaults filled in; without target and classes where these are names."""
    solver = {f"solver.{k}": value for k, value in asdict(config.without_goal().solver).items() if k != "goal"}
    given = {k: list(value) if isinstance(value, tuple) else value for k, value in asdict(config).items()}
    is_named = any(isinstance(each, str) for each in (config.target, *config.only_classes, *config.spare_classes))
    known = {key: value for key, value in given.items() if not (is_named and key in GOAL)}
    return known | {"radius": config.ball_radius} | solver


def describe_goal(config: ComputeConfig, class_names: Sequence[str], train: Dataset) -> dict[str, Any]:
    """What a computation makes of the labels of images: target and classes by number, the target by name, and the weight that is used."""
    described = {key: value for key, value in describe_config(config).items() if key in GOAL}
    if config.goal.target is not None:
        described["target_name"] = label_name(config.goal.target, class_names)
    if config.goal.has_classes:
        described["steps.spare_weight"] = config.balanced(train.clean.labels).spare_weight
    return described


def describe_training(train: Dataset) -> dict[str, Any]:
    """Digest, size and, where labels are known, clean top-1 of the training images."""
    return {"train_digest": train.digest, "train_shards": len(train.shards)} | _describe_top1("train", train)


def describe_held_out(train: Dataset, val: Dataset) -> dict[str, Any]:
    """What `describe_training` does not say of the data."""
    return {
        "val_digest": val.digest,
        "val_shards": len(val.shards),
        "num_bad_images": len(train.bad) + len(val.bad),
        "num_shared_images": len(val.shared),
    } | _describe_top1("val", val)


def _describe_top1(name: str, dataset: Dataset) -> dict[str, float]:
    rates = {network: top1(dataset, clean.labels) for network, clean in dataset.clean.each()}
    return {
        f"top1.clean_{name}{f'.{network}' if network else ''}": rate.rate
        for network, rate in rates.items()
        if rate is not None
    }


def describe_member(config: ComputeConfig) -> dict[str, Any]:
    """What the provenance of a member of a pool has instead of the pool's."""
    return describe_config(config) | {"num_perturbations": 1}


def identity(provenance: Mapping[str, Any], train: Dataset) -> dict[str, Any]:
    """What decides the bits. The clean labels stand for the network's code, which no digest of weights covers."""
    config = {field.name for field in fields(ComputeConfig)}
    names = [key for key in provenance if key in DECISIVE or key in config or key.startswith("solver.")]
    labels = sha256(train.clean.labels.tobytes()).hexdigest()
    return {key: provenance[key] for key in names} | {"clean labels": labels}


def with_held_out(job: JobRecord, val: Dataset) -> JobRecord:
    """What a resumed run is compared with, held-out images included.

    Raises:
        ResumeError: the run has measured other ones.
    """
    known = replace(job, identity=dict(job.identity) | {"val_digest": val.digest})
    if "val_digest" in job.identity:
        check_identity(job, known)
    return known


def check_resumed(saved: JobRecord, now: JobRecord) -> None:
    """Compare as `check_identity` does; held-out images that are not there yet are left to `with_held_out`."""
    pending = {"val_digest"} - set(now.identity)
    identity = {key: value for key, value in saved.identity.items() if key not in pending}
    check_identity(replace(saved, identity=identity), now)


def environment(provenance: Mapping[str, Any], machines: set[str]) -> dict[str, Any]:
    """What the bits may depend on beside it."""
    versions = {name: provenance[f"version.{name}"] for name in DECISIVE_VERSIONS}
    return versions | {"git_commit": provenance["git_commit"], "machines": sorted(machines)}


def job_record(
    program: str,
    setting: Setting,
    *,
    run_id: str,
    options: Mapping[str, Any],
    decisive: Mapping[str, Any] | None = None,
) -> JobRecord:
    """What a resumed run is compared with.

    Args:
        program: kind of job.
        setting: of the job.
        run_id: of MLflow.
        options: of the job, as plain values.
        decisive: what decides the bits of this kind of job beside what decides a perturbation's.
    """
    return JobRecord(
        run_id=run_id,
        options=options,
        identity=identity(setting.provenance, setting.train) | dict(decisive or {}),
        environment=environment(setting.provenance, setting.fleet.machines),
        program=program,
    )
