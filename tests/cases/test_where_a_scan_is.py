"""Headers that contradict themselves, are rounded, sheared or faulty: what is read, what is said, what is refused."""

import gzip
import warnings
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest

from common import InputError, RegistrationWarning
from common.run import progress
from common.run.transforms import AlignAndGridd, LoadScansd
from common.space import geometry, headers, io, mapping, pixels

AFFINE = np.array([[2.0, 0, 0, -10], [0, 2, 0, 5], [0, 0, 3, 7], [0, 0, 0, 1]])
TURN = nib.eulerangles.euler2mat(0.3, -0.2, 0.1)
SHAPE = (12, 14, 10)


@pytest.fixture
def volume() -> np.ndarray:
    return (np.random.default_rng(0).random(SHAPE) * 1000).astype(np.float32)


def nifti(volume: np.ndarray, path: Path, *, sform: tuple | None = None, qform: tuple | None = None) -> Path:
    image = nib.Nifti1Image(volume, None)
    if qform:
        image.set_qform(*qform)
    if sform:
        image.set_sform(*sform)
    nib.save(image, path)
    return path


def patched(path: Path, offset: int, *numbers: float) -> Path:
    content = bytearray(path.read_bytes())
    content[offset : offset + 4 * len(numbers)] = np.array(numbers, "<f4").tobytes()
    path.write_bytes(content)
    return path


def moved(by: tuple[float, float, float]) -> np.ndarray:
    return nib.affines.from_matvec(np.eye(3), by) @ AFFINE


def sheared(degrees: float = 15.0) -> np.ndarray:
    """Slices stacked along z while their columns are tilted: a head CT's gantry."""
    tilt, affine = np.deg2rad(degrees), AFFINE.copy()
    affine[:3, 1] = [0, 2 * np.cos(tilt), 2 * np.sin(tilt)]
    return affine


@pytest.mark.parametrize("codes, used", [((2, 1), "qform"), ((1, 1), "sform"), ((4, 1), "qform"), ((1, 3), "sform")])
def test_sform_and_qform_that_disagree(volume: np.ndarray, tmp_path: Path, codes: tuple, used: str) -> None:
    """ITK's choice stays, which is said with the distance; the other is had by its name."""
    both = {"sform": moved((40, -25, 10)), "qform": AFFINE}
    path = nifti(volume, tmp_path / "s.nii.gz", sform=(both["sform"], codes[0]), qform=(both["qform"], codes[1]))
    other = {"sform": "qform", "qform": "sform"}[used]
    with pytest.warns(RegistrationWarning, match=f"s.nii.gz: read by the {used}; the {other} puts it up to 48.2 mm"):
        _, affine = io.read_scan(path)
    np.testing.assert_allclose(affine, both[used], atol=1e-4)
    for name, expected in both.items():
        np.testing.assert_allclose(io.read_scan(path, header=name)[1], expected, atol=1e-4)


