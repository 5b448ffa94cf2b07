"""Several computations on the same workers at once, so that no worker is idle while one computation reduces its round."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from math import ceil
from queue import SimpleQueue
from threading import Event, Lock, Thread

from uap_dist.method.config import ComputeConfig
from uap_dist.method.state import RoundReport

Result = tuple[str, RoundReport | BaseException | None]  # name of a computation; None when it has ended


def compute_concurrently(
    computations: Mapping[str, Iterator[RoundReport]], *, limit: Callable[[int], int]
) -> Iterator[tuple[str, RoundReport]]:
    """Run several computations at once and yield the name of a computation and its report after each of its rounds.

    Each computation runs in a thread of its own and does not wait for the caller to consume its reports. Work that must be done
    before its next round therefore belongs into the computation. Reports that have not been consumed yet are kept, so pass
    computations whose reports are small (see `keep_last_arrays`).

    Args:
        computations: iterators over reports, by name. They start in this order, a new one as soon as another one has ended, whether
            or not the caller has consumed its reports.
        limit: how many may run at once, given how many have not ended; called again after every round, in any thread.

    Raises:
        BaseException: the first exception that a computation raises. After it, or when the caller stops iterating, every other
            computation ends after its current round.
    """
    results: SimpleQueue[Result] = SimpleQueue()
    lock, is_over = Lock(), Event()
    waiting, num_active, num_left = iter(computations), 0, len(computations)

    def begin(*, num_ended: int = 0) -> None:
        nonlocal num_active, num_left
        with lock:
            num_active, num_left = num_active - num_ended, num_left - num_ended
            if is_over.is_set() or not num_left:
                return
            for name in islice(waiting, max(0, limit(num_left) - num_active)):
                # daemon threads, because nobody waits for them when the job is interrupted
                Thread(target=advance, args=(name,), name=f"compute-{name}", daemon=True).start()
                num_active += 1

    def advance(name: str) -> None:
        try:
            for report in computations[name]:
                results.put((name, report))
                if is_over.is_set():
                    return
            begin(num_ended=1)  # now, because the caller may take seconds over the last report
            results.put((name, None))
        except BaseException as error:
            results.put((name, error))

    num_seen_to_end = 0
    try:
        while num_seen_to_end < len(computations):
            begin()
            name, result = results.get()
            if isinstance(result, BaseException):
                raise result
            if result is None:
                num_seen_to_end += 1
            else:
                yield name, result
    finally:
        is_over.set()


def keep_last_arrays(reports: Iterable[RoundReport]) -> Iterator[RoundReport]:
    """The reports of a computation without their arrays, except for the last one: fast computations queue many of them."""
    for report in reports:
        yield report if report.is_last else report.without_arrays()


def num_filling(num_workers: int, config: ComputeConfig) -> int:
    """How many computations whose rounds are shared block by block keep the workers busy: one more than have a block for each."""
    return 1 + ceil(num_workers * config.block_size / config.round_size)


def describe_idle(num_workers: int, num_computations: int, config: ComputeConfig) -> str:
    """How many workers cannot be busy, and what would keep them so; empty if all can."""
    if config.members_at_once > 1:
        return _describe_batches(num_workers, num_computations, config.members_at_once)
    num_blocks = config.round_size // config.block_size
    num_busy = num_computations * num_blocks
    if num_busy >= num_workers:
        return ""
    return (
        f"at least {num_workers - num_busy} of {num_workers} workers will have nothing to do: a perturbation keeps at most {num_blocks} "
        f"busy, one for each block of a round (--round-size, --block-size); --num-perturbations {num_workers} would use all of them"
    )


def _describe_batches(num_workers: int, num_computations: int, members_at_once: int) -> str:
    num_batches = ceil(num_computations / members_at_once)
    found = []
    if num_empty := num_batches * members_at_once - num_computations:
        found.append(
            f"{num_empty} of {members_at_once} places of a batch stay empty and take their time all the same: "
            f"--num-perturbations {num_batches * members_at_once} would fill them"
        )
    if num_batches < num_workers:
        batches = f"{num_batches} batch{'es' * (num_batches > 1)}"
        found.append(
            f"{num_workers - num_batches} of {num_workers} workers will have nothing to do: {num_computations} perturbations are "
            f"{batches} of {members_at_once} (--members-at-once), each on one worker; --num-perturbations "
            f"{num_workers * members_at_once} would use all of them"
        )
    return "; ".join(found)


def num_concurrent(num_workers: int, num_left: int, config: ComputeConfig) -> int:
    """How many of the computations that are left to run at once.

    All, if they are few: they take turns, and all workers are busy until the end. Otherwise one more than keep all workers busy,
    in spans as well as in blocks, so that some are finished early. Those that are computed in one batch are all under way.
    """
    if num_left < 2 * num_workers * config.members_at_once:
        return num_left
    if config.members_at_once > 1:
        return (1 + num_workers) * config.members_at_once
    return max(1 + num_workers, num_filling(num_workers, config))
