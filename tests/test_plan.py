import json
from collections import Counter
from dataclasses import replace
from math import ceil

import pytest
from conftest import TINY, random_samples, tiny_worker
from hypothesis import given, settings
from hypothesis import strategies as st
from test_job import data, finish, job_options, runs, start

from uap_dist.computing.options import ComputeOptions
from uap_dist.data.patterns import expand_patterns
from uap_dist.data.write import write_shards
from uap_dist.errors import ShardError
from uap_dist.fleet.config import FleetConfig
from uap_dist.method.config import ComputeConfig
from uap_dist.method.state import State
from uap_dist.method.update import Iterate
from uap_dist.planning.comparison import read_plan
from uap_dist.planning.cost_model import DISPATCH_S, Costs, plan_fleet
from uap_dist.planning.profiling import measure_costs
from uap_dist.planning.range import Range
from uap_dist.planning.report import Plan, fleet_sizes
from uap_dist.planning.shard_sizes import ShardSizes, count_bytes, read_indexes
from uap_dist.planning.work import count_work
from uap_dist.rounds.loop import compute
from uap_dist.tracking.checkpoint import Checkpoint, JobRecord
from uap_dist.tracking.checkpoint_store import CheckpointStore
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.worker import Worker

CONFIGS = {
    "passes": {"max_passes": 3},
    "budget": {"max_evaluations": 260},
    "glances": {"max_passes": 30},
    "all images every other pass": {"max_passes": 5, "evaluate_every": 2},
    "blocks of one": {"max_passes": 1, "round_size": 7, "block_size": 1},
    "one big round": {"max_passes": 2, "round_size": 100, "block_size": 25},
    "local steps": {"max_passes": 2, "round_size": 20, "block_size": 10, "local_steps": 5},
}


class CountingWorkers(LocalWorkers):
    """A real worker that records its calls: the method, and the number of examples of each task."""

    def __init__(self, worker):
        super().__init__(worker)
        self.calls = []

    def map(self, method, tasks, *shared):
        self.calls.append((method, [task.num_examples for task in tasks]))
        return super().map(method, tasks, *shared)

    def examples(self, method):
        return sum(sum(sizes) for each, sizes in self.calls if each is method)


def sizes_of(dataset, num_bytes=1000):
    return ShardSizes(tuple(dataset.sizes), tuple(dataset.sizes), tuple(num_bytes for _ in dataset.sizes))


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS)
def test_the_work_that_is_counted_is_the_work_that_is_done(tiny_data, options):
    config = ComputeConfig(**{"round_size": 10, "block_size": 5, "seed": 3} | options)
    work = count_work(*map(sizes_of, tiny_data), config)
    workers = CountingWorkers(tiny_worker())
    *_, final = compute(workers, *tiny_data, config)
    assert work.num_evaluations == Range.exactly(final.num_evaluations)
    assert (work.num_rounds, work.num_solves) == (final.round_number + 1, final.num_solves)
    assert work.rounds == Counter(len(sizes) for method, sizes in workers.calls if method is Worker.solve)
    labels, random = sum(data.num_examples for data in tiny_data), tiny_data[1].num_examples
    assert work.num_classified == labels + workers.examples(Worker.classify) + random


@pytest.mark.parametrize("options", [{"max_passes": 2}, {"max_evaluations": 600}], ids=["passes", "budget"])
def test_the_papers_rule_costs_what_its_solves_cost(tiny_data, options):
    config = ComputeConfig(rule="paper", round_size=10, block_size=5, **options)
    workers = CountingWorkers(tiny_worker())
    *_, final = compute(workers, *tiny_data, config)
    mean = (final.num_evaluations - tiny_data[0].num_examples) / final.num_solves
    work = count_work(*map(sizes_of, tiny_data), config, evaluations_per_solve=Range(mean, 1, 2 * mean))
    assert work.num_evaluations.expected == pytest.approx(final.num_evaluations, rel=0.1)
    is_budget = "max_evaluations" in options
    assert (work.num_evaluations.low < work.num_evaluations.expected) != is_budget  # a budget is spent in any case
    assert work.num_rounds == pytest.approx(final.round_number + 1, abs=is_budget)


