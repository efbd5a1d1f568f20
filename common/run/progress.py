"""One progress bar for a run over pairs, where any step can say what it is doing, and leave notes for the report."""

import contextlib
import logging
import sys
import time
import warnings
from collections.abc import Iterator

from tqdm import tqdm

from common import RegistrationWarning

_bar: tqdm | None = None
_silent = False
_notes: list[str] = []
_facts: dict[str, object] = {}
_of_all: dict[str, object] = {}
_stages: dict[str, float] = {}  # CPU seconds of this process in each stage of the present pair
_now: tuple[str, float] | None = None  # the present stage, and the CPU time when it began


def note(text: str) -> None:
    """Keep a warning about the present pair for its row."""
    if text not in _notes:
        _notes.append(text)


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
    logged = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(None):
            yield
    finally:
        _silent = before
        logging.disable(logged)


def quiet() -> bool:
    """Whether a run is silent."""
    return _silent


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
    """Show `text` behind the running bar, if there is one; the time until the next call counts as that stage's."""
    _clock(text)
    if _bar is not None:
        _bar.set_postfix_str(text)


def say(text: str) -> None:
    """Write a line above the running bar; nothing happens without one."""
    if _bar is not None and not _silent:
        _bar.write(text, file=sys.stderr)


def start(total: int, name: str) -> None:
    """Open the bar for `total` pairs."""
    global _bar
    _bar = tqdm(total=total, desc=name, unit="pair", file=sys.stderr, disable=_silent)


def advance() -> None:
    """One pair is done."""
    if _bar is not None:
        _bar.update()


def close() -> None:
    """Leave the bar as it is."""
    global _bar
    if _bar is not None:
        _bar.close()
    _bar = None
