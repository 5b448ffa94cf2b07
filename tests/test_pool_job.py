"""jobs/compute.py --num-perturbations: a pool as a user starts it, killed in the middle and resumed."""

import csv
import json
import time
from hashlib import sha256

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_worker
from processes import run_job
from test_job import JOB, data, finish, runs, start

from uap_dist.data.patterns import expand_patterns
from uap_dist.errors import TrackingError
from uap_dist.method.config import ComputeConfig
from uap_dist.perturbations.files import load_perturbations
from uap_dist.perturbations.pool import PerturbationPool
from uap_dist.rounds.loop import compute
from uap_dist.workers.dataset import load_dataset
from uap_dist.workers.local import LocalWorkers

SEEDS = range(4, 8)
NUM_PASSES, NUM_ROUNDS = 10, 50
OPTIONS = (
    "--commit-every-s",
    "0",
    "--num-perturbations",
    "4",
    "--seed",
    "4",
    "--max-passes",
    str(NUM_PASSES),
    "--evaluate-every",
    "5",
)
OPTIONS += (
    "--round-size",
    "10",
    "--block-size",
    "5",
    "--radius",
    "20",
    "--output",
    "out",
    "--register-as",
    "tiny-pool",
)


def result(folder, seed):
    return json.loads((folder / f"out/members/seed-{seed}/result.json").read_text())


@pytest.fixture(scope="module", params=[1, 3], ids=["each-alone", "three-at-once"])
def resumed(shards, tmp_path_factory, request):
    """A pool whose driver was killed after its first member was finished; the state of that member then."""
    folder = tmp_path_factory.mktemp("pool")
    process = start(folder, *data(shards), *OPTIONS, "--members-at-once", str(request.param))
    client = None
    while client is None or not any(run.info.status == "FINISHED" for run in runs(folder)[1]):
        assert process.poll() is None, process.stderr.read()
        client = (folder / "mlflow.db").exists() and list(folder.glob("out/members/*/result.json")) or None
        time.sleep(0.02)
    process.kill()
    process.communicate()
    client, found = runs(folder)
    (parent,) = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
    before = {run.info.run_id: run.info.end_time for run in found if run.info.status == "FINISHED"}
    assert before and not (folder / "out/result.json").exists()
    done = run_job([str(JOB), "--resume", parent.info.run_id, "--num-workers", "2"], folder)
    assert done.returncode == 0, done.stderr
    return folder, parent.info.run_id, before, done.stdout


def test_each_member_has_the_bits_of_its_seed_alone(resumed, shards):
    folder, *_ = resumed
    workers = LocalWorkers(tiny_worker())
    train, val = (load_dataset(workers, expand_patterns([str(shards / name)])) for name in ("train-*.tar", "val-*.tar"))
    pool = PerturbationPool.load(folder / "out/pool")
    for seed, v in zip(SEEDS, pool.perturbations, strict=True):
        config = ComputeConfig(
            max_passes=NUM_PASSES,
            round_size=10,
            block_size=5,
            radius=20.0,
            seed=seed,
            random_start=0.5,
            evaluate_every=NUM_PASSES,
            members_at_once=result(folder, seed)["provenance"]["members_at_once"],
        )
        *_, final = compute(workers, train, val, config)
        assert torch.equal(v, final.perturbation)
        assert result(folder, seed)["perturbation_sha256"] == sha256(v.numpy().tobytes()).hexdigest()
        assert result(folder, seed)["val_fooling_rate"] == final.evaluation.val.rate
        provenance = result(folder, seed)["provenance"]
        assert (provenance["seed"], provenance["random_start"], provenance["num_perturbations"]) == (seed, 0.5, 1)


def test_finished_members_are_left_alone_and_every_metric_is_there_once(resumed):
    folder, pool_id, before, out = resumed
    client, found = runs(folder)
    children = [run for run in found if run.data.tags.get("mlflow.parentRunId") == pool_id]
    assert len(children) == 4 and len(found) == 5 and {run.info.status for run in found} == {"FINISHED"}
    assert {run.data.params["seed"] for run in children} == {"4", "5", "6", "7"}
    assert {run.data.params["steps.period"] for run in children} == {"32"}
    for run in children:
        assert before.get(run.info.run_id, run.info.end_time) == run.info.end_time
        for name in ("fooling_rate/round", "total/evaluations"):
            history = client.get_metric_history(run.info.run_id, name)
            assert [m.step for m in history] == list(range(1, NUM_ROUNDS + 1))
        assert len(client.get_metric_history(run.info.run_id, "random/fooling_rate")) == 1
        assert {a.path for a in client.list_artifacts(run.info.run_id)} >= {"pictures", "tables", "result.json"}
    assert out.count(" is finished") == len(before)


