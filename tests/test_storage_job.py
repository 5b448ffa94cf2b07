"""Whole jobs whose shards, weights, checkpoints and results are in an object store that fails."""

import re
import time
from threading import Event

import pytest
import torch
from conftest import TINY, tiny_worker
from faulty_store import ONCE
from processes import run_job
from pyarrow import fs
from test_job import JOB, finish, runs, start

from uap_dist.data.locations import join, locate
from uap_dist.data.patterns import expand_patterns
from uap_dist.method.config import ComputeConfig
from uap_dist.models.loading import load_classifier
from uap_dist.models.weights import write_weights
from uap_dist.perturbations.files import load_perturbations
from uap_dist.perturbations.pool import PerturbationPool
from uap_dist.rounds.loop import compute
from uap_dist.tracking.checkpoint_store import CheckpointStore
from uap_dist.workers.dataset import load_dataset
from uap_dist.workers.local import LocalWorkers

SEEDS = (4, 5)
OPTIONS = ("--num-perturbations", "2", "--seed", "4", "--max-passes", "4", "--evaluate-every", "4", "--radius", "20")
OPTIONS += (
    "--round-size",
    "10",
    "--block-size",
    "5",
    "--output",
    "out",
    "--cache-gib",
    "1e-9",
    "--disk-cache-gib",
    "0",
)


def list_names(location):
    filesystem, path = locate(location)
    infos = filesystem.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
    return [info.path.removeprefix(f"{path}/") for info in infos if info.is_file]


def newest(folder):
    """The newest checkpoint there, once there is one."""
    while (found := CheckpointStore(str(folder)).find_newest()) is None:
        time.sleep(0.1)
    return found


@pytest.mark.slow
def test_rounds_are_committed_before_the_held_out_images_are_there(store, put, shards, tmp_path):
    """Killed while its held-out shard is on the way, then resumed where the store refuses it, then where it comes."""
    val = put("val.tar", "val-0000.tar") + "&request_timeout=100"
    is_there = Event()

    def wait(method, path):
        if method == "GET" and "val" in path:
            is_there.wait(100)

    store.fault = wait
    data = ("--train-shards", str(shards / "train-*.tar"), "--val-shards", val)
    options = (
        "--max-passes",
        "40",
        "--evaluate-every",
        "40",
        "--radius",
        "20",
        "--round-size",
        "10",
        "--block-size",
        "5",
    )
    options += ("--output", "out", "--cache-gib", "1", "--disk-cache-gib", "0", "--commit-every-s", "0")
    process = start(tmp_path, *data, *options)
    while not (folders := list(tmp_path.glob("checkpoints/*"))) or not newest(folders[0]).state.num_rounds:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.1)
    process.kill()
    process.communicate()
    saved = newest(folders[0])
    assert "val_digest" not in saved.job.identity and "train_digest" in saved.job.identity
    store.fault = lambda method, path: ("status", 403) if method == "GET" else None
    resume = [str(JOB), "--resume", str(folders[0])]
    failed = run_job(resume, tmp_path)
    assert failed.returncode == 1 and re.search("^error: .*val.tar.* access is denied", failed.stderr, re.M)
    assert newest(folders[0]).state.num_rounds >= saved.state.num_rounds
    store.reset()
    is_there.set()
    done = run_job(resume, tmp_path)
    assert done.returncode == 0, done.stderr
    _, (run,) = runs(tmp_path)
    workers = LocalWorkers(tiny_worker())
    sets = [load_dataset(workers, expand_patterns([str(shards / name)])) for name in ("train-*.tar", "val-*.tar")]
    *_, final = compute(workers, *sets, ComputeConfig(max_passes=40, round_size=10, block_size=5, radius=20.0))
    (found_v,) = load_perturbations([str(tmp_path / "out")])
    assert torch.equal(found_v.v, final.perturbation)
    assert run.data.params["val_digest"] == sets[1].digest and len(run.inputs.dataset_inputs) == 2
    assert run.data.metrics["fooling_rate/val"] == final.evaluation.val.rate


@pytest.mark.slow
def test_a_job_survives_a_failing_store_and_is_resumed_from_it(store, s3, put, shards, tmp_path):
    """Shards, network, checkpoints and results on S3; each object is cut once, and every 20th answer an error; killed once."""
    for path in shards.glob("*.tar"):
        put(f"data/{path.name}", path.name)
    write_weights(tmp_path / "w.safetensors", load_classifier(TINY).network, {})
    weights = put("w.safetensors", (tmp_path / "w.safetensors").read_bytes()).removesuffix(f"&{ONCE}")
    data, storage = (f"s3://bucket/{name}?{store.query}" for name in ("data", "uap"))

    whole = set()

    def fault(method, path):
        if method == "GET" and path not in whole:
            whole.add(path)
            return "cut", 1000
        return ("status", 503) if len(store.requests) % 20 == 0 else None

    store.fault = fault
    train, val = join(data, "train-{0000..0002}.tar"), join(data, "val-*.tar")
    words = (
        "--weights",
        weights,
        "--train-shards",
        train,
        "--val-shards",
        val,
        "--storage",
        storage,
        "--commit-every-s",
        "0",
    )
    process = start(tmp_path, *words, *OPTIONS)
    seen = f"s3://bucket/uap?{s3}"  # the same, by a server without faults
    while not any(re.search("round-0*[1-9]", name) for name in list_names(seen)):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.3)
    process.kill()
    process.communicate()
    names = list_names(seen)
    run_id = names[0].partition("/")[0]
    assert not any("/results/" in name for name in names)
    done = run_job([str(JOB), "--resume", join(storage, run_id)], tmp_path)
    assert done.returncode == 0, done.stderr
    store.reset()
    results = join(join(storage, run_id), "results")
    local = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert set(list_names(results)) == local >= {"result.json", "members/seed-4/perturbation.safetensors"}
    workers = LocalWorkers(tiny_worker())
    sets = [load_dataset(workers, expand_patterns([str(shards / name)])) for name in ("train-*.tar", "val-*.tar")]
    pool = PerturbationPool.load(join(results, "pool"))
    for seed, v in zip(SEEDS, pool.perturbations, strict=True):
        config = ComputeConfig(max_passes=4, round_size=10, block_size=5, radius=20.0, seed=seed, random_start=0.5)
        *_, final = compute(workers, *sets, config)
        assert torch.equal(v, final.perturbation)


@pytest.mark.slow
def test_a_job_that_may_not_write_to_its_storage_ends_before_any_work(store, shards, tmp_path):
    store.fault = lambda method, path: ("status", 403) if method in ("PUT", "POST") else None
    data = ("--train-shards", str(shards / "train-*.tar"), "--val-shards", str(shards / "val-*.tar"))
    code, out, err = finish(start(tmp_path, *data, "--storage", f"s3://bucket/uap?{store.query}"))
    assert code == 1 and err.startswith("error: cannot write checkpoints to s3://bucket/uap/") and err.count("\n") == 1
    assert "access is denied" in err and "decoding" not in out and "waiting" not in out
    _, (run,) = runs(tmp_path)
    assert run.info.status == "FAILED" and "access is denied" in run.data.tags["reason"]
