"""Files: geometry round trips, refusals in one sentence, whole folders or none."""

from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest

from common import InputError
from common.space import io

OBLIQUE = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.3, -0.2, 0.1) @ np.diag([-1.5, 2.0, 2.5]), [10.0, -20.0, 30.0]
)


@pytest.fixture
def scan(rng: np.random.Generator) -> np.ndarray:
    return rng.random((11, 12, 13)).astype(np.float32)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_write_and_read_keep_values_and_space(scan: np.ndarray, tmp_path: Path) -> None:
    io.write_scan(scan, OBLIQUE, tmp_path / "scan.nii.gz")
    array, affine = io.read_scan(tmp_path / "scan.nii.gz")
    np.testing.assert_array_equal(array[0], scan)
    np.testing.assert_allclose(affine, OBLIQUE, atol=1e-4)
    np.testing.assert_allclose(nib.load(tmp_path / "scan.nii.gz").affine, OBLIQUE, atol=1e-4)


@pytest.mark.parametrize("ending", [".mha", ".nrrd"])
def test_reads_what_itk_writes(scan: np.ndarray, tmp_path: Path, ending: str) -> None:
    itk.imwrite(io.to_itk(scan, OBLIQUE), str(tmp_path / f"scan{ending}"))
    array, affine = io.read_scan(tmp_path / f"scan{ending}")
    np.testing.assert_allclose(array[0], scan, atol=1e-6)
    np.testing.assert_allclose(affine, OBLIQUE, atol=1e-4)


def test_reads_channels_first(tmp_path: Path, rng: np.random.Generator) -> None:
    two = rng.random((2, 6, 7, 8)).astype(np.float32)
    io.write_scan(two, OBLIQUE, tmp_path / "two.nii.gz")
    np.testing.assert_allclose(io.read_scan(tmp_path / "two.nii.gz")[0], two, atol=1e-6)


def test_contrasts_become_channels_on_the_grid_of_the_first(scan: np.ndarray, tmp_path: Path) -> None:
    """The second has half the resolution; a ramp stays a ramp."""
    ramp = np.indices(scan.shape).sum(0).astype(np.float32)
    coarse = nib.affines.from_matvec(OBLIQUE[:3, :3] * 2, OBLIQUE[:3, 3])
    io.write_scan(scan, OBLIQUE, tmp_path / "a.nii.gz")
    io.write_scan(ramp[::2, ::2, ::2], coarse, tmp_path / "b.nrrd")
    array, affine = io.read_scan(f"{tmp_path / 'a.nii.gz'};{tmp_path / 'b.nrrd'}")
    assert array.shape == (2, *scan.shape)
    np.testing.assert_array_equal(array[0], scan)
    np.testing.assert_allclose(array[1, :9, :9, :9], ramp[:9, :9, :9], atol=1e-3)
    np.testing.assert_allclose(affine, OBLIQUE, atol=1e-4)


def write_dicom(folder: Path, volume: np.ndarray, *, skip: tuple[int, ...] = ()) -> np.ndarray:
    """An axial CT series, 1.5 x 2 x 2.5 mm, file names in no order; returns its affine."""
    pydicom = pytest.importorskip("pydicom", reason="pydicom of the extra [test] is not installed")
    folder.mkdir(exist_ok=True)
    uid = pydicom.uid.generate_uid
    series, study, frame = uid(), uid(), uid()
    for k in (k for k in range(volume.shape[2]) if k not in skip):
        meta = pydicom.dataset.FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = pydicom.uid.CTImageStorage, uid()
        meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
        slice_ = pydicom.dataset.FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        slice_.SOPClassUID, slice_.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        slice_.SeriesInstanceUID, slice_.StudyInstanceUID, slice_.FrameOfReferenceUID = series, study, frame
        slice_.Modality, slice_.SeriesDate, slice_.InstanceNumber = "CT", "20200101", k + 1
        slice_.ImagePositionPatient = [-10.0, -20.0, 5 + 2.5 * k]
        slice_.ImageOrientationPatient, slice_.PixelSpacing = [1, 0, 0, 0, 1, 0], [2.0, 1.5]
        slice_.Columns, slice_.Rows = volume.shape[:2]
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation, slice_.PixelRepresentation = 1, "MONOCHROME2", 1
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit = 16, 16, 15
        slice_.RescaleIntercept, slice_.RescaleSlope = -1024, 1
        slice_.PixelData = (volume[:, :, k].T + 1024).astype(np.int16).tobytes()
        slice_.save_as(folder / f"{series[-4:]}_{k * 7 % 100:03d}.dcm", enforce_file_format=True)
    return nib.affines.from_matvec(np.diag([-1.5, -2, 2.5]), [10.0, 20, 5])


