"""Transforms of c3d, Greedy, NiftyReg, FSL, FreeSurfer, SPM and elastix: read right, or refused with the cure.

The files in foreign/ were made by itk-elastix 0.25.4 and picsl_greedy 1.4.0.3 from two sums of Gaussians; what each
tool itself made of points and voxels with them stands below.
"""

import struct
import sys
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest

from common import InputError, __main__
from common.space import mapping, transform_files

FILES = Path(__file__).parent / "foreign"
FLIP = np.diag([-1.0, -1, 1, 1])
MATRIX = nib.affines.from_matvec(
    nib.eulerangles.euler2mat(0.1, -0.2, 0.15) @ np.diag([1.05, 0.95, 1.1]), [4.0, -7.0, 2.5]
)  # RAS mm, fixed to moving
POINTS = np.random.default_rng(0).uniform(-30, 30, (20, 3))  # RAS mm


def check(path: Path, expected: np.ndarray = MATRIX, **options) -> None:
    found = mapping.matrix_of(transform_files.read_transform(path, **options))
    np.testing.assert_allclose(found, expected, atol=1e-5)


def refused(path: Path, words: str, **options) -> None:
    with pytest.raises(InputError, match=words) as caught:
        transform_files.read_transform(path, **options)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


# ---- MatrixOffsetTransformBase --------------------------------------------------------------------------------------


def base(matrix_ras: np.ndarray, centre: tuple) -> tuple[np.ndarray, np.ndarray]:
    """ITK's parameters of an affine map about a centre: 9 of the matrix, 3 of the translation; LPS."""
    lps = FLIP @ matrix_ras @ FLIP
    shift = lps[:3, 3] + lps[:3, :3] @ centre - centre
    return np.concatenate([lps[:3, :3].ravel(), shift]), np.array(centre, float)


@pytest.mark.parametrize("precision", ["double", "float"])
@pytest.mark.parametrize("ending", [".txt", ".tfm"])
def test_affines_of_c3d_and_itk_snap(tmp_path: Path, ending: str, precision: str) -> None:
    numbers, centre = base(MATRIX, (10.0, 20, -30))
    text = f"#Insight Transform File V1.0\n#Transform 0\nTransform: MatrixOffsetTransformBase_{precision}_3_3\n"
    text += f"Parameters: {' '.join(map(repr, numbers.tolist()))}\nFixedParameters: {' '.join(map(str, centre))}\n"
    (tmp_path / f"a{ending}").write_text(text)
    check(tmp_path / f"a{ending}")


def test_the_same_in_a_mat(tmp_path: Path) -> None:
    content = b""
    for name, values in zip((b"MatrixOffsetTransformBase_double_3_3\0", b"fixed\0"), base(MATRIX, (10.0, 20, -30))):
        content += struct.pack("<5i", 0, len(values), 1, 0, len(name)) + name + values.astype("<f8").tobytes()
    (tmp_path / "a.mat").write_bytes(content)
    check(tmp_path / "a.mat")
    (tmp_path / "a.mat").write_bytes(content[:120])
    refused(tmp_path / "a.mat", "not a transform that ITK can read")


def test_itks_own_files_are_read_as_before(tmp_path: Path) -> None:
    for ending in (".h5", ".tfm", ".txt", ".mat"):
        transform_files.write_transform(mapping.affine_transform(MATRIX), tmp_path / f"a{ending}")
        check(tmp_path / f"a{ending}")


# ---- plain matrices -------------------------------------------------------------------------------------------------


def moving_scan() -> tuple[np.ndarray, np.ndarray]:
    """The sum of Gaussians that Greedy was given as the moving scan, and its affine."""
    x, y, z = np.meshgrid(*[np.arange(28)] * 3, indexing="ij")
    rng, scan = np.random.default_rng(1), np.zeros((28, 28, 28), np.float32)
    for _ in range(14):
        c = rng.uniform(6, 22, 3) * 1.05 + 1.2 - 0.05 * 14
        s, a = rng.uniform(2, 4), rng.uniform(50, 200)
        scan += (a * np.exp(-((x - c[0]) ** 2 + (y - c[1]) ** 2 + (z - c[2]) ** 2) / (2 * s * s))).astype(np.float32)
    return scan, FLIP @ nib.affines.from_matvec(nib.eulerangles.euler2mat(0.2, 0, 0) * [2, 2, 3], [-18, -16, 4])


