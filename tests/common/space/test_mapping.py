"""Point maps: against formulas, ITK alone and ANTs; files of every kind; inverses to a stated error; refusals."""

import itertools
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from common import InputError
from common.fields import jacobian_determinant
from common.space import io, itk_maps, mapping
from common.space.transform_files import read_transform, write_transform

OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.3, -0.2, 0.1) @ np.diag([-1.5, 2.0, 2.5]), [10.0, -20.0, 30.0]
)
SIZE = (24, 26, 22)
FLIP = np.array([-1.0, -1.0, 1.0])  # RAS <-> LPS
ORIENTATIONS = [
    nib.affines.from_matvec(np.eye(3)[list(order)] * signs, [0, 0, 0])
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def smooth_disp(size: tuple[int, int, int], largest: float, *, seed: int = 0, sigma: float = 3.0) -> np.ndarray:
    """(3, I, J, K) smooth noise with components up to `largest` voxels, 0 at the faces of the grid."""
    noise = np.random.default_rng(seed).normal(size=(3, *size))
    disp = np.stack([gaussian_filter(component, sigma) for component in noise])
    for axis, n in enumerate(size):
        disp *= np.sin(np.pi * np.arange(n) / (n - 1)).reshape([-1 if a == axis else 1 for a in range(3)])
    return largest * disp / np.abs(disp).max()


def some_matrix(rng: np.random.Generator, *, scale: float = 0.05, shift: float = 9.0) -> np.ndarray:
    return np.eye(4) + np.vstack([rng.normal(size=(3, 4)) * [scale, scale, scale, shift], np.zeros(4)])


def registration(rng: np.random.Generator, affine: np.ndarray = OBLIQUE, size: tuple = SIZE) -> "itk.Transform":
    """As a bundle writes it: displacement on the fixed grid, then an affine map."""
    field = mapping.displacement_transform(smooth_disp(size, 2.0), affine)
    return mapping.compose(field, mapping.affine_transform(some_matrix(rng)))


def points_inside(rng: np.random.Generator, affine: np.ndarray, size: tuple, count: int = 200) -> np.ndarray:
    """LPS mm, at least 4 voxels from the faces."""
    voxels = rng.uniform(4, np.array(size) - 5, (count, 3))
    return nib.affines.apply_affine(affine, voxels) * FLIP


# ---- formula and order ----------------------------------------------------------------------------------------------


def test_composite_maps_points_by_formula(tmp_path: Path, rng: np.random.Generator) -> None:
    """T(x) = A (x + u(x)) in RAS mm, also after writing to and reading from .h5."""
    disp, matrix = rng.normal(size=(3, 8, 9, 10)), some_matrix(rng)
    whole = mapping.compose(mapping.displacement_transform(disp, OBLIQUE), mapping.affine_transform(matrix))
    write_transform(whole, tmp_path / "t.h5")
    for transform in (whole, read_transform(tmp_path / "t.h5")):
        for voxel in ((2, 3, 4), (7, 0, 9)):
            point = OBLIQUE[:3, :3] @ voxel + OBLIQUE[:3, 3]
            moved = point + OBLIQUE[:3, :3] @ disp[(slice(None), *voxel)]
            expected = matrix[:3, :3] @ moved + matrix[:3, 3]
            np.testing.assert_allclose(mapping.map_points(transform, [point * FLIP])[0] * FLIP, expected, atol=1e-6)


def test_compose_takes_points_in_the_order_given(rng: np.random.Generator) -> None:
    """Also of composites; and the parts come back in that order."""
    maps = [registration(rng), mapping.affine_transform(some_matrix(rng)), registration(rng)]
    points = points_inside(rng, OBLIQUE, SIZE, 20)
    expected = points
    for each in maps:
        expected = mapping.map_points(each, expected)
    whole = mapping.compose(*maps)
    np.testing.assert_allclose(mapping.map_points(whole, points), expected, atol=1e-9)
    other = mapping.map_points(mapping.compose(*maps[::-1]), points)
    assert np.abs(other - expected).max() > 0.1, "the maps commute, so that no order was tested"
    kinds = [type(part) for part in mapping.compose(whole, maps[1]).parts]
    field, affine = mapping.Field, mapping.Affine
    assert kinds == [field, affine, affine, field, affine, affine]


def test_matrix_and_field_come_back(rng: np.random.Generator) -> None:
    matrix, disp = some_matrix(rng), smooth_disp(SIZE, 3)
    np.testing.assert_allclose(mapping.matrix_of(mapping.affine_transform(matrix)), matrix, atol=1e-9)
    found, affine = mapping.field_of(mapping.displacement_transform(disp, OBLIQUE))
    np.testing.assert_allclose(found, disp, atol=1e-9)
    np.testing.assert_allclose(affine, OBLIQUE, atol=1e-9)


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".h5", ".tfm", ".txt", ".mat"])
def test_affine_files_come_back(tmp_path: Path, rng: np.random.Generator, ending: str) -> None:
    matrix = some_matrix(rng)
    write_transform(mapping.affine_transform(matrix), tmp_path / f"a{ending}")
    assert [path.name for path in tmp_path.iterdir()] == [f"a{ending}"]
    found = read_transform(tmp_path / f"a{ending}")
    np.testing.assert_allclose(mapping.matrix_of(found), matrix, atol=1e-6)


