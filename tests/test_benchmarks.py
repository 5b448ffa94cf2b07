"""Benchmarks find what they import; those that need another machine than this one run at toy size."""

import ast
from importlib import import_module
from pathlib import Path

from conftest import SHARED
from processes import run_job

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(script, *words):
    done = run_job([str(BENCHMARKS / script), *words], BENCHMARKS)
    assert done.returncode == 0, done.stderr
    return [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ")]


def test_what_benchmarks_import_from_the_package_exists():
    for path in BENCHMARKS.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("uap_dist."):
                module = import_module(node.module)
                missing = [name.name for name in node.names if not hasattr(module, name.name)]
                for name in missing:  # a module of the folder
                    import_module(f"{node.module}.{name}")


def test_speed_of_a_gpu_by_network_batch_and_precision():
    words = ("--networks", "squeezenet1_0", "--batches", "1", "2", "--side", "64", "--min-seconds", "0.01")
    header, _, *rows = run("gpu.py", *words)
    assert len(rows) == 2 * 3 and "images/s" in header[3]
    assert all(float(row[3]) > 0 and row[4].strip().endswith("%") for row in rows)


def test_rounds_on_a_device_by_precision_and_members():
    words = ("--networks", "resnet20", "--precisions", "float32", "--members", "1", "2", "--seconds", "0.05")
    words += ("--rates-of", "resnet20", "--bits", "4", "--budget", "1036", "--seeds", "2", "--data", str(SHARED))
    done = run_job([str(BENCHMARKS / "gpu_rounds.py"), *words], BENCHMARKS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the same bits") == 4
    *rows, one, two = [
        line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith(("| resnet20", "| float32"))
    ]
    assert [int(row[2]) for row in rows] == [1, 2] and all(float(row[5]) > 0 for row in rows)
    assert all(0 < float(row[2]) < 1 and row[3].count(",") == 1 for row in (one, two))


def test_cost_of_a_round_to_the_driver():
    _, _, *rows = run("driver.py", "--num-workers", "1", "3", "--side", "8", "--sleep-s", "0.01", "--num-rounds", "2")
    assert [int(row[0]) for row in rows] == [1, 3] and all(float(row[4]) >= 0 for row in rows)
