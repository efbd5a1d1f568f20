"""The embedded pair as files: what is registered when no scans are given."""

from functools import partial
from pathlib import Path

import numpy as np

from common import InputError
from common.phantom import LANDMARKS, Deformation, grids, sample
from common.space.io import write_folder, write_label, write_scan
from common.space.points import Points, write_points


def write_phantom(folder: Path) -> dict[str, str]:
    """Write scans, label maps and landmarks (CSV, LPS mm) of the pair into `folder`; returns the row of a pairs table.

    A folder that exists is kept: `write_folder` makes it whole or not at all.
    """
    folder = Path(folder)
    deformation = Deformation(0)
    row, writers = {"id": "phantom"}, {}
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is a file, but the phantom needs a folder of that name")
    for name, (size, affine) in grids().items():
        image, label = f"{name}.nii.gz", f"{name}_label.nii.gz"
        row[name], row[f"{name}_label"] = str(folder / image), str(folder / label)
        if not folder.exists():
            values = sample(size, affine, deformation if name == "moving" else None, seed=int(name == "moving"))
            writers[image] = partial(write_scan, values[0], affine)
            writers[label] = partial(write_label, values[1], affine)
        row[f"{name}_points"] = str(folder / f"{name}_points.csv")
    landmarks = np.array(list(LANDMARKS.values()))
    for name, place in (("fixed", landmarks), ("moving", deformation.truth(landmarks))):
        points = Points(place * [-1, -1, 1], list(LANDMARKS))
        writers[f"{name}_points.csv"] = partial(write_points, points)
    if not folder.exists():
        write_folder(folder, writers)
    return row
