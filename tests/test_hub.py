"""hf:// URLs, read with huggingface_hub from a server on loopback that answers as the hub does (HF_ENDPOINT)."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY
from hub import STRANGER, TOKEN, hub
from processes import environment

pytest.importorskip("huggingface_hub")
UNKNOWN = "hf_" + "z0Z0z0Z0z0" * 4
SCRIPT = """
import sys
from pathlib import Path
from uap_dist.data.fetch import fetch
from uap_dist.data.patterns import expand_patterns
from uap_dist.errors import UapDistError
{before}
for pattern in sys.argv[1:]:
    try:
        print([(url, fetch(url).digest()) for url in expand_patterns([pattern])])
    except UapDistError as error:
        print(error)
"""


@pytest.fixture(scope="module")
def endpoint(shards):
    files = {f"t-000{i}.tar": (shards / f"train-000{i}.tar").read_bytes() for i in range(2)}
    with hub({"me/open": {**files, "sub/a.tar": b"x"}, "me/gated": files}, gated=("me/gated",)) as server:
        yield server.address


def read(tmp_path, *patterns, before="", **environment):
    """What a process of its own says to each pattern; huggingface_hub reads its settings when it is imported."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    command = [sys.executable, "-c", SCRIPT.format(before=before), *patterns]
    env = {**kept, "HF_HOME": str(tmp_path), **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert not re.search("hf_[a-zA-Z0-9]{9}", done.stdout + done.stderr), "a token is printed"
    return done.stdout.splitlines()


def test_shards_of_a_gated_repository_are_read_with_a_token(endpoint, shards, tmp_path):
    from hashlib import sha256

    digests = [sha256((shards / f"train-000{i}.tar").read_bytes()).hexdigest() for i in range(2)]
    expected = str([(f"hf://datasets/me/gated/t-000{i}.tar", digest) for i, digest in enumerate(digests)])
    patterns = ("hf://datasets/me/gated/t-{0000..0001}.tar", "hf://datasets/me/gated/t-*.tar")
    assert read(tmp_path, *patterns, HF_ENDPOINT=endpoint, HF_TOKEN=TOKEN) == [expected] * 2
    (tmp_path / "token").write_text(TOKEN)  # where `hf auth login` keeps it
    assert read(tmp_path, *patterns, HF_ENDPOINT=endpoint) == [expected] * 2


GATED = "hf://datasets/me/gated/t-0000.tar"
ABSENT = "hf://datasets/me/absent/t-0000.tar"


@pytest.mark.parametrize(
    ("token", "gated", "absent"),
    [
        (
            None,
            "datasets/me/gated is gated; accept its terms at {}/datasets/me/gated and give a token as HF_TOKEN, or log in",
            "the hub shows no datasets/me/absent; look at its name, or, if it is private or gated, give a token as HF_TOKEN",
        ),
        (
            STRANGER,
            "datasets/me/gated is gated; accept its terms at {}/datasets/me/gated with the account of the token",
            "the hub shows no datasets/me/absent; look at its name, and that the token may read it",
        ),
        (UNKNOWN, "the hub does not know the token; give a token as HF_TOKEN", "the hub does not know the token; give"),
    ],
    ids=["no token", "token of another account", "unknown token"],
)
def test_what_the_hub_refuses_says_why(endpoint, tmp_path, token, gated, absent):
    settings = {"HF_ENDPOINT": endpoint, **({"HF_TOKEN": token} if token else {})}
    said = read(tmp_path, GATED, ABSENT, **settings)
    assert said[0].startswith(f"cannot read shard {GATED}: {gated.format(endpoint)}")
    assert said[1].startswith(f"cannot read shard {ABSENT}: {absent}")


def test_wrong_names_say_what_is_wrong(endpoint, tmp_path):
    names = ("me/open/absent.tar", "me/open/absent-*.tar", "me/open@v2/t-0000.tar", "me", "me/open/sub")
    said = read(tmp_path, *(f"hf://datasets/{name}" for name in names), HF_ENDPOINT=endpoint)
    for line, part in zip(
        said,
        (
            "no shard hf://datasets/me/open/absent.tar",
            "hf://datasets/me/open/absent-*.tar matches nothing in hf://datasets/me/open",
            "datasets/me/open has no such revision; look at what follows its @",
            "it is no hf:// URL (",
            "no shard hf://datasets/me/open/sub",
        ),
        strict=True,
    ):
        assert part in line


def test_offline_and_without_the_package(tmp_path):
    said = read(tmp_path, GATED, HF_HUB_OFFLINE="1")
    assert said[0].endswith("HF_HUB_OFFLINE is set, so nothing is fetched; unset it, or give local shards")
    said = read(tmp_path, GATED, before="sys.modules['huggingface_hub'] = None")
    assert said == ["hf:// needs huggingface_hub: pip install 'uap-dist[hub]', on every node"]


def test_a_hub_that_does_not_answer_is_tried_again(tmp_path):
    before = "from uap_dist.data import locations; locations.SECONDS_BEFORE_RETRY = 0.01"
    said = read(tmp_path, GATED, before=before, HF_ENDPOINT="http://127.0.0.1:9")
    assert re.search(
        "http://127.0.0.1:9 does not answer .*; look at the network and HF_ENDPOINT; 5 attempts failed", said[0]
    )


@pytest.mark.slow
def test_a_job_reads_from_the_hub_and_keeps_no_token(shards, tmp_path):
    files = {path.name: path.read_bytes() for path in shards.iterdir()}
    data = (
        "--train-shards",
        "hf://datasets/me/gated/train-*.tar",
        "--val-shards",
        "hf://datasets/me/gated/val-0000.tar",
    )
    job = Path(__file__).parents[1] / "jobs/compute.py"
    options = ("--model", TINY, "--num-workers", "1", "--max-evaluations", "120", "--output", "out")
    with hub({"me/gated": files}, gated=("me/gated",)) as server:
        settings = {"HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
        # a process of its own, in which huggingface_hub is not imported yet
        done = subprocess.run(
            [sys.executable, str(job), *options, *data],
            cwd=tmp_path, env=environment(**settings), capture_output=True, text=True, timeout=200,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "MLflow: " in done.stdout and TOKEN not in done.stdout + done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
