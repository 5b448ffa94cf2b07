"""jobs/finetune.py as a user starts it: on S3, with a training worker and the driver killed, and what bad input gets."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from hashlib import sha256

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from clusters import can_hide_folders, ray_cluster
from conftest import TINY, compute_here
from processes import environment, run_job
from test_job import JOB, empty_store, runs
from torch.nn.parallel import DistributedDataParallel

from uap_dist.data.decode import Geometry
from uap_dist.errors import ConfigError
from uap_dist.finetuning.batches import ImageReader, WorkerImages
from uap_dist.finetuning.options import FinetuneConfig, FinetuneOptions
from uap_dist.finetuning.trainer import Learner, TrainingTask
from uap_dist.fleet.config import FleetConfig
from uap_dist.job_options import DataOptions
from uap_dist.method.config import ComputeConfig
from uap_dist.models.loading import load_classifier
from uap_dist.models.weights import digest_weights, write_weights
from uap_dist.perturbations.pool import PerturbationPool
from uap_dist.workers.dataset import load_dataset
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.reproducible import set_up_torch
from uap_dist.workers.worker import Worker

FINETUNE = JOB.with_name("finetune.py")
SLOW = TINY.replace(":Tiny", ":Slow")
CONFIG = FinetuneConfig(epochs=3, batch_size=8, learning_rate=0.01, adaptive=True)
pytestmark = pytest.mark.timeout(400)
OPTIONS = ("--epochs", "3", "--batch-size", "8", "--learning-rate", "0.01", "--adaptive", "--num-workers", "2")


@pytest.fixture(scope="module")
def data(shards):
    return [str(shards / f"train-{i:04d}.tar") for i in range(3)], [str(shards / "val-0000.tar")]


@pytest.fixture(scope="module")
def weights(data, tmp_path_factory):
    """Of the tiny network, taught the shards' labels."""
    classifier = load_classifier(TINY)
    train = load_dataset(LocalWorkers(Worker(classifier, cache_bytes=1 << 30, num_threads=1)), data[0])
    network = load_classifier(TINY).network.requires_grad_(True)
    optimiser = torch.optim.Adam(network.parameters(), 3e-3)
    reader = ImageReader(Geometry(), FleetConfig())
    for epoch in range(12):
        for images, truths in WorkerImages(train, reader, 3).views(np.random.default_rng(epoch), 8, "none"):
            loss = torch.nn.functional.cross_entropy(network(torch.tensor(images).float()), torch.tensor(truths))
            optimiser.zero_grad(), loss.backward(), optimiser.step()
    path = tmp_path_factory.mktemp("weights") / "taught.safetensors"
    write_weights(path, network, {})
    return str(path)


def computed(weights, data, seed):
    config = ComputeConfig(max_passes=2, round_size=10, block_size=5, radius=30.0, seed=seed, random_start=0.5)
    return compute_here(SLOW, weights, *data, config)[0]


