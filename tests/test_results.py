"""Pages of figures: each names the code that it depends on, and says so if that has changed since it was measured."""

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import results

PAGES = sorted(path.name for path in (ROOT / "benchmarks").glob("*.md"))


def test_every_page_names_its_code():
    assert sorted(results.PAGES) == PAGES
    for name, page in results.PAGES.items():
        for pattern in page.code:
            assert list(ROOT.glob(pattern)), f"{name} names no file with {pattern}"
        for command in filter(None, (*page.commands, page.check)):
            assert (ROOT / command.split()[0]).exists(), command


@pytest.fixture(scope="module")
def changed():
    return results.changed()


@pytest.mark.parametrize("name", PAGES)
def test_figures_are_of_the_code_or_say_that_they_are_older(name, changed):
    if results.OLDER not in (ROOT / "benchmarks" / name).read_text():
        assert name not in changed, (
            f"the code that benchmarks/{name} depends on has changed: `python benchmarks/results.py --check` repeats a short run of it; "
            f"if that differs, measure the page again (--run {name}), or write {results.OLDER} into it and what is"
        )


MODULE = '''"""Says what."""

import os  # a reason


class Thing:
    """A thing – with a dash."""

    size: int = 3
    """Of it; "quoted"."""

    def grow(self, by):  # why
        """More."""
        text = "# no comment"; return f"{self.size + by} {text}" if by else """no docstring"""
'''


def test_words_about_code_do_not_count():
    bare = ["import os class Thing: size: int = 3", "def grow(self, by): text = '# no comment';".replace("'", '"')]
    bare.append('return f"{self.size + by} {text}" if by else """no docstring"""')
    assert results.code_of(MODULE) == "".join("".join(bare).split())


@given(st.sampled_from([each for each in range(len(MODULE)) if MODULE[each] in "3+"]))
def test_any_other_change_counts(place):
    changed = MODULE[:place] + {"3": "4", "+": "-"}[MODULE[place]] + MODULE[place + 1 :]
    assert results.code_of(changed) != results.code_of(MODULE)


def test_a_page_is_confirmed_by_equal_figures_only(tmp_path, monkeypatch):
    script, runs = tmp_path / "script.py", tmp_path / "script.jsonl"
    script.write_text("import pathlib, sys; pathlib.Path(sys.argv[2]).write_text(pathlib.Path('again').read_text())")
    page = results.Page((str(script),), 0.1, ("*.py",), check=str(script))
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "RECORDS", tmp_path / "results.json")
    monkeypatch.setattr(results, "PAGES", {"page.md": page})
    runs.write_text(json.dumps({"seed": 0, "rate": 0.9, "seconds": 3.0}) + "\n")
    for rate, confirmed in ((0.8, False), (0.9, True)):
        (tmp_path / "again").write_text(json.dumps({"seed": 0, "rate": rate, "seconds": 1.0, "new": 1}) + "\n")
        results.check("page.md")
        assert (results.changed() == []) == confirmed
    script.write_text(script.read_text() + "\nprint(1)")
    assert results.changed() == ["page.md"]
