"""Several computations at once on the same workers, so that none idles while one of them reduces its round."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from math import ceil
from queue import SimpleQueue
from threading import Event, Thread

from uap_dist.method.config import ComputeConfig
from uap_dist.method.state import RoundReport
from uap_dist.workers.local import Workers

Answer = tuple[str, RoundReport | BaseException | None]  # of a computation by name: a round, its failure, or its end


def compute_together(
    computations: Mapping[str, Iterator[RoundReport]], *, at_once: Callable[[], int]
) -> Iterator[tuple[str, RoundReport]]:
    """Reports of all computations as their rounds are done, each with the name of its computation.

    Each is advanced by a thread of its own, and waits for nobody who iterates over the reports: what is to be done
    before its next round belongs into the computation. Reports that nobody has taken yet are kept, so give computations
    whose reports are small (see `keep_last`).

    Args:
        computations: by name; begun in this order, the next one when another ends.
        at_once: how many shall share the workers; asked again after every round.

    Raises:
        BaseException: the first that a computation raises. Then, and when nobody iterates any more, the others end
            after the round that they are in.
    """
    answers: SimpleQueue[Answer] = SimpleQueue()
    is_over = Event()

    def advance(name: str) -> None:
        try:
            for report in computations[name]:
                answers.put((name, report))
                if is_over.is_set():
                    return
            answers.put((name, None))
        except BaseException as error:
            answers.put((name, error))

    waiting, num_active, num_left = iter(computations), 0, len(computations)
    try:
        while num_left:
            for name in islice(waiting, max(0, at_once() - num_active)):
                # daemons, because nobody waits for them when the job is interrupted
                Thread(target=advance, args=(name,), name=f"compute-{name}", daemon=True).start()
                num_active += 1
            name, answer = answers.get()
            if isinstance(answer, BaseException):
                raise answer
            if answer is None:
                num_active, num_left = num_active - 1, num_left - 1
            else:
                yield name, answer
    finally:
        is_over.set()


def keep_last(reports: Iterable[RoundReport]) -> Iterator[RoundReport]:
    """The reports, all but the last without their arrays: they wait where computations are ahead of who iterates over them."""
    for report in reports:
        yield report if report.is_last else report.without_arrays()


def keep_busy(workers: Workers, config: ComputeConfig) -> Callable[[], int]:
    """How many computations of a config keep all workers busy, asked each time, since workers may join."""
    return lambda: at_once(workers.num_workers, config)


def at_once(num_workers: int, config: ComputeConfig) -> int:
    """How many computations of a config keep so many workers busy: one more than have a block for each."""
    return 1 + ceil(num_workers * config.block_size / config.round_size)
