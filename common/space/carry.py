"""Bring files of any kind, one or many, through one transform: scans, films (4-D), label maps, points."""

import os
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np

from common import EmptyResult, InputError
from common.space import headers, io, mapping, points

POINT_ENDINGS = (".csv", ".fcsv", ".json")
LABELS = ("no", "nearest", "auto", "linear")
NEARLY = 0.01  # of what a scan shows: less is nearly nothing
ALIKE = 0.5  # of neighbouring voxels that both show something: the values of a label map are mostly the same there


def is_label(array: np.ndarray) -> bool:
    """Whether (C, I, J, K) looks like a label map: whole numbers, mostly the same in neighbouring voxels."""
    if not (array == np.rint(array)).all():
        return False
    same = both = 0
    for axis in (1, 2, 3):
        one, other = (array.take(range(first, array.shape[axis] - 1 + first), axis) for first in (0, 1))
        shown = (one != 0) & (other != 0)
        both, same = both + shown.sum(), same + (shown & (one == other)).sum()
    return bool(same >= ALIKE * both)


def read_film(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray, float] | None:
    """A 4-D NIfTI file as scans (T, I, J, K), `affine_ras`, and the step in time as the file has it; None of another.

    Raises:
        InputError: headers that do not agree on where the scans are, NaN or infinite values.
    """
    if not headers.is_nifti(Path(path)) or not Path(path).is_file():
        return None
    found = headers.read_nifti(Path(path), values=False)
    if len(found.shape) != 4 or found.shape[3] == 1:
        return None
    found = headers.read_nifti(Path(path))
    if not found.finite:
        raise InputError(f"{path}: holds NaN or infinite values")
    whole = found.values.dtype.kind in "iu" and found.scaling[0] in (0.0, 1.0) and found.scaling[1] == 0.0
    frames = []
    for number in range(found.shape[3]):
        one = headers.plain(found._replace(shape=found.shape[:3], values=found.values[..., number]), codes=whole)
        if one is None:
            raise InputError(f"{path}: sform, qform and spacing of this 4-D file do not agree; save its times as files")
        frames.append(one[0][0])
    affine = headers.settled(Path(path), headers.place(Path(path), found, one[1], ""), found.shape[:3])
    return np.stack(frames), affine, float(nib.load(path).header.get_zooms()[3])


def write_film(frames: np.ndarray, affine_ras: np.ndarray, step: float, path: str | os.PathLike) -> None:
    """Write (T, I, J, K) as a 4-D NIfTI file.

    Raises:
        InputError: another ending.
    """
    if not headers.is_nifti(Path(path)):
        raise InputError(f"{path}: a 4-D file is written as .nii or .nii.gz")
    image = nib.Nifti1Image(np.moveaxis(frames, 0, -1), affine_ras, dtype=frames.dtype)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_zooms((*image.header.get_zooms()[:3], step))
    io.replaced(path, lambda partial: nib.save(image, partial))


def carry(
    file: str,
    the_map: mapping.Transform,
    output: str,
    *,
    reference: str = "",
    label: str = "no",
    back: mapping.Transform | None = None,
    name: str = "the transform",
) -> str:
    """Bring one file through a transform, and say what was written.

    Args:
        the_map: of fixed points to the moving scan.
        reference: scan whose grid the result gets; for points in voxels, the one they belong to.
        label: "no", "nearest", "auto" (nearest for what `is_label`), or "linear" (`mapping.resample`'s "voted").
        back: the inverse, to be applied instead; of points the exact one is sought.
        name: of the transform, for warnings.
    """
    if file.lower().endswith(POINT_ENDINGS):
        affine = io.read_grid(reference)[1] if reference else None
        given = points.read_points(file, affine)
        there = (mapping.invert_at if back else mapping.map_points)(the_map, given.lps)
        points.write_points(points.Points(there, given.names), output)
        lost = int(np.isnan(there).any(1).sum())
        if lost == len(there):
            warnings.warn(f"{output}: no point has an inverse, all are nan", EmptyResult, stacklevel=1)
        return f"{len(there)} points in LPS mm" + (f", {lost} without an inverse (nan)" if lost else "")
    if not reference:
        raise InputError(f"{file}: --reference is needed, a scan whose grid the result gets")
    film = read_film(file)
    if film is not None:
        scan, affine, step = film
    else:
        scan, affine = io.read_label(file) if label in ("nearest", "linear") else io.read_scan(file)
    if label == "auto":
        label = "nearest" if is_label(scan if film is None else scan[:1]) else "no"
        scan = io.read_label(file)[0] if label != "no" and film is None else scan  # codes do not pass a float32
    size, onto = io.read_grid(reference)
    options = {"nearest": label == "nearest", "voted": label == "linear"}
    outside = [0 if label != "no" else io.background(channel) for channel in scan]
    through = back or the_map
    warped = [mapping.resample(c, affine, size, onto, through, outside=o, **options) for c, o in zip(scan, outside)]
    warped = np.stack(warped)
    kind = {"no": "", "nearest": " of labels", "linear": " of labels, by their shares"}[label]
    if film is not None:
        write_film(warped.astype(np.int32) if label != "no" else warped, onto, step, output)
        _warn_of_nothing(file, output, name, (scan, affine), (warped, onto), outside)
        return f"{' x '.join(map(str, size))} voxels{kind}, {len(warped)} times"
    write = io.write_label if label != "no" else io.write_scan
    io.write_image_file(output, lambda path: write(warped, onto, path))
    _warn_of_nothing(file, output, name, (scan, affine), (warped, onto), outside)
    return f"{' x '.join(map(str, size))} voxels{kind}"


def _warn_of_nothing(file: str, output: str, name: str, before: tuple, after: tuple, outside: list[float]) -> None:
    """Warn where next to nothing of a scan (array, affine) is left."""
    (scan, affine), (warped, onto) = before, after
    shown = [(array != np.reshape(outside, (-1, 1, 1, 1))).mean() for array in (scan, warped)]
    kept = shown[1] * np.prod(warped.shape[1:]) * abs(np.linalg.det(onto[:3, :3])) if shown[0] else 0.0
    kept /= max(shown[0] * np.prod(scan.shape[1:]) * abs(np.linalg.det(affine[:3, :3])), 1e-30)
    if kept < NEARLY and shown[1] < NEARLY:
        what = "is empty" if not shown[1] else f"holds {100 * kept:.2g} % of what {file} shows"
        why = f"{file} shows nothing" if not shown[0] else f"{name} leads elsewhere, or --inverse is wanted"
        warnings.warn(f"{output}: {what}: {why}", EmptyResult, stacklevel=1)


def names_in(folder: str, files: tuple[str, ...]) -> list[str]:
    """Where each of several files goes in a folder: under its own name, a folder of DICOM as .nii.gz.

    Raises:
        InputError: two files of one name.
    """
    names = [Path(file).name for file in files]
    names = [n if n.lower().endswith((*io.IMAGE_ENDINGS, *POINT_ENDINGS)) else f"{n}.nii.gz" for n in names]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"{folder}: two of the files would both be called {twice[0]} there")
    return [os.path.join(folder, name) for name in names]
