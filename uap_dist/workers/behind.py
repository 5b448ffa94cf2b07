"""Values that are still being made while others go on."""

from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread
from typing import TypeVar

T = TypeVar("T")


def behind(make: Callable[[], T]) -> Future[T]:
    """What a function returns or raises. It runs in a thread that the process does not wait for at its end."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(make())
        except BaseException as error:
            future.set_exception(error)

    Thread(target=run, name="behind", daemon=True).start()
    return future


def known(value: T) -> Future[T]:
    """A value that is there already."""
    future: Future[T] = Future()
    future.set_result(value)
    return future