def test_headers_that_agree_say_nothing(volume: np.ndarray, tmp_path: Path) -> None:
    affine = nib.affines.from_matvec(TURN * [0.7, 0.7, 3], [1, 2, 3])
    path = nifti(volume, tmp_path / "s.nii.gz", sform=(affine, 1), qform=(affine, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_allclose(io.read_scan(path)[1], affine, atol=1e-5)


def test_a_grid_is_that_of_the_scan(volume: np.ndarray, tmp_path: Path) -> None:
    """Also where the header alone leaves no doubt, and the values are not read."""
    turned = nib.affines.from_matvec(TURN @ np.diag([2.0, 2, 3]), [1, 2, 3])
    kinds = {"agree": (turned, turned), "disagree": (moved((40, -25, 10)), AFFINE), "sheared": (sheared(), None)}
    for name, (sform, qform) in kinds.items():
        path = nifti(volume, tmp_path / f"{name}.nii.gz", sform=(sform, 2), qform=None if qform is None else (qform, 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RegistrationWarning)
            size, affine = io.read_grid(path)
            scan, expected = io.read_scan(path)
        assert size == scan.shape[1:]
        np.testing.assert_array_equal(affine, expected, err_msg=name)
    (tmp_path / "agree.nii").write_bytes(gzip.decompress((tmp_path / "agree.nii.gz").read_bytes())[:400])
    np.testing.assert_allclose(io.read_grid(tmp_path / "agree.nii")[1], turned, atol=1e-5)


def test_a_header_that_is_not_there(volume: np.ndarray, tmp_path: Path) -> None:
    path = nifti(volume, tmp_path / "s.nii", qform=(AFFINE, 1))
    with pytest.raises(InputError, match="s.nii: --header sform is asked for, and the file has qform"):
        io.read_scan(path, header="sform")
    with pytest.raises(InputError, match="--header must be one of sform, qform, got best"):
        LoadScansd(header="best")


def test_the_disagreement_is_in_the_row(volume: np.ndarray, tmp_path: Path) -> None:
    path = nifti(volume, tmp_path / "s.nii.gz", sform=(moved((5, 0, 0)), 2), qform=(AFFINE, 1))
    progress.take()
    LoadScansd()({"moving": str(path), "fixed": str(path)})
    (note,) = progress.take()[0]
    assert "read by the qform; the sform puts it up to 5 mm elsewhere (--header sform)" in note
    loaded = LoadScansd(header="sform")({"moving": str(path), "fixed": str(path)})
    np.testing.assert_allclose(loaded["fixed"].affine, moved((5, 0, 0)), atol=1e-4)
    assert progress.take()[0] == []


@pytest.mark.parametrize("unit, scale", [("micron", 1e-3), ("meter", 1e3)])
def test_units_of_nifti(volume: np.ndarray, tmp_path: Path, unit: str, scale: float) -> None:
    image = nib.Nifti1Image(volume, AFFINE)
    image.header.set_xyzt_units(unit)
    nib.save(image, tmp_path / "s.nii.gz")
    expected = np.diag([scale, scale, scale, 1]) @ AFFINE
    np.testing.assert_allclose(io.read_scan(tmp_path / "s.nii.gz")[1], expected, rtol=1e-5)
    np.testing.assert_allclose(io.read_scan(tmp_path / "s.nii.gz", header="sform")[1], expected, rtol=1e-5)


@pytest.mark.parametrize("excess", [1e-6, -1e-6, 1e-5])
def test_a_quaternion_longer_than_one(volume: np.ndarray, tmp_path: Path, excess: float) -> None:
    """nibabel alone refuses it."""
    flipped = np.diag([-1.0, -1, 1, 1]) @ AFFINE
    path = nifti(volume, tmp_path / "s.nii", qform=(flipped, 1))
    array, affine = io.read_scan(patched(path, 264, 1 + excess))
    np.testing.assert_allclose(affine, flipped, atol=0.05)
    np.testing.assert_array_equal(array[0], volume)
    np.testing.assert_allclose(io.read_scan(path, header="qform")[1], flipped, atol=0.05)


FAULTS = {
    "spacing": (80, (np.nan,), "the spacing .pixdim. holds NaN or infinite values: nan, 2, 3"),
    "spacing_infinite": (84, (np.inf,), "the spacing .pixdim. holds NaN or infinite values"),
    "spacing_zero": (88, (0.0,), "the spacing .pixdim. must not be 0: 2, 2, 0"),
    "sform": (280, (np.nan,), "the sform holds NaN or infinite values"),
    "qform": (268, (np.inf,), "the qform's origin holds NaN or infinite values"),
    "quaternion": (256, (np.nan,), "the qform's quaternion holds NaN or infinite values"),
    "slope": (112, (np.inf, 0.0), "the slope or intercept of its values is NaN or infinite"),
    "intercept": (112, (2.0, np.nan), "the slope or intercept of its values is NaN or infinite"),
    "slope_nan": (112, (np.nan, 5.0), "the slope or intercept of its values is NaN or infinite"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_numbers_that_are_none(volume: np.ndarray, tmp_path: Path, name: str) -> None:
    offset, numbers, words = FAULTS[name]
    path = nifti(volume, tmp_path / "s.nii", sform=(AFFINE, 1), qform=(AFFINE, 1))
    patched(path, offset, *numbers)
    for ending in (".nii", ".nii.gz"):
        file = tmp_path / f"s{ending}"
        file.write_bytes(gzip.compress(path.read_bytes()) if ending == ".nii.gz" else path.read_bytes())
        with pytest.raises(InputError, match=words) as caught:
            io.read_scan(file)
        assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


def test_unset_slopes_are_none(volume: np.ndarray, tmp_path: Path) -> None:
    path = nifti(volume, tmp_path / "s.nii", sform=(AFFINE, 1))
    for slope, inter in ((np.nan, np.nan), (0.0, 0.0), (np.nan, 0.0), (1.0, 0.0)):
        np.testing.assert_array_equal(io.read_scan(patched(path, 112, slope, inter))[0][0], volume)
    np.testing.assert_allclose(io.read_scan(patched(path, 112, 2.0, 3.0))[0][0], volume * 2 + 3, rtol=1e-6)


def nrrd(volume: np.ndarray, path: Path, axes: np.ndarray, digits: int) -> Path:
    rows = " ".join("(" + ",".join(f"{v:.{digits}f}" for v in row) + ")" for row in axes.T)
    head = "NRRD0005\ntype: float\ndimension: 3\nspace: left-posterior-superior\n"
    head += f"sizes: {' '.join(map(str, volume.shape))}\nspace directions: {rows}\n"
    head += "kinds: domain domain domain\nendian: little\nencoding: raw\nspace origin: (1,2,3)\n\n"
    path.write_bytes(head.encode() + volume.T.astype("<f4").tobytes())
    return path


def test_directions_with_three_decimals_are_squared_up(tmp_path: Path) -> None:
    """To within rounding of the true ones; said where a corner moves by a twentieth of a voxel."""
    long = (np.random.default_rng(0).random((12, 14, 200)) * 1000).astype(np.float32)
    path = nrrd(long, tmp_path / "s.nrrd", TURN * [0.7, 0.7, 0.7], 3)
    with pytest.warns(RegistrationWarning, match="s.nrrd: its directions are rounded; squared up"):
        _, affine = io.read_scan(path)
    assert headers.skew(affine) < 1e-12
    truth = nib.affines.from_matvec(np.diag([-1.0, -1, 1]) @ TURN * 0.7, [-1, -2, 3])
    assert headers.farthest(affine, truth, long.shape) < 0.15
    identity = mapping.affine_transform(np.eye(4))
    np.testing.assert_allclose(mapping.resample(long, affine, long.shape, affine, identity), long, atol=0.05)  # of 1000
    short = nrrd(long[:, :, :6], tmp_path / "t.nrrd", TURN * [0.7, 0.7, 0.7], 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert headers.skew(io.read_scan(short)[1]) < 1e-4


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_a_sheared_scan_keeps_its_shear(volume: np.ndarray, tmp_path: Path, ending: str) -> None:
    """Written and read, in every format; ITK alone would bend NIfTI's, and refuses it without a qform."""
    path = tmp_path / f"s{ending}"
    io.write_scan(volume, sheared(), path)
    with pytest.warns(RegistrationWarning, match="its axes are not at right angles, by 15.0 degrees"):
        array, affine = io.read_scan(path)
    np.testing.assert_allclose(affine, sheared(), atol=1e-4)
    np.testing.assert_array_equal(array[0], volume)
    two = np.stack([volume, volume[::-1]])
    io.write_scan(two, sheared(), tmp_path / f"two{ending}")
    with pytest.warns(RegistrationWarning):
        array, affine = io.read_scan(tmp_path / f"two{ending}")
    np.testing.assert_array_equal(array, two)
    np.testing.assert_allclose(affine, sheared(), atol=1e-4)


def test_a_sheared_scan_is_resampled_and_gridded_right(tmp_path: Path) -> None:
    """A ball stays a ball: on the working grid, whose axes are orthogonal, and from there back."""
    size, affine = (40, 40, 24), sheared()
    voxels = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij"), -1)
    centre = nib.affines.apply_affine(affine, (np.array(size) - 1) / 2)
    ball = np.maximum(0, 25 - np.linalg.norm(nib.affines.apply_affine(affine, voxels) - centre, axis=-1))
    grid, onto = geometry.working_grid(size, affine, 2.0)
    assert headers.skew(onto) < 1e-9
    found = geometry.to_working_grid(ball[None].astype(np.float32), affine, grid, onto)[0]
    places = nib.affines.apply_affine(onto, np.stack(np.meshgrid(*[np.arange(n) for n in grid], indexing="ij"), -1))
    expected = np.maximum(0, 25 - np.linalg.norm(places - centre, axis=-1))
    inside = expected > 3
    assert np.abs(found - expected)[inside].max() < 1.5
    corners = np.array(np.meshgrid(*[(0, n - 1) for n in size], indexing="ij")).reshape(3, -1).T
    there = nib.affines.apply_affine(np.linalg.inv(onto) @ affine, corners)
    assert (there >= -0.5).all() and (there <= np.array(grid) - 0.5).all()


def test_two_axes_in_one_direction_are_refused(volume: np.ndarray, tmp_path: Path) -> None:
    flat = sheared()
    flat[:3, 1] = [0, 1e-9, 2]
    with pytest.raises(InputError, match="s.nii.gz: two axes of the scan have the same direction"):
        io.read_scan(nifti(volume, tmp_path / "s.nii.gz", sform=(flat, 2)))


def test_itk_alone_reads_an_orthogonal_file(volume: np.ndarray, tmp_path: Path) -> None:
    affine = nib.affines.from_matvec(TURN * [0.7, 0.8, 3], [1, 2, 3])
    io.write_scan(volume, affine, tmp_path / "s.nii.gz")
    np.testing.assert_allclose(io.affine_of(itk.imread(str(tmp_path / "s.nii.gz"))), affine, atol=1e-5)


def test_a_gz_that_is_not_compressed_is_read(volume: np.ndarray, tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(volume, AFFINE), tmp_path / "s.nii")
    (tmp_path / "s.nii").rename(tmp_path / "s.nii.gz")
    np.testing.assert_array_equal(io.read_scan(tmp_path / "s.nii.gz")[0][0], volume)


CASES = {  # voxels of the scan, wanted, chosen: the brain of a mouse, of a rat, a cell in micrometres, of a human
    "mouse": (0.33, (30, 36, 28), 2.0, 0.15),
    "rat": (0.5, (50, 60, 40), 2.0, 0.38),
    "cell_as_mm": (20.0, (100, 120, 80), 2.0, 30.0),
    "human": (1.0, (160, 190, 150), 2.0, 2.0),
    "human_thick": (4.0, (40, 48, 38), 2.0, 2.0),
    "own": (0.33, (30, 36, 28), None, None),
}


@pytest.mark.parametrize("name", CASES)
def test_the_grid_follows_the_organ(name: str) -> None:
    mm, size, wanted, chosen = CASES[name]
    assert geometry.fitting_spacing(size, np.diag([mm, mm, mm, 1]), wanted) == chosen


def test_another_spacing_is_said(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ball = np.linalg.norm(np.indices((30, 36, 28)).transpose(1, 2, 3, 0) - [15, 18, 14], axis=-1) < 11
    scan = (ball * (1 + rng.random(ball.shape))).astype(np.float32)
    nib.save(nib.Nifti1Image(scan, np.diag([0.33] * 3 + [1])), tmp_path / "m.nii.gz")
    progress.take()
    pair = LoadScansd()({key: str(tmp_path / "m.nii.gz") for key in ("moving", "fixed")})
    work = AlignAndGridd(2.0, "none")(pair)["fixed_work"]
    notes, facts = progress.take()
    (remark,) = facts["remarks"]
    assert "a grid of 2 mm voxels does not suit the size of" in remark and "0.11 mm was used" in remark
    assert notes == [], "it is no reason for doubt"
    assert min(work.shape[1:]) >= 64


@pytest.mark.parametrize("kind, slope", [(np.uint8, 1), (np.int16, 2.5), (np.float32, 1), (np.float64, 0.5)])
def test_plain_files_read_without_itk_say_what_itk_says(tmp_path: Path, kind: type, slope: float) -> None:
    """Values, scaled ones too, and place, of oblique scans of several types; what has two opinions goes by ITK."""
    values = (np.random.default_rng(0).random((6, 7, 8)) * 100).astype(kind)
    affine = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, -0.2, 0.1) @ np.diag([-1.5, 2.0, 2.5]), [3, -4, 5])
    file = nib.Nifti1Image(values, affine, dtype=kind)
    file.header.set_slope_inter(slope, 3 if slope != 1 else 0)
    nib.save(file, tmp_path / "s.nii.gz")
    for codes in (False, True):
        found = headers.read_nifti(tmp_path / "s.nii.gz")
        plain = headers.plain(found, codes=codes)
        if codes and slope != 1:
            assert plain is None
            continue
        array, image = pixels.read_pixels(tmp_path / "s.nii.gz", codes=codes)
        np.testing.assert_allclose(plain[0], array, rtol=1e-6)
        assert plain[0].dtype == (array.dtype if array.dtype.kind == "f" else np.int64)
        np.testing.assert_allclose(plain[1], io.affine_of(image), atol=1e-4)
    file.set_qform(affine, 1)
    file.set_sform(np.eye(4), 2)
    nib.save(file, tmp_path / "two.nii.gz")
    assert headers.plain(headers.read_nifti(tmp_path / "two.nii.gz")) is None
