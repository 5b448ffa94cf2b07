"""Runs under faults, and what is kept of them."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from faults.lab import Lab

ROOT = Path(__file__).resolve().parents[2]
JOB = ROOT / "jobs/compute.py"
VICTIM = f"{Path(__file__).resolve().with_name('victim.py')}:Victim"
# of a job, by how it leaves its MLflow run; RUNNING without MLflow
EXIT_CODES = {"FINISHED": 0, "FAILED": 1, "RUNNING": 1}


@dataclass
class Line:
    """A row of the table."""

    row: str
    fault: str
    times: int
    ended: str
    same_bits: bool
    metrics_complete: bool
    seconds_lost: float
    date: str = ""
    commit: str = ""

    @property
    def is_good(self) -> bool:
        """Whether the fault did no harm."""
        return self.ended.endswith("FINISHED") and self.same_bits and self.metrics_complete


class Trial:
    """One run under a fault: a first process, and those that resume it."""

    def __init__(self, lab: "Lab", name: str, *options: str, **environment: str) -> None:
        self.lab, self.name = lab, name
        self.options, self.environment = (*lab.options, *options), lab.cluster.env | environment
        self.folder = lab.folder / name
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.started = time.monotonic()
        self.endings: list[str] = []
        self.seconds = 0.0
        self.process: subprocess.Popen[bytes] | None = None
        lab.trials.append(self)

    @property
    def command(self) -> tuple[str, ...]:
        """What starts the job."""
        return sys.executable, str(JOB), *self.options, "--experiment", self.name, "--output", str(self.folder / "out")

    def start(self) -> None:
        """The job, from its beginning."""
        self._start(self.command)

    def resume(self, *options: str) -> None:
        """Go on from the checkpoints."""
        self._start((sys.executable, str(JOB), "--resume", str(self.checkpoints), *options))

    def _start(self, command: tuple[str, ...]) -> None:
        with (self.folder / "errors").open("w") as errors:
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=self.environment, stdout=subprocess.DEVNULL, stderr=errors
            )

    @property
    def run(self) -> Any:
        """The newest MLflow run, a pool's own."""
        experiment = self.lab.client.get_experiment_by_name(self.name)
        assert experiment is not None, f"{self.name} has no MLflow run: {self.errors}"
        runs = self.lab.client.search_runs([experiment.experiment_id], order_by=["attributes.start_time DESC"])
        return [run for run in runs if "mlflow.parentRunId" not in run.data.tags][0]

    @property
    def checkpoints(self) -> Path:
        """The run's folder of commits."""
        return self.folder / "checkpoints" / self.run.info.run_id

    @property
    def errors(self) -> str:
        """What the newest process wrote to stderr."""
        return (self.folder / "errors").read_text()

    @property
    def rounds(self) -> int:
        """Committed so far, by all members of a pool."""
        newest: dict[Path, int] = {}
        for pattern in ("*/round-*", "*/seed-*/round-*"):
            for path in (self.folder / "checkpoints").glob(pattern):
                newest[path.parent] = max(newest.get(path.parent, 0), int(path.name.split("-")[1]))
        return sum(newest.values())

    def reach(self, number: int) -> None:
        """Return when so many rounds are committed."""
        assert self.process is not None
        self.lab.wait(lambda: self.rounds >= number or self.process.poll() is not None)
        assert self.rounds >= number, f"{self.name} ended before round {number}: {self.errors}"

    def kill(self) -> None:
        """SIGKILL to the driver, which must still be at work."""
        assert self.process is not None
        assert self.process.poll() is None, f"{self.name} ended before it was killed: {self.errors}"
        self.process.kill()
        self.process.wait()
        self.endings.append("driver killed")

    def finish(self, expected: str = "FINISHED") -> None:
        """Wait for the job's end, which must leave this status in MLflow."""
        assert self.process is not None
        self.lab.wait(lambda: self.process.poll() is not None)
        self.seconds = time.monotonic() - self.started
        self.endings.append(self.run.info.status)
        found = (self.endings[-1], self.process.returncode)
        assert found == (expected, EXIT_CODES[expected]), f"{self.name} ended {found}: {self.errors}"
        assert "Traceback" not in self.errors, self.errors

    @property
    def ending(self) -> str:
        """How its processes ended, one after another."""
        return ", then ".join(
            f"{e} × {self.endings.count(e)}".removesuffix(" × 1") for e in dict.fromkeys(self.endings)
        )

    @property
    def result(self) -> dict[str, Any]:
        """What the finished run has written of its perturbation, or pool."""
        return json.loads((self.folder / "out/result.json").read_text())

    def line(self, fault: str, times: int, undisturbed: "Trial | None" = None) -> Line:
        """Compare the end with that of the undisturbed run."""
        reference = undisturbed or self.lab.undisturbed
        same = self.result["perturbation_sha256"] == reference.result["perturbation_sha256"]
        complete = self.lab.has_all_metrics(self.result["mlflow_run_id"], reference.result["num_rounds"])
        return Line("", fault, times, self.ending, same, complete, round(self.seconds - reference.seconds, 1))

    def pool_line(self, fault: str, times: int, alone: "list[Trial]") -> Line:
        """Compare each member with the run that its seed has alone."""
        pairs = list(zip(self.result["members"].values(), alone, strict=True))
        same = all(m["perturbation_sha256"] == other.result["perturbation_sha256"] for m, other in pairs)
        complete = all(self.lab.has_all_metrics(m["mlflow_run_id"], other.result["num_rounds"]) for m, other in pairs)
        lost = round(self.seconds - sum(other.seconds for _, other in pairs), 1)
        return Line("", f"a pool of {len(pairs)}: {fault}", times, self.ending, same, complete, lost)
