"""Scans that are in memory, from any of the libraries that programs hold them in, as files for a run."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from common import InputError
from common.space import io

KINDS = "a path, (array, affine), a tensor with an affine, or an image of nibabel, SimpleITK or ITK"


def as_file(name: str, scan: Any, folder: Path) -> str:
    """The path of a scan or label map; one in memory is written to FOLDER/NAME.nii.

    Args:
        name: of the option, as "moving" or "moving_label": label maps and masks hold whole numbers.
        scan: a path; (array, affine), array (I, J, K) or (C, I, J, K), affine (4, 4) voxel -> mm in RAS; a tensor
            likewise, of which MONAI's MetaTensor has its affine; a nibabel, SimpleITK or ITK image.

    Raises:
        InputError: something else, or an array of another shape.
    """
    if isinstance(scan, (str, os.PathLike)):
        return os.path.abspath(scan)
    array, affine = scan_of(name, scan)
    path = folder / f"{name}.nii"
    if name.endswith(("_label", "_mask", "_lesion")):
        if not np.array_equal(array, np.rint(array)):
            raise InputError(f"{name}: a label map has whole numbers, this one has others")
        io.write_label(np.rint(array).astype(np.int64), affine, path)
    else:
        io.write_scan(np.ascontiguousarray(array, dtype=np.float32), affine, path)
    return str(path)


def scan_of(name: str, scan: Any, *, label: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(C, I, J, K) and affine (RAS) of a scan, given as `as_file` takes it; a path is read, as label map if `label`.

    Raises:
        InputError: what `as_file` refuses.
    """
    if isinstance(scan, (str, os.PathLike)):
        return io.read_label(scan) if label else io.read_scan(scan)
    array, affine = _array_of(name, scan)
    if array.ndim not in (3, 4) or np.shape(affine) != (4, 4):
        raise InputError(f"{name}: must be (I, J, K) or (C, I, J, K) with a 4 x 4 affine, got {array.shape}")
    return array if array.ndim == 4 else array[None], affine


def _array_of(name: str, scan: Any) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(scan, (tuple, list)) and len(scan) == 2:
        array, affine = scan
        return _numbers(array), np.asarray(_numbers(affine), np.float64)
    if hasattr(scan, "get_fdata"):  # nibabel
        return np.moveaxis(x, 3, 0) if (x := np.asarray(scan.dataobj)).ndim == 4 else x, scan.affine
    if hasattr(scan, "GetDirection") and hasattr(scan, "GetSpacing"):
        return _of_itk(scan)
    if hasattr(scan, "affine"):  # a MetaTensor
        affine = np.asarray(_numbers(scan.affine), np.float64)
        lps = getattr(scan, "meta", {}).get("space") == "LPS"  # of LoadImage(affine_lps_to_ras=False)
        return _numbers(scan), io.LPS_FROM_RAS @ affine if lps else affine
    if hasattr(scan, "shape"):
        raise InputError(f"{name}: an array alone does not say where it is; give (array, affine)")
    raise InputError(f"{name}: must be {KINDS}, got {type(scan).__name__}")


def _of_itk(image: Any) -> tuple[np.ndarray, np.ndarray]:
    """An image of ITK or SimpleITK, LPS, to (I, J, K) or (C, I, J, K) and RAS."""
    if not hasattr(image, "GetPixelIDValue"):
        return io.to_array(image), io.affine_of(image)
    import SimpleITK

    lps = np.eye(4)
    lps[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    lps[:3, 3] = image.GetOrigin()
    return np.transpose(SimpleITK.GetArrayFromImage(image)), io.LPS_FROM_RAS @ lps


def _numbers(value: Any) -> np.ndarray:
    """A tensor on any device, or what numpy takes."""
    value = value.detach().cpu() if hasattr(value, "detach") else value
    return np.asarray(value)