@pytest.mark.parametrize("name", ["Euler3DTransform", "VersorRigid3DTransform", "ScaleTransform"])
def test_any_linear_transform_of_itk_is_read(tmp_path: Path, name: str) -> None:
    """A rigid transform saved by Slicer or SimpleITK is not an AffineTransform; float files are read as well."""
    kind = getattr(itk, name)
    given = kind[itk.D, 3].New() if name == "ScaleTransform" else kind[itk.D].New()
    parameters = [1.1, 0.9, 1.2] if name == "ScaleTransform" else [0.1, -0.2, 0.15, 3, -4, 5]
    given.SetParameters(itk.OptimizerParameters[itk.D](parameters))
    itk.transformwrite([given], str(tmp_path / "t.tfm"))
    found = read_transform(tmp_path / "t.tfm")
    point = [10.0, 20.0, -5.0]
    expected = np.array(given.TransformPoint(point))
    assert np.abs(expected - point).max() > 0.5
    np.testing.assert_allclose(mapping.map_points(found, [point])[0], expected, atol=1e-5)
    there = mapping.compose(found, mapping.invert(found))
    np.testing.assert_allclose(mapping.map_points(there, [point])[0], point, atol=1e-6)


def test_displacement_file_is_a_vector_image_in_lps(tmp_path: Path) -> None:
    shift = np.eye(4)
    shift[:3, 3] = [1.0, 2.0, 3.0]
    write_transform(mapping.affine_transform(shift), tmp_path / "d.nii.gz", ((4, 5, 6), OBLIQUE))
    file = nib.load(tmp_path / "d.nii.gz")
    assert file.shape == (4, 5, 6, 1, 3) and file.header.get_intent()[0] == "vector"
    np.testing.assert_allclose(file.get_fdata()[1, 2, 3, 0], [-1, -2, 3], atol=1e-6)


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_displacement_files_come_back(tmp_path: Path, rng: np.random.Generator, ending: str) -> None:
    whole = registration(rng)
    write_transform(whole, tmp_path / f"d{ending}", (SIZE, OBLIQUE))
    found = read_transform(tmp_path / f"d{ending}")
    voxels = rng.integers(0, SIZE, (50, 3)).astype(float)  # at voxels, where the file is exact
    points = nib.affines.apply_affine(OBLIQUE, voxels) * FLIP
    error = np.abs(mapping.map_points(found, points) - mapping.map_points(whole, points))
    assert error.max() < 1e-3 * np.abs(mapping.map_points(whole, points) - points).max()


