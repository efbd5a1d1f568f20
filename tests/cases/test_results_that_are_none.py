"""What lies outside, points that were never placed, many points, deeply nested JSON."""

import json
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from common import InputError, RegistrationWarning
from common import __main__ as program
from common.space import io, itk_maps, mapping, points

SHAPE = (12, 14, 10)


def noise(scale: float, middle: float = 0.0) -> np.ndarray:
    return np.random.default_rng(0).normal(middle, scale, (20, 22, 18)).astype(np.float32)


def body(outside: np.ndarray, inside: float) -> np.ndarray:
    scan = outside.copy()
    scan[5:15, 5:15, 3:] = inside
    return scan


def test_outside_of_a_map_that_is_0_around() -> None:
    tmap = np.zeros(SHAPE, np.float32)
    tmap[4:8, 4:8, 3:7], tmap[5, 5, 4] = 3, -8
    assert io.background(tmap) == 0


@pytest.mark.parametrize(
    "scan, low, high",
    [
        (body(noise(0, -1000), 50), -1000, -1000),
        (body(noise(20, -1000), 50), -1010, -990),
        (np.where(np.arange(18) == 9, -3024, body(noise(0, -1000), 50))[:20], -1000, -1000),
        (body(noise(0.01), 5) + np.where(np.indices((20, 22, 18)).sum(0) == 30, -8, 0), -0.02, 0),
        (body(noise(0, -0.7), 2), -0.7001, -0.6999),
        (body(noise(1, 100), 300), 0, 0),
        (-body(noise(0, 0), 9), 0, 0),
    ],
    ids=["ct", "ct_noisy", "ct_one_slice_of_metal", "map_almost_0_around", "z_scores", "mr", "negative_map"],
)
def test_outside_of_a_scan_is_its_air_not_its_minimum(scan: np.ndarray, low: float, high: float) -> None:
    assert low <= io.background(scan.astype(np.float32)) <= high


def test_one_overshoot_changes_nothing_outside() -> None:
    """Skull-stripped, with one voxel of -60 from a spline: resampled beyond its field of view it is 0."""
    scan = np.zeros(SHAPE, np.float32)
    scan[4:8, 4:8, 3:7], scan[5, 5, 4] = 300, -60
    shift = mapping.affine_transform(nib.affines.from_matvec(np.eye(3), [6, 0, 0]))
    found = mapping.resample(scan, np.eye(4), SHAPE, np.eye(4), shift, outside=io.background(scan))
    assert (found[-6:] == 0).all()


# ---- points ---------------------------------------------------------------------------------------------------------

PLACED = [31.0, -42.0, 53.0]


def markups(path: Path, *states: str) -> Path:
    control = [
        {"label": f"F-{n}", "position": PLACED if state == "defined" else [0.0, 0.0, 0.0], "positionStatus": state}
        for n, state in enumerate(states, 1)
    ]
    content = {"markups": [{"type": "Fiducial", "coordinateSystem": "LPS", "controlPoints": control}]}
    path.write_text(json.dumps(content))
    return path


def fcsv(path: Path, *states: int) -> Path:
    head = "# Markups fiducial file version = 5.2\n# CoordinateSystem = LPS\n"
    head += "# columns = id,x,y,z,ow,ox,oy,oz,vis,sel,lock,label,desc,associatedNodeID\n"
    rows = [f"{n},31,-42,53,0,0,0,1,1,1,0,F-{n},,,{state},0" for n, state in enumerate(states, 1)]
    path.write_text(head + "\n".join(rows) + "\n")
    return path


def test_points_that_were_never_placed_are_left_out_and_counted(tmp_path: Path) -> None:
    files = markups(tmp_path / "p.mrk.json", "defined", "missing", "undefined", "preview"), fcsv(
        tmp_path / "p.fcsv", 2, 0, 1, 3
    )
    for file in files:
        with pytest.warns(RegistrationWarning, match="3 of 4 points were never placed in 3-D Slicer and left out"):
            found = points.read_points(file)
        assert found.names == ["F-1"]
        np.testing.assert_allclose(found.lps, [PLACED])


