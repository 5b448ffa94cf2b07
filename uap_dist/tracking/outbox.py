"""Metrics on their way to a tracking server that may be away: delivered in order by a thread, so that nobody waits."""

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from threading import Condition, Event, Thread

from uap_dist.foreign_text import first_line, redact
from uap_dist.tracking.history import RoundRecord

SECONDS_BETWEEN_TRIES, SECONDS_BETWEEN_LAST_TRIES = 5.0, 0.5
MAX_RECORDS_AT_ONCE = 50

logger = logging.getLogger(__name__)


class Outbox:
    """Keeps records until `send` has taken them."""

    def __init__(self, send: Callable[[Sequence[RoundRecord]], None]) -> None:
        """Send some records at once, in order; an exception means that none of them arrived, and they are sent again."""
        self._send = send
        self._waiting: deque[RoundRecord] = deque()
        self._changed = Condition()
        self._closing = Event()
        self.failure: Exception | None = None  # of the last try
        Thread(target=self._deliver, name="outbox", daemon=True).start()

    def put(self, record: RoundRecord) -> None:
        """Take a record; returns at once."""
        with self._changed:
            self._waiting.append(record)
            self._changed.notify_all()

    def close(self, timeout_s: float) -> int:
        """Wait so long for the rest to be delivered; the number of records that were not."""
        deadline = time.monotonic() + timeout_s
        self._closing.set()
        with self._changed:
            self._changed.wait_for(lambda: not self._waiting, timeout=max(0.0, deadline - time.monotonic()))
            return len(self._waiting)

    def _deliver(self) -> None:
        failing = False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting)
                records = list(self._waiting)[:MAX_RECORDS_AT_ONCE]
            try:
                self._send(records)
            except Exception as error:  # whatever it is, the computation goes on
                if not failing:
                    logger.warning("metrics wait for the tracking server: %s", redact(first_line(error)))
                failing, self.failure = True, error
                if self._closing.wait(SECONDS_BETWEEN_TRIES):
                    time.sleep(SECONDS_BETWEEN_LAST_TRIES)
                continue
            if failing:
                logger.info("the tracking server takes metrics again")
            failing, self.failure = False, None
            with self._changed:
                for _ in records:
                    self._waiting.popleft()
                self._changed.notify_all()
