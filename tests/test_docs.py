"""What README.md, docs/ and benchmarks/ say: links lead somewhere, code blocks are code, options and commands exist."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from torchvision import models

import uap_dist
from uap_dist.method.rates import RATE_TITLES
from uap_dist.models.check import check_classifier
from uap_dist.models.loading import load_classifier

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))
from option_tables import JOBS, markdown, options, parser

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
MANUAL = [page for page in PAGES if page.parent.name != "benchmarks"]
FENCE = re.compile(r"^(?:(<!-- .*? -->)\n)?```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
JOB_CALL = re.compile(r"(?:jobs/|uap-|uap_dist\.jobs\.)(\w+)(?:\.py)?\b([^`|#]*)")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")
OF_OTHERS = {  # options of Ray, MLflow and pytest, and of benchmarks/
    "--port", "--dashboard-port", "--dashboard-agent-listen-port", "--num-cpus", "--runtime-env-json", "--working-dir",
    "--head", "--address", "--dashboard-host", "--disable-usage-stats", "--generate", "--sort", "--help",
    "--table", "--data", "--only", "--check", "--run",
}  # fmt: skip


def name(page):
    return str(page.relative_to(ROOT))


def text_of(page):
    return page.read_text()


def prose(page):
    return FENCE.sub("", text_of(page))


@cache
def anchors(page):
    """Of a page's headings, as forges make them."""
    found = set()
    for heading in HEADING.findall(FENCE.sub("", page.read_text())):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.add(slug if slug not in found else f"{slug}-1")
    return found


