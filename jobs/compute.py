"""Compute one universal adversarial perturbation for a classifier from WebDataset shards, on Ray, logged to MLflow.

Without arguments: EfficientNet-Lite0 on the photographs that packages of the `demo` extra carry.
"""

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from uap_dist.checkpoint import Checkpoint, CheckpointStore, JobRecord, check_identity
from uap_dist.classifiers import Classifier, load_classifier
from uap_dist.compute import ComputeConfig, State, compute
from uap_dist.dataset import Dataset, Workers, check_disjoint, classify, fooling_rate, load_dataset
from uap_dist.demo import write_demo_shards
from uap_dist.errors import ConfigError
from uap_dist.fleet import Fleet, FleetConfig, connect
from uap_dist.fooling import Rate
from uap_dist.history import RoundRecord
from uap_dist.locations import join
from uap_dist.norms import random_perturbation
from uap_dist.provenance import git_commit, versions
from uap_dist.report import FinishedRun, output_folder, save_run
from uap_dist.shards import expand_patterns
from uap_dist.terminal import RoundProgress, one_line_errors, raise_on_sigterm, set_up_logging
from uap_dist.tracking import CHECKPOINTS_TAG, Tracker, checkpoints_of

console = Console(soft_wrap=True, highlight=False)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compute one universal adversarial perturbation.

    Pixels are RGB values 0..255 at the classifier's input size; every norm, radius and step is in these units.
    """

    model: str = "efficientnet_lite0"
    """torchvision/NAME, timm/NAME, efficientnet_lite0|1|2, or your own path/to/file.py:factory or package.module:factory."""
    weights: str | None = None
    """File with its weights (.safetensors, or a .pth of tensors). Default: the published ones."""
    train_shards: tuple[str, ...] = ()
    """WebDataset tars to compute from: paths or s3://, gs:// URLs; {0000..0009}, * in file names and `::` work.
    Default: photographs of the packages of the demo extra."""
    val_shards: tuple[str, ...] = ()
    """Held-out tars that the fooling rate is reported on; none of them may be among the training ones."""
    num_train_images: int | None = None
    """Images to compute from, the first of the shards. Default: all."""
    num_val_images: int | None = None
    """Held-out images, the first of the shards. Default: all."""
    max_bad_fraction: float = 0.01
    """Share of images (0..1) that may fail to decode before the job fails."""
    output: Path | None = None
    """Folder for the results. Default: outputs/<model>-<norm>-seed<seed>-<time>."""
    storage: str | None = None
    """Folder or s3://, gs:// URL under which each round is committed, in a folder named after the MLflow run; the last
    three are kept. Default: checkpoints beside the output folder."""
    resume: str | None = None
    """MLflow run, or its folder of checkpoints, to go on with after its last committed round. All other options are
    then those of that run; of those given anew, only such that do not change the result are accepted."""
    experiment: str = "uap_dist"
    """MLflow experiment; the server is taken from MLFLOW_TRACKING_URI, else mlflow.db in the working directory."""
    debug: bool = False
    """Show tracebacks of errors."""
    compute: ComputeConfig = field(default_factory=ComputeConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)

    @property
    def name(self) -> str:
        """Of the MLflow run and, with the time, of the output folder."""
        model = "-".join(Path(self.model).parts[-2:]) if ".py:" not in self.model else Path(self.model).name
        return f"{model.replace(':', '-')}-{self.compute.norm}-seed{self.compute.seed}"

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the checkpoint."""
        return json.loads(json.dumps(asdict(self), default=str))

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Options":
        """What `to_json` gave."""
        return cls(
            **dict(values)
            | {
                "train_shards": tuple(values["train_shards"]),
                "val_shards": tuple(values["val_shards"]),
                "output": Path(values["output"]),
                "compute": ComputeConfig(**values["compute"]),
                "fleet": FleetConfig(**values["fleet"]),
            }
        )


