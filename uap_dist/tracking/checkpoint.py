"""What is committed of a run: the job, its state after a round, and the records of all rounds up to it."""

import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from uap_dist.errors import ResumeError
from uap_dist.method.state import State
from uap_dist.method.update import Iterate
from uap_dist.rounds.record import RoundRecord

FORMAT = 4  # of the file; incremented when older and newer versions cannot read each other's checkpoints

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class JobRecord:
    """What is the same for all rounds of a run, as JSON values.

    Attributes:
        run_id: MLflow run.
        options: options of the job, with which it is resumed.
        identity: what determines the bits of the result: data, network, config and seed.
        environment: what the bits may depend on beyond that: kinds of devices and versions.
        program: name of the job: compute, finetune or plan.
        part_of: MLflow run to resume instead of this one, which is part of it, such as the run of the pool; None if there is none.
    """

    run_id: str
    options: Mapping[str, Any]
    identity: Mapping[str, Any]
    environment: Mapping[str, Any]
    program: str = "compute"
    part_of: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A committed round.

    Attributes:
        job: that the round belongs to.
        state: after the round.
        history: records of all rounds up to this one; further ones do not belong to it.
        segment: name of the file in which the stored part of the history ends, see `CheckpointStore`; empty if none is stored.
    """

    job: JobRecord
    state: State
    history: Sequence[RoundRecord]
    segment: str = ""

    def to_bytes(self) -> bytes:
        """All but the history, as an .npz file: v and momentum (C×H×W float64), the scale of the log-odds, the rest as JSON."""
        state, file = self.state, io.BytesIO()
        texts = {
            "job": json.dumps(asdict(self.job)),
            "counters": json.dumps([state.num_rounds, state.num_solves, state.num_evaluations]),
            "segment": self.segment,
        }
        arrays: dict[str, Any] = {name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()}
        arrays |= {name: np.asarray(value) for name, value in vars(state.iterate).items()}
        arrays["format"] = np.asarray(FORMAT)
        np.savez(file, **arrays)
        return file.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Checkpoint":
        """Inverse of `to_bytes`, still without its history; ResumeError if another version wrote the file."""
        with np.load(io.BytesIO(data)) as file:
            found = file["format"].item() if "format" in file else 1
            if found != FORMAT:
                raise ResumeError(
                    f"is of another version of uap_dist (its format is {found}, this version reads {FORMAT})"
                )
            v, momentum, scale = (torch.tensor(file[name]) for name in ("v", "momentum", "scale"))
            job, counters, segment = (file[name].tobytes().decode() for name in ("job", "counters", "segment"))
        return cls(JobRecord(**json.loads(job)), State(Iterate(v, momentum, scale), *json.loads(counters)), (), segment)


def check_identity(saved: JobRecord, now: JobRecord) -> None:
    """Check that a resumed job gives the result of the saved one, and log a warning if it may not.

    Raises:
        ResumeError: the result would differ; the message names what does.
    """
    differences = name_differences(saved.identity, now.identity)
    if differences:
        raise ResumeError(
            f"run {saved.run_id} cannot be resumed, because its result would differ: {differences}; restore these, or start a new run"
        )
    differences = name_differences(saved.environment, now.environment)
    if differences:
        logger.warning(
            "resumed in another environment; the bits may differ from those of an uninterrupted run: %s", differences
        )


def name_differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The differences of two mappings in words, such as "seed was 0, is 1"; empty if they are equal."""
    return "; ".join(
        f"{name} was {saved.get(name)}, is {now.get(name)}"
        for name in sorted({*saved, *now})
        if saved.get(name) != now.get(name)
    )
