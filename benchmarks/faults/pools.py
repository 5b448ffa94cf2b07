"""Faults of runs that compute a pool."""

import random
import time
from collections.abc import Iterator

from faults.lab import Lab, Server
from faults.runs import Line, Trial


def pool_kills(lab: Lab) -> Iterator[Line]:
    """SIGKILL to the driver of a pool; each member must have the bits that its seed has alone."""
    alone = lab.alone  # computed before the pool starts, which would be over otherwise
    yield _kill(lab, _start_pool(lab, "pool-kills"), alone, "SIGKILL of the driver at a random point, resumed")


def batch_kills(lab: Lab) -> Iterator[Line]:
    """The same where members go through the network in batches: the bits of each are those it has alone in its batch."""
    alone = lab.run_alone("--members-at-once", "3")
    trial = _start_pool(lab, "batch-kills", "--members-at-once", "3")
    yield _kill(lab, trial, alone, "three members at once, SIGKILL of the driver at a random point, resumed")


def _kill(lab: Lab, trial: Trial, alone: list[Trial], fault: str) -> Line:
    rounds, times = lab.num_rounds * len(alone), lab.size.num_pool_kills
    rng = random.Random(1)
    for number in range(times):
        trial.reach(round(rounds * (number + 0.3) / (times + 0.3)))
        time.sleep(rng.uniform(0, 0.6))
        trial.kill()
        trial.resume("--num-workers", rng.choice("123"))
    trial.finish()
    return trial.pool_line(fault, times, alone)


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
    yield trial.pool_line("MLflow server killed, back after the end; resumed", 1, lab.alone)


def _start_pool(lab: Lab, name: str, *options: str, **environment: str) -> Trial:
    trial = Trial(lab, name, "--num-perturbations", str(lab.size.num_perturbations), *options, **environment)
    trial.start()
    return trial
