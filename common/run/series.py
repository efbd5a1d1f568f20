"""A series in time: its phases, in which order, and each started from what its neighbour has found.

A phase is a pair like any other, in a table of pairs with a column `start`; so a series that was stopped goes on where
it was, and every option and bundle works as for pairs. `common.quality.motion` tells what came out.
"""

import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from common import InputError
from common.quality.motion import write_motion
from common.run.cohort import read_table
from common.run.data import is_scan
from common.space import carry, io
from common.space.files import output_folder, write_table

# Phases lie in one space; ten pages of one scan say little; from a neighbour, steps alone go on.
DEFAULTS = {"prealign": "none", "report": "none", "refine_steps": 20}
SHARED = ("fixed_label", "fixed_points", "fixed_mask", "fixed_lesion")  # of the reference, for every phase


def phases_of(series: str, folder: Path, *, reference: int = 0) -> list[str]:
    """The files of a series' phases, in order: of a folder, its scans; of a 4-D file, what is written to `folder`.

    Raises:
        InputError: no such thing, no time in it, one phase, no phase `reference`; then nothing is written.
    """
    if not os.path.exists(series):
        raise InputError(f"{series}: no such file")
    if os.path.isdir(series):
        files = [entry for entry in Path(series).absolute().iterdir() if is_scan(entry) or _is_folder(entry)]
        files = sorted(files, key=lambda path: [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", path.name)])
    elif (film := carry.read_film(series)) is None:
        raise InputError(f"{series}: has no time; a series is a 4-D NIfTI file, or a folder of phases, a file each")
    else:
        checked_reference(reference, len(film[0]))
        files = _written(series, *film[:2], folder)
    if len(files) < 2:
        count = "one phase" if files else "no phases"
        raise InputError(f"{series}: holds {count}, a series has two or more")
    checked_reference(reference, len(files))
    return [str(file) for file in files]


def _is_folder(entry: Path) -> bool:
    return entry.is_dir() and not entry.name.startswith(".")


def _written(series: str, frames: np.ndarray, affine: np.ndarray, folder: Path) -> list[Path]:
    """Each time of a 4-D file as a file; those that are there, and not older, stay."""
    files = [folder / f"phase_{number:02d}.nii.gz" for number in range(len(frames))]
    output_folder(folder)
    for file, frame in zip(files, frames):
        if not file.exists() or file.stat().st_mtime < os.path.getmtime(series):
            io.replaced(file, lambda path, frame=frame: io.write_scan(frame.astype(np.float32), affine, path))
    return files


def mean_of(files: list[str], header: str = "") -> tuple[np.ndarray, np.ndarray]:
    """The mean of all phases, (C, I, J, K) float32, its `affine_ras`; phases of different grids are refused here.

    Raises:
        InputError: phases whose grids differ.
    """
    first, affine = io.read_scan(files[0], header=header)
    total = first.astype(np.float64)
    for file in files[1:]:
        scan, own = io.read_scan(file, header=header)
        if scan.shape != first.shape or not np.allclose(own, affine, atol=1e-2):
            where = f"grid of {' x '.join(map(str, scan.shape[1:]))} voxels" if scan.shape != first.shape else "place"
            raise InputError(f"{file}: has another {where} than {files[0]}; phases of a series have one grid")
        total += scan
    return (total / len(files)).astype(np.float32), affine


def order(count: int, first: int, *, cyclic: bool = False) -> list[tuple[int, int | None]]:
    """Every phase but `first` after the neighbour that it starts from, outwards from `first`: (phase, neighbour).

    Args:
        count: of the phases.
        first: the reference; it is not among them.
        cyclic: the last phase is a neighbour of the first, as in a breath or a heartbeat.
    """
    found: list[tuple[int, int | None]] = []
    for step in range(1, count // 2 + 1 if cyclic else count):
        for sign in (1, -1):
            phase = first + sign * step
            phase = phase % count if cyclic else phase
            if 0 <= phase < count and phase not in [known for known, _ in found]:
                neighbour = (phase - sign) % count
                found.append((phase, None if neighbour == first else neighbour))
    return found


def table_of(files: list[str], folder: Path, reference: int | str, *, cyclic: bool, beside: dict[str, str]) -> Path:
    """Write FOLDER/phases.csv, the pairs of a series.

    Args:
        reference: number of the phase that all are registered to, from 0; or "mean", of which FOLDER/phases/mean.nii.gz
            is written.
        beside: paths of the label map, landmarks, mask and lesion of the reference.

    Raises:
        InputError: a number that no phase has; what `mean_of` refuses.
    """
    mean, affine = mean_of(files)
    if reference == "mean":
        fixed = folder / "phases" / "mean.nii.gz"
        output_folder(fixed.parent)
        if not fixed.exists() or fixed.stat().st_mtime < max(map(os.path.getmtime, files)):
            io.replaced(fixed, lambda path: io.write_scan(mean, affine, path))
        apart = [float(np.square(io.read_scan(file)[0] - mean).mean()) for file in files]
        first = int(np.argmin(apart))
        steps = [(first, None)] + [(p, first if n is None else n) for p, n in order(len(files), first, cyclic=cyclic)]
    else:
        checked_reference(reference, len(files))
        fixed = Path(files[reference])
        steps = order(len(files), reference, cyclic=cyclic)
    starts = {n: str(folder / phase_name(n) / "transform.h5") for n in range(len(files))}
    common = {"fixed": str(fixed)} | {name: os.path.abspath(path) for name, path in beside.items()}
    rows = [
        common | {"id": phase_name(phase), "moving": files[phase], "start": starts.get(neighbour, "")}
        for phase, neighbour in steps
    ]
    write_table(folder / "phases.csv", rows)
    return folder / "phases.csv"


def checked_reference(number: int, count: int) -> None:
    if not 0 <= number < count:
        raise InputError(f"--reference {number}: the {count} phases are 0 to {count - 1}")


def phase_name(number: int) -> str:
    return f"phase_{number:02d}"


def run_series(
    registrar: Any, files: list[str], folder: Path, reference: int | str = 0, *, cyclic: bool = False, **options: Any
) -> Path:
    """Register the phases, and write what came out over all of them.

    Args:
        registrar: of a bundle; its options hold for every phase.
        files: of the phases, from `phases_of`.
        folder: for the results.
        reference, cyclic: as of `table_of` and `order`.
        options: further ones, as of `Registrar.run`; SHARED are those of the reference.

    Raises:
        InputError: what is wrong with a phase or an option.

    Returns:
        The path of series.csv.
    """
    beside = {name: str(options.pop(name)) for name in SHARED if options.get(name)}
    table = table_of(files, folder, reference, cyclic=cyclic, beside=beside)
    registrar.run(**(DEFAULTS | options | {"pairs": str(table), "output_dir": str(folder)}))
    rows = {row["id"]: row for row in read_table(folder / "results.csv")}
    names = [phase_name(number) for number in range(len(files))]
    fixed = str(folder / "phases" / "mean.nii.gz") if reference == "mean" else files[reference]
    given = {"label": beside.get("fixed_label"), "marks": beside.get("fixed_points")}
    return write_motion(folder, names, files, [rows.get(name) for name in names], fixed, **given)