def free(**seconds):
    """Costs that are all zero except those given."""
    nothing = Range.exactly(0.0)
    costs = (
        dict.fromkeys(("start", "decode", "classify", "evaluation", "update", "driver", "report"), nothing) | seconds
    )
    memory = {"worker_bytes": 0, "gpu_bytes": 0, "image_bytes": 768}
    return Costs(1, **costs, **memory, evaluations_per_solve=Range.exactly(2), num_cpus=1, shard_images=())


def options_of(config, price_per_gpu_hour=None, **fleet):
    """Options of a job with this config, price and fleet; the report uses nothing else of them but the model."""
    return ComputeOptions(
        model="m", compute=config, fleet=FleetConfig(**fleet), plan=True, price_per_gpu_hour=price_per_gpu_hour
    )


def planned(config, costs, num_workers, num_perturbations=1, cache_bytes=1 << 40, images=(60, 60, 60, 60)):
    sizes = ShardSizes(images, images, tuple(1000 * n for n in images))
    work = count_work(sizes, sizes, config, num_perturbations=num_perturbations)
    return plan_fleet(work, costs, config, num_workers=num_workers, memory_bytes=cache_bytes, disk_bytes=0)


@given(num_workers=st.integers(1, 100), blocks_per_round=st.integers(1, 20), num_rounds=st.integers(1, 12))
@settings(max_examples=30)
def test_a_round_is_solved_in_waves_of_as_many_blocks_as_there_are_workers(num_workers, blocks_per_round, num_rounds):
    config = ComputeConfig(round_size=6 * blocks_per_round, block_size=6, max_passes=1)
    whole, rest = divmod(40, blocks_per_round)  # 240 images
    waves = whole * ceil(blocks_per_round / num_workers) + ceil(rest / num_workers)
    fleet = planned(config, free(evaluation=Range.exactly(1.0)), num_workers)
    seconds = 12 * waves
    assert fleet.parts["rounds"].expected == pytest.approx(seconds, rel=0.01)  # 2 ms for each block's dispatch
    assert fleet.idle == pytest.approx(1 - 12 * 40 / num_workers / seconds, abs=0.01)


@given(num_workers=st.integers(1, 64), num_perturbations=st.integers(1, 40))
@settings(max_examples=30)
def test_a_pool_fills_the_gaps_and_no_worker_makes_it_slower(num_workers, num_perturbations):
    config = ComputeConfig(round_size=24, block_size=6, max_passes=1)
    costs = free(evaluation=Range.exactly(1.0))
    rounds = [
        planned(config, costs, n, num_perturbations).parts["rounds"].expected for n in (num_workers, num_workers + 1)
    ]
    alone = planned(config, costs, num_workers).parts["rounds"].expected
    assert rounds[1] <= rounds[0] + 1e-9
    work_alone = 12 * 40
    assert rounds[0] >= max(alone, num_perturbations * work_alone / num_workers) - 1e-9
    assert rounds[0] <= num_perturbations * alone + 1e-9


def test_a_pool_of_as_many_as_run_at_once_leaves_no_worker_idle():
    config = ComputeConfig(round_size=24, block_size=6, max_passes=1)
    costs = free(evaluation=Range.exactly(1.0))
    assert planned(config, costs, 16).idle == pytest.approx(0.75, abs=0.01)
    assert planned(config, costs, 16, num_perturbations=5).idle == pytest.approx(0, abs=0.01)
    assert planned(config, costs, 16, num_perturbations=10).parts["rounds"].expected == pytest.approx(
        2 * planned(config, costs, 16, num_perturbations=5).parts["rounds"].expected, rel=0.01
    )


