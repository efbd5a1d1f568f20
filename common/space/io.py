"""Files of scans.

A scan inside the package is a numpy array (I, J, K) or (C, I, J, K) with a 4x4 `affine_ras` (voxel -> mm, RAS, as in
NIfTI). ITK works in LPS: the first two world axes change sign. Reading goes through ITK, so that headers mean here what
they mean to ANTs and Slicer. itk and monai, which take seconds to load, are imported where they are needed: a pair of
NIfTI files is read, warped and written without itk.
"""

import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip

from common import InputError, RegistrationWarning
from common.space import headers
from common.space.files import output_folder, remove_leftovers, replaced, write_folder, write_table

__all__ = ["output_folder", "remove_leftovers", "replaced", "write_folder", "write_table"]  # beside what is here
IMAGE_ENDINGS = (".nii", ".nii.gz", ".mha", ".nrrd")
LPS_FROM_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def read_scan(
    path: str | os.PathLike, *, header: str = "", series: str | Sequence[str] = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Read a 3-D scan: NIfTI, MetaImage, NRRD, ..., a folder with one DICOM series, or several contrasts of one person.

    Args:
        path: file or folder; contrasts are joined by ";", as "t1.nii.gz;t2.nii.gz", and become channels on the grid of
            the first, resampled by their headers where theirs differs.
        header: of a NIfTI file, "sform" or "qform"; "" takes the one that ITK takes.
        series: UID or description of the DICOM series, of a folder with several; of several such words, the one that
            the folder has.

    Returns:
        Array (C, I, J, K) float32 and its `affine_ras` (4, 4). What is doubtful about the place of the scan is said in
        a `RegistrationWarning`.

    Raises:
        InputError: the file is missing, not an image, not 3-D, or holds NaN or infinite values; a place in space that
            is not known; a folder without a DICOM series, or with several and none asked for; slices that are missing.
    """
    parts = contrasts_of(path)
    if not parts:
        raise InputError(f"{path!r}: is not the name of a file")
    contrasts = [_read_one(Path(part), header, series) for part in parts]
    array, affine = contrasts[0]
    parts = [array]
    for other, own in contrasts[1:]:
        if other.shape[1:] != array.shape[1:] or not np.allclose(own, affine, atol=1e-3):
            other = np.stack([_onto(channel, own, array.shape[1:], affine) for channel in other])
        parts.append(other)
    return np.concatenate(parts), affine


def read_grid(path: str | os.PathLike) -> tuple[tuple[int, int, int], np.ndarray]:
    """Size and `affine_ras` of a scan; of a NIfTI file the header alone is read, where it leaves no doubt.

    Raises:
        InputError: what `read_scan` refuses; but values that are not read.
    """
    file = Path(path)
    if headers.is_nifti(file) and file.is_file():
        found = headers.read_nifti(file, values=False)
        if (grid := headers.plain_grid(found)) is not None:
            return grid[0], headers.settled(file, headers.place(file, found, grid[1]), grid[0])
    array, affine = read_scan(path)
    return array.shape[1:], affine


def read_label(
    path: str | os.PathLike, *, kind: str = "label map", header: str = "", series: str | Sequence[str] = ""
) -> tuple[np.ndarray, np.ndarray]:
    """Read a label map; its codes do not pass a float32, which holds whole numbers up to 2^24 only.

    Args:
        kind: what it is called in errors.
        header, series: as of `read_scan`.

    Returns:
        Codes (C, I, J, K), int32 or, where one does not fit, int64, and `affine_ras`. C is mostly 1; overlapping
        structures are channels.

    Raises:
        InputError: what `read_scan` refuses, and values that are not whole numbers.
    """
    array, affine = _read_one(Path(path), header, series, codes=True)
    if array.dtype.kind == "f":
        if not (array == np.rint(array)).all() or np.abs(array).max() > 2.0**53:
            raise InputError(f"{path}: a {kind} has whole numbers, this one has others")
        array = array.astype(np.int64)
    small = np.iinfo(np.int32)
    fits = small.min <= array.min() and array.max() <= small.max
    return array.astype(np.int32 if fits else np.int64, copy=False), affine


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
    path: str | os.PathLike, kind: str, scan_path: str, scan: np.ndarray, scan_affine: np.ndarray, header: str = ""
) -> np.ndarray:
    """Read a label map or mask (its `kind`) of a scan: (1, I, J, K), whole numbers as `read_label` has them.

    Raises:
        InputError: what `read_label` refuses, several channels, another place or shape than its scan, an empty mask.
    """
    label, affine = read_label(path, kind=kind, header=header)
    if len(label) > 1:
        cure = "give one structure a file, or take them all along with `python -m common apply --label`"
        raise InputError(f"{path}: a {kind} has one channel, this one has {len(label)} channels; {cure}")
    if label.shape[1:] != scan.shape[1:]:
        sizes = f"shape {label.shape[1:]}, its scan {scan_path} has {scan.shape[1:]}"
        raise InputError(f"{path}: the {kind} has {sizes}")
    if not np.allclose(affine, scan_affine, atol=1e-2):
        raise InputError(f"{path}: the {kind} lies elsewhere in space than its scan {scan_path}")
    if not label.any():
        if kind == "mask":
            raise InputError(f"{path}: the mask is empty, every voxel is 0")
        warnings.warn(f"{path}: holds no labels, every voxel is 0", RegistrationWarning, stacklevel=2)
    return label


def read_mask(
    path: str | os.PathLike, kind: str, scan_path: str, scan: np.ndarray, scan_affine: np.ndarray, header: str = ""
) -> np.ndarray:
    """Read a mask (its `kind`) and bring it onto the grid of its scan by the headers: (1, I, J, K), above 0 inside.

    Raises:
        InputError: what `read_label` refuses, several channels, no place that the scan has as well.
    """
    mask, affine = read_label(path, kind=kind, header=header)
    if len(mask) > 1:
        raise InputError(f"{path}: a {kind} has one channel, this one has {len(mask)} channels")
    if mask.shape[1:] == scan.shape[1:] and np.allclose(affine, scan_affine, atol=1e-2):
        return mask
    from common.space.mapping import resample

    options = {"nearest": True, "outside": -1}
    there = resample((mask[0] > 0).astype(np.int8), affine, scan.shape[1:], scan_affine, **options)
    if there.max() < 0:
        raise InputError(f"{path}: the {kind} lies elsewhere in space than its scan {scan_path}")
    return (there > 0).astype(np.int32)[None]


def _onto(channel: np.ndarray, own: np.ndarray, size: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    from common.space.mapping import resample

    return resample(channel, own, size, affine, outside=background(channel))


def _read_one(
    path: Path, header: str = "", series: str | Sequence[str] = "", *, codes: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    if not path.exists():
        raise InputError(f"{path}: no such file")
    if not (path.is_file() or path.is_dir()):
        raise InputError(f"{path}: is neither a file nor a folder")
    if header and header not in headers.HEADERS:
        raise InputError(f"--header must be one of {', '.join(headers.HEADERS)}, got {header}")
    if path.is_dir() or is_dicom(path):
        from common.space import dicom  # which imports pydicom

        array, affine = dicom.read(path, series)
    else:
        array, affine = _read_file(path, header, codes)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(f"{path}: holds NaN or infinite values")
    return array, headers.settled(path, affine, array.shape[1:])


def _read_file(path: Path, header: str, codes: bool) -> tuple[np.ndarray, np.ndarray]:
    found = headers.read_nifti(path) if headers.is_nifti(path) else None
    if found is not None and (plain := headers.plain(found, codes=codes)) is not None:
        array, affine = plain  # ITK would say the same, and costs a second to load
        if not found.finite:
            raise InputError(f"{path}: holds NaN or infinite values")
        return array, headers.place(path, found, affine, header)
    from common.space import pixels

    if found is None:
        array, image = pixels.read_pixels(path, codes=codes)
        return array, affine_of(image)
    # where a sheared sform is all there is, ITK reads the pixels only if it may bend the axes; `place` takes the sform
    source = pixels.image_io(path, bend="qform" not in found.matrices)
    array, image = pixels.read_pixels(path, codes=codes, source=source)
    if not found.finite:
        raise InputError(f"{path}: holds NaN or infinite values")
    return array, headers.place(path, found, affine_of(image), header)


def is_dicom(path: Path) -> bool:
    """Whether a file has the mark of DICOM files."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def to_itk(array: np.ndarray, affine_ras: np.ndarray) -> object:
    """(I, J, K) array and its affine -> ITK image in LPS.

    Raises:
        ValueError: what `set_geometry` refuses.
    """
    import itk

    image = itk.image_from_array(np.ascontiguousarray(np.transpose(array)))  # ITK's buffer has k slowest
    set_geometry(image, affine_ras)
    return image


def set_geometry(image: object, affine_ras: np.ndarray) -> None:
    """Give `image` the spacing, origin and direction of `affine_ras`.

    Axes that are not at right angles stay so: all that is computed with the image is right, .nrrd and .mha keep it.

    Raises:
        ValueError: `affine_ras` spans no volume.
    """
    import itk

    lps = LPS_FROM_RAS @ affine_ras
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    if not (spacing > 0).all() or abs(np.linalg.det(lps[:3, :3] / spacing)) < 1e-6:
        raise ValueError(f"set_geometry() 'affine_ras' must span a volume, got {affine_ras.tolist()}")
    direction = lps[:3, :3] / spacing
    image.SetSpacing(spacing.tolist())
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
    if headers.is_nifti(Path(path)):
        write_nifti(array, affine_ras, path)
        return
    import itk

    if array.ndim == 3:
        image = to_itk(array, affine_ras)
    else:
        image = itk.image_from_array(np.ascontiguousarray(np.transpose(array, (3, 2, 1, 0))), is_vector=True)
        set_geometry(image, affine_ras)
    itk.imwrite(image, str(path), compression=True)


def write_nifti(array: np.ndarray, affine_ras: np.ndarray, path: Path) -> None:
    """As ITK writes it: qform and sform alike, (I, J, K, 1, C) with intent vector for several channels, no scaling.

    Axes that are not at right angles go into the sform alone, as no qform can hold them, and ITK would bend them.
    Compressed by ISA-L at its level 1: a tenth of zlib's time, and files within 2 % of its size.
    """
    values = array if array.ndim == 3 else np.moveaxis(array, 0, -1)[:, :, :, None]
    image = nib.Nifti1Image(values, affine_ras, dtype=values.dtype)
    image.header.set_xyzt_units("mm", "sec")
    if headers.skew(affine_ras) <= headers.EXACT:
        image.header.set_qform(affine_ras, code=1)
    image.header.set_sform(affine_ras, code=1)
    if array.ndim == 4:
        image.header.set_intent("vector")
    if Path(path).suffix != ".gz":
        image.to_filename(path)
        return
    with igzip.open(path, "wb", compresslevel=1) as file:
        image.to_stream(file)


def read_vectors(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """A displacement image: vectors (3, I, J, K) float64 as they are in the file, and `affine_ras`.

    Raises:
        InputError: not an image, not 3-D with three values a voxel, or NaN or infinite values.
    """
    import itk

    # ITK reads NaN as 0, and the end of a file that was cut off as well.
    if headers.is_nifti(Path(path)) and not headers.read_nifti(Path(path)).finite:
        raise InputError(f"{path}: holds NaN or infinite values")
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
    return vectors, headers.settled(path, affine_of(image), vectors.shape[1:])


def write_image_file(path: str | os.PathLike, write: Callable[[Path], None]) -> None:
    """`replaced` for a scan.

    Raises:
        InputError: an ending that is not one of an image.
    """
    if not str(path).lower().endswith(IMAGE_ENDINGS):
        raise InputError(f"{path}: scans are written as one of {', '.join(IMAGE_ENDINGS)}")
    replaced(path, write)


def write_label(array: np.ndarray, affine_ras: np.ndarray, path: Path) -> None:
    """Write label codes (I, J, K), or (C, I, J, K) with structures as channels, in the smallest type that holds them.

    Raises:
        InputError: codes that the file's format has no type for: .nii and .nii.gz have one for all.
    """
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    low, high = int(array.min()), int(array.max())
    kinds = (np.uint8, np.int16, np.uint16, np.int32, np.uint32) if array.ndim == 3 else (np.uint8, np.int16, np.uint16)
    kind = next((k for k in kinds if np.iinfo(k).min <= low and high <= np.iinfo(k).max), None)
    if kind is None and max(-low, high) <= 2**24:
        kind = np.float32
    if kind is not None:
        write_scan(array.astype(kind), affine_ras, path)
    elif headers.is_nifti(path):  # ITK's wheels write no long integers
        write_nifti(array.astype(np.int64), affine_ras, path)
    elif max(-low, high) <= 2**53:
        write_scan(array.astype(np.float64), affine_ras, path)
    else:
        raise InputError(f"{path}: codes of labels from {low} to {high} fit into .nii.gz only")


def is_stripped(channel: np.ndarray) -> bool:
    """Whether the background of a scan is exactly 0: at least 5 % of its voxels, as after skull-stripping."""
    return bool((channel == 0).mean() >= 0.05)


def background(channel: np.ndarray) -> float:
    """What lies outside a scan (I, J, K): 0, or, of one with values below 0 and none of 0 around (CT), its air.

    That is the value found most often on the six faces, in the lower half of the scan's range where a tenth of them is
    there (a body may reach the faces). Not the smallest one: a single voxel may be far below it.
    """
    if not channel.min() < 0 or is_stripped(channel):
        return 0.0
    faces = np.concatenate([channel.take(end, axis).ravel() for axis in range(3) for end in (0, -1)])
    dark = faces[faces <= np.percentile(channel, (1, 99)).mean()]
    values = dark if len(dark) >= 0.1 * len(faces) else faces
    low, high = np.percentile(values, (1, 99))
    counts, edges = np.histogram(values[(values >= low) & (values <= high)], 64)
    most = int(counts.argmax())
    often = values[(values >= edges[most]) & (values <= edges[most + 1])]
    return min(float(np.median(often)), 0.0)
