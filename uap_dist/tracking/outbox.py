"""Background delivery of metrics, in order, to a tracking server that may be down for a while."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from threading import Condition, Event, Thread

from uap_dist.foreign_text import first_line, redact
from uap_dist.rounds.record import RoundRecord

SECONDS_BETWEEN_ATTEMPTS = 5.0
SECONDS_BETWEEN_LAST_ATTEMPTS = 0.5  # when the queue is being closed
MAX_RECORDS_AT_ONCE = 50

logger = logging.getLogger(__name__)


class Outbox:
    """A queue of records with a thread that delivers them, and retries until they are accepted.

    Attributes:
        failure: error of the last delivery; None after a success.
    """

    def __init__(self, send: Callable[[Sequence[RoundRecord]], None]) -> None:
        """Start the thread.

        Args:
            send: delivers some records, in order. If it raises, none of them are taken to have arrived, and they are sent again.
        """
        self._send = send
        self._waiting: deque[RoundRecord] = deque()
        self._changed = Condition()
        self._closing = Event()
        self.failure: Exception | None = None
        self._last_success = time.monotonic()
        Thread(target=self._deliver, name="outbox", daemon=True).start()

    def put(self, record: RoundRecord) -> None:
        """Add a record to the queue; returns at once."""
        with self._changed:
            self._waiting.append(record)
            self._changed.notify_all()

    def close(self, timeout_s: float) -> int:
        """Wait until the queue is empty, or nothing was delivered for `timeout_s` seconds; return the number of records left."""
        self._closing.set()
        with self._changed:
            self._last_success = time.monotonic()
            while self._waiting and (left_s := self._last_success + timeout_s - time.monotonic()) > 0:
                self._changed.wait(left_s)
            return len(self._waiting)

    def _deliver(self) -> None:
        failing = False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                records = list(self._waiting)[:MAX_RECORDS_AT_ONCE]
            try:
                self._send(records)
            except Exception as error:  # whatever it is, the computation continues
                if not failing:
                    logger.warning(
                        "the tracking server does not accept metrics, which are kept and sent again: %s",
                        redact(first_line(error)),
                    )
                failing, self.failure = True, error
                if self._closing.wait(SECONDS_BETWEEN_ATTEMPTS):
                    time.sleep(SECONDS_BETWEEN_LAST_ATTEMPTS)
                continue
            if failing:
                logger.info("the tracking server accepts metrics again")
            failing, self.failure = False, None
            with self._changed:
                self._last_success = time.monotonic()
                for _ in records:
                    self._waiting.popleft()
                self._changed.notify_all()
