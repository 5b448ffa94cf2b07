"""Text from outside (command lines, files, errors of libraries), made safe to print, store or embed: no credentials, no markup."""

import codecs
import errno
import re
import unicodedata
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from urllib.parse import unquote_plus

from uap_dist.errors import UapDistError

REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)  # the system refuses; this is no bug
HIDDEN = "…"
NUM_SHOWN = 5  # complaints in one line
# query options of URLs whose values are shown; the value of any other option may be a secret
SHOWN_OPTIONS = frozenset(
    (
        *("region", "endpoint_override", "scheme", "anonymous", "retries", "connect_timeout", "request_timeout"),
        *("allow_bucket_creation", "force_virtual_addressing", "tls_ca_file_path", "retry_limit_seconds", "project_id"),
    )
)
_NAME = (
    r"[\w.-]*(?:secret|token(?!iz)|passw|passphrase|pwd|signature|credential|access[_-]?key|account[_-]?key|api[_-]?key|"
    r"private[_-]?key)[\w.-]*"
)
# of query options only; elsewhere these words are common
_SHORT_NAME = (
    r"\w*key|sig|pass|pw|auth|authorization|oauth\w*|\w*sess(?:ion)?_?(?:id)?|sid|cookie\w*|verify|jwt|code|md5|hmac|hdn\w+|"
    r"ticket"
)
_PLAIN = r"(?:\d{1,4}|true|false|none)"  # as the value of a query option no secret
_SCHEME = r"(?<!\bmodel)(?<!\brun)\w:/{1,3}"  # but of MLflow's models:/NAME@ALIAS
_VALUE = r"""(?:"[^"]*"|'[^']*'|[^\s&#"'<>]+)"""
# a value that is hidden already stays as it is
_CREDENTIALS = [
    (re.compile(pattern, re.IGNORECASE | re.DOTALL), replacement)
    for pattern, replacement in (
        (rf"(?<!broken )\bpipe:(?!{HIDDEN}).*", f"pipe:{HIDDEN}"),
        (r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", HIDDEN),
        (r"""\b(authorization['"]?\s*[:=]\s*['"]?)[^'"\r\n]+""", rf"\1{HIDDEN}"),
        (r"\b(bearer|basic)(?:\s+|%20|\+)[\w.~+/=%-]{6,}", rf"\1 {HIDDEN}"),
        # user and password before the @ of a URL; a password may hold / and @, a port has digits only, object stores have no port
        (rf"\b((?:s3a?|gs|gcs):/{{1,3}})(?!{HIDDEN})[^\s/?#:@]*:\S*@", rf"\1{HIDDEN}@"),
        (rf"({_SCHEME})[^\s/?#:@]*:(?!\d+(?:[/?#]|$))\S*@", rf"\1{HIDDEN}@"),
        (
            rf"({_SCHEME})(?<!\babfs://)(?<!\babfss://)(?!{HIDDEN})[^\s/?#]*@",
            rf"\1{HIDDEN}@",
        ),  # there it is a container
        (r"""(?<![\w/:@.-])[^\s/:@'"=]+:(?!/)[^\s:@'"]+@(?=[\w.-]+(?::\d+)?(?:\W|$))""", f"{HIDDEN}@"),
        (rf"(?<![\w.-])(?!(?<=[?&])[\w.-]+={_PLAIN}(?![^\s&#]))({_NAME})(=|%3D)(?!{HIDDEN}){_VALUE}", rf"\1\2{HIDDEN}"),
        (rf"""(["'])({_NAME})(["']\s*:\s*)(?!{HIDDEN}){_VALUE}""", rf"\1\2\3{HIDDEN}"),
        (rf"(?<![\w.-])(?=\w+[_-])({_NAME})(:\s*)(?!{HIDDEN}){_VALUE}", rf"\1\2{HIDDEN}"),
    )
]
# tokens that are known by their form: AWS, Google, GitHub, GitLab, Hugging Face, Slack, Databricks, and JSON web tokens
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{30,}|ya29\.[\w.-]+|gh[pousr]_\w{20,}|github_pat_\w{20,}|"
    r"glpat-[\w-]{16,}|hf_[A-Za-z0-9]{30,}|xox[a-z]-[\w-]{10,}|dapi[0-9a-f]{32}|eyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]*)?)"
)
_URL_OPTION = re.compile(r"(?<=[?&;])([^\s&;=#?]+)=([^\s&#]+)")
_ARGUMENTS = re.compile(r":[^\W\d]\w*\?")  # of a factory, as in net.py:build?depth=18, which are no options of a URL
_TERMINAL_CODE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)?", re.DOTALL)
_JOINERS = "\u00a0\u200c\u200d"  # part of names in many scripts


