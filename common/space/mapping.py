"""Point maps as ITK transforms: files of them, compose, invert, apply to scans and points.

A transform T takes a point of the fixed space to its place in the moving space (LPS mm, as ITK has it), so that
warped(x) = moving(T(x)). Arrays, grids and matrices are in this package's frames and are converted here.
"""

import os
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import torch
from scipy.ndimage import map_coordinates

from common import InputError, fields
from common.space import itk_classes
from common.space.headers import settled
from common.space.io import (
    IMAGE_ENDINGS,
    LPS_FROM_RAS,
    affine_of,
    replaced,
    set_geometry,
    to_array,
    to_itk,
    write_image,
)

FIELD_ENDINGS = IMAGE_ENDINGS
TRANSFORM_ENDINGS = (".h5", ".hdf5", ".tfm", ".txt", ".mat")
Transform = itk.Transform[itk.D, 3, 3]  # any of ITK's in 3-D
Grid = tuple[tuple[int, int, int], np.ndarray]  # size and affine_ras
CONVERGED_MM = 1e-3  # a point counts as inverted when its image is this close to the target


def affine_transform(matrix_ras: np.ndarray) -> "itk.AffineTransform":
    """4x4 point map in RAS mm -> ITK affine transform (LPS mm)."""
    lps = LPS_FROM_RAS @ matrix_ras @ LPS_FROM_RAS
    transform = itk.AffineTransform[itk.D, 3].New()
    transform.SetMatrix(itk.matrix_from_array(np.ascontiguousarray(lps[:3, :3])))
    transform.SetTranslation(lps[:3, 3].tolist())
    return transform


def displacement_transform(disp: np.ndarray, affine_ras: np.ndarray) -> "itk.DisplacementFieldTransform":
    """(3, I, J, K) displacement in voxels of the grid `affine_ras` -> ITK displacement field transform (LPS mm)."""
    linear = (LPS_FROM_RAS @ affine_ras)[:3, :3]
    vectors = np.einsum("ab,bijk->kjia", linear, disp.astype(np.float64))  # ITK's order: k slowest, components last
    field = itk.Image[itk.Vector[itk.D, 3], 3].New()
    field.SetRegions([int(n) for n in disp.shape[1:]])
    field.Allocate()
    itk.array_view_from_image(field)[...] = vectors
    set_geometry(field, affine_ras)
    transform = itk_classes.displacement_field_transform().New()
    transform.SetDisplacementField(field)
    return transform


def write_transform(transform: "itk.Transform", path: str | os.PathLike, grid: Grid | None = None) -> None:
    """Write a transform: .h5 any; .tfm, .txt, .mat (ANTs) an affine one; an image ending its displacement on `grid`.

    Raises:
        InputError: another ending, a transform that the ending cannot hold, a displacement file without a grid.
    """
    name, path = str(path).lower(), Path(path)
    if name.endswith(FIELD_ENDINGS):
        if grid is None:
            raise InputError(f"{path}: a displacement file needs a grid, that of a reference scan")
        image = displacement_image(transform, *grid)
        replaced(path, lambda partial: write_image(image, partial))
        return
    if not name.endswith(TRANSFORM_ENDINGS):
        endings = ", ".join(TRANSFORM_ENDINGS + FIELD_ENDINGS)
        raise InputError(f"{path}: transforms are written as one of {endings}")
    if not name.endswith(TRANSFORM_ENDINGS[:2]):
        if not transform.IsLinear():
            raise InputError(f"{path}: holds affine transforms only, and this one deforms; write .h5 or .nii.gz")
        transform = affine_transform(matrix_of(transform))
    replaced(path, lambda partial: itk_classes.write_transforms([transform], str(partial)))


def read_transform(
    path: str | os.PathLike, *, matrix: str = "", scans: tuple[str, str] | None = None
) -> "itk.Transform":
    """Read a transform: ITK .h5, .tfm, .txt, ANTs .mat, or a displacement image (LPS mm, as ANTs writes a warp).

    Several transforms in one file come back as one composite, the last of the file applied first, as in ITK. What other
    tools write is read by `foreign`.

    Args:
        matrix, scans: for a plain 4 x 4 matrix, see `foreign.read`.

    Raises:
        InputError: the file is missing, not a transform, or an image that does not have three values a voxel.
    """
    from common.space import foreign

    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    if matrix and matrix not in foreign.MATRICES:
        raise InputError(f"--matrix must be one of {', '.join(foreign.MATRICES)}, got {matrix}")
    if str(path).lower().endswith((*FIELD_ENDINGS, ".mhd")):
        return foreign.read_field(Path(path)) or _read_field(path)
    return foreign.read(Path(path), matrix, scans) or read_itk(path, path)


