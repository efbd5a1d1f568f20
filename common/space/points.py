"""Files of landmarks: CSV as ANTs has it, voxel lists of the Learn2Reg challenges, markups of 3-D Slicer."""

import csv
import json
import os
import warnings
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from common import InputError, RegistrationWarning
from common.space.io import LPS_FROM_RAS, replaced

SPACES = {"LPS": 1.0, "1": 1.0, "RAS": -1.0, "0": -1.0}  # sign of the first two axes; 0 and 1 are Slicer's numbers
NAMES = ("name", "label", "id")
SCHEMA = "https://raw.githubusercontent.com/slicer/slicer/master/Modules/Loadable/Markups/Resources/Schema/"
SCHEMA += "markups-schema-v1.0.3.json#"  # which Slicer asks for
FORMS = "columns x, y, z (LPS mm), or i, j, k (voxels), or three numbers a line without a header (voxels)"


UNPLACED = ("undefined", "preview", "missing")  # position status of 3-D Slicer's control points, by name ...
UNPLACED_NUMBERS = ("0", "1", "3")  # ... and by number, in .fcsv; 2 is "defined"


class Points(NamedTuple):
    """Landmarks of one scan."""

    lps: np.ndarray  # (N, 3) mm
    names: list[str]


def read_points(path: str | os.PathLike, affine_ras: np.ndarray | None = None) -> Points:
    """Read landmarks.

    .csv with columns x, y, z: LPS mm, as antsApplyTransformsToPoints has it; with columns i, j, k, or without a header:
    voxels of the scan, as the keypoints of Learn2Reg. .fcsv and .mrk.json: markups of 3-D Slicer in LPS or RAS. Control
    points of 3-D Slicer that were never placed are left out, with a `RegistrationWarning` that counts them.

    Args:
        affine_ras: (4, 4) of the scan; needed for voxels.

    Raises:
        InputError: the file is missing, in none of these forms, empty, not numeric, or voxels without a scan.
    """
    found, placed = _read(path, affine_ras)
    if not placed.all():
        text = f"{path}: {_unplaced(placed)} never placed in 3-D Slicer and left out"
        warnings.warn(text, RegistrationWarning, stacklevel=2)
    return _chosen(path, found, placed)


def _unplaced(placed: np.ndarray) -> str:
    count = int((~placed).sum())
    return f"{count} of {len(placed)} points {'was' if count == 1 else 'were'}"


def _chosen(path: str | os.PathLike, points: Points, chosen: np.ndarray) -> Points:
    if not chosen.any():
        raise InputError(f"{path}: holds no points" + (" that were placed" if len(chosen) else ""))
    lps = points.lps[chosen]
    if not np.isfinite(lps).all():
        raise InputError(f"{path}: holds NaN or infinite values")
    return Points(lps, [name for name, kept in zip(points.names, chosen) if kept])