def test_greedys_matrix_does_what_greedy_does() -> None:
    scan, affine = moving_scan()
    onto = FLIP @ nib.affines.from_matvec(nib.eulerangles.euler2mat(0.2, 0, 0) * [2, 2, 3], [-20, -15, 5])
    transform = transform_files.read_transform(FILES / "greedy.mat", matrix="ras")
    found = mapping.resample(scan, affine, scan.shape, onto, transform)
    by_greedy = {(8, 8, 8): 25.056, (14, 14, 14): 255.971, (20, 10, 15): 249.662}
    by_greedy |= {(10, 20, 12): 93.316, (16, 8, 20): 167.243}
    for voxel, value in by_greedy.items():
        assert found[voxel] == pytest.approx(value, abs=0.02)


def test_a_plain_matrix_needs_its_coordinates(tmp_path: Path) -> None:
    refused(FILES / "greedy.mat", "does not say what its coordinates are: give --matrix ras .* or --matrix flirt")
    np.savetxt(tmp_path / "m.txt", MATRIX)
    check(tmp_path / "m.txt", matrix="ras")
    with pytest.raises(InputError, match="--matrix must be one of ras, flirt, got fsl"):
        transform_files.read_transform(tmp_path / "m.txt", matrix="fsl")
    np.savetxt(tmp_path / "singular.txt", np.diag([1, 1, 0, 1]))
    refused(tmp_path / "singular.txt", "not an affine matrix that can be inverted", matrix="ras")
    (tmp_path / "a.aff12.1D").write_text("# 3dvolreg\n" + " ".join(map(str, MATRIX[:3].ravel())) + "\n")
    refused(tmp_path / "a.aff12.1D", "one line of 12 numbers, as AFNI's .aff12.1D")


@pytest.mark.parametrize("storage, step", [(-1, 2), (1, -2)])
def test_flirt_by_its_two_scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: int, step: int) -> None:
    """4 mm along FSL's first axis are 2 voxels up where the determinant is negative, and down where it is not."""
    scan = np.random.default_rng(0).random((12, 14, 10)).astype(np.float32)
    for name in ("moving", "fixed"):
        nib.save(nib.Nifti1Image(scan, np.diag([2.0 * storage, 2, 3, 1])), tmp_path / f"{name}.nii.gz")
    np.savetxt(tmp_path / "flirt.mat", nib.affines.from_matvec(np.eye(3), [4, 0, 0]))
    words = ["apply", tmp_path / "moving.nii.gz", tmp_path / "flirt.mat", tmp_path / "out.nii.gz"]
    words += ["--reference", tmp_path / "fixed.nii.gz", "--matrix", "flirt"]
    monkeypatch.setattr(sys, "argv", ["common", *map(str, words)])
    __main__.main()
    out = nib.load(tmp_path / "out.nii.gz").get_fdata()
    np.testing.assert_allclose(np.roll(out, -step, 0)[3:-3], scan[3:-3], atol=1e-4)


def test_flirt_between_grids_that_differ(tmp_path: Path) -> None:
    """A point of the moving scan goes where FSL's own recipe takes it."""
    affines = {
        "moving": nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, 0.2, -0.1) * [1.5, 2, 2.5], [-9, 4, 7]),
        "fixed": nib.affines.from_matvec(nib.eulerangles.euler2mat(-0.2, 0.1, 0.3) * [-2, 2, 3], [12, -8, 3]),
    }
    for name, affine in affines.items():
        scan = np.random.default_rng(0).random((12, 14, 10)).astype(np.float32)
        nib.save(nib.Nifti1Image(scan, affine), tmp_path / f"{name}.nii.gz")
    np.savetxt(tmp_path / "flirt.mat", MATRIX)
    scans = str(tmp_path / "moving.nii.gz"), str(tmp_path / "fixed.nii.gz")
    transform = transform_files.read_transform(tmp_path / "flirt.mat", matrix="flirt", scans=scans)
    voxel = np.array([3.0, 5, 2])
    fsl = MATRIX @ [(11 - voxel[0]) * 1.5, voxel[1] * 2, voxel[2] * 2.5, 1]  # det > 0: turned round
    there = FLIP @ affines["fixed"] @ [fsl[0] / 2, fsl[1] / 2, fsl[2] / 3, 1]
    back = mapping.map_points(transform, there[None, :3])
    np.testing.assert_allclose(back[0], (FLIP @ affines["moving"] @ [*voxel, 1])[:3], atol=1e-4)