def blocks(page, language):
    """Marks and texts of the code blocks in that language; "" is the shell."""
    return [(mark, text) for mark, kind, text in FENCE.findall(text_of(page)) if kind == language]


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_and_anchors_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        if re.match(r"https?://", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{link}: there is no such file"
        assert ROOT in target.parents, f"{link} leaves the repository"
        assert not anchor or anchor in anchors(target), (
            f"{link}: no heading of that name, but {sorted(anchors(target))}"
        )


def test_the_readme_is_a_front_door():
    assert len(text_of(ROOT / "README.md").splitlines()) <= 150


@pytest.mark.parametrize("page", MANUAL, ids=name)
def test_python_blocks_compile_and_import_what_exists(page):
    for _, code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("uap_dist"):
                module = importlib.import_module(str(node.module))
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_jobs_in_commands_exist_and_have_the_options_that_they_are_given(page):
    whole = text_of(page).replace("\\\n", " ")
    for line in whole.splitlines():
        for job, words in JOB_CALL.findall(line):
            if job in JOBS:
                assert set(OPTION.findall(words)) <= options(job), line


@pytest.mark.parametrize("page", MANUAL, ids=name)
def test_options_in_the_text_exist(page):
    known = set().union(*map(options, JOBS)) | OF_OTHERS
    for code in re.findall(r"`([^`\n]+)`", prose(page)):
        assert set(OPTION.findall(code)) <= known, code


@pytest.mark.parametrize("job", JOBS)
def test_help_says_in_a_line_what_an_option_is(job):
    for action in parser(job)._actions:
        meaning, _, _ = (action.help or "").partition(" (default: ")
        assert 0 < len(meaning) <= 120 and "\n" not in meaning, action.option_strings


@pytest.mark.parametrize("page", MANUAL, ids=name)
def test_every_shell_block_says_what_runs_it(page):
    for mark, text in blocks(page, ""):
        kind, _, files = mark.removeprefix("<!-- ").removesuffix(" -->").partition(": ")
        assert kind == "run by" or mark.startswith("<!-- needs a cloud"), text
        assert all((ROOT / file).is_file() for file in files.split()), mark


def test_make_has_the_targets_that_are_named():
    targets = set(re.findall(r"^([a-z-]+):", text_of(ROOT / "Makefile"), re.MULTILINE))
    for page in MANUAL:
        for command in re.findall(r"(?:^|`)make ([a-z -]+?)(?:`|\s+#|$)", text_of(page), re.MULTILINE):
            assert set(command.split()) <= targets, f"{name(page)}: make {command}"


def test_the_factory_of_the_readme_is_a_classifier(tmp_path):
    (code,) = (code for _, code in blocks(ROOT / "README.md", "python") if "def network" in code)
    (tmp_path / "my_network.py").write_text(code)
    torch.save(models.resnet18(num_classes=10).state_dict(), tmp_path / "resnet18.pth")
    classifier = load_classifier(f"{tmp_path / 'my_network.py'}:network")
    check_classifier(classifier, (3, 224, 224))
    assert (classifier.geometry.resize, classifier.geometry.crop) == (256, 224)


def test_every_public_name_is_in_the_reference():
    listed = re.findall(r"^::: uap_dist\.(\w+)$", text_of(ROOT / "docs/python-api.md"), re.MULTILINE)
    assert sorted(listed) == uap_dist.__all__


def test_names_in_the_architecture_are_defined_in_the_files_beside_them():
    found = 0
    for passage in re.split(r"\n(?=[|*\n]|\d\.)", prose(ROOT / "docs/architecture.md")):
        files = [ROOT / "docs" / link for link in LINK.findall(passage) if link.endswith(".py")]
        code = "\n".join(file.read_text() for file in files)
        for named in re.findall(r"`([A-Za-z]\w*(?:\.\w+)?)`", passage):
            for part in named.split("."):
                assert re.search(rf"\b(?:def|class) {part}\b|^{part} = ", code, re.MULTILINE), f"{part}: {passage}"
                found += 1
    assert found > 20


def test_the_tower_is_that_of_the_contract():
    contracts = tomllib.loads(text_of(ROOT / "pyproject.toml"))["tool"]["importlinter"]["contracts"]
    layers = [layer.split(".")[-1] for layer in contracts[0]["layers"]]
    ((_, tower),) = blocks(ROOT / "docs/architecture.md", "text")
    drawn = re.findall(r"^ *(\w+)/", tower, re.MULTILINE)
    assert drawn == [layer for layer in layers if layer in drawn]
    assert {path.parent.name for path in ROOT.glob("uap_dist/*/__init__.py")} <= set(drawn)


@pytest.mark.parametrize("page", MANUAL, ids=name)
def test_metrics_in_the_text_are_metrics(page):
    code = "".join(file.read_text() for file in ROOT.glob("uap_dist/**/*.py"))
    code = "".join(code.replace("{kind}", kind) for kind in RATE_TITLES)
    code += (ROOT / "docs/records.md").read_text().replace("`", '"')  # which tests/test_job.py compares with a real run
    for group, metric in re.findall(r"`(?!results/)([a-z_]+)/([a-z_]+|…)`", prose(page)):
        assert f'"{group}/{metric.rstrip("…")}' in code or f'"{group}/{{' in code, f"{group}/{metric}"


@pytest.mark.parametrize("job", JOBS)
def test_the_table_of_options_has_all_of_a_job(job):
    rows = [line for line in markdown(job).splitlines() if line.startswith("| `--")]
    assert {option for row in rows for option in OPTION.findall(row.split("|")[1])} == options(job) - {"-h", "--help"}
    assert all(row.replace("\\|", "").count("|") == 5 for row in rows)


def test_the_version_is_the_same_everywhere():
    assert yaml.safe_load(text_of(ROOT / "CITATION.cff"))["version"] == uap_dist.__version__
    assert re.search(rf"^## {re.escape(uap_dist.__version__)}\b", text_of(ROOT / "CHANGELOG.md"), re.MULTILINE)
    for page in MANUAL:
        assert set(re.findall(r"uap_dist-([\d.]+)-py3", text_of(page))) <= {uap_dist.__version__}, page


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "cli/index.html").read_text()
    assert all(option in page for job in JOBS for option in options(job) - {"-h", "--help"})
    assert (tmp_path / "results/main_job/index.html").is_file()