def test_refused_files(tmp_path: Path, rng: np.random.Generator) -> None:
    scan = rng.random((6, 7, 8)).astype(np.float32)
    io.write_scan(scan, np.eye(4), tmp_path / "scan.nii.gz")
    (tmp_path / "text.h5").write_text("hello")
    (tmp_path / "text.nii.gz").write_text("hello")
    flat = itk.AffineTransform[itk.D, 2].New()
    itk.transformwrite([flat], str(tmp_path / "flat.tfm"))
    cases = {
        "none.h5": "no such file",
        "text.h5": "not a transform that ITK can read",
        "text.nii.gz": "not an image that can be read",
        "scan.nii.gz": "3-D with 3 values a voxel, not 3-D with 1",
        "flat.tfm": "must be a 3-D transform|not a transform that ITK can read",
    }
    for name, words in cases.items():
        with pytest.raises(InputError, match=words) as caught:
            read_transform(tmp_path / name)
        assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)
    before = sorted(tmp_path.iterdir())
    for name, words in (("x.tfm", "affine transforms only"), ("x.nii.gz", "needs a grid"), ("x.pkl", "written as one")):
        with pytest.raises(InputError, match=words):
            write_transform(registration(rng), tmp_path / name)
    with pytest.raises(InputError, match="cannot be written"):
        write_transform(registration(rng), tmp_path / "no" / "x.h5")
    assert sorted(tmp_path.iterdir()) == before, "nothing half-written"


# ---- inverse --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("largest", [1.0, 2.0, 3.0])
def test_inverse_returns_points_to_half_a_voxel(rng: np.random.Generator, largest: float) -> None:
    """The half voxel is that of the finest axis; at 3 voxels some of the volume shrinks to a quarter."""
    disp = smooth_disp(SIZE, largest, sigma=6.0)
    determinant = jacobian_determinant(torch.from_numpy(disp)[None])
    assert determinant.min() > 0, "the field folds, so that it has no inverse"
    assert largest < 3 or determinant.min() < 0.25
    there = mapping.compose(
        mapping.displacement_transform(disp, OBLIQUE), mapping.affine_transform(some_matrix(rng, shift=200))
    )
    back = mapping.invert(there)
    points = points_inside(rng, OBLIQUE, SIZE)
    found = mapping.map_points(back, mapping.map_points(there, points))
    error = np.linalg.norm(found - points, axis=1)
    assert error.max() < 0.5 * 1.5 and error.mean() < 0.1
    reported = mapping.inverse_error_mm(there, back, SIZE, OBLIQUE)
    voxels = rng.integers(0, SIZE, (50, 3))
    points = nib.affines.apply_affine(OBLIQUE, voxels) * FLIP
    error = np.linalg.norm(mapping.map_points(back, mapping.map_points(there, points)) - points, axis=1)
    np.testing.assert_allclose(reported[tuple(voxels.T)], error, atol=1e-3)


def test_inverse_of_a_whole_map_with_a_large_motion(tmp_path: Path, rng: np.random.Generator) -> None:
    """A displacement file that holds a rotation by 100 degrees and 300 mm: no small displacement, but invertible."""
    turn = nib.affines.from_matvec(nib.eulerangles.euler2mat(0, 0, np.radians(100)), [300.0, -100, 50])
    field = mapping.displacement_transform(smooth_disp(SIZE, 2.0), OBLIQUE)
    whole = mapping.compose(field, mapping.affine_transform(turn))
    write_transform(whole, tmp_path / "d.nii.gz", (SIZE, OBLIQUE))
    there = read_transform(tmp_path / "d.nii.gz")
    points = points_inside(rng, OBLIQUE, SIZE)
    found = mapping.map_points(mapping.invert(there), mapping.map_points(there, points))
    assert np.linalg.norm(found - points, axis=1).max() < 0.75


def test_points_are_inverted_exactly(rng: np.random.Generator) -> None:
    there = registration(rng)
    points = points_inside(rng, OBLIQUE, SIZE)
    found = mapping.invert_at(there, mapping.map_points(there, points))
    assert np.linalg.norm(found - points, axis=1).max() < 0.01


