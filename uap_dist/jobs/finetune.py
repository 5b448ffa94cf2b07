"""Fine-tune a classifier on universal perturbations of it, and measure what that changes (the paper's section 3.2).

Each repetition trains on a pool, or on perturbations that move (--online), then computes a fresh pool against the fine-tuned network.
"""

import shutil
from dataclasses import replace
from pathlib import Path

from uap_dist.computing.provenance import Setting, job_record
from uap_dist.data.patterns import expand_apart
from uap_dist.finetuning.checks import check_network, check_pool, check_pool_size, check_storage, describe_finetuning
from uap_dist.finetuning.network import check_labels
from uap_dist.finetuning.options import FinetuneOptions
from uap_dist.finetuning.pipeline import REPETITIONS_FOLDER, Job, Network, count_evaluations, group, measure, repeat
from uap_dist.finetuning.report import BEFORE, FinishedFinetuning, save_finetuning
from uap_dist.finetuning.trainer import NETWORK_FILE
from uap_dist.job_options import to_json
from uap_dist.jobs.common import console, run_job, start_fleet, storage_of
from uap_dist.jobs.images import classify_images, list_images
from uap_dist.method.state import State
from uap_dist.models.loading import load_classifier, load_usable_classifier
from uap_dist.perturbations.pool import PerturbationPool
from uap_dist.tracking.checkpoint import Checkpoint, check_identity
from uap_dist.tracking.checkpoint_store import CheckpointStore
from uap_dist.tracking.mlflow_run import Tracker, log_classifier
from uap_dist.tracking.mlflow_server import CHECKPOINTS_TAG
from uap_dist.tracking.outputs import default_folder, deliverable, output_folder, publish, resumable
from uap_dist.tracking.resume import Resumed
from uap_dist.workers.behind import known


def main() -> None:
    """The command."""
    run_job("finetune", FinetuneOptions, run, can_resume=True)


def run(options: FinetuneOptions, tracker: Tracker, resumed: Resumed | None) -> None:
    """All repetitions, then every network under every perturbation. Workers end with the process."""
    folder = options.record.output or default_folder(options.name, tracker.run_id)
    output = output_folder(folder, may_hold_files=resumed is not None)
    options = replace(options, record=replace(options.record, output=output))
    job, before = _set_up(options, output, tracker, resumed)
    networks = [before]
    with resumable(job.storage), deliverable(output, job.storage):
        for repetition in range(1, options.repetitions + 1):
            networks.append(repeat(job, repetition, networks[-1]))
        finished = FinishedFinetuning(
            measurements=measure(job, networks),
            groups=group(job, networks),
            epochs={network.name: network.epochs for network in networks[1:]},
            online=networks[-1].online,
            evaluations=count_evaluations(job, networks),
            provenance=job.provenance,
            mlflow_run_id=tracker.run_id,
        )
        last = shutil.copy(job.network_folder(options.repetitions) / NETWORK_FILE, output / NETWORK_FILE)
        save_finetuning(output, finished)
        publish(output, job.storage)
        text = finished.summary()
        metrics, in_runs_below = finished.metrics(), (REPETITIONS_FOLDER,)
        tracker.complete(tags={}, metrics=metrics, step=0, markdown=text, folder=output, leave_out=in_runs_below)
        log_classifier(tracker, load_classifier(options.model, str(last)), job.train.shape)
    console.print(f"\n{text}\n\nFiles: {output}\nMLflow: {tracker.how_to_open()}")


def _set_up(options: FinetuneOptions, output: Path, tracker: Tracker, resumed: Resumed | None) -> tuple[Job, Network]:
    """Check network, pool and data against each other; the job can be resumed from now on."""
    pool = PerturbationPool.load(options.pool)
    classifier = load_usable_classifier(options.model, options.weights)
    first = check_pool(options, pool, classifier)
    urls = expand_apart(options.data.train_shards, options.data.val_shards)
    store = CheckpointStore(storage_of(options.record, output, tracker, resumed))
    store.prepare()  # before any work is done
    fleet = start_fleet(classifier, options.weights, options.fleet, tracker)
    # the weights depend on the number of workers, and it has to divide the batch
    precision = options.finetune.training_precision or ("bfloat16" if fleet.need.gpus > 0 else "float32")
    finetune = replace(options.finetune, training_precision=precision)
    options = replace(options, finetune=finetune, fleet=replace(options.fleet, num_workers=fleet.num_asked))
    check_storage(store.location, fleet.need)
    train, val = list_images(fleet, options.data, *urls)
    options.finetune.check_images(train.num_examples)
    check_pool_size(pool, train.shape, options)
    check_network(classifier, train, val)
    train, val = (classify_images(fleet, options.model, *each) for each in ((train, "training"), (val, "held-out")))
    fleet.close()  # training workers take its place
    check_labels(train)
    provenance = describe_finetuning(options, classifier, first, pool, train, val)
    own = {key: provenance[key] for key in ("pool_sha256", "repetitions", "fleet.num_workers")}
    own |= {key: value for key, value in provenance.items() if key.startswith("finetune.")}
    setting = Setting(classifier, fleet, train, known(val), provenance, console, options.record.commit_every_s)
    record = job_record("finetune", setting, run_id=tracker.run_id, options=to_json(options), decisive=own)
    if resumed is not None:
        check_identity(resumed.checkpoint.job, record)
    else:
        store.start(Checkpoint(record, State.start(train.shape, train.clean.labels, first), ()))
        tracker.set_tag(CHECKPOINTS_TAG, store.location)
        tracker.log_params(provenance)
        tracker.log_dataset(train, "training")
        tracker.log_dataset(val, "held-out")
    job = Job(
        model=options.model,
        config=options.finetune,
        fleet=options.fleet,
        train=train,
        val=val,
        uses_gpu=fleet.need.gpus > 0,
        output=output,
        storage=store.location,
        record=record,
        provenance=provenance,
        tracker=tracker,
        console=console,
        commit_every_s=options.record.commit_every_s,
    )
    return job, Network(BEFORE, options.weights, provenance["weights_digest"], pool)


if __name__ == "__main__":
    main()
