"""The command line `python -m common`: results against ITK and the formula, help, one-sentence errors."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import itk
import nibabel as nib
import numpy as np
import pytest
from forks import PATIENCE
from PIL import Image

from common import phantom
from common.__main__ import main
from common.space import io, mapping
from common.space.points import Points, read_points, write_points
from common.space.transform_files import read_transform, write_transform

Command = Callable[..., str]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Command:
    """Run one command in this process and give what it prints."""

    def run(*words: object) -> str:
        monkeypatch.setattr(sys, "argv", ["common", *map(str, words)])
        main()
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Phantom scans on small oblique grids, and a transform with displacement and affine part."""
    folder = tmp_path_factory.mktemp("pair")
    turned = nib.eulerangles.euler2mat(0.3, -0.2, 0.15) @ np.diag([-5.0, 4.5, 5])
    for name, size, linear in (("moving", (34, 42, 30), turned), ("fixed", (30, 38, 28), np.diag([5.0, -5, 5.5]))):
        affine = nib.affines.from_matvec(linear, -linear @ ((np.array(size) - 1) / 2))
        scan, label = phantom.sample(size, affine)
        io.write_scan(scan, affine, folder / f"{name}.nii.gz")
        io.write_label(label, affine, folder / f"{name}_label.nii.gz")
    size, affine = (30, 38, 28), io.read_scan(folder / "fixed.nii.gz")[1]
    i, j, k = np.meshgrid(*map(np.arange, size), indexing="ij")
    disp = np.stack([np.sin(j / 6), 0.8 * np.cos(i / 7), np.sin((i + k) / 8)])
    matrix = nib.affines.from_matvec(nib.eulerangles.euler2mat(0.05, 0.02, -0.04), [6, -4, 3])
    whole = mapping.compose(mapping.displacement_transform(disp, affine), mapping.affine_transform(matrix))
    write_transform(whole, folder / "t.h5")
    write_transform(mapping.affine_transform(matrix), folder / "a.tfm")
    return folder


@pytest.mark.parametrize("name", ["moving", "moving_label"])
def test_apply_equals_itk(pair: Path, tmp_path: Path, command: Command, name: str) -> None:
    label = ["--label"] if "label" in name else []
    text = command(
        "apply",
        pair / f"{name}.nii.gz",
        pair / "t.h5",
        tmp_path / "w.nii.gz",
        "--reference",
        pair / "fixed.nii.gz",
        *label,
    )
    assert f"wrote {tmp_path / 'w.nii.gz'}: 30 x 38 x 28 voxels" in text
    moving, fixed = (itk.imread(str(pair / f"{n}.nii.gz"), itk.F) for n in (name, "fixed"))
    (transform,) = itk.transformread(str(pair / "t.h5"))
    kind = itk.NearestNeighborInterpolateImageFunction if label else itk.LinearInterpolateImageFunction
    expected = itk.resample_image_filter(
        moving,
        transform=transform,
        interpolator=kind[type(moving), itk.D].New(),
        use_reference_image=True,
        reference_image=fixed,
    )
    file = nib.load(tmp_path / "w.nii.gz")
    expected = itk.array_from_image(expected).T
    np.testing.assert_allclose(file.get_fdata(), expected, atol=5e-5 * expected.max())  # coordinates are float32
    assert file.get_data_dtype() == (np.uint8 if label else np.float32) and file.get_fdata().max() > 1


def test_direction_of_points(pair: Path, tmp_path: Path, command: Command) -> None:
    """Without --inverse fixed points go to the moving scan; with it moving points go to the fixed one."""
    fixed = np.array([[10.0, -20, 5], [-30, 12, -8], [4, 4, 4]])
    write_points(Points(fixed, ["a", "b", "c"]), tmp_path / "fixed.csv")
    command("apply", tmp_path / "fixed.csv", pair / "t.h5", tmp_path / "moving.fcsv")
    there = read_points(tmp_path / "moving.fcsv")
    (transform,) = itk.transformread(str(pair / "t.h5"))
    expected = [transform.TransformPoint(point) for point in fixed.tolist()]
    np.testing.assert_allclose(there.lps, expected, atol=0.01)
    assert np.linalg.norm(there.lps - fixed, axis=1).min() > 3 and there.names == ["a", "b", "c"]
    command("apply", tmp_path / "moving.fcsv", pair / "t.h5", tmp_path / "back.csv", "--inverse")
    np.testing.assert_allclose(read_points(tmp_path / "back.csv").lps, fixed, atol=0.01)


