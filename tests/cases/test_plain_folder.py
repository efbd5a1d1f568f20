"""Training on a folder without a dataset.json: what is validated is not trained on."""

from pathlib import Path

import pytest
from bundle_words import parsed, value

from common.train.data import list_scans


@pytest.mark.parametrize("count, kept", [(4, 2), (12, 2), (40, 4)])
def test_scans_are_kept_apart(tmp_path: Path, count: int, kept: int) -> None:
    for n in range(count):
        (tmp_path / f"{n:02}.nii.gz").touch()
    parts = [[scan["id"] for scan in list_scans(str(tmp_path), part)] for part in ("training", "validation")]
    assert parts == [[f"{n:02}" for n in range(count - kept)], [f"{n:02}" for n in range(count - kept, count)]]


def test_too_few_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in "abc":
        (tmp_path / f"{name}.nii.gz").touch()
    assert [scan["id"] for scan in list_scans(str(tmp_path))] == ["a", "b", "c"] and capsys.readouterr().out == ""
    assert [scan["id"] for scan in list_scans(str(tmp_path), "validation")] == ["b", "c"]
    text = "too few scans to keep any apart: the validation is on scans of the training"
    assert capsys.readouterr().out == f"{tmp_path}: {text}\n"


def test_label_maps_beside_scans_are_no_scans(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("a", "a_label", "b", "b-seg", "c", "c.mask", "d_label"):
        (tmp_path / f"{name}.nii.gz").touch()
    assert [scan["id"] for part in ("training", "validation") for scan in list_scans(str(tmp_path), part)] == [
        *("a", "b"),
        *("c", "d_label"),
    ]
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path}: 3 files, first a_label.nii.gz, are left out: by their names")


def test_labels_by_name(tmp_path: Path) -> None:
    for folder in ("images", "labels"):
        (tmp_path / folder).mkdir()
        for name in ("a.nii.gz", "b.nrrd", "._a.nii.gz"):
            (tmp_path / folder / name).touch()
    (tmp_path / "labels" / "b.nrrd").unlink()
    image, label = (str(tmp_path / folder / "a.nii.gz") for folder in ("images", "labels"))
    second = {"id": "b", "image": str(tmp_path / "images" / "b.nrrd")}
    assert list_scans(str(tmp_path)) == [{"id": "a", "image": image, "label": label}, second]


def test_training_of_the_embedded_pair(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing given: its two scans do not share a grid, so they are aligned; a folder's scans are not."""
    parser = parsed(monkeypatch, "--spacing", "8", "--output_dir", str(tmp_path), config="train")
    assert parser.get_parsed_content("prealign") == "affine"
    assert parser.get_parsed_content("train::dataset")[0]["image"].shape[0] == 2
    assert value(monkeypatch, "prealign", "--dataset_dir", str(tmp_path), config="train") == "none"
