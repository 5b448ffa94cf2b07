"""Rounds on one device as a worker computes them in a span. See benchmarks/gpu.md.

    python benchmarks/gpu_rounds.py                                                           # a GPU, about four minutes
    python benchmarks/gpu_rounds.py --networks squeezenet --members 1 2 --seconds 1 --bits 0 --budget 0    # a toy, on the CPU

Three parts: how long a round of six photographs takes for each member of a batch, by network, precision and number of members, with CUDA
graphs and without; whether bits repeat, with graphs and without and in rounds that the driver runs; and what precision and batches do to
the fooling rate. Neither Ray nor MLflow is needed. ResNet-50, ViT-B/16 and VGG-16 have random weights: their speed is what counts.
"""

import platform
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from statistics import mean
from tempfile import NamedTemporaryFile
from unittest.mock import patch

import torch
import tyro
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parent))
from networks import NETWORKS

from uap_dist.data.patterns import expand_patterns
from uap_dist.method.config import ComputeConfig
from uap_dist.method.state import RoundReport, State
from uap_dist.models.loading import load_classifier
from uap_dist.rounds import span as span_module
from uap_dist.rounds.plan import RoundTasks, plan_run, schedule_rounds
from uap_dist.rounds.round import evaluate, run_round
from uap_dist.rounds.span import Span, compute_span
from uap_dist.workers.dataset import Dataset, load_dataset
from uap_dist.workers.local import LocalWorkers
from uap_dist.workers.reproducible import Precision
from uap_dist.workers.solving import graphs
from uap_dist.workers.worker import Worker

