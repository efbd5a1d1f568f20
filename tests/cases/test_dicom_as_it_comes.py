"""DICOM folders as scanners, archives and people leave them: the volume is right, or the sentence names the fault."""

import warnings
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from common import InputError, RegistrationWarning
from common.run.transforms import LoadScansd
from common.space import headers, io

pydicom = pytest.importorskip("pydicom", reason="pydicom of the extra [test] is not installed")
from pydicom.data import get_testdata_file  # noqa: E402
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset  # noqa: E402
from pydicom.encaps import encapsulate, generate_frames  # noqa: E402
from pydicom.uid import (  # noqa: E402
    CTImageStorage,
    DeflatedExplicitVRLittleEndian,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

AXIAL = (1, 0, 0, 0, 1, 0)
SPACING = (2.0, 1.5, 3.0)  # between rows, between columns, between slices


@pytest.fixture
def stored() -> np.ndarray:
    """(columns, rows, slices) as the file has them."""
    return np.random.default_rng(0).integers(0, 1000, (12, 14, 10)).astype(np.int16)


def blank(kind: str = CTImageStorage, syntax: str = ExplicitVRLittleEndian) -> FileDataset:
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = kind, generate_uid()
    meta.TransferSyntaxUID = syntax
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = kind, meta.MediaStorageSOPInstanceUID
    ds.PatientName, ds.PatientID, ds.StudyInstanceUID, ds.FrameOfReferenceUID = "P", "1", "1.2.3", "1.2.3.4"
    ds.SeriesDate, ds.SeriesNumber, ds.SeriesDescription = "20200101", 1, "head"
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation = 15, 1
    return ds


def series(
    into: Path,
    stored: np.ndarray,
    *,
    uid: str = "",
    iop: tuple = AXIAL,
    step: tuple | None = None,
    origin: tuple = (-10.0, -20, 5),
    edit: Callable[[FileDataset, int], None] = lambda ds, k: None,
    name: str = "IM{:04d}.dcm",
    syntax: str = ExplicitVRLittleEndian,
) -> str:
    into.mkdir(parents=True, exist_ok=True)
    uid = uid or generate_uid()
    iop = np.array(iop, float)
    step = np.cross(iop[:3], iop[3:]) * SPACING[2] if step is None else np.array(step, float)
    for k in range(stored.shape[2]):
        ds = blank(syntax=syntax)
        ds.SeriesInstanceUID, ds.Modality, ds.InstanceNumber = uid, "CT", k + 1
        ds.Columns, ds.Rows = stored.shape[:2]
        ds.ImageOrientationPatient = [f"{v:.10g}" for v in iop]
        ds.ImagePositionPatient = [f"{v:.10g}" for v in np.array(origin) + k * step]
        ds.PixelSpacing, ds.SliceThickness = list(SPACING[:2]), "3"
        ds.RescaleSlope, ds.RescaleIntercept = 1, -1024
        ds.PixelData = np.ascontiguousarray(stored[:, :, k].T).tobytes()
        edit(ds, k)
        ds.save_as(into / name.format(k), enforce_file_format=True)
    return uid


AFFINE = nib.affines.from_matvec(np.diag([-1.5, -2, 3.0]), [10, 20, 5])


def check(path: Path, stored: np.ndarray, affine: np.ndarray = AFFINE, **options: str) -> None:
    array, found = io.read_scan(path, **options)
    np.testing.assert_array_equal(array[0], stored.astype(np.float32) - 1024)
    np.testing.assert_allclose(found, affine, atol=1e-6)


def refused(path: Path, words: str, **options: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        io.read_scan(path, **options)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_a_plain_series_says_nothing(stored: np.ndarray, tmp_path: Path) -> None:
    series(tmp_path / "s", stored)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RegistrationWarning)
        check(tmp_path / "s", stored)


def test_a_scout_is_left_out(stored: np.ndarray, tmp_path: Path) -> None:
    uid = series(tmp_path / "s", stored)
    series(tmp_path / "s", stored[:, :, :1], uid=uid, iop=(0, 1, 0, 0, 0, -1), name="A{}.dcm")
    with pytest.warns(RegistrationWarning, match="s: 1 sagittal image.s. left out, of another .* 10 others"):
        check(tmp_path / "s", stored)


def test_three_orientations_are_refused(stored: np.ndarray, tmp_path: Path) -> None:
    uid = series(tmp_path / "s", stored[:, :, :4])
    series(tmp_path / "s", stored[:, :, :3], uid=uid, iop=(0, 1, 0, 0, 0, -1), name="A{}.dcm")
    series(tmp_path / "s", stored[:, :, :3], uid=uid, iop=(1, 0, 0, 0, 0, -1), name="B{}.dcm")
    refused(tmp_path / "s", "several orientations or sizes: 4 axial .*3 sagittal.*3 coronal")


def test_other_files_are_left_out(stored: np.ndarray, tmp_path: Path) -> None:
    series(tmp_path / "s", stored)
    for name, content in {
        "._IM0000.dcm": (tmp_path / "s" / "IM0000.dcm").read_bytes(),
        ".DS_Store": b"x" * 500,
        "Thumbs.db": b"\xd0\xcf\x11\xe0" * 99,
        "preview.jpg": b"\xff\xd8\xff" * 99,
        "notes.txt": b"hello",
        "empty": b"",
        "broken.dcm": b"\0" * 128 + b"DICM" + b"\x99" * 40,
    }.items():
        (tmp_path / "s" / name).write_bytes(content)
    report = blank("1.2.840.10008.5.1.4.1.1.88.11")
    report.SeriesInstanceUID = "9.9"
    report.save_as(tmp_path / "s" / "SR.dcm", enforce_file_format=True)
    directory = blank("1.2.840.10008.1.3.10")
    directory.Rows = directory.Columns = 5
    directory.save_as(tmp_path / "s" / "DICOMDIR", enforce_file_format=True)
    (tmp_path / "s" / "IM0003 (2).dcm").write_bytes((tmp_path / "s" / "IM0003.dcm").read_bytes())
    check(tmp_path / "s", stored)


def test_folders_below_are_looked_into(stored: np.ndarray, tmp_path: Path) -> None:
    series(tmp_path / "s" / "DICOM" / "PAT0" / "ST0", stored, name="I{}")
    (tmp_path / "s" / "README").write_text("from the hospital")
    check(tmp_path / "s", stored)


@pytest.mark.parametrize("keyword", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
@pytest.mark.parametrize("of", ["all", "one", "empty"])
def test_places_that_are_missing_are_named(stored: np.ndarray, tmp_path: Path, keyword: str, of: str) -> None:
    def edit(ds: FileDataset, k: int) -> None:
        if of == "empty":
            setattr(ds, keyword, None)
        elif of == "all" or k == 4:
            delattr(ds, keyword)

    series(tmp_path / "s", stored, edit=edit)
    refused(tmp_path / "s", f"has no {keyword}, so where its slices lie is not known")


def test_tags_written_in_two_ways(stored: np.ndarray, tmp_path: Path) -> None:
    """ITK alone takes these for two series."""

    def edit(ds: FileDataset, k: int) -> None:
        ds.SliceThickness = "3" if k % 2 else "3.0"
        ds.SequenceName = "*fl3d" if k % 2 else "*fl3d1"
        ds.SeriesNumber, ds.SeriesDate = 1 + k % 2, f"2020010{1 + k % 2}"
        ds.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"] if k % 2 else ["1.00", "-0", "0", "0", "1.0", "0"]

    series(tmp_path / "s", stored, edit=edit)
    check(tmp_path / "s", stored)


def test_slopes_slice_by_slice(stored: np.ndarray, tmp_path: Path) -> None:
    """As PET has them; the first is a whole number, which must not make the others whole."""
    slopes = 1 + 0.37 * np.arange(10)

    def edit(ds: FileDataset, k: int) -> None:
        ds.RescaleSlope, ds.RescaleIntercept = f"{slopes[k]:.6g}", "0"

    series(tmp_path / "s", stored, edit=edit)
    np.testing.assert_allclose(io.read_scan(tmp_path / "s")[0][0], stored * slopes, rtol=1e-6)


@pytest.mark.parametrize("lost", [(4,), (4, 5), (2, 7)])
def test_missing_slices_are_refused(stored: np.ndarray, tmp_path: Path, lost: tuple) -> None:
    series(tmp_path / "s", stored)
    for k in lost:
        (tmp_path / "s" / f"IM{k:04d}.dcm").unlink()
    by = 3 * max(1, len(lost) * (lost == (4, 5)))
    refused(tmp_path / "s", f"slices are missing or unevenly spaced, by up to {by}.00 mm, behind IM000[13].dcm")


def test_several_images_at_a_place_are_refused(stored: np.ndarray, tmp_path: Path) -> None:
    uid = series(tmp_path / "s", stored)
    series(tmp_path / "s", stored, uid=uid, name="E{}.dcm")
    refused(tmp_path / "s", "11 of 20 images lie at the same places as others, as of echoes, phases or repeats")


def test_a_series_by_uid_or_description(stored: np.ndarray, tmp_path: Path) -> None:
    def named(text: str) -> Callable[[FileDataset, int], None]:
        return lambda ds, k: setattr(ds, "SeriesDescription", text)

    uid = series(tmp_path / "s", stored, edit=named("T1 MPRAGE"))
    other = series(tmp_path / "s", stored[:, :, ::-1], edit=named("T2"), name="B{}.dcm")
    listed = f"{uid} .T1 MPRAGE, CT, 10 images.|{other} .T2, CT, 10 images."
    asked = "holds 2 DICOM series, name one by --series, its UID or description"
    refused(tmp_path / "s", f"{asked}: ({listed}); ({listed})")
    refused(tmp_path / "s", f"holds 2 DICOM series, none of which is flair: ({listed})", series="flair")
    check(tmp_path / "s", stored, series=uid)
    check(tmp_path / "s", stored, series="t1 mprage")
    check(tmp_path / "s", stored[:, :, ::-1], series=["1.2", other])
    loaded = LoadScansd(series=[uid])({key: str(tmp_path / "s") for key in ("moving", "fixed")})
    np.testing.assert_array_equal(loaded["fixed"][0].numpy(), stored - 1024.0)
    series(tmp_path / "one", stored)
    with pytest.warns(RegistrationWarning, match="holds one series, .*, which is not the one asked for"):
        io.read_scan(tmp_path / "one", series="T2")


@pytest.mark.parametrize("degrees", [15.0, -20.0, 2.0])
def test_gantry_tilt_keeps_every_slice_in_its_place(stored: np.ndarray, tmp_path: Path, degrees: float) -> None:
    tilt = np.deg2rad(degrees)
    series(tmp_path / "s", stored, iop=(1, 0, 0, 0, np.cos(tilt), np.sin(tilt)), step=(0, 0, 3.0))
    with pytest.warns(RegistrationWarning, match=f"not at right angles, by {abs(degrees):.1f} degrees"):
        _, affine = io.read_scan(tmp_path / "s")
    last = np.diag([-1, -1, 1, 1]) @ affine @ [0, 0, 9, 1]
    np.testing.assert_allclose(last[:3], [-10, -20, 5 + 27], atol=1e-6)


def test_rounded_positions_are_no_tilt(stored: np.ndarray, tmp_path: Path) -> None:
    turn = nib.eulerangles.euler2mat(0.3, -0.2, 0.1)
    iop = tuple(float(f"{v:.4f}") for v in np.ravel(turn.T[:2]))
    positions = [np.round(turn[:, 2] * 3 * k, 2) for k in range(10)]

    def edit(ds: FileDataset, k: int) -> None:
        ds.ImagePositionPatient = [f"{v:.2f}" for v in positions[k]]

    series(tmp_path / "s", stored, iop=iop, edit=edit)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RegistrationWarning)
        _, affine = io.read_scan(tmp_path / "s")
    assert headers.skew(affine) < 1e-3


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_other_syntaxes(stored: np.ndarray, tmp_path: Path, syntax: str) -> None:
    series(tmp_path / "s", stored, syntax=syntax)
    check(tmp_path / "s", stored)


def compressed(values: np.ndarray, syntax: str, place: Path) -> bytes:
    """(rows, columns) of 16 bits, as a file of this syntax has them; by GDCM, as the archives that compress."""
    if syntax == RLELossless:
        ds = blank()
        ds.Rows, ds.Columns, ds.PixelData = *values.shape, values.tobytes()
        ds.compress(RLELossless)
    else:
        writer = itk.GDCMImageIO.New()
        writer.SetCompressor({JPEGLosslessSV1: "JPEG", JPEG2000Lossless: "JPEG2000"}[syntax])
        itk.imwrite(itk.image_from_array(values[None]), str(place), imageio=writer, compression=True)
        ds = pydicom.dcmread(place)
    assert ds.file_meta.TransferSyntaxUID == syntax
    (frame,) = generate_frames(ds.PixelData, number_of_frames=1)
    return frame


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEG2000Lossless, RLELossless])
@pytest.mark.parametrize("lowest", [0, -900])
def test_compressed_slices(stored: np.ndarray, tmp_path: Path, syntax: str, lowest: int) -> None:
    stored = stored + np.int16(lowest)

    def edit(ds: FileDataset, k: int) -> None:
        ds.PixelData = encapsulate([compressed(np.ascontiguousarray(stored[:, :, k].T), syntax, tmp_path / "one.dcm")])
        ds["PixelData"].VR, ds.file_meta.TransferSyntaxUID = "OB", syntax

    series(tmp_path / "s", stored, edit=edit)
    check(tmp_path / "s", stored)


