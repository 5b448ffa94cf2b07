"""Fine-tune a classifier on a pool of universal perturbations of it, and measure what that changes (the paper's section 3.2).

Each repetition trains on a pool, then computes a fresh pool against the network that came of it, by the same config and seeds.
"""

import json
import shutil
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console

from uap_dist.checkpoint import Checkpoint, CheckpointStore, JobRecord, check_identity
from uap_dist.classifiers import Classifier, check_classifier, load_classifier
from uap_dist.compute import ComputeConfig, State
from uap_dist.dataset import Dataset, check_disjoint, load_dataset
from uap_dist.errors import ConfigError, PerturbationError, TrackingError
from uap_dist.evaluate import Measurement, measure_perturbations
from uap_dist.finetune import HELD_OUT, NETWORK_FILE, TRAINED_ON, FinetuneConfig, Task
from uap_dist.finetune_report import BEFORE, FRESH, RANDOM, FinishedFinetuning, save_finetuning
from uap_dist.fleet import Fleet, FleetConfig, connect
from uap_dist.history import RoundRecord
from uap_dist.locations import is_url, join
from uap_dist.norms import random_perturbation
from uap_dist.perturbations import Perturbation
from uap_dist.pool import POOL_FILE, PerturbationPool
from uap_dist.pool_report import POOL_FOLDER, FinishedPool, save_pool
from uap_dist.pool_run import (
    MemberPlan,
    Setting,
    compute_members,
    deliver_members,
    deliver_pool,
    describe_data,
    describe_job,
    describe_settings,
    member_folder,
    open_members,
)
from uap_dist.report import output_folder
from uap_dist.resume import Resumed, find_resumed
from uap_dist.shards import UNKNOWN_CLASS, expand_patterns
from uap_dist.terminal import one_line_errors, raise_on_sigterm, set_up_logging
from uap_dist.tracking import CHECKPOINTS_TAG, Tracker
from uap_dist.training import Training
from uap_dist.weights import digest_weights, fill, write_weights

console = Console(soft_wrap=True, highlight=False)
STAGES_FOLDER, EPOCHS_FILE = "repetitions", "epochs.jsonl"
DELIVERY_TIMEOUT_S = 20.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """Fine-tune a classifier on a pool of universal perturbations, and measure what that changes."""

    model: str = ""
    """The network, as jobs/compute.py takes it."""
    weights: str | None = None
    """File with its weights. Default: the published ones."""
    pool: str = ""
    """Folder of the pool that jobs/compute.py computed for it; local, s3://, gs://, runs:/RUN/pool or models:/NAME/VERSION."""
    train_shards: tuple[str, ...] = ()
    """WebDataset tars with labels (.cls) to learn from; fresh perturbations are computed from them as well."""
    val_shards: tuple[str, ...] = ()
    """Held-out tars with labels, that everything is measured on."""
    num_train_images: int | None = None
    """Images to learn from, the first of the shards. Default: all."""
    num_val_images: int | None = None
    """Held-out images, the first of the shards. Default: all."""
    repetitions: int = 1
    """Fine-tune, compute a fresh pool against the network that comes of it, fine-tune on that: so many times."""
    allow_transfer: bool = False
    """Take a pool of another network or of another input size (then resized)."""
    max_bad_fraction: float = 0.01
    """Share of images (0..1) that may fail to decode before the job fails."""
    output: Path | None = None
    """Folder for the results. Default: outputs/finetune-<model>-<time>."""
    storage: str | None = None
    """Folder or s3://, gs:// URL, reached by every worker, under which epochs and rounds are committed, in a folder named after
    the MLflow run; of the epochs the last one and the best one are kept. Default: checkpoints beside the output folder."""
    resume: str | None = None
    """MLflow run, or its folder of checkpoints, to go on with. All other options are then those of that run."""
    experiment: str = "uap_dist"
    """MLflow experiment; the server is taken from MLFLOW_TRACKING_URI, else mlflow.db in the working directory."""
    debug: bool = False
    """Show tracebacks of errors."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if self.repetitions < 1:
            raise ConfigError(f"repetitions is {self.repetitions}; it must be positive")

    @property
    def name(self) -> str:
        """Of the MLflow run and, with the time, of the output folder."""
        return f"finetune-{Path(self.model).name.replace(':', '-')}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the checkpoint."""
        return json.loads(json.dumps(asdict(self), default=str))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Options":
        """What `to_json` gave."""
        config = dict(values["finetune"])
        return cls(
            **dict(values)
            | {
                "train_shards": tuple(values["train_shards"]),
                "val_shards": tuple(values["val_shards"]),
                "output": Path(values["output"]),
                "finetune": FinetuneConfig(**config | {"ladder": tuple(config["ladder"])}),
                "fleet": FleetConfig(**values["fleet"]),
            }
        )