def test_a_batch_takes_the_time_of_all_its_places_on_one_worker():
    config = ComputeConfig(round_size=24, block_size=6, max_passes=1, members_at_once=4)
    costs = free(evaluation=Range.exactly(1.0), driver=Range.exactly(9.0), decode=Range.exactly(0.01))
    seconds = {
        (n, count): planned(config, costs, n, count).parts["rounds"].expected for n in (1, 2, 3) for count in (4, 5)
    }
    of_batch = 12 * 40
    assert seconds == {(n, count): of_batch * max(1, (count > 4) + 1) / min(n, (count > 4) + 1) for n, count in seconds}
    fleet = planned(config, costs, 3, 5)
    assert fleet.has_spans and fleet.idle == pytest.approx(1 / 3)
    assert planned(config, costs, 1, 4, cache_bytes=0).parts["rounds"].expected == of_batch + 4 * 240 * 0.01
    sizes = ShardSizes((60,) * 4, (60,) * 4, (1000,) * 4)
    work = count_work(sizes, sizes, config, num_perturbations=5)
    text = Plan(options_of(config), work, [fleet], (1,), 1, 0.0).summary()
    assert (
        "4 perturbations in a batch" in text and "1 of 3 workers will have nothing to do: 5 perturbations are 2" in text
    )


def test_where_spans_are_quicker_a_pool_of_as_many_as_there_are_workers_is_proposed():
    config = ComputeConfig(max_passes=1)
    costs = free(evaluation=Range.exactly(0.001), driver=Range.exactly(0.01))
    sizes = ShardSizes((60,) * 4, (60,) * 4, (1000,) * 4)
    work = count_work(sizes, sizes, config)
    text = Plan(options_of(config), work, [planned(config, costs, 8)], (1,), 1, 0.0).summary()
    assert "quicker than several would share them, so 7 of 8 workers have nothing to do; a pool of 8 (" in text


def test_images_that_no_cache_holds_are_read_again_for_each_block():
    config = ComputeConfig(round_size=24, block_size=6, max_passes=2)
    costs = free(evaluation=Range.exactly(1.0), decode=Range.exactly(0.1))
    roomy, tight = (planned(config, costs, 1, cache_bytes=size) for size in (1 << 40, 0))
    assert roomy.read_bytes == Range.exactly(480_000) and roomy.worker_bytes == 480 * 768
    assert tight.read_bytes == Range(480_000 + 480 * 1000, 480_000 + 480 * 1000, 480_000 + 80 * 60_000)
    assert tight.worker_bytes == 0
    calls = 80 * DISPATCH_S  # a worker without room for all images gets no spans
    for name in ("low", "expected"):
        again = getattr(tight.parts["rounds"], name) - getattr(roomy.parts["rounds"], name)
        assert again == pytest.approx(480 * 0.1 + calls)
    assert tight.parts["rounds"].high == pytest.approx(roomy.parts["rounds"].high + 80 * 60 * 0.1 + calls)


def test_a_shard_of_which_a_few_images_take_part_is_decoded_whole():
    costs = free(decode=Range.exactly(1.0))
    few, rest = ShardSizes((30,), (1000,), (5000,)), ShardSizes((10,), (10,), (50,))
    config = ComputeConfig(max_passes=1)
    fleet = plan_fleet(count_work(few, rest, config), costs, config, num_workers=1, memory_bytes=1 << 40, disk_bytes=0)
    assert fleet.parts["decoding"].expected == 1010 and fleet.cached_bytes == 1010 * 768


@given(num_workers=st.integers(1, 5000))
def test_planned_sizes_end_with_the_one_asked_for(num_workers):
    sizes = fleet_sizes(num_workers, num_workers)
    assert sizes[-1] == num_workers and sizes == sorted(set(sizes)) and (sizes[0] == 1)
    assert fleet_sizes(3, 12) == [3, 4, 8, 12]


