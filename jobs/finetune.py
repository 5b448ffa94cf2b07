"""Fine-tune a classifier on a pool of universal perturbations of it, and measure what that changes (the paper's section 3.2).

Each repetition trains on a pool, then computes a fresh pool against the network that came of it, by the same config and seeds.
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C is quiet while the imports below take their seconds
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))

import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from uap_dist.computing.pool_run import Setting, describe_data, describe_job, describe_settings
from uap_dist.data.locations import absolute, is_url, join
from uap_dist.data.patterns import expand_apart
from uap_dist.errors import ConfigError, OutputError, PerturbationError, TrackingError
from uap_dist.finetuning.config import FinetuneConfig
from uap_dist.finetuning.pipeline import REPETITIONS_FOLDER, Job, Network, group, measure, repeat
from uap_dist.finetuning.report import BEFORE, FinishedFinetuning, save_finetuning
from uap_dist.finetuning.trainer import NETWORK_FILE, check_labels, check_trainable, check_truths
from uap_dist.fleet.config import FleetConfig
from uap_dist.fleet.fleet import Fleet
from uap_dist.fleet.ray_cluster import check_shared, connect
from uap_dist.method.config import ComputeConfig
from uap_dist.method.state import State
from uap_dist.models.check import check_classifier
from uap_dist.models.loading import load_classifier, load_usable_classifier
from uap_dist.perturbations.pool import PerturbationPool
from uap_dist.tracking.checkpoint import Checkpoint, CheckpointStore, check_identity
from uap_dist.tracking.console import one_line_errors, set_up_logging
from uap_dist.tracking.mlflow_run import Tracker, log_classifier
from uap_dist.tracking.mlflow_server import CHECKPOINTS_TAG
from uap_dist.tracking.outputs import output_folder, publish
from uap_dist.tracking.process import command, raise_on_sigterm, refuse_credentials
from uap_dist.tracking.resume import Resumed, find_resumed
from uap_dist.workers.accuracy import check_accuracy
from uap_dist.workers.dataset import check_disjoint, check_limits, list_dataset, predict

console = Console(soft_wrap=True, highlight=False, markup=False)


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
    """Share of images (0..1) that may fail to decode, and of held-out ones that may be training images too, before the job fails;
    both are left out."""
    output: Path | None = None
    """Folder for the results. Default: outputs/finetune-<model>-<time>."""
    storage: str | None = None
    """Folder that every node sees, or s3://, gs:// URL, under which epochs, rounds and tuned networks are committed, in a folder
    named after the MLflow run; of the epochs the last one and the best one are kept. At a URL `results` there becomes a copy of
    the output folder. Default: checkpoints beside that."""
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
        check_limits(self.max_bad_fraction, self.num_train_images, self.num_val_images)
        if self.num_train_images is not None:
            self.finetune.check_images(self.num_train_images)
        if self.repetitions < 1:
            raise ConfigError(f"repetitions is {self.repetitions}; it must be positive")
        low, high = self.fleet.bounds
        if high not in (None, low):
            raise ConfigError(
                f"fine-tuned weights depend on the number of workers: give one number (--num-workers {high})"
            )
        if high is not None:
            self.finetune.check_workers(high)
        if self.fleet.gpus_per_worker not in (None, 0, 1):
            raise ConfigError("training workers take a GPU each or none: give --gpus-per-worker 1 or 0")

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


def main() -> None:
    """Parse, then run inside an MLflow run that ends as the job does."""
    with one_line_errors(debug="--debug" in sys.argv):
        raise_on_sigterm()
        set_up_logging(console, debug="--debug" in sys.argv)
        refuse_credentials(sys.argv[1:])
        resumed = find_resumed("finetune")
        default = Options() if resumed is None else resumed.options(Options.from_json)
        options = tyro.cli(Options, default=default, config=(tyro.conf.OmitArgPrefixes,))
        run_id = resumed.checkpoint.job.run_id if resumed else None
        with Tracker(job="finetune", experiment=options.experiment, run_name=options.name, run_id=run_id) as tracker:
            run(options, tracker, resumed)


def run(options: Options, tracker: Tracker, resumed: Resumed | None) -> None:
    """All repetitions, then every network under every perturbation. Workers end with the process."""
    for name in ("model", "pool", "train_shards", "val_shards"):
        if not getattr(options, name):
            raise ConfigError(f"no {name.replace('_', ' ')} given (--{name.replace('_', '-')})")
    output = output_folder(options.output, options.name, may_hold_files=resumed is not None)
    pool = PerturbationPool.load(options.pool)
    job = _set_up(replace(options, output=output), pool, tracker, resumed)
    networks = [Network(BEFORE, options.weights, job.provenance["weights_digest"], pool)]
    try:
        for repetition in range(1, options.repetitions + 1):
            networks.append(repeat(job, repetition, networks[-1]))
        finished = FinishedFinetuning(
            measurements=measure(job, networks),
            groups=group(job, networks),
            epochs={network.name: network.epochs for network in networks[1:]},
            provenance=job.provenance,
            mlflow_run_id=tracker.run_id,
        )
        last = job.network_folder(options.repetitions) / NETWORK_FILE
        shutil.copy(last, output / NETWORK_FILE)
        save_finetuning(output, finished)
        publish(output, job.storage)
        console.print(f"\n{finished.summary()}\n\nFiles: {output}", markup=False)
        tracker.complete(
            tags={},
            metrics=finished.metrics(),
            step=0,
            markdown=finished.summary(),
            folder=output,
            leave_out=(REPETITIONS_FOLDER,),  # in runs of their own
        )
        log_classifier(tracker, load_classifier(options.model, str(last)), job.train.shape)
    except TrackingError as error:
        raise TrackingError(
            f"{error}; what is done lies in {output}; when the server answers again: {command()} --resume {job.storage}"
        ) from error
    except OutputError as error:
        raise OutputError(
            f"{error}; what is done is committed: make room, then {command()} --resume {job.storage}"
        ) from error
    console.print(f"MLflow: {tracker.how_to_open()}", markup=False)


def _set_up(options: Options, pool: PerturbationPool, tracker: Tracker, resumed: Resumed | None) -> Job:
    """Network, pool and data are what they have to be; the job can be resumed from now on."""
    classifier = load_usable_classifier(options.model, options.weights)
    if not options.allow_transfer:
        try:
            pool.check_classifier(classifier.weights_digest)
        except PerturbationError as error:
            raise PerturbationError(f"{error}; --allow-transfer trains on it all the same") from error
    options.finetune.split(pool)
    first, *_ = (ComputeConfig.from_provenance(p.provenance, p.name) for p in pool.to_perturbations())
    check_trainable(classifier)
    if classifier.geometry.shape is not None:
        _check_size(pool, classifier.geometry.shape, options)
    train_urls, val_urls = expand_apart(options.train_shards, options.val_shards)
    store = _prepare_storage(options, tracker, resumed)
    connect()
    raise_on_sigterm()  # again: ray.init installs a handler of its own
    fleet = Fleet(
        options.model, options.weights, options.fleet, tracker.run_id, weights_digest=classifier.weights_digest
    )
    # weights depend on it, and it has to divide the batch
    options = replace(options, fleet=replace(options.fleet, num_workers=fleet.num_asked))
    console.print(f"MLflow run {tracker.run_id}; waiting for {fleet.describe_request()}")
    fleet.wait()
    if not is_url(store.location):
        check_shared(
            Path(store.location),
            fleet.need,
            "epochs and tuned networks go from node to node there: give --storage as a folder that every node sees, or as s3://, gs://",
        )
    load = {"max_bad_fraction": options.max_bad_fraction}
    train = list_dataset(fleet, train_urls, num_images=options.num_train_images, **load)
    val = list_dataset(fleet, val_urls, num_images=options.num_val_images, **load)
    val = check_disjoint(train, val, max_shared_fraction=options.max_bad_fraction)
    options.finetune.check_images(train.num_examples)
    _check_size(pool, train.shape, options)
    check_classifier(classifier, train.shape)
    check_truths(classifier, train, val)
    train, val = predict(fleet, train), predict(fleet, val)
    check_accuracy(fleet, train, options.model)
    fleet.close()  # training workers take its place
    check_labels(train)
    provenance = describe_settings(classifier, options.weights, first, options.fleet) | describe_data(train, val)
    provenance |= {
        "demo": False,
        "num_perturbations": len(pool.members),
        "num_train_images": train.num_examples,
        "num_val_images": val.num_examples,
        "pool": options.pool,
        "pool_sha256": pool.digest,
        "pool_size": len(pool.members),
        "repetitions": options.repetitions,
        **{f"finetune.{key}": value for key, value in options.to_json()["finetune"].items()},
    }
    setting = Setting(classifier, fleet, train, val, provenance, console)
    record = describe_job(setting, first, tracker.run_id, options.to_json())
    own = {key: provenance[key] for key in ("pool_sha256", "repetitions", "fleet.num_workers")}
    own |= {key: value for key, value in provenance.items() if key.startswith("finetune.")}
    record = replace(record, identity=dict(record.identity) | own, program="finetune")
    if resumed is not None:
        check_identity(resumed.checkpoint.job, record)
    else:
        store.start(Checkpoint(record, State.start(train.shape, train.num_examples, first), ()))
        tracker.set_tag(CHECKPOINTS_TAG, store.location)
        tracker.log_params(provenance)
        tracker.log_dataset(train, "training")
        tracker.log_dataset(val, "held-out")
    assert options.output is not None
    return Job(
        model=options.model,
        config=options.finetune,
        fleet=options.fleet,
        train=train,
        val=val,
        uses_gpu=fleet.need.gpus > 0,
        output=options.output,
        storage=store.location,
        record=record,
        provenance=provenance,
        tracker=tracker,
        console=console,
    )


def _prepare_storage(options: Options, tracker: Tracker, resumed: Resumed | None) -> CheckpointStore:
    """Where the job is committed; that it can be is known before any work."""
    assert options.output is not None
    below = options.storage or str(options.output.parent / "checkpoints")
    store = CheckpointStore(resumed.storage if resumed else join(absolute(below), tracker.run_id))
    store.prepare()
    return store


def _check_size(pool: PerturbationPool, shape: tuple[int, ...], options: Options) -> None:
    own = tuple(pool.perturbations.shape[1:])
    if own != shape and not options.allow_transfer:
        raise PerturbationError(f"the pool is of {_size(own)}, images are {_size(shape)}; --allow-transfer resizes it")


def _size(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


if __name__ == "__main__":
    main()
