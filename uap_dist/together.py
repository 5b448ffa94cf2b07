"""Several computations at once on the same workers, so that none idles while one of them reduces its round."""

from collections.abc import Iterator, Mapping
from itertools import islice
from queue import SimpleQueue
from threading import Thread

from uap_dist.compute import RoundReport

Answer = tuple[str, RoundReport | BaseException]


def compute_together(
    computations: Mapping[str, Iterator[RoundReport]], *, at_once: int
) -> Iterator[tuple[str, RoundReport]]:
    """Reports of all computations as their rounds are done, each with the name of its computation.

    Each is advanced by a thread of its own; who iterates over the reports stays in one thread, and no round waits for it.

    Args:
        computations: by name, as `compute` gives them; begun in this order, the next one when another ends.
        at_once: how many share the workers.

    Raises:
        BaseException: the first that a computation raises; the others are then left where they are.
    """
    answers: SimpleQueue[Answer] = SimpleQueue()

    def advance(name: str) -> None:
        try:
            for report in computations[name]:
                answers.put((name, report))
        except BaseException as error:
            answers.put((name, error))

    def begin(name: str) -> None:
        # no one waits for these threads when the job is interrupted
        Thread(target=advance, args=(name,), name=f"compute-{name}", daemon=True).start()

    waiting = iter(computations)
    for name in islice(waiting, at_once):
        begin(name)
    num_left = len(computations)
    while num_left:
        name, answer = answers.get()
        if isinstance(answer, BaseException):
            raise answer
        if answer.is_last:
            num_left -= 1
            for successor in islice(waiting, 1):
                begin(successor)
        yield name, answer
