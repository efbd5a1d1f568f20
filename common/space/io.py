"""Files of scans.

A scan inside the package is a numpy array (I, J, K) or (C, I, J, K) with a 4x4 `affine_ras` (voxel -> mm, RAS, as in
NIfTI). ITK works in LPS: the first two world axes change sign. Reading goes through ITK, so that headers mean here what
they mean to ANTs and Slicer. itk and monai, which take seconds to load, are imported where they are needed: a pair of
NIfTI files is read, warped and written without itk.
"""

import os
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip

from common import InputError
from common.space.files import output_folder, remove_leftovers, replaced, write_folder, write_table

__all__ = ["output_folder", "remove_leftovers", "replaced", "write_folder", "write_table"]  # beside what is here
IMAGE_ENDINGS = (".nii", ".nii.gz", ".mha", ".nrrd")
UNEVEN_MM = 0.1  # of a DICOM series' slice positions: more is a missing slice, not rounding
LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_scan(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Read a 3-D scan: NIfTI, MetaImage, NRRD, ..., a folder with one DICOM series, or several contrasts of one person.

    Args:
        path: file or folder; contrasts are joined by ";", as "t1.nii.gz;t2.nii.gz", and become channels on the grid of
            the first, resampled by their headers where theirs differs.

    Returns:
        Array (C, I, J, K) float32 and its `affine_ras` (4, 4).

    Raises:
        InputError: the file is missing, not an image, not 3-D, or holds NaN or infinite values; a folder without, or
            with more than one series, or one with slices missing.
    """
    contrasts = [_read_one(Path(part)) for part in contrasts_of(path)]
    array, affine = contrasts[0]
    parts = [array]
    for other, own in contrasts[1:]:
        if other.shape[1:] != array.shape[1:] or not np.allclose(own, affine, atol=1e-3):
            other = np.stack([_onto(channel, own, array.shape[1:], affine) for channel in other])
        parts.append(other)
    return np.concatenate(parts), affine


def contrasts_of(path: str | os.PathLike, folder: Path | None = None) -> list[str]:
    """The paths of a scan's contrasts, mostly one; a file or folder may have ";" in its name.

    Args:
        folder: that relative paths are of.
    """
    parts, found = str(path).split(";"), []
    while parts:
        names = {n: ";".join(parts[:n]) for n in range(len(parts), 0, -1)}  # the longest that exists
        n = next((n for n, name in names.items() if n == 1 or _exists((folder or Path()) / name.strip())), 1)
        name = names[n] if _exists((folder or Path()) / names[n]) else names[n].strip()
        found += [name] if name.strip() else []
        parts = parts[n:]
    return found


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # no name that a file can have
        return False


def refuse_constant(array: np.ndarray, path: str | os.PathLike) -> None:
    """Stop at a scan (C, I, J, K) with a channel that shows nothing.

    Raises:
        InputError: every voxel of a channel has the same value.
    """
    for number, channel in enumerate(array):
        if channel.min() == channel.max():
            which = f"channel {number} " if len(array) > 1 else ""
            raise InputError(f"{path}: {which}is constant, every voxel is {channel.min():g}")


def read_beside(
    path: str | os.PathLike, kind: str, scan_path: str, scan: np.ndarray, scan_affine: np.ndarray
) -> np.ndarray:
    """Read a label map or mask (its `kind`) of a scan: (1, I, J, K).

    Raises:
        InputError: what `read_scan` refuses, several channels, values that are not whole, another place or shape than
            its scan.
    """
    label, affine = read_scan(path)
    if len(label) > 1 or not (label == np.rint(label)).all():
        found = f"{len(label)} channels" if len(label) > 1 else "values that are not whole numbers"
        raise InputError(f"{path}: a {kind} has one channel of whole numbers, this one has {found}")
    if label.shape[1:] != scan.shape[1:]:
        sizes = f"shape {label.shape[1:]}, its scan {scan_path} has {scan.shape[1:]}"
        raise InputError(f"{path}: the {kind} has {sizes}")
    if not np.allclose(affine, scan_affine, atol=1e-2):
        raise InputError(f"{path}: the {kind} lies elsewhere in space than its scan {scan_path}")
    return label


def _onto(channel: np.ndarray, own: np.ndarray, size: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    from common.space.mapping import resample

    return resample(channel, own, size, affine, outside=background(channel))


def _read_one(path: Path) -> tuple[np.ndarray, np.ndarray]:
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if path.is_dir():
        _check_series(path)
    from monai.data import ITKReader

    reader = ITKReader(affine_lps_to_ras=True)
    try:
        opened = reader.read(str(path))
        image, meta = reader.get_data(opened)
    except Exception as error:  # every reader of ITK has its own exception; the sentence keeps the last line of it
        reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
        raise InputError(f"{path}: not an image that can be read ({reason})") from error
    gap = "ITK_non_uniform_sampling_deviation"
    if path.is_dir() and opened.GetMetaDataDictionary().HasKey(gap):
        uneven = float(opened.GetMetaDataDictionary()[gap])
        if uneven > UNEVEN_MM:
            raise InputError(f"{path}: slices are missing or unevenly spaced, by up to {uneven:.2f} mm")
    channel_dim = meta.get("original_channel_dim", float("nan"))
    dimension = opened.GetImageDimension()  # of the file: MONAI takes the fourth axis of a film for channels
    if dimension != 3 or min(image.shape) < 1:
        raise InputError(f"{path}: must be a 3-D scan, got {dimension}-D data of shape {tuple(image.shape)}")
    image = image[None] if image.ndim == 3 else np.moveaxis(image, int(channel_dim), 0)
    if min(image.shape[1:]) < 2:
        raise InputError(f"{path}: must be a 3-D scan, got a single slice of shape {tuple(image.shape[1:])}")
    image = np.ascontiguousarray(image, dtype=np.float32)
    if not np.isfinite(image).all() or not _finite_nifti(path):
        raise InputError(f"{path}: holds NaN or infinite values")
    return image, np.asarray(meta["affine"], dtype=np.float64)


def _check_series(folder: Path) -> None:
    """A folder must hold one DICOM series: ITK would take the first of several."""
    import itk

    names = itk.GDCMSeriesFileNames.New()
    names.SetUseSeriesDetails(True)
    names.AddSeriesRestriction("0008|0021")
    names.SetDirectory(str(folder))
    found = list(names.GetSeriesUIDs())
    if not found:
        raise InputError(f"{folder}: a folder must hold a DICOM series, and this one holds none")
    if len(found) > 1:
        counts = ", ".join(f"one of {len(names.GetFileNames(uid))} files" for uid in found)
        raise InputError(f"{folder}: holds {len(found)} DICOM series ({counts}); give a folder with one of them")


def _finite_nifti(path: Path) -> bool:
    """Whether a NIfTI file holds neither NaN nor infinite values, and all that its header promises.

    ITK replaces the one and the missing end of a file that was cut off by 0 without a word; nibabel does not.

    Raises:
        InputError: the file is cut off.
    """
    if not path.name.lower().endswith((".nii", ".nii.gz")):
        return True
    try:
        file = nib.load(path)
        values = file.dataobj.get_unscaled()
    except Exception as error:  # of the decompression or of the header
        raise InputError(f"{path}: not an image that can be read, the file is cut off ({error})") from error
    return values.dtype.kind != "f" or bool(np.isfinite(file.dataobj).all())


def to_itk(array: np.ndarray, affine_ras: np.ndarray) -> object:
    """(I, J, K) array and its affine -> ITK image in LPS.

    Raises:
        ValueError: the axes of `affine_ras` are not orthogonal, which ITK cannot hold.
    """
    import itk

    image = itk.image_from_array(np.ascontiguousarray(np.transpose(array)))  # ITK's buffer has k slowest
    set_geometry(image, affine_ras)
    return image


def set_geometry(image: object, affine_ras: np.ndarray) -> None:
    """Give `image` the spacing, origin and direction of `affine_ras`."""
    import itk

    lps = LPS_FROM_RAS @ affine_ras
    direction = directions(lps)
    image.SetSpacing(np.linalg.norm(lps[:3, :3], axis=0).tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection(itk.matrix_from_array(np.ascontiguousarray(direction)))


def affine_of(image: object) -> np.ndarray:
    """The 4x4 `affine_ras` of an ITK image."""
    import itk

    lps = np.eye(4)
    lps[:3, :3] = itk.array_from_matrix(image.GetDirection()) * np.asarray(image.GetSpacing())
    lps[:3, 3] = np.asarray(image.GetOrigin())
    return LPS_FROM_RAS @ lps


def to_array(image: object) -> np.ndarray:
    """ITK image -> (I, J, K) array."""
    import itk

    return np.transpose(itk.array_from_image(image))


def write_scan(array: np.ndarray, affine_ras: np.ndarray, path: Path) -> None:
    """Write (I, J, K) or (C, I, J, K), compressed; the channels become the file's vector components in C > 1 scans.

    Raises:
        ValueError: the axes of `affine_ras` are not orthogonal.
    """
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if Path(path).name.endswith((".nii", ".nii.gz")):
        _write_nifti(array, affine_ras, path)
        return
    import itk

    if array.ndim == 3:
        image = to_itk(array, affine_ras)
    else:
        image = itk.image_from_array(np.ascontiguousarray(np.transpose(array, (3, 2, 1, 0))), is_vector=True)
        set_geometry(image, affine_ras)
    itk.imwrite(image, str(path), compression=True)


def _write_nifti(array: np.ndarray, affine_ras: np.ndarray, path: Path) -> None:
    """As ITK writes it: qform and sform alike, (I, J, K, 1, C) with intent vector for several channels, no scaling.

    Compressed by ISA-L at its level 1: a tenth of zlib's time, and files within 2 % of its size.
    """
    directions(affine_ras)
    values = array if array.ndim == 3 else np.moveaxis(array, 0, -1)[:, :, :, None]
    image = nib.Nifti1Image(values, affine_ras, dtype=values.dtype)
    image.header.set_xyzt_units("mm", "sec")
    image.header.set_qform(affine_ras, code=1)
    image.header.set_sform(affine_ras, code=1)
    if array.ndim == 4:
        image.header.set_intent("vector")
    if Path(path).suffix != ".gz":
        image.to_filename(path)
        return
    with igzip.open(path, "wb", compresslevel=1) as file:
        image.to_stream(file)


def directions(affine_ras: np.ndarray) -> np.ndarray:
    """Unit vectors of a grid's axes, the columns of (3, 3).

    Raises:
        ValueError: they are not orthogonal, which neither ITK nor a qform can hold.
    """
    linear = affine_ras[:3, :3] / np.linalg.norm(affine_ras[:3, :3], axis=0)
    if not np.allclose(linear.T @ linear, np.eye(3), atol=1e-4):
        raise ValueError(f"directions() 'affine_ras' must have orthogonal axes, got {affine_ras.tolist()}")
    return linear


def read_vectors(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """A displacement image: vectors (3, I, J, K) float64 as they are in the file, and `affine_ras`.

    Raises:
        InputError: not an image, not 3-D with three values a voxel, or NaN or infinite values.
    """
    import itk

    try:
        source = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
        source.SetFileName(str(path))
        source.ReadImageInformation()
        form = source.GetNumberOfDimensions(), source.GetNumberOfComponents()
        image = itk.imread(str(path), itk.Vector[itk.F, 3]) if form == (3, 3) else None
    except Exception as error:  # no reader found (AttributeError on None), or what a reader raises
        raise InputError(f"{path}: not an image that can be read") from error
    if image is None:
        raise InputError(f"{path}: a displacement file is 3-D with 3 values a voxel, not {form[0]}-D with {form[1]}")
    vectors = np.moveaxis(np.transpose(itk.array_from_image(image), (2, 1, 0, 3)), -1, 0).astype(np.float64)
    if not np.isfinite(vectors).all():
        raise InputError(f"{path}: holds NaN or infinite values")
    return vectors, affine_of(image)


def write_image_file(path: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """`replaced` for a scan.

    Raises:
        InputError: an ending that is not one of an image.
    """
    if not str(path).lower().endswith(IMAGE_ENDINGS):
        raise InputError(f"{path}: scans are written as one of {', '.join(IMAGE_ENDINGS)}")
    replaced(path, write)


def write_label(array: np.ndarray, affine_ras: np.ndarray, path: Path) -> None:
    """Write an (I, J, K) label map in the smallest integer type that holds it."""
    low, high = float(array.min()), float(array.max())
    kinds = (np.uint8, np.int16, np.uint16, np.int32)
    kind = next((k for k in kinds if np.iinfo(k).min <= low and high <= np.iinfo(k).max), np.float32)
    write_scan(array.astype(kind), affine_ras, path)


def background(channel: np.ndarray) -> float:
    """What lies outside a scan: 0, or its smallest value where that is below 0 (air, in CT)."""
    return min(float(channel.min()), 0.0)
