"""What a series in time shows: how far, how large, and the phases in one space."""

import math
from pathlib import Path

import numpy as np
import torch

from common.fields import jacobian_determinant
from common.space import carry, io, mapping, points
from common.space.files import replaced, write_table
from common.space.transform_files import read_transform

MOST_CURVES = 12  # of labels in the picture; the table has all


def write_motion(
    folder: Path,
    names: list[str],
    files: list[str],
    rows: list[dict | None],
    fixed: str,
    *,
    label: str | None = None,
    marks: str | None = None,
) -> Path:
    """Write series.csv, series.png, warped.nii.gz, and with a label map of the reference labels.nii.gz.

    Args:
        folder: of the series, which holds a folder a phase with its transform.h5 and warped.nii.gz.
        names, files: of the phases.
        rows: of results.csv; None for the phase that is the reference.
        fixed: file of the reference.
        label: label map of the reference. The volume of a label in phase t is sum_x |det D T_t(x)| over its voxels x,
            with T_t the map from the reference to the phase; labels.nii.gz has it on every phase.
        marks: landmarks of the reference; points.csv has their places in every phase.

    Returns:
        The path of series.csv.
    """
    scan, affine = io.read_scan(fixed)
    maps = [read_transform(folder / name / "transform.h5") if row else None for name, row in zip(names, rows)]
    warped = [io.read_scan(folder / name / "warped.nii.gz")[0] if row else scan for name, row in zip(names, rows)]
    replaced(folder / "warped.nii.gz", lambda path: carry.write_film(np.stack(warped)[:, 0], affine, 1.0, path))
    kept = ("disp_mean_mm", "disp_max_mm", "ncc_before", "ncc_after", "folding_pct", "sdlogj", "warnings")
    table = []
    for number, (file, row) in enumerate(zip(files, rows)):
        told = {"disp_mean_mm": 0.0, "disp_max_mm": 0.0} if row is None else {n: row[n] for n in kept if n in row}
        table.append({"phase": number, "file": file} | told)
    if label:
        codes = io.read_beside(label, "label map", fixed, scan, affine)[0]
        for line, volumes in zip(table, [volumes_ml(codes, affine, the_map) for the_map in maps]):
            line |= {f"volume_ml_{code}": round(volume, 4) for code, volume in volumes.items()}
        carried = [codes if the_map is None else _carried(codes, affine, the_map) for the_map in maps]
        film = np.stack(carried).astype(np.int32)
        replaced(folder / "labels.nii.gz", lambda path: carry.write_film(film, affine, 1.0, path))
    if marks:
        write_table(folder / "points.csv", places(marks, affine, maps))
    write_table(folder / "series.csv", table)
    replaced(folder / "series.png", lambda path: draw_motion(table, path))
    return folder / "series.csv"


def volumes_ml(codes: np.ndarray, affine_ras: np.ndarray, the_map: mapping.Transform | None) -> dict[int, float]:
    """Volume in ml of each label (I, J, K) where a map T takes it: sum over its voxels of |det D T|. None is x -> x."""
    grown = np.ones(codes.shape)
    if the_map is not None:
        disp = torch.from_numpy(mapping.disp_of(the_map, codes.shape, affine_ras)).double()
        grown = jacobian_determinant(disp[None])[0, 0].abs().numpy()
    present, number = np.unique(codes, return_inverse=True)
    sums = np.bincount(number.ravel(), weights=grown.ravel()) * abs(np.linalg.det(affine_ras[:3, :3])) / 1000
    return {int(code): float(total) for code, total in zip(present, sums) if code}


def _carried(codes: np.ndarray, affine: np.ndarray, the_map: mapping.Transform) -> np.ndarray:
    return mapping.resample(codes, affine, codes.shape, affine, mapping.invert(the_map), voted=True)


def places(path: str, affine_ras: np.ndarray, maps: list[mapping.Transform | None]) -> list[dict]:
    """Landmarks of the reference in every phase, LPS mm, and how far they are from where the reference has them."""
    given = points.read_points(path, affine_ras)
    rows = []
    for number, the_map in enumerate(maps):
        there = given.lps if the_map is None else mapping.map_points(the_map, given.lps)
        for name, place, home in zip(given.names, there, given.lps):
            row = {"phase": number, "name": name} | dict(zip("xyz", (round(float(x), 4) for x in place)))
            rows.append(row | {"moved_mm": round(math.dist(place, home), 4)})
    return rows


def draw_motion(table: list[dict], path: Path) -> None:
    """Curves over the phases: displacement, and the volume of each label in % of its own mean."""
    from matplotlib.figure import Figure

    phases = [line["phase"] for line in table]
    labels = [name for name in table[0] if name.startswith("volume_ml_")]
    labels = sorted(labels, key=lambda name: -table[0][name])[:MOST_CURVES]
    figure = Figure(figsize=(5.5 * (1 + bool(labels)), 3.6), layout="constrained")
    panels = figure.subplots(1, 1 + bool(labels), squeeze=False)[0]
    for name, words in (("disp_mean_mm", "mean"), ("disp_max_mm", "largest")):
        panels[0].plot(phases, [line[name] for line in table], marker="o", label=words)
    panels[0].set(xlabel="phase", ylabel="displacement from the reference (mm)", ylim=(0, None))
    for name in labels:
        volumes = np.array([line[name] for line in table])
        panels[1].plot(phases, 100 * volumes / volumes.mean(), marker="o", label=name.rpartition("_")[2])
        panels[1].set(xlabel="phase", ylabel="volume of each label (% of its mean)")
    for panel in panels:
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.legend(fontsize=8, ncols=2)
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=100, format="png")
