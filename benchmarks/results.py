"""Which pages of figures are of the code as it is, and how to measure the others again.

    make results                                        # what has changed is checked, and measured again where figures differ
    python benchmarks/results.py                        # the list: each page, whether the code has changed since, what it costs
    python benchmarks/results.py --check                # repeats a short run of each page whose code has changed (minutes)
    python benchmarks/results.py --run pools.md         # measures these pages again, whole

A page depends on the files that are named here. Their digest, without comments, docstrings and layout, is recorded in results.json
when the page has been measured, and again when a run of it has been repeated on changed code with the same figures: what depends on
data, network, config and seed only is the same to the last image as long as no bit has changed. tests/test_results.py fails if the
code of a page has changed since and the page does not say so. What the commands print goes to build/results/; figures are taken over
into the pages by hand.
"""

import ast
import hashlib
import io
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tyro
from comparison.bench import stamp
from tabulate import tabulate

ROOT = Path(__file__).parents[1]
RECORDS = Path(__file__).with_name("results.json")
PRINTED = ROOT / "build/results"
OLDER = "**Older than the code.**"  # on a page that has not been measured since its code changed
VOLATILE = {"seconds", "commit", "date", "machine", "runs_at_once"}  # of a run, beside what it gave

RATES = (
    "uap_dist/method/*.py",
    "uap_dist/rounds/round.py",
    "uap_dist/rounds/plan.py",
    "uap_dist/workers/solving/*.py",
    "uap_dist/models/accelerate.py",
    "uap_dist/models/classifier.py",
    "uap_dist/data/crops.py",
    "uap_dist/data/decode.py",
)
RIVALS = (*RATES, "benchmarks/comparison/*.py")
ROUNDS = (*RATES, "uap_dist/rounds/*.py", "uap_dist/workers/*.py")
JOBS = (*ROUNDS, "uap_dist/fleet/*.py", "uap_dist/computing/pool_run.py", "uap_dist/tracking/*.py")


@dataclass(frozen=True)
class Page:
    """A page of figures.

    Attributes:
        commands: that measure it again, as arguments of Python; none where a GPU does, or jobs whose commands stand on the page.
        hours: that they take, on an idle machine with two cores.
        code: patterns of the files that its figures depend on.
        check: a short run of it, whose lines of JSON must be among those that lie beside the script.
    """

    commands: tuple[str, ...]
    hours: float
    code: tuple[str, ...]
    check: str | None = None


