"""Which series a folder holds, and the sentences where it cannot be registered. Needs pydicom, not the Deploy SDK."""

import copy
from pathlib import Path

import nibabel as nib
import numpy as np
import pydicom
import pytest
from dicom_series import write_series
from pydicom.uid import generate_uid

from common import InputError
from common.deploy.dsro import registration_of, write_dsro
from common.deploy.series import find_series, refuse_other
from common.space import io, mapping

SIZE = (7, 6, 5)


def write(folder: Path, *, description: str = "s", patient: str = "P1") -> str:
    """An oblique series whose pixels are not square."""
    turned = nib.eulerangles.euler2mat(0.3, -0.2, 0.15)
    affine = nib.affines.from_matvec(turned @ np.diag([-3.0, -2.0, 4.5]), [30, 40, -20])
    scan = np.arange(np.prod(SIZE)).reshape(SIZE)
    return write_series(scan, affine, folder, patient=patient, description=description)


def shift(file: Path, mm: float) -> None:
    """Move a slice along the normal."""
    data = pydicom.dcmread(file)
    row, column = np.reshape(np.array(data.ImageOrientationPatient, float), (2, 3))
    place = np.array(data.ImagePositionPatient, float) + mm * np.cross(row, column)
    data.ImagePositionPatient = [f"{value:.8f}" for value in place]
    data.save_as(file)


def without(folder: Path, keyword: str) -> None:
    for file in folder.iterdir():
        data = pydicom.dcmread(file)
        del data[keyword]
        data.save_as(file)


def test_affine_of_headers(tmp_path: Path) -> None:
    """As ITK has it, whatever the names of the files: pixels that are not square, oblique slices."""
    uid = write(tmp_path / "s")
    for k, file in enumerate(sorted((tmp_path / "s").iterdir())):
        file.rename(tmp_path / "s" / f"{(3 * k) % SIZE[2]}.dcm")
    (tmp_path / "s" / "notes.txt").write_text("no DICOM")
    found = find_series(tmp_path / "s")
    assert found.uid == uid and len(found.headers) == SIZE[2]
    affine, expected = found.affine_ras, io.read_scan(tmp_path / "s")[1]
    np.testing.assert_allclose(affine, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), [3, 2, 4.5], atol=1e-6)


def test_one_of_several_by_its_uid(tmp_path: Path) -> None:
    uids = [write(tmp_path / name, description=name) for name in ("before", "after")]
    assert [find_series(tmp_path, uid).uid for uid in uids] == uids
    with pytest.raises(InputError) as told:
        find_series(tmp_path)
    assert str(told.value).startswith(f"{tmp_path}: holds 2 series, name one of them: ")
    assert f"{uids[0]} (before)" in str(told.value) and f"{uids[1]} (after)" in str(told.value)
    with pytest.raises(InputError, match=f"holds no series 1[.]2[.]3, only {', '.join(sorted(uids))}$"):
        find_series(tmp_path, "1.2.3")


def test_no_series(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none: no such folder$"):
        find_series(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("no DICOM")
    with pytest.raises(InputError, match=f"^{tmp_path}: holds no DICOM series of slices$"):
        find_series(tmp_path)


@pytest.mark.parametrize(
    ("gone", "moved", "distances"),
    [((2,), {}, "4.50 to 9.00"), ((), {4: 1.0}, "4.50 to 5.50"), ((), {3: -4.5}, "0.00 to 9.00")],
    ids=["missing", "uneven", "double"],
)
def test_slices_missing(gone: tuple[int, ...], moved: dict[int, float], distances: str, tmp_path: Path) -> None:
    write(tmp_path)
    for k in gone:
        (tmp_path / f"slice_{k:03d}.dcm").unlink()
    for k, mm in moved.items():
        shift(tmp_path / f"slice_{k:03d}.dcm", mm)
    expected = f"^{tmp_path}: slices are missing, double or unevenly spaced, distances .* from {distances} mm$"
    with pytest.raises(InputError, match=expected):
        find_series(tmp_path)


def test_every_slice_twice(tmp_path: Path) -> None:
    """Two acquisitions at one place under one UID: evenly spaced, with nothing between."""
    write(tmp_path)
    for k in range(1, SIZE[2]):
        (tmp_path / f"slice_{k:03d}.dcm").unlink()
    data = pydicom.dcmread(tmp_path / "slice_000.dcm")
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.save_as(tmp_path / "again.dcm")
    with pytest.raises(InputError, match="slices are missing, double .* from 0.00 to 0.00 mm"):
        find_series(tmp_path)


def test_single_slice(tmp_path: Path) -> None:
    write(tmp_path)
    for k in range(1, SIZE[2]):
        (tmp_path / f"slice_{k:03d}.dcm").unlink()
    with pytest.raises(InputError, match=f"^{tmp_path}: must be a 3-D scan, the series has a single slice$"):
        find_series(tmp_path)


def test_no_frame_of_reference(tmp_path: Path) -> None:
    write(tmp_path)
    without(tmp_path, "FrameOfReferenceUID")
    with pytest.raises(InputError, match=f"^{tmp_path}: the series has no Frame of Reference UID, so a registration"):
        find_series(tmp_path)


def test_other_series_are_not_replaced(tmp_path: Path) -> None:
    """Folders of the same names, other patients: the first result stays."""
    folder = tmp_path / "moving_to_fixed"
    folder.mkdir()
    for name in ("fixed", "moving"):
        write(tmp_path / name)
    found = find_series(tmp_path / "fixed"), find_series(tmp_path / "moving")
    refuse_other(folder, found)  # nothing there yet
    empty = registration_of(mapping.affine_transform(np.eye(4)), (4, 4, 4), np.eye(4))
    write_dsro(empty, found[0].headers, found[1].headers, folder / "registration.dcm")
    refuse_other(folder, found)
    other = copy.deepcopy(found[1])
    for header in other.headers:
        header.SeriesInstanceUID = "1.2.3"
    with pytest.raises(InputError, match="moving_to_fixed: holds the registration of other series"):
        refuse_other(folder, (found[0], other))