def test_a_plan_fits_a_screen_and_says_what_idles_and_what_it_costs():
    config = ComputeConfig(round_size=24, block_size=6, max_passes=1)
    costs = free(evaluation=Range.exactly(90.0), start=Range.once(60.0))
    sizes = ShardSizes((60,) * 4, (60,) * 4, (1000,) * 4, is_estimated=True)
    work = count_work(sizes, sizes, config)
    fleets = [plan_fleet(work, costs, config, num_workers=n, memory_bytes=1, disk_bytes=0) for n in (1, 16)]
    options = options_of(config, price_per_gpu_hour=2.5, cache_gib=1 / 2**30, disk_cache_gib=0.0)
    plan = Plan(options, work, fleets, (1,), 1, 1.0)
    text = plan.summary()
    assert "240 solves, 720 network evaluations; 1,600 images classified" in text
    assert "| GPU-hours | price |" in text and "| 16 | 3:01:00 | 3:00:48–3:01:15 | 48.3 (48.2–48.3) | 120.67 (" in text
    assert "at most 4 blocks (--round-size 24, --block-size 6), so 12 of 16 workers have nothing to do" in text
    assert "a pool of 5 (--num-perturbations) would keep all 16 busy" in text
    assert "or local steps" not in text  # one round of the size that keeps 16 busy
    assert "more than --cache-gib" in text and "about 240 training and 240 held-out images by their bytes" in text
    assert len(text.splitlines()) < 25 and all(len(line) < 400 for line in text.splitlines())
    assert json.loads(json.dumps(plan.result()))["fleets"][-1]["price"]["expected"] == pytest.approx(120.67, abs=0.01)
    shared = replace(plan, gpus_per_worker=0.25).result()["fleets"][-1]
    assert shared["price"]["expected"] == pytest.approx(120.67 / 4, abs=0.01)


@pytest.mark.parametrize(
    ("num_workers", "num_solves", "options"),
    [
        (8, 4_800, "--round-size 96 --block-size 12 --local-steps 4"),
        (64, 6_200, "--round-size 128 --block-size 2 --local-steps 1"),
        (64, 4_800, ""),
    ],
)
def test_local_steps_are_proposed_while_they_leave_enough_rounds(num_workers, num_solves, options):
    config = ComputeConfig(max_passes=1)
    sizes = ShardSizes((num_solves,), (num_solves,), (1000,))
    work = count_work(sizes, sizes, config)
    fleet = plan_fleet(work, free(), config, num_workers=num_workers, memory_bytes=1, disk_bytes=0)
    text = Plan(options_of(config), work, [fleet], (1,), 1, 0.0).summary()
    assert f"so {num_workers - 2} of {num_workers} workers have nothing to do" in text
    assert ("or local steps" in text) == bool(options) and options in text


def test_shards_are_sized_in_bytes_and_images_without_being_read(shards, tmp_path, s3):
    urls = expand_patterns([str(shards / "train-*.tar"), str(shards / "val-*.tar")])
    assert count_bytes(urls) == [(shards / name.rpartition("/")[2]).stat().st_size for name in urls]
    assert [read_indexes(urls)[url] for url in urls] == [20, 20, 7, 20]
    from pyarrow import fs

    store, folder = fs.FileSystem.from_uri(f"s3://bucket/weighed?{s3}")
    fs.copy_files(str(shards), folder, destination_filesystem=store)
    remote = expand_patterns([f"s3://bucket/weighed/train-*.tar?{s3}"])
    assert count_bytes(remote) == count_bytes(urls[:3]) and list(read_indexes(remote).values()) == [20, 20, 7]
    write_shards(random_samples(3, seed=1), tmp_path, prefix="own", shard_size=3)
    (tmp_path / "own-index.json").write_text('["of another program"]')
    own = expand_patterns([str(tmp_path / "own-*.tar")])
    assert read_indexes(own) == {} and count_bytes(own) == [(tmp_path / "own-0000.tar").stat().st_size]
    with pytest.raises(ShardError, match="no shard .*own-0001.tar"):
        count_bytes([str(tmp_path / "own-0001.tar")])


