"""MLflow servers that are away."""

import time
from collections.abc import Iterator

from faults.lab import Lab, Server
from faults.runs import Line, Trial


def tracking_outage(lab: Lab) -> Iterator[Line]:
    """The MLflow server is killed, and started again during the run."""
    server = Server(lab)
    trial = Trial(lab, "outage", MLFLOW_TRACKING_URI=server.uri)
    trial.start()
    trial.reach(lab.num_rounds // 12)
    server.stop()
    before, started = trial.rounds, time.monotonic()
    trial.reach(before + lab.num_rounds // 4)
    pace = (trial.rounds - before) / (time.monotonic() - started)
    with lab.paused():
        server.start()
    trial.finish()
    yield trial.line(f"MLflow server killed for a while; {pace:.1f} rounds/s meanwhile", 1)


def tracking_outage_at_end(lab: Lab) -> Iterator[Line]:
    """The MLflow server is killed, and back only after the run has ended."""
    server = Server(lab)
    trial = Trial(lab, "outage-at-end", MLFLOW_TRACKING_URI=server.uri)
    trial.start()
    trial.reach(lab.num_rounds // 12)
    server.stop()
    trial.finish("RUNNING")
    assert (trial.folder / "out/result.json").exists(), trial.errors
    server.start()
    trial.resume()
    trial.finish()
    yield trial.line("MLflow server killed, back after the end; resumed", 1)
