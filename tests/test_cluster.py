"""Whole jobs on clusters that grow and shrink, or whose nodes share no files."""

import subprocess
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest
import torch
from clusters import can_hide_folders, ray_cluster
from conftest import TINY, tiny_worker
from pyarrow import fs
from safetensors.torch import load_file

from uap_dist.method.config import ComputeConfig
from uap_dist.rounds.loop import compute
from uap_dist.workers.dataset import load_dataset
from uap_dist.workers.local import LocalWorkers

pytestmark = pytest.mark.slow
JOB = Path(__file__).parents[1] / "jobs/compute.py"
CONFIG = ComputeConfig(round_size=12, block_size=4, max_passes=150, radius=20.0, evaluate_every=150)
OPTIONS = (
    "--round-size",
    "12",
    "--block-size",
    "4",
    "--max-passes",
    "150",
    "--radius",
    "20",
    "--evaluate-every",
    "150",
)


def start(cluster, folder, *options):
    command = [sys.executable, str(JOB), "--model", TINY, *OPTIONS, "--output", str(folder / "out"), *options]
    return subprocess.Popen(
        command, cwd=folder, env=cluster.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(is_true, process, timeout=120):
    deadline = time.monotonic() + timeout
    while not is_true():
        if time.monotonic() > deadline or process.poll() is not None:
            process.kill()
            pytest.fail(process.communicate()[0])
        time.sleep(0.1)


@pytest.fixture(scope="module")
def expected(shards):
    workers = LocalWorkers(tiny_worker())
    train = load_dataset(workers, [str(shards / f"train-{i:04d}.tar") for i in range(3)])
    *_, final = compute(workers, train, load_dataset(workers, [str(shards / "val-0000.tar")]), CONFIG)
    return final.perturbation


def test_a_cluster_grows_from_no_node_to_three_loses_one_and_shrinks_to_none(shards, expected, tmp_path):
    spot = {"resources": {"CPU": 1, "GPU": 1}, "min_workers": 0, "max_workers": 3}
    with ray_cluster(tmp_path, node_types={"spot": spot}) as cluster:
        assert len(cluster.raylets()) == 1
        data = ("--train-shards", str(shards / "train-*.tar"), "--val-shards", str(shards / "val-*.tar"))
        job = start(cluster, tmp_path, *data, "--num-workers", "1:3", "--gpus-per-worker", "1")
        commits = tmp_path / "checkpoints"
        wait_for(lambda: len(cluster.workers()) >= 2 and any(commits.glob("*/round-*")), job)
        cluster.kill_node()
        out, _ = job.communicate(timeout=120)
        assert job.returncode == 0, out
        deadline = time.monotonic() + 40
        while len(cluster.raylets()) > 1 and time.monotonic() < deadline:
            time.sleep(0.2)
        num_nodes = len(cluster.raylets())
    assert torch.equal(load_file(tmp_path / "out/perturbation.safetensors")["perturbation"], expected)
    assert num_nodes == 1
    for text in ("waiting for 1 to 3 workers of 1 CPU and 1 GPU", "was lost", "joins"):
        assert text in out, out


CLASSIFY = """
import sys, numpy as np
from uap_dist.fleet.ray_cluster import connect
from uap_dist.fleet.config import FleetConfig
from uap_dist.fleet.fleet import Fleet
from uap_dist.workers.dataset import list_dataset
from uap_dist.workers.worker import Worker

connect()
fleet = Fleet(sys.argv[1], None, FleetConfig(num_workers=1))
fleet.wait()
data = list_dataset(fleet, [sys.argv[2]])
((answer,),) = fleet.map(Worker.classify, [data.examples(0, range(3))], np.zeros((1, *data.shape), np.float32))
print("labels", answer.labels, "lost", fleet.stats.workers_lost)
"""


def test_a_task_survives_three_nodes_that_vanish(shards, tmp_path):
    network, shard = TINY.replace(":Tiny", ":Sleepy"), str(shards / "val-0000.tar")
    with ray_cluster(tmp_path) as cluster:
        cluster.add_node()
        command = [sys.executable, "-c", CLASSIFY, network, shard]
        process = subprocess.Popen(
            command, cwd=tmp_path, env=cluster.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(3):
            cluster.add_node()
            wait_for(lambda: find_classifying(cluster), process)
            cluster.kill_node(worker=find_classifying(cluster))
            wait_for(lambda: not find_classifying(cluster), process)
        out, _ = process.communicate(timeout=120)
    assert process.returncode == 0 and "lost 3" in out, out


def find_classifying(cluster):
    """The worker that classifies images now, if any."""
    for process in cluster.workers():
        with suppress(psutil.NoSuchProcess):
            if "classify" in " ".join(process.cmdline()):
                return process
    return None


@pytest.fixture(scope="module")
def nodes(shards, s3, tmp_path_factory):
    """Three nodes to which the driver's folder is empty, that folder, a folder with another torchvision, and shards on S3."""
    folder, driver, other = (tmp_path_factory.mktemp(name) for name in ("cluster", "driver", "other-version"))
    if not can_hide_folders():
        pytest.skip("unshare may not mount here")
    filesystem, path = fs.FileSystem.from_uri(f"s3://bucket/cluster?{s3}")
    fs.copy_files(str(shards), path, source_filesystem=fs.LocalFileSystem(), destination_filesystem=filesystem)
    metadata = other / "torchvision-9.9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 9.9\n")
    with ray_cluster(folder) as cluster:
        for _ in range(3):
            cluster.add_node(hidden=driver)
        yield cluster, driver, other, f"s3://bucket/cluster/{{}}?{s3}"


def test_a_job_on_nodes_that_share_no_files(nodes, expected):
    cluster, driver, _, url = nodes
    data = ("--train-shards", url.format("train-*.tar"), "--val-shards", url.format("val-0000.tar"))
    job = start(cluster, driver, *data, "--num-workers", "3")
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 0, out
    assert torch.equal(load_file(driver / "out/perturbation.safetensors")["perturbation"], expected)


def test_a_shard_that_only_the_driver_sees_is_named(nodes, shards):
    cluster, driver, _, url = nodes
    own = driver / "train-0000.tar"
    own.write_bytes((shards / own.name).read_bytes())
    job = start(
        cluster,
        driver,
        "--train-shards",
        str(own),
        "--val-shards",
        url.format("val-0000.tar"),
        "--output",
        str(driver / "missing"),
    )
    out, _ = job.communicate(timeout=120)
    assert job.returncode == 1 and str(own) in out.splitlines()[-1], out


def test_the_demonstration_is_refused_where_nodes_do_not_see_its_shards(nodes):
    cluster, driver, *_ = nodes
    job = start(cluster, driver, "--output", str(driver / "demo"))
    out, _ = job.communicate(timeout=120)
    *_, line = out.splitlines()
    assert job.returncode == 1 and "decoding" not in out, out
    assert (
        line.startswith("error: 3 of 3 nodes (") and f"do not see the folder {driver}/demo-shards; the demons" in line
    )


def test_a_node_with_another_version_is_refused(nodes):
    cluster, driver, other, url = nodes
    cluster.add_node(python_path=other)
    data = ("--train-shards", url.format("train-*.tar"), "--val-shards", url.format("val-0000.tar"))
    job = start(cluster, driver, *data, "--num-workers", "4", "--output", str(driver / "refused"))
    out, _ = job.communicate(timeout=120)
    message = f"has torchvision 9.9 instead of {version('torchvision')}; the bits of a result depend on them"
    assert job.returncode == 1 and message in out, out