@dataclass(frozen=True)
class Network:
    """The classifier as it is after some repetitions: its weights file (None: the published ones), and its own pool."""

    name: str
    weights: str | None
    pool: PerturbationPool
    epochs: tuple[RoundRecord, ...] = ()


@dataclass(frozen=True)
class Job:
    """What all stages share.

    Attributes:
        options: with output folder and number of workers filled in.
        output: folder of the results.
        storage: where everything is committed.
        record: what a resumed job is held against.
        train, val: the examples, with the clean labels of the network as it came.
        uses_gpu: whether workers take one.
        provenance: of all that is written.
        tracker: of the job's own MLflow run.
    """

    options: Options
    output: Path
    storage: str
    record: JobRecord
    train: Dataset
    val: Dataset
    uses_gpu: bool
    provenance: Mapping[str, Any]
    tracker: Tracker

    def folder(self, repetition: int) -> Path:
        """Of a repetition's files."""
        return self.output / STAGES_FOLDER / str(repetition)


def main() -> None:
    """Parse, then run inside an MLflow run that ends as the job does."""
    with one_line_errors(debug="--debug" in sys.argv):
        raise_on_sigterm()
        set_up_logging(console, debug="--debug" in sys.argv)
        resumed = find_resumed()
        default = Options() if resumed is None else Options.from_json(resumed.checkpoint.job.options)
        options = tyro.cli(Options, default=default, config=(tyro.conf.OmitArgPrefixes,))
        run_id = resumed.checkpoint.job.run_id if resumed else None
        with Tracker(experiment=options.experiment, run_name=options.name, run_id=run_id) as tracker:
            run(options, tracker, resumed)


def run(options: Options, tracker: Tracker, resumed: Resumed | None) -> None:
    """All repetitions, then every network under every perturbation. Workers end with the process."""
    for name in ("model", "pool", "train_shards", "val_shards"):
        if not getattr(options, name):
            raise ConfigError(f"no {name.replace('_', ' ')} given (--{name.replace('_', '-')})")
    output = output_folder(options.output, options.name, may_hold_files=resumed is not None)
    pool = PerturbationPool.load(options.pool)
    job = _set_up(replace(options, output=output), pool, tracker, resumed)
    networks = [Network(BEFORE, options.weights, pool)]
    try:
        for repetition in range(1, options.repetitions + 1):
            networks.append(_repeat(job, repetition, networks[-1]))
        finished = FinishedFinetuning(
            measurements=_measure(job, networks),
            groups=_group(job, networks),
            epochs={network.name: network.epochs for network in networks[1:]},
            provenance=job.provenance,
            mlflow_run_id=tracker.run_id,
        )
        save_finetuning(output, finished)
        last = networks[-1].weights
        assert last is not None
        shutil.copy(last, output / NETWORK_FILE)
        console.print(f"\n{finished.summary()}\n\nFiles: {output}", markup=False)
        tracker.log_classifier(load_classifier(options.model, last), job.train.shape)
        tracker.complete(tags={}, metrics=finished.metrics(), step=0, markdown=finished.summary(), folder=output)
    except TrackingError as error:
        raise TrackingError(
            f"{error}; what is done lies in {output}; when the server answers again: "
            f"python jobs/finetune.py --resume {job.storage}"
        ) from error
    console.print(f"MLflow: {tracker.how_to_open()}", markup=False)