def main() -> None:
    """Parse, then run inside an MLflow run that ends as the job does."""
    with one_line_errors(debug="--debug" in sys.argv):
        raise_on_sigterm()
        set_up_logging(console, debug="--debug" in sys.argv)
        checkpoint = _checkpoint_to_resume()
        options, refusal = _parse(checkpoint)
        run_id = checkpoint.job.run_id if checkpoint else None
        name = "refused" if refusal else options.name
        with Tracker(experiment=options.experiment, run_name=name, run_id=run_id) as tracker:
            if refusal is not None:
                raise refusal
            run(options, tracker, checkpoint)


def run(options: Options, tracker: Tracker, checkpoint: Checkpoint | None) -> None:
    """The whole job: connect, load, compute, save, say so. Its workers end with its process."""
    config = options.compute
    output = output_folder(options.output, options.name, may_hold_files=options.resume is not None)
    classifier = load_classifier(options.model, options.weights)
    settings = _describe_settings(options, classifier)
    if checkpoint is None:
        tracker.log_params(settings)
    train_urls, val_urls = _shards(options, output)
    connect()
    raise_on_sigterm()  # again: ray.init installs a handler of its own
    fleet = Fleet(options.model, options.weights, options.fleet)
    console.print(f"MLflow run {tracker.run_id}; waiting for {fleet.num_workers} workers")
    fleet.wait()
    console.print(f"decoding {len(train_urls)} training and {len(val_urls)} held-out shards")
    load = {"max_bad_fraction": options.max_bad_fraction}
    train = load_dataset(fleet, train_urls, num_images=options.num_train_images, **load)
    val = load_dataset(fleet, val_urls, num_images=options.num_val_images, **load)
    check_disjoint(train, val)
    provenance = settings | _describe_data(train, val)
    storage = join(options.storage or str(output.parent / "checkpoints"), tracker.run_id)
    job = _describe_job(replace(options, output=output), tracker.run_id, provenance, train, fleet)
    if checkpoint is None:
        tracker.log_params(_describe_data(train, val))
        tracker.log_dataset(train, "training")
        tracker.log_dataset(val, "held-out")
        checkpoint = Checkpoint(job, State.start(train), ())
    else:
        check_identity(checkpoint.job, job)
        console.print(f"resuming after round {checkpoint.state.num_rounds}")
    history = list(checkpoint.history)
    for record in history:  # what the run has already is not sent again
        tracker.log_round(record)
    console.print(
        f"{options.model}, {config.norm} {config.ball_radius:g}, {train.num_examples} training and {val.num_examples} held-out images"
    )
    with CheckpointStore(storage) as store, RoundProgress(console, config.max_evaluations) as progress:
        store.start(Checkpoint(job, checkpoint.state, history))
        tracker.set_tag(CHECKPOINTS_TAG, storage)
        for report in compute(fleet, train, val, config, checkpoint.state):
            history.append(RoundRecord.of(report))
            if not report.is_last:  # the last one is committed as the result
                store.commit(Checkpoint(job, report.state, tuple(history)))
            tracker.log_round(history[-1])
            progress.show(report)
    random_rate = _random_rate(fleet, val, config)
    finished = FinishedRun(report, history, random_rate, val, provenance | _describe_fleet(fleet), tracker.run_id)
    save_run(output, finished, fleet, classifier.class_names)
    tracker.wait_for_delivery(
        f"the perturbation is complete in {output}; when the server answers again: python jobs/compute.py --resume {storage}"
    )
    tracker.log_params(_describe_fleet(fleet))
    tracker.log_rate("random", random_rate, step=report.state.num_rounds)
    tracker.describe(finished.summary())
    tracker.log_folder(output)
    console.print(f"\n{finished.summary()}\n\nFiles: {output}\nMLflow: {tracker.how_to_open()}", markup=False)


def _checkpoint_to_resume() -> Checkpoint | None:
    """The newest checkpoint of the run that --resume names; its options are needed before the others are parsed."""
    for number, word in enumerate(sys.argv[1:], start=1):
        option, _, value = word.partition("=")
        if option == "--resume":
            target = value or "".join(sys.argv[number + 1 : number + 2])
            return CheckpointStore(checkpoints_of(target) if re.fullmatch("[0-9a-f]{32}", target) else target).newest()
    return None