# ---- FreeSurfer -----------------------------------------------------------------------------------------------------


def lta(path: Path, kind: int, matrix: np.ndarray, volumes: dict[str, np.ndarray], size: tuple) -> Path:
    rows = "\n".join(" ".join(f"{v:.12f}" for v in row) for row in matrix)
    text = f"# created by a test\n\ntype      = {kind} # LINEAR\nnxforms   = 1\n"
    text += f"mean      = 0.0 0.0 0.0\nsigma     = 1.0\n1 4 4\n{rows}\n"
    for which, affine in volumes.items():
        sizes = nib.affines.voxel_sizes(affine)
        axes, middle = affine[:3, :3] / sizes, nib.affines.apply_affine(affine, np.array(size) / 2)
        text += f"{which} volume info\nvalid = 1  # volume info valid\nfilename = {which} of a study.mgz\n"
        text += f"volume = {' '.join(map(str, size))}\nvoxelsize = {' '.join(f'{v:.12f}' for v in sizes)}\n"
        for name, axis in zip("xyz", axes.T):
            text += f"{name}ras   = {' '.join(f'{v:.12f}' for v in axis)}\n"
        text += f"cras   = {' '.join(f'{v:.12f}' for v in middle)}\n"
    path.write_text(text + "subject s01\nfscale 0.1\n")
    return path


def test_lta_of_both_kinds(tmp_path: Path) -> None:
    """FreeSurfer's takes a point of the moving scan (src) to the fixed one (dst)."""
    forward, size = np.linalg.inv(MATRIX), (12, 14, 10)
    src = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, 0.2, -0.1) * [1.5, 2, 2.5], [-9, 4, 7])
    dst = nib.affines.from_matvec(nib.eulerangles.euler2mat(-0.2, 0.1, 0.3) * [-2, 2, 3], [12, -8, 3])
    volumes = {"src": src, "dst": dst}
    check(lta(tmp_path / "ras.lta", 1, forward, volumes, size))
    check(lta(tmp_path / "vox.lta", 0, np.linalg.inv(dst) @ forward @ src, volumes, size))
    refused(lta(tmp_path / "tk.lta", 14, forward, volumes, size), "of type 14 .* lta_convert --inlta tk.lta --outitk")
    (tmp_path / "cut.lta").write_text("type = 1\nnxforms = 1\n1 4 4\n1 0 0 0\n")
    refused(tmp_path / "cut.lta", "not an .lta that can be read; convert it")
    (tmp_path / "a.xfm").write_text("MNI Transform File\n\nTransform_Type = Linear;\n")
    refused(tmp_path / "a.xfm", "an .xfm of MNI's tools; convert it with")


# ---- elastix --------------------------------------------------------------------------------------------------------

GIVEN = [[0, 0, 0], [5, 3, 20], [-4, 8, 30], [10, 10, 40], [12, 18, 60], [-60, 0, 0]]
BY_TRANSFORMIX = {
    "rigid": [
        [4.660510, 2.063480, 2.547541],
        [9.377917, 4.766862, 22.658180],
        [0.274349, 9.737691, 32.578660],
        [14.136155, 11.469730, 42.818307],
        [15.905123, 19.203666, 62.944335],
        [-55.329046, 2.687414, 1.618105],
    ],
    "affine": [
        [5.093038, 2.195932, 6.949188],
        [9.337902, 4.825105, 25.267829],
        [0.988367, 9.682710, 34.371428],
        [13.698402, 11.297654, 43.491607],
        [15.329599, 18.778021, 61.698786],
        [-50.071214, 3.135401, 7.091538],
    ],
    "translation": [
        [4.025051, 1.455164, 2.641114],
        [9.025051, 4.455164, 22.641114],
        [0.025051, 9.455164, 32.641114],
        [14.025051, 11.455164, 42.641114],
        [16.025051, 19.455164, 62.641114],
        [-55.974949, 1.455164, 2.641114],
    ],
    "bspline": [
        [4.779463, 3.454313, 7.522874],
        [9.250052, 6.445016, 25.888946],
        [1.514461, 10.548317, 34.921594],
        [13.338802, 11.120673, 43.585618],
        [14.682046, 18.040648, 61.202122],
        [-50.071214, 3.135401, 7.091538],
    ],
}


