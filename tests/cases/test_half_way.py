"""Full disks, folders that cannot be written to, two jobs in one folder: a sentence, and never half a file."""

import csv
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from common import InputError
from common.__main__ import main
from common.run.cli import sentence_of
from common.run.cohort import PairTable
from common.space import files, io

AFFINE = np.diag([2.0, 2, 2, 1])
SHIFT = "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
SHIFT += "Parameters: 1 0 0 0 1 0 0 0 1 0.3 0 0\nFixedParameters: 0 0 0\n"


@pytest.fixture
def full() -> Iterator[None]:
    """No file may have more than 2^18 bytes: as where a disk is full, writing fails in the middle."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**18, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    array = (np.random.default_rng(0).random((1, 60, 50, 40)) * 1000).astype(np.float32)
    io.write_scan(array, AFFINE, tmp_path / "scan.nii.gz")
    (tmp_path / "shift.tfm").write_text(SHIFT)
    return tmp_path / "scan.nii.gz"


def said(monkeypatch: pytest.MonkeyPatch, *words: object) -> str:
    monkeypatch.setattr(sys, "argv", ["common", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return str(end.value.code)


@pytest.mark.parametrize("ending", [".nii.gz", ".nii", ".mha", ".nrrd"])
def test_apply_on_a_full_disk(monkeypatch: pytest.MonkeyPatch, scan: Path, ending: str, request) -> None:
    out = scan.with_name(f"out{ending}")
    out.write_text("of an earlier run")
    request.getfixturevalue("full")
    text = said(monkeypatch, "apply", scan, scan.with_name("shift.tfm"), out, "--reference", scan)
    assert text == f"error: {out}: cannot be written (File too large)"
    assert out.read_text() == "of an earlier run" and len(list(scan.parent.iterdir())) == 3


@pytest.mark.parametrize("ending", [".nii.gz", ".h5"])
def test_compose_on_a_full_disk(monkeypatch: pytest.MonkeyPatch, scan: Path, ending: str, request) -> None:
    field = scan.with_name("field.nii.gz")
    io.write_scan(np.random.default_rng(0).random((3, 60, 50, 40)).astype(np.float32), AFFINE, field)
    out = scan.with_name(f"out{ending}")
    request.getfixturevalue("full")
    text = said(monkeypatch, "compose", out, field, scan.with_name("shift.tfm"), "--reference", scan)
    assert text == f"error: {out}: cannot be written (File too large)" and not out.exists()


def test_a_writer_that_says_nothing(tmp_path: Path) -> None:
    """ITK's for NIfTI: what is written is compared with what its header promises."""

    def cut(path: Path) -> None:
        io.write_scan(np.random.default_rng(0).random((1, 9, 9, 9)), AFFINE, path)
        path.write_bytes(path.read_bytes()[:-100])

    for name in ("a.nii", "a.nii.gz"):
        with pytest.raises(InputError, match=rf"{name}: cannot be written \(No space left on device\)"):
            files.replaced(tmp_path / name, cut)
        with pytest.raises(InputError, match=r"pair: cannot be written \(No space left on device\)"):
            files.write_folder(tmp_path / "pair", {name: cut})
    assert list(tmp_path.iterdir()) == []


def test_folders_that_cannot_be_written_to(monkeypatch: pytest.MonkeyPatch, scan: Path) -> None:
    gone, blocked = scan.with_name("gone") / "out.nii.gz", scan / "out.nii.gz"
    for out, reason in ((gone, "No such file or directory"), (blocked, "Not a directory")):
        text = said(monkeypatch, "apply", scan, scan.with_name("shift.tfm"), out, "--reference", scan)
        assert text == f"error: {out}: cannot be written ({reason})"
    text = said(monkeypatch, "phantom", scan / "demo")
    assert text == f"error: {scan / 'demo'}: cannot be written (File exists)"
    error = RuntimeError("wrapped by a framework")
    error.__cause__ = PermissionError(13, "Permission denied", "/x/y")
    assert sentence_of(error) == "/x/y: cannot be written or read (Permission denied)"


