"""Label maps as classes: tables, few-shot lists, and maps that do not fit."""

import json
from pathlib import Path

import pytest
import torch
from monai.data import MetaTensor

from common import InputError
from common.train.labels import UNKNOWN, ToClassesd, label_table


@pytest.fixture
def dataset(tmp_path: Path) -> str:
    """A labels.json with three groups, two of them sides, and two codes in no group."""
    groups = {
        "1": {"name": "Right Cortex", "members": [100, 102]},
        "2": {"name": "Stem", "members": [35]},
        "3": {"name": "Left Cortex", "members": [101, 103]},
    }
    full = {str(code): f"name {code}" for code in (0, 35, 46, 63)}
    full |= {"100": "Right Gyrus", "101": "Left Gyrus", "102": "Right Pole", "103": "Left Pole"}
    (tmp_path / "labels.json").write_text(json.dumps({"coarse27": groups, "full": full}))
    return str(tmp_path)


def test_table_of_a_dataset(dataset: str) -> None:
    table = label_table(3, dataset_dir=dataset)
    assert table.classes == [[100, 102], [35], [101, 103]]
    assert table.ignored == [46, 63] and table.mirrored == [(1, 3)]


def test_table_without_a_dataset(tmp_path: Path) -> None:
    """Nothing is known about sides then, which is not the same as that there are none."""
    assert label_table(3, dataset_dir=str(tmp_path)) == ([[1], [2], [3]], [], None, None)
    assert label_table(3, mirrored=[], dataset_dir=str(tmp_path)).mirrored == []
    assert label_table(2, dataset_dir=None).classes == [[1], [2]]


def test_table_by_hand(dataset: str) -> None:
    """What is given wins over labels.json, whose unused codes are not taken then either."""
    table = label_table(2, codes=[7, [8, 9]], ignored=[5, 8], mirrored=[[2, 1]], dataset_dir=dataset)
    assert table == ([[7], [8, 9]], [5], [(2, 1)], None)


def test_table_of_single_codes(dataset: str) -> None:
    """Sides by the names of the codes, whatever the groups are called; or of the classes given, code by code."""
    table = label_table(3, dataset_dir=dataset, fine=True)
    assert table.classes == [[100], [102], [35], [101], [103]] and table.class_of == [1, 1, 2, 3, 3]
    assert table.ignored == [46, 63] and table.mirrored == [(1, 4), (2, 5)]
    names = json.loads(Path(dataset, "labels.json").read_text())
    names["full"] |= {"102": "Pole R", "103": "Pole L"}  # then the order in the groups tells it, for all codes
    Path(dataset, "labels.json").write_text(json.dumps(names))
    assert label_table(3, dataset_dir=dataset, fine=True).mirrored == [(1, 4), (2, 5)]
    by_hand = {"codes": [7, [8, 9], [1, 2]], "fine": True}
    classes, class_of = [[7], [8], [9], [1], [2]], [1, 2, 2, 3, 3]
    assert label_table(3, mirrored=[[3, 2]], **by_hand) == (classes, [], [(4, 2), (5, 3)], class_of)
    assert label_table(3, **by_hand).mirrored is None
    with pytest.raises(InputError, match=r"\[1, 2\] have 1 and 2 codes, --fine_labels needs as many"):
        label_table(3, mirrored=[[1, 2]], **by_hand)