def test_a_point_without_a_source_is_nan() -> None:
    """x + u(x) = 5 everywhere within the grid: nothing is mapped to 8."""
    disp = np.zeros((3, 16, 16, 16))
    disp[0] = 5 - np.arange(16)[:, None, None]
    there = mapping.displacement_transform(disp, np.diag([-1.0, -1, 1, 1]))  # LPS = voxels
    found = mapping.invert_at(there, np.array([[8.0, 7.0, 7.0], [5.0, 7.0, 7.0]]))
    assert np.isnan(found[0]).all()
    np.testing.assert_allclose(mapping.map_points(there, found[1:]), [[5, 7, 7]], atol=1e-3)


def test_what_cannot_be_inverted_is_refused() -> None:
    flat = mapping.affine_transform(np.diag([1.0, 1, 0, 1]))
    with pytest.raises(InputError, match="has no inverse"):
        mapping.invert(flat)
    spline = itk.BSplineTransform[itk.D, 3, 3].New()
    with pytest.raises(InputError, match="BSplineTransform: only affine maps and displacement fields"):
        mapping.invert(itk_maps.from_itk(spline))


def test_a_transform_of_another_kind_is_applied_as_by_itk(tmp_path: Path, rng: np.random.Generator) -> None:
    """A B-spline between two maps of ours: points, scans, and a file of all three that ITK reads."""
    spline = itk.BSplineTransform[itk.D, 3, 3].New()
    spline.SetTransformDomainOrigin([-100.0] * 3)
    spline.SetTransformDomainPhysicalDimensions([200.0] * 3)
    spline.SetTransformDomainMeshSize([6] * 3)
    spline.SetParameters(itk.OptimizerParameters[itk.D](rng.normal(0, 2, spline.GetNumberOfParameters()).tolist()))
    between = mapping.affine_transform(some_matrix(rng)), itk_maps.from_itk(spline), registration(rng)
    whole = mapping.compose(*between)
    write_transform(whole, tmp_path / "t.h5")
    (theirs,) = itk.transformread(str(tmp_path / "t.h5"))
    points = points_inside(rng, OBLIQUE, SIZE, 20)
    expected = np.array([theirs.TransformPoint(point) for point in points.tolist()])
    for transform in (whole, read_transform(tmp_path / "t.h5")):
        np.testing.assert_allclose(mapping.map_points(transform, points), expected, atol=1e-4)
        assert [type(part) for part in transform.parts][1] is mapping.Foreign
    scan = gaussian_filter(rng.random(SIZE), 1).astype(np.float32)
    by_itk = itk.resample_image_filter(
        image := io.to_itk(scan, OBLIQUE), transform=theirs, use_reference_image=True, reference_image=image
    )
    ours = mapping.resample(scan, OBLIQUE, SIZE, OBLIQUE, whole)
    assert (ours > 0).mean() > 0.2
    np.testing.assert_allclose(ours, itk.array_from_image(by_itk).T, atol=1e-4)


def test_labels_keep_their_codes() -> None:
    """Nearest neighbours keep the type: codes above 2^24 have no float32 of their own."""
    codes = np.arange(2**30, 2**30 + 60).reshape(3, 4, 5)
    half = nib.affines.from_matvec(np.diag([0.5, 0.5, 0.5]))
    found = mapping.resample(codes, np.eye(4), (5, 7, 9), half, nearest=True)
    assert found.dtype == codes.dtype
    np.testing.assert_array_equal(found[::2, ::2, ::2], codes)
    assert set(np.unique(found)) == set(codes.ravel())


# ---- resampling -----------------------------------------------------------------------------------------------------