def _set_up(options: Options, pool: PerturbationPool, tracker: Tracker, resumed: Resumed | None) -> Job:
    """Network, pool and data are what they have to be; the job can be resumed from now on."""
    classifier = load_classifier(options.model, options.weights)
    if not options.allow_transfer:
        pool.check_classifier(classifier.weights_digest)
    options.finetune.split(pool)
    configs = {m["name"]: ComputeConfig.from_provenance(dict(pool.shared) | dict(m), m["name"]) for m in pool.members}
    train_urls, val_urls = expand_patterns(options.train_shards), expand_patterns(options.val_shards)
    connect()
    raise_on_sigterm()  # again: ray.init installs a handler of its own
    fleet = Fleet(options.model, options.weights, options.fleet)
    options = replace(options, fleet=replace(options.fleet, num_workers=fleet.num_workers))  # weights depend on it
    console.print(f"MLflow run {tracker.run_id}; waiting for {fleet.num_workers} workers")
    train, val = _load(options, fleet, train_urls, val_urls)
    fleet.close()  # training workers take its place
    check_classifier(classifier, train.shape)
    _check_labels(classifier, train, val)
    if tuple(pool.perturbations.shape[1:]) != train.shape and not options.allow_transfer:
        raise PerturbationError(
            f"the pool is of {_size(pool.perturbations.shape[1:])}, images are {_size(train.shape)}; --allow-transfer resizes it"
        )
    task = _task(options, options.weights, train, val, pool)
    task.check(fleet.num_workers)
    config = next(iter(configs.values()))
    provenance = describe_settings(classifier, options.weights, config, options.fleet) | describe_data(train, val)
    provenance |= {
        "demo": False,
        "num_perturbations": len(pool.members),
        "num_train_images": train.num_examples,
        "num_val_images": val.num_examples,
        "pool": options.pool,
        "pool_sha256": pool.digest,
        "pool_size": len(pool.members),
        "repetitions": options.repetitions,
        **{f"finetune.{key}": value for key, value in asdict(options.finetune).items()},
    }
    setting = Setting(classifier, fleet, train, val, provenance, console)
    record = describe_job(setting, config, tracker.run_id, options.to_json())
    decisive = (
        "pool_sha256",
        "repetitions",
        "fleet.num_workers",
        *(k for k in provenance if k.startswith("finetune.")),
    )
    record = replace(
        record, identity=dict(record.identity) | json.loads(json.dumps({k: provenance[k] for k in decisive}))
    )
    storage = _start(options, record, State.start(train, config), tracker, resumed)
    if resumed is None:
        tracker.log_params(provenance)
        tracker.log_dataset(train, "training")
        tracker.log_dataset(val, "held-out")
    assert options.output is not None
    return Job(options, options.output, storage, record, train, val, fleet.uses_gpu, provenance, tracker)


def _load(options: Options, fleet: Fleet, train_urls: list[str], val_urls: list[str]) -> tuple[Dataset, Dataset]:
    fleet.wait()
    load = {"max_bad_fraction": options.max_bad_fraction}
    train = load_dataset(fleet, train_urls, num_images=options.num_train_images, **load)
    val = load_dataset(fleet, val_urls, num_images=options.num_val_images, **load)
    check_disjoint(train, val)
    return train, val


