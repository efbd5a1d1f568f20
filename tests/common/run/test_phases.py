"""A series in time: its phases and their order, what is wrong with it, and from a 4-D file to files."""

import csv
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from people import SPACING

from common import InputError, phantom
from common.__main__ import main
from common.run.series import mean_of, order, phases_of, table_of
from common.space import carry, io, mapping

AFFINE = nib.affines.from_matvec(np.diag([5.0, 5.0, 5.0]), (-75, -90, -70))
SIZE = (31, 37, 29)


def series(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["common", "series", *map(str, words)])
    main()


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four phases of a motion, film.nii.gz, and the label map of the first."""
    folder = tmp_path_factory.mktemp("film")
    frames = [phantom.sample(SIZE, AFFINE, moment, seed=n) for n, moment in enumerate(phantom.cycle(4, amplitude=30.0))]
    carry.write_film(np.stack([scan for scan, _ in frames]), AFFINE, 0.4, folder / "film.nii.gz")
    io.write_label(frames[0][1], AFFINE, folder / "label.nii.gz")
    return folder / "film.nii.gz"


def test_order_goes_outwards() -> None:
    assert order(4, 0) == [(1, None), (2, 1), (3, 2)]
    assert order(5, 2) == [(3, None), (1, None), (4, 3), (0, 1)]
    assert order(5, 0, cyclic=True) == [(1, None), (4, None), (2, 1), (3, 4)]
    for count, first in ((10, 0), (10, 7), (7, 3), (2, 1)):
        for cyclic in (False, True):
            found = order(count, first, cyclic=cyclic)
            done = [first]
            for phase, neighbour in found:
                assert neighbour is None or neighbour in done, "a neighbour is done before it is started from"
                apart = abs(phase - (first if neighbour is None else neighbour))
                assert apart == 1 or (cyclic and apart == count - 1)
                done.append(phase)
            assert sorted(done) == list(range(count))


def test_phases_of_a_folder_are_counted(tmp_path: Path) -> None:
    """2 comes before 10; a folder of DICOM is a phase; what is hidden or no scan is none."""
    for name in ("t10.nii.gz", "t2.nii.gz", "t1.nii.gz", ".t3.nii.gz", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "t11").mkdir()
    names = [Path(file).name for file in phases_of(str(tmp_path), tmp_path / "out")]
    assert names == ["t1.nii.gz", "t2.nii.gz", "t10.nii.gz", "t11"] and not (tmp_path / "out").exists()


def save(values: np.ndarray, path: Path) -> str:
    nib.save(nib.Nifti1Image(values.astype(np.float32), np.eye(4)), path)
    return str(path)


def test_what_is_no_series(tmp_path: Path) -> None:
    scan = np.random.default_rng(0).random((6, 7, 8))
    (tmp_path / "one").mkdir()
    (tmp_path / "none").mkdir()
    save(scan, tmp_path / "one" / "a.nii.gz")
    cases = {
        save(scan, tmp_path / "a.nii.gz"): "a.nii.gz: has no time; a series is a 4-D NIfTI file, or a folder of phases",
        save(scan[..., None], tmp_path / "b.nii.gz"): "b.nii.gz: has no time",
        save(np.stack([scan] * 2, -1)[..., None, :], tmp_path / "c.nii.gz"): "c.nii.gz: has no time",
        str(tmp_path / "one"): "one: holds one phase, a series has two or more",
        str(tmp_path / "none"): "none: holds no phases, a series has two or more",
        str(tmp_path / "where.nii.gz"): "where.nii.gz: no such file",
    }
    for path, sentence in cases.items():
        with pytest.raises(InputError, match=sentence):
            phases_of(path, tmp_path / "out")
    files = [save(scan, tmp_path / "one" / "a.nii.gz"), save(scan[1:], tmp_path / "one" / "b.nii.gz")]
    with pytest.raises(InputError, match="b.nii.gz: has another grid of 5 x 7 x 8 voxels than .*a.nii.gz; phases of a"):
        mean_of(files)
    nib.save(nib.Nifti1Image(scan.astype(np.float32), np.diag([2.0, 1, 1, 1])), files[1])
    with pytest.raises(InputError, match="b.nii.gz: has another place than"):
        mean_of(files)
    save(scan + 2, tmp_path / "one" / "b.nii.gz")
    np.testing.assert_allclose(mean_of(files)[0][0], scan + 1, rtol=1e-6)


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["--reference", "9"], "--reference 9: the 4 phases are 0 to 3"),
        (["--reference", "middle"], "--reference must be the number of a phase, from 0, or mean, got middle"),
        (["--fixed", "a.nii.gz"], "--fixed: there is no such option here, it belongs to a pair"),
        (["--midspace", "True"], "--midspace: there is no such option here, it belongs to a pair"),
        (["more.nii.gz"], "series needs SERIES OUT, and no other words"),
    ],
)
def test_words_that_are_wrong(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], sentence: str
) -> None:
    with pytest.raises(SystemExit, match=f"error: {sentence}"):
        series(monkeypatch, film, tmp_path / "out", "--method", "sacb_net", *words)
    assert not (tmp_path / "out").exists()


def test_a_pair_with_times_says_how(film: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = carry.read_film(film)[0][0]
    io.write_scan(first, AFFINE, tmp_path / "first.nii.gz")
    words = ["register", film, tmp_path / "first.nii.gz", tmp_path / "out", "--method", "sacb_net", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["common", *map(str, words)])
    with pytest.raises(SystemExit, match="got 4-D data .*; a series in time is registered by `python -m common ser"):
        main()


def test_from_a_film_to_files(
    film: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    words = ["--method", "sacb_net", "--spacing", SPACING, "--refine_steps", "8", "--device", "cpu"]
    words += ["--fixed_label", film.with_name("label.nii.gz")]
    series(monkeypatch, film, out, *words)
    assert capsys.readouterr().out.endswith("warped.nii.gz holds them in one space, series.png their motion\n")
    with (out / "series.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["phase"] for row in rows] == ["0", "1", "2", "3"] and float(rows[0]["disp_mean_mm"]) == 0
    assert float(rows[2]["disp_mean_mm"]) > max(0.5, float(rows[1]["disp_mean_mm"])), "the whole motion is in phase 2"
    assert all(float(row["ncc_after"]) > float(row["ncc_before"]) for row in rows[1:])
    assert len([name for name in rows[0] if name.startswith("volume_ml_")]) == 9
    warped, affine, _ = carry.read_film(out / "warped.nii.gz")
    frames = carry.read_film(film)[0]
    assert warped.shape == (4, *SIZE) and np.array_equal(warped[0], frames[0])
    np.testing.assert_allclose(affine, AFFINE, atol=1e-4)
    label = io.read_label(film.with_name("label.nii.gz"))[0][0]
    carried = carry.read_film(out / "labels.nii.gz")[0]
    assert np.array_equal(carried[0], label) and 0.02 < (carried[2] != label).mean() < 0.3
    assert (out / "series.png").stat().st_size > 5000
    with (out / "phases.csv").open() as file:
        starts = [row["start"] for row in csv.DictReader(file)]
    assert starts == ["", str(out / "phase_01" / "transform.h5"), str(out / "phase_02" / "transform.h5")]
    before = {path: path.stat().st_mtime_ns for path in out.glob("phase*/*")}
    shutil.rmtree(out / "phase_02")
    series(monkeypatch, film, out, *words)
    assert "1 of 3 pairs were done before" in capsys.readouterr().out
    changed = {path.parent.name for path in before if path.stat().st_mtime_ns != before[path]}
    assert changed == {"phase_02", "phase_03"}, "and what starts from it"


def test_to_the_mean(film: Path, tmp_path: Path) -> None:
    """Every phase is a pair; the one that is most like the mean begins."""
    files = phases_of(str(film), tmp_path / "phases")
    with open(table_of(files, tmp_path, "mean", cyclic=False, beside={})) as file:
        rows = list(csv.DictReader(file))
    assert sorted(row["id"] for row in rows) == [f"phase_0{n}" for n in range(4)] and rows[0]["start"] == ""
    assert all(row["start"].endswith("transform.h5") for row in rows[1:])
    assert {row["fixed"] for row in rows} == {str(tmp_path / "phases" / "mean.nii.gz")}
    assert rows[0]["id"] in ("phase_01", "phase_03"), "half of the motion"
    mean = io.read_scan(tmp_path / "phases" / "mean.nii.gz")[0]
    np.testing.assert_allclose(mean[0], carry.read_film(film)[0].mean(0), atol=1e-2)


def test_a_start_is_split_into_field_and_matrix() -> None:
    matrix, disp = np.diag([1.1, 1, 1, 1]), np.ones((3, 4, 4, 4), np.float32)
    whole = mapping.compose(mapping.displacement_transform(disp, np.eye(4)), mapping.affine_transform(matrix))
    found, before = mapping.split(whole)
    assert np.array_equal(found, matrix) and len(before.parts) == 1
    assert mapping.split(mapping.affine_transform(matrix))[1] is None
    assert np.array_equal(mapping.split(before)[0], np.eye(4))
