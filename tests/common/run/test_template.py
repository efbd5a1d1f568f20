"""A template of three small people: mean shape, files, a run that is killed and goes on, and what is refused."""

import csv
import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from people import label_of, write_person

from common import InputError
from common.run import door
from common.run.registrar import Registrar
from common.run.template import make_template
from common.space import average, io, mapping
from common.space.transform_files import read_transform

OPTIONS = {"method": "samconvex", "features": "mind", "spacing": 6, "device": "cpu"}
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SCANS and LABELS, of three people of different shapes, poses and grids."""
    folder = tmp_path_factory.mktemp("people")
    for number, name in enumerate(NAMES):
        write_person(folder / "all", name, number)
    for kind in ("scans", "labels"):
        (folder / kind).mkdir()
    for name in NAMES:
        shutil.copy(folder / "all" / f"{name}.nii.gz", folder / "scans")
        shutil.copy(label_of(folder / "all", name), folder / "labels")
    return folder


@pytest.fixture(scope="module")
def out(people: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("template") / "out"
    return make_template(people / "scans", where, labels=str(people / "labels"), rounds=2, **OPTIONS)


def volumes(out: Path) -> dict[str, np.ndarray]:
    return {path.relative_to(out).as_posix(): io.read_scan(path)[0] for path in sorted(out.rglob("*.nii.gz"))}


def test_what_is_written(out: Path) -> None:
    names = {path.name for path in out.iterdir()}
    assert names == {*NAMES, "rounds", "results.csv"} | {
        f"{name}.nii.gz" for name in ("template", "mean", "spread", "template_label")
    } | {"template.json", "template.png"}
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["id"] for row in rows] == list(NAMES)
    assert all(0.5 < float(row["dice_with_vote"]) < 1 and float(row["folding_pct"]) == 0 for row in rows)
    assert not list(out.glob("rounds/*/[abc].h5")), "the maps of a round are kept by the people's folders alone"
    told = json.loads((out / "template.json").read_text())
    assert told["method"]["bundle"] == "samconvex" and len(told["rounds"]) == 3


def test_transforms_make_the_template(out: Path, people: Path) -> None:
    """mean.nii.gz and the votes are those of the people's scans and label maps under their transform.h5."""
    mean, affine = io.read_scan(out / "mean.nii.gz")
    grid, seen, labels = (mean.shape[1:], affine), [], []
    for name in NAMES:
        the_map = read_transform(out / name / "transform.h5")
        scan, own = io.read_scan(people / "scans" / f"{name}.nii.gz")
        top = np.percentile(scan[scan > 0], 99.5)
        seen.append(mapping.resample(scan[0], own, *grid, the_map) / top)
        label = io.read_label(people / "labels" / f"{name}.nii.gz")[0][0]
        labels.append(mapping.resample(label, own, *grid, the_map, voted=True))
    np.testing.assert_allclose(mean[0], np.mean(seen, 0), atol=1e-5)
    np.testing.assert_array_equal(io.read_label(out / "template_label.nii.gz")[0][0], average.vote(np.stack(labels)))


def test_shape_is_the_mean(out: Path) -> None:
    """The mean of the maps, poses left out, is the identity: 0.1 mm on voxels of 4.5 mm, people 4 mm apart."""
    mean, affine = io.read_scan(out / "mean.nii.gz")
    maps = [read_transform(out / name / "transform.h5") for name in NAMES]
    left = mapping.displacement_mm(average.mean_map(maps, (mean.shape[1:], affine)), mean.shape[1:], affine)
    apart = mapping.displacement_mm(average.mean_map(maps[:1], (mean.shape[1:], affine)), mean.shape[1:], affine)
    inside = mean[0] > 0.3
    assert np.linalg.norm(left, axis=0)[inside].mean() < 0.1
    assert np.linalg.norm(apart, axis=0)[inside].mean() > 1.0


def test_rounds_sharpen_the_mean(out: Path) -> None:
    told = json.loads((out / "template.json").read_text())["rounds"]
    assert told[0]["slope"] < told[2]["slope"] <= told[2]["slope_sharpened"] <= 1.02 * told[2]["slope_scans"]
    spread = {n: io.read_scan(out / "rounds" / n / "spread.nii.gz")[0].mean() for n in "02"}
    assert spread["2"] < spread["0"]


