"""Faults of runs that compute a pool."""

import random
import time
from collections.abc import Iterator

from faults.lab import Lab, Server
from faults.runs import Line, Trial


def pool_kills(lab: Lab) -> Iterator[Line]:
    """SIGKILL to the driver of a pool; each member must have the bits that its seed has alone."""
    rounds = lab.num_rounds * len(lab.alone)
    rng, trial, times = random.Random(1), _start_pool(lab, "pool-kills"), lab.size.num_pool_kills
    for number in range(times):
        trial.reach(round(rounds * (number + 0.3) / (times + 0.3)))
        time.sleep(rng.uniform(0, 0.6))
        trial.kill()
        trial.resume("--num-workers", rng.choice("123"))
    trial.finish()
    yield trial.pool_line("SIGKILL of the driver at a random point, resumed", times)


def pool_outage(lab: Lab) -> Iterator[Line]:
    """The MLflow server of a pool is killed, and back after the pool has ended."""
    assert lab.alone
    server = Server(lab)
    trial = _start_pool(lab, "pool-outage", MLFLOW_TRACKING_URI=server.uri)
    trial.reach(lab.num_rounds // 3)
    server.stop()
    trial.finish("RUNNING")
    assert (trial.folder / "out/pool/pool.safetensors").exists(), trial.errors
    server.start()
    trial.resume()
    trial.finish()
    yield trial.pool_line("MLflow server killed, back after the end; resumed", 1)


def _start_pool(lab: Lab, name: str, **environment: str) -> Trial:
    trial = Trial(lab, name, "--num-perturbations", str(lab.size.num_perturbations), **environment)
    trial.start()
    return trial
