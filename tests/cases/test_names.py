"""Names and places: no value is ever code, a reference or a number by accident."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import fire
import pytest
from bundle_words import parsed, value
from forks import PATIENCE

from common import InputError
from common.run.cli import exact_words, sentence_of
from common.run.data import absolute, list_pairs, unique
from common.run.line import split
from common.space.io import contrasts_of
from common.train.data import list_scans

STRANGE = [
    "study#2/m.nii.gz",
    "@fixed",
    "a@b/m.nii.gz",
    "$HOME/m.nii.gz",
    "100%/m.nii.gz",
    "a;b.nii.gz",
    "Doe,Jane",
    "my scans/m (1).nii.gz",
    "[a,b]",
    "{'_target_': 'os.getcwd'}",
    "2021_03_15",
    "2024",
    "1.10",
    "1e5",
    "0x10",
    "None",
    "True",
    "-x.nii.gz",
    "-5",
    "~/m.nii.gz",
    "'quoted'",
    "ü/日本語/\U0001f9e0.nii.gz",
    "n" * 250,
]


@pytest.mark.parametrize("name", STRANGE, ids=lambda name: name[:30].encode("ascii", "replace").decode())
@pytest.mark.parametrize("equals", [True, False], ids=["equals", "apart"])
def test_a_path_is_what_was_typed(monkeypatch: pytest.MonkeyPatch, name: str, equals: bool) -> None:
    words = [f"--moving={name}"] if equals else ["--moving", name]
    parser = parsed(monkeypatch, *words, "--fixed", name + "_", "--output_dir", name)
    assert parser.get_parsed_content("moving") == name
    assert parser.get_parsed_content("fixed") == name + "_"
    assert parser.get_parsed_content("output_dir") == name
    assert parser.get_parsed_content("postprocessing").transforms[0].output_dir == Path(name)


@pytest.mark.parametrize("config, bundle", [("inference", "samconvex"), ("train", "sacb_net")])
@pytest.mark.parametrize("option", ["--output_dir", "-output_dir", "--output-dir"])
def test_code_is_not_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, config: str, bundle: str, option: str
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "$open('made', 'w')"
    assert value(monkeypatch, "output_dir", option, name, config=config, bundle=bundle) == name
    assert not (tmp_path / "made").exists()


def test_a_name_in_an_expression_of_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    """ckpt_dir is made from output_dir by code of the config itself."""
    assert value(monkeypatch, "ckpt_dir", "--output_dir", "run#2/2024", config="train") == "run#2/2024/models"


@pytest.mark.parametrize(
    "word",
    ["$open('made', 'w')", "@output_dir", "%other.json", "{'_target_': 'os.getcwd'}", "[1, '$exit()']"],
)
@pytest.mark.parametrize("name", ["network_def::channels", "network_def#channels", "evaluator"])
def test_code_for_other_parts_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, word: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if word.startswith("%"):
        (tmp_path / "other.json").write_text("{}")
    with pytest.raises(Exception) as caught:
        parsed(monkeypatch, f"--{name}", word)
    text = f"--{name}: values of a command line are never evaluated; write {word} into a config file"
    assert sentence_of(caught.value) == text and not (tmp_path / "made").exists()


def test_arguments_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = parsed(monkeypatch, "--network_def::sacb_scales", "[5,4]", "--network_def#mean_type", "a", "--weights", "")
    assert parser["network_def"]["sacb_scales"] == [5, 4] and parser["network_def"]["mean_type"] == "a"
    assert parser.get_parsed_content("weights") == ""


def test_how_words_are_split() -> None:
    known = {"moving", "fixed", "resume", "output_dir"}
    found = split(["inference", "--moving", "-m", "--fixed=a=b", "--output-dir", "-5", "--noresume"], known)
    assert found.options == {"moving": "-m", "fixed": "a=b", "output_dir": "-5", "resume": "False"}
    assert found.others == ["inference"]
    assert split(["--moving", "--fixed", "x"], known).options == {"moving": None, "fixed": "x"}
    with pytest.raises(InputError, match="--moving: is given twice"):
        split(["--moving", "a", "--moving", "b"], known)


def test_another_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a config's user has on the command line of a program of his own is nobody's business here."""
    from monai.bundle import ConfigWorkflow

    root = Path(__file__).resolve().parents[2] / "bundles" / "sacb_net"
    monkeypatch.setattr(sys, "argv", ["mine.py", "--moving", "other.nii.gz", "--verbose"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    workflow = ConfigWorkflow(
        str(root / "configs" / "inference.json"), logging_file=False, bundle_root=str(root), moving="mine.nii.gz"
    )
    workflow.initialize()
    assert workflow.parser.get_parsed_content("moving") == "mine.nii.gz"


def test_scans_of_one_name_in_two_folders(tmp_path: Path) -> None:
    """Two commands with one folder for the results: each its own; the same one again finds its place again."""
    out = tmp_path / "out"
    for person in ("01", "02", "03"):
        (tmp_path / person).mkdir()
        (tmp_path / person / "T1.nii.gz").touch()

    def name(person: str) -> str:
        options = {"moving": str(tmp_path / person / "T1.nii.gz"), "fixed": str(tmp_path / "01" / "T1.nii.gz")}
        (row,) = list_pairs(**options, output_dir=str(out))
        (out / row["id"]).mkdir(parents=True, exist_ok=True)
        (out / row["id"] / "report.json").write_text(json.dumps({n: row[n] for n in ("id", "fixed", "moving")}))
        return row["id"]

    assert [name(person) for person in ("02", "03", "02", "03")] == ["T1_to_T1", "T1_to_T1_2"] * 2


def test_ids_are_names_that_a_folder_can_have() -> None:
    taken: set[str] = set()
    long = [unique("ü" * 150 + end, taken) for end in "ab"]
    assert all(len(name.encode()) <= 200 for name in long) and long[0] != long[1] and long[0].startswith("ü" * 50)
    names = [unique(name, taken) for name in ("A b", "a_b", "a_B", "..", "")]
    assert names == ["A_b", "a_b_2", "a_B_3", "pair", "pair_2"]
    assert unique("u\u0308", taken) == "ü" and unique("ü", taken) == "ü_2"


def test_semicolons_in_names(tmp_path: Path) -> None:
    (tmp_path / "x;y").mkdir()
    for name in ("a;b.nii.gz", "t1.nii.gz", "t2.nii.gz"):
        (tmp_path / "x;y" / name).touch()
    one, two = str(tmp_path / "x;y" / "a;b.nii.gz"), [str(tmp_path / "x;y" / f"{n}.nii.gz") for n in ("t1", "t2")]
    assert contrasts_of(one) == [one] and contrasts_of(";".join(two)) == two and contrasts_of("; ".join(two)) == two
    assert contrasts_of("none;there.nii.gz") == ["none", "there.nii.gz"]
    assert absolute("a;b.nii.gz", tmp_path / "x;y") == one and absolute(["t1.nii.gz", "t2.nii.gz"]).count(";") == 1


@pytest.mark.parametrize("name", [name for name in STRANGE if "/" not in name and len(name) < 200])
def test_cells_of_a_table(tmp_path: Path, name: str) -> None:
    """Any name, in a CSV: as it stands."""
    table = tmp_path / "pairs.csv"
    for file in (name, "f.nii.gz"):
        (tmp_path / file).touch()
    with table.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("fixed", "moving"), ("f.nii.gz", name)])
    (row,) = list_pairs(pairs=str(table), output_dir=str(tmp_path))
    assert row["moving"] == str(tmp_path / name)


