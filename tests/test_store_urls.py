"""Addresses of object stores: options, endpoints, credentials, and how a store refuses."""

import re
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from uap_dist.data import locations
from uap_dist.data.decode import Geometry, load_shard
from uap_dist.data.locations import exists, locate, write_file
from uap_dist.data.patterns import expand_patterns
from uap_dist.errors import ConfigError, ResumeError, ShardError, UapDistError
from uap_dist.tracking.checkpoint_store import CheckpointStore

AS_IS = Geometry()


@pytest.mark.parametrize(
    ("address", "status", "message"),
    [
        (
            "bucket/t.tar?{}",
            403,
            r"bucket/t.tar\?.*: access is denied; give credentials that may do this as AWS_ACCESS_KEY_ID",
        ),
        ("bucket/t.tar?{}", 301, "the bucket is in another region .*; give its region as .region="),
        ("absent/t.tar?{}", None, r"no shard s3://absent/t.tar\?.*: there is no bucket absent$"),
        ("absent/*.tar?{}", None, "absent/.*: there is no such bucket; look at its name"),
        ("bucket/absent.tar?{}", None, r"no shard s3://bucket/absent.tar\?"),
        (
            "bucket/t.tar?endpoint_override=127.0.0.1:9&scheme=http&retries=1",
            None,
            "127.0.0.1:9 does not answer; look at",
        ),
        ("bucket/t.tar?{}&retrys=3", None, "unknown option 'retrys'; the options are region, endpoint_override, "),
        ("bucket/t.tar?{}&retries=many", None, "option retries is 'many'; it must be a number"),
        ("bucket/t.tar?{}&anonymous=1", None, "option anonymous is '1'; it must be true or false"),
        (
            "key:secret@bucket/t.tar",
            None,
            "s3://…@bucket/t.tar holds credentials, which runs and checkpoints would keep",
        ),
    ],
)
def test_invalid_urls_and_refusals_are_one_line_without_retries(store, address, status, message):
    store.fault = lambda method, path: status and ("status", status)
    with pytest.raises(UapDistError, match=message) as caught:
        expand_patterns([f"s3://{address.format(store.query)}"])
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
    assert len(store.requests) <= 3


@pytest.mark.parametrize(
    "text",
    [
        "localhost:9000",
        "minio.local",
        "//localhost:9000",
        "http://",
        "http://localhost:9000/minio",
        "ftp://localhost:9000",
    ]
    + ["http://user:secret@localhost:9000", "http://localhost:port", "http://localhost:9000?region=eu"],
)
@pytest.mark.parametrize(
    ("url", "variable"),
    [("s3://b/t.tar?region=eu-west-1", "AWS_ENDPOINT_URL"), ("S3://b/t.tar", "AWS_ENDPOINT_URL_S3")]
    + [("gs://b/t.tar", "STORAGE_EMULATOR_HOST")],
)
def test_an_invalid_endpoint_is_an_error_and_no_other_store_is_contacted(monkeypatch, text, url, variable):
    monkeypatch.setenv(variable, text)
    with pytest.raises(
        ConfigError, match=f"^{variable} is '.*'; it must be HOST:PORT .*, with http:// or https://"
    ) as caught:
        locate(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("text", ["HTTP://{}", "http://{}/", " http://{} "])
@pytest.mark.parametrize("variable", ["AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"])
def test_the_endpoint_in_a_variable_is_used(store, put, monkeypatch, variable, text):
    put("t.tar", "train-0000.tar")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv(variable, text.format(re.search(r"127.0.0.1:\d+", store.query)[0]))
    assert len(load_shard("s3://bucket/t.tar?region=us-east-1", AS_IS).keys) == 20


@pytest.mark.parametrize(
    "query",
    ["endpoint_override=http://{}", "endpoint_override=HTTP://{}/&scheme=http", "endpoint_override={}&scheme=HTTP"],
)
def test_an_endpoint_in_the_url_may_have_its_scheme(store, put, query):
    put("t.tar", "train-0000.tar")
    endpoint = re.search(r"127.0.0.1:\d+", store.query)[0]
    assert len(load_shard(f"s3://bucket/t.tar?region=us-east-1&{query.format(endpoint)}", AS_IS).keys) == 20


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("endpoint_override=", "option endpoint_override is ''; it must be HOST:PORT"),
        ("endpoint_override=host:9000/path", "it must be HOST:PORT of the store, without a path"),
        ("endpoint_override=http://host&scheme=https", "endpoint_override begins with http, but scheme is https"),
        ("scheme=ftp", "option scheme is 'ftp'; it must be https or http"),
    ],
)
def test_an_invalid_endpoint_in_the_url_is_an_error(query, message):
    with pytest.raises(ConfigError, match=message):
        locate(f"s3://bucket/t.tar?{query}")