def test_a_position_may_be_absent(tmp_path: Path) -> None:
    file = markups(tmp_path / "p.mrk.json", "defined", "undefined")
    content = json.loads(file.read_text())
    del content["markups"][0]["controlPoints"][1]["position"]
    file.write_text(json.dumps(content))
    with pytest.warns(RegistrationWarning, match="1 of 2 points was never placed"):
        assert points.read_points(file).names == ["F-1"]


def test_pairs_lose_both_points(tmp_path: Path) -> None:
    """The n-th belongs to the n-th also where one of them was skipped."""
    moving = markups(tmp_path / "m.mrk.json", "defined", "missing", "defined")
    fixed = fcsv(tmp_path / "f.fcsv", 2, 2, 2)
    with pytest.warns(RegistrationWarning, match="m.mrk.json: 1 of 3 points was never placed"):
        one, other = points.read_matching(moving, np.eye(4), fixed, np.eye(4))
    assert one.names == other.names == ["F-1", "F-3"]
    none = markups(tmp_path / "n.mrk.json", "missing", "missing", "missing")
    with pytest.raises(InputError, match="n.mrk.json: no point was placed"):
        points.read_matching(none, np.eye(4), fixed, np.eye(4))
    with pytest.raises(InputError, match="n.mrk.json: holds no points that were placed"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        points.read_points(none)


NESTED = ["[" * 100_000, '{"markups":' * 100_000, '{"markups": ' + "[" * 5000 + "]" * 5000 + "}"]


@pytest.mark.parametrize("text", NESTED)
def test_deeply_nested_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.mrk.json").write_text(text)
    with pytest.raises(InputError, match="p.mrk.json: not a list of points") as caught:
        points.read_points(tmp_path / "p.mrk.json")
    assert "\n" not in str(caught.value)


BAD_JSON = ["null", "3", '{"markups": 3}', '{"markups": [{"controlPoints": [3]}]}', '{"markups": [null]}']
BAD_JSON += ['{"markups": [{"coordinateSystem": [], "controlPoints": []}]}']
BAD_JSON += ['{"markups": [{"controlPoints": [{"position": [1, 2, 3, 4]}]}]}']
BAD_JSON += ['{"markups": [{"controlPoints": [{"position": "abc"}]}]}', '{"markups": [{"controlPoints": [{}]}]}']


@pytest.mark.parametrize("text", BAD_JSON)
def test_other_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "p.mrk.json").write_text(text)
    with pytest.raises(InputError, match="p.mrk.json: not a list of points"):
        points.read_points(tmp_path / "p.mrk.json")


@pytest.fixture(scope="module")
def deforming():
    rng = np.random.default_rng(0)
    size = (30, 32, 28)
    disp = np.stack([gaussian_filter(rng.normal(size=size), 4) for _ in range(3)])
    affine = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.3, -0.2, 0.1) * [2, 2, 3], [10, -20, 30])
    field = mapping.displacement_transform(disp * 2 / np.abs(disp).max(), affine)
    matrix = nib.affines.from_matvec(np.eye(3) + rng.normal(size=(3, 3)) * 0.05, [5, -3, 8])
    return mapping.compose(field, mapping.affine_transform(matrix)), affine, size


def test_points_at_once_go_where_itk_takes_each(deforming) -> None:
    """Inside, on the rim and outside of the field."""
    whole, affine, size = deforming
    voxels = np.random.default_rng(1).uniform(-2, np.array(size) + 1, (500, 3))
    voxels[:2] = [[-0.49, 3, 3], [0, 0, 0]]
    lps = nib.affines.apply_affine(np.diag([-1, -1, 1, 1]) @ affine, voxels)
    by_itk = itk_maps.to_itk_transform(whole)
    expected = np.array([by_itk.TransformPoint(point) for point in lps.tolist()])
    np.testing.assert_allclose(mapping.map_points(whole, lps), expected, atol=1e-9)
    assert mapping.map_points(whole, np.zeros((0, 3))).shape == (0, 3)


