"""Several computations on the same workers at once, so that no worker is idle while one computation reduces its round."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from math import ceil
from queue import SimpleQueue
from threading import Event, Thread

from uap_dist.method.config import ComputeConfig
from uap_dist.method.state import RoundReport
from uap_dist.workers.local import Workers

Result = tuple[str, RoundReport | BaseException | None]  # name of a computation; None when it has ended


def compute_concurrently(
    computations: Mapping[str, Iterator[RoundReport]], *, limit: Callable[[], int]
) -> Iterator[tuple[str, RoundReport]]:
    """Run several computations at once and yield the name of a computation and its report after each of its rounds.

    Each computation runs in a thread of its own and does not wait for the caller to consume its reports. Work that must be done
    before its next round therefore belongs into the computation. Reports that have not been consumed yet are kept, so pass
    computations whose reports are small (see `keep_last_arrays`).

    Args:
        computations: iterators over reports, by name. They start in this order, a new one whenever another one ends.
        limit: how many may run at once; called again after every round.

    Raises:
        BaseException: the first exception that a computation raises. After it, or when the caller stops iterating, every other
            computation ends after its current round.
    """
    results: SimpleQueue[Result] = SimpleQueue()
    is_over = Event()

    def advance(name: str) -> None:
        try:
            for report in computations[name]:
                results.put((name, report))
                if is_over.is_set():
                    return
            results.put((name, None))
        except BaseException as error:
            results.put((name, error))

    waiting, num_active, num_left = iter(computations), 0, len(computations)
    try:
        while num_left:
            for name in islice(waiting, max(0, limit() - num_active)):
                # daemon threads, because nobody waits for them when the job is interrupted
                Thread(target=advance, args=(name,), name=f"compute-{name}", daemon=True).start()
                num_active += 1
            name, result = results.get()
            if isinstance(result, BaseException):
                raise result
            if result is None:
                num_active, num_left = num_active - 1, num_left - 1
            else:
                yield name, result
    finally:
        is_over.set()


def keep_last_arrays(reports: Iterable[RoundReport]) -> Iterator[RoundReport]:
    """The reports of a computation without their arrays, except for the last one: fast computations queue many of them."""
    for report in reports:
        yield report if report.is_last else report.without_arrays()


def concurrency_limit(workers: Workers, config: ComputeConfig) -> Callable[[], int]:
    """The `limit` of `compute_concurrently` that keeps all workers busy, also those that join later."""
    return lambda: num_concurrent(workers.num_workers, config)


def num_concurrent(num_workers: int, config: ComputeConfig) -> int:
    """How many computations keep the workers busy: one more than have a block for each worker."""
    return 1 + ceil(num_workers * config.block_size / config.round_size)