def test_resample_identity_nearest_and_outside(rng: np.random.Generator) -> None:
    scan = rng.random((11, 12, 13)).astype(np.float32)
    np.testing.assert_allclose(mapping.resample(scan, OBLIQUE, scan.shape, OBLIQUE), scan, atol=1e-5)
    label = (scan * 5).round()
    found = np.unique(mapping.resample(label, OBLIQUE, (30, 20, 9), np.eye(4), nearest=True))
    assert set(found) <= set(np.unique(label)) | {0.0}
    far = np.eye(4)
    far[:3, 3] = 1e4
    assert not mapping.resample(scan, OBLIQUE, (3, 3, 3), far).any()


def test_channels_at_once_are_as_one_by_one(rng: np.random.Generator) -> None:
    both, onto = rng.random((2, *SIZE)), OBLIQUE @ np.diag([2.3, 2.0, 1.9, 1.0])
    for transform in (registration(rng), mapping.affine_transform(some_matrix(rng)), None):
        found = mapping.resample(both, OBLIQUE, (13, 12, 15), onto, transform, outside=-1.0)
        alone = [mapping.resample(channel, OBLIQUE, (13, 12, 15), onto, transform, outside=-1.0) for channel in both]
        np.testing.assert_array_equal(found, alone)
        assert found.min() == -1 and found.max() > 0


@pytest.mark.parametrize("turn", ORIENTATIONS, ids=lambda turn: "".join(nib.aff2axcodes(turn)))
def test_all_48_orientations_of_either_scan(turn: np.ndarray, tmp_path: Path, rng: np.random.Generator) -> None:
    """The same scans stored in another axis order give the same warped values, from files, by ITK alone."""
    moving, fixed = rng.random((9, 11, 13)).astype(np.float32), rng.random((10, 8, 12)).astype(np.float32)
    space = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, 0.2, -0.1) @ np.diag([1.2, 1.0, 0.9]), [3, -4, 5])
    whole = mapping.compose(
        mapping.displacement_transform(smooth_disp((10, 8, 12), 1.0), space),
        mapping.affine_transform(some_matrix(rng, shift=0.5)),
    )
    write_transform(whole, tmp_path / "t.h5")
    plain = mapping.resample(moving, space, fixed.shape, space, whole)

    def stored(scan: np.ndarray) -> nib.Nifti1Image:
        wanted = nib.orientations.io_orientation(turn)
        return nib.Nifti1Image(scan, space).as_reoriented(wanted)

    for name, scan in (("moving", moving), ("fixed", fixed)):
        nib.save(stored(scan), tmp_path / f"{name}.nii.gz")
    assert io.read_scan(tmp_path / "moving.nii.gz")[0].shape[1:] == stored(moving).shape
    images = [itk.imread(str(tmp_path / f"{name}.nii.gz"), itk.F) for name in ("moving", "fixed")]
    (transform,) = itk.transformread(str(tmp_path / "t.h5"))
    by_itk = itk.resample_image_filter(
        images[0], transform=transform, use_reference_image=True, reference_image=images[1]
    )
    array, affine = io.read_scan(tmp_path / "moving.nii.gz")
    ours = mapping.resample(array[0], affine, *_grid(tmp_path / "fixed.nii.gz"), whole)
    np.testing.assert_allclose(ours, itk.array_from_image(by_itk).T, atol=1e-5)
    np.testing.assert_allclose(ours, np.asarray(stored(plain).dataobj), atol=1e-4)


def _grid(path: Path) -> mapping.Grid:
    array, affine = io.read_scan(path)
    return array.shape[1:], affine


# ---- ANTs -----------------------------------------------------------------------------------------------------------


