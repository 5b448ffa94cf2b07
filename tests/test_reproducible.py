"""Torch's settings: a worker in a user's process leaves them as they were, and gives the bits of one in a process of ours."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, tiny_worker

from uap_dist.method.config import ComputeConfig
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.messages import Examples
from uap_dist.workers.reproducible import Settings, noticing_kernels, reproducible
from uap_dist.workers.worker import Worker

V = np.random.default_rng(0).normal(0, 5, size=(3, 16, 16)).astype(np.float32)
OTHERS = (
    "torch.set_num_threads(3)",
    "torch.set_float32_matmul_precision('medium')",
    "torch.set_float32_matmul_precision('high')",
    "torch.backends.fp32_precision = 'tf32'",
    "torch.backends.cudnn.benchmark = True",
    "torch.use_deterministic_algorithms(True); torch.utils.deterministic.fill_uninitialized_memory = True",
    "os.environ['CUBLAS_WORKSPACE_CONFIG'] = ':16:8'",
)
SCRIPT = """
import os, sys, torch
from uap_dist.workers.reproducible import Settings, reproducible
for other in sys.argv[1:]:
    exec(other)
    before = Settings.now()
    with reproducible(2):
        inside = Settings.now()
        torch.nn.Linear(4, 4)(torch.ones(2, 4))
    assert Settings.now() == before != inside, other
    workspace = before.workspace or ":4096:8"
    assert inside == Settings(2, workspace=workspace), (other, inside)
"""


def test_every_setting_is_restored():
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, *OTHERS], capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr


def test_settings_are_restored_after_an_error():
    before = Settings.now()
    with pytest.raises(ZeroDivisionError), reproducible(3):
        assert torch.get_num_threads() == 3
        raise ZeroDivisionError
    assert Settings.now() == before


def test_a_worker_leaves_the_settings_of_a_users_process_unchanged(shards):
    before = Settings.now(), dict(os.environ)
    worker = tiny_worker()
    assert (Settings.now(), dict(os.environ)) == before
    for method, *shared in (
        (Worker.load,),
        (Worker.classify, V),
        (Worker.solve, V, ComputeConfig().solver),
        (Worker.normals,),
    ):
        listing = worker.load(Examples(str(shards / "train-0000.tar")))
        task = Examples(str(shards / "train-0000.tar"), listing.digest, listing.keys[:4], (0,) * 4, seed=(1,))
        list(LocalWorkers(worker).map(method, [task], *shared))
        assert (Settings.now(), dict(os.environ)) == before, method.__name__


BITS = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from conftest import compute_here
from uap_dist.method.config import ComputeConfig
if sys.argv[2] == "ours":
    from uap_dist.workers.reproducible import set_up_torch
    set_up_torch(1)
else:
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("medium")
config = ComputeConfig(max_passes=1, round_size=10, block_size=5, radius=20.0)
print(compute_here(sys.argv[3], None, sys.argv[4:6], sys.argv[6:], config)[0].provenance["perturbation_sha256"])
"""


def test_results_have_the_bits_of_a_process_set_up_by_set_up_torch(shards):
    here = str(Path(__file__).parent)
    urls = [str(shards / name) for name in ("train-0000.tar", "train-0001.tar", "val-0000.tar")]
    found = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", BITS, here, whose, TINY, *urls], capture_output=True, text=True
        )
        for whose in ("ours", "user's")
    ]
    assert found[0].stdout == found[1].stdout and len(found[0].stdout) == 65, found[0].stderr + found[1].stderr


def test_nondeterministic_operations_are_collected_and_other_warnings_pass():
    with reproducible(1), pytest.warns(UserWarning, match="^another$"), noticing_kernels() as kernels:
        for _ in range(2):
            torch.zeros(4).put_(torch.tensor([0, 1]), torch.ones(2))
        warnings.warn("another", stacklevel=1)
    assert kernels == {"put_"}
