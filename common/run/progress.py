"""What a run over pairs says while it works: which pair, which stage, the time left; and notes for the report.

In a terminal one line changes in place. Elsewhere, as in a log, lines are whole and few: every stage of the first pair,
a line a pair, and a stage where nothing was said for a while.
"""

import contextlib
import logging
import shutil
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sized
from typing import Any

from common import RegistrationWarning

PAUSE = 10.0  # seconds after which a log gets a line also where no pair has ended
BLINK = 0.1  # seconds between two changes of a terminal's line

_run: "Run | None" = None
_silent = False  # by `silent`
_quiet = False  # by the option --quiet
_notes: list[str] = []
_facts: dict[str, object] = {}
_of_all: dict[str, object] = {}
_stages: dict[str, float] = {}  # CPU seconds of this process in each stage of the present pair
_now: tuple[str, float] | None = None  # the present stage, and the CPU time when it began


class Run:
    """A count of equal things that are done one after the other, and what is shown of it.

    Args:
        total: how many.
        name: word in front of every line.
        of: what one is called, as "pair".
    """

    def __init__(self, total: int, name: str, of: str = "pair") -> None:
        self.total, self.name, self.of, self.done = total, name, of, 0
        self.begun = self.told = time.monotonic()
        self.live = sys.stderr.isatty()
        self.expected = 0.0  # seconds of one, where a forecast says so

    def left(self) -> str:
        """Time left in words: by the pace of those that are done, before by the forecast; empty where neither is."""
        here = time.monotonic() - self.begun
        whole = here / self.done if self.done else self.expected
        rest = whole * self.total - here
        return f", about {duration(rest)} left" if whole and rest >= 1 and self.done < self.total else ""

    def stage(self, text: str, *, again: bool = False) -> None:
        """Say what is being done; `again` for a stage that goes on."""
        where = f"{self.name} {self.of} {self.done + 1} of {self.total}" if self.total > 1 else self.name
        line, since = f"{where}: {text}{self.left()}", time.monotonic() - self.told
        if self.live and (since > BLINK or not again):
            self._write(f"\r\x1b[2K{line[: shutil.get_terminal_size().columns - 1]}")
        elif not self.live and (since > PAUSE or not (again or self.done)):
            self._write(f"{line}\n")

    def line(self, text: str) -> None:
        """A line that stays."""
        self._write(f"\r\x1b[2K{text}\n" if self.live else f"{text}\n")

    def advance(self, text: str = "") -> None:
        """One is done, of which `text` says something that stays."""
        self.done += 1
        if text and self.total > 1:
            self.line(f"{self.name} {self.of} {self.done} of {self.total}: {text}{self.left()}")

    def close(self) -> None:
        if self.live:
            self._write("\r\x1b[2K")

    def _write(self, text: str) -> None:
        if not quiet():
            self.told = time.monotonic()
            sys.stderr.write(text)
            sys.stderr.flush()


def duration(seconds: float) -> str:
    """As "40 s", "12 min", "3 h 20 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def counted(items: Iterable[Any], name: str, of: str) -> Iterator[Any]:
    """The items one by one, with a line that says how far it is, from five of them on."""
    total = len(items) if isinstance(items, Sized) else 0
    run = Run(total, name, of) if total >= 5 else None
    for item in items:
        if run:
            run.stage("reading", again=bool(run.done))
        yield item
        if run:
            run.advance()
    if run:
        run.close()


def note(text: str) -> None:
    """Keep a warning about the present pair for its row."""
    if text not in _notes:
        _notes.append(text)


def remark(text: str) -> None:
    """Say something about how the present pair is registered, and keep it for its report: no reason for doubt."""
    say(text)
    put(remarks=[*(kept("remarks") or []), text])


@contextlib.contextmanager
def noting() -> Iterator[None]:
    """Every `RegistrationWarning` inside becomes a note about the present pair; other warnings stay what they are."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, RegistrationWarning):
            note(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def put(**facts: object) -> None:
    """Keep facts about how the present pair is registered for its report."""
    _facts.update(facts)


@contextlib.contextmanager
def telling(**facts: object) -> Iterator[None]:
    """Facts for the report of every pair that is registered inside."""
    _of_all.update(facts)
    try:
        yield
    finally:
        for name in facts:
            del _of_all[name]


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """No bar, log or printed summary of what runs inside; errors stay what they are."""
    global _silent
    before, _silent = _silent, True
    try:
        with contextlib.redirect_stdout(None), unlogged():
            yield
    finally:
        _silent = before


@contextlib.contextmanager
def unlogged() -> Iterator[None]:
    """No warning or lesser message of any logger inside."""
    logged = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logged)


def hush(quiet: bool) -> None:
    """Whether the runs from now on say nothing, by the option --quiet."""
    global _quiet
    _quiet = quiet


def quiet() -> bool:
    """Whether a run says nothing but its errors."""
    return _silent or _quiet


def tell(text: str) -> None:
    """Print a result in words, on standard output."""
    if not quiet():
        print(text, flush=True)


def kept(name: str) -> object:
    """A fact about the present pair, None if it has not been put."""
    return _facts.get(name)


def take() -> tuple[list[str], dict[str, object]]:
    """The warnings and the facts kept since the last call, among them the CPU seconds of each stage so far."""
    _clock(None)
    taken = list(_notes), dict(_of_all) | dict(_facts) | ({"stages_cpu_s": dict(_stages)} if _stages else {})
    _notes.clear()
    _facts.clear()
    _stages.clear()
    return taken


def _clock(name: str | None) -> None:
    global _now
    cpu = time.process_time()
    if _now is not None:
        _stages[_now[0]] = _stages.get(_now[0], 0.0) + cpu - _now[1]
    _now = None if name is None else (name, cpu)


def stage(text: str) -> None:
    """What is being done now; the time until the next call counts as that stage's."""
    _clock(text)
    if _run is not None:
        _run.stage(text)


def step(done: int, total: int) -> None:
    """How far the present stage is, for stages that take long."""
    if _run is not None and _now is not None:
        _run.stage(f"{_now[0]} {done} of {total}", again=True)


def say(text: str) -> None:
    """Write a line that stays, about the first of many pairs only; nothing happens outside of a run."""
    if _run is not None and not _run.done:
        _run.line(text)


def expect(seconds: float) -> None:
    """How long a pair will take, for the time left until one has been done."""
    if _run is not None:
        _run.expected = seconds


def start(total: int, name: str) -> None:
    """Begin with `total` pairs."""
    global _run
    _run = Run(total, name)


def advance(text: str = "") -> None:
    """One pair is done; of many, a line with `text` stays."""
    if _run is not None:
        _run.advance(text)


def close() -> None:
    """All pairs are done."""
    global _run
    if _run is not None:
        _run.close()
    _run = None