def read_itk(path: str | os.PathLike, name: str | os.PathLike) -> "itk.Transform":
    """A file of ITK's transforms, called `name` in errors."""
    try:
        found = itk_classes.read_transforms(str(path))
    except Exception as error:  # ITK raises several kinds
        raise InputError(f"{name}: not a transform that ITK can read") from error
    if not found:
        raise InputError(f"{name}: holds no transform")
    for transform in found:
        if transform.GetInputSpaceDimension() != 3:
            raise InputError(f"{name}: must be a 3-D transform, this one is {transform.GetInputSpaceDimension()}-D")
    return found[0] if len(found) == 1 else compose(*reversed(found))


def _read_field(path: str | os.PathLike) -> "itk.DisplacementFieldTransform":
    from common.space import foreign

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
    vectors = itk.array_from_image(image).astype(np.float64)
    if not np.isfinite(vectors).all():
        raise InputError(f"{path}: holds NaN or infinite values")
    affine = settled(path, affine_of(image), vectors.shape[2::-1])
    foreign.refuse_positions(Path(path), vectors, affine)
    field = itk.Image[itk.Vector[itk.D, 3], 3].New()
    field.SetRegions(image.GetLargestPossibleRegion())
    field.Allocate()
    itk.array_view_from_image(field)[...] = vectors
    set_geometry(field, affine)
    transform = itk_classes.displacement_field_transform().New()
    transform.SetDisplacementField(field)
    return transform


def resample(
    array: np.ndarray,
    affine_ras: np.ndarray,
    size: tuple[int, int, int],
    onto_ras: np.ndarray,
    transform: "itk.Transform | None" = None,
    *,
    nearest: bool = False,
    outside: float = 0.0,
) -> np.ndarray:
    """Values of a scan at transform(x) for every voxel x of another grid. One interpolation, by ITK.

    Args:
        array: (I, J, K) scan on the grid `affine_ras`.
        size, onto_ras: the grid to fill.
        transform: ITK point map from the new grid's space to the scan's; None is the identity.
        nearest: nearest neighbour, for labels; else linear.
        outside: value where the scan does not reach.

    Returns:
        (I', J', K') float32; whole numbers taken by nearest neighbour keep their type and every digit.
    """
    if nearest and array.dtype.kind in "iu":
        codes, places = np.unique(array, return_inverse=True)  # a place in the list of codes is exact in float32
        if outside not in codes:
            codes, where = np.append(codes, array.dtype.type(outside)), len(codes)
        else:
            where = int(np.searchsorted(codes, outside))
        places = places.reshape(array.shape).astype(np.float32)
        found = resample(places, affine_ras, size, onto_ras, transform, nearest=True, outside=where)
        return codes[np.rint(found).astype(np.int64)]
    image = to_itk(array.astype(np.float32, copy=False), affine_ras)
    chooser = "NearestNeighbor" if nearest else "Linear"
    reference = to_itk(np.zeros((1, 1, 1), np.float32), onto_ras)
    filtered = itk_classes.wrapped("ResampleImageFilter", "IF3IF3").New()
    filtered.SetInput(image)
    filtered.SetInterpolator(itk_classes.wrapped(f"{chooser}InterpolateImageFunction", "IF3D").New())
    filtered.SetSize([int(n) for n in size])
    filtered.SetOutputSpacing(reference.GetSpacing())
    filtered.SetOutputOrigin(reference.GetOrigin())
    filtered.SetOutputDirection(reference.GetDirection())
    filtered.SetDefaultPixelValue(outside)
    if transform is not None:
        filtered.SetTransform(transform)
    filtered.Update()
    return to_array(filtered.GetOutput())


def displacement_image(transform: "itk.Transform", size: tuple[int, int, int], affine_ras: np.ndarray) -> "itk.Image":
    """The whole point map as a vector image transform(x) - x (LPS mm) on a grid: what ANTs calls a warp."""
    reference = to_itk(np.zeros((1, 1, 1), np.float32), affine_ras)
    source = itk_classes.wrapped("TransformToDisplacementFieldFilter", "IVF33D").New()
    source.SetTransform(transform)
    source.SetSize([int(n) for n in size])
    source.SetOutputSpacing(reference.GetSpacing())
    source.SetOutputOrigin(reference.GetOrigin())
    source.SetOutputDirection(reference.GetDirection())
    source.Update()
    return source.GetOutput()


