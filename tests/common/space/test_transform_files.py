"""Files of transforms without ITK: that ITK and ANTs read them, and what is not ours is left to ITK."""

import subprocess
import sys
from pathlib import Path

import h5py
import itk
import nibabel as nib
import numpy as np
import pytest

from common.space import geometry, io, itk_classes, itk_maps, mapping, transform_files

AFFINE = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, -0.2, 0.1) @ np.diag([-1.5, 2.0, 2.5]), [10, -20, 30])
WITHOUT = """
import sys
import numpy as np
from common.space import geometry, io, mapping
from common.space.transform_files import read_transform, write_transform
affine = np.diag([2.0, 2.0, 2.0, 1.0])
image = np.random.default_rng(0).random((1, 12, 10, 8), dtype=np.float32)
geometry.to_working_grid(image, affine, (6, 5, 4), np.diag([4.0, 4.0, 4.0, 1.0]))
field = mapping.displacement_transform(np.ones((3, 12, 10, 8)), affine)
whole = mapping.compose(field, mapping.affine_transform(np.eye(4)))
write_transform(whole, "t.h5")
io.write_scan(mapping.resample(image[0], affine, (12, 10, 8), affine, read_transform("t.h5")), affine, "w.nii.gz")
write_transform(whole, "d.nii.gz", ((12, 10, 8), affine))
print([name for name in ("itk", "monai", "matplotlib") if name in sys.modules])
"""


def some_map() -> mapping.Transform:
    disp = np.random.default_rng(0).normal(size=(3, 7, 8, 9)).astype(np.float32)
    matrix = nib.affines.from_matvec(np.eye(3) + 0.05 * np.arange(9).reshape(3, 3), [3, -4, 5])
    return mapping.compose(mapping.displacement_transform(disp, AFFINE), mapping.affine_transform(matrix))


def test_neither_itk_nor_monai_is_loaded(tmp_path: Path) -> None:
    """Every command would pay seconds for them: from arrays to the files of a registration."""
    root = str(Path(__file__).resolve().parents[3])
    line = [sys.executable, "-c", f"import sys; sys.path.insert(0, {root!r})\n{WITHOUT}"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_our_h5_and_that_of_itk_say_the_same(tmp_path: Path) -> None:
    """Ours read by ITK, ITK's read by us; the displacement in 32 bits, everything else in 64."""
    whole = some_map()
    transform_files.write_transform(whole, tmp_path / "ours.h5")
    itk.transformwrite([itk_maps.to_itk_transform(whole)], str(tmp_path / "theirs.h5"))
    (by_itk,) = itk.transformread(str(tmp_path / "ours.h5"))
    middle = nib.affines.apply_affine(AFFINE, [3, 4, 4]) * [-1, -1, 1]
    points = middle + np.random.default_rng(1).uniform(-20, 20, (50, 3))
    expected = mapping.map_points(whole, points)
    assert np.abs(expected - points).max() > 3
    np.testing.assert_allclose([by_itk.TransformPoint(p) for p in points.tolist()], expected, atol=1e-5)
    for name in ("ours.h5", "theirs.h5"):
        found = transform_files.read_transform(tmp_path / name)
        np.testing.assert_allclose(mapping.map_points(found, points), expected, atol=1e-5)
    with h5py.File(tmp_path / "ours.h5") as file, h5py.File(tmp_path / "theirs.h5") as other:
        assert sorted(file["TransformGroup"]) == sorted(other["TransformGroup"])
        for number, group in file["TransformGroup"].items():
            assert group["TransformType"][0] == other["TransformGroup"][number]["TransformType"][0]
        assert file["TransformGroup/2/TransformParameters"].dtype == np.float32


@pytest.mark.parametrize("count", [1, 2])
def test_one_part_is_no_composite(tmp_path: Path, count: int) -> None:
    whole = mapping.compose(*mapping.parts(some_map())[:count])
    transform_files.write_transform(whole, tmp_path / "t.h5")
    (found,) = itk_classes.read_transforms(str(tmp_path / "t.h5"))
    assert found.GetNameOfClass() == ("CompositeTransform" if count == 2 else "DisplacementFieldTransform")


def test_other_kinds_in_h5_are_read_by_itk(tmp_path: Path) -> None:
    turn = itk.Euler3DTransform[itk.D].New()
    turn.SetCenter([5.0, 6.0, 7.0])
    turn.SetRotation(0.1, -0.2, 0.3)
    itk.transformwrite([turn], str(tmp_path / "t.h5"))
    found = transform_files.read_transform(tmp_path / "t.h5")
    assert found.linear
    np.testing.assert_allclose(mapping.map_points(found, [[1, 2, 3]])[0], turn.TransformPoint([1.0, 2.0, 3.0]))


def test_centre_of_an_affine_file_counts(tmp_path: Path) -> None:
    affine = itk.AffineTransform[itk.D, 3].New()
    affine.SetCenter([5.0, 6.0, 7.0])
    affine.Rotate3D([0, 0, 1], 0.3)
    itk.transformwrite([affine], str(tmp_path / "t.h5"))
    found = transform_files.read_transform(tmp_path / "t.h5")
    np.testing.assert_allclose(mapping.map_points(found, [[1, 2, 3]])[0], affine.TransformPoint([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("channels", [1, 3])
def test_nifti_is_what_itk_would_write(tmp_path: Path, channels: int) -> None:
    scan = np.random.default_rng(0).random((channels, 5, 6, 7), dtype=np.float32)
    io.write_scan(scan, AFFINE, tmp_path / "ours.nii.gz")
    if channels == 1:
        image = io.to_itk(scan[0], AFFINE)
    else:
        image = itk.image_from_array(np.ascontiguousarray(scan.transpose(3, 2, 1, 0)), is_vector=True)
        io.set_geometry(image, AFFINE)
    itk.imwrite(image, str(tmp_path / "theirs.nii.gz"))
    ours, theirs = (nib.load(tmp_path / f"{name}.nii.gz") for name in ("ours", "theirs"))
    np.testing.assert_array_equal(ours.dataobj, theirs.dataobj)
    for name in ("dim", "intent_code", "datatype", "qform_code", "sform_code", "xyzt_units"):
        np.testing.assert_array_equal(ours.header[name], theirs.header[name], err_msg=name)
    for name in ("get_sform", "get_qform"):
        np.testing.assert_allclose(getattr(ours.header, name)(), getattr(theirs.header, name)(), atol=1e-4)


def test_smoothing_is_that_of_itk() -> None:
    scan = np.random.default_rng(0).random((14, 12, 10), dtype=np.float32)
    image = itk.image_from_array(np.ascontiguousarray(scan.T))
    for variance in ([0.48, 0.48, 0.48], [1.28, 0.0, 2.4]):
        by_itk = itk.discrete_gaussian_image_filter(
            image, variance=variance, maximum_kernel_width=64, use_image_spacing=False
        )
        ours = geometry.smoothed(scan, np.array(variance))
        np.testing.assert_allclose(ours, itk.array_from_image(by_itk).T, atol=1e-5)
