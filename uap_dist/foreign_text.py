"""Text from elsewhere (a command line, a file, a library's error), made fit for where it is shown or kept."""

import re
from urllib.parse import unquote_plus

HIDDEN = "…"
# of URLs; what other options say is hidden, for any of them may be a secret
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
_SHORT_NAME = r"key|sig|pass|auth|authorization|jwt|code"  # of a URL's option; elsewhere they mean other things as well
_VALUE = r"""(?:"[^"]*"|'[^']*'|[^\s&#"'<>]+)"""
# what follows the name may be hidden already
_CREDENTIALS = [
    (re.compile(pattern, re.IGNORECASE | re.DOTALL), replacement)
    for pattern, replacement in (
        (r"(?<!broken )\bpipe:.*", f"pipe:{HIDDEN}"),
        (r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", HIDDEN),
        (r"""\b(authorization['"]?\s*[:=]\s*['"]?)[^'"\r\n]+""", rf"\1{HIDDEN}"),
        (r"\b(bearer|basic)(?:\s+|%20|\+)[\w.~+/=%-]{6,}", rf"\1 {HIDDEN}"),
        # before the @ of a URL; passwords hold / and @ as well, ports are digits, and stores have none
        (rf"\b((?:s3a?|gs|gcs):/{{1,3}})(?!{HIDDEN})[^\s/?#:@]*:\S*@", rf"\1{HIDDEN}@"),
        (r"(\w:/{1,3})(?:[^\s/?#:@]*:(?!\d+(?:[/?#]|$))\S*|[^\s/?#]*)@", rf"\1{HIDDEN}@"),
        (r"""(?<![\w/:@.-])[^\s/:@'"=]+:(?!/)[^\s:@'"]+@(?=[\w.-]+(?::\d+)?(?:\W|$))""", f"{HIDDEN}@"),
        (rf"(?<![\w.-])({_NAME})(=|%3D)(?!{HIDDEN}){_VALUE}", rf"\1\2{HIDDEN}"),
        (rf"""(["'])({_NAME})(["']\s*:\s*)(?!{HIDDEN}){_VALUE}""", rf"\1\2\3{HIDDEN}"),
        (rf"(?<![\w.-])(?=\w+[_-])({_NAME})(:\s*)(?!{HIDDEN}){_VALUE}", rf"\1\2{HIDDEN}"),
    )
]
# known by their form: keys of AWS, Google, GitHub, GitLab, Hugging Face, Slack, Databricks, and JSON web tokens
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{30,}|ya29\.[\w.-]+|gh[pousr]_\w{20,}|github_pat_\w{20,}|"
    r"glpat-[\w-]{16,}|hf_[A-Za-z0-9]{30,}|xox[a-z]-[\w-]{10,}|dapi[0-9a-f]{32}|eyJ[\w-]{8,}\.[\w-]+(?:\.[\w-]*)?)"
)
_URL_OPTION = re.compile(r"(?<=[?&;])([^\s&;=#?]+)=([^\s&#]+)")
_TERMINAL_CODE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)?", re.DOTALL)
_JOINERS = "\u00a0\u200c\u200d"  # which names in many scripts have


def hide_credentials(text: str) -> str:
    """The text with … for each credential in it: of URLs (user:password@, ?token=…), headers, commands after pipe:, known tokens."""
    for pattern, replacement in _CREDENTIALS:
        text = pattern.sub(replacement, text)
    return _URL_OPTION.sub(lambda match: _hide_option(match, hides_unknown=False), _TOKEN.sub(HIDDEN, text))


def redact(text: str) -> str:
    """The text as it may be printed or stored: without credentials, and without what unknown options of URLs say."""
    return _URL_OPTION.sub(lambda match: _hide_option(match, hides_unknown=True), hide_credentials(text))


def _hide_option(match: re.Match[str], *, hides_unknown: bool) -> str:
    name = unquote_plus(match[1])
    is_secret = re.fullmatch(f"{_NAME}|{_SHORT_NAME}", name, re.IGNORECASE)
    return f"{match[1]}={HIDDEN}" if is_secret or (hides_unknown and name not in SHOWN_OPTIONS) else match[0]


def printable(text: str) -> str:
    """The text in one line without what a terminal would obey: its codes are left out, line ends are spaces, other such characters �."""
    plain = re.sub(r"[\r\n\t\v\f\x85\u2028\u2029]+", " ", _TERMINAL_CODE.sub("", text))
    return "".join(character if character.isprintable() or character in _JOINERS else "�" for character in plain)


def escape_markdown(text: object) -> str:
    """A name or value within a line or table cell of Markdown, which shows it as it is: no markup, no HTML, no second line."""
    line = re.sub(r"([\\`*\[\]|~$]|(?<![^\W_])_|_(?![^\W_]))", r"\\\1", printable(str(text)).strip())
    line = re.sub(r"^(\d+(?=[.)](?:\s|$))|(?=[#>+=-]))", r"\1\\", line)  # which begins a heading, a quotation or a list
    return re.sub(r"&(?=#?\w+;)", "&amp;", line).replace("<", "&lt;")