def parts(transform: "itk.Transform") -> list["itk.Transform"]:
    """The transforms that a point goes through, first to last; composites are taken apart."""
    if not isinstance(transform, itk.CompositeTransform[itk.D, 3]):
        return [transform]
    queue = [itk_classes.down_cast(transform.GetNthTransform(n)) for n in range(transform.GetNumberOfTransforms())]
    return [part for member in reversed(queue) for part in parts(member)]


def compose(*transforms: "itk.Transform") -> "itk.CompositeTransform":
    """x -> last(...(first(x))): a point goes through the transforms in the order given."""
    whole = itk.CompositeTransform[itk.D, 3].New()
    for part in reversed([part for transform in transforms for part in parts(transform)]):
        whole.AddTransform(part)
    return whole


def matrix_of(transform: "itk.Transform") -> np.ndarray:
    """The 4x4 point map (RAS mm) of a linear ITK transform."""
    corners = np.vstack([np.zeros(3), np.eye(3)])
    there = _one_by_one(transform, corners)
    lps = np.eye(4)
    lps[:3, :3], lps[:3, 3] = (there[1:] - there[0]).T, there[0]
    return LPS_FROM_RAS @ lps @ LPS_FROM_RAS


def map_points(transform: "itk.Transform", points_lps: np.ndarray) -> np.ndarray:
    """T(x) of points (N, 3) in LPS mm: from fixed to moving space for the transform of a registration."""
    points = np.asarray(points_lps, float).reshape(-1, 3)
    for part in parts(transform):
        if isinstance(part, itk.DisplacementFieldTransform[itk.D, 3]):
            points = points + _displacement_at(part, points)
        elif part.IsLinear():
            points = nib.affines.apply_affine(LPS_FROM_RAS @ matrix_of(part) @ LPS_FROM_RAS, points)
        else:
            points = _one_by_one(part, points)
    return points


def _one_by_one(transform: "itk.Transform", points: np.ndarray) -> np.ndarray:
    return np.array([transform.TransformPoint(point) for point in points.tolist()]).reshape(-1, 3)


def _displacement_at(transform: "itk.DisplacementFieldTransform", points: np.ndarray) -> np.ndarray:
    """As ITK has it, linear between voxels and 0 beyond half a voxel outside, but for all points at once."""
    field = transform.GetDisplacementField()
    vectors = itk.array_view_from_image(field)  # (K, J, I, 3)
    size = np.array(vectors.shape[2::-1])
    voxels = nib.affines.apply_affine(np.linalg.inv(LPS_FROM_RAS @ affine_of(field)), points)
    with np.errstate(invalid="ignore"):
        inside = ((voxels >= -0.5) & (voxels < size - 0.5)).all(1)
    moved = np.zeros_like(points)
    places = voxels[inside].T[::-1]
    for axis in range(3):
        moved[inside, axis] = map_coordinates(vectors[..., axis], places, order=1, mode="nearest")
    return moved


def invert(transform: "itk.Transform", *, iterations: int = 60) -> "itk.CompositeTransform":
    """T^-1, part by part in reverse order: matrices exactly, displacement fields on a grid.

    A field y = x + u(x) is written as y = A(x + w(x)), A the affine map nearest to it, so that w has no large common
    motion; then T^-1 = (x + w)^-1 after A^-1, with (x + w)^-1 by `fields.invert` on the grid of u, widened by the
    largest w: points that leave the grid find back.

    Args:
        iterations: cap for the fixed point of each field.

    Raises:
        InputError: a part that is neither linear nor a displacement field, or a singular matrix.
    """
    backwards = []
    for part in reversed(parts(transform)):
        if part.IsLinear():
            backwards.append(affine_transform(_inverse_matrix(matrix_of(part))))
        elif isinstance(part, itk.DisplacementFieldTransform[itk.D, 3]):
            backwards += _invert_field(*field_of(part), iterations)
        else:
            name = part.GetNameOfClass()
            raise InputError(f"{name}: only affine maps and displacement fields can be inverted; turn it into a field")
    return compose(*backwards)


def _inverse_matrix(matrix: np.ndarray) -> np.ndarray:
    if abs(np.linalg.det(matrix[:3, :3])) < 1e-9:
        raise InputError(f"a matrix with determinant {np.linalg.det(matrix[:3, :3]):.1e} has no inverse")
    return np.linalg.inv(matrix)