PAGES = {
    "main_job.md": Page(
        ("benchmarks/main_job.py",),
        6,
        RATES,
        "benchmarks/main_job.py --only resnet20-linf-8000 squeezenet-linf-3000 --seeds 0",
    ),
    "rules.md": Page(
        ("benchmarks/rules.py",),
        24,
        RIVALS,
        "benchmarks/rules.py --only 'resnet20-*-4000-*' --seeds 0",
    ),
    "rounds.md": Page(
        ("benchmarks/rounds.py",),
        12,
        RIVALS,
        "benchmarks/rounds.py --only resnet20-16000-sum-1x25 resnet20-16000-local-8x4x3 --seeds 0",
    ),
    "rivals.md": Page(
        ("benchmarks/rivals.py --networks resnet20 squeezenet lite0",),
        30,
        RIVALS,
        "benchmarks/rivals.py --networks resnet20 --only ours-3000 ours-8000 --seeds 0",
    ),
    "targeted.md": Page(
        ("benchmarks/targeted.py",),
        20,
        RIVALS,
        "benchmarks/targeted.py --networks resnet20 --targets 1 --seeds 0 --methods ours",
    ),
    "several_networks.md": Page(
        ("benchmarks/several_networks.py",),
        3,
        (*RATES, "uap_dist/models/several.py"),
        "benchmarks/several_networks.py --only cifar --seeds 0",
    ),
    "transfer.md": Page(
        ("benchmarks/transfer.py",),
        4,
        RATES,
        "benchmarks/transfer.py --variants 2 --seeds 0 --sources squeezenet",
    ),
    "rules_tried.md": Page(
        ("benchmarks/rules_tried.py",),
        30,
        ("benchmarks/comparison/variants.py", "uap_dist/method/log_odds.py", "uap_dist/method/update.py"),
        """benchmarks/rules_tried.py --network resnet20 --budget 4000 --grid '[{"augment": "none"}]' --seeds 0""",
    ),
    "pools.md": Page(("benchmarks/pools.py", "benchmarks/pool_coverage.py"), 1.2, JOBS),
    "finetune.md": Page(
        ("benchmarks/finetune.py", "benchmarks/finetune_speed.py"), 6, (*RATES, "uap_dist/finetuning/*.py")
    ),
    "repetition.md": Page(("benchmarks/repetition.py",), 1, (*RATES, "uap_dist/finetuning/*.py")),
    "analysis.md": Page((), 1, ("uap_dist/analysis/*.py", "uap_dist/method/deepfool.py", *RATES)),
    "deepfool.md": Page(
        ("benchmarks/deepfool.py", "benchmarks/universal.py"),
        0.7,
        ("uap_dist/method/deepfool.py", "benchmarks/comparison/*.py"),
    ),
    "chaos.md": Page(("benchmarks/chaos.py", "benchmarks/checkpoint.py"), 1.2, JOBS),
    "cluster.md": Page(("benchmarks/spot.py",), 0.3, ("uap_dist/fleet/*.py",)),
    "plan.md": Page(("benchmarks/plan.py",), 0.5, (*JOBS, "uap_dist/planning/*.py")),
    "overhead.md": Page(
        (
            "benchmarks/overhead.py --network resnet20 --max-evaluations 32000",
            "benchmarks/overhead.py --max-evaluations 8000",
            "benchmarks/overhead.py --round-size 24 --block-size 12 --max-evaluations 5000",
            "benchmarks/driver.py",
            "benchmarks/sweeps.py",
            "benchmarks/decoding.py",
            "benchmarks/decoding.py --compare start",
        ),
        0.5,
        JOBS,
    ),
    "free_network.md": Page(("benchmarks/free_network.py --num-rounds 1500",), 0.3, JOBS),
    "gpu.md": Page((), 0.2, ROUNDS),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Say which pages are of the code as it is, check them, or measure them again."""

    check: bool = False
    """Repeat a short run of each page whose code has changed, and record those that gave the same figures."""
    run: tuple[str, ...] = ()
    """Pages to measure again, whole; "changed" for all whose code has changed and that --check did not confirm."""


def main() -> None:
    """List, check or measure."""
    options = tyro.cli(Options)
    if unknown := [name for name in options.run if name not in PAGES and name != "changed"]:
        raise SystemExit(f"--run {' '.join(unknown)}: no such page. There are {', '.join(PAGES)}.")
    if options.check:
        for name in changed():
            check(name)
    for name in changed() if "changed" in options.run else options.run:
        measure(name)
    print(tabulate(list(lines()), headers=("page", "figures are of", "the whole again, h"), tablefmt="pipe"))


def changed() -> list[str]:
    """Pages whose code is not the recorded one."""
    records = read()
    return [name for name, page in PAGES.items() if records.get(name, {}).get("code") != digest(page.code)]


def lines() -> Iterator[tuple[str, str, float]]:
    """The list."""
    records, others = read(), changed()
    for name, page in PAGES.items():
        found = records.get(name)
        said = "never recorded" if found is None else f"{found['date']}, {found['commit'][:7]} ({found['how']})"
        yield name, f"{said}; **the code has changed since**" * (name in others) or said, page.hours


def check(name: str) -> None:
    """Repeat a page's short run, and record the page if all of its lines are among the page's."""
    command = PAGES[name].check
    if command is None:
        return
    with tempfile.TemporaryDirectory() as folder:
        again = Path(folder) / "runs.jsonl"
        run([*shlex.split(command), "--output", str(again)])
        found, known = read_lines(again), read_lines(runs_of(command))
    others = [line for line in found if not any(is_same(line, old) for old in known)]
    if others or not found:
        print(f"{name}: {len(others)} of {len(found)} runs are not as they were, such as {others[:1]}")
    else:
        record(name, f"{len(found)} runs repeated with the same figures")


def is_same(line: dict[str, Any], old: dict[str, Any]) -> bool:
    """Whether two runs agree in all that both say, except when, where and how fast."""
    both = (line.keys() & old.keys()) - VOLATILE
    return all(line[key] == old[key] for key in both)


def measure(name: str) -> None:
    """Run a page's commands. Runs of this very code that an earlier attempt has left are not repeated."""
    page = PAGES[name]
    if not page.commands:
        print(f"{name} is not measured: its commands stand on the page")
        return
    print(f"{name}: about {page.hours:g} h", flush=True)
    folder = PRINTED / digest(page.code)[:12]
    folder.mkdir(parents=True, exist_ok=True)
    for number, command in enumerate(page.commands, start=1):
        words, runs = shlex.split(command), runs_of(command)
        fresh = folder / runs.name
        words += ["--output", str(fresh)] if runs.exists() else []
        (folder / f"{name}-{number}.txt").write_text(run(words))
        if fresh.exists():
            shutil.copy(fresh, runs)
    record(name, "measured")


def runs_of(command: str) -> Path:
    """Where a script keeps its runs, if it does: beside itself."""
    return (ROOT / shlex.split(command)[0]).with_suffix(".jsonl")


def run(words: list[str]) -> str:
    """What a script prints, which is shown as well."""
    print("python", shlex.join(words), flush=True)
    printed = ""
    with subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            printed += line
    if process.returncode:
        raise SystemExit(f"{words[0]} ended with {process.returncode}; start this again to go on")
    return printed


def digest(patterns: Sequence[str]) -> str:
    """SHA-256 (hex) of what files do: of their tokens, without comments, docstrings and layout."""
    found = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in ROOT.glob(pattern)}):
        found.update(f"{path.relative_to(ROOT)}\n{code_of(path.read_text())}\n".encode())
    return found.hexdigest()


