"""Tasks on a fleet, with real Ray, real actors and real kills."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event, Thread
from urllib.request import urlopen

import numpy as np
import psutil
import pytest
import torch
from conftest import TINY, tiny_worker
from fleets import load, make_fleet, worker_processes

from uap_dist.errors import ConfigError, DeterminismError, WorkerLostError
from uap_dist.fleet.config import FleetConfig, need_of
from uap_dist.fleet.fleet import Fleet
from uap_dist.method.config import ComputeConfig
from uap_dist.rounds.loop import compute
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.messages import Examples
from uap_dist.workers.worker import Worker

CONFIG = ComputeConfig(round_size=20, block_size=5, max_passes=3, radius=20.0)


@pytest.fixture(scope="module")
def undisturbed(shards):
    """The perturbation of CONFIG as a single worker in this process computes it."""
    workers = LocalWorkers(tiny_worker())
    return list(compute(workers, *load(workers, shards), CONFIG))[-1].perturbation


@pytest.mark.parametrize("num_workers", [1, 2])
def test_same_bits_for_any_number_of_workers(local_ray, shards, undisturbed, num_workers):
    fleet = make_fleet(num_workers)
    final = list(compute(fleet, *load(fleet, shards), CONFIG))[-1]
    fleet.close()
    assert torch.equal(final.perturbation, undisturbed)


def visible_gpus(worker, task):
    return os.environ.get("CUDA_VISIBLE_DEVICES")


@pytest.mark.parametrize(("gpus_per_worker", "visible"), [(0, {""}), (1, {"0", "1"})])
def test_a_worker_sees_only_the_gpus_that_it_has_asked_for(local_ray, shards, gpus_per_worker, visible):
    fleet = make_fleet(2, gpus_per_worker=gpus_per_worker)
    assert set(fleet.map(visible_gpus, load(fleet, shards)[0].blocks(5))) <= visible
    fleet.close()


def test_same_bits_with_local_steps_for_one_two_and_three_workers_and_through_a_kill(local_ray, shards):
    config = replace(CONFIG, round_size=30, block_size=10, local_steps=5, period=8)
    finals = []
    for num_workers in (1, 2, 3):
        fleet = make_fleet(num_workers, gpus_per_worker=0.5, verify_determinism=num_workers == 2)
        for report in compute(fleet, *load(fleet, shards), config):
            if num_workers == 3 and report.round_number == 1:
                os.kill(worker_processes()[0].pid, signal.SIGKILL)
        fleet.close()
        finals.append(report.state.iterate)
    for other in finals[1:]:
        assert torch.equal(other.v, finals[0].v) and torch.equal(other.momentum, finals[0].momentum)


def test_a_killed_worker_is_replaced_and_the_bits_stay(local_ray, shards, undisturbed):
    fleet = make_fleet(2)
    data = load(fleet, shards)
    for report in compute(fleet, *data, CONFIG):
        if report.round_number in (1, 4):
            os.kill(worker_processes()[0].pid, signal.SIGKILL)
        final = report
    lost = fleet.stats.workers_lost
    fleet.close()
    assert lost >= 1 and torch.equal(final.perturbation, undisturbed)


def test_a_hanging_worker_is_given_up_after_its_deadline(local_ray, shards):
    fleet = make_fleet(1, task_timeout_s=4)
    stopped = worker_processes()[0].pid
    Thread(
        target=lambda: (time.sleep(30), os.kill(stopped, signal.SIGCONT) if psutil.pid_exists(stopped) else None),
        daemon=True,
    ).start()
    os.kill(stopped, signal.SIGSTOP)
    (listing,) = fleet.map(Worker.load, [Examples(str(shards / "val-0000.tar"))])
    lost = fleet.stats.workers_lost
    fleet.close()
    assert len(listing.keys) == 20 and lost == 1


def test_a_straggler_is_overtaken_and_its_late_answer_is_dropped(local_ray, shards):
    fleet = make_fleet(2)
    train, _ = load(fleet, shards)
    slow = worker_processes()[0].pid
    os.kill(slow, signal.SIGSTOP)
    tasks = [train.examples(0, [i]) for i in range(20)]
    first = list(fleet.map(Worker.pixels, tasks))  # otherwise this would take until the deadline of 900 s
    stragglers = fleet.stats.stragglers
    os.kill(slow, signal.SIGCONT)
    second = list(fleet.map(Worker.pixels, tasks[::-1]))[::-1]
    lost = fleet.stats.workers_lost
    fleet.close()
    assert stragglers == 1 and lost == 0
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_block_that_kills_three_workers_is_named(local_ray, shards):
    fleet = Fleet(TINY.replace(":Tiny", ":Deadly"), None, FleetConfig(num_workers=1))
    fleet.wait()
    train, _ = load(fleet, shards)
    zero = np.zeros((1, 3, 16, 16), np.float32)
    message = r"3 workers were lost over the same examples of .*train-0000.tar: s1-000, s1-001, s1-002 \(the last one: its process died\)"
    with pytest.raises(WorkerLostError, match=f"{message}; look at memory"):
        list(fleet.map(Worker.classify, [train.examples(0, range(size)) for size in (2, 3, 4)], zero))
    fleet.close()


def test_a_network_that_differs_between_workers_is_found_and_named(local_ray, shards):
    fleet = Fleet(TINY.replace(":Tiny", ":OwnPerProcess"), None, FleetConfig(num_workers=2, verify_determinism=True))
    fleet.wait()
    with pytest.raises(DeterminismError, match=r"different bits for the same examples of .*train-000\d.tar: s1-0\d\d"):
        list(compute(fleet, *load(fleet, shards), CONFIG))
    fleet.close()


def test_verifying_changes_no_bits_and_survives_a_kill(local_ray, shards, undisturbed):
    fleet = make_fleet(2, verify_determinism=True)
    for report in compute(fleet, *load(fleet, shards), CONFIG):
        if report.round_number == 2:
            os.kill(worker_processes()[0].pid, signal.SIGKILL)
        final = report
    fleet.close()
    assert torch.equal(final.perturbation, undisturbed)


def test_callers_share_the_workers_and_each_gets_its_own_answers(local_ray, shards, undisturbed):
    fleet = make_fleet(2)
    data = load(fleet, shards)
    configs = [replace(CONFIG, seed=seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(lambda config: list(compute(fleet, *data, config))[-1].perturbation, configs))
    with pytest.raises(KeyError):
        next(fleet.map(Worker.pixels, [replace(data[0].examples(0, [1]), keys=("absent",))]))
    alone = [list(compute(fleet, *data, config))[-1].perturbation for config in configs]
    fleet.close()
    assert torch.equal(together[0], undisturbed)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("where", ["step", "accept"])
def test_no_caller_waits_for_a_dispatch_thread_that_died(local_ray, shards, monkeypatch, where):
    fleet = make_fleet(1)
    train, _ = load(fleet, shards)

    def die(*_):
        raise SystemExit

    monkeypatch.setattr(fleet._dispatcher, where, die)
    with pytest.raises(WorkerLostError, match="the thread that dispatches its tasks"):
        list(fleet.map(Worker.pixels, [train.examples(0, [1])]))
    for ask in (lambda: fleet.use(TINY, None), fleet.wait, lambda: fleet.map(Worker.pixels, [train.examples(0, [1])])):
        with pytest.raises(WorkerLostError, match="the thread that dispatches its tasks"):
            ask()
    fleet.close()


def test_a_shard_that_is_read_beside_a_computation_counts_nothing_of_it(local_ray, shards, store, put):
    """Neither its solves nor its shards, which the computing thread reports itself."""
    url, is_computed = put("beside.tar", "val-0000.tar"), Event()
    store.fault = lambda method, path: is_computed.wait(60) and None
    fleet = make_fleet(1)
    reading = fleet.map(Worker.read, [Examples(f"{url}&anonymous=true")], None)
    list(compute(fleet, *load(fleet, shards), CONFIG))
    assert store.requests  # it is under way
    is_computed.set()
    (listing,) = reading
    fleet.close()
    assert len(listing.keys) == 20 and fleet.stats.solves == 3 * 47
    sizes = [path.stat().st_size for path in sorted(shards.glob("*.tar"))]
    assert fleet.stats.traffic.bytes_read == sum(sizes) + sizes[-1]


def test_workers_that_can_never_fit_are_refused_at_once(local_ray):
    with pytest.raises(ConfigError, match="3 workers of 1 CPU and 1 GPU each do not fit .*1 node with 4 CPU and 2 GPU"):
        Fleet(TINY, None, FleetConfig(num_workers=3))
    with pytest.raises(ConfigError, match="1 worker of 1 CPU and 4 GPU each do not fit"):
        Fleet(TINY, None, FleetConfig(gpus_per_worker=4))
    assert [need_of(FleetConfig(gpus_per_worker=gpus)).room() for gpus in (0, 0.5, 0.6, 1, 2)] == [4, 4, 2, 2, 1]


def test_workers_share_the_cpus_of_a_node_for_decoding(local_ray):
    needs = [
        need_of(FleetConfig(gpus_per_worker=gpus, threads_per_worker=cpus)) for gpus, cpus in ((0, 1), (0, 3), (1, 1))
    ]
    assert [need.share_of_cpus(None) for need in needs] == [1, 4, 2]
    assert [need.share_of_cpus(1) for need in needs] == [4, 4, 4]


def test_one_worker_per_gpu_by_default(local_ray):
    fleet = Fleet(TINY, None, FleetConfig())
    assert fleet.num_asked == 2
    fleet.close()


def test_workers_share_gpus_and_a_range_begins_with_those_that_fit(local_ray, shards, undisturbed):
    fleet = Fleet(TINY, None, FleetConfig(num_workers="1:5", gpus_per_worker=0.5))
    fleet.wait()
    final = list(compute(fleet, *load(fleet, shards), CONFIG))[-1]
    deadline = time.monotonic() + 30
    while (
        fleet.num_workers < 4 and time.monotonic() < deadline
    ):  # two on each of two GPUs; there is no room for the fifth
        time.sleep(0.1)
    num_workers = fleet.num_workers
    fleet.close()
    assert num_workers == 4 and torch.equal(final.perturbation, undisturbed)


def test_results_come_in_the_order_of_the_tasks(local_ray, shards):
    fleet = make_fleet(2)
    train, _ = load(fleet, shards)
    tasks = [train.examples(shard, [i]) for i in range(7) for shard in range(3)]
    pixels = list(fleet.map(Worker.pixels, tasks))
    again = list(fleet.map(Worker.pixels, tasks[::-1]))[::-1]
    fleet.close()
    assert all(np.array_equal(a, b) for a, b in zip(pixels, again, strict=True))


def test_a_single_worker_gets_its_next_task_at_once(local_ray, shards):
    fleet = make_fleet(1)
    train, _ = load(fleet, shards)
    started = time.monotonic()
    assert len(list(fleet.map(Worker.pixels, [train.examples(0, [i]) for i in range(20)]))) == 20
    seconds = time.monotonic() - started
    fleet.close()
    assert seconds < 10  # if it waited a second before each task, it would take twice as long


def test_invalid_options_are_refused():
    for bad, message in [
        (0, "--num-workers is 0; it must be positive"),
        ("0:4", "--num-workers is 0:4; it must be positive"),
        ("4:2", "--num-workers is 4:2; a range begins with the smaller number: give 2:4"),
        ("many", "--num-workers is 'many'; it must be a number such as 8, or a range such as 1:64"),
    ]:
        with pytest.raises(ConfigError, match=message):
            FleetConfig(num_workers=bad)
    with pytest.raises(
        ConfigError, match="--gpus-per-worker is 1.5; it must be 0, a fraction of one GPU or a whole number"
    ):
        FleetConfig(gpus_per_worker=1.5)
    with pytest.raises(ConfigError, match="--verify-determinism compares workers; give --num-workers 2"):
        FleetConfig(num_workers=1, verify_determinism=True)
    with pytest.raises(ConfigError, match="--decode-threads is 0; it must be positive"):
        FleetConfig(decode_threads=0)


def test_prometheus_reads_what_the_fleet_does(local_ray, shards):
    import ray

    fleet = Fleet(TINY, None, FleetConfig(num_workers=2), run="the-run")
    fleet.wait()
    list(compute(fleet, *load(fleet, shards), CONFIG))
    metrics = fleet.metrics()
    port = ray.nodes()[0]["MetricsExportPort"]
    deadline, values = time.monotonic() + 60, {}
    while values.get("solves_total") != 3 * 47 and time.monotonic() < deadline:
        time.sleep(1)
        text = urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        lines = [line for line in text.splitlines() if line.startswith("ray_uap_") and 'run="the-run"' in line]
        values = {line.split("{")[0].removeprefix("ray_uap_"): float(line.rsplit(" ", 1)[1]) for line in lines}
    fleet.close()
    assert values.get("solves_total") == 3 * 47 and values["workers"] == 2, text
    on_disk = sum(path.stat().st_size for path in shards.glob("*.tar"))  # a shard may be read by both workers
    assert on_disk <= metrics["workers/bytes_read"] == values["bytes_read_total"] <= 2 * on_disk
    assert 0 < metrics["workers/waiting_share"] < 1 and metrics["workers/cache_hit_rate"] == 1
