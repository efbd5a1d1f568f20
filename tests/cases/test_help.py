"""Help: asked for, it is help; every option with its default; nothing is registered."""

import sys
from pathlib import Path

import pytest
from bundle_words import ROOT, parsed

from common.__main__ import COMMANDS, main
from common.run.options import FOR_INFERENCE, FOR_TRAINING


@pytest.mark.parametrize("config, table", [("inference", FOR_INFERENCE), ("train", FOR_TRAINING)])
@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_of_a_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path, config: str, table: dict, word: str
) -> None:
    """Ends with exit code 0, whatever else is on the line, and nothing is made."""
    with pytest.raises(SystemExit) as end:
        parsed(monkeypatch, "--output_dir", str(tmp_path / "out"), "--prealign", "wrong", word, config=config)
    text = capsys.readouterr().out
    assert end.value.code == 0 and not list(tmp_path.iterdir())
    for name, option in table.items():
        there = option.of in ("", "sacb_net")
        assert (f"\n  --{name} " in text) == (there and name in told(config)), name
    if config == "inference":
        assert "--prealign           how the scans are brought together first (one of affine, rigid, none)" in text
        assert "default affine" in text and "default BUNDLE/models/model.pt" in text and "  clusters: 7" in text


def told(config: str) -> str:
    return (ROOT / "bundles" / "sacb_net" / "configs" / f"{config}.json").read_text()


def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *words: str) -> tuple[object, str]:
    monkeypatch.setattr(sys, "argv", ["common", *words])
    code: object = 0
    try:
        main()
    except SystemExit as end:
        code = end.code
    found = capsys.readouterr()
    return code, found.out + found.err


def test_help_of_common(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    for words in ((), ("--help",), ("-h",), ("help",)):
        code, text = said(monkeypatch, capsys, *words)
        assert code == 0 and all(f"\n  {name} " in text for name in COMMANDS)
    code, text = said(monkeypatch, capsys, "options", "samconvex")
    assert code == 0 and "--features           what is compared" in text
    code, text = said(monkeypatch, capsys, "options", "samconvex", "--training")
    assert code == 0 and "--temperature" in text and "--moving " not in text


def test_wrong_words_of_common(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """A sentence, and no hint of fire's to what does not exist."""
    refused = {
        ("aply", "a"): "error: aply: there is no such command, did you mean apply?",
        ("xyz",): f"error: xyz: there is no such command; there are {', '.join(COMMANDS)}",
        ("apply", "a"): "error: apply needs TRANSFORM and OUTPUT as well; python -m common apply --help",
        ("options", "none"): "error: none: no such bundle, nor a folder with configs/inference.json; there are",
    }
    for words, sentence in refused.items():
        code, text = said(monkeypatch, capsys, *words)
        assert str(code).startswith(sentence) and text == ""
