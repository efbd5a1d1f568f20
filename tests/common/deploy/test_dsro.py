"""The DICOM registration object: read back with pydicom alone, it moves points as our transform does."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_series import write_series
from pydicom.uid import generate_uid
from registration_object import by_the_standard, errors_of_dciodvfy, needs_dciodvfy

from common import InputError, phantom
from common.deploy.dsro import read_dsro, registration_of, write_dsro
from common.deploy.series import find_series
from common.space import mapping

SIZE = (20, 26, 18)
TURNED = nib.eulerangles.euler2mat(0.3, -0.2, 0.15)
GRIDS = {  # directions of the grid's axes, RAS
    "right-handed": TURNED @ np.diag([3.0, 2.5, 4.0]),
    "flipped": TURNED @ np.diag([-3.0, 2.5, 4.0]),
}


def deformation(affine: np.ndarray) -> mapping.Transform:
    i, j, k = np.meshgrid(*map(np.arange, SIZE), indexing="ij")
    disp = np.stack([2 * np.sin(j / 6), 1.5 * np.cos(i / 7), np.sin((i + k) / 5)])
    return mapping.displacement_transform(disp, affine)


def affine_map() -> mapping.Transform:
    matrix = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.05, 0.12, -0.04) * 1.07, [6, -4, 30])
    return mapping.affine_transform(matrix)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A fixed and a moving series of one patient, in two studies."""
    folder, patient = tmp_path_factory.mktemp("dicom"), "P1"
    scan = phantom.sample((12, 14, 10), np.diag([12.0, 12, 12, 1]) - np.array([[0, 0, 0, 66]] * 3 + [[0] * 4]))[0]
    for name in ("fixed", "moving"):
        write_series(scan, np.diag([-12.0, -12, 12, 1]), folder / name, patient=patient, description=name)
    return folder / "fixed", folder / "moving"


@pytest.mark.parametrize("name", GRIDS)
def test_points(name: str, folders: tuple[Path, Path], tmp_path: Path) -> None:
    """To a thousandth of a millimetre, with nothing but the file: also beyond the grid, where only the affine acts."""
    affine = nib.affines.from_matvec(GRIDS[name], [-30, -40, 20])
    whole = mapping.compose(deformation(affine), affine_map())
    fixed, moving = (find_series(folder).headers for folder in folders)
    write_dsro(registration_of(whole, SIZE, affine), fixed, moving, tmp_path / "r.dcm")
    rng = np.random.default_rng(0)
    voxels = np.r_[rng.uniform(0.2, np.array(SIZE) - 1.2, (200, 3)), rng.uniform(-30, -5, (20, 3))]
    points = nib.affines.apply_affine(np.diag([-1, -1, 1, 1]) @ affine, voxels)
    expected = mapping.map_points(whole, points)
    assert np.abs(expected - points).max() > 10
    np.testing.assert_allclose(read_dsro(tmp_path / "r.dcm").map_points(points), expected, atol=1e-3)
    np.testing.assert_allclose(by_the_standard(tmp_path / "r.dcm", points[:200]), expected[:200], atol=1e-3)


def test_field_is_kept_as_it_is(folders: tuple[Path, Path]) -> None:
    """Field then affine needs no resampling; the affine first does, and is then as good as its grid."""
    affine = nib.affines.from_matvec(GRIDS["right-handed"], [-30, -40, 20])
    exact = registration_of(mapping.compose(deformation(affine), affine_map()), (4, 4, 4), np.eye(4))
    assert exact.offset.shape == (3, *SIZE) and not np.array_equal(exact.post, np.eye(4))
    shift = mapping.affine_transform(nib.affines.from_matvec(np.eye(3), [3, -2, 1]))
    turned = mapping.compose(shift, deformation(affine))
    sampled = registration_of(turned, (40, 52, 36), affine @ np.diag([0.5, 0.5, 0.5, 1]))
    assert sampled.offset.shape == (3, 40, 52, 36) and np.array_equal(sampled.post, np.eye(4))
    middle = nib.affines.apply_affine(np.diag([-1, -1, 1, 1]) @ affine, np.full((1, 3), 9.13))
    np.testing.assert_allclose(sampled.map_points(middle), mapping.map_points(turned, middle), atol=0.1)


def test_refers_to_both_series(folders: tuple[Path, Path], tmp_path: Path) -> None:
    fixed, moving = (find_series(folder).headers for folder in folders)
    write_dsro(registration_of(affine_map(), SIZE, np.eye(4)), fixed, moving, tmp_path / "r.dcm")
    data = pydicom.dcmread(tmp_path / "r.dcm")
    assert (data.Modality, data.PatientID, data.StudyInstanceUID) == ("REG", "P1", fixed[0].StudyInstanceUID)
    assert data.FrameOfReferenceUID == fixed[0].FrameOfReferenceUID
    where, source = data.DeformableRegistrationSequence
    assert where.SourceFrameOfReferenceUID == data.FrameOfReferenceUID
    assert source.SourceFrameOfReferenceUID == moving[0].FrameOfReferenceUID != data.FrameOfReferenceUID
    told = [item.ReferencedSOPInstanceUID for item in source.ReferencedImageSequence]
    assert told == [header.SOPInstanceUID for header in moving]
    assert data.StudiesContainingOtherReferencedInstancesSequence[0].StudyInstanceUID == moving[0].StudyInstanceUID


@needs_dciodvfy
def test_dciodvfy_accepts(folders: tuple[Path, Path], tmp_path: Path) -> None:
    affine = nib.affines.from_matvec(GRIDS["flipped"], [-30, -40, 20])
    whole = mapping.compose(deformation(affine), affine_map())
    fixed, moving = (find_series(folder).headers for folder in folders)
    write_dsro(registration_of(whole, SIZE, affine), fixed, moving, tmp_path / "r.dcm")
    assert errors_of_dciodvfy(tmp_path / "r.dcm") == []


def test_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    fixed, moving = (find_series(folder).headers for folder in folders)
    registration = registration_of(affine_map(), SIZE, np.eye(4))
    nowhere = pydicom.Dataset()
    nowhere.StudyInstanceUID = generate_uid()
    with pytest.raises(InputError, match="r.dcm: the moving series has no Frame of Reference UID"):
        write_dsro(registration, fixed, [nowhere], tmp_path / "r.dcm")
    with pytest.raises(InputError, match="r.dcm: cannot be written"):
        write_dsro(registration, fixed, moving, tmp_path / "none" / "r.dcm")
    assert list(tmp_path.iterdir()) == []
    slice_file = sorted(folders[0].iterdir())[0]
    with pytest.raises(InputError, match="not a DICOM Deformable Spatial Registration with a grid"):
        read_dsro(slice_file)
