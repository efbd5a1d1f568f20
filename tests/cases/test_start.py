"""`python -m common run`: config files that are wrong end in a sentence, and no word of an option reaches MONAI."""

import json
import sys
from pathlib import Path

import monai.bundle
import pytest

from common.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
BUNDLE = ROOT / "bundles" / "sacb_net"
CONFIGS = BUNDLE / "configs"


def said(patch: pytest.MonkeyPatch, *words: str) -> object:
    """What `python -m common run WORDS` ends with."""
    patch.setattr(sys, "argv", ["common", "run", *words])
    patch.setattr(sys, "path", list(sys.path))
    patch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    contents = {"cut.json": '{\n"a": [1,\n', "five.json": "5", "other.json": '{"run": []}', "cut.yaml": "a: [1"}
    contents |= {"args.json": json.dumps({"config_file": str(CONFIGS / "infer.json")})}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    return tmp_path


WRONG = {
    ("--config_file", "CONFIGS/infrence.json"): "--config_file CONFIGS/infrence.json: no such file; did you mean "
    "CONFIGS/inference.json?",
    ("--config_file=CONFIGS/infer.jsn",): "--config_file CONFIGS/infer.jsn: must be one of .json, .yaml, .yml; did "
    "you mean CONFIGS/inference.json?",
    ("--config_file", "nowhere/a.json"): "--config_file nowhere/a.json: no such file; there is no folder nowhere",
    ("--config_file", "['CONFIGS/inference.json','CONFIGS/x.json']"): "--config_file CONFIGS/x.json: no such file; ",
    ("--config_file", "HERE/cut.json"): "--config_file HERE/cut.json: cannot be read (Expecting value: line 3 column",
    ("--config_file", "HERE/cut.yaml"): "--config_file HERE/cut.yaml: cannot be read (while parsing a flow sequence",
    ("--config_file", "HERE/five.json"): "--config_file HERE/five.json: must hold a dictionary, got int",
    ("--config_file", "HERE/other.json"): "--config_file HERE/other.json: is no config of these bundles; ",
    ("--args_file", "HERE/args.json"): "--config_file CONFIGS/infer.json: no such file; did you mean ",
    ("--args_file", "HERE/no.json"): "--args_file HERE/no.json: no such file; ",
    ("--config_file",): "run needs the config of a bundle: python -m common run --config_file CONFIG ",
    ("--moving", "a.nii.gz"): "run needs the config of a bundle: python -m common run --config_file CONFIG ",
    ("--config_file", "CONFIGS/inference.json", "--bundle_root", "$x"): "--bundle_root: needs the folder of the bundle",
    ("--config_file", "CONFIGS/inference.json", "--bundle_root", "%x"): "--bundle_root: needs the folder of the bundle",
    ("--config_file", "CONFIGS/inference.json", "--moveing", "x"): "--moveing: there is no such option, did you mean "
    "--moving?",
    ("--config_file", "CONFIGS/inference.json", "--network_def::channels", "%a.json"): "--network_def::channels: "
    "values of a command line are never evaluated",
}


@pytest.mark.parametrize("words", WRONG, ids=" ".join)
def test_what_is_wrong_is_a_sentence(monkeypatch: pytest.MonkeyPatch, folder: Path, words: tuple[str, ...]) -> None:
    places = {"CONFIGS": str(CONFIGS), "HERE": str(folder)}

    def placed(text: str) -> str:
        for name, place in places.items():
            text = text.replace(name, place)
        return text

    code = said(monkeypatch, *map(placed, words))
    assert isinstance(code, str) and code.startswith("error: " + placed(WRONG[words])) and "\n" not in code


def test_a_name_that_begins_with_a_mark_of_monai(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """%name is no file that MONAI would put in its place: it is a name, and MONAI's own words go to MONAI."""
    given, made = [], []

    def run(run_id: str | None = None, config_file: str | None = None, **override: object) -> None:
        given.append((run_id, config_file, override))
        workflow = monai.bundle.ConfigWorkflow(config_file, logging_file=False, workflow_type="inference", **override)
        workflow.initialize()
        made.append([workflow.parser.get_parsed_content(name) for name in ("moving", "fixed", "output_dir")])
        sys.exit(0)

    monkeypatch.setattr("monai.bundle.run", run)
    monkeypatch.chdir(tmp_path)
    line = ["--config_file", str(CONFIGS / "inference.json"), "--bundle_root", str(BUNDLE), "--output_dir", "2024"]
    assert said(monkeypatch, "run", *line, "--moving=%other.json::a", "--fixed", "@fixed") == 0
    assert given == [("run", str(CONFIGS / "inference.json"), {"bundle_root": str(BUNDLE)})]
    assert made == [["%other.json::a", "@fixed", "2024"]]


def test_help(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    line = ["--config_file", str(CONFIGS / "inference.json"), "--bundle_root", str(BUNDLE), "--help"]
    assert said(monkeypatch, *line) == 0
    assert "sacb_net registers. Its options, and their defaults:" in capsys.readouterr().out
