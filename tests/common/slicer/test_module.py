"""The Slicer module on a stand-in of Slicer's API, with the real process and real files."""

import importlib.util
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from people import SPACING, label_of, write_person
from stand_in import Node, QSettings, modules

from common.space import io, mapping
from common.space.transform_files import read_transform

FILE = Path(__file__).resolve().parents[3] / "common" / "slicer" / "MonaiRegister" / "MonaiRegister.py"
FAST = f"--features mind --spacing {SPACING} --device cpu"


@pytest.fixture
def loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """The module as Slicer loads it: its folder on sys.path."""
    for name, module in modules(tmp_path).items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.syspath_prepend(str(FILE.parent))
    monkeypatch.setattr(QSettings, "kept", {})
    spec = importlib.util.spec_from_file_location("MonaiRegister", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two scans as .nii, and the label map of the moving one."""
    folder = tmp_path_factory.mktemp("people")
    for seed, name in enumerate(("moving", "fixed")):
        io.write_scan(*io.read_scan(write_person(folder, name, seed)), folder / f"{name}.nii")
    io.write_label(*io.read_label(label_of(folder, "moving")), folder / "label.nii")
    return folder


@pytest.fixture
def panel(loaded: types.ModuleType, people: Path):
    """The panel, the two volumes and the label map chosen."""
    widget = loaded.MonaiRegisterWidget()
    widget.setup()
    widget.moving.node = Node("A", people / "moving.nii", "volume")
    widget.fixed.node = Node("B", people / "fixed.nii", "volume")
    widget.label.node = Node("L", people / "label.nii", "label")
    widget.python.text, widget.more.text, widget.method.currentText = sys.executable, FAST, "samconvex"
    return widget


def until_idle(panel, seconds: float = 120) -> None:
    """What the event loop of Slicer does: the timer's signal, as long as it runs."""
    until = time.monotonic() + seconds
    while panel.timer.running:
        assert time.monotonic() < until
        panel.timer.emit("timeout()")
        time.sleep(0.02)


def test_it_introduces_itself(loaded: types.ModuleType) -> None:
    about = loaded.MonaiRegister(types.SimpleNamespace()).parent
    assert about.title == "MONAI Register" and about.categories == ["Registration"] and "clinical" in about.helpText
    assert FILE.stem == "MonaiRegister", "Slicer takes the class of the file's name"


def test_round_trip(loaded: types.ModuleType, panel, people: Path) -> None:
    """Volumes to files, the command line itself, and back: three nodes, shown; the transform warps to the same."""
    slicer = sys.modules["slicer"]
    panel.run.click()
    assert slicer.errors == [] and panel.stop.enabled and not panel.run.enabled and panel.timer.running
    until_idle(panel)
    assert slicer.errors == [], panel.log.plainText
    assert [node.name for node in slicer.scene] == ["A to B", "A to B transform", "A to B label"]
    warped, transform, label = slicer.scene
    assert slicer.layers["background"] is panel.fixed.node and slicer.layers["foreground"] is warped
    found, affine = io.read_scan(warped.path)
    moving, place = io.read_scan(people / "moving.nii")
    again = mapping.resample(moving[0], place, found.shape[1:], affine, read_transform(transform.path))
    assert np.abs(again - found[0]).max() < 1e-3 * moving.max()
    codes = np.unique(io.read_label(label.path)[0])
    assert len(codes) > 3 and set(codes) <= set(np.unique(io.read_label(people / "label.nii")[0]))
    assert panel.status.text.startswith("Verdict: ") and "method: samconvex" in panel.log.plainText
    assert panel.run.enabled and not panel.stop.enabled and panel.show.enabled
    panel.show.click()
    assert Path(sys.modules["qt"].opened[0]).name == "report.html"
    assert QSettings.kept["MonaiRegister/python"] == sys.executable


def test_mistake_of_the_process_is_shown(panel) -> None:
    panel.more.text = "--refine_step 3"
    panel.run.click()
    until_idle(panel)
    slicer = sys.modules["slicer"]
    assert slicer.errors == ["--refine_step: there is no such option, did you mean --refine_steps?"]
    assert slicer.scene == [] and panel.run.enabled and not panel.show.enabled


def test_cancel(panel) -> None:
    panel.run.click()
    panel.timer.emit("timeout()")
    panel.stop.click()
    until_idle(panel)
    assert panel.status.text == "cancelled" and sys.modules["slicer"].scene == [] and panel.run.enabled


def test_missing_package_is_installed_first(loaded, panel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for, by pip into that Python, and then the registration begins; without consent nothing does."""
    slicer, job = sys.modules["slicer"], loaded.job
    begun = []
    monkeypatch.setattr(job, "installed", lambda *_: "")
    monkeypatch.setattr(job, "install_line", lambda python, source: begun.append(source) or [python, "-c", "print(1)"])
    monkeypatch.setattr(job, "command", lambda python, *_, **__: begun.append("register") or [python, "-c", "1 / 0"])
    slicer.agrees = False
    panel.run.click()
    assert begun == [] and job.PACKAGE in slicer.asked[0] and not panel.timer.running
    slicer.agrees = True
    panel.run.click()
    until_idle(panel)
    assert set(begun) == {str(FILE.parents[3]), "register"} and slicer.errors == ["ZeroDivisionError: division by zero"]
    panel.source.text = ""
    panel.run.click()
    assert "no Package is named" in slicer.errors[-1]


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda p: setattr(p.moving, "node", None), "Choose a moving and a fixed volume"),
        (lambda p: setattr(p.moving, "node", p.fixed.node), "The moving and the fixed volume are the same"),
        (lambda p: setattr(p.moving.node, "parent", object()), "A lies under a transform: harden or remove it first"),
        (lambda p: setattr(p.python, "text", "no-python"), "Python: no-python is no program"),
    ],
)
def test_mistakes(change, sentence: str, panel) -> None:
    change(panel)
    panel.run.click()
    assert sys.modules["slicer"].errors == [sentence] and not panel.timer.running and panel.run.enabled
