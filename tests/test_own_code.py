"""Networks in files of a user's own, in this process as in any other."""

import re
import sys

import pytest
import torch

from uap_dist.errors import ClassifierError
from uap_dist.models.loading import load_classifier

NETWORK = """
import torch
from torch import nn

def build():
    torch.manual_seed(SEED)
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
"""


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return f"{path}:build"


@pytest.mark.parametrize("name", ["options", "network", "torch", "test", "my-net.v2", "dataclasses", "random"])
def test_a_file_of_any_name_may_have_dataclasses_under_postponed_annotations(tmp_path, name):
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        + NETWORK.replace("SEED", "Options().seed")
        + "\n@dataclass\nclass Options:\n    seed: int = 3\n"
    )
    modules = dict(sys.modules)
    assert load_classifier(write(tmp_path / f"{name}.py", text))(torch.zeros(1, 3, 2, 2)).shape == (1, 3)
    assert all(sys.modules[known] is module for known, module in modules.items())


@pytest.mark.parametrize("neighbour", ["blocks.py", "blocks/__init__.py"])
@pytest.mark.parametrize(
    "text", ["from blocks import build\n", "def build():\n    import blocks\n    return blocks.build()\n"]
)
def test_modules_beside_a_file_are_importable_and_not_confused_between_folders(tmp_path, neighbour, text):
    digests = []
    for seed in (1, 2, 1):
        write(tmp_path / str(seed) / neighbour, NETWORK.replace("SEED", str(seed)))
        digests.append(load_classifier(write(tmp_path / f"{seed}/network.py", text)).weights_digest)
    assert digests[0] == digests[2] != digests[1]
    assert [path for path in sys.path if path.startswith(str(tmp_path))] == [str(tmp_path / "1")]


def test_installed_modules_take_precedence_over_those_beside_a_file(tmp_path):
    write(tmp_path / "json.py", "raise ImportError")
    load_classifier(
        write(tmp_path / "network.py", "import json, decimal\njson.dumps(1)\n" + NETWORK.replace("SEED", "1"))
    )
    write(tmp_path / "colorsys.py", "x = 1")
    with pytest.raises(
        ClassifierError, match="another module named colorsys takes precedence over the one beside the file: rename"
    ):
        load_classifier(write(tmp_path / "network.py", "from colorsys import x"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import absent_module", "No module named 'absent_module'; install it, or set PYTHONPATH to the folder"),
        (
            "from .blocks import build",
            "attempted relative import .*; a file alone has no package: give package.module:factory",
        ),
        ("x = {}['y']", r"there is no 'y' \(line 1 of .*net.py\)"),
        ("def build(:", r"invalid syntax \(net.py, line 1\)"),
        ("import sys\nsys.exit(2)", "it ends the process, as a script does"),
        ("def build():\n    raise ValueError('\\x1b[1mno\\x1b[0m\\nmore')", r"fails without arguments: no \(line 2 of"),
    ],
)
def test_an_error_in_a_users_code_is_one_line_that_says_where(tmp_path, text, message):
    with pytest.raises(ClassifierError, match=message) as refusal:
        load_classifier(write(tmp_path / "net.py", text))
    assert str(refusal.value).isprintable()
    with pytest.raises(ClassifierError):
        load_classifier(write(tmp_path / "net.py", text))


def named(tmp_path, class_names):
    """A network with three classes of these names."""
    text = NETWORK.replace("SEED", "1").replace("return", "network =") + f"    network.class_names = {class_names}\n"
    return load_classifier(write(tmp_path / "net.py", text + "    return network\n"))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("None", ()),
        ("['a', 'b', 'c']", ("a", "b", "c")),
        ("{1: 'b', 0: 'a', 2: 'c'}", ("a", "b", "c")),
        ("{'0': 'a', '1': 'b', '2': 'c'}", ("a", "b", "c")),
    ],
)
def test_classes_are_named_by_a_list_or_by_label(tmp_path, given, expected):
    assert named(tmp_path, given).class_names == expected


@pytest.mark.parametrize("given", ["'abc'", "[0, 1, 2]", "{1: 'a', 2: 'b', 3: 'c'}", "{'a': 0, 'b': 1, 'c': 2}", "3"])
def test_other_names_of_classes_are_refused(tmp_path, given):
    with pytest.raises(ClassifierError, match=rf"has class_names {re.escape(given)}; they must be a list of str"):
        named(tmp_path, given)
