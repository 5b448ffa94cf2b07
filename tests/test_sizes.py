"""The house stays one that a stranger can read: small files, functions, classes and folders."""

import ast
from pathlib import Path
from statistics import median

import uap_dist

MODULES = [path for path in Path(uap_dist.__file__).parent.rglob("*.py") if path.name != "__init__.py"]
ROOT = Path(__file__).parents[1]
OUTSIDE = [path for folder in ("benchmarks", "tests", "docs", "examples") for path in (ROOT / folder).rglob("*.py")]
SAY_NOTHING = {"batch", "share", "member", "together", "by_number", "tally", "review", "trial", "repetition"}


def num_lines(node):
    return node.end_lineno - node.lineno + 1


def test_files_are_short():
    lengths = {path: len(path.read_text().splitlines()) for path in [*MODULES, *OUTSIDE]}
    assert median(lengths[path] for path in MODULES) <= 150
    assert not {path: length for path, length in lengths.items() if length > 350}
    assert not {path: length for path, length in lengths.items() if path.parent.name == "jobs" and length > 120}


def test_functions_and_classes_are_short():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert num_lines(node) <= 60, f"{path}: {node.name}"
            if isinstance(node, ast.ClassDef):
                assert num_lines(node) <= 200, f"{path}: {node.name}"


def test_text_is_read_and_written_as_utf8_whatever_the_locale():
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("read_text", "write_text"):
                assert "encoding" in [each.arg for each in node.keywords], f"{path}, line {node.lineno}"


def test_folders_are_small_and_names_say_something():
    for folder in {path.parent for path in MODULES}:
        assert sum(path.parent == folder for path in MODULES) <= 10, folder
    assert not SAY_NOTHING & {path.stem for path in MODULES}