def hide_credentials(text: str) -> str:
    """Replace each credential by …: in URLs (user:password@, ?token=…), headers, commands after pipe:, and known tokens."""
    for pattern, replacement in _CREDENTIALS:
        text = pattern.sub(replacement, text)
    return _URL_OPTION.sub(lambda match: _hide_option(match, hides_unknown=False), _TOKEN.sub(HIDDEN, text))


def redact(text: str) -> str:
    """Make a text fit to be printed or stored: hide credentials, and the values of unknown query options of URLs."""
    return _URL_OPTION.sub(lambda match: _hide_option(match, hides_unknown=True), hide_credentials(text))


def _hide_option(match: re.Match[str], *, hides_unknown: bool) -> str:
    name = unquote_plus(match[1])
    before = re.split(r"\s", match.string[: match.start()])[-1]
    are_arguments = _ARGUMENTS.search(before) and "://" not in before
    names = _NAME if are_arguments else f"{_NAME}|{_SHORT_NAME}"
    is_secret = re.fullmatch(names, name, re.IGNORECASE) and not re.fullmatch(_PLAIN, match[2], re.IGNORECASE)
    is_unknown = not are_arguments and name not in SHOWN_OPTIONS
    return f"{match[1]}={HIDDEN}" if is_secret or (hides_unknown and is_unknown) else match[0]


def to_text(data: bytes, errors: str = "strict") -> str:
    """Text in UTF-8, or in UTF-16 where it begins with the mark of that; without a mark, and with letters composed (NFC).

    Raises:
        UnicodeDecodeError: it is in another encoding, and `errors` is "strict"; see `bytes.decode`.
    """
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    return unicodedata.normalize("NFC", data.decode(encoding, errors))


def printable(text: str) -> str:
    """One line without control characters: escape sequences are left out, line ends become spaces, the rest becomes �."""
    plain = re.sub(r"[\r\n\t\v\f\x85\u2028\u2029]+", " ", _TERMINAL_CODE.sub("", text))
    return "".join(character if character.isprintable() or character in _JOINERS else "�" for character in plain)


def in_one_line(error: BaseException) -> str:
    """An error as the terminal and MLflow show it, without credentials; an unexpected one with its type and what to do."""
    if isinstance(error, UapDistError):
        said = str(error)
    elif isinstance(error, OSError) and error.errno in REFUSED:
        said = f"{error.strerror}{f': {error.filename}' if error.filename else ' (--debug shows where)'}"
    else:
        last = (str(error).strip().splitlines() or ["no message"])[-1]
        said = f"unexpected {type(error).__name__}: {last}; run it again with --debug to see where, and report it"
    return printable(redact(said.strip()))


def first_line(error: BaseException) -> str:
    """The first line of another library's error, to quote in a message; its type if it has no text."""
    said = f"there is no {error}" if isinstance(error, KeyError) else str(error)
    lines = [line.strip() for line in map(printable, said.splitlines()) if line.strip()]
    return lines[0] if lines else type(error).__name__


def escape_markdown(text: object) -> str:
    """Escape a value for a line or table cell of Markdown: it is shown literally, in one line, without markup or HTML."""
    line = re.sub(r"([\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", printable(str(text)).strip())
    line = re.sub(
        r"^(\d+(?=[.)](?:\s|$))|(?=[#>+=-]))", r"\1\\", line
    )  # at the start of a line: heading, quotation or list
    return re.sub(r"&(?=#?\w+;)", "&amp;", line).replace("<", "&lt;")


def nearest(name: str, names: Iterable[str], otherwise: Sequence[str] = ()) -> str:
    """The names that are most like one which is not among them, in one line; if none is, the first of others."""
    return ", ".join(get_close_matches(name, list(names), n=3, cutoff=0.4) or otherwise[:3]) or "none"


def first_few(complaints: Sequence[str]) -> str:
    """The first few of them in one line."""
    return "; ".join(complaints[:NUM_SHOWN]) + "; …" * (len(complaints) > NUM_SHOWN)