def test_ants_applies_our_files_to_the_same_result(tmp_path: Path, rng: np.random.Generator) -> None:
    """Displacement image and composite, on an oblique, anisotropic, different-sized pair: image and points."""
    ants = pytest.importorskip("ants", reason="antspyx of the extra [test] is not installed")
    moving = gaussian_filter(rng.random((30, 24, 28)), 1.5).astype(np.float32)
    space = nib.affines.from_matvec(
        nib.eulerangles.euler2mat(-0.2, 0.1, 0.3) @ np.diag([1.3, -1.6, 2.1]), OBLIQUE[:3, 3] + [-8, 3, -5]
    )
    centre = nib.affines.apply_affine(OBLIQUE, (np.array(SIZE) - 1) / 2)
    space[:3, 3] += centre - nib.affines.apply_affine(space, (np.array(moving.shape) - 1) / 2)
    whole = registration(rng)
    io.write_scan(moving, space, tmp_path / "moving.nii.gz")
    io.write_scan(np.zeros(SIZE, np.float32), OBLIQUE, tmp_path / "fixed.nii.gz")
    write_transform(whole, tmp_path / "t.h5")
    write_transform(whole, tmp_path / "d.nii.gz", (SIZE, OBLIQUE))
    ours = mapping.resample(moving, space, SIZE, OBLIQUE, whole)
    assert (ours > 0).mean() > 0.3
    images = [ants.image_read(str(tmp_path / f"{name}.nii.gz")) for name in ("fixed", "moving")]
    points = points_inside(rng, OBLIQUE, SIZE, 30)
    expected = mapping.map_points(whole, points)
    for name in ("t.h5", "d.nii.gz"):
        theirs = ants.apply_transforms(*images, [str(tmp_path / name)], interpolator="linear").numpy()
        assert np.abs(theirs - ours)[2:-2, 2:-2, 2:-2].max() < 1e-3 * ours.max(), name
        table = _frame(points)
        found = ants.apply_transforms_to_points(3, table, [str(tmp_path / name)])[["x", "y", "z"]].to_numpy()
        assert np.abs(found - expected).max() < (0.01 if name == "t.h5" else 0.15), name


def _frame(points: np.ndarray):
    import pandas

    return pandas.DataFrame(points, columns=["x", "y", "z"])


def test_we_read_what_ants_writes(tmp_path: Path, rng: np.random.Generator) -> None:
    """An affine .mat of ANTs, and a chain of two: its point command takes them in the order given, as `compose`."""
    ants = pytest.importorskip("ants", reason="antspyx of the extra [test] is not installed")
    own = ants.new_ants_transform(dimension=3, transform_type="AffineTransform")
    own.set_parameters([1.1, 0.1, 0, -0.05, 0.9, 0.02, 0, 0.1, 1.0, 5, -6, 7])
    own.set_fixed_parameters([10.0, 20, 30])
    ants.write_transform(own, str(tmp_path / "own.mat"))
    write_transform(registration(rng), tmp_path / "t.h5")
    points = points_inside(rng, OBLIQUE, SIZE, 10)
    names = [str(tmp_path / "own.mat"), str(tmp_path / "t.h5")]
    chain = ants.apply_transforms_to_points(3, _frame(points), names, whichtoinvert=[False, False])
    theirs = chain[["x", "y", "z"]].to_numpy()
    maps = [read_transform(name) for name in names]
    swapped = mapping.map_points(mapping.compose(*maps[::-1]), points)
    assert np.abs(swapped - theirs).max() > 0.05
    np.testing.assert_allclose(mapping.map_points(mapping.compose(*maps), points), theirs, atol=1e-3)


def test_reach_is_the_share_of_a_grid_in_a_field() -> None:
    """A field of 10 voxels of 2 mm, met after a shift: of a grid that lies half in it, and beside it."""
    field = mapping.displacement_transform(np.zeros((3, 10, 10, 10), np.float32), np.diag([2.0, 2, 2, 1]))
    shift = nib.affines.from_matvec(np.eye(3), [100.0, 0, 0])
    whole = mapping.compose(mapping.affine_transform(np.linalg.inv(shift)), field)
    assert mapping.reach(mapping.affine_transform(shift), (4, 4, 4), np.eye(4)) == 1  # no field at all
    assert mapping.reach(whole, (10, 10, 10), shift @ np.diag([2.0, 2, 2, 1])) == 1
    assert mapping.reach(whole, (10, 10, 10), shift @ np.diag([4.0, 2, 2, 1])) == 0.5
    assert mapping.reach(whole, (10, 10, 10), np.diag([2.0, 2, 2, 1])) == 0