def test_slices_in_jpeg_ls(tmp_path: Path) -> None:
    """Nothing here writes JPEG-LS: a slice that pydicom ships, in every place, with an intercept of its own."""
    plain, packed = (get_testdata_file(f"MR_small{name}.dcm", read=True) for name in ("", "_jpeg_ls_lossless"))
    one = plain.pixel_array.T.astype(np.int16)

    def edit(ds: FileDataset, k: int) -> None:
        ds.PixelData, ds.RescaleIntercept = packed.PixelData, -1024 + 100 * k
        ds["PixelData"].VR, ds.file_meta.TransferSyntaxUID = "OB", JPEGLSLossless

    series(tmp_path / "s", np.repeat(one[:, :, None], 5, 2), edit=edit)
    check(tmp_path / "s", one[:, :, None] + 100 * np.arange(5, dtype=np.int16))


def test_slices_in_lossy_jpeg(tmp_path: Path) -> None:
    """8 bits, and not quite what was stored."""
    smooth = np.add.outer(np.add.outer(np.arange(16), np.arange(24)), np.arange(6)).astype(np.uint8) * 5

    def edit(ds: FileDataset, k: int) -> None:
        Image.fromarray(smooth[:, :, k].T).save(file := BytesIO(), "jpeg", quality=95)
        ds.BitsAllocated = ds.BitsStored = 8
        ds.HighBit, ds.PixelRepresentation = 7, 0
        ds.PixelData = encapsulate([file.getvalue()])
        ds["PixelData"].VR, ds.file_meta.TransferSyntaxUID = "OB", JPEGBaseline8Bit

    series(tmp_path / "s", smooth, edit=edit)
    array, affine = io.read_scan(tmp_path / "s")
    np.testing.assert_allclose(array[0], smooth.astype(float) - 1024, atol=3)
    np.testing.assert_allclose(affine, AFFINE, atol=1e-4)


