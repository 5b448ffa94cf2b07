"""The computations of a job: one perturbation, or the members of a pool side by side on one fleet, committed and tracked."""

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from rich.console import Console

from uap_dist.computing.concurrent import compute_together, keep_busy, keep_last
from uap_dist.computing.pool_report import MEMBERS_FOLDER, FinishedPool
from uap_dist.computing.run import Member, own_provenance
from uap_dist.data.locations import join
from uap_dist.errors import TrackingError
from uap_dist.fleet.config import FleetConfig
from uap_dist.fleet.fleet import Fleet
from uap_dist.method.config import ComputeConfig
from uap_dist.method.state import State
from uap_dist.models.classifier import Classifier
from uap_dist.models.loading import describe_weights
from uap_dist.tracking.checkpoint import Checkpoint, CheckpointStore, JobRecord, check_identity
from uap_dist.tracking.console import RoundProgress
from uap_dist.tracking.mlflow_run import Tracker
from uap_dist.tracking.mlflow_server import is_finished
from uap_dist.tracking.outputs import RESULT_FILE
from uap_dist.versions import describe_code
from uap_dist.workers.accuracy import top1
from uap_dist.workers.dataset import Dataset

DELIVERY_TIMEOUT_S, LAST_DELIVERY_TIMEOUT_S = 1.0, 20.0  # while others compute, and when nothing else is to be done


@dataclass(frozen=True)
class Setting:
    """What all perturbations of a job share.

    Attributes:
        classifier: the network, for its names.
        fleet: workers with that network.
        train, val: computed from, and held out.
        provenance: network, data, config, versions.
        console: for progress.
    """

    classifier: Classifier
    fleet: Fleet
    train: Dataset
    val: Dataset
    provenance: Mapping[str, Any]
    console: Console


@dataclass(frozen=True)
class MemberPlan:
    """A perturbation to be computed: its config, its folder, the name of its MLflow run, the options that it is resumed with."""

    config: ComputeConfig
    folder: Path
    run_name: str
    options: Mapping[str, Any]


def member_folder(output: Path, seed: int) -> Path:
    """Of the pool's member of that seed; its name is the member's."""
    return output / MEMBERS_FOLDER / f"seed-{seed}"


def open_members(
    setting: Setting, plans: Mapping[str, MemberPlan], storage: str, job: JobRecord, tracker: Tracker, stack: ExitStack
) -> dict[str, Member]:
    """Those members of a pool that are not finished, each in an MLflow run below the pool's.

    Args:
        setting: of the pool.
        plans: of its members, by name.
        storage: each is committed in a folder of its name there.
        job: of the pool; a member's differs in what is its own.
        tracker: of the pool.
        stack: ends their stores and runs.
    """
    members = {}
    for name, plan in plans.items():
        store = stack.enter_context(CheckpointStore(join(storage, name)))
        found = store.find_newest()
        if found is not None and (plan.folder / RESULT_FILE).exists() and is_finished(found.job.run_id):
            setting.console.print(f"{name} is finished")
            continue
        run_id = found.job.run_id if found else None
        own = stack.enter_context(Tracker(run_name=plan.run_name, run_id=run_id, parent=tracker))
        identity = dict(job.identity) | own_provenance(plan.config)
        own_job = replace(job, run_id=own.run_id, options=plan.options, identity=identity, part_of=job.run_id)
        if found is None:
            own.log_params(dict(setting.provenance) | own_provenance(plan.config))
            found = Checkpoint(own_job, State.start(setting.train.shape, setting.train.num_examples, plan.config), ())
        else:
            check_identity(found.job, own_job)
        members[name] = Member(plan.config, found, store=store, folder=plan.folder, tracker=own)
    return members


def compute_members(setting: Setting, members: Mapping[str, Member]) -> None:
    """All rounds that are left; each perturbation is saved, and its run completed, as soon as it is done."""
    if not members:
        return
    fleet = setting.fleet
    for name, member in members.items():
        if member.state.num_rounds:
            setting.console.print(f"{name} resuming after round {member.state.num_rounds}".strip())
    config = next(iter(members.values())).config
    rounds = {name: keep_last(member.rounds(fleet, setting.train, setting.val)) for name, member in members.items()}
    with RoundProgress(setting.console, config.max_evaluations, len(members)) as progress:
        for name, report in compute_together(rounds, at_once=keep_busy(fleet, config)):
            progress.show(report, name)
            if report.is_last:
                provenance = dict(setting.provenance) | fleet.describe()
                members[name].finish(report, fleet, setting.val, provenance, setting.classifier.class_names)
                with suppress(TrackingError):  # tried again when all is computed
                    members[name].deliver(DELIVERY_TIMEOUT_S, fleet.describe())


def deliver_members(setting: Setting, members: Mapping[str, Member]) -> None:
    """Complete the MLflow runs that the server did not take before.

    Raises:
        TrackingError: it still does not.
    """
    for member in members.values():
        if not member.is_delivered:
            member.deliver(LAST_DELIVERY_TIMEOUT_S, setting.fleet.describe())


def deliver_pool(tracker: Tracker, setting: Setting, pool: FinishedPool, folder: Path) -> None:
    """Complete the pool's own run.

    Raises:
        TrackingError: the server does not answer.
    """
    tracker.complete(
        tags=setting.fleet.describe(),
        metrics=pool.metrics(),
        step=0,
        markdown=pool.summary(),
        folder=folder,
        leave_out=(MEMBERS_FOLDER,),
    )


def describe_settings(
    classifier: Classifier, weights: str | None, config: ComputeConfig, fleet: FleetConfig
) -> dict[str, Any]:
    """Network, config and versions, for parameters and provenance."""
    return {
        "model": classifier.name,
        "weights": describe_weights(classifier.name, weights),
        "weights_digest": classifier.weights_digest,
        **{f"geometry.{key}": value for key, value in asdict(classifier.geometry).items()},
        **asdict(config),
        "radius": config.ball_radius,
        **{f"solver.{key}": value for key, value in asdict(config.solver).items()},
        **{f"fleet.{key}": value for key, value in asdict(fleet).items()},
        **describe_code(),
    }


def describe_data(train: Dataset, val: Dataset) -> dict[str, Any]:
    """Digests, sizes and, where labels are known, clean top-1."""
    rates = {name: top1(dataset, dataset.clean.labels) for name, dataset in (("train", train), ("val", val))}
    return {
        "train_digest": train.digest,
        "val_digest": val.digest,
        "train_shards": len(train.shards),
        "val_shards": len(val.shards),
        "num_bad_images": len(train.bad) + len(val.bad),
        "num_shared_images": len(val.shared),
        **{f"top1.clean_{name}": rate.rate for name, rate in rates.items() if rate is not None},
    }


def describe_job(setting: Setting, config: ComputeConfig, run_id: str, options: Mapping[str, Any]) -> JobRecord:
    """What a resumed run is held against. The clean labels stand for the network's code, which no digest of weights covers."""
    provenance = setting.provenance
    decisive = ("weights_digest", "train_digest", "val_digest", "fleet.threads_per_worker", "num_perturbations")
    shared = {key: provenance[key] for key in provenance if key in asdict(config) or key.startswith("solver.")}
    environment = {key: provenance[f"version.{key}"] for key in ("torch", "torchvision", "uap_dist")}
    return JobRecord(
        run_id=run_id,
        options=options,
        identity={key: provenance[key] for key in decisive}
        | shared
        | {"clean labels": sha256(setting.train.clean.labels.tobytes()).hexdigest()},
        environment=environment | {"git_commit": provenance["git_commit"], "machines": sorted(setting.fleet.machines)},
    )
