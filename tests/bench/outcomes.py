"""One command as its user meets it, run in this process: how it ends, what it says, what it takes, what it leaves."""

import contextlib
import io
import logging
import os
import re
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import fire
from machine import peak_gib

SECONDS, GIB = 30, 3.0  # CPU-seconds, of which four times as many may pass beside other work
RAN = Path(tempfile.gettempdir()) / f"it_was_run_{os.getpid()}"  # is there if code in an input was run
EMPTY_CODE = 3  # of a command whose result is written, and empty
GOOD = ("refused", "warned", "as it is")


class Outcome(NamedTuple):
    """How a command ended.

    Attributes:
        kind: "refused" (one sentence, exit code not 0, nothing half-written), "warned" (done, and what is doubtful is
            said), "as it is" (done, and the input was harmless after all), "traceback", "silent", "half" (something
            half-written is left), or "slow" (over SECONDS or GIB).
        said: the end of what was printed.
        seconds: of the CPU.
    """

    kind: str
    said: str
    seconds: float
    gib: float


class TooSlow(BaseException):
    """Raised by the alarm; not an Exception, so that nothing catches it."""


def judged(
    run: Callable[[], None], *, fits: str = "", harmless: bool = False, out: Path, limit: float = SECONDS
) -> Outcome:
    """Run a command and judge its end.

    Args:
        fits: pattern of what has to be said for the command to be done; "" where it has to be refused.
        harmless: the command may be done without a word.
        out: folder in which it writes.
        limit: CPU-seconds that it may take.
    """
    before = time.process_time()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak of the memory begins anew
    base = peak_gib()
    code, text = ended(run, int(4 * limit))
    seconds, gib = time.process_time() - before, max(peak_gib() - base, 0.0)
    if code == "slow" or seconds > limit or gib > GIB:
        kind = "slow"
    elif code == "traceback" or "Traceback (most recent call last)" in text:
        kind = "traceback"
    elif left := leftovers(out):
        kind, text = "half", f"{text}\nleft: {left}"
    elif code == EMPTY_CODE and re.search("^warning: .", text, re.M):
        kind = "warned"
    elif code:
        kind = "refused" if len(re.findall(r"^error: .", text, re.M)) == 1 else "traceback"
    elif fits and re.search(fits, text):
        kind = "warned"
    else:
        kind = "as it is" if harmless else "silent"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("error: ")] or lines[-4:]
    return Outcome(kind, " | ".join(told)[-600:], round(seconds, 2), round(gib, 2))


def ended(run: Callable[[], None], seconds: int) -> tuple[object, str]:
    """Exit code, "traceback" or, after so many seconds, "slow", and everything that was printed."""
    stream, code = io.StringIO(), 0
    with _as_a_process(stream, seconds):
        try:
            run()
        except TooSlow:
            code = "slow"
        except SystemExit as end:
            if isinstance(end.code, str):
                print(end.code, file=sys.stderr)
            code = 1 if isinstance(end.code, str) else end.code or 0
        except Exception as error:
            hook = sys.excepthook
            code = 1 if getattr(hook, "__name__", "") == "hook" else "traceback"
            hook(type(error), error, error.__traceback__) if code == 1 else traceback.print_exc(file=sys.stderr)
    return code, stream.getvalue()


@contextlib.contextmanager
def _as_a_process(stream: io.StringIO, seconds: int) -> Iterator[None]:
    """Everything printed goes to `stream`; what belongs to a process is afterwards as before."""
    kept = sys.argv, list(sys.path), sys.excepthook, os.getcwd(), list(logging.root.handlers), dict(os.environ)
    sys.excepthook = sys.__excepthook__
    sys.modules.pop("common.run.first", None)
    usual = warnings.showwarning

    def late(*_: object) -> None:
        raise TooSlow

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream), warnings.catch_warnings():
            warnings.simplefilter("default")
            yield
    finally:
        signal.alarm(0)
        warnings.showwarning = usual
        sys.argv, sys.path[:], sys.excepthook = kept[:3]
        os.chdir(kept[3])
        logging.root.handlers[:] = kept[4]
        os.environ.clear()
        os.environ.update(kept[5])


def leftovers(folder: Path) -> list[str]:
    """Files that a command leaves under names of its own: of those that it was about to write."""
    if not folder.is_dir():
        return []
    return [path.name for path in folder.rglob(".*") if not path.name.startswith(".rows.")]


def common(*words: str) -> Callable[[], None]:
    """`python -m common WORDS`."""

    def run() -> None:
        from common.__main__ import main

        sys.argv = ["common", *words]
        main()

    return run


def bundle(*words: str) -> Callable[[], None]:
    """`python -m monai.bundle run WORDS`, with MONAI's own function behind fire."""

    def run() -> None:
        import monai.bundle

        sys.argv = ["monai.bundle", "run", *words]
        fire.Fire({"run": monai.bundle.run}, command=sys.argv[1:], name="monai.bundle")

    return run


def called(function: Callable[..., object], *args: object, **options: object) -> Callable[[], None]:
    """A call from Python: its InputError is the sentence."""

    def run() -> None:
        from common import InputError

        try:
            function(*args, **options)
        except InputError as error:
            sys.exit(f"error: {error}")

    return run