def _check_labels(classifier: Classifier, train: Dataset, val: Dataset) -> None:
    """Refuse data without labels, and a network that does not know these."""
    with torch.no_grad():
        num_classes = classifier(torch.zeros(1, *train.shape)).shape[1]
    for what, dataset in (("training", train), ("held-out", val)):
        truths = dataset.truths
        unknown = int((truths == UNKNOWN_CLASS).sum())
        if unknown:
            raise ConfigError(
                f"{unknown} of {len(truths)} {what} images have no label; give shards with .cls (jobs/shard.py writes them)"
            )
        outside = truths[(truths < 0) | (truths >= num_classes)]
        if len(outside):
            raise ConfigError(
                f"{len(outside)} of {len(truths)} {what} images have labels outside the network's {num_classes} classes, as {outside[0]}; "
                "give a network with a head for these classes"
            )
    counts = np.bincount(train.truths)
    top1, guess = float((train.clean.labels == train.truths).mean()), float(counts.max() / train.num_examples)
    if top1 <= guess:
        raise ConfigError(
            f"the network names {top1:.3f} of the training images rightly, no more than always saying {counts.argmax()} ({guess:.3f}): "
            "its classes are not the data's labels; give weights that know them"
        )


def _task(options: Options, weights: str | None, train: Dataset, val: Dataset, pool: PerturbationPool) -> Task:
    return Task(options.model, weights, train, val, pool, options.finetune, options.fleet.threads_per_worker)


def _start(options: Options, record: JobRecord, state: State, tracker: Tracker, resumed: Resumed | None) -> str:
    """Where the job is committed; that it can be is known now, not after the first epoch."""
    if resumed is not None:
        check_identity(resumed.checkpoint.job, record)
        return resumed.storage
    assert options.output is not None
    below = options.storage or str(options.output.parent / "checkpoints")
    storage = join(below if is_url(below) else str(Path(below).resolve()), tracker.run_id)
    with CheckpointStore(storage) as store:
        store.start(Checkpoint(record, state, ()))
    tracker.set_tag(CHECKPOINTS_TAG, storage)
    return storage


def _repeat(job: Job, repetition: int, before: Network) -> Network:
    """One repetition: train on the pool of the network before, compute a fresh one against the network that comes of it."""
    name = f"repetition {repetition}"
    weights = job.folder(repetition) / NETWORK_FILE
    if not (weights.exists() and job.tracker.has_finished(f"{name}: fine-tuning")):
        console.print(f"{name}: fine-tuning")
        _fine_tune(job, repetition, before, weights)
    lines = (job.folder(repetition) / EPOCHS_FILE).read_text().splitlines()
    epochs = tuple(RoundRecord.from_json(line) for line in lines)
    folder = job.folder(repetition)
    if not ((folder / POOL_FOLDER / POOL_FILE).exists() and job.tracker.has_finished(f"{name}: fresh pool")):
        console.print(f"{name}: fresh pool")
        _compute_pool(job, repetition, before.pool, str(weights))
    return Network(name, str(weights), PerturbationPool.load(folder / POOL_FOLDER), epochs)


