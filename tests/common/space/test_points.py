"""Landmark files: every form gives the same points, round trips, refusals in one sentence."""

import json
import warnings
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from common import InputError, RegistrationWarning
from common.space.points import Points, read_matching, read_points, write_points

AFFINE = nib.affines.from_matvec(np.diag([-2.0, 3, 4]), [10, 20, 30])
VOXELS = np.array([[1.0, 2, 3], [4, 5.5, 6]])
LPS = nib.affines.apply_affine(AFFINE, VOXELS) * [-1, -1, 1]
RAS = LPS * [-1, -1, 1]


def lines(rows: np.ndarray, *names: str) -> str:
    return "".join(",".join([*map(str, row), *names]) + "\n" for row in rows)


def markups(space: str, rows: np.ndarray) -> str:
    points = [{"label": f"p{n}", "position": row.tolist()} for n, row in enumerate(rows)]
    return json.dumps({"markups": [{"type": "Fiducial", "coordinateSystem": space, "controlPoints": points}]})


FORMS = {
    "ants.csv": "x,y,z,t,label\n" + lines(LPS, "0", "a"),
    "named.csv": "name, X, Y, Z\n" + "".join("q," + line for line in lines(LPS).splitlines(True)),
    "voxels.csv": "i,j,k\n" + lines(VOXELS),
    "learn2reg.csv": lines(VOXELS),
    "bom.csv": "\ufeffx,y,z\n" + lines(LPS),
    "new.fcsv": "# CoordinateSystem = LPS\n# columns = id,x,y,z,label\n"
    + "".join("n," + x for x in lines(LPS, "F").splitlines(True)),
    "old.fcsv": "# CoordinateSystem = 0\n" + "".join("n," + x for x in lines(RAS).splitlines(True)),
    "lps.mrk.json": markups("LPS", LPS),
    "ras.mrk.json": markups("RAS", RAS),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_points(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FORMS[name], encoding="utf-8")
    found = read_points(tmp_path / name, AFFINE)
    np.testing.assert_allclose(found.lps, LPS, atol=1e-9)
    assert len(found.names) == 2 and all(found.names)


@pytest.mark.parametrize("ending", [".csv", ".fcsv", ".mrk.json"])
def test_written_points_come_back(tmp_path: Path, ending: str) -> None:
    given = Points(LPS, ["left, upper", "right"])
    write_points(given, tmp_path / f"p{ending}")
    found = read_points(tmp_path / f"p{ending}")
    np.testing.assert_allclose(found.lps, LPS, atol=1e-4)
    assert found.names == given.names and [path.name for path in tmp_path.iterdir()] == [f"p{ending}"]


def test_a_point_without_a_place_in_a_markup(tmp_path: Path) -> None:
    """Is there, as one that Slicer has still to place, and not nan, which is no JSON."""
    write_points(Points(np.array([[1.0, 2, 3], [np.nan] * 3]), ["a", "b"]), tmp_path / "p.mrk.json")
    (markup,) = json.loads((tmp_path / "p.mrk.json").read_text(), parse_constant=pytest.fail)["markups"]
    assert [point["positionStatus"] for point in markup["controlPoints"]] == ["defined", "undefined"]
    with pytest.warns(RegistrationWarning, match="1 of 2 points was never placed"):
        assert read_points(tmp_path / "p.mrk.json").names == ["a"]


def test_refusals(tmp_path: Path) -> None:
    files = {
        "empty.csv": ("x,y,z\n", "holds no points"),
        "words.csv": ("x,y,z\n1,2,three\n", "not a list of points"),
        "two.csv": ("x,y\n1,2\n", "not a list of points"),
        "nothing.csv": ("", "not a list of points"),
        "hole.csv": ("x,y,z\n1,nan,3\n", "holds NaN"),
        "space.fcsv": ("# CoordinateSystem = IJK\na,1,2,3\n", "not a list of points"),
        "list.json": ("[]", "not a list of points"),
        "voxels.csv": ("i,j,k\n1,2,3\n", "need the scan"),
    }
    for name, (text, words) in files.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match=words) as caught:
            read_points(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: ") and "\n" not in str(caught.value)
    with pytest.raises(InputError, match="no such file"):
        read_points(tmp_path / "none.csv")
    with pytest.raises(InputError, match="written as .csv, .fcsv or .mrk.json"):
        write_points(Points(LPS, ["a", "b"]), tmp_path / "p.txt")
    (tmp_path / "three.csv").write_text("x,y,z\n" + 3 * "1,2,3\n")
    (tmp_path / "ok.csv").write_text("x,y,z\n1,2,3\n")
    with pytest.raises(InputError, match="three.csv: has 3 points, .*ok.csv has 1"):
        read_matching(tmp_path / "three.csv", AFFINE, tmp_path / "ok.csv", AFFINE)


def test_names_in_another_order_are_refused(tmp_path: Path) -> None:
    """A list that was sorted: its points would pair wrongly, and look right."""
    (tmp_path / "a.csv").write_text("name,x,y,z\nhilum,1,2,3\napex,4,5,6\nbase,7,8,9\n")
    (tmp_path / "sorted.csv").write_text("name,x,y,z\napex,4,5,6\nbase,7,8,9\nhilum,1,2,3\n")
    with pytest.raises(InputError, match="sorted.csv: point 1 is 'apex' there and 'hilum' in .*a.csv; the names have"):
        read_matching(tmp_path / "sorted.csv", AFFINE, tmp_path / "a.csv", AFFINE)
    (tmp_path / "one.csv").write_text("name,x,y,z\nhilum,1,2,3\napex,4,5,6\nbasis,7,8,9\n")
    with pytest.warns(RegistrationWarning, match="one.csv: point 3 is 'basis' there and 'base' in .*a.csv; the n-th"):
        read_matching(tmp_path / "one.csv", AFFINE, tmp_path / "a.csv", AFFINE)
    for names in ("M-1 M-2 M-3", "hilum apex base"):  # nothing in common, and the same
        rows = [f"{name},1,2,{number}" for number, name in enumerate(names.split())]
        (tmp_path / "fine.csv").write_text("\n".join(["name,x,y,z", *rows]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            one, other = read_matching(tmp_path / "fine.csv", AFFINE, tmp_path / "a.csv", AFFINE)
        assert len(one.lps) == len(other.lps) == 3
