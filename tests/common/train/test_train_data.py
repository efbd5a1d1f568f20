"""Scans and pairs to train on."""

import json
from pathlib import Path

import pytest

from common import InputError
from common.run.data import list_pairs
from common.train import data


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("a.nii.gz", "b.nii.gz", "c.nii.gz"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def test_training_pairs(files: Path) -> None:
    """Only those that the dataset names, without its validation scans; a name that it does not know is refused."""

    def pairs(*named: tuple[str, str], training: str = "abc") -> list | None:
        content = {"training": [], "validation": []}
        for n in "abc":
            content["training" if n in training else "validation"].append({"id": n, "image": f"{n}.nii.gz"})
        content["training_pairs"] = [{"moving": moving, "fixed": fixed} for moving, fixed in named]
        (files / "dataset.json").write_text(json.dumps(content))
        return data.training_pairs(str(files))

    assert pairs() is None and data.training_pairs(None) is None
    assert pairs(("a", "b"), ("a", "c")) == [("a", "b"), ("a", "c")]
    assert pairs(("a", "b"), ("a", "c"), training="ab") == [("a", "b")]
    with pytest.raises(InputError, match="the training pairs' scan 'z' is not among the cases"):
        pairs(("a", "z"))
    with pytest.raises(InputError, match="no training pair has both its scans in the training part"):
        pairs(("a", "c"), training="ab")


def test_scans_of_a_plain_folder(files: Path) -> None:
    assert [scan["id"] for scan in data.list_scans(str(files))] == ["a", "b", "c"]
    assert data.validation_pairs(str(files)) is None
    with pytest.raises(InputError, match="no such folder"):
        data.list_scans(str(files / "none"))
    (files / "a.nii.gz").unlink(), (files / "b.nii.gz").unlink()
    with pytest.raises(InputError, match="holds 1 scans"):
        data.list_scans(str(files))


def test_ordered_pairs_are_all_and_each_loads_once() -> None:
    loads = []

    def load(scan: dict) -> dict:
        loads.append(scan["id"])
        return {**scan, "image": scan["id"] * 2}

    pairs = data.OrderedPairs([{"id": n} for n in "abc"], load)
    assert {pairs[n]["id"] for n in range(len(pairs))} == {f"{a}_to_{b}" for a in "abc" for b in "abc" if a != b}
    assert sorted(loads) == ["a", "b", "c"] and pairs[0]["moving"] == "aa"
    assert "kind" not in pairs[0]
    few = data.OrderedPairs([{"id": n} for n in "abc"], load, kind="same", limit=2)
    assert [few[n]["id"] for n in range(len(few))] == ["a_to_b", "a_to_c"] and few[0]["kind"] == "same"
    chosen = data.OrderedPairs([{"id": n} for n in "abc"], load, pairs=[("c", "a")])
    assert len(chosen) == 1 and chosen[0]["id"] == "c_to_a"


def test_dataset_pairs_and_scans(files: Path) -> None:
    case = {"a": "a.nii.gz", "b": "b.nii.gz", "c": "c.nii.gz"}
    cases = [{"id": name, "image": path, "label": path} for name, path in case.items()]
    pairs = [
        {"fixed": "a", "moving": "b", "kind": "inter-subject"},
        {"fixed": "a", "moving": "c", "kind": "same person"},
    ]
    content = {"training": cases[:2], "validation": cases, "registration_pairs": pairs}
    (files / "dataset.json").write_text(json.dumps(content))
    (pair,) = list_pairs(dataset_dir=str(files))
    assert pair["id"] == "b_to_a" and pair["fixed_label"] == str(files / "a.nii.gz")
    assert [scan["id"] for scan in data.list_scans(str(files), "training")] == ["a", "b"]
    assert data.validation_pairs(str(files)) == [("b", "a")]


def test_contrasts_in_a_dataset(files: Path) -> None:
    """As a list of files, in training and in pairs; the case is named after the first, if it has no id."""
    cases = [{"image": ["a.nii.gz", "b.nii.gz"], "label": "c.nii.gz"}, {"id": "x", "image": ["b.nii.gz", "c.nii.gz"]}]
    content = {"training": cases, "registration_pairs": [{"fixed": "x", "moving": "a"}]}
    (files / "dataset.json").write_text(json.dumps(content))
    first = ";".join(str(files / name) for name in cases[0]["image"])
    assert data.list_scans(str(files))[0] == {"id": "a", "image": first, "label": str(files / "c.nii.gz")}
    (row,) = list_pairs(dataset_dir=str(files))
    assert row["moving"] == first and row["id"] == "a_to_b" and row["moving_label"] == str(files / "c.nii.gz")


def test_decathlon_dataset(files: Path) -> None:
    """A dataset.json as the Decathlon ships it: no ids, the test part a list of paths, no validation part."""
    cases = [{"image": f"./imagesTr/s_{n:03d}.nii.gz", "label": f"./labelsTr/s_{n:03d}.nii.gz"} for n in range(25)]
    content = {"training": cases, "test": ["./imagesTs/s_900.nii.gz"], "labels": {"0": "background"}}
    (files / "dataset.json").write_text(json.dumps(content))
    train, validation = (data.list_scans(str(files), part) for part in ("training", "validation"))
    assert [scan["id"] for scan in validation] == ["s_023", "s_024"]
    assert len(train) == 23 and not {s["id"] for s in train} & {s["id"] for s in validation}
    assert train[0]["image"] == str(files / "imagesTr" / "s_000.nii.gz") and "label" in train[0]
    content["training"][3] = {"label": "x.nii.gz"}
    (files / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="dataset.json: a case of 'training' has no image"):
        data.list_scans(str(files))


def test_phantom_when_nothing_is_given(tmp_path: Path) -> None:
    (pair,) = list_pairs(output_dir=str(tmp_path))
    assert pair["id"] == "phantom" and all(Path(pair[key]).exists() for key in ("fixed", "moving", "moving_label"))