@cache
def code_of(text: str) -> str:
    """A module's source without comments, docstrings and white space."""
    tree, lines = ast.parse(text), text.splitlines(keepends=True)
    spans = [
        token.start + token.end
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            spans += [span(each, lines) for each in node.body if is_text(each)]
    for first, start, last, end in sorted(spans, reverse=True):
        rest = lines[last - 1][end:]
        lines[first - 1 : last] = [lines[first - 1][:start] + rest]
    return "".join("".join(lines).split())


def is_text(node: ast.stmt) -> bool:
    """Whether a statement is a docstring: of a module, class or function, or of the attribute before it."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def span(node: ast.stmt, lines: list[str]) -> tuple[int, int, int, int]:
    """First line, column, last line and column; ast counts columns in bytes."""
    assert node.end_lineno is not None and node.end_col_offset is not None
    start, end = (
        len(lines[line - 1].encode()[:column].decode())
        for line, column in ((node.lineno, node.col_offset), (node.end_lineno, node.end_col_offset))
    )
    return node.lineno, start, node.end_lineno, end


def record(name: str, how: str) -> None:
    """Note that a page is of the code as it is."""
    RECORDS.write_text(
        json.dumps(read() | {name: {"code": digest(PAGES[name].code), "how": how} | stamp()}, indent=1, sort_keys=True)
        + "\n"
    )


def read() -> dict[str, dict[str, str]]:
    """What is recorded, by page."""
    return json.loads(RECORDS.read_text()) if RECORDS.exists() else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Runs, a line of JSON each."""
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