@pytest.mark.parametrize(
    "options, words",
    (
        ({"codes": [1, 2, 3]}, "--label_codes: has 3 classes, the network 2"),
        ({"codes": [1, [2, 1]]}, "--label_codes: code 1 must be in one class"),
        ({"codes": [0, 1]}, "code 0 must be in one class, and 0 is the background"),
        ({"mirrored": [[1, 3]]}, r"--mirrored_classes must be pairs of different classes up to 2, got \[\[1, 3\]\]"),
        ({"mirrored": [[1, 1]]}, "must be pairs of different classes"),
        ({"mirrored": [[1, 2, 1]]}, "must be pairs of different classes"),
        ({"mirrored": [1, 2]}, "must be pairs of different classes"),
        ({"mirrored": [[0, 1]]}, "must be pairs of different classes"),
        ({"codes": [1.0, 2.5]}, "--label_codes: a code of a label is a whole number, got 1.0"),
        ({"codes": ["a", 2]}, "--label_codes: a code of a label is a whole number, got 'a'"),
        ({"codes": 1}, "--label_codes: has 1 classes, the network 2"),
    ),
)
def test_table_rejects(options: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        label_table(2, **options)


def test_table_of_another_dataset_is_refused(dataset: str) -> None:
    with pytest.raises(InputError, match="labels.json: has 3 classes, the network 27"):
        label_table(27, dataset_dir=dataset)


# ---- scans ----------------------------------------------------------------------------------------------------------

TABLE = label_table(2, codes=[[10, 11], [20]], ignored=[5])


def scan(*codes: int, name: str = "a") -> dict:
    """A scan with one row of these codes as its label map."""
    data = {
        "id": name,
        "image": MetaTensor(torch.rand(1, max(len(codes), 4), 1, 1), meta={"filename_or_obj": f"{name}.nii"}),
    }
    if codes:
        data["label"] = MetaTensor(torch.tensor(codes, dtype=torch.float32).view(1, -1, 1, 1))
    return data


def classes_of(data: dict) -> list[int]:
    assert data["label"].dtype == torch.float32
    return data["label"].flatten().tolist()


def test_codes_become_classes() -> None:
    assert classes_of(ToClassesd(TABLE)(scan(0, 10, 5, 11, 20))) == [0, 1, 0, 1, 2]


@pytest.mark.parametrize("labelled", (["a"], "a"), ids=("list", "one"))
def test_few_shot(labelled: object) -> None:
    """Only the scans that are named teach; the others need no label map, and theirs is not looked at."""
    choose = ToClassesd(TABLE, labelled=labelled, scans=[scan(name=n) for n in "abc"])
    assert classes_of(choose(scan(10, 20, name="a"))) == [1, 2]
    for other in (scan(10, 20, 99, 10, name="b"), scan(name="c")):
        assert classes_of(choose(other)) == [UNKNOWN] * 4
    assert classes_of(ToClassesd(TABLE, labelled=[], scans=[])(scan(10, 0, 0, 0))) == [UNKNOWN] * 4


FAULTS = {
    "no map": ((), "has no label map"),
    "other codes": ((10, 99, -3, 0), r"has label codes that the config does not know \(-3, 99\)"),
    "no class": ((0, 5, 5, 0), "has a label map without any of the classes"),
}


@pytest.mark.parametrize("codes, words", FAULTS.values(), ids=FAULTS)
def test_bad_labels(codes: tuple[int, ...], words: str, capsys: pytest.CaptureFixture) -> None:
    """An error, or used without labels and said, as the config asks."""
    with pytest.raises(InputError, match=f"^a.nii: {words}; give --bad_labels unlabelled"):
        ToClassesd(TABLE)(scan(*codes))
    assert classes_of(ToClassesd(TABLE, bad_labels="unlabelled")(scan(*codes))) == [UNKNOWN] * 4
    assert capsys.readouterr().out.startswith("a.nii: used without labels, it has")


def test_label_maps_that_cannot_be_loaded(capsys: pytest.CaptureFixture) -> None:
    """A fault of the label map is one of `bad_labels`; one of the scan is not; what is not wanted is not loaded."""

    def loading(data: dict) -> dict:
        if "label" in data or data["id"] == "broken":
            raise InputError(f"{data['id']}_label.nii: no such file")
        return data

    with pytest.raises(InputError, match=r"^a.nii: has a label map that cannot be used \(a_label.nii: no such file\)"):
        ToClassesd(TABLE, loading=loading)(scan(10, 20, 0, 0))
    lenient = ToClassesd(TABLE, bad_labels="unlabelled", loading=loading)
    assert classes_of(lenient(scan(10, 20, 0, 0))) == [UNKNOWN] * 4
    assert "used without labels, it has a label map that cannot be used" in capsys.readouterr().out
    with pytest.raises(InputError, match="^broken_label.nii"):
        lenient(scan(name="broken"))
    assert classes_of(ToClassesd(TABLE, labelled=[], loading=loading)(scan(10, 20, 0, 0))) == [UNKNOWN] * 4
    assert not capsys.readouterr().out


def test_rejects() -> None:
    with pytest.raises(InputError, match="--bad_labels must be one of error, unlabelled, got drop"):
        ToClassesd(TABLE, bad_labels="drop")
    with pytest.raises(InputError, match="--labelled: there is no scan 'z' to train on"):
        ToClassesd(TABLE, labelled=["a", "z"], scans=[scan(name="a")])
