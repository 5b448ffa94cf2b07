import string
from urllib.parse import quote

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from test_job import finish, runs, start

from uap_dist.data.locations import locate
from uap_dist.errors import ConfigError
from uap_dist.foreign_text import escape_markdown, hide_credentials, printable, redact
from uap_dist.tracking.console import one_line_errors
from uap_dist.tracking.process import refuse_credentials, refuse_empty

ALPHABET = string.ascii_letters + string.digits + "/+=._~-"  # the alphabets of AWS, Azure and JSON web tokens
SECRET = st.builds(
    "".join, st.tuples(st.sampled_from(string.ascii_letters), st.text(ALPHABET, min_size=12, max_size=60))
)
# no text in a shape also occurs in a secret
SHAPES = (
    "s3://me:{}@bucket/key.tar",
    "s3://AKIAIOSFODNN7EXAMPLE:{}@bucket/a@b/key.tar",
    "https://user:{}@host:5000/api",
    "postgresql://user:{}@host:5432/mlflow",
    "s3:/user:{}@bucket/key.tar",
    "user:{}@host:6379",
    "s3://bucket/key.tar?secret_key={}",
    "s3://bucket/key.tar?region=eu-west-1&access_key=me&Secret%5FKey={}",
    "s3://bucket/key.tar?token={}&retries=3",
    "s3://bucket/key.tar?session_token={}",
    "https://host/key.tar?X-Amz-Credential={}%2F20260101&X-Amz-Signature={}&X-Amz-Security-Token={}",
    "https://account.blob.core.windows.net/c/key.tar?sv=2024&sig={}",
    "DefaultEndpointsProtocol=https;AccountName=me;AccountKey={};EndpointSuffix=core.windows.net",
    "https://storage.googleapis.com/b/key.tar?GoogleAccessId=me&Expires=1&Signature={}",
    "https://host/key.tar?key={}",
    "https://host/key.tar?rlkey={}&dl=1",
    "https://host/key.tar?md5={}&expires=1",
    "https://host/key.tar?pw={}&sessionid={}&PHPSESSID={}&sid={}&cookie={}&verify={}",
    "https://host/key.tar;jsessionid={}?oauth_verifier={}",
    "https://host/key.tar?hdnts={}",
    "abfs://container@account.dfs.core.windows.net/key.tar?sig={}",
    "abfs://user:{}@account.dfs.core.windows.net/key.tar",
    "AWS_SECRET_ACCESS_KEY={}",
    "password='{}'",
    "pipe:curl -H 'Authorization: Bearer {}' https://host/key.tar",
    "pipe:aws --secret {} s3 cp s3://bucket/key.tar -",
    "Authorization: Bearer {}",
    "authorization=Basic {}",
    '{{"Authorization": "AWS4-HMAC-SHA256 Credential={}, SignedHeaders=host, Signature={}"}}',
    "X-Auth-Token: {}",
    "x-api-key: {}",
    "{{'secret_key': '{}', 'region': 'eu'}}",
    '{{"token": "{}"}}',
    "NAME=s3://user:{}@bucket/v.npy:255",
    "-----BEGIN PRIVATE KEY-----\n{}\n-----END PRIVATE KEY-----",
)


@pytest.mark.parametrize("shape", SHAPES)
@given(
    secret=SECRET, before=st.sampled_from(("", "error: ", "cannot read shard ")), after=st.sampled_from(("", ": no"))
)
@settings(max_examples=40, deadline=None)
def test_no_secret_survives(shape, secret, before, after):
    found = redact(before + shape.replace("{}", secret).replace("{{", "{").replace("}}", "}") + after)
    assert secret not in found and redact(found) == found
    assert found.startswith(before)


def test_digits_after_the_user_of_an_object_store_are_a_secret_and_no_port():
    assert redact("s3://me:123/456@bucket/k") == "s3://…@bucket/k"


@given(secret=st.text("ABCabc012&#?@ ", min_size=12, max_size=20))
def test_no_encoded_secret_survives(secret):
    encoded = quote(secret, safe="")
    assert encoded not in redact(f"s3://user:{encoded}@bucket/k") + redact(f"s3://bucket/k?token={encoded}")


