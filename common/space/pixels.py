"""Pixels of image files, by ITK: values of scans as float32, codes of label maps as they are."""

from pathlib import Path
from typing import Any

import itk
import numpy as np

from common import InputError

UNSIGNED_LONG = ("unsigned_long", "unsigned_long_long")
LARGEST = 2**63 - 1  # code of a label


def image_io(path: Path, *, bend: bool = False) -> Any:
    """The ITK ImageIO that reads a file, its header read.

    Args:
        bend: let NIfTI's put axes at right angles that are not, instead of refusing the file.

    Raises:
        InputError: none does.
    """
    try:
        source = itk.ImageIOFactory.CreateImageIO(str(path), itk.CommonEnums.IOFileMode_ReadMode)
        if source is None:
            raise InputError(f"{path}: not an image that can be read, its format is not known")
        if bend:
            source = itk.NiftiImageIO.New()
            source.SetSFORM_Permissive(True)
        source.SetFileName(str(path))
        source.ReadImageInformation()
    except RuntimeError as error:  # every reader of ITK has its own words; the sentence keeps the last line of them
        raise InputError(f"{path}: not an image that can be read ({_last_line(error)})") from error
    return source


def read_pixels(path: Path, *, codes: bool = False, source: Any = None) -> tuple[np.ndarray, "itk.Image"]:
    """Values (C, I, J, K) of a 3-D file, and its ITK image, for the geometry.

    Args:
        codes: of a label map: integers come out as int64, bit by bit, other values as float64. Else float32.
        source: ImageIO to read with, its header read; that of `image_io` if not given.

    Raises:
        InputError: what ITK cannot read, not 3-D, complex, or codes above 2^63 - 1.
    """
    source = source or image_io(path)
    dimension = source.GetNumberOfDimensions()
    size = tuple(source.GetDimensions(axis) for axis in range(dimension))
    while len(size) > 3 and size[-1] == 1:
        size = size[:-1]
    if len(size) != 3:
        raise InputError(f"{path}: must be a 3-D scan, got {len(size)}-D data of shape {size}{_cure(size, codes)}")
    if min(size) < 2:
        raise InputError(f"{path}: must be a 3-D scan, got a single slice of shape {size}")
    kind = source.GetComponentTypeAsString(source.GetComponentType())
    components = source.GetNumberOfComponents()
    if source.GetPixelTypeAsString(source.GetPixelType()) == "complex":
        raise InputError(f"{path}: holds complex values; give their magnitude")
    whole = codes and kind not in ("float", "double", "long_double")
    # ITK's wheels wrap no vectors of long integers: those of several channels pass a double, exact up to 2^53
    pixel = itk.F if not codes else itk.ULL if whole and components == 1 else itk.D
    image_type = itk.Image[pixel, 3] if components == 1 else itk.VectorImage[pixel, 3]
    try:
        reader = itk.ImageFileReader[image_type].New()
        reader.SetFileName(str(path))
        reader.SetImageIO(source)
        reader.Update()
    except Exception as error:  # ITK raises several kinds
        raise InputError(f"{path}: not an image that can be read ({_last_line(error)})") from error
    image = reader.GetOutput()
    array = itk.array_from_image(image)
    array = array.T[None] if components == 1 else np.transpose(array, (3, 2, 1, 0))
    if pixel is itk.ULL:
        if kind in UNSIGNED_LONG and array.max() > LARGEST:
            raise InputError(f"{path}: codes of labels go up to 2^63 - 1, this map has {array.max()}")
        array = array.view(np.int64)  # the bits of a negative code are its own
    elif whole:
        array = array.astype(np.int64)
    return np.ascontiguousarray(array), image


def _cure(size: tuple[int, ...], codes: bool) -> str:
    if len(size) != 4:
        return ""
    if not codes:
        return "; a series in time is registered by `python -m common series SERIES OUT`"
    return "; give one structure a file, or the structures as the channels of one .nrrd"


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__
