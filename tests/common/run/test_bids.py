"""`monai-register bids`: every T1w scan to a template, under BIDS names; mistakes in a sentence."""

import gzip
import json
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from people import SPACING, write_person

from common import InputError
from common.__main__ import register_main
from common.run.bids import t1w_scans
from common.space import mapping
from common.space.io import read_scan
from common.space.transform_files import read_transform

STEMS = ("sub-01/anat/sub-01", "sub-02/ses-a/anat/sub-02_ses-a_run-1", "sub-02/ses-b/anat/sub-02_ses-b")


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two people, one of them seen twice, and a template."""
    folder = tmp_path_factory.mktemp("bids")
    template = write_person(folder, "tpl-Phantom_T1w", 9)
    for seed, stem in enumerate(STEMS):
        path = folder / "raw" / f"{stem}_T1w.nii.gz"
        path.parent.mkdir(parents=True)
        shutil.copy(write_person(folder, f"p{seed}", seed), path)
    (folder / "raw" / "sub-01/anat/sub-01_T2w.nii.gz").write_bytes(template.read_bytes())
    (folder / "raw" / "sub-01/anat/sub-01_T1w.json").write_text("{}")
    (folder / "raw" / "dataset_description.json").write_text(json.dumps({"Name": "Two", "BIDSVersion": "1.9.0"}))
    return folder


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["monai-register", "bids", *map(str, words)])
    register_main()


def test_derivative(scans: Path, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    """Names, sidecars, description; and the transform under its BIDS name gives the scan under its."""
    template = scans / "tpl-Phantom_T1w.nii.gz"
    words = ["--method", "samconvex", "--features", "mind", "--spacing", SPACING, "--device", "cpu"]
    words = [scans / "raw", tmp_path / "out", "participant", "--fixed", template, *words, "--save_inverse", "True"]
    call(monkeypatch, *words)
    out = tmp_path / "out"
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.endswith("3 of 3 scans in the space Phantom; look at pairs/index.html")
    for stem in STEMS:
        warped = Path(f"{out / stem}_space-Phantom_T1w.nii.gz")
        ways = ("from-T1w_to-Phantom", "from-Phantom_to-T1w")
        forward, back = (Path(f"{out / stem}_{way}_mode-image_xfm.h5") for way in ways)
        fixed, affine = read_scan(template)
        moving, place = read_scan(scans / "raw" / f"{stem}_T1w.nii.gz")
        found, onto = read_scan(warped)
        np.testing.assert_allclose(onto, affine, atol=1e-5)
        again = mapping.resample(moving[0], place, fixed.shape[1:], affine, read_transform(forward))
        assert np.abs(again - found[0]).max() < 1e-3 * moving.max()
        points = np.array([[10.0, -20, 5], [-15, 12, -8]])
        there = mapping.map_points(read_transform(forward), points)
        returned = mapping.map_points(read_transform(back), there)
        assert np.linalg.norm(there - points, axis=1).min() > 0.5 > np.linalg.norm(returned - points, axis=1).max()
        about = json.loads(Path(f"{out / stem}_space-Phantom_T1w.json").read_text())
        assert about["Sources"] == [f"bids:raw:{stem}_T1w.nii.gz"] and about["SpatialReference"] == str(template)
        assert about["Verdict"] in ("plausible", "doubtful")
        assert json.loads(forward.with_suffix(".json").read_text()) == {"Sources": about["Sources"]}
        (figure,) = (warped.parents[1] / "figures").glob(f"{Path(stem).name}_*.png")
        assert figure.name == f"{Path(stem).name}_space-Phantom_desc-registration_T1w.png"
    told = json.loads((out / "dataset_description.json").read_text())
    assert told["Name"] == "Two, registered to Phantom" and told["DatasetType"] == "derivative"
    assert told["DatasetLinks"]["raw"] == (scans / "raw").resolve().as_uri() and told["GeneratedBy"][0]["Version"]
    assert (out / "pairs" / "index.html").is_file() and "pairs/" in (out / ".bidsignore").read_text()
    before = {path: path.stat().st_mtime_ns for path in out.glob("pairs/*/transform.h5")}
    call(monkeypatch, *words)
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("pairs/*/transform.h5")}, "done once"


def test_scans_are_found(scans: Path, tmp_path: Path) -> None:
    """T1w alone, of whom is asked for; .nii too."""
    found = t1w_scans(scans / "raw", [])
    assert [str(scan.path.relative_to(scans / "raw")) for scan in found] == [f"{stem}_T1w.nii.gz" for stem in STEMS]
    assert [scan.stem for scan in t1w_scans(scans / "raw", ["02"])] == ["sub-02_ses-a_run-1", "sub-02_ses-b"]
    plain = tmp_path / "sub-x" / "anat" / "sub-x_T1w.nii"
    plain.parent.mkdir(parents=True)
    plain.write_bytes(gzip.decompress(found[0].path.read_bytes()))
    (one,) = t1w_scans(tmp_path, [])
    assert one.stem == "sub-x" and nib.load(one.path).shape == nib.load(found[0].path).shape
    with pytest.raises(InputError, match="no T1w scan"):
        t1w_scans(scans, [])


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["raw", "o"], "bids needs BIDS_DIR OUT participant"),
        (["raw", "o", "group", "--fixed", "t"], "group: is no level of analysis here, there is only participant"),
        (["raw", "o", "participant"], "bids needs --fixed TEMPLATE"),
        (["raw", "o", "participant", "x", "--fixed", "t"], "x: is one word too many"),
        (["raw", "o", "participant", "--fixed", "t", "--moving", "m"], "--moving: there is no such option here"),
        (["raw", "o", "participant", "--fixed", "t", "--space", "a b"], "--space must be of letters and digits"),
        (["raw", "o", "participant", "--fixed", "t", "--participant_label", "7"], "--participant_label 7: raw has no"),
        (["no", "o", "participant", "--fixed", "t"], "no: no such folder"),
        (["raw", "o", "participant", "--fixed", "t"], "t: no such file"),
    ],
)
def test_mistakes(words: list[str], sentence: str, scans: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is written."""
    monkeypatch.chdir(scans)
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, *words)
    assert str(caught.value).startswith(f"error: {sentence}")
    assert not (scans / "o").exists()


@pytest.mark.parametrize("text", ["{", "[]"])
def test_description_that_is_none(text: str, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(scans / "raw", tmp_path / "raw")
    (tmp_path / "raw" / "dataset_description.json").write_text(text)
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, tmp_path / "raw", tmp_path / "o", "participant", "--fixed", scans / "tpl-Phantom_T1w.nii.gz")
    assert "dataset_description.json: is not a JSON object" in str(caught.value) and not (tmp_path / "o").exists()