@pytest.mark.parametrize("syntax", [HTJ2KLossless, JPEG2000Lossless, JPEGLosslessSV1, JPEGLSLossless, RLELossless])
def test_compressed_pixels_that_are_spoilt_or_unknown(stored: np.ndarray, tmp_path: Path, syntax: str) -> None:
    def edit(ds: FileDataset, k: int) -> None:
        ds.PixelData = encapsulate([b"\xff\xd8\xff" + bytes(range(61))])
        ds["PixelData"].VR, ds.file_meta.TransferSyntaxUID = "OB", syntax

    series(tmp_path / "s", stored, edit=edit)
    refused(tmp_path / "s", "decompress it first")


@pytest.mark.parametrize("syntax", [JPEG2000Lossless, JPEGLosslessSV1, RLELossless])
def test_compressed_pixels_that_are_cut_off(stored: np.ndarray, tmp_path: Path, syntax: str) -> None:
    def edit(ds: FileDataset, k: int) -> None:
        whole = compressed(np.ascontiguousarray(stored[:, :, k].T), syntax, tmp_path / "one.dcm")
        ds.PixelData = encapsulate([whole if k != 4 else whole[: len(whole) // 2]])
        ds["PixelData"].VR, ds.file_meta.TransferSyntaxUID = "OB", syntax

    series(tmp_path / "s", stored, edit=edit)
    refused(tmp_path / "s", "IM0004.dcm")


def test_files_without_the_preamble(stored: np.ndarray, tmp_path: Path) -> None:
    series(tmp_path / "s", stored, syntax=ImplicitVRLittleEndian)
    for file in (tmp_path / "s").iterdir():
        ds = pydicom.dcmread(file)
        content = file.read_bytes()
        file.write_bytes(content[132 + 12 + ds.file_meta.FileMetaInformationGroupLength :])
    check(tmp_path / "s", stored)


def test_pixels_that_cannot_be_decoded(stored: np.ndarray, tmp_path: Path) -> None:
    series(tmp_path / "s", stored)
    for file in (tmp_path / "s").iterdir():
        content = file.read_bytes().replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.9\0")
        file.write_bytes(content)
    with pytest.raises(InputError) as caught:
        io.read_scan(tmp_path / "s")
    assert str(tmp_path / "s") in str(caught.value) and "\n" not in str(caught.value)


# ---- enhanced, multi-frame ------------------------------------------------------------------------------------------


def enhanced(
    path: Path,
    stored: np.ndarray,
    order: list[int],
    *,
    slopes: np.ndarray | None = None,
    places: bool = True,
    syntax: str = "",
) -> None:
    """One file of many frames, in any order, each with its place."""
    ds = blank(EnhancedMRImageStorage)
    ds.SeriesInstanceUID, ds.Modality, ds.NumberOfFrames = generate_uid(), "MR", len(order)
    ds.Columns, ds.Rows = stored.shape[:2]
    shared, frames = Dataset(), []
    measures, orientation = Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = list(SPACING[:2]), "3"
    orientation.ImageOrientationPatient = list(AXIAL)
    shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = [measures], [orientation]
    for k in order:
        frame, position, values = Dataset(), Dataset(), Dataset()
        if places:
            position.ImagePositionPatient = [-10, -20, 5 + 3 * k]
        frame.PlanePositionSequence = [position]
        values.RescaleSlope = 1 if slopes is None else f"{slopes[k]:.6g}"
        values.RescaleIntercept, values.RescaleType = -1024 if slopes is None else 0, "US"
        frame.PixelValueTransformationSequence = [values]
        frames.append(frame)
    ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = [shared], frames
    frames = [np.ascontiguousarray(stored[:, :, k].T) for k in order]
    ds.PixelData = b"".join(frame.tobytes() for frame in frames)
    if syntax:
        ds.PixelData = encapsulate([compressed(frame, syntax, path.with_name("one.dcm")) for frame in frames])
        ds["PixelData"].VR, ds.file_meta.TransferSyntaxUID = "OB", syntax
        path.with_name("one.dcm").unlink(missing_ok=True)
    ds.save_as(path, enforce_file_format=True)


@pytest.mark.parametrize("order", [range(10), range(9, -1, -1), [3, 7, 0, 9, 1, 5, 2, 8, 6, 4]])
@pytest.mark.parametrize("as_folder", [True, False])
def test_frames_in_any_order(stored: np.ndarray, tmp_path: Path, order: list[int], as_folder: bool) -> None:
    enhanced(tmp_path / "e.dcm", stored, list(order))
    check(tmp_path if as_folder else tmp_path / "e.dcm", stored)


@pytest.mark.parametrize("syntax", [JPEGLosslessSV1, JPEG2000Lossless, RLELossless])
def test_compressed_frames_in_any_order(stored: np.ndarray, tmp_path: Path, syntax: str) -> None:
    enhanced(tmp_path / "e.dcm", stored, [3, 7, 0, 9, 1, 5, 2, 8, 6, 4], syntax=syntax)
    check(tmp_path / "e.dcm", stored)
    slopes = 1 + 0.37 * np.arange(10)
    enhanced(tmp_path / "e.dcm", stored, [3, 7, 0, 9, 1, 5, 2, 8, 6, 4], slopes=slopes, syntax=syntax)
    np.testing.assert_allclose(io.read_scan(tmp_path / "e.dcm")[0][0], stored * slopes, rtol=1e-5)


def test_slopes_frame_by_frame(stored: np.ndarray, tmp_path: Path) -> None:
    slopes = 1 + 0.37 * np.arange(10)
    enhanced(tmp_path / "e.dcm", stored, [3, 7, 0, 9, 1, 5, 2, 8, 6, 4], slopes=slopes)
    np.testing.assert_allclose(io.read_scan(tmp_path / "e.dcm")[0][0], stored * slopes, rtol=1e-5)


def test_frames_that_are_missing_or_nowhere(stored: np.ndarray, tmp_path: Path) -> None:
    enhanced(tmp_path / "e.dcm", stored, [0, 1, 2, 3, 5, 6, 7])
    refused(tmp_path / "e.dcm", "slices are missing or unevenly spaced, by up to 3.00 mm, behind e.dcm, frame 4")
    enhanced(tmp_path / "n.dcm", stored, list(range(10)), places=False)
    refused(tmp_path / "n.dcm", "n.dcm has no ImagePositionPatient")


def test_one_slice_is_no_scan(stored: np.ndarray, tmp_path: Path) -> None:
    series(tmp_path / "s", stored[:, :, :1])
    refused(tmp_path / "s", "must be a 3-D scan, got a single slice")
    refused(tmp_path / "s" / "IM0000.dcm", "must be a 3-D scan, got a single slice")
