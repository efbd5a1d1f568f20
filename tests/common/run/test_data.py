"""Pairs and scans: what is found, what is refused."""

from pathlib import Path

import pytest

from common import InputError
from common.run import data


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name in ("a.nii.gz", "b.nii.gz", "c.nii.gz"):
        (tmp_path / name).write_bytes(b"")
    return tmp_path


def csv_of(folder: Path, text: str) -> str:
    (folder / "pairs.csv").write_text(text)
    return str(folder / "pairs.csv")


def test_two_paths_make_one_pair(files: Path) -> None:
    (pair,) = data.list_pairs(moving=str(files / "a.nii.gz"), fixed=str(files / "b.nii.gz"))
    assert pair == {"id": "a_to_b", "moving": str(files / "a.nii.gz"), "fixed": str(files / "b.nii.gz")}


def test_csv_paths_are_relative_and_ids_unique(files: Path) -> None:
    text = "fixed,moving,id\nb.nii.gz,a.nii.gz,\nb.nii.gz,a.nii.gz,\nc.nii.gz,a.nii.gz,x/y z\n\n"
    pairs = data.list_pairs(pairs=csv_of(files, text))
    assert [pair["id"] for pair in pairs] == ["a_to_b", "a_to_b_2", "x_y_z"]
    assert pairs[2]["fixed"] == str(files / "c.nii.gz")


@pytest.mark.parametrize(
    "text, words",
    [
        ("fixed,moving\n", "holds no pairs"),
        ("", "needs the columns"),
        ("fixed\nb.nii.gz\n", "moving not found"),
        ("fixed,moving,colour\nb.nii.gz,a.nii.gz,red\n", "unknown column 'colour'"),
        ("fixed,moving\nb.nii.gz,\n", "line 2 lacks"),
        ("fixed,moving\nb.nii.gz,z.nii.gz\n", "z.nii.gz: no such file"),
        ("fixed,moving\nb.nii.gz,a.nii.gz;z.nii.gz\n", "z.nii.gz: no such file"),
    ],
)
def test_faulty_csv_is_refused(files: Path, text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        data.list_pairs(pairs=csv_of(files, text))


def test_contradictory_options_are_refused(files: Path) -> None:
    with pytest.raises(InputError, match="both --moving and --fixed"):
        data.list_pairs(moving=str(files / "a.nii.gz"))
    for others in ({"moving": "a", "fixed": "b"}, {"moving_label": "a"}, {"dataset_dir": "d"}):
        with pytest.raises(InputError, match="p.csv: give only one of --pairs or --"):
            data.list_pairs(pairs="p.csv", **others)
    with pytest.raises(InputError, match="d: give only one of --dataset_dir or --moving and --fixed"):
        data.list_pairs(dataset_dir="d", moving="a", fixed="b")
    with pytest.raises(InputError, match="a_label.nii.gz: a pair needs both --moving and --fixed"):
        data.list_pairs(moving_label="a_label.nii.gz")
    (files / "table.csv").write_bytes("fixed,moving\nü.nii.gz,b.nii.gz\n".encode("latin-1"))
    with pytest.raises(InputError, match="table.csv: not a CSV in UTF-8"):
        data.list_pairs(pairs=str(files / "table.csv"))
    with pytest.raises(InputError, match="no such file"):
        data.list_pairs(pairs=str(files / "none.csv"))


def test_a_missing_file_in_a_cohort_is_left_to_its_pair(files: Path) -> None:
    rows = data.list_pairs(pairs=csv_of(files, "fixed,moving\nb.nii.gz,z.nii.gz\nb.nii.gz,a.nii.gz\n"))
    assert [row["id"] for row in rows] == ["z_to_b", "a_to_b"]


def test_contrasts_are_a_list_or_joined(files: Path) -> None:
    """In options and in tables; the first one gives the name."""
    both = [str(files / "a.nii.gz"), str(files / "b.nii.gz")]
    (pair,) = data.list_pairs(moving=both, fixed=str(files / "c.nii.gz"))
    (row,) = data.list_pairs(pairs=csv_of(files, "moving,fixed\na.nii.gz; b.nii.gz,c.nii.gz\n"))
    assert pair == row and row["moving"] == ";".join(both) and row["id"] == "a_to_c"


def test_all_to_one_atlas(files: Path) -> None:
    """A table of moving scans, a folder of them, or the atlas as the moving scan of every pair."""
    atlas = {"fixed": str(files / "c.nii.gz"), "fixed_label": str(files / "b.nii.gz")}
    rows = data.list_pairs(pairs=csv_of(files, "moving\na.nii.gz\nb.nii.gz\n"), **atlas)
    assert [row["id"] for row in rows] == ["a_to_c", "b_to_c"]
    assert all(row["fixed_label"] == str(files / "b.nii.gz") for row in rows)
    rows = data.list_pairs(pairs=str(files), moving=str(files / "a.nii.gz"))
    assert [row["id"] for row in rows] == ["a_to_b", "a_to_c"], "the atlas is not registered with itself"
    with pytest.raises(InputError, match="has a column fixed, but the fixed scan is the same for all pairs"):
        data.list_pairs(pairs=csv_of(files, "moving,fixed\na.nii.gz,b.nii.gz\n"), **atlas)
    with pytest.raises(InputError, match="a folder of scans needs the one to register them with"):
        data.list_pairs(pairs=str(files))


def test_numbers_of_a_pair_are_columns(files: Path) -> None:
    """Where a cell is empty, the option of all pairs holds."""
    head = "fixed,moving,guide,holdout_points,lesion_margin,start\n"
    text = f"{head}b.nii.gz,a.nii.gz,0.1,0.5,4,c.nii.gz\nb.nii.gz,c.nii.gz,,,,\n"
    first, second = data.list_pairs(pairs=csv_of(files, text))
    assert (first["guide"], first["holdout_points"], first["lesion_margin"]) == (0.1, 0.5, 4.0)
    assert first["start"] == str(files / "c.nii.gz") and set(second) == {"id", "fixed", "moving"}
    for cell in ("much", "-1"):
        with pytest.raises(InputError, match=f"pairs.csv: line 2, --guide must be a number, 0 or more, got {cell}"):
            data.list_pairs(pairs=csv_of(files, f"fixed,moving,guide\nb.nii.gz,a.nii.gz,{cell}\n"))
    both = {"moving": str(files / "a.nii.gz"), "fixed": str(files / "b.nii.gz")}
    assert data.list_pairs(**both, start=str(files / "c.nii.gz"))[0]["start"] == str(files / "c.nii.gz")
    with pytest.raises(InputError, match="none.h5: no such file"):
        data.list_pairs(**both, start=str(files / "none.h5"))
    with pytest.raises(InputError, match="--start .*: is for one pair; in a table of pairs it is a column"):
        data.list_pairs(pairs=csv_of(files, text), start=str(files / "c.nii.gz"))
