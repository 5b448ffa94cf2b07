"""Drivers that are killed or stopped."""

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from faults.lab import Lab
from faults.runs import Line, Trial


def driver_kills(lab: Lab) -> Iterator[Line]:
    """SIGKILL to the driver at random points."""
    rng, trial, times = random.Random(0), Trial(lab, "driver-kills"), 0
    trial.start()
    while times < lab.size.num_driver_kills and trial.rounds < lab.num_rounds - 6:
        trial.reach(trial.rounds + rng.choice((1, 1, 2, 3)))
        time.sleep(rng.uniform(0, 0.3))
        trial.kill()
        times += 1
        trial.resume("--num-workers", rng.choice("123"))
    trial.finish()
    yield trial.line("SIGKILL of the driver at a random point, resumed with 1 to 3 workers", times)


def job_stop(lab: Lab) -> Iterator[Line]:
    """`ray job submit`, `ray job stop`, then resume."""

    def ray_job(*words: str) -> None:
        command = [Path(sys.executable).with_name("ray"), "job", words[0], "--address", lab.cluster.dashboard]
        done = subprocess.run([*command, *words[1:]], env=lab.cluster.env, capture_output=True, text=True, timeout=90)
        assert done.returncode == 0, done.stdout + done.stderr

    trial, job = Trial(lab, "job-stop"), "job-stop"
    ray_job("submit", "--no-wait", "--submission-id", job, "--", *trial.command)
    lab.wait(lambda: trial.rounds >= lab.num_rounds // 7)
    with lab.paused():
        ray_job("stop", job)
    assert lab.cluster.job_status(job) == "STOPPED"
    trial.endings.append(trial.run.info.status)
    assert trial.endings == ["KILLED"], trial.endings
    trial.resume()
    trial.finish()
    yield trial.line("`ray job stop`, resumed", 1)
