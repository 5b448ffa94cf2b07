"""A job as a process: the command line that started it, without credentials, and the signals that end it."""

import atexit
import os
import re
import shlex
import signal
import sys
import threading
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType

from uap_dist.errors import ConfigError
from uap_dist.foreign_text import hide_credentials, printable, redact

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130  # exit code
WHERE_CREDENTIALS_BELONG = (
    "credentials belong in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, HF_TOKEN), "
    "in a profile, in ~/.netrc, or in the machine's role"
)


def command(job: str | None = None) -> str:
    """How this job was started, for messages that tell how to continue: `python jobs/compute.py`, or `uap-compute` if installed.

    Args:
        job: name of another job, such as finetune, to give the command of that one instead.
    """
    script = Path(sys.argv[0])
    if script.suffix == ".py":
        return f"python {shlex.quote(str(script if job is None else script.with_name(f'{job}.py')))}"
    return script.name if job is None else f"uap-{job}"


def value_of(option: str) -> str | None:
    """The value of an option such as --resume on the command line, before all others are parsed; None without one."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(option, dest="value", nargs="?")
    value: str | None = parser.parse_known_args()[0].value
    return value


def refuse_credentials(words: Sequence[str]) -> None:
    """Check the words of a command line for credentials, before anything parses, prints or stores them.

    Raises:
        ConfigError: a word seems to hold a credential. The message names the option, not the credential.
    """
    option = ""
    for word in words:
        value = word
        if word.startswith("-"):
            name, _, value = word.partition("=")
            option = redact(name)
            if hide_credentials(f"{name}=value") != f"{name}=value":
                raise ConfigError(f"{option}: no option takes a credential; {WHERE_CREDENTIALS_BELONG}")
        if hide_credentials(value) != value:
            problem = (
                "is a command, which is not run and may hold a credential; give a path, or the URL itself, as s3://, gs://, hf:// or https://"
                if "pipe:" in value
                else "seems to hold a credential, which runs, checkpoints and logs would keep"
            )
            raise ConfigError(f"{option} {printable(redact(value))} {problem}; {WHERE_CREDENTIALS_BELONG}".strip())


def refuse_empty(words: Sequence[str]) -> None:
    """Raise ConfigError for an option with an empty value, as from a variable of the shell that is not set."""
    for before, word in pairwise(("", *words)):
        if not word or re.fullmatch("--[^=]+=", word):
            option = word.removesuffix("=") or before
            raise ConfigError(
                f"{option} is given an empty value; if it is a variable of the shell, it is not set".strip()
            )


def raise_on_sigterm() -> None:
    """Make SIGTERM raise KeyboardInterrupt, as Ctrl-C does.

    A second signal of either kind ends the process at once, and so does one that arrives when the job is done and only
    exit handlers run.
    """
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    atexit.register(_exit_on_signals)  # runs before Ray's exit handler, which takes seconds


@contextmanager
def finishing_first() -> Iterator[None]:
    """Let this block end before an interrupt raises KeyboardInterrupt.

    A call of a database that is broken off leaves its lock behind for as long as the traceback lives, and what is called next waits
    for it.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread is interrupted
        yield
        return
    _Interrupts.num_blocks += 1
    try:
        yield
    finally:
        _Interrupts.num_blocks -= 1
        if _Interrupts.is_due and not _Interrupts.num_blocks:
            _Interrupts.is_due = False
            raise KeyboardInterrupt


class _Interrupts:
    """Of this process: how many blocks end first, and whether an interrupt waits for them."""

    num_blocks, is_due = 0, False


def _interrupt(number: int, frame: FrameType | None) -> None:
    _exit_on_signals()
    os.write(sys.stderr.fileno(), b"stopping; interrupt again to stop at once\n")
    if not _Interrupts.num_blocks:
        raise KeyboardInterrupt
    _Interrupts.is_due = True


def _exit_on_signals() -> None:
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: os._exit(INTERRUPTED))