@pytest.mark.parametrize(
    "token",
    [
        "AKIAIOSFODNN7EXAMPLE",
        "hf_" + "aB3" * 12,
        "ghp_" + "aB3" * 12,
        "github_pat_" + "aB3" * 12,
        "AIza" + "aB-" * 12,
        "dapi" + "0f" * 16,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl",
    ],
)
def test_tokens_are_recognised_by_their_form(token):
    assert redact(f"401 for {token}, try again") == "401 for …, try again"


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/train-{0000..0009}.tar?region=eu-west-1&endpoint_override=127.0.0.1:9000&scheme=http&anonymous=true",
        "gs://bucket/a@b/train.tar?retry_limit_seconds=3",
        "http://127.0.0.1:5000/#/experiments/1/runs/ab",
        "sqlite:////home/me@work/mlflow.db",
        "/data/a=b/key=3/train-*.tar::/data/pass=1/x.tar",
        "timm/hf_hub:timm/vit_base_patch16_224.augreg_in21k",
        "path/to/file.py:factory",
        "efficientnet_lite0=weights/epoch=3.pth",
        "theirs=published/v.mat:255",
        "models:/uap-pool@champion",
        "runs:/0123456789abcdef0123456789abcdef/pool@2",
        "abfs://container@account.dfs.core.windows.net/train.tar",
        "net.py:vit?num_tokens=4&class_token=false&key=a",
        "if it has token authentication, set RAY_AUTH_MODE=token",
        "as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or a profile, or the machine's role)",
        "as AZURE_TENANT_ID, AZURE_CLIENT_ID and AZURE_CLIENT_SECRET (or those of `az login`)",
        "[Errno 32] Broken pipe: 'x'",
        "basic block sizes, key s1-001: cannot identify image",
        "http://localhost:9000 does not answer; write to me@example.org",
    ],
)
def test_text_without_secrets_is_unchanged(text):
    assert redact(text) == text


def test_the_values_of_unknown_url_options_are_hidden():
    text = "s3://bucket/k.tar?retrys=3&region=eu"
    assert redact(text) == "s3://bucket/k.tar?retrys=…&region=eu" and hide_credentials(text) == text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("--train-shards", "a.tar", "s3://AKIA:hunter2/+x@b/t.tar"),
            "--train-shards s3://…@b/t.tar seems to hold a cred",
        ),
        (("--train-shards=s3://k:hunter2@b/t.tar",), "--train-shards s3://…@b/t.tar seems to hold a credential"),
        (("--resume=s3://k:hunter2@b/run",), "--resume s3://…@b/run seems to hold a credential"),
        (("--storage", "s3://b?secret_key=hunter2"), "--storage s3://b?secret_key=… seems to hold a credential"),
        (("--output", "s3:/k:hunter2@b"), "--output s3:/…@b seems"),
        (("--weights", "https://h/w.pth?sig=hunter2"), "--weights https://h/w.pth?sig=… seems"),
        (("--val-shards", "pipe:cat hunter2"), "--val-shards pipe:… is a command, which is not run"),
        (("--secret-key", "hunter2"), "--secret-key: no option takes a credential"),
        (("--token=hunter2",), "--token: no option takes a credential"),
    ],
)
def test_a_command_line_with_a_credential_is_refused_without_repeating_it(words, said):
    with pytest.raises(ConfigError) as caught:
        refuse_credentials(("--model", "m", *words))
    assert str(caught.value).startswith(said) and "hunter2" not in str(caught.value)
    assert "credentials belong in the environment (AWS_ACCESS_KEY_ID" in str(caught.value)
    assert redact(str(caught.value)) == str(caught.value)  # as it is printed


@pytest.mark.parametrize(("words", "option"), [(("--resume", ""), "--resume"), (("--storage=",), "--storage")])
def test_an_empty_value_is_refused_because_its_variable_is_not_set(words, option):
    with pytest.raises(
        ConfigError, match=f"^{option} is given an empty value; if it is a variable of the shell, it is not set"
    ):
        refuse_empty(("--model", "m", *words, "--seed", "1"))


