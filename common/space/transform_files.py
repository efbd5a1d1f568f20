"""Files of transforms: ITK's .h5 and displacement images by our own hand, quickly; every other kind by ITK."""

import os
from pathlib import Path

import h5py
import numpy as np

from common import InputError
from common.space.io import IMAGE_ENDINGS, LPS_FROM_RAS, read_vectors, replaced, write_scan
from common.space.mapping import (
    Affine,
    Field,
    Foreign,
    Grid,
    Transform,
    affine_transform,
    compose,
    displacement_mm,
    matrix_of,
)

FIELD_ENDINGS = IMAGE_ENDINGS
TRANSFORM_ENDINGS = (".h5", ".hdf5", ".tfm", ".txt", ".mat")
KINDS = {Affine: "AffineTransform", Field: "DisplacementFieldTransform"}


def write_transform(transform: Transform, path: str | os.PathLike, grid: Grid | None = None) -> None:
    """Write a transform: .h5 any; .tfm, .txt, .mat (ANTs) an affine one; an image ending its displacement on `grid`.

    Raises:
        InputError: another ending, a transform that the ending cannot hold, a displacement file without a grid.
    """
    name, path = str(path).lower(), Path(path)
    if name.endswith(FIELD_ENDINGS):
        if grid is None:
            raise InputError(f"{path}: a displacement file needs a grid, that of a reference scan")
        vectors = displacement_mm(transform, *grid)
        replaced(path, lambda partial: write_scan(vectors, grid[1], partial))
        return
    if not name.endswith(TRANSFORM_ENDINGS):
        endings = ", ".join(TRANSFORM_ENDINGS + FIELD_ENDINGS)
        raise InputError(f"{path}: transforms are written as one of {endings}")
    if not name.endswith(TRANSFORM_ENDINGS[:2]):
        if not transform.linear:
            raise InputError(f"{path}: holds affine transforms only, and this one deforms; write .h5 or .nii.gz")
        transform = affine_transform(matrix_of(transform))
    if name.endswith(TRANSFORM_ENDINGS[:2]) and not any(isinstance(part, Foreign) for part in transform.parts):
        replaced(path, lambda partial: _write_h5(transform, partial))
        return
    from common.space import itk_classes, itk_maps

    whole = itk_maps.to_itk_transform(transform)
    replaced(path, lambda partial: itk_classes.write_transforms([whole], str(partial)))


def _write_h5(transform: Transform, path: Path) -> None:
    """As ITK's HDF5TransformIO lays it out: a composite first, then its parts, the last of the file applied first.

    Displacements are stored in 32 bits, as the networks compute them; HDF5 gives them to ITK as the double that the
    name of the type promises. Uncompressed, that is less than ITK's compressed 64 bits, for a tenth of the time.
    """
    # In memory first: where a disk is full, HDF5 prints 40 lines and may end the process.
    with h5py.File(path.name, "w", driver="core", backing_store=False) as file:
        text = h5py.string_dtype("ascii")
        # A file of ITK says what wrote it; readers ask for the names only.
        for name, value in (("ITKVersion", "5.4"), ("HDFVersion", h5py.version.hdf5_version)):
            file.create_dataset(name, data=[value], dtype=text)
        for name in ("OSName", "OSVersion"):
            file.create_dataset(name, data=[""], dtype=text)
        members = list(reversed(transform.parts))
        whole = len(members) > 1
        if whole:
            kind = "CompositeTransform_double_3_3"
            file.create_dataset("TransformGroup/0/TransformType", data=[kind], dtype=text)
        for number, part in enumerate(members, whole):
            group = file.create_group(f"TransformGroup/{number}")
            group.create_dataset("TransformType", data=[f"{KINDS[type(part)]}_double_3_3"], dtype=text)
            fixed, values = (_affine_numbers if isinstance(part, Affine) else _field_numbers)(part)
            group.create_dataset("TransformFixedParameters", data=fixed)
            group.create_dataset("TransformParameters", data=values)
        file.flush()
        whole_file = file.id.get_file_image()
    path.write_bytes(whole_file)


def _affine_numbers(part: Affine) -> tuple[np.ndarray, np.ndarray]:
    lps = LPS_FROM_RAS @ part.matrix @ LPS_FROM_RAS
    return np.zeros(3), np.append(lps[:3, :3].ravel(), lps[:3, 3])


def _field_numbers(part: Field) -> tuple[np.ndarray, np.ndarray]:
    """Size, origin, spacing and direction (LPS), and the vectors in LPS mm, i fastest."""
    lps = LPS_FROM_RAS @ part.affine_ras
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    fixed = np.concatenate([part.disp.shape[1:], lps[:3, 3], spacing, (lps[:3, :3] / spacing).ravel()])
    vectors = np.einsum("ab,bijk->kjia", lps[:3, :3], part.disp)
    return fixed, vectors.astype(np.float32).ravel()