def _read(path: str | os.PathLike, affine_ras: np.ndarray | None) -> tuple[Points, np.ndarray]:
    """All points of a file, and (N,) which of them were placed."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        name = str(path).lower()
        read = _read_json if name.endswith(".json") else _read_fcsv if name.endswith(".fcsv") else _read_csv
        values, names, voxels, placed = read(text)
        array = np.array(values, dtype=np.float64).reshape(-1, 3)
        if name.endswith(".json") and len(values) * 3 != array.size:
            raise ValueError("a position of more than three numbers")
    except RecursionError as error:
        raise InputError(f"{path}: not a list of points, its JSON is nested too deeply") from error
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, StopIteration, csv.Error) as error:
        raise InputError(f"{path}: not a list of points, which is .fcsv, .mrk.json, or a CSV with {FORMS}") from error
    if voxels:
        if affine_ras is None:
            raise InputError(f"{path}: holds voxels, which need the scan that they belong to")
        array = nib.affines.apply_affine(LPS_FROM_RAS @ affine_ras, array)
    names = names or [str(n) for n in range(1, len(array) + 1)]
    return Points(array, names), np.array(placed or [True] * len(array), bool)


def _read_csv(text: str) -> tuple[list, list[str], bool, list[bool]]:
    rows = [[cell.strip() for cell in row] for row in csv.reader(text.splitlines()) if any(map(str.strip, row))]
    if rows and len(rows[0]) == 3 and _numeric(rows[0]):
        return rows, [], True, []
    header = [cell.lower() for cell in rows[0]]
    axes = next(axes for axes in ("xyz", "ijk") if set(axes) <= set(header))
    columns = [header.index(axis) for axis in axes]
    name = next((header.index(name) for name in NAMES if name in header), None)
    names = [] if name is None else [row[name] for row in rows[1:]]
    return [[row[column] for column in columns] for row in rows[1:]], names, axes == "ijk", []


def _numeric(cells: list[str]) -> bool:
    try:
        return bool([float(cell) for cell in cells])
    except ValueError:
        return False


def _read_fcsv(text: str) -> tuple[list, list[str], bool, list[bool]]:
    """Slicer's older format: a header of comments, then rows. Without a coordinate system it is RAS.

    Slicer 5 writes two columns more than its header names, the first of them the position's status: 2 is "defined".
    """
    space, columns = "RAS", ["id", "x", "y", "z", "ow", "ox", "oy", "oz", "vis", "sel", "lock", "label", "desc", "node"]
    rows = []
    for line in text.splitlines():
        key, _, value = line.lstrip("# ").partition("=")
        if line.startswith("#") and key.strip() == "CoordinateSystem":
            space = value.strip()
        elif line.startswith("#") and key.strip() == "columns":
            columns = [name.strip() for name in value.split(",")]
        elif line.strip() and not line.startswith("#"):
            rows.append(dict(zip([*columns, "status"], next(csv.reader([line])))))
    sign = SPACES[space]
    values = [[sign * float(row["x"]), sign * float(row["y"]), float(row["z"])] for row in rows]
    placed = [row.get("status", "2").strip() not in UNPLACED_NUMBERS for row in rows]
    return values, [row.get("label") or row.get("id", "") for row in rows], False, placed


def _read_json(text: str) -> tuple[list, list[str], bool, list[bool]]:
    markups = json.loads(text)["markups"]
    values, names, placed = [], [], []
    for markup in markups:
        sign = SPACES[markup.get("coordinateSystem", "LPS")]
        for point in markup["controlPoints"]:
            placed.append(str(point.get("positionStatus", "defined")).lower() not in UNPLACED)
            x, y, z = point["position"] if placed[-1] else point.get("position") or (0.0, 0.0, 0.0)
            values.append([sign * float(x), sign * float(y), float(z)])
            names.append(str(point.get("label", "")))
    return values, names, False, placed


def _compare_names(moving: str | os.PathLike, one: list[str], fixed: str | os.PathLike, other: list[str]) -> None:
    """Names pair nothing, but the same ones in another order say that the points do not pair as they stand.

    Raises:
        InputError: each name is there once in both, in another order.
    """
    apart = [number for number, (a, b) in enumerate(zip(one, other)) if a != b]
    if not apart or not set(one) & set(other):  # F-1, F-2 and M-1, M-2 are no contradiction
        return
    first = apart[0]
    text = f"point {first + 1} is {one[first]!r} there and {other[first]!r} in {fixed}"
    if len(set(one)) == len(one) and sorted(one) == sorted(other):
        raise InputError(f"{moving}: {text}; the names have another order, and the n-th points belong together")
    text = f"{moving}: {text}; the n-th points were taken to belong together"
    warnings.warn(text, RegistrationWarning, stacklevel=3)


def write_points(points: Points, path: str | os.PathLike) -> None:
    """Write landmarks in LPS mm: .csv with columns name, x, y, z; .mrk.json or .fcsv for 3-D Slicer.

    A point without a place is nan in .csv and .fcsv, and one that is not placed in .mrk.json, which knows no nan.

    Raises:
        InputError: another ending.
    """
    if str(path).lower().endswith(".json"):
        replaced(path, lambda partial: partial.write_text(json.dumps(_markup(points), indent=1), encoding="utf-8"))
        return
    if not str(path).lower().endswith((".csv", ".fcsv")):
        raise InputError(f"{path}: points are written as .csv, .fcsv or .mrk.json")
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


def _markup(points: Points) -> dict:
    """Slicer's list of fiducials."""
    control = []
    for number, (name, point) in enumerate(zip(points.names, points.lps), 1):
        placed = bool(np.isfinite(point).all())
        place = {"position": [round(float(x), 4) for x in point]} if placed else {}
        status = "defined" if placed else "undefined"
        control.append({"id": str(number), "label": str(name)} | place | {"positionStatus": status})
    markup = {"type": "Fiducial", "coordinateSystem": "LPS", "coordinateUnits": "mm", "controlPoints": control}
    return {"@schema": SCHEMA, "markups": [markup]}


def read_matching(
    moving: str | os.PathLike, moving_affine: np.ndarray, fixed: str | os.PathLike, fixed_affine: np.ndarray
) -> tuple[Points, Points]:
    """Landmarks of both scans, the n-th of one belonging to the n-th of the other; pairs of which one was never placed
    in 3-D Slicer are left out, with a `RegistrationWarning` that counts them; another one tells of names that differ.

    Raises:
        InputError: what `read_points` refuses, different numbers, and the same names in another order.
    """
    (one, one_placed), (other, other_placed) = _read(moving, moving_affine), _read(fixed, fixed_affine)
    if len(one.lps) != len(other.lps):
        raise InputError(f"{moving}: has {len(one.lps)} points, {fixed} has {len(other.lps)}")
    _compare_names(moving, one.names, fixed, other.names)
    both = one_placed & other_placed
    if not both.all() and both.any():
        paths = [str(path) for path, placed in ((moving, one_placed), (fixed, other_placed)) if not placed.all()]
        text = f"{' and '.join(paths)}: {_unplaced(both)} never placed in 3-D Slicer and left out, with its counterpart"
        warnings.warn(text, RegistrationWarning, stacklevel=2)
    lacking = moving if not one_placed.all() or other_placed.all() else fixed
    if not both.any() and len(both):
        raise InputError(f"{lacking}: no point was placed both there and in the other scan's file")
    return _chosen(moving, one, both), _chosen(fixed, other, both)