def _invert_field(disp: np.ndarray, affine_ras: np.ndarray, iterations: int) -> list["itk.Transform"]:
    """Inverse of the affine map nearest to x + disp(x), then of the rest."""
    size = disp.shape[1:]
    grid = np.stack(np.meshgrid(*[np.arange(n, dtype=np.float64) for n in size], indexing="ij"))
    step = max(int((np.prod(size) / 20000) ** (1 / 3)), 1)
    some = (slice(None), *[slice(None, None, step)] * 3)
    x = np.append(grid[some].reshape(3, -1), np.ones((1, grid[some][0].size)), 0)
    near = np.eye(4)
    near[:3] = np.linalg.lstsq(x.T, (grid + disp)[some].reshape(3, -1).T, rcond=None)[0].T
    back = _inverse_matrix(near)
    rest = np.einsum("ab,bijk->aijk", back[:3, :3], grid + disp) + back[:3, 3, None, None, None] - grid
    wide = [min(int(np.ceil(np.abs(component).max())) + 1, n) for component, n in zip(rest, size)]
    padded = np.pad(rest, [(0, 0), *[(n, n) for n in wide]], mode="edge")
    inverse = fields.invert(torch.from_numpy(padded).float()[None], iterations=iterations)[0].numpy()
    shifted = np.eye(4)
    shifted[:3, 3] = [-n for n in wide]
    world = affine_ras @ back @ np.linalg.inv(affine_ras)
    return [affine_transform(world), displacement_transform(inverse, affine_ras @ shifted)]


def inverse_error_mm(
    transform: "itk.Transform", inverse: "itk.Transform", size: tuple[int, int, int], affine_ras: np.ndarray
) -> np.ndarray:
    """|T^-1(T(x)) - x| in mm at every voxel of a grid: (I, J, K)."""
    rest = displacement_image(compose(transform, inverse), size, affine_ras)
    return np.linalg.norm(itk.array_from_image(rest), axis=-1).T


def invert_at(transform: "itk.Transform", points_lps: np.ndarray, *, iterations: int = 50) -> np.ndarray:
    """The x with T(x) = y for points y (N, 3) in LPS mm, by Newton's method with numerical slopes and damped steps.

    Starts from the inverse of the linear parts alone. Exact where T is invertible, up to CONVERGED_MM; nan where no
    such x is found, as beyond a fold.
    """
    targets = np.asarray(points_lps, float).reshape(-1, 3)
    x = targets
    for part in reversed(parts(transform)):
        if part.IsLinear():
            x = map_points(affine_transform(_inverse_matrix(matrix_of(part))), x)
    found, left = np.full_like(targets, np.nan), np.arange(len(targets))  # left: those that are still sought
    nudges = np.vstack([np.zeros(3), 0.05 * np.eye(3)])

    def around(places: np.ndarray) -> np.ndarray:
        return map_points(transform, (places[:, None] + nudges).reshape(-1, 3)).reshape(-1, 4, 3)

    there = around(x)
    for _ in range(iterations):
        error = targets[left] - there[:, 0]
        length = np.linalg.norm(error, axis=1)
        done = length < CONVERGED_MM
        found[left[done]] = x[done]
        left, x, there, error, length = (values[~done] for values in (left, x, there, error, length))
        if not len(left):
            break
        slopes = np.swapaxes((there[:, 1:] - there[:, :1]) / 0.05, 1, 2)
        steps = (np.linalg.pinv(slopes, rcond=1e-3) @ error[..., None])[..., 0]
        tried, better = np.arange(len(left)), np.zeros(len(left), bool)
        for share in (1.0, 0.5, 0.25, 0.1, 0.02):
            places = x[tried] + share * steps[tried]
            values = around(places)
            nearer = np.linalg.norm(targets[left[tried]] - values[:, 0], axis=1) < length[tried]
            x[tried[nearer]], there[tried[nearer]] = places[nearer], values[nearer]
            better[tried[nearer]] = True
            tried = tried[~nearer]
            if not len(tried):
                break
        left, x, there = left[better], x[better], there[better]
    return found


def field_of(transform: "itk.DisplacementFieldTransform") -> tuple[np.ndarray, np.ndarray]:
    """Displacement (3, I, J, K) in voxels of its grid and `affine_ras` of that grid, of an ITK displacement field."""
    field = transform.GetDisplacementField()
    return _voxels(itk.array_view_from_image(field), affine_of(field)), affine_of(field)


def disp_of(transform: "itk.Transform", size: tuple[int, int, int], affine_ras: np.ndarray) -> np.ndarray:
    """Any point map as displacement (3, I, J, K) in voxels of a grid."""
    return _voxels(itk.array_from_image(displacement_image(transform, size, affine_ras)), affine_ras)


def _voxels(vectors: np.ndarray, affine_ras: np.ndarray) -> np.ndarray:
    linear = np.linalg.inv((LPS_FROM_RAS @ affine_ras)[:3, :3])
    return np.einsum("ab,kjib->aijk", linear, np.asarray(vectors, np.float64))