def read_transform(path: str | os.PathLike, *, matrix: str = "", scans: tuple[str, str] | None = None) -> Transform:
    """Read a transform: ITK .h5, .tfm, .txt, ANTs .mat, or a displacement image (LPS mm, as ANTs writes a warp).

    Several transforms in one file come back as one, the last of the file applied first, as in ITK. What other tools
    write is read by `foreign`.

    Args:
        matrix, scans: for a plain 4 x 4 matrix, see `foreign.read`.

    Raises:
        InputError: the file is missing, not a transform, one with NaN or without an inverse, or an image that does not
            have three values a voxel.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    found = _read(path, matrix, scans)
    for part in found.parts:
        numbers = {Affine: "matrix", Field: "disp"}.get(type(part))
        if numbers and not np.isfinite(getattr(part, numbers)).all():
            raise InputError(f"{path}: holds NaN or infinite values")
        if numbers == "matrix" and abs(np.linalg.det(part.matrix[:3, :3])) < 1e-9:
            raise InputError(f"{path}: its matrix is singular, it brings all of space onto a plane")
    return found


def _read(path: str | os.PathLike, matrix: str, scans: tuple[str, str] | None) -> Transform:
    if str(path).lower().endswith(TRANSFORM_ENDINGS[:2]) and (found := _read_h5(path)) is not None:
        return found
    from common.space import foreign

    if matrix and matrix not in foreign.MATRICES:
        raise InputError(f"--matrix must be one of {', '.join(foreign.MATRICES)}, got {matrix}")
    if not str(path).lower().endswith((*FIELD_ENDINGS, ".mhd")):
        return foreign.read(Path(path), matrix, scans) or read_itk(path, path)
    if found := foreign.read_field(Path(path)):
        return found
    vectors, affine = read_vectors(path)
    foreign.refuse_positions(Path(path), vectors.transpose(3, 2, 1, 0), affine)
    linear = np.linalg.inv((LPS_FROM_RAS @ affine)[:3, :3])
    return Transform((Field(np.einsum("ab,bijk->aijk", linear, vectors), affine),))


def read_itk(path: str | os.PathLike, name: str | os.PathLike) -> Transform:
    """A file of ITK's transforms, called `name` in errors."""
    from common.space import itk_classes, itk_maps

    try:
        read = itk_classes.read_transforms(str(path))
    except Exception as error:  # ITK raises several kinds
        raise InputError(f"{name}: not a transform that ITK can read") from error
    if not read:
        raise InputError(f"{name}: holds no transform")
    for transform in read:
        if transform.GetInputSpaceDimension() != 3:
            raise InputError(f"{name}: must be a 3-D transform, this one is {transform.GetInputSpaceDimension()}-D")
    return compose(*(itk_maps.from_itk(transform) for transform in reversed(read)))


def _read_h5(path: str | os.PathLike) -> Transform | None:
    """A file of affine maps and displacement fields in 3-D; None for any other, which is left to ITK."""
    try:
        with h5py.File(path, "r") as file:
            groups = [file["TransformGroup"][str(n)] for n in range(len(file["TransformGroup"]))]
            kinds = [group["TransformType"][0].decode().split("_") for group in groups]
            parts = []
            for (name, *rest), group in zip(kinds, groups):
                if name == "CompositeTransform" and not parts:
                    continue
                if rest[1:] != ["3", "3"] or name not in ("MatrixOffsetTransformBase", *KINDS.values()):
                    return None
                fixed, values = (np.array(group[f"Transform{which}Parameters"], np.float64) for which in ("Fixed", ""))
                parts.append((_field_of if name == KINDS[Field] else _affine_of)(fixed, values))
    except (OSError, KeyError, ValueError, IndexError, AttributeError):  # ITK says what is wrong with it
        return None
    return Transform(tuple(reversed(parts))) if parts else None


def _affine_of(centre: np.ndarray, values: np.ndarray) -> Affine:
    """x -> A (x - c) + c + t."""
    lps = np.eye(4)
    lps[:3, :3] = values[:9].reshape(3, 3)
    lps[:3, 3] = values[9:] + centre - lps[:3, :3] @ centre
    return Affine(LPS_FROM_RAS @ lps @ LPS_FROM_RAS)


def _field_of(fixed: np.ndarray, values: np.ndarray) -> Field:
    size, origin, spacing, direction = fixed[:3].astype(int), fixed[3:6], fixed[6:9], fixed[9:].reshape(3, 3)
    lps = np.eye(4)
    lps[:3, :3], lps[:3, 3] = direction * spacing, origin
    vectors = values.reshape(*size[::-1], 3)
    return Field(np.einsum("ab,kjib->aijk", np.linalg.inv(lps[:3, :3]), vectors), LPS_FROM_RAS @ lps)
