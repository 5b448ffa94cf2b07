"""Faults of workers, and none: other numbers of workers."""

import time
from collections.abc import Iterator

from networks import NETWORKS

from faults.lab import Lab
from faults.runs import Line, Trial
from faults.victim import BUG, SECONDS_PER_BLOCK


def worker_counts(lab: Lab) -> Iterator[Line]:
    """No fault, but other numbers of workers."""
    for count in lab.size.worker_counts:
        trial = Trial(lab, f"workers-{count}", "--num-workers", str(count))
        trial.start()
        trial.finish()
        yield trial.line(f"none, {count} workers", 0)


def real_networks(lab: Lab) -> Iterator[Line]:
    """No fault, but other numbers of workers, on real networks and images."""
    for name, evaluations in (("squeezenet", 1_500), ("resnet20", 3_000)):
        network, trials = NETWORKS[name], []
        model, weights = network.locate(lab.data)
        for count in lab.size.worker_counts:
            trial = Trial(lab, f"{name}-{count}")
            trial.options = (
                *("--model", model, "--weights", str(weights), "--num-workers", str(count)),
                *("--train-shards", f"{lab.data / network.train}", "--num-train-images", str(network.num_train_images)),
                *("--val-shards", f"{lab.data / network.val}", "--num-val-images", "500"),
                *("--max-evaluations", str(evaluations), "--evaluate-every", "1000"),
            )
            trial.start()
            trial.finish()
            trials.append(trial)
            digest = trial.result["perturbation_sha256"]
            fault = f"none, {name}, {evaluations:,} evaluations, {count} workers: {digest[:12]}…"
            yield trial.line(fault, 0, trials[0])


def worker_kills(lab: Lab) -> Iterator[Line]:
    """SIGKILL to workers in the middle of blocks."""
    trial, targets = Trial(lab, "worker-kills"), range(3, lab.num_rounds - 5, 8)
    trial.start()
    for number in targets:
        trial.reach(number)
        time.sleep(SECONDS_PER_BLOCK / 2)
        lab.worker().kill()
    trial.finish()
    yield trial.line("SIGKILL of a worker in mid-block", len(targets))


def worker_exits(lab: Lab) -> Iterator[Line]:
    """A worker exits."""
    yield _lose_worker(lab, "exit", "a worker exits in mid-block")


def worker_fills_memory(lab: Lab) -> Iterator[Line]:
    """A worker fills its memory until Ray ends it."""
    yield _lose_worker(lab, "fill-memory", "a worker fills its memory")


def _lose_worker(lab: Lab, flag: str, fault: str) -> Line:
    trial = Trial(lab, flag)
    trial.start()
    trial.reach(lab.num_rounds // 12)
    lab.flag(flag)
    trial.finish()
    lost = trial.result["provenance"]["num_workers_lost"]  # Ray's memory monitor may end another before the right one
    assert lost >= 1, "no worker was lost"
    return trial.line(f"{fault} ({lost} lost)", 1)


def worker_raises(lab: Lab) -> Iterator[Line]:
    """A bug is no lost worker: the run fails, and goes on once the bug is gone."""
    trial = Trial(lab, "raise")
    trial.start()
    trial.reach(lab.num_rounds // 12)
    lab.flag("raise")
    trial.finish("FAILED")
    assert BUG in trial.errors, trial.errors
    trial.resume()
    trial.finish()
    yield trial.line("a worker raises an error; resumed", 1)


def worker_hangs(lab: Lab) -> Iterator[Line]:
    """SIGSTOP to a worker: overtaken by another, and taken for lost after its deadline."""
    trial = Trial(lab, "hang", "--task-timeout-s", "6")
    trial.start()
    trial.reach(lab.num_rounds // 12)
    lab.worker().suspend()
    trial.finish()
    yield trial.line("SIGSTOP of a worker", 1)