def test_locations_with_a_credential_are_refused_in_python_as_well():
    for url in (
        "s3://k:hun/ter2@b/t.tar",
        "s3://b/t.tar?secret_key=hun/ter2",
        "s3://k:a@hun/ter2@b/t",
        "abfs://c:hun/ter2@a",
    ):
        with pytest.raises(
            ConfigError, match=r"….* holds credentials, which runs and checkpoints would keep"
        ) as caught:
            locate(url)
        assert "ter2" not in str(caught.value)


NAMES = st.one_of(st.text('*_`~$|<>[]()!#+-.&;\\"ab1 \n\x1b\x9b', max_size=12), st.text(max_size=12))


@pytest.mark.parametrize(
    ("frame", "around"),
    [
        ("{}\n", ["paragraph"]),
        ("* {}\n", ["bullet_list", "list_item", "paragraph"]),
        ("| a |\n| - |\n| {} |\n", ["table"]),
    ],
)
@given(name=NAMES)
def test_an_escaped_name_in_markdown_is_nothing_but_text(frame, around, name):
    shown = printable(name).strip()
    assume(shown)
    tokens = (
        MarkdownIt("commonmark", {"html": True})
        .enable(["table", "strikethrough"])
        .parse(frame.format(escape_markdown(name)))
    )
    opened = [token.type.removesuffix("_open") for token in tokens if token.type.endswith("_open")]
    assert opened[: len(around)] == around and len(opened) == {"table": 7}.get(around[0], len(around))
    children = [token for token in tokens if token.type == "inline"][-1].children
    assert {child.type for child in children} <= {"text", "text_special"}
    assert "".join(child.content for child in children) == shown


@given(text=st.text(max_size=30).filter(lambda text: "\x1b" not in text))
def test_printable_text_is_one_line_without_control_characters(text):
    shown = printable(f"a\x1b[31m{text}\x1b]0;title\x07b")
    assert not any(ord(character) < 32 or 127 <= ord(character) < 160 for character in shown)
    assert len(shown.splitlines()) == 1 and shown.startswith("a") and "title" not in shown


@pytest.mark.parametrize("debug", [False, True])
def test_an_error_is_printed_without_what_libraries_quote(capsys, debug):
    with pytest.raises(SystemExit), one_line_errors(debug=debug):
        raise OSError("403 at https://host/k?X-Amz-Signature=hunter2")
    err = capsys.readouterr().err
    assert "X-Amz-Signature=…" in err and "hunter2" not in err and ("Traceback" in err) == debug


def everything(folder, *texts):
    """All files and output of a job."""
    return b"\n".join([*(text.encode() for text in texts), *(p.read_bytes() for p in folder.rglob("*") if p.is_file())])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--train-shards", "s3://AKIA:hunter2@bucket/t.tar", "--val-shards", "v.tar"),
        ("--train-shards", "t.tar", "--val-shards", "pipe:curl -H 'Authorization: Bearer hunter2' https://host/v.tar"),
        ("--storage=s3://bucket?session_token=hunter2",),
        ("--train-shard", "s3://bucket/t.tar?token=hunter2"),  # a misspelt option, which the parser would quote
        ("--resume=s3://AKIA:hunter2@bucket/run",),
        ("--experiment", "Bearer hunter2", "--max-passes", "0"),
    ],
)
def test_a_job_with_a_credential_ends_before_it_leaves_anything(tmp_path, options):
    code, out, err = finish(start(tmp_path, *options, has_store=False))
    assert code == 1 and err.startswith("error: ") and err.count("\n") == 1
    assert b"hunter2" not in everything(tmp_path, out, err) and not list(tmp_path.iterdir())


def test_a_job_stores_nothing_that_may_be_a_secret(shards, tmp_path):
    secrets = {"AWS_SECRET_ACCESS_KEY": "hunter2", "HF_TOKEN": "hunter2"}
    url = "s3://bucket/t.tar?endpoint_override=127.0.0.1:9&unheard_of=hunter2"
    code, out, err = finish(
        start(tmp_path, "--train-shards", url, "--val-shards", str(shards / "val-*.tar"), **secrets)
    )
    assert code == 1 and "unknown option 'unheard_of'" in err and err.count("\n") == 1
    tags = runs(tmp_path)[1][0].data.tags
    assert "unheard_of=…" in tags["command"] and "unheard_of=…" in tags["reason"]
    assert b"hunter2" not in everything(tmp_path, out, err)
