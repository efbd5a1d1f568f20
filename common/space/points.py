"""Files of landmarks: CSV as ANTs has it, voxel lists of the Learn2Reg challenges, markups of 3-D Slicer."""

import csv
import json
import os
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from common import InputError
from common.space.io import LPS_FROM_RAS, replaced

SPACES = {"LPS": 1.0, "1": 1.0, "RAS": -1.0, "0": -1.0}  # sign of the first two axes; 0 and 1 are Slicer's numbers
NAMES = ("name", "label", "id")
FORMS = "columns x, y, z (LPS mm), or i, j, k (voxels), or three numbers a line without a header (voxels)"


class Points(NamedTuple):
    """Landmarks of one scan."""

    lps: np.ndarray  # (N, 3) mm
    names: list[str]


def read_points(path: str | os.PathLike, affine_ras: np.ndarray | None = None) -> Points:
    """Read landmarks.

    .csv with columns x, y, z: LPS mm, as antsApplyTransformsToPoints has it; with columns i, j, k, or without a header:
    voxels of the scan, as the keypoints of Learn2Reg. .fcsv and .mrk.json: markups of 3-D Slicer in LPS or RAS.

    Args:
        affine_ras: (4, 4) of the scan; needed for voxels.

    Raises:
        InputError: the file is missing, in none of these forms, empty, not numeric, or voxels without a scan.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        name = str(path).lower()
        read = _read_json if name.endswith(".json") else _read_fcsv if name.endswith(".fcsv") else _read_csv
        values, names, voxels = read(text)
        array = np.array(values, dtype=np.float64).reshape(-1, 3)
    except (ValueError, KeyError, IndexError, TypeError, StopIteration) as error:
        raise InputError(f"{path}: not a list of points, which is .fcsv, .mrk.json, or a CSV with {FORMS}") from error
    if not len(array) or not np.isfinite(array).all():
        raise InputError(f"{path}: {'holds no points' if not len(array) else 'holds NaN or infinite values'}")
    if voxels:
        if affine_ras is None:
            raise InputError(f"{path}: holds voxels, which need the scan that they belong to")
        array = nib.affines.apply_affine(LPS_FROM_RAS @ affine_ras, array)
    return Points(array, names or [str(n) for n in range(1, len(array) + 1)])


def _read_csv(text: str) -> tuple[list, list[str], bool]:
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if any(map(str.strip, row))]
    if rows and len(rows[0]) == 3 and _numeric(rows[0]):
        return rows, [], True
    header = [cell.lower() for cell in rows[0]]
    axes = next(axes for axes in ("xyz", "ijk") if set(axes) <= set(header))
    columns = [header.index(axis) for axis in axes]
    name = next((header.index(name) for name in NAMES if name in header), None)
    names = [] if name is None else [row[name] for row in rows[1:]]
    return [[row[column] for column in columns] for row in rows[1:]], names, axes == "ijk"


def _numeric(cells: list[str]) -> bool:
    try:
        return bool([float(cell) for cell in cells])
    except ValueError:
        return False


def _read_fcsv(text: str) -> tuple[list, list[str], bool]:
    """Slicer's older format: a header of comments, then rows. Without a coordinate system it is RAS."""
    space, columns = "RAS", ["id", "x", "y", "z", "ow", "ox", "oy", "oz", "vis", "sel", "lock", "label"]
    rows = []
    for line in text.splitlines():
        key, _, value = line.lstrip("# ").partition("=")
        if line.startswith("#") and key.strip() == "CoordinateSystem":
            space = value.strip()
        elif line.startswith("#") and key.strip() == "columns":
            columns = [name.strip() for name in value.split(",")]
        elif line.strip() and not line.startswith("#"):
            rows.append(dict(zip(columns, next(csv.reader([line])))))
    sign = SPACES[space]
    values = [[sign * float(row["x"]), sign * float(row["y"]), float(row["z"])] for row in rows]
    return values, [row.get("label") or row.get("id", "") for row in rows], False


def _read_json(text: str) -> tuple[list, list[str], bool]:
    markups = json.loads(text)["markups"]
    values, names = [], []
    for markup in markups:
        sign = SPACES[markup.get("coordinateSystem", "LPS")]
        for point in markup["controlPoints"]:
            x, y, z = point["position"]
            values.append([sign * x, sign * y, z])
            names.append(point.get("label", ""))
    return values, names, False


def write_points(points: Points, path: str | os.PathLike) -> None:
    """Write landmarks in LPS mm: .csv with columns name, x, y, z, or .fcsv for 3-D Slicer. nan where a point has none.

    Raises:
        InputError: another ending.
    """
    if not str(path).lower().endswith((".csv", ".fcsv")):
        raise InputError(f"{path}: points are written as .csv or .fcsv")
    slicer = str(path).lower().endswith(".fcsv")
    head = ["# Markups fiducial file version = 4.11", "# CoordinateSystem = LPS"]
    head = [*head, "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID"] if slicer else []
    lines = [] if slicer else [["name", "x", "y", "z"]]
    for number, (name, point) in enumerate(zip(points.names, points.lps), 1):
        place = [f"{value:.4f}" for value in point]
        lines.append([number, *place, 0, 0, 0, 1, 1, 1, 0, name, "", ""] if slicer else [name, *place])

    def write(partial: Path) -> None:
        with partial.open("w", newline="", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in head)
            csv.writer(file, lineterminator="\n").writerows(lines)

    replaced(path, write)


def read_matching(
    moving: str | os.PathLike, moving_affine: np.ndarray, fixed: str | os.PathLike, fixed_affine: np.ndarray
) -> tuple[Points, Points]:
    """Landmarks of both scans, the n-th of one belonging to the n-th of the other.

    Raises:
        InputError: what `read_points` refuses, and different numbers.
    """
    both = read_points(moving, moving_affine), read_points(fixed, fixed_affine)
    if len(both[0].lps) != len(both[1].lps):
        raise InputError(f"{moving}: has {len(both[0].lps)} points, {fixed} has {len(both[1].lps)}")
    return both
