"""https:// URLs and others that fsspec knows, read from a web server on loopback with the faults of such servers."""

import time
from hashlib import sha256

import fsspec
import pytest
from hub import LoopbackServer, Quiet

from uap_dist.data import locations
from uap_dist.data.decode import Geometry, load_shard
from uap_dist.data.fetch import read_parts
from uap_dist.data.patterns import expand_patterns
from uap_dist.data.stores import fsspec_stores
from uap_dist.data.write import read_classes
from uap_dist.errors import ConfigError, ShardError, UapDistError
from uap_dist.planning.shard_sizes import count_bytes, read_indexes

PAGE = b"<!DOCTYPE html><title>Log in</title>" + b" " * 600


@pytest.fixture
def server(shards, monkeypatch):
    """Serves the shards; `faults` are statuses, or "cut" or "wait", of the next GETs; `plain` leaves sizes out."""
    monkeypatch.setattr(locations, "SECONDS_BEFORE_RETRY", 0.01)
    monkeypatch.setattr(fsspec_stores, "READ_TIMEOUT_S", 1.0)
    fsspec.get_filesystem_class("http").clear_instance_cache()

    class Handler(Quiet):
        faults, seen, has_size, knows_ranges = [], [], True, True

        def do_GET(self):
            path, _, query = self.path.partition("?")
            self.seen.append((self.command, self.path))
            file = shards / path.strip("/")
            fault = self.faults.pop(0) if self.faults and self.command == "GET" else None
            if isinstance(fault, int):
                return self.answer(fault)
            if path.startswith("/private/"):
                return self.answer(302, headers={"Location": "/login"})
            if path == "/login":
                return self.answer(200, PAGE, {"Content-Type": "text/html"})
            if path.startswith("/forbidden/"):
                return self.answer(403)
            if not file.is_file():
                return self.answer(404)
            data = file.read_bytes()
            if fault == "wait":
                time.sleep(2)
            if fault == "cut":
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[:1000])
                self.close_connection = True
                return None
            if self.knows_ranges and (span := self.headers.get("Range")):
                first, last = map(int, span.removeprefix("bytes=").split("-"))
                about = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
                return self.answer(206, data[first : last + 1], about)
            if not self.has_size:
                self.send_response(200)
                self.send_header("Connection", "close")
                self.end_headers()
                self.wfile.write(data if self.command == "GET" else b"")
                self.close_connection = True
                return None
            return self.answer(200, data)

        do_HEAD = do_GET

    with LoopbackServer(Handler) as running:
        running.handler = Handler
        yield running


def digest(url):
    return load_shard(expand_patterns([url])[0], Geometry()).digest


def test_shards_are_read_from_a_web_server(server, shards):
    urls = expand_patterns([f"{server.address}/train-{{0000..0001}}.tar?download=1"])
    assert urls == [f"{server.address}/train-000{i}.tar?download=1" for i in range(2)]
    files = [shards / f"train-000{i}.tar" for i in range(2)]
    assert [load_shard(url, Geometry()).digest for url in urls] == [
        sha256(file.read_bytes()).hexdigest() for file in files
    ]
    assert count_bytes(urls) == [file.stat().st_size for file in files]
    plain = [url.partition("?")[0] for url in urls]
    assert read_indexes(plain) == dict.fromkeys(plain, 20) and read_classes(plain[0]) == []


def test_a_server_that_does_not_say_sizes_is_read_as_well(server, shards):
    server.handler.has_size = False
    url = f"{server.address}/train-0000.tar"
    assert digest(url) == sha256((shards / "train-0000.tar").read_bytes()).hexdigest()
    with pytest.raises(ShardError, match="the server does not say how large .* is; a plan needs that"):
        count_bytes([url])


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_parts_of_a_shard_are_read_by_ranges(server, shards, knows_ranges):
    server.handler.knows_ranges = knows_ranges
    data, places = (shards / "train-0000.tar").read_bytes(), [(512, 100), (9000, 20)]
    expected = [data[offset : offset + size] for offset, size in places]
    assert read_parts(f"{server.address}/train-0000.tar", places)[0] == expected