@pytest.mark.parametrize("name", BY_TRANSFORMIX)
def test_parameters_of_elastix_do_what_transformix_does(name: str) -> None:
    """Also the B-spline behind its affine, which lies in another folder now."""
    transform = transform_files.read_transform(FILES / f"elastix_{name}.txt")
    np.testing.assert_allclose(mapping.map_points(transform, np.array(GIVEN, float)), BY_TRANSFORMIX[name], atol=2e-5)


def test_a_b_spline_becomes_a_field_and_a_file(tmp_path: Path) -> None:
    transform = transform_files.read_transform(FILES / "elastix_bspline.txt")
    transform_files.write_transform(transform, tmp_path / "t.h5")
    again = transform_files.read_transform(tmp_path / "t.h5")
    np.testing.assert_allclose(mapping.map_points(again, np.array(GIVEN, float)), BY_TRANSFORMIX["bspline"], atol=2e-5)
    affine = np.diag([-2.0, -2, 2, 1])
    affine[:3, 3] = [20, 15, 5]
    transform_files.write_transform(transform, tmp_path / "t.nii.gz", ((28, 28, 28), affine))
    field = transform_files.read_transform(tmp_path / "t.nii.gz")
    inside = np.array([GIVEN[1], GIVEN[3]], float)
    np.testing.assert_allclose(mapping.map_points(field, inside), mapping.map_points(transform, inside), atol=0.02)


def test_what_of_elastix_is_not_read(tmp_path: Path) -> None:
    text = (FILES / "elastix_bspline.txt").read_text()
    cases = {
        "alone.txt": (text, "its initial transform /a/folder/elsewhere/TransformParameters.0.txt is not there"),
        "added.txt": (text.replace('"Compose"', '"Add"'), "adds its transform to its initial one; make a displacement"),
        "spline.txt": (text.replace('"BSplineTransform"', '"KernelTransform"'), "KernelTransform is not read"),
        "short.txt": (text.replace("(GridSize 6 6 7)", "(GridSize 6 6 8)"), "transformix -def all -tp short.txt"),
        "flat.txt": (text.replace("(FixedImageDimension 3)", "(FixedImageDimension 2)"), "must be a 3-D transform"),
        "loop.txt": (text.replace("/a/folder/elsewhere/TransformParameters.0.txt", "loop.txt"), "name each other"),
        "binary.txt": (text.replace("(GridOrigin -41", '(GridOrigin "a.bin'), "transformix -def all"),
    }
    for name, (content, words) in cases.items():
        (tmp_path / name).write_text(content)
        refused(tmp_path / name, words)


# ---- fields ---------------------------------------------------------------------------------------------------------

SIZE = (12, 14, 10)
GRID = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.1, 0.2, -0.1) * [-2, 2, 3], [-9, 4, 7])


def positions() -> np.ndarray:
    """(I, J, K, 3) RAS mm of the voxels of GRID under MATRIX."""
    voxels = np.stack(np.meshgrid(*[np.arange(n) for n in SIZE], indexing="ij"), -1)
    return nib.affines.apply_affine(MATRIX @ GRID, voxels)


def places() -> np.ndarray:
    voxels = np.stack(np.meshgrid(*[np.arange(n) for n in SIZE], indexing="ij"), -1)
    return nib.affines.apply_affine(GRID, voxels)