@pytest.mark.parametrize(("rule", "members_at_once"), [("log-odds", 1), ("log-odds", 3), ("paper", 1)])
def test_costs_are_measured_on_two_shards_and_cover_everything(shards, rule, members_at_once):
    workers, committed = CountingWorkers(tiny_worker()), []
    urls = expand_patterns([str(shards / "train-*.tar")])
    costs = measure_costs(
        workers,
        urls,
        # evaluations that the whole run would refuse
        ComputeConfig(rule=rule, round_size=10, block_size=5, max_evaluations=1, members_at_once=members_at_once),
        start_s=3.0,
        commit=lambda report, history: committed.append(len(history)),
    )
    assert costs.shard_images == (20, 20) and costs.image_bytes == 768 and 1 << 20 < costs.worker_bytes < 1 << 34
    assert committed == list(range(1, len(committed) + 1)) and len(committed) >= 5
    assert 3.0 <= costs.start.expected < 10 and costs.report.expected > 0
    assert (costs.update == Range.once(0.0)) == (members_at_once > 1)  # within a span
    for range_ in (costs.decode, costs.classify, costs.evaluation, costs.driver):
        assert 0 < range_.low <= range_.expected <= range_.high < 1
    assert (costs.evaluations_per_solve.expected == 2) == (rule == "log-odds")


def test_what_profiling_commits_goes_away(tmp_path, s3):
    state = State(Iterate.zero((3, 4, 4)))
    for location in (str(tmp_path / "profiling"), f"s3://bucket/profiling?{s3}"):
        with CheckpointStore(location) as store:
            store.prepare()
            store.commit(Checkpoint(JobRecord("run", {}, {}, {}), state, ()))
            store.wait()
            assert store.find_newest() is not None
            store.remove()
            assert store.find_newest() is None
    assert not list(tmp_path.iterdir())


def test_more_shards_are_read_if_two_hold_less_than_a_block(tmp_path):
    write_shards(random_samples(12, seed=1), tmp_path, prefix="small", shard_size=2)
    urls = expand_patterns([str(tmp_path / "small-*.tar")])
    config = ComputeConfig(round_size=5, block_size=5, max_passes=1)
    costs = measure_costs(LocalWorkers(tiny_worker()), urls, config, start_s=0.0, commit=lambda report, history: None)
    assert costs.shard_images == (2, 2, 2)


def test_a_plan_is_a_run_in_mlflow_and_a_file_for_the_run_that_is_planned(shards, tmp_path):
    options = ("--round-size", "10", "--block-size", "5", "--max-passes", "3", "--num-val-images", "15")
    code, out, err = finish(start(tmp_path, *data(shards), *options, "--plan", "--output", "plan"))
    assert code == 0, err
    assert "15 rounds of 2 blocks, 141 solves, 329 network evaluations" in out and "| worker-hours |" in out
    _, (run,) = runs(tmp_path)
    assert run.info.run_name == "tiny.py-Tiny-linf-seed0-plan" and run.info.status == "FINISHED"
    assert not list(tmp_path.glob("checkpoints/*"))
    plan = json.loads((tmp_path / "plan/plan.json").read_text())
    assert plan["num_val_images"] == 15 and not plan["images_are_estimated"]
    assert run.data.metrics["planned/evaluations"] == 329
    assert 1 < run.data.metrics["planned/seconds"] == plan["fleets"][0]["seconds"]["expected"] < 150
    train, _, val = data(shards)[1:]
    config = ComputeConfig(round_size=10, block_size=5, max_passes=3)
    planned = {"model": TINY, "train_shards": (train,), "val_shards": (val,), "num_val_images": 15, "compute": config}
    job = job_options(**planned, fleet=FleetConfig(num_workers=1)).costs()
    assert read_plan(tmp_path / "plan/plan.json", job)["planned/solves"] == 141