@pytest.mark.parametrize("fault", [500, 503, 429, "cut", "wait"])
def test_what_may_pass_is_tried_again(server, shards, caplog, fault):
    (url,) = expand_patterns([f"{server.address}/train-0000.tar"])
    server.handler.faults += [fault] * 2
    assert load_shard(url, Geometry()).digest == sha256((shards / "train-0000.tar").read_bytes()).hexdigest()
    assert "attempt 3 of 5 follows" in caplog.text
    server.handler.faults += [fault] * (5 if fault != "wait" else 0)
    if fault != "wait":
        with pytest.raises(ShardError, match=f"cannot read shard {url}: .*; 5 attempts failed"):
            load_shard(url, Geometry())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("absent.tar", "no shard .*absent.tar$"),
        ("forbidden/t.tar", r"forbidden/t.tar: the server refuses \(HTTP 403\); credentials belong in ~/.netrc"),
        (
            "private/t.tar",
            "private/t.tar is no tar but a page of a web server, as one that asks for a login: it begins",
        ),
        (
            "train-*.tar",
            r"train-\*.tar: web servers list no files; name the shards with braces, as in train-{0000..0007}.tar",
        ),
        (
            "t.tar?token=abc",
            r"t.tar\?token=… holds credentials, which runs and checkpoints would keep; give them in ~/.netrc",
        ),
    ],
)
def test_what_is_no_shard_says_why(server, path, message):
    with pytest.raises(UapDistError, match=message) as raised:
        digest(f"{server.address}/{path}")
    assert "abc" not in str(raised.value)
    assert (
        len([1 for method, _ in server.handler.seen if method == "GET"]) <= 2
    )  # a redirect is followed; nothing is tried again


def test_credentials_of_netrc_are_sent(server, tmp_path, monkeypatch):
    sent = []

    def answer(handler):
        sent.append(handler.headers.get("Authorization"))
        handler.answer(401 if sent[-1] is None else 404)

    monkeypatch.setattr(server.handler, "do_GET", answer)
    monkeypatch.setattr(server.handler, "do_HEAD", answer)
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password hunter2\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    with pytest.raises(ShardError, match="no shard"):
        expand_patterns([f"{server.address}/t.tar"])
    assert sent and all((each or "").startswith("Basic ") for each in sent)


def test_other_file_systems_of_fsspec_are_read(shards):
    data = (shards / "train-0000.tar").read_bytes()
    fsspec.filesystem("memory").pipe("/there/t-0.tar", data)
    assert expand_patterns(["memory://there/t-*.tar"]) == ["memory://there/t-0.tar"]
    assert digest("memory://there/t-0.tar") == sha256(data).hexdigest()
    with pytest.raises(ShardError, match="no shard memory://there/t-1.tar"):
        expand_patterns(["memory://there/t-{0..1}.tar"])


def test_nothing_is_written_to_them():
    for url in ("memory://there/results", "https://example.org/results"):
        with pytest.raises(OSError, match=f"{url}: nothing is written there; give a folder, s3:// or gs://$"):
            locations.write_file(url, b"x")


def test_a_file_system_whose_package_is_missing_names_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "adlfs", None)
    for scheme in ("az", "abfs"):
        with pytest.raises(ConfigError, match=f"{scheme}:// needs a package: Install adlfs .*, on every node"):
            expand_patterns([f"{scheme}://container/t.tar"])


def test_commands_are_refused_without_repeating_them():
    with pytest.raises(
        ShardError, match="is no shard and is not run; give the URL itself, as s3://, gs://, hf://"
    ) as raised:
        expand_patterns(["pipe:curl -s -H 'X: hunter2' https://example.org/t.tar"])
    assert "hunter2" not in str(raised.value) and "curl" not in str(raised.value)