def test_a_hundred_thousand_points_take_seconds(deforming, tmp_path: Path) -> None:
    """Read, mapped, inverted and written all at once: one by one this would take minutes, and the test with it."""
    whole, affine, size = deforming
    voxels = np.random.default_rng(1).uniform(3, np.array(size) - 4, (100_000, 3))
    lps = nib.affines.apply_affine(np.diag([-1, -1, 1, 1]) @ affine, voxels)
    points.write_points(points.Points(lps, [str(n) for n in range(len(lps))]), tmp_path / "p.csv")
    given = points.read_points(tmp_path / "p.csv")
    there = mapping.map_points(whole, given.lps)
    back = mapping.invert_at(whole, there)
    points.write_points(points.Points(back, given.names), tmp_path / "back.csv")
    assert np.linalg.norm(back - given.lps, axis=1).max() < 0.01


# ---- results of apply -----------------------------------------------------------------------------------------------


def applied(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, folder: Path, shift: int, *words: str):
    """Exit code and what was said of `apply` with a shift in mm, and what it has written."""
    scan = np.zeros(SHAPE, np.int16)
    scan[3:9, 3:11, 2:8] = 5
    nib.save(nib.Nifti1Image(scan, np.eye(4)), folder / "scan.nii.gz")
    text = f"Parameters: 1 0 0 0 1 0 0 0 1 {shift} 0 0\nFixedParameters: 0 0 0\n"
    (folder / "t.tfm").write_text(f"#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n{text}")
    line = [folder / "scan.nii.gz", folder / "t.tfm", folder / "out.nii.gz", "--reference", folder / "scan.nii.gz"]
    monkeypatch.setattr("sys.argv", ["common", "apply", *map(str, line), *words])
    code: object = 0
    try:
        program.main()
    except SystemExit as end:
        code = end.code
    return code, capsys.readouterr().err, np.asarray(nib.load(folder / "out.nii.gz").dataobj)


@pytest.mark.parametrize("words", [(), ("--label",)])
def test_apply_says_that_its_result_is_empty(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path, words: tuple[str, ...]
) -> None:
    code, said, result = applied(monkeypatch, capsys, tmp_path, 100, *words)
    assert code == 3 and not result.any()
    empty = f"warning: {tmp_path / 'out.nii.gz'}: is empty: {tmp_path / 't.tfm'} leads elsewhere, or --inverse is wanted"
    assert said.splitlines() == [empty]
    code, said, result = applied(monkeypatch, capsys, tmp_path, 3, *words)
    assert code == 0 and not said and result.any()


def test_a_small_part_of_a_scan_is_no_empty_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """One row of voxels is left of a scan of 288: little of it, but the reference is not empty there."""
    code, said, result = applied(monkeypatch, capsys, tmp_path, 5)
    assert code == 0 and not said and result.any()


def test_points_without_any_inverse(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """A field that brings all points of its grid to one: no point but that has an inverse."""
    places = np.stack(np.meshgrid(*[np.arange(n) for n in SHAPE], indexing="ij")).astype(np.float64)
    from common.space.transform_files import write_transform

    write_transform(mapping.displacement_transform(5 - places, np.eye(4)), tmp_path / "all_to_one.h5")
    (tmp_path / "p.csv").write_text("x,y,z\n-3,-3,3\n-7,-4,6\n")
    line = [tmp_path / "p.csv", tmp_path / "all_to_one.h5", tmp_path / "out.csv", "--inverse"]
    monkeypatch.setattr("sys.argv", ["common", "apply", *map(str, line)])
    with pytest.raises(SystemExit) as end:
        program.main()
    assert end.value.code == 3 and "no point has an inverse, all are nan" in capsys.readouterr().err