def _fine_tune(job: Job, repetition: int, before: Network, path: Path) -> None:
    """Train, and write the network when its MLflow run is complete."""
    options, num_workers = job.options, job.options.fleet.num_workers
    assert num_workers is not None
    task = _task(options, before.weights, job.train, job.val, before.pool)
    training = Training(
        task, name=f"{repetition}-finetune", storage=job.storage, num_workers=num_workers, uses_gpu=job.uses_gpu
    )
    records = []
    with Tracker(run_name=f"repetition {repetition}: fine-tuning", parent=job.tracker) as tracker:
        tracker.log_params({f"finetune.{key}": value for key, value in asdict(options.finetune).items()})
        for record in training.epochs():
            m = record.metrics
            console.print(
                f"epoch {record.step} of {options.finetune.epochs}: clean top-1 {m['top1/clean']:.3f}, members trained on fool "
                f"{m[f'fooling_rate/{TRAINED_ON}']:.3f}, held-out members {m[f'fooling_rate/{HELD_OUT}']:.3f}"
            )
            tracker.log_round(record)
            records.append(record)
        tracker.wait_for_delivery(DELIVERY_TIMEOUT_S)
    classifier = load_classifier(options.model, before.weights)
    fill(classifier.network, training.weights(), str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    (path.parent / EPOCHS_FILE).write_text("".join(f"{record.json}\n" for record in records))
    own = {"weights_digest": digest_weights(classifier.network), "weights_before": classifier.weights_digest}
    provenance = dict(job.provenance) | own | {"repetition": repetition, "pool_sha256": before.pool.digest}
    unfinished = path.with_suffix(".unfinished")
    write_weights(unfinished, classifier.network, provenance | {"mlflow_run_id": tracker.run_id})
    unfinished.rename(path)


def _compute_pool(job: Job, repetition: int, pool: PerturbationPool, weights: str) -> None:
    """A pool against the fine-tuned network, each member by the config and seed of the one that it follows."""
    options, folder = job.options, job.folder(repetition)
    classifier = load_classifier(options.model, weights)
    fleet = Fleet(options.model, weights, options.fleet)
    train, val = _load(options, fleet, *([s.url for s in dataset.shards] for dataset in (job.train, job.val)))
    plans = {}
    for member in pool.to_perturbations():
        config = ComputeConfig.from_provenance(member.provenance, member.name)
        path = member_folder(folder, config.seed)
        plans[path.name] = MemberPlan(config, path, f"repetition {repetition}: {path.name}", options.to_json())
    config = next(iter(plans.values())).config
    provenance = dict(job.provenance) | describe_settings(classifier, weights, config, options.fleet)
    setting = Setting(classifier, fleet, train, val, provenance, console)
    record = describe_job(setting, config, job.tracker.run_id, options.to_json())
    with ExitStack() as stack:
        tracker = stack.enter_context(Tracker(run_name=f"repetition {repetition}: fresh pool", parent=job.tracker))
        members = open_members(setting, plans, join(job.storage, f"{repetition}-pool"), record, tracker, stack)
        compute_members(setting, members)
        finished = FinishedPool.of({name: plan.folder for name, plan in plans.items()}, tracker.run_id)
        save_pool(folder, finished)
        deliver_members(setting, members)
        deliver_pool(tracker, setting, finished, folder)
    fleet.close()


def _measure(job: Job, networks: list[Network]) -> list[Measurement]:
    """Every network under all pools that it has to do with, and under noise."""
    console.print("measuring")
    options = job.options
    urls = [shard.url for shard in job.val.shards]
    fleet = Fleet(options.model, networks[0].weights, options.fleet)
    pool = networks[0].pool.shared
    noise = random_perturbation(job.val.shape, norm=pool["norm"], radius=pool["radius"], seed=options.finetune.seed)
    perturbations = [p for network in networks for p in _named(network)]
    perturbations.append(Perturbation(RANDOM, noise, {"baseline": True}))
    measurements: list[Measurement] = []
    for network in networks:
        if network.weights != networks[0].weights:
            fleet.use(options.model, network.weights)
        fleet.wait()
        val = load_dataset(fleet, urls, num_images=options.num_val_images, max_bad_fraction=options.max_bad_fraction)
        measurements += measure_perturbations(fleet, network.name, "held-out", val, perturbations)
    fleet.close()
    return measurements


def _group(job: Job, networks: list[Network]) -> dict[str, dict[str, list[str]]]:
    """Names of perturbations by network and group (see `Comparison`)."""
    groups = {}
    for before, network in zip([networks[0], *networks], networks, strict=False):
        names = [p.name for p in _named(before)]
        size = len(job.options.finetune.split(before.pool)[0].members)
        parts = {TRAINED_ON: names[:size], HELD_OUT: names[size:], FRESH: [p.name for p in _named(network)]}
        groups[network.name] = parts | {RANDOM: [RANDOM]}
    return groups


def _named(network: Network) -> list[Perturbation]:
    """The pool computed against a network, by names that say which."""
    which = "given pool" if network.name == BEFORE else network.name
    return [replace(p, name=f"{which}, {p.name}") for p in network.pool.to_perturbations()]


def _size(shape: tuple[int, ...] | torch.Size) -> str:
    return "×".join(map(str, shape))


if __name__ == "__main__":
    main()
