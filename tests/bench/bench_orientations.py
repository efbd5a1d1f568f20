"""Scans stored in any of the 48 axis orders, with unequal voxels, turned in space: is the result the same one?

    python tests/bench/bench_orientations.py [--every 1] [--seed 0] [--rows FILE] [--minutes 0] [--output FILE]
    python tests/bench/bench_orientations.py --prealign none --every 12

All 768 pairs take ten minutes of a CPU. With --rows, a file of a line a pair, what it holds is not done again;
--minutes ends a part (exit code 75), and the same line goes on. --output is tests/bench/results/orientations.json.

Fixed and moving scan are, each for itself, of equal or unequal voxels, straight or oblique: 16 kinds of pairs. Each is
registered in all 48 orders of the fixed scan, that of the moving scan being another permutation of the 48. Then ITK
alone (SimpleITK), given the files that a user has, has to find what was written:
- warped: the transform on the moving file, against warped.nii.gz; largest difference as a share of the range;
- landmarks: the transform at warped_points.csv against the moving landmarks, mm;
- labels: voxels of warped_label.nii.gz that are not those of ITK's nearest neighbour, as a share of the labelled;
- Dice, and copy: the warped landmarks, largest distance in mm, against the same pair stored as RAS: the same voxels.

The alignment and the network see both scans in closest RAS order, and nothing that lies exactly between two voxels is
decided by rounding. So the order of the axes changes as much as the rounding of affines in the files does: 1e-4 mm.
"""

import csv
import itertools
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import fire
import nibabel as nib
import numpy as np
import SimpleITK as sitk
from machine import ROOT, hardware

sys.path.insert(0, str(ROOT))

from common import phantom  # noqa: E402
from common.run.registrar import Registrar  # noqa: E402
from common.space.points import Points, write_points  # noqa: E402

ORIENTATIONS = [
    np.stack([order, signs], 1)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]
VOXELS = {"equal": (5.0, 5.0, 5.0), "unequal": (4.0, 5.0, 7.0)}  # mm
ANGLES = {"straight": (0.0, 0.0, 0.0), "oblique": (0.3, -0.2, 0.25)}  # radians
VIEW = np.array([150.0, 180.0, 140.0])  # mm
KINDS = [f"{voxels} {turn}" for voxels in VOXELS for turn in ANGLES]
LIMITS = {"warped": 0.01, "landmarks": 0.01, "labels": 0.01, "dice": 0.01, "copy": 0.01}
MOTION = phantom.Deformation(0)


class Stored:
    """A scan of a pair with its label map and landmarks, in files of any axis order."""

    def __init__(self, role: str, kind: str) -> None:
        voxels, turn = kind.split()
        linear = nib.eulerangles.euler2mat(*ANGLES[turn]) @ np.diag(VOXELS[voxels])
        size = tuple(int(n) for n in np.ceil(VIEW / VOXELS[voxels]))
        self.role, self.affine = role, nib.affines.from_matvec(linear, -linear @ ((np.array(size) - 1) / 2))
        there = {"fixed": None, "moving": MOTION}[role]
        self.image, self.label = phantom.sample(size, self.affine, there, seed=int(role == "moving"))
        marks = np.array(list(phantom.LANDMARKS.values()))
        self.points = Points((marks if there is None else there.truth(marks)) * [-1, -1, 1], list(phantom.LANDMARKS))

    def write(self, folder: Path, orientation: np.ndarray) -> dict[str, str]:
        """The files, by the names of their options."""
        names = {"": f"{self.role}.nii", "_label": f"{self.role}_label.nii", "_points": f"{self.role}_points.csv"}
        for ending, array in (("", self.image), ("_label", self.label)):
            nib.save(nib.Nifti1Image(array, self.affine).as_reoriented(orientation), folder / names[ending])
        write_points(self.points, folder / names["_points"])
        return {self.role + ending: str(folder / name) for ending, name in names.items()}


def by_itk(files: dict[str, str], out: Path) -> dict[str, float]:
    """What SimpleITK makes of the transform and the moving files, against what was written."""
    transform, fixed = sitk.ReadTransform(str(out / "transform.h5")), sitk.ReadImage(files["fixed"])

    def pair(name: str, interpolator: int) -> tuple[np.ndarray, np.ndarray]:
        moving = sitk.ReadImage(files[f"moving{name}"])
        theirs = sitk.Resample(moving, fixed, transform, interpolator, 0.0, moving.GetPixelID())
        ours = sitk.ReadImage(str(out / f"warped{name}.nii.gz"))
        assert ours.GetSize() == fixed.GetSize() and np.allclose(ours.GetOrigin(), fixed.GetOrigin(), atol=1e-3)
        assert np.allclose(ours.GetDirection(), fixed.GetDirection(), atol=1e-5)
        return tuple(sitk.GetArrayFromImage(image).astype(np.float64) for image in (theirs, ours))

    theirs, ours = pair("", sitk.sitkLinear)
    found = {"warped": float(np.abs(theirs - ours).max() / np.ptp(ours))}
    theirs, ours = pair("_label", sitk.sitkNearestNeighbor)
    found["labels"] = float((theirs != ours).sum() / (ours > 0).sum())
    marks = [places(out / "warped_points.csv"), places(Path(files["moving_points"]))]
    there = np.array([transform.TransformPoint(mark) for mark in marks[0].tolist()])
    return found | {"landmarks": float(np.linalg.norm(there - marks[1], axis=1).max())}


