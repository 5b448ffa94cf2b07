"""What a commit costs: the time that it takes from the driver, and how long it takes in its thread. See benchmarks/chaos.md.

python benchmarks/checkpoint.py
"""

import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from uap_dist.method.state import State
from uap_dist.method.update import Iterate
from uap_dist.rounds.record import RoundRecord
from uap_dist.tracking.checkpoint import Checkpoint, JobRecord
from uap_dist.tracking.checkpoint_store import CheckpointStore

SHAPE = (3, 224, 224)
NUM_METRICS = 17  # of a round that was measured on all images
ROUND_S = 1.0
NUM_ROUNDS = 15


def main() -> None:
    """Rounds of one second that do nothing but commit, after different numbers of earlier rounds."""
    print(
        "| rounds before | file, MB | commit takes from the driver, ms | commit takes in its thread, ms | thread, share of a round of 1 s |"
    )
    print("| --- | --- | --- | --- | --- |")
    job = JobRecord("0" * 32, {}, {}, {})
    for num_before in (0, 100, 1_000, 10_000):
        history = [_record(step) for step in range(num_before)]
        waits, writes = [], []
        with tempfile.TemporaryDirectory() as folder, CheckpointStore(folder) as store:
            for number in range(num_before, num_before + NUM_ROUNDS):
                history.append(_record(number))
                state = State(Iterate(*torch.rand(2, *SHAPE, dtype=torch.float64)), number)
                started = time.perf_counter()
                store.commit(Checkpoint(job, state, tuple(history)))
                waits.append(time.perf_counter() - started)
                store.wait()
                writes.append(time.perf_counter() - started)
                time.sleep(ROUND_S - writes[-1])
            size = max(path.stat().st_size for path in Path(folder).iterdir())
        print(
            f"| {num_before:,} | {size / 1e6:.1f} | {1000 * median(waits):.2f} | {1000 * median(writes):.1f} "
            f"| {median(writes) / ROUND_S:.1%} |"
        )


def _record(step: int) -> RoundRecord:
    return RoundRecord(step, 1_700_000_000_000 + step, {f"fooling_rate/name_{i}": step / 7 for i in range(NUM_METRICS)})


if __name__ == "__main__":
    main()
