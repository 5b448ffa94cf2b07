"""The driver's side of a training on Ray Train: where its mailbox lies, and what becomes of an error."""

import subprocess
import sys
from threading import Lock

import pytest
from clusters import ray_cluster
from conftest import TINY

from uap_dist.finetuning.options import FinetuneConfig
from uap_dist.finetuning.ray_train import Training
from uap_dist.finetuning.trainer import TrainingTask
from uap_dist.fleet.config import FleetConfig

MAILBOXES = """
import sys
from uap_dist.fleet.ray_cluster import connect
from uap_dist.finetuning.ray_train import Training
from uap_dist.finetuning.trainer import TrainingTask
from uap_dist.fleet.config import FleetConfig
import ray

connect()
task = TrainingTask("m", None, None, None, None, None, FleetConfig())
some = [Training(task, name="n", storage=sys.argv[1], num_workers=1, uses_gpu=False) for _ in range(5)]
find_node = lambda actor: ray.get_runtime_context().get_node_id()
nodes = ray.get([each._mailbox.__ray_call__.remote(find_node) for each in some])
assert set(nodes) == {ray.get_runtime_context().get_node_id()}, nodes
"""


def test_no_lost_node_but_the_drivers_takes_the_mailbox_with_it(tmp_path):
    with ray_cluster(tmp_path) as cluster:
        cluster.add_node()
        words = [sys.executable, "-c", MAILBOXES, str(tmp_path)]
        done = subprocess.run(words, env=cluster.env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.timeout(60)
def test_an_error_that_is_none_of_rays_reaches_the_caller(local_ray, tmp_path):
    task = TrainingTask(
        TINY, Lock(), None, None, None, FinetuneConfig(), FleetConfig()
    )  # which cannot be sent to workers
    training = Training(task, name="n", storage=str(tmp_path), num_workers=1, uses_gpu=False)
    with pytest.raises(TypeError, match="serialize"):
        list(training.epochs())