RANDOM = {
    "resnet50": "resnet50(weights=None)",
    "vit_b_16": "vit_b_16(weights=None)",
    "vgg16": "vgg16(weights=None)",
}
SOURCE = """
import torch, torchvision
def make():
    torch.manual_seed(0)
    network = torchvision.models.{call}
    for weight in network.parameters():
        if weight.dim() > 1 and not weight.any():  # the head of vit_b_16, which would have no gradient
            torch.nn.init.normal_(weight, std=0.02)
    network.input_size = 224
    return network
"""
MAX_ROUNDS = 4_000


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measure."""

    networks: tuple[str, ...] = ("squeezenet", "resnet50", "vit_b_16", "vgg16")
    """squeezenet and lite0 (with weights), resnet50, vit_b_16, vgg16 (random)."""
    precisions: tuple[Precision, ...] = ("float32", "tf32", "bfloat16")
    """See --precision of jobs/compute.py."""
    members: tuple[int, ...] = (1, 16)
    """Perturbations in one batch."""
    seconds: float = 3.0
    """Of each measurement."""
    seeds: int = 5
    """Perturbations whose fooling rates are averaged."""
    bits: int = 200
    """Rounds whose bits are compared; 0: none."""
    rates_of: str = "squeezenet"
    """Network of bits and fooling rates, one with weights."""
    budget: int = 8_500
    """Network evaluations of each of them, clean labels included; 0: no fooling rates."""
    data: Path = Path("../shared")
    """Folder of images and weights."""


def main() -> None:
    """All three parts."""
    options = tyro.cli(Options)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    print(f"{device}, torch {torch.__version__}, {datetime.now(UTC).date().isoformat()}\n")
    print("| network | precision | members | graphs | a round, ms | evaluations/s | beside one member |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for network in options.networks:
        for precision in options.precisions:
            time_rounds(network, precision, options)
    if options.bits:
        print()
        compare_bits(options)
    if options.budget:
        print(
            "\n| computed in | members | held-out fooling rate in that precision, mean | each | in float32, mean | each | images |\n"
            "| --- | --- | --- | --- | --- | --- | --- |"
        )
        for precision in options.precisions:
            for count in options.members:
                print_rates(precision, count, options)


def time_rounds(network: str, precision: Precision, options: Options) -> None:
    """A row for each number of members and each way of launching kernels."""
    workers, train, _ = load(network, precision, options, has_val=False)
    alone = 0.0
    for count in options.members:
        ways = [False] * (count == options.members[0]) + [True] * torch.cuda.is_available()
        for has_graphs in ways or [False]:
            config = ComputeConfig(members_at_once=count, max_passes=100)
            span, states, plan = first_span(train, config, range(count), MAX_ROUNDS)
            with launching(has_graphs), patch.object(span_module, "SPAN_S", options.seconds):
                workers.worker.graphs.forget()
                compute_span(workers.worker, short(span, 20), states, plan)  # warms up and captures
                synchronise()
                started = time.perf_counter()
                reports = compute_span(workers.worker, span, states, plan)
                synchronise()
                spent = time.perf_counter() - started
            rounds = len(reports[0])
            speed = sum(some[-1].num_evaluations - train.num_examples for some in reports.values()) / spent
            alone = alone or speed
            print(
                f"| {network} | {precision} | {count} | {'yes' if has_graphs else 'no'} | {1000 * spent / rounds:.2f} "
                f"| {speed:.0f} | {speed / alone:.1f} |",
                flush=True,
            )


def compare_bits(options: Options) -> None:
    """Whether the same rounds give the same bits however they are computed."""
    workers, train, _ = load(options.rates_of, options.precisions[0], options, has_val=False)
    config = ComputeConfig(max_passes=100)
    span, states, plan = first_span(train, config, [0], options.bits)
    found = {}
    with patch.object(span_module, "SPAN_S", 1e9):
        for name, has_graphs in (("with graphs", True), ("again", True), ("without graphs", False)):
            with launching(has_graphs):
                found[name] = compute_span(workers.worker, span, states, plan)[0][-1]
        batch = replace(config, members_at_once=4)
        together, alone = ([0, 1, 2, 3], [1])
        for name, seeds in (("beside others", together), ("alone in its batch", alone)):
            of_batch, starts, plan_of_batch = first_span(train, batch, seeds, options.bits // 2)
            found[name] = compute_span(workers.worker, of_batch, starts, plan_of_batch)[1][-1]
    state = states[0]
    for round_ in span.rounds[0]:
        report = run_round(workers, round_, state, plan)
        state = report.state
    found["rounds of the driver"] = report
    for one, other in (
        ("with graphs", "again"),
        ("with graphs", "without graphs"),
        ("with graphs", "rounds of the driver"),
        ("beside others", "alone in its batch"),
    ):
        same = torch.equal(found[one].state.iterate.v, found[other].state.iterate.v)
        close = (found[one].state.iterate.v - found[other].state.iterate.v).abs().max()
        print(f"{one}, {other}: {'the same bits' if same else f'v differs by up to {close:.3g}'}")


def print_rates(precision: Precision, count: int, options: Options) -> None:
    """A row with the fooling rates of perturbations that are computed in batches of so many."""
    workers, train, val = load(options.rates_of, precision, options)
    config = ComputeConfig(members_at_once=count, max_evaluations=options.budget)
    found = [last.perturbation for last in run(workers.worker, train, config, range(options.seeds))]
    cells = [rates_of(workers, val, found)]
    if precision != "float32":
        workers, _, val = load(options.rates_of, "float32", options)
        cells.append(rates_of(workers, val, found))
    print(f"| {precision} | {count} | {' | '.join((*cells, *cells)[:2])} | {val.num_examples} |", flush=True)


def rates_of(workers: LocalWorkers, val: Dataset, perturbations: list[Tensor]) -> str:
    """Two cells: mean fooling rate on held-out images, and that of each."""
    rates = [evaluate(workers, None, val, v).val.rate for v in perturbations]
    return f"{mean(rates):.4f} | {', '.join(f'{rate:.3f}' for rate in rates)}"


def run(worker: Worker, train: Dataset, config: ComputeConfig, seeds: Sequence[int]) -> Iterator[RoundReport]:
    """The last report of each perturbation, computed in batches."""
    size = config.members_at_once
    for start in range(0, len(seeds), size):
        span, states, plan = first_span(train, config, seeds[start : start + size], None)
        with patch.object(span_module, "SPAN_S", 1e9):
            while True:
                reports = compute_span(worker, span, states, plan)
                done = len(next(iter(reports.values())))
                states = {place: some[-1].state for place, some in reports.items()}
                span = replace(span, rounds={place: some[done:] for place, some in span.rounds.items()})
                if not next(iter(span.rounds.values())):
                    break
        yield from (some[-1] for some in reports.values())


def first_span(
    train: Dataset, config: ComputeConfig, seeds: Sequence[int], num_rounds: int | None
) -> tuple[Span, Mapping[int, State], object]:
    """The first rounds of some perturbations (None: all), their states and their plan."""
    plan = plan_run(train.sizes, config)
    rounds, states = {}, {}
    for seed in seeds:
        own = replace(config, seed=seed)
        tasks = (RoundTasks.of(round_, train, seed) for round_ in schedule_rounds(train.sizes, own))
        place = seed % config.members_at_once
        rounds[place] = tuple(islice(tasks, num_rounds or plan.num_rounds))
        states[place] = State.start(train.shape, train.clean.labels, own)
    return Span(rounds, config.members_at_once), states, plan


def short(span: Span, count: int) -> Span:
    """Its first rounds."""
    return replace(span, rounds={place: some[:count] for place, some in span.rounds.items()})


class Here(LocalWorkers):
    """One worker, which one can get at."""

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        self.worker = worker


def load(
    network: str, precision: Precision, options: Options, *, has_val: bool = True
) -> tuple[Here, Dataset, Dataset | None]:
    """A worker with a network, and its images."""
    if network in RANDOM:
        with NamedTemporaryFile("w", suffix=".py") as file:
            file.write(SOURCE.format(call=RANDOM[network]))
            file.flush()
            classifier, source = load_classifier(f"{file.name}:make"), NETWORKS["squeezenet"]
    else:
        source = NETWORKS[network]
        classifier = load_classifier(*source.locate(options.data))
    if network in RANDOM:  # the shards' images are larger
        classifier.geometry = load_classifier(*NETWORKS["squeezenet"].locate(options.data)).geometry
    workers = Here(Worker(classifier, cache_bytes=8 << 30, num_threads=1, precision=precision))
    wanted = [(source.train, source.num_train_images), (source.val, source.num_val_images)][: 1 + has_val]
    found = [
        load_dataset(workers, expand_patterns([str(options.data / pattern)]), num_images=count)
        for pattern, count in wanted
    ]
    return workers, found[0], found[1] if has_val else None


@contextmanager
def launching(has_graphs: bool) -> Iterator[None]:
    """By graphs, or one kernel after the other."""
    if has_graphs:
        yield
        return
    with patch.object(
        graphs.Graphs, "call", lambda self, function, tensors, *constants: function(*tensors, *constants)
    ):
        yield


def synchronise() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