@pytest.fixture(scope="module")
def pool(weights, data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    PerturbationPool.of([computed(weights, data, seed) for seed in (3, 4)]).save(folder / "pool")
    return folder / "pool"


def words(weights, data, pool, *more):
    given = ("--model", SLOW, "--weights", weights, "--pool", str(pool), "--output", "out")
    return [*given, "--train-shards", *data[0], "--val-shards", *data[1], *OPTIONS, *more]


def start(folder, command, env=None):
    if not (folder / "mlflow.db").exists():
        (folder / "mlflow.db").write_bytes(empty_store())
    log = (folder / "log").open("a")
    environ = env or environment(**{k: v for k, v in os.environ.items() if k.startswith("AWS_")})
    return subprocess.Popen([sys.executable, str(FINETUNE), *command], cwd=folder, env=environ, stdout=log, stderr=log)


def wait_for(folder, process, text):
    deadline = time.monotonic() + 120
    while text not in (folder / "log").read_text():
        assert process.poll() is None and time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def disturbed(weights, data, pool, s3, tmp_path_factory):
    """A job on S3 whose training worker is killed in mid-epoch, whose driver is killed between epochs, and which is resumed."""
    folder = tmp_path_factory.mktemp("finetune")
    process = start(folder, words(weights, data, pool, "--storage", f"s3://bucket/finetune?{s3}"))
    wait_for(folder, process, "epoch 1 of 3")
    time.sleep(0.7)  # epochs take five steps of 0.3 s
    children = psutil.Process(process.pid).children(recursive=True)
    one, _ = [child for child in children if "RayTrainWorker" in " ".join(child.cmdline())]
    one.kill()
    wait_for(folder, process, "epoch 2 of 3")
    process.kill()
    process.wait()
    killed = time.time() * 1000
    log = (folder / "log").read_text()
    assert "epoch 3 of 3" not in log
    run_id = re.search("MLflow run ([0-9a-f]{32})", log)[1]
    (folder / "log").write_text("")
    resumed = start(folder, ["--resume", run_id])
    assert resumed.wait(200) == 0, (folder / "log").read_text()
    return folder, run_id, killed


def learn(number, task, folder):
    """One of two workers, without Ray."""
    set_up_torch(1)
    where = f"file://{folder / 'meeting'}"
    torch.distributed.init_process_group("gloo", init_method=where, rank=number, world_size=2)
    learner = Learner(task, number=number, num_workers=2, prepare=DistributedDataParallel)
    while not learner.is_done:
        learner.run_epoch()
    if number == 0:
        learner.save(folder)
    torch.distributed.destroy_process_group()


def train_undisturbed(config, weights, data, pool, folder):
    """What two workers without Ray end with."""
    workers = LocalWorkers(Worker(load_classifier(SLOW, weights), cache_bytes=1 << 30, num_threads=1))
    train, val = (load_dataset(workers, urls) for urls in data)
    task = TrainingTask(SLOW, weights, train, val, PerturbationPool.load(pool), config, FleetConfig())
    torch.multiprocessing.spawn(learn, (task, folder), nprocs=2)
    learner = Learner(task)
    learner.load(folder)
    return learner


@pytest.mark.slow
def test_kills_change_no_bit_of_the_network(disturbed, weights, data, pool, tmp_path):
    folder, *_ = disturbed
    undisturbed = train_undisturbed(CONFIG, weights, data, pool, tmp_path)
    written = load_classifier(SLOW, str(folder / "out/network.safetensors"))
    assert written.weights_digest == digest_weights(undisturbed.classifier.network)
    epochs = pq.read_table(folder / "out/tables/epochs.parquet").to_pylist()
    assert [row["epoch"] for row in epochs] == [0, 1, 2, 3]
    for row, record in zip(epochs, undisturbed.history, strict=True):
        assert all(row[name] == value for name, value in record.metrics.items() if "second" not in name)


@pytest.mark.slow
def test_perturbations_that_move_with_the_network_are_kept_through_a_kill(weights, data, pool, tmp_path):
    process = start(tmp_path, words(weights, data, pool, "--online", "--online-perturbations", "2"))
    wait_for(tmp_path, process, "epoch 1 of 3")
    process.kill()
    process.wait()
    run_id = re.search("MLflow run ([0-9a-f]{32})", (tmp_path / "log").read_text())[1]
    assert start(tmp_path, ["--resume", run_id]).wait(200) == 0, (tmp_path / "log").read_text()
    config = replace(CONFIG, online=True, online_perturbations=2)
    undisturbed = train_undisturbed(config, weights, data, pool, tmp_path)
    tuned = load_classifier(SLOW, str(tmp_path / "out/network.safetensors"))
    assert tuned.weights_digest == digest_weights(undisturbed.classifier.network)
    kept, given = PerturbationPool.load(tmp_path / "out/online-pool"), PerturbationPool.load(pool)
    assert torch.equal(kept.perturbations, undisturbed._online.v)
    shared = {"weights_digest": tuned.weights_digest, "norm": "linf", "radius": 30.0}
    assert {key: kept.shared[key] for key in shared} == shared
    result = json.loads((tmp_path / "out/result.json").read_text())
    counts = {(row["network"], row["group"]): row["num_perturbations"] for row in result["comparisons"]}
    assert counts["repetition 1", "trained_on_members"] == 2 and counts["before", "trained_on_members"] == 2
    assert counts["repetition 1", "held_out_members"] == len(given.members)
    spent = undisturbed.history[-1].metrics["total/evaluations"]
    assert result["evaluations"] == {"before": 0, "repetition 1": spent}


@pytest.mark.slow
def test_no_epoch_was_repeated_or_lost_in_mlflow(disturbed):
    folder, run_id, killed = disturbed
    client, found = runs(folder)
    names = {run.info.run_name: run for run in found}
    assert {run.info.status for run in found} == {"FINISHED"}
    children = {"repetition 1: fine-tuning", "repetition 1: fresh pool", "repetition 1: seed-3", "repetition 1: seed-4"}
    assert set(names) == {"finetune-tiny.py-Slow"} | children
    training = names["repetition 1: fine-tuning"].info.run_id
    points = client.get_metric_history(training, "top1/clean")
    assert [m.step for m in points] == [0, 1, 2, 3]
    assert [m.timestamp < killed for m in points] == [True, True, True, False]
    assert {a.path for a in client.list_artifacts(training)} == {"network.safetensors", "epochs.jsonl"}
    job = client.get_run(run_id)
    assert job.data.metrics["after/fooling_rate_fresh"] < job.data.metrics["before/fooling_rate_fresh"]


@pytest.mark.slow
def test_the_fresh_pool_is_that_of_the_tuned_network_by_the_same_config(disturbed, data):
    folder, *_ = disturbed
    fresh = PerturbationPool.load(folder / "out/repetitions/1/fresh-pool/pool")
    again = computed(str(folder / "out/network.safetensors"), data, 3)
    assert torch.equal(fresh.perturbations[0], again.v)
    assert fresh.shared["weights_digest"] == again.provenance["weights_digest"]
    assert [member["seed"] for member in fresh.members] == [3, 4]
    comparisons = json.loads((folder / "out/result.json").read_text())["comparisons"]
    (top1,) = {row["top1_clean"] for row in comparisons if row["network"] == "repetition 1"}
    assert fresh.members[0]["top1.clean_val"] == pytest.approx(top1)


@pytest.mark.slow
def test_the_table_is_what_jobs_evaluate_says(disturbed):
    folder, *_ = disturbed
    rows = {(r["network"], r["group"]): r for r in json.loads((folder / "out/result.json").read_text())["comparisons"]}
    table = pq.read_table(folder / "out/tables/evaluation.parquet").to_pylist()
    assert len(table) == 2 * 5  # two networks; given pool, fresh pool, noise
    held_out = next(r for r in table if r["classifier"] == "repetition 1" and r["perturbation"] == "given pool, seed-4")
    assert rows["repetition 1", "held_out_members"]["fooling"] == held_out["fooling_rate"]
    fresh = [r for r in table if r["classifier"] == "repetition 1" and r["perturbation"].startswith("repetition 1,")]
    assert rows["repetition 1", "fresh"]["fooling"] == pytest.approx(
        np.mean([r["fooling_rate"] for r in fresh]), abs=0.03
    )
    assert rows["before", "fresh"]["num_perturbations"] == 2
    assert {p.name for p in (folder / "out/pictures").iterdir()} == {"1-transfer-held-out.png", "2-epochs.png"}


@pytest.mark.slow
def test_the_model_in_mlflow_takes_pixels(disturbed):
    import mlflow

    folder, run_id, _ = disturbed
    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    model = mlflow.pyfunc.load_model(f"runs:/{run_id}/model")
    pixels = np.random.default_rng(0).uniform(0, 255, (5, 3, 16, 16)).astype(np.float32)
    expected = load_classifier(SLOW, str(folder / "out/network.safetensors"))(torch.tensor(pixels))
    np.testing.assert_allclose(model.predict(pixels), expected.numpy(), rtol=1e-4, atol=1e-4)
    (taken,) = model.metadata.signature.inputs
    assert (taken.type, taken.shape) == (np.float32, (-1, 3, 16, 16))


@pytest.fixture(scope="module")
def two_nodes(tmp_path_factory):
    """A cluster of two nodes to which the driver's folder is empty, and that folder."""
    if not can_hide_folders():
        pytest.skip("unshare may not mount here")
    driver = tmp_path_factory.mktemp("driver")
    with ray_cluster(tmp_path_factory.mktemp("cluster")) as cluster:
        for _ in range(2):
            cluster.add_node(hidden=driver)
        yield cluster, driver


@pytest.mark.slow
def test_on_nodes_that_see_the_storage_only_through_a_kill_and_without_the_output_folder(
    two_nodes, weights, data, pool, tmp_path
):
    cluster, folder = two_nodes
    process = start(folder, words(weights, data, pool, "--storage", str(tmp_path)), cluster.env)
    wait_for(folder, process, "repetition 1: fresh pool")
    process.kill()
    process.wait()
    run_id = re.search("MLflow run ([0-9a-f]{32})", (folder / "log").read_text())[1]
    tuned = digest(folder / "out/repetitions/1/network/network.safetensors")
    shutil.rmtree(folder / "out")
    (folder / "log").write_text("")
    assert start(folder, ["--resume", run_id], cluster.env).wait(200) == 0, (folder / "log").read_text()
    assert "epoch 1 of 3" not in (folder / "log").read_text()
    rows = json.loads((folder / "out/result.json").read_text())["comparisons"]
    assert {row["network"] for row in rows} == {"before", "repetition 1"}
    assert tuned == digest(folder / "out/repetitions/1/network/network.safetensors")
    assert (
        tuned == digest(folder / "out/network.safetensors") == digest(*tmp_path.rglob("1-network/network.safetensors"))
    )


def digest(path):
    return sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_a_storage_that_only_the_driver_sees_is_refused_before_any_work(two_nodes, weights, data, pool):
    cluster, folder = two_nodes
    (folder / "log").write_text("")
    command = words(weights, data, pool, "--storage", "kept-here", "--output", "refused")
    assert start(folder, command, cluster.env).wait(200) == 1
    *_, line = (folder / "log").read_text().splitlines()
    assert line.startswith("error: 2 of 2 nodes (") and f"do not see the folder {folder}/kept-here/" in line
    assert line.endswith("give --storage as a folder that every node sees, or as s3://, gs://")


@pytest.mark.parametrize("name", ["storage", "foreign network", "one shard twice"])
def test_bad_input_is_one_line(name, weights, data, pool, tmp_path):
    command, message = {
        "storage": (words(weights, data, pool, "--storage", "/proc/here"), "cannot write checkpoints to /proc/here/"),
        "foreign network": (
            [w for w in words(weights, data, pool) if w not in ("--weights", weights)],
            "the pool was computed for",
        ),
        "one shard twice": (
            words(weights, (data[0], data[0][:1]), pool),
            f"shard {data[0][0]} is both a training and a held-out shard; hold out other shards",
        ),
    }[name]
    (tmp_path / "mlflow.db").write_bytes(empty_store())
    done = run_job([str(FINETUNE), *command], tmp_path)
    assert done.returncode == 1
    (line,) = [x for x in (done.stdout + done.stderr).splitlines() if not x.startswith("MLflow run")]
    assert line.startswith(f"error: {message}")
    _, (run,) = runs(tmp_path)
    assert run.info.status == "FAILED" and run.data.tags["reason"] in line


@pytest.mark.parametrize(
    ("options", "data", "message"),
    [
        (
            {"fleet": FleetConfig(num_workers=3)},
            {},
            "batch size 64 is not a multiple of 3 workers; give another --batch-size",
        ),
        ({}, {"num_train_images": 7}, "7 training images are fewer than one batch of 64; give a smaller --batch-size"),
        ({}, {"num_val_images": 0}, "--num-val-images is 0; it must be positive"),
        ({}, {"max_bad_fraction": 2.0}, "--max-bad-fraction is 2.0; it must lie in"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_looked_at(options, data, message):
    with pytest.raises(ConfigError, match=message):
        FinetuneOptions(
            **{"model": "m", "pool": "p"} | options, data=DataOptions(train_shards=("t",), val_shards=("h",), **data)
        )
