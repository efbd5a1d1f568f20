"""The front door: same files as `monai.bundle run`, from a wheel in an empty folder; mistakes in a sentence."""

import gzip
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from people import SPACING, write_person

from common.__main__ import main

ROOT = Path(__file__).resolve().parents[3]
BUNDLES = ("dual_flownet", "residual_aligner", "sacb_net", "samconvex")
FILES = ("warped.nii.gz", "transform.h5", "displacement.nii.gz")
LIGHT = "import sys; from common.__main__ import main; main(); print(sorted({'torch', 'monai'} & set(sys.modules)))"


def call(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["common", "register", *map(str, words)])
    main()


@pytest.mark.slow
def test_wheel_gives_the_files_of_the_bundle(tmp_path: Path) -> None:
    """Two commands in an empty folder, install and register; the bundles come with the wheel."""
    for seed, name in enumerate(("moving", "fixed")):
        write_person(tmp_path, name, seed)
    (tmp_path / "empty").mkdir()
    for name in ("common", "bundles"):
        leave = shutil.ignore_patterns("__pycache__", "eval")
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=leave)
    quiet = ["-q", "--no-deps", "--disable-pip-version-check"]
    pip = [sys.executable, "-m", "pip"]
    for name in ("setup.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE"):  # a build leaves files behind
        shutil.copy(ROOT / name, copied_to := tmp_path / "source" / name)
    wheel = [*pip, "wheel", *quiet, "--no-build-isolation", "-w", tmp_path / "dist", copied_to.parent]
    subprocess.run(wheel, check=True, capture_output=True, cwd=tmp_path)
    (built,) = (tmp_path / "dist").glob("*.whl")
    subprocess.run([*pip, "install", *quiet, "--target", tmp_path / "site", built], check=True, capture_output=True)
    environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}
    words = ["--refine_steps", "2", "--spacing", str(SPACING), "--device", "cpu"]
    scans = [tmp_path / "moving.nii.gz", tmp_path / "fixed.nii.gz"]
    line = [sys.executable, tmp_path / "site" / "bin" / "monai-register", *scans, "out", "--method", "sacb_net", *words]
    where = {"cwd": tmp_path / "empty", "env": environment, "check": True, "text": True, "capture_output": True}
    assert str(tmp_path / "site") in subprocess.run(
        [sys.executable, "-c", "import common; print(common.__file__)"], **where
    ).stdout
    assert "method: sacb_net (asked for by name)" in subprocess.run(line, **where).stdout
    bundle = ["--config_file", "bundles/sacb_net/configs/inference.json", "--bundle_root", "bundles/sacb_net"]
    given = ["--moving", scans[0], "--fixed", scans[1], "--output_dir", tmp_path / "bundle", *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "monai.bundle", "run", *bundle, *given]
    subprocess.run(line, cwd=ROOT, env=environment, check=True, capture_output=True)
    for name in FILES:
        places = (tmp_path / "empty" / "out", tmp_path / "bundle")
        mine, theirs = (folder / "moving_to_fixed" / name for folder in places)
        unpacked = gzip.decompress if name.endswith(".gz") else bytes  # the head of a .gz holds the time
        assert unpacked(mine.read_bytes()) == unpacked(theirs.read_bytes()), name
    found = {path.parents[1].name for path in (tmp_path / "site/common/bundles").glob("*/models/model.pt")}
    assert found == set(BUNDLES)
    for name in BUNDLES:
        installed = tmp_path / "site" / "common" / "bundles" / name / "models"
        for path in installed.iterdir():
            assert path.read_bytes() == (ROOT / "bundles" / name / "models" / path.name).read_bytes()


def test_auto_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """The choice is printed and in the report, and what the user asks for wins over it."""
    for seed, name in enumerate(("moving", "fixed")):
        write_person(tmp_path, name, seed)
    scans = [tmp_path / f"{name}.nii.gz" for name in ("moving", "fixed")]
    call(monkeypatch, *scans, tmp_path / "out", "--refine_steps", 1, "--spacing", SPACING, "--device", "cpu")
    told = json.loads((tmp_path / "out" / "moving_to_fixed" / "report.json").read_text())["run"]["method"]
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"method: {told['bundle']} ") and told["reason"] in first
    assert told["options"]["refine_steps"] == 1


@pytest.mark.parametrize(
    "words, sentence",
    [
        (["a"], "register needs MOVING FIXED OUT: the moving scan, the fixed one, a folder for results"),
        (["a", "b", "c", "d"], "d: is one word too many; monai-register --help"),
        (["a", "b", "c", "--refine_step", "3"], "--refine_step: there is no such option, did you mean --refine_steps?"),
        (["a", "b", "c", "--method", "sacb"], "sacb: no such bundle, nor a folder with configs/inference.json"),
        (["a", "b", "c", "--method=sacb_net", "--features=mind"], "--features: there is no such option here"),
        (["a", "b", "c", "--config=none.json", "--method=sacb_net"], "--config none.json: no such file"),
        (["a", "b", "c", "--network_def::radii", "3"], "--network_def::radii: parts of a config are set by"),
        (["a", "b", "c", "--prealign"], "--prealign: needs a value"),
        (["none.nii", "b", "c"], f"{os.path.abspath('none.nii')}: no such file"),
        (["a", "b", "c", "--config_file", "x"], "--config_file: there is no such option"),
    ],
)
def test_mistakes(words: list[str], sentence: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as caught:
        call(monkeypatch, *words)
    assert str(caught.value).startswith(f"error: {sentence}")
    assert not Path("c").exists()


def test_help_is_light() -> None:
    """No torch and no MONAI; every option is in it."""
    line = [sys.executable, "-c", LIGHT, "register", "--help"]
    text = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert text.splitlines()[-1] == "[]"
    assert all(f"--{name} " in text for name in ("method", "config", "refine_steps", "prealign", "moving_label"))
