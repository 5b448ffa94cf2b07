"""The repetitions of a fine-tuning job. Each trains the network on a pool and then computes a fresh pool against the result.

Source: Moosavi-Dezfooli et al., "Universal adversarial perturbations", CVPR 2017, section 3.2.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor, nn

from uap_dist.computing.pool_report import POOL_FOLDER, save_pool
from uap_dist.computing.pool_run import (
    MemberPlan,
    compute_members,
    deliver_members,
    deliver_pool,
    finish_pool,
    member_folder,
    open_members,
)
from uap_dist.computing.provenance import (
    Setting,
    describe_config,
    describe_held_out,
    describe_setup,
    describe_training,
    job_record,
)
from uap_dist.data.locations import copy_folder, exists, join, make_own_folder, read_file, write_file
from uap_dist.errors import ConfigError
from uap_dist.evaluation.evaluate import Measurement, measure_perturbations
from uap_dist.finetuning.options import FinetuneConfig
from uap_dist.finetuning.ray_train import Training
from uap_dist.finetuning.report import BEFORE, FRESH, ONLINE_FOLDER, RANDOM
from uap_dist.finetuning.trainer import HELD_OUT, NETWORK_FILE, ONLINE_FILE, TRAINED_ON, TrainingTask
from uap_dist.fleet.config import FleetConfig
from uap_dist.fleet.fleet import Fleet
from uap_dist.method.config import ComputeConfig
from uap_dist.method.norms import random_of_same_norms
from uap_dist.models.loading import load_classifier
from uap_dist.models.weights import digest_weights, fill, write_weights
from uap_dist.perturbations.files import Perturbation
from uap_dist.perturbations.pool import MANIFEST_FILE, SHARED, PerturbationPool
from uap_dist.perturbations.reading import POOL_FILE
from uap_dist.rounds.record import RoundRecord
from uap_dist.tracking.checkpoint import JobRecord
from uap_dist.tracking.mlflow_run import LAST_DELIVERY_TIMEOUT_S, Tracker
from uap_dist.tracking.outputs import writes_files
from uap_dist.workers.behind import known
from uap_dist.workers.dataset import Dataset, reload_dataset

REPETITIONS_FOLDER, EPOCHS_FILE = "repetitions", "epochs.jsonl"


@dataclass(frozen=True)
class Network:
    """The network before fine-tuning or after one of the repetitions.

    Attributes:
        name: of this state of the network, for tables.
        weights: weights file; None for the weights that the model comes with.
        weights_digest: digest of the weights.
        pool: perturbations computed against it; before fine-tuning, the given pool.
        epochs: records of the training that led to it.
        online: perturbations that moved with it in that training; None without --online.
    """

    name: str
    weights: str | None
    weights_digest: str
    pool: PerturbationPool
    epochs: Sequence[RoundRecord] = ()
    online: PerturbationPool | None = None

    @property
    def perturbations(self) -> list[Perturbation]:
        """Members of the pool, with names that say against which network they were computed."""
        return self._name(self.pool)

    @property
    def online_perturbations(self) -> list[Perturbation]:
        """Those of --online, with such names."""
        return [] if self.online is None else self._name(self.online)

    def _name(self, pool: PerturbationPool) -> list[Perturbation]:
        which = "given pool" if self.name == BEFORE else self.name
        return [replace(p, name=f"{which}, {p.name}") for p in pool.to_perturbations()]


@dataclass(frozen=True)
class Job:
    """The settings that all repetitions share.

    Attributes:
        model: name of the network.
        config: of the training.
        fleet: settings of the workers, with their number.
        train, val: training and held-out images, with clean predictions of the network before fine-tuning.
        uses_gpu: whether each worker uses a GPU.
        output: folder of the results.
        storage: folder or URL of checkpoints and of the networks that workers load; every node must reach it.
        record: identity of the job, with which a resumed job must agree.
        provenance: stored with every result.
        tracker: of the job's MLflow run.
        console: shows progress.
        commit_every_s: seconds between two commits of a fresh perturbation.
    """

    model: str
    config: FinetuneConfig
    fleet: FleetConfig
    train: Dataset
    val: Dataset
    uses_gpu: bool
    output: Path
    storage: str
    record: JobRecord
    provenance: Mapping[str, Any]
    tracker: Tracker
    console: Console
    commit_every_s: float

    def network_storage(self, repetition: int) -> str:
        """Where workers on all nodes read the network that a repetition has trained."""
        return join(self.storage, f"{repetition}-network")

    def network_folder(self, repetition: int) -> Path:
        """Folder of the user's copy of that network."""
        return self.output / REPETITIONS_FOLDER / str(repetition) / "network"

    def pool_folder(self, repetition: int) -> Path:
        """Folder of the fresh pool against that network."""
        return self.output / REPETITIONS_FOLDER / str(repetition) / "fresh-pool"