def _parse(checkpoint: Checkpoint | None) -> tuple[Options, ConfigError | None]:
    """Options; those that cannot be are reported inside an MLflow run, as whoever watches scheduled jobs expects."""
    try:
        default = Options() if checkpoint is None else Options.from_json(checkpoint.job.options)
        return tyro.cli(Options, default=default, config=(tyro.conf.OmitArgPrefixes,)), None
    except ConfigError as error:
        words = sys.argv
        experiment = words[words.index("--experiment") + 1] if "--experiment" in words[:-1] else Options.experiment
        return Options(experiment=experiment), error


def _shards(options: Options, output: Path) -> tuple[list[str], list[str]]:
    if not options.train_shards and not options.val_shards:
        train, val, num_train, num_val = write_demo_shards(output.parent / "demo-shards")
        console.print(
            f"no shards given: crops of {num_train} training and {num_val} held-out photographs, a demonstration only"
        )
        return train, val
    if not options.train_shards or not options.val_shards:
        raise ConfigError("give both --train-shards and --val-shards, or neither for the demonstration")
    train, val = expand_patterns(options.train_shards), expand_patterns(options.val_shards)
    both = set(train) & set(val)
    if both:
        raise ConfigError(f"shard {min(both)} is among both the training and the held-out ones")
    return train, val


def _random_rate(workers: Workers, val: Dataset, config: ComputeConfig) -> Rate:
    baseline = random_perturbation(val.shape, norm=config.norm, radius=config.ball_radius, seed=config.seed)
    return fooling_rate(val, classify(workers, val, baseline.numpy()))


def _describe_settings(options: Options, classifier: Classifier) -> dict[str, Any]:
    return {
        "model": options.model,
        "weights": options.weights or "published",
        "weights_digest": classifier.weights_digest,
        "demo": not options.train_shards,
        **asdict(options.compute),
        "radius": options.compute.ball_radius,
        **{f"solver.{key}": value for key, value in asdict(options.compute.solver).items()},
        **{f"fleet.{key}": value for key, value in asdict(options.fleet).items()},
        "git_commit": git_commit(),
        **{f"version.{key}": value for key, value in versions().items()},
    }


def _describe_job(options: Options, run_id: str, provenance: dict[str, Any], train: Dataset, fleet: Fleet) -> JobRecord:
    """What a resumed run is held against. The clean labels stand for the network's code, which no digest of weights covers."""
    decisive = ("weights_digest", "train_digest", "val_digest", "fleet.threads_per_worker")
    config = {key: provenance[key] for key in provenance if key in asdict(options.compute) or key.startswith("solver.")}
    environment = {key: provenance[f"version.{key}"] for key in ("torch", "torchvision", "uap_dist")}
    return JobRecord(
        run_id=run_id,
        options=options.to_json(),
        identity={key: provenance[key] for key in decisive}
        | config
        | {"clean labels": sha256(train.clean.labels.tobytes()).hexdigest()},
        environment=environment | {"git_commit": provenance["git_commit"], "machines": sorted(fleet.machines)},
    )


def _describe_fleet(fleet: Fleet) -> dict[str, Any]:
    """After the run, which may have taken in new workers."""
    return {
        "machines": "; ".join(sorted(fleet.machines)),
        "num_workers_at_end": fleet.num_workers,
        "num_workers_lost": fleet.num_lost,
        "num_stragglers": fleet.num_stragglers,
    }


def _describe_data(train: Dataset, val: Dataset) -> dict[str, Any]:
    return {
        "train_digest": train.digest,
        "val_digest": val.digest,
        "train_shards": len(train.shards),
        "val_shards": len(val.shards),
        "num_bad_images": len(train.bad) + len(val.bad),
    }


if __name__ == "__main__":
    main()
