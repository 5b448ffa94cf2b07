"""What a person sees while a job runs: a progress bar on a terminal, plain lines in a log, one line for an error."""

import atexit
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from uap_dist.errors import ConfigError
from uap_dist.foreign_text import hide_credentials, in_one_line, printable, redact
from uap_dist.method.state import RoundReport

SECONDS_BETWEEN_LINES = 10.0
SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130  # exit code
WHERE_CREDENTIALS_BELONG = (
    "credentials belong in the environment (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS), "
    "in a profile, or in the machine's role"
)


class RoundProgress:
    """Shows rounds of one computation, or of several by name, as they are done; a context manager."""

    def __init__(self, console: Console, max_evaluations: int | None, num_computations: int = 1) -> None:
        self._console = console
        self._max_evaluations = max_evaluations
        self._num_computations = num_computations
        self._shares: dict[str, float] = {}
        self._done_before = 0.0  # by the runs that are resumed here
        self._started = self._last_line = time.monotonic()
        self._bar = Progress(
            TextColumn("rounds"), BarColumn(), TextColumn("{task.description}", markup=False), console=console
        )
        self._task = self._bar.add_task("the first round", total=1.0)

    def __enter__(self) -> "RoundProgress":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._bar.stop()

    def show(self, report: RoundReport, name: str = "") -> None:
        """Move the bar, or write a line where none was written for a while; evaluations always get their line."""
        if name not in self._shares and report.num_rounds:
            self._done_before += report.round_number / report.num_rounds / self._num_computations
        self._shares[name] = self._share(report)
        done = sum(self._shares.values()) / self._num_computations
        left = (time.monotonic() - self._started) * (1 - done) / max(done - self._done_before, 1e-9)
        of = f"/{report.num_rounds}" if report.num_rounds else ""
        prefix = f"{name}: " if name else ""
        status = (
            f"{prefix}round {report.round_number + 1}{of}, pass {report.pass_number + 1}, fooled {report.fooling.rate:.2f} of the "
            f"round, {report.fooling.num_examples / report.seconds:.1f} images/s, {duration(left)} left"
        )
        self._bar.update(self._task, completed=done, description=status)
        if not self._console.is_terminal and time.monotonic() > self._last_line + SECONDS_BETWEEN_LINES:
            self._line(status)
        if report.evaluation is not None:
            training = f"training {report.evaluation.train}, " if report.evaluation.train else ""
            self._line(
                f"{prefix}after {report.num_evaluations} network evaluations: {training}held-out {report.evaluation.val}"
            )

    def _share(self, report: RoundReport) -> float:
        if report.num_rounds:
            return (report.round_number + 1) / report.num_rounds
        assert self._max_evaluations is not None
        return min(1.0, report.num_evaluations / self._max_evaluations)

    def _line(self, text: str) -> None:
        self._last_line = time.monotonic()
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def set_up_logging(console: Console, *, debug: bool) -> None:
    """What the package logs as lines on the console."""
    logger = logging.getLogger("uap_dist")
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.addHandler(_Lines(console))
    logger.propagate = False  # libraries give the root logger handlers of their own


class _Lines(logging.Handler):
    """A line for each record, however long: what is wrapped cannot be searched for."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{record.levelname.lower()}: {printable(redact(record.getMessage()))}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def command(job: str | None = None) -> str:
    """How this job was started, for messages that say how to go on: `python jobs/compute.py`, or `uap-compute` where it is installed.

    Args:
        job: another one that is meant, such as finetune.
    """
    script = Path(sys.argv[0])
    if script.suffix == ".py":
        return f"python {script if job is None else script.with_name(f'{job}.py')}"
    return script.name if job is None else f"uap-{job}"


def refuse_credentials(words: Sequence[str]) -> None:
    """Look through a command line before any of it is parsed, printed or stored.

    Raises:
        ConfigError: one of its words seems to hold a credential; names the option, not the credential.
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
            what = (
                "is a command, which is not run and may hold a credential; give a path, or an s3:// or gs:// URL"
                if "pipe:" in value
                else "seems to hold a credential, which runs, checkpoints and logs would keep"
            )
            raise ConfigError(f"{option} {printable(redact(value))} {what}; {WHERE_CREDENTIALS_BELONG}".strip())


def raise_on_sigterm() -> None:
    """Make SIGTERM end the job as Ctrl-C does, and a second of either end it at once, as one that comes after all is done."""
    for number in SIGNALS:
        signal.signal(number, _interrupt)
    atexit.register(_end_at_once_from_now_on)  # before those of Ray, which takes seconds to end


def _interrupt(number: int, frame: FrameType | None) -> None:
    _end_at_once_from_now_on()
    os.write(sys.stderr.fileno(), b"ending; once more ends it at once\n")
    raise KeyboardInterrupt


def _end_at_once_from_now_on() -> None:
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: os._exit(INTERRUPTED))


@contextmanager
def one_line_errors(*, debug: bool) -> Iterator[None]:
    """End the process with one line: exit code 1 for an error, 130 when interrupted; tracebacks only for debugging.

    An error that is not the package's own is said to be unexpected, with its type. Credentials are hidden either way.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED)
    except Exception as error:
        if debug:
            sys.stderr.write(redact(traceback.format_exc()))
            sys.exit(1)
        sys.stderr.write(f"error: {in_one_line(error)}\n")
        sys.exit(1)


def duration(seconds: float) -> str:
    """Minutes and seconds, with hours where there are some, as 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