def test_names_of_250_bytes(tmp_path: Path) -> None:
    name = tmp_path / ("n" * 243 + ".nii.gz")
    files.replaced(name, lambda path: io.write_scan(np.ones((1, 3, 3, 3)), AFFINE, path))
    assert io.read_scan(name)[0].shape == (1, 3, 3, 3)


def dead() -> int:
    """Number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_is_left_and_what_is_in_use(tmp_path: Path) -> None:
    old, now = dead(), os.getpid()
    names = {
        f".{files.HOST}-{old}-0.partial": False,
        f".{files.HOST}-{old}-1.csv": False,
        f".{files.HOST}-{now}-0.partial": True,
        f".{files.HOST}-{now}-1.nii.gz": True,
        f".elsewhere-{old}-0.partial": True,
        f".elsewhere2-{old}-0.partial": False,  # of the day before yesterday
        ".mine": True,
        "visible": True,
    }
    for name in names:
        (tmp_path / name).mkdir() if name.endswith(".partial") else (tmp_path / name).touch()
    os.utime(tmp_path / f".elsewhere2-{old}-0.partial", (0, 0))
    files.remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {name for name, stays in names.items() if stays}


def test_the_second_job_begins_while_the_first_writes(tmp_path: Path) -> None:
    def write(path: Path) -> None:
        path.write_text("half")
        other = PairTable(str(tmp_path))
        other.begin([{"id": "b", "moving": "b.nii.gz", "fixed": "f.nii.gz"}])
        files.remove_leftovers(tmp_path)
        path.write_text("whole")

    files.write_folder(tmp_path / "a", {"report.json": write})
    assert (tmp_path / "a" / "report.json").read_text() == "whole" and len(list(tmp_path.iterdir())) == 1


def test_rows_of_another_job_stay(tmp_path: Path) -> None:
    for name in ("a", "b", "a"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "report.json").write_text("{}")
        table = PairTable(str(tmp_path))
        table.begin([{"id": name, "moving": f"{name}.nii.gz", "fixed": "f.nii.gz"}])
        table.add({"id": name, "moving": f"{name}.nii.gz", "fixed": "f.nii.gz"})
    with (tmp_path / "results.csv").open(newline="") as file:
        assert sorted(row["id"] for row in csv.DictReader(file)) == ["a", "b"]


ROWS = """
import sys
from common.run.cohort import PairTable
for n in range(15):
    name = f"{sys.argv[1]}{n}"
    table = PairTable(".")
    table.begin([{"id": name, "moving": name, "fixed": "f"}])
    table.add({"id": name, "moving": name, "fixed": "f"})
"""


def test_two_jobs_write_one_table(tmp_path: Path) -> None:
    names = {f"{job}{n}" for job in "ab" for n in range(15)}
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "report.json").write_text("{}")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    jobs = [subprocess.Popen([sys.executable, "-c", ROWS, job], cwd=tmp_path, env=environment) for job in "ab"]
    assert [job.wait(timeout=600) for job in jobs] == [0, 0]
    with (tmp_path / "results.csv").open(newline="") as file:
        assert {row["id"] for row in csv.DictReader(file)} == names
    assert not [path for path in tmp_path.glob(".*")]


def test_a_lock_that_was_left(tmp_path: Path) -> None:
    lock = tmp_path / ".results.csv.lock"
    lock.write_text(f"{files.HOST} {dead()}")
    with files.locked(tmp_path / "results.csv", patience=5):
        assert lock.read_text() == f"{files.HOST} {os.getpid()}"
        with files.locked(tmp_path / "results.csv", patience=0.1):  # in use: goes on without
            assert lock.exists()
        assert lock.exists()
    assert not lock.exists()
