"""The module as 3-D Slicer shows it: two volumes in, the warped one, the transform and the verdict in the scene."""

from __future__ import annotations  # older Slicers have Python 3.9

import os
import shutil
import tempfile
from pathlib import Path

import ctk
import qt
import slicer
from MonaiRegisterLib import job
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleWidget,
)

BY_METHOD = -1  # of the box for the steps: those that the method has by default
REPOSITORY = Path(__file__).resolve().parents[3]
HELP = """Registers a moving volume to a fixed one, deformably, by a MONAI bundle. The warped volume, a transform (which
brings the moving volume and all that belongs to it onto the fixed one) and a verdict come into the scene.
Not for clinical decisions."""


class MonaiRegister(ScriptedLoadableModule):
    """What Slicer lists."""

    def __init__(self, parent) -> None:
        ScriptedLoadableModule.__init__(self, parent)
        self.parent.title = "MONAI Register"
        self.parent.categories = ["Registration"]
        self.parent.dependencies = []
        self.parent.contributors = ["The monai-registration-bundles authors"]
        self.parent.helpText = HELP
        self.parent.acknowledgementText = "The methods' authors are named in the cards of the bundles."


class MonaiRegisterWidget(ScriptedLoadableModuleWidget):
    """The panel. While a process runs, a timer asks it for its lines."""

    def setup(self) -> None:
        ScriptedLoadableModuleWidget.setup(self)
        self.logic = MonaiRegisterLogic()
        self.process, self.then = None, None
        settings = qt.QSettings()
        scans = self._group("Volumes")
        self.moving = self._nodes(scans, "Moving volume", "vtkMRMLScalarVolumeNode")
        self.fixed = self._nodes(scans, "Fixed volume", "vtkMRMLScalarVolumeNode")
        self.label = self._nodes(scans, "Label map of the moving volume", "vtkMRMLLabelMapVolumeNode", none=True)
        how = self._group("Registration")
        self.method = qt.QComboBox()
        self.method.addItems(list(job.METHODS))
        self.method.toolTip = "auto looks at the volumes, chooses, and says why"
        how.addRow("Bundle", self.method)
        self.steps = qt.QSpinBox()
        self.steps.setRange(BY_METHOD, 1000)
        self.steps.value = BY_METHOD
        self.steps.specialValueText = "as the bundle does"
        self.steps.toolTip = "steps of the refinement: better, slower; 50 is a good number"
        how.addRow("Refinement steps", self.steps)
        self.more = qt.QLineEdit()
        self.more.toolTip = "further options of monai-register, as --save_inverse True"
        how.addRow("More options", self.more)
        where = self._group("Python")
        self.python = qt.QLineEdit(settings.value("MonaiRegister/python", "") or self.logic.own_python())
        self.python.toolTip = "the Python that runs it: Slicer's own, or that of an environment with the package"
        where.addRow("Python", self.python)
        self.source = qt.QLineEdit(settings.value("MonaiRegister/source", "") or self.logic.package())
        self.source.toolTip = "where pip finds the package, if that Python lacks it: folder, wheel or address"
        where.addRow("Package", self.source)
        self.run, self.stop = qt.QPushButton("Register"), qt.QPushButton("Cancel")
        self.run.connect("clicked(bool)", self.onRegister)
        self.stop.connect("clicked(bool)", self.onCancel)
        self.bar, self.status, self.log = qt.QProgressBar(), qt.QLabel(""), qt.QPlainTextEdit()
        self.status.wordWrap, self.log.readOnly = True, True
        self.show = qt.QPushButton("Open the report")
        self.show.connect("clicked(bool)", self.onReport)
        for item in (self.run, self.stop, self.bar, self.status, self.show, self.log):
            self.layout.addWidget(item)
        self.layout.addStretch(1)
        self.timer = qt.QTimer()
        self.timer.setInterval(200)
        self.timer.connect("timeout()", self.onTimer)
        self.report = None
        self._busy(False)

    def cleanup(self) -> None:
        """The module is closed, or loaded anew."""
        self.timer.stop()
        if self.process:
            self.process.cancel()

    def onRegister(self, *_) -> None:
        """Save the volumes and begin; first install the package where it is missing."""
        settings = qt.QSettings()
        settings.setValue("MonaiRegister/python", self.python.text)
        settings.setValue("MonaiRegister/source", self.source.text)
        try:
            environment = self.logic.environment(self.python.text)
            lacks = not job.installed(self.python.text, environment)
            if lacks and not self._may_install():
                return
            nodes = (self.moving.currentNode(), self.fixed.currentNode(), self.label.currentNode())
            self.folder = self.logic.save(*nodes)
        except (ValueError, OSError) as error:
            slicer.util.errorDisplay(str(error))
            return
        steps = None if self.steps.value == BY_METHOD else self.steps.value
        how = {"method": self.method.currentText, "steps": steps, "label": nodes[2] is not None, "more": self.more.text}
        line = job.command(self.python.text, self.folder, **how)
        self.log.clear()

        def register() -> None:
            self._start(line, environment, self._load)

        if lacks:
            self._start(job.install_line(self.python.text, self.source.text), environment, register)
        else:
            register()

    def onCancel(self, *_) -> None:
        if self.process:
            self.process.cancel()

    def onTimer(self) -> None:
        """Show what the process says; when it has ended well, do what comes next."""
        code = self.process.ended()  # before the lines, so that none is missed
        for line in self.process.lines():
            self.log.appendPlainText(line)
            share = job.share_done(line, self.process.seconds)
            if share is not None:
                self.bar.setRange(0, 100)
                self.bar.value = round(100 * share)
        self.status.text = self.process.last
        if code is None:
            return
        self.timer.stop()
        process, self.process = self.process, None
        self._busy(False)
        if process.cancelled:
            self.status.text = "cancelled"
        elif code == 0:
            self.then()
        else:
            self.status.text = process.last
            slicer.util.errorDisplay(process.last.removeprefix("error: "))

    def onReport(self, *_) -> None:
        qt.QDesktopServices.openUrl(qt.QUrl.fromLocalFile(str(self.report)))

    def _start(self, line: list, environment: dict, then) -> None:
        self.then, self.process = then, job.Process(line, environment)
        self._busy(True)
        self.timer.start()

    def _load(self) -> None:
        found = self.logic.load(self.folder, self.moving.currentNode(), self.fixed.currentNode())
        self.report = found.report if found.report.is_file() else None
        self.status.text = "\n".join([f"Verdict: {found.verdict}", *(f"- {text}" for text in found.warnings)])
        self._busy(False)

    def _may_install(self) -> bool:
        if not self.source.text.strip():
            raise ValueError(f"{self.python.text} lacks {job.PACKAGE}, and no Package is named to install it from")
        ask = f"{self.python.text} lacks {job.PACKAGE}. Install it, with torch and MONAI, from {self.source.text}?"
        return slicer.util.confirmOkCancelDisplay(ask)

    def _busy(self, busy: bool) -> None:
        self.run.enabled, self.stop.enabled = not busy, busy
        self.show.enabled = not busy and self.report is not None
        self.bar.setRange(0, 0 if busy else 100)  # 0 to 0 moves to and fro
        self.bar.value = 0

    def _group(self, title: str) -> "qt.QFormLayout":
        box = ctk.ctkCollapsibleButton()
        box.text = title
        self.layout.addWidget(box)
        return qt.QFormLayout(box)

    def _nodes(self, form: "qt.QFormLayout", text: str, kind: str, none: bool = False) -> "slicer.qMRMLNodeComboBox":
        box = slicer.qMRMLNodeComboBox()
        box.nodeTypes = [kind]
        box.addEnabled, box.removeEnabled, box.noneEnabled = False, False, none
        box.setMRMLScene(slicer.mrmlScene)
        form.addRow(text, box)
        return box