def repeat(job: Job, repetition: int, before: Network) -> Network:
    """Train the network on its pool, then compute a fresh pool against the trained network. Parts that are already done are skipped.

    Raises:
        TrackingError: MLflow does not accept the results; resume the job later.
    """
    name, folder = f"repetition {repetition}", job.network_folder(repetition)
    weights, pool = join(job.network_storage(repetition), NETWORK_FILE), job.pool_folder(repetition) / POOL_FOLDER
    with _storage():
        is_stored = exists(weights)
    if not (is_stored and job.tracker.has_finished(f"{name}: fine-tuning")):
        size, num_workers = job.config.batch_size, job.fleet.bounds[0]
        job.console.print(f"{name}: fine-tuning, {size} images a step, {size // num_workers} of them on each worker")
        _fine_tune(job, repetition, before)
    _restore(job, repetition)
    if not ((pool / POOL_FILE).exists() and job.tracker.has_finished(f"{name}: fresh pool")):
        job.console.print(f"{name}: fresh pool")
        _compute_pool(job, repetition, before.pool, weights)
    epochs = [RoundRecord.from_json(line) for line in (folder / EPOCHS_FILE).read_text(encoding="utf-8").splitlines()]
    digest = load_classifier(job.model, weights).weights_digest
    online = PerturbationPool.load(folder / ONLINE_FOLDER) if job.config.online else None
    return Network(name, weights, digest, PerturbationPool.load(pool), epochs, online)


def measure(job: Job, networks: Sequence[Network]) -> list[Measurement]:
    """Measure every network on the held-out images, under the perturbations of all networks and under noise of the same norm."""
    job.console.print("measuring")
    shared = networks[0].pool.shared
    first = networks[0].perturbations[0].resized(job.val.shape)
    noise = random_of_same_norms(first, seed=job.config.seed)[shared["norm"]]
    perturbations = [p for network in networks for p in (*network.online_perturbations, *network.perturbations)]
    perturbations.append(Perturbation(RANDOM, noise, {"baseline": True}))
    measurements: list[Measurement] = []
    digest = networks[0].weights_digest
    fleet = Fleet(job.model, networks[0].weights, job.fleet, job.tracker.run_id, weights_digest=digest)
    for number, network in enumerate(networks):
        if number:
            fleet.use(job.model, network.weights, weights_digest=network.weights_digest)
        fleet.wait()
        val = reload_dataset(fleet, job.val)
        measurements += measure_perturbations(fleet, network.name, "held-out", val, perturbations)
    fleet.close()
    return measurements


def group(job: Job, networks: Sequence[Network]) -> dict[str, dict[str, list[str]]]:
    """Names of the perturbations of each network, by group (see `Comparison`)."""
    groups = {}
    for before, after, network in zip([networks[0], *networks], [networks[1], *networks[1:]], networks, strict=False):
        names = [perturbation.name for perturbation in before.perturbations]
        size = len(job.config.split(before.pool)[0].members)
        trained_on = names[:size] + [perturbation.name for perturbation in after.online_perturbations]
        is_own = network.name != BEFORE or job.provenance["weights_digest"] == network.pool.shared["weights_digest"]
        fresh = [perturbation.name for perturbation in network.perturbations] if is_own else []
        groups[network.name] = {TRAINED_ON: trained_on, HELD_OUT: names[size:], FRESH: fresh, RANDOM: [RANDOM]}
    return groups


def count_evaluations(job: Job, networks: Sequence[Network]) -> dict[str, int]:
    """Network evaluations that led to each network: of all training so far, and of computing the members that were trained on.

    The clean labels of the training images count once for a pool.
    """
    counts = {networks[0].name: 0}
    for before, network in pairwise(networks):
        own = int(network.epochs[-1].metrics["total/evaluations"])
        members = job.config.split(before.pool)[0].members
        own += sum(member["num_evaluations"] - member["num_train_images"] for member in members)
        own += max((member["num_train_images"] for member in members), default=0)
        counts[network.name] = counts[before.name] + own
    return counts


def _fine_tune(job: Job, repetition: int, before: Network) -> None:
    """Train, and save the network and its epochs in the output folder and in a child of the job's MLflow run."""
    num_workers, _ = job.fleet.bounds
    task = TrainingTask(
        model=job.model,
        weights=before.weights,
        weights_digest=before.weights_digest,
        train=job.train,
        val=job.val,
        pool=before.pool,
        config=job.config,
        fleet=job.fleet,
    )
    name = f"{repetition}-finetune"
    training = Training(task, name=name, storage=job.storage, num_workers=num_workers, uses_gpu=job.uses_gpu)
    records = []
    with Tracker(run_name=f"repetition {repetition}: fine-tuning", parent=job.tracker) as tracker:
        tracker.log_params({f"finetune.{key}": value for key, value in asdict(job.config).items()})
        for record in training.epochs():
            job.console.print(f"epoch {record.step} of {job.config.epochs}: {_describe(record)}")
            tracker.log_round(record)
            records.append(record)
        _save_network(job, repetition, before, training, records, tracker.run_id)
        tracker.wait_for_delivery(LAST_DELIVERY_TIMEOUT_S)
        text = f"Fine-tuned from: {before.name}.\n\nFirst: {_describe(records[0])}.\n\nLast: {_describe(records[-1])}."
        tracker.complete(tags={}, metrics={}, step=0, markdown=text, folder=job.network_folder(repetition))


