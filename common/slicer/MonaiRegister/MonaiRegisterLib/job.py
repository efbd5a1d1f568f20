"""A registration as a process: its command line, its progress, its results.

Plain Python: nothing of Slicer, whose window must not wait, and nothing of `common`, which another Python may have.
"""

from __future__ import annotations  # older Slicers have Python 3.9

import json
import os
import queue
import re
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import NamedTuple

METHODS = ("auto", "samconvex", "sacb_net", "dual_flownet", "residual_aligner")
PACKAGE = "monai-registration-bundles"
LEFT = re.compile(r", about (?:(\d+) h )?(?:(\d+) (min|s)) left")
SECONDS = {"s": 1, "min": 60}
GRACE = 5.0  # seconds that a process has to end by itself


class Results(NamedTuple):
    """What a registration has written; None for what it has not."""

    warped: Path
    transform: Path
    warped_label: Path | None
    report: Path
    verdict: str
    warnings: list[str]


def command(
    python: str, folder: Path, *, method: str = "auto", steps: int | None = None, label: bool = False, more: str = ""
) -> list[str]:
    """The line that registers FOLDER/moving.nii to FOLDER/fixed.nii, with FOLDER/moving_label.nii.

    Args:
        python: the program.
        folder: of the scans; the results go to FOLDER/out.
        method: auto, or a bundle.
        steps: of the refinement; None for those that the method has by default.
        label: whether there is a label map of the moving scan.
        more: further options, as they would be typed.
    """
    line = [python, "-m", "common", "register", str(folder / "moving.nii"), str(folder / "fixed.nii")]
    line += [str(folder / "out"), "--method", method]
    line += [] if steps is None else ["--refine_steps", str(steps)]
    line += ["--moving_label", str(folder / "moving_label.nii")] if label else []
    return line + more.split()


def installed(python: str, environment: dict[str, str] | None = None) -> str:
    """Version of the package that a Python has; empty if it has none."""
    code = f"import importlib.metadata as m; print(m.version({PACKAGE!r}))"
    done = subprocess.run([python, "-c", code], env=environment, capture_output=True, text=True, **_hidden())
    return done.stdout.strip() if done.returncode == 0 else ""


def install_line(python: str, source: str) -> list[str]:
    """The line that installs the package from a folder, a wheel, an address or an index."""
    return [python, "-m", "pip", "install", source]


def results(folder: Path) -> Results:
    """What is in FOLDER/out.

    Raises:
        FileNotFoundError: no report there.
    """
    (report,) = (folder / "out").glob("*/report.json") or [None]
    content = json.loads(report.read_text(encoding="utf-8"))
    files = {name: report.parent / name for name in ("warped.nii.gz", "transform.h5", "warped_label.nii.gz")}
    label = files["warped_label.nii.gz"]
    return Results(
        files["warped.nii.gz"],
        files["transform.h5"],
        label if label.is_file() else None,
        report.with_suffix(".html"),
        content["verdict"],
        content["warnings"],
    )


def share_done(line: str, seconds: float) -> float | None:
    """How much of the work is done, in [0, 1], by the time left that a line tells after so many seconds; or None."""
    if not (found := LEFT.search(line)):
        return None
    left = 3600 * int(found[1] or 0) + int(found[2]) * SECONDS[found[3]]
    return seconds / (seconds + left) if seconds + left else None


class Process:
    """A program that runs beside; its lines come one by one, and it can be cancelled.

    Args:
        line: program and its words.
        environment: its variables; None for those of this process.
    """

    def __init__(self, line: list[str], environment: dict[str, str] | None = None) -> None:
        self.begun = time.monotonic()
        self.cancelled = False
        self.last = ""  # line that it has said
        self._lines: queue.Queue[str] = queue.Queue()
        group = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP} if os.name == "nt" else {}
        self._program = subprocess.Popen(
            line,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=os.name != "nt",
            **(_hidden() | group),
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self._program.stdout:
            self._lines.put(line.rstrip())

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.begun

    def lines(self) -> list[str]:
        """What it has said since the last call."""
        found = []
        while not self._lines.empty():
            found.append(self._lines.get())
        self.last = next((line for line in reversed(found) if line.strip()), self.last)
        return found

    def ended(self) -> int | None:
        """Its exit code once it has ended and all of its lines are there; None before."""
        code = self._program.poll()
        return code if code is not None and not self._reader.is_alive() else None

    def cancel(self) -> None:
        """End it and what it has started; a pair's folder appears whole or not at all, so nothing is left half done."""
        self.cancelled = True
        self._signal("SIGTERM")
        try:
            self._program.wait(GRACE)
        except subprocess.TimeoutExpired:
            self._signal("SIGKILL")
            self._program.wait()

    def _signal(self, name: str) -> None:
        if self._program.poll() is not None:
            return
        if os.name == "nt":
            self._program.kill()
        else:
            os.killpg(self._program.pid, getattr(signal, name))


def _hidden() -> dict:
    """No console window on Windows."""
    return {"creationflags": subprocess.CREATE_NO_WINDOW} if os.name == "nt" else {}