def test_dicom_series(tmp_path: Path, rng: np.random.Generator) -> None:
    """Hounsfield units in the order of the positions; none, two or a torn series are refused."""
    volume = rng.integers(-1000, 1000, (9, 10, 11))
    expected = write_dicom(tmp_path / "one", volume)
    array, affine = io.read_scan(tmp_path / "one")
    np.testing.assert_array_equal(array[0], volume)
    np.testing.assert_allclose(affine, expected, atol=1e-6)
    write_dicom(tmp_path / "one", volume[:, :, :4])
    write_dicom(tmp_path / "torn", volume, skip=(4,))
    (tmp_path / "none").mkdir()
    cases = {
        "one": r"holds 2 DICOM series, name one by --series.*(4|11) images\).*(4|11) images\)",
        "torn": "slices are missing or unevenly spaced, by up to 2.* mm",
        "none": "must hold a DICOM series, and this one holds none",
    }
    for name, words in cases.items():
        with pytest.raises(InputError, match=words) as caught:
            io.read_scan(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ")


def test_label_files_keep_every_value(tmp_path: Path) -> None:
    for top, kind in ((255, np.uint8), (3000, np.int16), (70000, np.int32)):
        label = np.array([0, 1, top]).reshape(3, 1, 1) * np.ones((3, 2, 2))
        io.write_label(label, np.eye(4), tmp_path / "l.nii.gz")
        file = nib.load(tmp_path / "l.nii.gz")
        assert file.get_data_dtype() == kind and np.asarray(file.dataobj).max() == top


def test_refusals_name_the_file_and_the_fault(tmp_path: Path) -> None:
    cases = {
        "missing.nii.gz": (None, "no such file"),
        "text.nii.gz": ("hello", "not an image"),
        "flat.nii.gz": (np.ones((5, 6), np.float32), "must be a 3-D scan"),
        "slice.nii.gz": (np.ones((5, 6, 1), np.float32), "must be a 3-D scan"),
        "film.nii.gz": (np.ones((5, 6, 7, 3), np.float32), "must be a 3-D scan"),
        "hole.nii.gz": (np.full((5, 6, 7), np.nan, np.float32), "NaN"),
    }
    for name, (content, words) in cases.items():
        path = tmp_path / name
        if isinstance(content, str):
            path.write_text(content)
        elif content is not None:
            nib.save(nib.Nifti1Image(content, np.eye(4)), path)
        with pytest.raises(InputError, match=words) as caught:
            io.read_scan(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_a_file_that_is_cut_off_is_refused(tmp_path: Path, rng: np.random.Generator, kind: type) -> None:
    """ITK would read it and fill up with 0."""
    nib.save(nib.Nifti1Image(rng.integers(1, 999, (20, 20, 20)).astype(kind), np.eye(4)), tmp_path / "whole.nii.gz")
    content = (tmp_path / "whole.nii.gz").read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="cut.nii.gz: not an image that can be read, the file is cut off"):
        io.read_scan(tmp_path / "cut.nii.gz")


def test_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "pair"
    io.write_folder(target, {"a.txt": lambda p: p.write_text("old")})

    def fail(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        io.write_folder(target, {"a.txt": lambda p: p.write_text("new"), "b.txt": fail})
    assert [p.name for p in tmp_path.iterdir()] == ["pair"] and (target / "a.txt").read_text() == "old"
    io.write_folder(target, {"c.txt": lambda p: p.write_text("new")})
    assert [p.name for p in target.iterdir()] == ["c.txt"] and [p.name for p in tmp_path.iterdir()] == ["pair"]
