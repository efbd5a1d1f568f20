"""The process of the Slicer module: its words are those of the front door, it tells, it can be cancelled."""

import ast
import os
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "common" / "slicer" / "MonaiRegister"
sys.path.insert(0, str(FOLDER))

from MonaiRegisterLib import job  # noqa: E402

from common.run import progress  # noqa: E402
from common.run.door import _options  # noqa: E402

TELLS = """
import sys, time
print("method: samconvex", flush=True)
print("registering: network, about 30 s left", file=sys.stderr, flush=True)
time.sleep(60)
"""


def wait(process: job.Process, seconds: float = 30) -> int:
    until = time.monotonic() + seconds
    while (code := process.ended()) is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    return code


def test_methods_are_the_bundles() -> None:
    assert set(job.METHODS) == {"auto", *(path.name for path in (ROOT / "bundles").iterdir() if path.is_dir())}
    assert f"name = {job.PACKAGE}\n" in (ROOT / "setup.cfg").read_text()


def test_words_are_options_of_the_front_door() -> None:
    line = job.command("python", Path("f"), method="sacb_net", steps=3, label=True, more="--save_inverse True")
    assert line[:4] == ["python", "-m", "common", "register"]
    given = _options(line[4:])
    places = {name: os.path.join("f", file) for name, file in (("moving", "moving.nii"), ("fixed", "fixed.nii"))}
    places |= {"output_dir": os.path.join("f", "out"), "moving_label": os.path.join("f", "moving_label.nii")}
    assert given == places | {"method": "sacb_net", "refine_steps": "3", "save_inverse": "True"}
    assert "refine_steps" not in _options(job.command("python", Path("f"))[4:])


@pytest.mark.parametrize("left", (12, 900, 12_000))
def test_progress_is_that_of_our_lines(left: int) -> None:
    """The words that `common.run.progress` says are understood."""
    run = progress.Run(1, "registering")
    run.expected = left
    share = job.share_done(f"registering: network{run.left()}", 100)
    assert share == pytest.approx(100 / (100 + left), rel=0.02)
    assert job.share_done("registering: aligning", 100) is None


def test_lines_come_while_it_runs_and_it_is_cancelled() -> None:
    process = job.Process([sys.executable, "-c", TELLS])
    said, until = [], time.monotonic() + 20
    while len(said) < 2 and time.monotonic() < until:
        said += process.lines()
        time.sleep(0.02)
    assert said == ["method: samconvex", "registering: network, about 30 s left"] and process.ended() is None
    before = time.monotonic()
    process.cancel()
    assert wait(process) != 0 and process.cancelled and time.monotonic() - before < job.GRACE + 2


def test_its_last_words_and_exit_code() -> None:
    """The output in one piece, also after the end; what it says on both streams."""
    process = job.Process([sys.executable, "-c", "import sys; print('a'); sys.exit('error: no such file')"])
    assert wait(process) == 1
    process.lines()
    assert process.last == "error: no such file"


def test_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The version that a Python has of the package, and none of one that is nowhere."""
    about = tmp_path / "some_package-1.2.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text("Metadata-Version: 2.1\nName: some-package\nVersion: 1.2\n")
    monkeypatch.setattr(job, "PACKAGE", "some-package")
    assert job.installed(sys.executable, dict(os.environ) | {"PYTHONPATH": str(tmp_path)}) == "1.2"
    assert job.installed(sys.executable) == ""


def test_it_runs_on_python_3_9() -> None:
    """Older Slicers have it."""
    for path in FOLDER.rglob("*.py"):
        ast.parse(path.read_text(), feature_version=(3, 9))
        first = path.read_text()
        assert "from __future__ import annotations" in first or "|" not in first