def test_hidden_files_are_no_scans(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz", "._a.nii.gz", "._b.nii.gz"):
        (tmp_path / name).touch()
    assert [row["id"] for row in list_pairs(pairs=str(tmp_path), fixed=str(tmp_path / "a.nii.gz"))] == ["b_to_a"]
    assert [scan["id"] for scan in list_scans(str(tmp_path))] == ["a", "b"]


TABLE = """
import sys
from pathlib import Path
from common.run.cohort import read_table
from common.space.io import write_table
write_table(Path("t.csv"), [{"id": sys.argv[1], "fixed": "日本語"}])
print(ascii(read_table(Path("t.csv"))))
"""


def test_tables_are_utf8_whatever_the_system(tmp_path: Path) -> None:
    """Also a name that is no UTF-8, as of an old disk, comes out as it went in."""
    (tmp_path / "made.py").write_text(TABLE, encoding="utf-8")
    environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2])}
    line = [os.fsencode(sys.executable), b"made.py", b"m\xfcller"]
    done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr.decode(errors="replace")
    assert (tmp_path / "t.csv").read_bytes() == b"id,fixed\r\nm\xfcller," + "日本語".encode() + b"\r\n"
    assert done.stdout.decode().strip() == ascii([{"id": "m\udcfcller", "fixed": "日本語"}])


@pytest.mark.parametrize("name", [name for name in STRANGE if name[0] != "-"])
def test_words_of_common(name: str) -> None:
    """Through fire, to a command of `python -m common`."""

    def some(file: str, *more: str, reference: str = "", label: bool = False, number: float = 0) -> tuple:
        return file, more, reference, label, number

    words = exact_words("some", some, [name, "--label", "--reference", name, "x", "--number=2"])
    assert fire.Fire(some, command=words, serialize=lambda found: "") == (name, ("x",), name, True, 2)


def test_what_common_refuses() -> None:
    def some(file: str, output: str, *, reference: str = "", label: bool = False) -> None: ...

    refused = {
        ("a",): "some needs OUTPUT as well; python -m common some --help",
        ("a", "b", "c"): "c: is one word too many for some; python -m common some --help",
        ("a", "b", "--reference"): "--reference: needs a value",
        ("a", "b", "--label=maybe"): "--label: is True or False, got maybe",
        ("a", "b", "--labels"): "--labels: there is no such option, did you mean --label?",
        ("a", "b", "-r", "c", "--reference", "d"): "--reference: is given twice",
    }
    for words, sentence in refused.items():
        with pytest.raises(InputError) as caught:
            exact_words("some", some, list(words))
        assert str(caught.value) == sentence
    found = exact_words("some", some, ["a", "--label", "b", "-r", "2024"])
    assert found == ["'a'", "--label=True", "'b'", "--reference='2024'"]
