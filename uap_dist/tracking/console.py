"""What a person sees while a job runs: a progress bar on a terminal, plain lines in a log, and one line for an error."""

import logging
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import TextIOWrapper
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from uap_dist.foreign_text import in_one_line, printable, redact
from uap_dist.method.rates import FOOLING, rate_titles
from uap_dist.method.state import Evaluation, RoundReport
from uap_dist.tracking.process import INTERRUPTED

SECONDS_BETWEEN_LINES = 10.0


class RoundProgress:
    """Progress of one computation, or of several told apart by name, as their rounds are done; a context manager."""

    def __init__(self, console: Console, max_evaluations: Mapping[str, int | None]) -> None:
        """Show nothing yet.

        Args:
            console: where progress appears.
            max_evaluations: of each computation by name: the network evaluations that end it if its number of rounds is not known in
                advance.
        """
        self._console = console
        self._max_evaluations = max_evaluations
        self._num_computations = len(max_evaluations)
        self._fractions: dict[str, float] = {}  # done of each computation
        self._done_before = 0.0  # fraction of everything that resumed computations had done when this process started
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

    def show(self, report: RoundReport, name: str) -> None:
        """Move the bar, or write a line if the last one is some time ago; every evaluation gets a line."""
        if name not in self._fractions and report.num_rounds:
            self._done_before += report.round_number / report.num_rounds / self._num_computations
        self._fractions[name] = self._fraction_done(report, name)
        done = sum(self._fractions.values()) / self._num_computations
        left_s = (time.monotonic() - self._started) * (1 - done) / max(done - self._done_before, 1e-9)
        of_rounds = f"/{report.num_rounds}" if report.num_rounds else ""
        prefix = f"{name}: " if name else ""
        status = (
            f"{prefix}round {report.round_number + 1}{of_rounds}, pass {report.pass_number + 1}, fooled {report.fooling.rate:.2f} of the "
            f"round, {report.fooling.num_examples / report.seconds:.1f} images/s, {duration(left_s)} left"
        )
        self._bar.update(self._task, completed=done, description=status)
        if not self._console.is_terminal and time.monotonic() > self._last_line + SECONDS_BETWEEN_LINES:
            self._write_line(status)
        if report.evaluation is not None:
            rates = "; ".join(_rates_in_words(report.evaluation))
            self._write_line(f"{prefix}after {report.num_evaluations} network evaluations: {rates}")

    def _fraction_done(self, report: RoundReport, name: str) -> float:
        if report.num_rounds:
            return (report.round_number + 1) / report.num_rounds
        most = self._max_evaluations[name]
        assert most is not None
        return min(1.0, report.num_evaluations / most)

    def _write_line(self, text: str) -> None:
        self._last_line = time.monotonic()
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _rates_in_words(evaluation: Evaluation) -> Iterator[str]:
    """Each kind of rate on training images, if they were measured, and held-out ones; fooling rates go without saying."""
    titles = rate_titles(evaluation.val_rates)
    for kind, val in evaluation.val_rates.items():
        name = "" if tuple(evaluation.val_rates) == (FOOLING,) else f"{titles[kind]} "
        train = (evaluation.train_rates or {}).get(kind)
        yield name + (f"training {train}, " if train else "") + f"held-out {val}"


def replace_unknown_characters() -> None:
    """Have stdout and stderr show ? where the locale's encoding lacks a character, as that of C lacks ℓ, ∞ and ±."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


def set_up_logging(console: Console, *, debug: bool) -> None:
    """Print the package's log records to the console, one line each; those of level DEBUG only if `debug`."""
    logger = logging.getLogger("uap_dist")
    logger.setLevel(logging.DEBUG if debug else logging.INFO)
    logger.addHandler(_ConsoleHandler(console))
    logger.propagate = False  # libraries add handlers to the root logger


class _ConsoleHandler(logging.Handler):
    """Prints each record as one line, however long, because wrapped text cannot be searched."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        line = f"{record.levelname.lower()}: {printable(redact(record.getMessage()))}"
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextmanager
def one_line_errors(*, debug: bool) -> Iterator[None]:
    """Report an exception of the block in one line on stderr and exit: with code 1, or 130 after an interrupt.

    With `debug` the traceback is printed instead. Errors that are not the package's own are called unexpected and named
    by type. Credentials are hidden in either case.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(INTERRUPTED)
    except Exception as error:
        sys.stderr.write(redact(traceback.format_exc()) if debug else f"error: {in_one_line(error)}\n")
        sys.exit(1)


def duration(seconds: float) -> str:
    """Minutes and seconds, such as 2:03, with hours if there are any, such as 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