def test_points_are_mapped_without_torch(pair: Path, tmp_path: Path) -> None:
    """Which takes two CPU-seconds to load."""
    write_points(Points(np.eye(3), ["a", "b", "c"]), tmp_path / "points.csv")
    words = ["apply", tmp_path / "points.csv", pair / "t.h5", tmp_path / "there.csv"]
    code = f"import sys; from common.__main__ import main; sys.argv[1:] = {list(map(str, words))}; main()"
    done = subprocess.run([sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert len(read_points(tmp_path / "there.csv").lps) == 3


def test_moving_landmark_lies_where_the_warped_scan_shows_it(pair: Path, tmp_path: Path, command: Command) -> None:
    """A bright spot of the moving scan appears in the warped scan at the point that --inverse gives."""
    affine = io.read_scan(pair / "moving.nii.gz")[1]
    spot = np.zeros((34, 42, 30), np.float32)
    spot[16:19, 22:25, 13:16] = 100
    io.write_scan(spot, affine, tmp_path / "spot.nii.gz")
    (tmp_path / "spot.csv").write_text("17,23,14\n")
    command("apply", tmp_path / "spot.nii.gz", pair / "t.h5", tmp_path / "w.nii.gz", "-r", pair / "fixed.nii.gz")
    command(
        "apply", tmp_path / "spot.csv", pair / "t.h5", tmp_path / "p.csv", "--inverse", "-r", tmp_path / "spot.nii.gz"
    )
    warped, onto = io.read_scan(tmp_path / "w.nii.gz")
    weight = warped[0] / warped[0].sum()
    centre = [(weight * axis).sum() for axis in np.meshgrid(*map(np.arange, weight.shape), indexing="ij")]
    seen = nib.affines.apply_affine(onto, centre) * [-1, -1, 1]
    told = read_points(tmp_path / "p.csv").lps[0]
    assert np.linalg.norm(seen - told) < 1.0, "less than a fifth of a voxel"


def test_compose_and_invert(pair: Path, tmp_path: Path, command: Command) -> None:
    """The order is the point's; a collapsed image agrees with the chain; the inverse leads back."""
    fixed = pair / "fixed.nii.gz"
    command("compose", tmp_path / "c.h5", pair / "t.h5", pair / "a.tfm")
    command("compose", tmp_path / "c.nii.gz", pair / "t.h5", pair / "a.tfm", "--reference", fixed)
    first, second = (read_transform(pair / name) for name in ("t.h5", "a.tfm"))
    points = np.array([[10.0, -20, 5], [-30, 12, -8], [4, 4, 4]])
    expected = mapping.map_points(second, mapping.map_points(first, points))
    np.testing.assert_allclose(
        mapping.map_points(read_transform(tmp_path / "c.h5"), points), expected, atol=1e-6
    )
    collapsed = mapping.map_points(read_transform(tmp_path / "c.nii.gz"), points)
    np.testing.assert_allclose(collapsed, expected, atol=0.1)  # linear between the voxels of 5 mm
    text = command("invert", tmp_path / "c.h5", tmp_path / "i.h5", "--reference", fixed)
    assert "in the foreground of" in text and float(text.split("mean ")[1].split()[0]) < 0.5
    back = mapping.map_points(read_transform(tmp_path / "i.h5"), expected)
    assert np.linalg.norm(back - points, axis=1).max() < 2.5, "half a voxel"


def test_phantom(tmp_path: Path, command: Command) -> None:
    """Its landmarks correspond: the truth takes the fixed ones to the moving ones."""
    command("phantom", tmp_path / "p")
    fixed, moving = (read_points(tmp_path / "p" / f"{role}_points.csv") for role in ("fixed", "moving"))
    truth = phantom.Deformation(0).truth(fixed.lps * [-1, -1, 1]) * [-1, -1, 1]
    np.testing.assert_allclose(moving.lps, truth, atol=1e-3)
    assert fixed.names == moving.names and np.linalg.norm(moving.lps - fixed.lps, axis=1).mean() > 5


def test_report_of_a_displacement_image(pair: Path, tmp_path: Path, command: Command) -> None:
    """It does not show what was alignment: "before" is the scans as they lie, or what --start says."""
    fixed, scans = pair / "fixed.nii.gz", [pair / f"{name}.nii.gz" for name in ("moving", "fixed")]
    command("compose", tmp_path / "d.nii.gz", pair / "t.h5", "--reference", fixed)
    told = {}
    for name, file, more in (("a", "t.h5", ()), ("b", "d.nii.gz", ()), ("c", "d.nii.gz", ("--start", pair / "a.tfm"))):
        command("report", *scans, (pair if name == "a" else tmp_path) / file, tmp_path / name, *more)
        told[name] = json.loads((tmp_path / name / "report.json").read_text())
    assert told["b"]["before"] == "the scans as they lie, not aligned" != told["a"]["before"] == told["c"]["before"]
    similar = [told[name]["similarity"]["ncc_before"] for name in "abc"]
    assert similar[2] == pytest.approx(similar[0], abs=1e-4) and abs(similar[1] - similar[0]) > 0.01
    with pytest.raises(SystemExit, match="t.h5: the alignment must be linear"):
        command("report", *scans, tmp_path / "d.nii.gz", tmp_path / "d", "--start", pair / "t.h5")


def test_report(pair: Path, tmp_path: Path, command: Command) -> None:
    """Both files, the verdict in the printed words too; labels and landmarks where they are given."""
    scans = [pair / f"{name}.nii.gz" for name in ("moving", "fixed")]
    marks = [tmp_path / f"{name}.csv" for name in ("moving", "fixed")]
    fixed = np.array([[10.0, -20, 5], [-30, 12, -8]])
    there = mapping.map_points(read_transform(pair / "t.h5"), fixed) + [3, 0, 4]
    for path, points in zip(marks, (there, fixed)):
        write_points(Points(points, ["a", "b"]), path)
    options = [f"--{role}_{kind}" for kind in ("label", "points") for role in ("moving", "fixed")]
    files = [pair / "moving_label.nii.gz", pair / "fixed_label.nii.gz", *marks]
    words = [word for both in zip(options, files) for word in both] + ["--neurological", "True"]
    text = command("report", *scans, pair / "t.h5", tmp_path / "r", *words)
    assert '"radiological": false' in (tmp_path / "r" / "report.html").read_text(encoding="utf-8")
    command("review", tmp_path, "--neurological", "True")
    assert '<body class="neurological">' in (tmp_path / "index.html").read_text(encoding="utf-8")
    found = json.loads((tmp_path / "r" / "report.json").read_text())
    assert "report.html, report.png and report.json" in text and "verdict: DOUBTFUL" in text
    assert found["verdict"] == "doubtful"
    assert text.splitlines()[2:] == [f"    - {warning}" for warning in found["warnings"]]
    assert found["landmarks"]["tre_mm_after"] == pytest.approx(5, abs=1e-2)
    assert found["deformation"]["inverse_failed_pct"] < 1 and found["deformation"]["displacement_mm"]["p50"] > 1
    assert 0 < found["overlap"]["dice_after"] < 1 and len(found["overlap"]["each"]) >= 5
    assert found["run"]["transform"] == str(pair / "t.h5")
    assert found["before"] == "the scans after the alignment", "the transform's linear part"
    assert Image.open(tmp_path / "r" / "report.png").size[0] > 1200
    names = ("report.html", "report.json", "report.png", "thumbnail.webp")
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == sorted(names)


def test_datalist(pair: Path, tmp_path: Path, command: Command) -> None:
    """Counts, pairs and a preset that exists are printed; the folder of the data is left as it is."""
    root = tmp_path / "set"
    for n in range(1, 4):
        (root / f"IBSR_{n:02d}").mkdir(parents=True)
        for kind, name in (("ana_strip", "fixed"), ("seg_ana", "fixed_label")):
            shutil.copy(pair / f"{name}.nii.gz", root / f"IBSR_{n:02d}" / f"IBSR_{n:02d}_{kind}.nii.gz")
    text = command("datalist", "ibsr18", root, "--output", tmp_path / "out")
    told, preset = text.strip().split("; preset ")
    assert told == f"wrote {tmp_path / 'out' / 'dataset.json'}: 0 training, 0 validation, 3 test, 6 pairs"
    assert json.loads(Path(preset).read_text())["spacing"] == 1.0
    content = json.loads((tmp_path / "out" / "dataset.json").read_text())
    assert (tmp_path / "out" / content["test"][0]["image"]).is_file() and not (root / "dataset.json").exists()


REFUSED = {
    "no transform": (("apply", "{pair}/moving.nii.gz", "none.h5", "{out}/w.nii.gz"), "none.h5: no such file"),
    "no reference": (("apply", "{pair}/moving.nii.gz", "{pair}/t.h5", "{out}/w.nii.gz"), "--reference is needed"),
    "no scan": (
        ("apply", "{out}/x.nii.gz", "{pair}/t.h5", "{out}/w.nii.gz", "-r", "{pair}/fixed.nii.gz"),
        "x.nii.gz: no such file",
    ),
    "ending": (
        ("apply", "{pair}/moving.nii.gz", "{pair}/t.h5", "{out}/w.png", "-r", "{pair}/fixed.nii.gz"),
        "w.png: scans are written as one of",
    ),
    "no label": (
        ("apply", "{pair}/moving.nii.gz", "{pair}/t.h5", "{out}/w.nii.gz", "-r", "{pair}/fixed.nii.gz", "--label"),
        "moving.nii.gz: a label map has whole numbers",
    ),
    "deformable as affine": (("compose", "{out}/c.tfm", "{pair}/t.h5"), "c.tfm: holds affine transforms only"),
    "no grid": (("compose", "{out}/c.nii.gz", "{pair}/t.h5"), "c.nii.gz: a displacement file needs a grid"),
    "nothing to compose": (("compose", "{out}/c.h5"), "compose needs the transforms"),
    "no such option": (
        ("invert", "{pair}/t.h5", "{out}/i.h5", "--refrence", "{pair}/fixed.nii.gz"),
        "--refrence: there is no such option, did you mean --reference?",
    ),
    "no scan to report": (
        ("report", "{out}/m.nii.gz", "{pair}/fixed.nii.gz", "{pair}/t.h5", "{out}/r"),
        "m.nii.gz: no such file",
    ),
    "label of another scan": (
        ("report", "{pair}/moving.nii.gz", "{pair}/fixed.nii.gz", "{pair}/t.h5", "{out}/r")
        + ("--moving_label", "{pair}/fixed_label.nii.gz", "--fixed_label", "{pair}/fixed_label.nii.gz"),
        "fixed_label.nii.gz: the label map has shape (30, 38, 28), its scan",
    ),
    "one half of the landmarks": (
        ("report", "{pair}/moving.nii.gz", "{pair}/fixed.nii.gz", "{pair}/t.h5", "{out}/r")
        + ("--fixed_points", "{pair}/t.h5"),
        "t.h5: with --fixed_points, --moving_points is needed as well",
    ),
    "no spacing": (
        ("report", "{pair}/moving.nii.gz", "{pair}/fixed.nii.gz", "{pair}/t.h5", "{out}/r", "--spacing", "-1"),
        "--spacing must be a size in mm",
    ),
    "no such set": (("datalist", "colours", "{pair}"), "colours: no such data set, there are ixi"),
    "no value": (
        ("apply", "{pair}/moving.nii.gz", "{pair}/t.h5", "{out}/w.nii.gz", "-r"),
        "--reference: needs a value",
    ),
    "a file as folder": (("datalist", "ixi", "{pair}", "--output", "{pair}/t.h5"), "written there (it is a file"),
    "another folder": (("datalist", "ixi", "{pair}", "--output", "{out}"), "does not look like ixi"),
    "no folder": (("invert", "{pair}/t.h5", "{out}/no/i.h5"), "cannot be written"),
}


@pytest.mark.parametrize("words, sentence", REFUSED.values(), ids=REFUSED)
def test_errors_are_one_sentence(pair: Path, tmp_path: Path, command: Command, words: tuple, sentence: str) -> None:
    with pytest.raises(SystemExit) as caught:
        command(*[word.format(pair=pair, out=tmp_path) for word in words])
    text = str(caught.value.code)
    assert text.startswith("error: ") and sentence in text and "\n" not in text
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


def test_as_a_process(repository: Path, tmp_path: Path) -> None:
    """Exit codes, and help that names every command and says which way points go."""

    def run(*words: str) -> subprocess.CompletedProcess:
        line = [sys.executable, "-m", "common", *words]
        environment = os.environ | {"PAGER": "cat"}
        return subprocess.run(line, cwd=repository, capture_output=True, text=True, timeout=PATIENCE, env=environment)

    done = run("invert", "none.h5", str(tmp_path / "i.h5"))
    assert done.returncode == 1 and done.stderr.splitlines()[-1] == "error: none.h5: no such file"
    assert "Traceback" not in done.stderr
    shown = run("apply", "--help")
    assert shown.returncode == 0
    assert "FIXED points to the moving scan" in shown.stdout + shown.stderr
