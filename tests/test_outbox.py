import time

from uap_dist.rounds.record import RoundRecord
from uap_dist.tracking import outbox
from uap_dist.tracking.outbox import Outbox

RECORDS = [RoundRecord(step, step, {}) for step in range(1, 121)]


class Server:
    def __init__(self):
        self.away, self.taken, self.tries = False, [], 0

    def take(self, records):
        self.tries += 1
        if self.away:
            raise OSError("away\nand more")
        self.taken += records


def test_all_arrive_once_and_in_order():
    server = Server()
    box = Outbox(server.take)
    for record in RECORDS:
        box.put(record)
    assert box.close(10) == 0 and server.taken == RECORDS


def test_an_outage_delays_delivery_but_loses_nothing_and_blocks_nobody(monkeypatch, caplog):
    monkeypatch.setattr(outbox, "SECONDS_BETWEEN_ATTEMPTS", 0.1)
    server = Server()
    box = Outbox(server.take)
    box.put(RECORDS[0])
    while not server.taken:
        time.sleep(0.01)
    server.away = True
    started = time.monotonic()
    for record in RECORDS[1:]:
        box.put(record)
    assert time.monotonic() - started < 1
    while server.tries < 4:
        time.sleep(0.01)
    server.away = False
    assert box.close(10) == 0 and server.taken == RECORDS
    assert caplog.text.count("the tracking server does not accept metrics, which are kept and sent again: away") == 1


def test_what_is_undelivered_at_the_end_is_counted():
    server = Server()
    server.away = True
    box = Outbox(server.take)
    for record in RECORDS[:7]:
        box.put(record)
    assert box.close(0.2) == 7 and not server.taken


def test_a_slow_server_is_waited_for_as_long_as_it_accepts_something():
    server = Server()

    def take_slowly(records):
        time.sleep(0.4)
        server.take(records)

    box = Outbox(take_slowly)
    for record in RECORDS:  # in three deliveries, longer than the timeout together
        box.put(record)
    assert box.close(0.8) == 0 and server.taken == RECORDS