def _describe(record: RoundRecord) -> str:
    m = record.metrics
    return (
        f"clean top-1 {m['top1/clean']:.3f}, perturbations trained on fool {m[f'fooling_rate/{TRAINED_ON}']:.3f}, "
        f"held-out ones {m[f'fooling_rate/{HELD_OUT}']:.3f}"
    )


def _save_network(
    job: Job, repetition: int, before: Network, training: Training, records: Sequence[RoundRecord], mlflow_run_id: str
) -> None:
    """Write what was trained, with its provenance, and the epochs to the output folder and, for workers, to the storage."""
    classifier = load_classifier(job.model, before.weights)
    fill(classifier.network, training.tensors(NETWORK_FILE), f"repetition {repetition}")
    of_another = [key for key in job.provenance if key.startswith("top1.")]  # of the network before fine-tuning
    provenance = {key: value for key, value in job.provenance.items() if key not in of_another} | {
        "repetition": repetition,
        "pool_sha256": before.pool.digest,
        "weights_digest_before": classifier.weights_digest,
        "weights_digest": digest_weights(classifier.network),
        "mlflow_run_id": mlflow_run_id,
    }
    folder = job.network_folder(repetition)
    online = _online_pool(training.tensors(ONLINE_FILE)["shown"], provenance) if job.config.online else None
    _write_network(folder, classifier.network, provenance, records, online)
    with _storage():
        copy_folder(folder, job.network_storage(repetition), last=NETWORK_FILE)


def _online_pool(v: Tensor, provenance: Mapping[str, Any]) -> PerturbationPool:
    """The perturbations of --online (M×C×H×W float32) as a pool. They were not computed by the config of the given pool."""
    foreign = {field.name for field in fields(ComputeConfig)} - set(SHARED)
    own = {key: value for key, value in provenance.items() if key not in foreign and not key.startswith("solver.")}
    return PerturbationPool.of([Perturbation(f"online-{number}", each, own) for number, each in enumerate(v, 1)])


@writes_files
def _write_network(
    folder: Path,
    network: nn.Module,
    provenance: Mapping[str, Any],
    records: Sequence[RoundRecord],
    online: PerturbationPool | None,
) -> None:
    """Write the network last, atomically."""
    (folder / EPOCHS_FILE).write_text("".join(f"{record.json}\n" for record in records), encoding="utf-8")
    if online is not None:
        online.save(folder / ONLINE_FOLDER)
    unfinished = folder / f".{NETWORK_FILE}"
    write_weights(unfinished, network, provenance)
    unfinished.rename(folder / NETWORK_FILE)


def _restore(job: Job, repetition: int) -> None:
    """Restore the user's copy of a network, which may be missing if the job was resumed elsewhere or with another output folder."""
    folder = job.network_folder(repetition)
    online = [f"{ONLINE_FOLDER}/{name}" for name in (POOL_FILE, MANIFEST_FILE)] if job.config.online else []
    for name in (*online, EPOCHS_FILE, NETWORK_FILE):
        if not (folder / name).exists():
            make_own_folder((folder / name).parent)
            with _storage():
                write_file(str(folder / name), read_file(join(job.network_storage(repetition), name)))


@contextmanager
def _storage() -> Iterator[None]:
    """Turn errors of the storage into a ConfigError that says how to continue."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"cannot write or read the tuned network, {error} (--storage); fix the storage, then continue with --resume"
        ) from error


def _compute_pool(job: Job, repetition: int, pool: PerturbationPool, weights: str) -> None:
    """Compute a pool against the fine-tuned network, each member with the config and seed of the member of the old pool."""
    folder, classifier = job.pool_folder(repetition), load_classifier(job.model, weights)
    plans = {}
    for member in pool.to_perturbations():
        config = ComputeConfig.from_provenance(member.provenance, member.name)
        path = member_folder(folder, config.seed)
        plans[path.name] = MemberPlan(config, path, f"repetition {repetition}: {path.name}", job.record.options)
    config = next(iter(plans.values())).config
    fleet = Fleet(job.model, weights, job.fleet, job.tracker.run_id, weights_digest=classifier.weights_digest)
    fleet.wait()
    train, val = reload_dataset(fleet, job.train), reload_dataset(fleet, job.val)
    provenance = dict(job.provenance) | describe_setup(classifier, weights, job.fleet) | describe_config(config)
    provenance |= describe_training(train) | describe_held_out(train, val)
    setting = Setting(classifier, fleet, train, known(val), provenance, job.console, job.commit_every_s)
    record = job_record(job.record.program, setting, run_id=job.tracker.run_id, options=job.record.options)
    with ExitStack() as stack:
        tracker = stack.enter_context(Tracker(run_name=f"repetition {repetition}: fresh pool", parent=job.tracker))
        members = open_members(setting, plans, join(job.storage, f"{repetition}-pool"), record, tracker, stack)
        compute_members(setting, members)
        finished = finish_pool(setting, plans, tracker)
        save_pool(folder, finished)
        deliver_members(setting, members)
        deliver_pool(tracker, setting, finished, folder)
    fleet.close()