@pytest.fixture
def google():
    """An emulator of Google's store that answers each request with its `status`, and the paths that it was `asked` for."""

    class Emulator(BaseHTTPRequestHandler):
        status, asked = 404, []

        def do_GET(self):
            self.asked.append(self.path)
            self.send_response(self.status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_POST = do_GET

        def log_message(self, *words):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Emulator) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        Emulator.address = f"http://127.0.0.1:{server.server_port}"
        yield Emulator
        server.shutdown()


def test_the_gcs_emulator_in_a_variable_is_used(monkeypatch, google):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", google.address)
    with pytest.raises(ShardError, match="no shard gs://bucket/t.tar"):
        expand_patterns(["gs://bucket/t.tar?retry_limit_seconds=2"])
    assert any("/b/bucket" in path for path in google.asked)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (400, "the request is refused as it stands; look at the name of the bucket$"),
        (403, "access is denied; give credentials that may do this as GOOGLE_APPLICATION_CREDENTIALS "),
        (503, r"the store answers UNAVAILABLE \(Received HTTP status code: 503\)$"),
    ],
)
def test_what_google_answers_is_one_line_wherever_it_is_asked(google, status, message, monkeypatch):
    monkeypatch.setattr(locations, "SECONDS_BEFORE_RETRY", 0.01)
    google.status = status
    url = f"gs://bucket/t.tar?anonymous=true&retry_limit_seconds=0.5&endpoint_override={google.address}"
    for ask, error in (
        (exists, OSError),
        (partial(write_file, data=b""), OSError),
        (lambda url: expand_patterns([url]), ShardError),
        (lambda url: expand_patterns([url.replace("t.tar", "t-*.tar")]), ShardError),
        (lambda url: CheckpointStore(url).find_newest(), ResumeError),
    ):
        with pytest.raises(error, match=message.replace("$", "( .--storage.)?(; 5 attempts failed)?$")) as found:
            ask(url)
        assert "\n" not in str(found.value)


def test_a_store_of_google_that_does_not_answer_is_named_with_its_own_variable():
    with pytest.raises(OSError, match="127.0.0.1:9 does not answer; look at .endpoint_override=… .or STORAGE_EMULATOR"):
        exists("gs://bucket/t.tar?anonymous=true&retry_limit_seconds=0.5&endpoint_override=127.0.0.1:9&scheme=http")


def test_azure_without_credentials_is_one_line():
    with pytest.raises(OSError, match="t.tar: no credentials are found; give credentials that .* as AZURE_TENANT_ID, "):
        exists("abfs://container@account.dfs.core.windows.net/t.tar")


def test_a_refusal_is_not_retried(store, put):
    url = put("t.tar", "train-0000.tar")
    store.fault = lambda method, path: ("status", 403)
    with pytest.raises(ShardError, match="access is denied"):
        load_shard(url, AS_IS)
    assert len(store.requests) == 1


def test_public_buckets_need_no_credentials_and_others_report_missing_ones(store, put, monkeypatch):
    url = put("t.tar", "train-0000.tar")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    assert len(load_shard(f"{url}&anonymous=true", AS_IS).keys) == 20
    assert not any(is_signed for *_, is_signed in store.requests)
    store.fault = lambda method, path: ("status", 403)
    with pytest.raises(
        ShardError, match="access is denied, and no AWS_ACCESS_KEY_ID is set; .*or .anonymous=true where"
    ):
        load_shard(url, AS_IS)


def test_the_endpoint_may_come_from_the_environment(store, put, monkeypatch):
    endpoint = re.search(r"127.0.0.1:\d+", put("t.tar", "train-0000.tar"))[0]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{endpoint}")
    assert len(load_shard("s3://bucket/t.tar?region=us-east-1", AS_IS).keys) == 20


def test_a_public_bucket_of_google_is_opened_without_credentials():
    filesystem, path = locate("gs://bucket/a/t.tar?anonymous=true&retry_limit_seconds=1")
    assert (filesystem.type_name, path) == ("gcs", "bucket/a/t.tar")
    with pytest.raises(ConfigError, match="unknown option 'region'"):
        locate("gs://bucket/t.tar?region=x")