def mean_dice(one: Path, other: Path) -> float:
    """Mean Dice of the labels of a map and another on its grid."""
    one, other = (np.asarray(nib.load(path).dataobj) for path in (one, other))
    pairs = [(one == code, other == code) for code in np.unique(one[one > 0])]
    return float(np.mean([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs]))


def places(path: Path) -> np.ndarray:
    with path.open(newline="") as file:
        return np.array([[float(row[axis]) for axis in "xyz"] for row in csv.DictReader(file)])


def pairs(every: int, seed: int) -> Iterator[tuple[str, str, int, int]]:
    """Kinds and orientations of fixed and moving scan; for each two kinds first that both are stored as RAS."""
    drawn = np.random.default_rng(seed)
    for fixed, moving in itertools.product(KINDS, KINDS):
        partner = [0, *(1 + drawn.permutation(47))]
        others = np.arange(1, 48)[drawn.integers(every) :: every]
        yield from ((fixed, moving, n, partner[n]) for n in (0, *others))


def check(
    chosen: Iterable[tuple[str, str, int, int]], folder: str | Path, prealign: str = "affine"
) -> Iterator[dict]:
    """A row a pair: its kinds, its axes, and what `by_itk` and the comparison with RAS say."""
    options = {"spacing": 6.0, "report": "none", "displacement": False, "prealign": prealign}
    registrar = Registrar(ROOT / "bundles" / "sacb_net", device="cpu", **options)
    stored = {(role, kind): Stored(role, kind) for role in ("fixed", "moving") for kind in KINDS}
    plain = {}
    for number, (fixed, moving, first, second) in enumerate(chosen):
        place = Path(folder) / str(number)
        place.mkdir()
        files = stored["fixed", fixed].write(place, ORIENTATIONS[first])
        files |= stored["moving", moving].write(place, ORIENTATIONS[second])
        label = files.pop("fixed_label")  # the run would measure distances of surfaces, half of its time
        (row,) = registrar.run(verbose=False, output_dir=str(place / "out"), **files)
        dice = mean_dice(Path(label), place / "out" / row["id"] / "warped_label.nii.gz")
        marks = places(place / "out" / row["id"] / "warped_points.csv")
        plain_dice, plain_marks = plain.setdefault((fixed, moving), (dice, marks))
        apart = {"dice": abs(dice - plain_dice), "copy": float(np.linalg.norm(marks - plain_marks, axis=1).max())}
        codes = ["".join(nib.aff2axcodes(nib.load(files[role]).affine)) for role in ("fixed", "moving")]
        told = {"fixed": f"{fixed} {codes[0]}", "moving": f"{moving} {codes[1]}"} | apart
        yield told | by_itk(files, place / "out" / row["id"])
        shutil.rmtree(place)


def left(every: int, seed: int, rows: list[dict]) -> list[tuple[str, str, int, int]]:
    """The pairs that have no row yet; of kinds with one left, that stored as RAS as well, to which it is compared."""
    chosen = list(pairs(every, seed))
    missing = chosen[len(rows) :]
    again = {(fixed, moving) for fixed, moving, number, _ in missing[:1] if number}
    return [pair for pair in chosen if pair[:2] in again and not pair[2]] + missing


def main(
    every: int = 1, seed: int = 0, rows: str = "", minutes: float = 0, output: str = "", prealign: str = "affine"
) -> None:
    """Check all pairs, or each `every`-th orientation; exit code 1 where one is beyond a limit."""
    begin, end = time.process_time(), time.monotonic() + 60 * minutes
    kept, found = Path(rows) if rows else None, []
    if kept and kept.is_file():
        found = [json.loads(line) for line in kept.read_text().splitlines()]
    todo = left(every, seed, found)
    again = len(found) + len(todo) - len(list(pairs(every, seed)))  # done once more to compare with
    with tempfile.TemporaryDirectory() as place:
        for number, row in enumerate(check(todo, place, prealign)):
            if number >= again:
                found.append(row)
                if kept:
                    kept.write_text("".join(json.dumps(row) + "\n" for row in found))
            if minutes and time.monotonic() > end and len(found) < len(list(pairs(every, seed))):
                print(f"{len(found)} pairs done")
                sys.exit(75)
    summary(found, seed, output)
    print(f"{time.process_time() - begin:.0f} CPU-s")


def summary(rows: list[dict], seed: int, output: str) -> None:
    """Print, and write if asked for, what is worst; exit code 1 where a pair is beyond a limit."""
    worst = {name: max(rows, key=lambda row: row[name]) for name in LIMITS}
    for name, row in worst.items():
        print(f"{name}: at most {row[name]:.2g} (limit {LIMITS[name]}): {row['fixed']} from {row['moving']}")
    beyond = [row for row in rows if any(row[name] > limit for name, limit in LIMITS.items())]
    print(f"{len(rows)} pairs, {len(beyond)} beyond a limit")
    if output:
        content = {"hardware": hardware(), "seed": seed, "pairs": len(rows), "limits": LIMITS, "worst": worst}
        Path(output).write_text(json.dumps(content | {"beyond": beyond}, indent=1) + "\n")
    if beyond:
        sys.exit(1)


if __name__ == "__main__":
    fire.Fire(main)
