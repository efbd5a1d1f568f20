"""Names and places: no value is ever code, a reference or a number by accident."""

import sys
from pathlib import Path

import pytest
from bundle_words import parsed, value

from common import InputError
from common.run.cli import sentence_of
from common.run.words import split

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