def test_the_pool_says_how_good_and_how_diverse_it_is(resumed):
    folder, pool_id, *_ = resumed
    pool = PerturbationPool.load(folder / "out/pool")
    said = json.loads((folder / "out/result.json").read_text())
    nearest, pair = pool.nearest_pairs()[0]
    assert said["largest_inner_product"] == nearest and tuple(said["nearest_pair"]) == pair
    assert json.loads((folder / "out/pool/pool.json").read_text())["members"][0]["random_start"] == 0.5
    assert said["is_diverse"] == (nearest <= 0.1)
    assert said["mean_val_fooling_rate"] == sum(result(folder, seed)["val_fooling_rate"] for seed in SEEDS) / 4
    with (folder / "out/tables/inner-products.csv").open() as file:
        rows = {row["member"]: row for row in csv.DictReader(file)}
    assert float(rows[pair[0]][pair[1]]) == nearest and float(rows[pair[0]][pair[0]]) == pytest.approx(1)
    manifest = json.loads((folder / "out/pool/pool.json").read_text())
    assert [member["seed"] for member in manifest["members"]] == list(SEEDS)
    assert all(member["val_fooling_rate_interval"] and member["git_commit"] for member in manifest["members"])
    fooled = [
        pq.read_table(folder / f"out/members/seed-{seed}/tables/held-out-examples.parquet")["is_fooled"].to_numpy()
        for seed in SEEDS
    ]
    with (folder / "out/tables/coverage.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert float(rows[-1]["covered"]) == said["val_coverage"] == np.any(fooled, 0).mean()
    assert float(rows[0]["covered"]) == max(each.mean() for each in fooled) and len(rows) == len(SEEDS)
    assert float(rows[-1]["covered_random_linf"]) == said["val_coverage_random_by_norm"]["linf"]
    with (folder / "out/tables/coverage-by-class.csv").open() as file:
        assert sum(int(row["covered_num_images"]) for row in csv.DictReader(file)) == said["num_val_images"]
    client, _ = runs(folder)
    run = client.get_run(pool_id)
    assert run.data.metrics["pool/val_coverage"] == said["val_coverage"]
    assert "pictures/4-coverage.png" in {a.path for a in client.list_artifacts(pool_id, "pictures")}
    assert run.data.metrics["pool/largest_inner_product"] == nearest
    assert "seed-4" in run.data.tags["mlflow.note.content"] and "diverse" in run.data.tags["mlflow.note.content"]
    assert {a.path for a in client.list_artifacts(pool_id)} == {"pool", "pictures", "tables", "result.json"}


def test_a_pool_is_loaded_from_its_run_and_from_the_registry(resumed, monkeypatch):
    folder, pool_id, *_ = resumed
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{folder / 'mlflow.db'}")
    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlflow.db'}")
    here = PerturbationPool.load(folder / "out/pool")
    for address in (f"runs:/{pool_id}/pool", "models:/tiny-pool/1"):
        there = PerturbationPool.load(address)
        assert torch.equal(there.perturbations, here.perturbations) and there.members == here.members
    _, found = runs(folder)
    child = next(run for run in found if run.data.params["seed"] == "5" and run.info.run_id != pool_id)
    (one,) = load_perturbations([f"five=runs:/{child.info.run_id}"])
    assert one.name == "five" and torch.equal(one.v, here.perturbations[1])
    with pytest.raises(TrackingError, match="cannot fetch runs:/0000/pool/pool.safetensors"):
        PerturbationPool.load("runs:/0000/pool")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-perturbations", "0"), "--num-perturbations is 0; it must be positive"),
        (("--register-as", "x"), "only a pool is registered (--register-as); give --num-perturbations 2 or more"),
    ],
)
def test_a_pool_that_cannot_be_is_one_line(tmp_path, options, message):
    code, _, err = finish(start(tmp_path, *options))
    assert code == 1 and err == f"error: {message}\n"