def field(path: Path, vectors: np.ndarray, name: str = "", values: tuple = (), code: str | int = "vector") -> Path:
    image = nib.Nifti1Image(vectors[:, :, :, None].astype(np.float32), GRID)
    image.header.set_intent(code, values, name=name, allow_unknown=True)
    if values:
        image.header["intent_p1"] = values[0]
    nib.save(image, path)
    return path


def follows(path: Path) -> None:
    inside = np.random.default_rng(0).uniform(1, np.array(SIZE) - 2, (20, 3))
    lps = nib.affines.apply_affine(FLIP @ GRID, inside)
    expected = nib.affines.apply_affine(FLIP @ MATRIX @ GRID, inside)
    np.testing.assert_allclose(mapping.map_points(transform_files.read_transform(path), lps), expected, atol=1e-3)


def patched(path: Path, first: float) -> Path:
    """intent_p1, which nibabel knows for some intents only."""
    content = bytearray(path.read_bytes())
    content[56:60] = struct.pack("<f", first)
    path.write_bytes(content)
    return path


def test_fields_of_niftyreg_and_spm(tmp_path: Path) -> None:
    follows(patched(field(tmp_path / "def.nii", positions(), "NREG_TRANS"), 0))
    follows(patched(field(tmp_path / "disp.nii", positions() - places(), "NREG_TRANS"), 1))
    follows(field(tmp_path / "y_spm.nii", positions(), "Mapping"))
    follows(field(tmp_path / "itk.nii", (positions() - places()) * [-1, -1, 1]))
    for kind in (2, 3, 4, 5):
        path = patched(field(tmp_path / "cpp.nii", positions(), "NREG_TRANS"), kind)
        refused(path, "a spline or velocities of NiftyReg; convert it with reg_transform -ref FIXED -def cpp.nii")


def test_a_field_of_positions_that_does_not_say_so(tmp_path: Path) -> None:
    for sign in ([1, 1, 1], [-1, -1, 1]):
        path = field(tmp_path / "def.nii.gz", positions() * sign)
        refused(path, "holds positions .a deformation field., not displacements")


@pytest.mark.parametrize("code, words", [(2006, "a field of FSL's"), (2007, "coefficients .* fnirtfileutils --in=")])
def test_fnirt_is_refused_with_the_cure(tmp_path: Path, code: int, words: str) -> None:
    image = nib.Nifti1Image((positions() - places()).astype(np.float32), GRID)
    image.header["intent_code"] = code
    nib.save(image, tmp_path / "w.nii.gz")
    refused(tmp_path / "w.nii.gz", words)
    refused(tmp_path / "w.nii.gz", "wb_command -convert-warpfield -from-fnirt .* -to-itk OUT.nii.gz")


@pytest.mark.parametrize("content", [b"", b"hello", b"\0" * 500, b"1 2 3\n4 5 6\n", b"(Transform", b"\xff\xfe" * 99])
@pytest.mark.parametrize("ending", [".txt", ".mat", ".h5", ".lta", ".tfm"])
def test_files_that_are_no_transform(tmp_path: Path, content: bytes, ending: str) -> None:
    (tmp_path / f"t{ending}").write_bytes(content)
    refused(tmp_path / f"t{ending}", "not a transform that ITK can read|holds no transform")


def test_itk_writes_what_is_read(tmp_path: Path) -> None:
    """c3d's text, read here, goes back as ITK's AffineTransform."""
    numbers, centre = base(MATRIX, (0.0, 0, 0))
    text = "#Insight Transform File V1.0\n#Transform 0\nTransform: MatrixOffsetTransformBase_double_3_3\n"
    text += f"Parameters: {' '.join(map(repr, numbers.tolist()))}\nFixedParameters: 0 0 0\n"
    (tmp_path / "a.txt").write_text(text)
    transform_files.write_transform(transform_files.read_transform(tmp_path / "a.txt"), tmp_path / "b.tfm")
    (read,) = itk.transformread(str(tmp_path / "b.tfm"))
    np.testing.assert_allclose(np.asarray(read.TransformPoint([1.0, 2, 3])), (FLIP @ MATRIX @ FLIP @ [1, 2, 3, 1])[:3])
