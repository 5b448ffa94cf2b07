"""The run of one perturbation: its rounds are committed and tracked, its results are saved and uploaded to MLflow."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from math import ceil
from pathlib import Path
from typing import Any

from uap_dist.computing.provenance import HELD_OUT_KEYS, describe_member, with_held_out
from uap_dist.computing.report import FinishedRun, save_run
from uap_dist.evaluation.evaluate import measure_noise
from uap_dist.method.config import ComputeConfig
from uap_dist.method.norms import random_of_same_norms
from uap_dist.method.state import RoundReport
from uap_dist.rounds.loop import compute
from uap_dist.rounds.plan import describe_steps
from uap_dist.rounds.record import RoundRecord
from uap_dist.tracking.checkpoint import Checkpoint
from uap_dist.tracking.checkpoint_store import CheckpointStore
from uap_dist.tracking.mlflow_run import Tracker
from uap_dist.tracking.mlflow_server import CHECKPOINTS_TAG
from uap_dist.workers.dataset import Dataset
from uap_dist.workers.local import Workers

MAX_LOGGED = 320  # rounds of a run in MLflow: as many points as its charts show


def is_logged(record: RoundRecord, num_rounds: int | None) -> bool:
    """Whether MLflow gets a round: of a run of n rounds each (n/MAX_LOGGED)th, rounded up, and all that are measured.

    MLflow stores a metric in a tenth of a millisecond, so the twenty of a round take as long as a quick round itself.
    """
    every = ceil((num_rounds or 1) / MAX_LOGGED)
    return record.step % every == 0 or record.step == 1 or "fooling_rate/val" in record.metrics


class TrackedRun:
    """The computation of one perturbation with its checkpoints and its MLflow run.

    Attributes:
        config: of the computation.
        state: state from which the computation continues.
        folder: folder of the results.
        is_computed: whether the last round is over.
        finished: what the computation measured; None until `finish`.
    """

    def __init__(
        self, config: ComputeConfig, checkpoint: Checkpoint, *, store: CheckpointStore, folder: Path, tracker: Tracker
    ) -> None:
        """Commit the checkpoint, so that the run can be resumed from now on.

        Args:
            config: of the computation.
            checkpoint: where the computation continues.
            store: of its checkpoints.
            folder: folder of the results.
            tracker: of its MLflow run.

        Raises:
            ConfigError: the storage cannot be written to.
        """
        self.config, self.state, self.folder = config, checkpoint.state, folder
        self.is_computed = False
        self._job, self._history = checkpoint.job, list(checkpoint.history)
        self._store, self._tracker = store, tracker
        self.finished: FinishedRun | None = None
        store.start(checkpoint)
        tracker.set_tag(CHECKPOINTS_TAG, store.location)

    def rounds(
        self, workers: Workers, train: Dataset, held_out: Future[Dataset], num_computations: Callable[[], int]
    ) -> Iterator[RoundReport]:
        """Compute the remaining rounds, and have them committed and tracked; arguments as for `compute`.

        Raises:
            ResumeError: other held-out images were measured before.
        """
        are_known = False
        for report in compute(workers, train, held_out, self.config, self.state, num_computations=num_computations):
            if held_out.done() and not are_known:
                self._job, are_known = with_held_out(self._job, held_out.result()), True
            self._history.append(RoundRecord.of(report, workers.metrics(), self._history))
            if report.has_arrays and not report.is_last:
                self._store.commit(Checkpoint(self._job, report.state, self._history))
            # with the first report also those of earlier processes, which MLflow may lack
            for record in self._history if report.round_number == self.state.num_rounds else self._history[-1:]:
                is_last = report.is_last and record is self._history[-1]
                if is_last or is_logged(record, report.num_rounds):
                    self._tracker.log_round(record)
            self.is_computed = report.is_last
            yield report

    def finish(
        self,
        report: RoundReport,
        workers: Workers,
        val: Dataset,
        provenance: Mapping[str, Any],
        class_names: Sequence[str],
    ) -> None:
        """Measure the random baseline and write the results.

        Args:
            report: of the last round.
            workers: classify the images.
            val: held-out images.
            provenance: of the job: network, data, config, versions. What differs for this run is replaced.
            class_names: names of the network's labels; empty if unknown.
        """
        config = self.config
        steps = describe_steps(report.num_rounds, val.shape, config)
        noise = random_of_same_norms(report.perturbation, seed=config.seed)
        self.finished = FinishedRun(
            final=report,
            history=self._history,
            random_rates=measure_noise(workers, val, noise, config.goal.of_networks(val.clean.networks)),
            val=val,
            provenance=dict(provenance) | describe_member(config) | steps,
            class_names=class_names,
            mlflow_run_id=self._tracker.run_id,
        )
        save_run(self.folder, self.finished, workers)

    def deliver(self, timeout_s: float, tags: Mapping[str, Any]) -> None:
        """Send the remaining metrics, the description and the files to MLflow, and end the MLflow run.

        Args:
            timeout_s: how long to wait for a server that does not answer.
            tags: tags of the run that are known only now.

        Raises:
            TrackingError: the server does not answer; call it again later.
        """
        assert self.finished is not None
        self._tracker.wait_for_delivery(timeout_s)
        final = self.finished.final
        # logged only now, because counting the rounds of a very long run takes seconds, which would delay the first commit
        held_out = {key: value for key, value in self.finished.provenance.items() if key in HELD_OUT_KEYS}
        self._tracker.log_params(describe_steps(final.num_rounds, final.perturbation.shape, self.config) | held_out)
        self._tracker.complete(
            tags=tags,
            metrics=self.finished.random_metrics(),
            step=final.state.num_rounds,
            markdown=self.finished.summary(),
            folder=self.folder,
        )
        self._tracker.finish()
        self._store.forget_newest()