class MonaiRegisterLogic(ScriptedLoadableModuleLogic):
    """Nodes to files and back."""

    def own_python(self) -> str:
        """Slicer's Python as a program."""
        return shutil.which("PythonSlicer") or ""

    def package(self) -> str:
        """The repository that this module lies in, where it does."""
        return str(REPOSITORY) if (REPOSITORY / "setup.cfg").is_file() else ""

    def environment(self, python: str) -> dict:
        """Variables of the process: Slicer's for its own Python, for another those that Slicer was started with.

        Raises:
            ValueError: there is no such program.
        """
        if not shutil.which(python):
            raise ValueError(f"Python: {python or 'none'} is no program")
        own = os.path.realpath(python) == os.path.realpath(self.own_python() or os.devnull)
        return dict(os.environ) if own else dict(slicer.util.startupEnvironment())

    def save(self, moving, fixed, label=None) -> Path:
        """The volumes as files of a new folder.

        Raises:
            ValueError: a volume is missing, is the other one, lies under a transform, or cannot be written.
        """
        if moving is None or fixed is None:
            raise ValueError("Choose a moving and a fixed volume")
        if moving is fixed:
            raise ValueError("The moving and the fixed volume are the same")
        nodes = {"moving": moving, "fixed": fixed} | ({"moving_label": label} if label is not None else {})
        for node in nodes.values():
            if node.GetParentTransformNode() is not None:
                raise ValueError(f"{node.GetName()} lies under a transform: harden or remove it first")
        folder = Path(tempfile.mkdtemp(prefix="MonaiRegister", dir=slicer.app.temporaryPath))
        for name, node in nodes.items():
            if not slicer.util.saveNode(node, str(folder / f"{name}.nii")):
                raise ValueError(f"{node.GetName()} cannot be written to {folder}")
        return folder

    def load(self, folder: Path, moving, fixed) -> "job.Results":
        """The results as nodes named after the volumes, shown over the fixed one."""
        found = job.results(folder)
        name = f"{moving.GetName()} to {fixed.GetName()}"
        warped = slicer.util.loadVolume(str(found.warped), {"name": name})
        slicer.util.loadTransform(str(found.transform)).SetName(f"{name} transform")
        if found.warped_label is not None:
            slicer.util.loadLabelVolume(str(found.warped_label), {"name": f"{name} label"})
        slicer.util.setSliceViewerLayers(background=fixed, foreground=warped, foregroundOpacity=0.5)
        return found
