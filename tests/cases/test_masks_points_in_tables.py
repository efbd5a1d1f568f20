"""Bad masks and points in rows of a table: a sentence a row, the good rows are done."""

import csv
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common.__main__ import main
from common.run.example import write_phantom
from common.space import io
from common.space.points import Points, read_points, write_points

FAILED = {
    "empty": ({"fixed_mask": "empty.nii.gz"}, "empty.nii.gz: the mask leaves nothing of the scan "),
    "all": ({"moving_lesion": "all.nii.gz"}, "all.nii.gz: the lesion mask leaves nothing of the scan "),
    "elsewhere": ({"fixed_lesion": "elsewhere.nii.gz"}, "the lesion mask lies elsewhere in space than its scan "),
    "none": ({"guide": "0.1"}, "--guide needs landmarks of both scans"),
    "fewer": ({"fixed_points": "fixed_points.csv", "moving_points": "four.csv"}, "four.csv: has 4 points, "),
    "sorted": ({"fixed_points": "fixed_points.csv", "moving_points": "sorted.csv"}, "the names have another order"),
    "times": ({"moving": "film.nii.gz"}, "must be a 3-D scan, got 4-D data"),
}
GOOD = {
    "lesion": {"fixed_lesion": "coarse.nii.gz", "lesion_margin": "4"},
    "points": {"fixed_points": "fixed_points.csv", "moving_points": "moving_points.csv", "guide": "0.1"},
}


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pairs.csv, and what its rows name."""
    folder = tmp_path_factory.mktemp("table") / "pair"
    write_phantom(folder)
    scan, affine = io.read_scan(folder / "fixed.nii.gz")
    for name, value, shift in (("empty", 0, 0), ("all", 1, 0), ("elsewhere", 1, 900)):
        place = nib.affines.from_matvec(np.eye(3), [shift] * 3) @ affine
        io.write_label(np.full(scan.shape[1:], value, np.uint8), place, folder / f"{name}.nii.gz")
    moving, own = io.read_scan(folder / "moving.nii.gz")
    io.write_label(np.ones(moving.shape[1:], np.uint8), own, folder / "all.nii.gz")
    coarse = np.zeros([n // 3 for n in scan.shape[1:]], np.uint8)
    coarse[8:12, 8:12, 8:12] = 1
    io.write_label(coarse, affine @ np.diag([3, 3, 3, 1]), folder / "coarse.nii.gz")
    nib.save(nib.Nifti1Image(np.stack([scan[0]] * 2, -1), affine), folder / "film.nii.gz")
    lps, names = read_points(folder / "moving_points.csv")[:2]
    order = np.argsort(names)
    write_points(Points(lps[:4], names[:4]), folder / "four.csv")
    write_points(Points(lps[order], [names[n] for n in order]), folder / "sorted.csv")
    rows = {name: row for name, (row, _) in FAILED.items()} | GOOD
    columns = ["id", "fixed", "moving", *sorted({column for row in rows.values() for column in row} - {"moving"})]
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for name, row in rows.items():
            writer.writerow({"id": name, "fixed": "fixed.nii.gz", "moving": "moving.nii.gz"} | row)
    return folder / "pairs.csv"


@pytest.mark.slow
def test_a_sentence_a_row(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--method", "sacb_net", "--spacing", "8", "--refine_steps", "2", "--report", "none"]
    words += ["--device", "cpu", "--pairs", str(table), "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["common", "register", *words])
    with pytest.raises(SystemExit, match=f"{len(FAILED)} of {len(FAILED) + len(GOOD)} pairs failed, first empty"):
        main()
    with (tmp_path / "out" / "results.csv").open() as file:
        rows = {row["id"]: row for row in csv.DictReader(file)}
    assert set(rows) == {*FAILED, *GOOD}
    for name, (_, sentence) in FAILED.items():
        assert sentence in rows[name]["error"] and "\n" not in rows[name]["error"]
    assert not any(rows[name]["error"] for name in GOOD)
    assert (rows["points"]["guides"], rows["points"]["landmarks"]) == ("10", "2")
    assert {path.name for path in (tmp_path / "out").iterdir() if path.is_dir()} == set(GOOD), "nothing half-written"