def test_killed_and_started_again(out: Path, people: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After four of six registrations, in the second round: the other two are done, and every value is the same."""
    register, done = Registrar.register, []

    def counted(self, moving, *args, **kwargs):
        if len(done) == stop:
            raise KeyboardInterrupt
        done.append(moving)
        return register(self, moving, *args, **kwargs)

    monkeypatch.setattr(Registrar, "register", counted)
    line = {"labels": str(people / "labels"), "rounds": 2} | OPTIONS
    stop = 4
    with pytest.raises(KeyboardInterrupt):
        make_template(people / "scans", tmp_path / "out", **line)
    assert (tmp_path / "out" / "rounds" / "1" / "template.nii.gz").exists()
    assert not (tmp_path / "out" / "template.nii.gz").exists()
    stop = 6
    make_template(people / "scans", tmp_path / "out", **line)
    assert [Path(scan).name[0] for scan in done] == list("abcabc")
    expected, found = volumes(out), volumes(tmp_path / "out")
    assert expected.keys() == found.keys() and len(found) > 8
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    for name in NAMES:
        both = [(folder / name / "transform.h5").read_bytes() for folder in (out, tmp_path / "out")]
        assert both[0] == both[1]


def test_again_there_is_nothing_to_do(out: Path, people: Path, capsys: pytest.CaptureFixture) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.nii.gz")}
    make_template(people / "scans", out, labels=str(people / "labels"), rounds=2, **OPTIONS)
    assert "nothing is left to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.nii.gz")} == stamps


def test_other_settings_begin_anew(people: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Here of rounds of 0, the affine mean, which is quick; in a grid of its own size."""
    for voxel_size, said in ((8, False), (9, True)):
        make_template(people / "scans", tmp_path / "out", rounds=0, voxel_size=voxel_size, **OPTIONS)
        assert ("begins anew" in capsys.readouterr().out) is said
        affine = nib.load(tmp_path / "out" / "template.nii.gz").affine
        np.testing.assert_allclose(np.linalg.norm(affine[:3, :3], axis=0), voxel_size, atol=1e-3)


def test_scans_in_one_space_keep_their_grid(people: Path, tmp_path: Path) -> None:
    scan, affine = io.read_scan(people / "scans" / "a.nii.gz")
    (tmp_path / "in").mkdir()
    straight = np.diag([4.5, 4.5, 4.5, 1.0])
    for n in range(2):
        io.write_scan(np.roll(scan, n, 1), straight, tmp_path / "in" / f"{n}.nii.gz")
    out = make_template(tmp_path / "in", tmp_path / "out", rounds=0, prealign="none", **OPTIONS)
    mean, where = io.read_scan(out / "mean.nii.gz")
    np.testing.assert_allclose(where, straight, atol=1e-5)
    top = np.percentile(scan[scan > 0], 99.5)
    np.testing.assert_allclose(mean, (scan + np.roll(scan, 1, 1)) / 2 / top, atol=1e-5)


def refused(words: list, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        door.template([str(word) for word in words])
    assert sentence in str(caught.value)


def test_bad_scans(people: Path, tmp_path: Path) -> None:
    scans, alone = people / "scans", tmp_path / "alone"
    out = tmp_path / "out"
    refused([tmp_path / "none", out], f"{tmp_path / 'none'}: no such file")
    alone.mkdir()
    refused([alone, out], f"{alone}: holds no scans")
    shutil.copy(scans / "a.nii.gz", alone)
    refused([alone, out], f"{alone}: a template needs at least two scans, there is only {alone / 'a.nii.gz'}")
    scan, affine = io.read_scan(scans / "b.nii.gz")
    io.write_scan(np.concatenate([scan, scan]), affine, alone / "two.nii.gz")
    sentence = f"{alone / 'two.nii.gz'}: has 2 channels, the first scan {alone / 'a.nii.gz'} has 1"
    refused([alone, out], sentence)
    (tmp_path / "pairs.csv").write_text(f"moving,fixed\n{scans / 'a.nii.gz'},{scans / 'b.nii.gz'}\n")
    refused([tmp_path / "pairs.csv", out], "has a column fixed, but the fixed scan is the same for all pairs")
    refused([scans, scans], f"{scans}: holds the scans; the template needs a folder of its own")
    refused([scans, out, "--labels", tmp_path / "none"], "--labels")
    refused([scans, out, "--labels", tmp_path], f"--labels {tmp_path}: holds no label map with the file name of a scan")
    assert not out.exists(), "nothing is written before all is looked at"


def test_bad_words(people: Path, tmp_path: Path) -> None:
    scans, out = people / "scans", tmp_path / "out"
    refused([scans], "template needs SCANS and OUT")
    refused([scans, out, "more"], "more: is one word too many")
    refused([scans, out, "--rounds", "-1"], "--rounds must be a whole number from 0 to 50, got -1")
    refused([scans, out, "--round", "2"], "--round: there is no such option, did you mean --rounds?")
    refused([scans, out, "--guide", "1"], "--guide: there is no such option here, it belongs to")
    refused([scans, out, "--method", "none"], "none: no such bundle")
    refused([scans, out, "--voxel_size", "0"], "--voxel_size must be a number from 0.01 to 100, got 0")
    assert "--voxel_size" in door.template(["--help"]) and not out.exists()
