"""A small stand-in of what the module uses of 3-D Slicer: nodes that are files, Qt widgets without a window.

A widget takes only the signals and properties that Qt's has; another name is an AttributeError, as in PythonQt.
"""

import shutil
import types
from pathlib import Path


class Widget:
    """Properties with their first values in `_has`, and signals in `_says`."""

    _has: dict = {}
    _says: tuple = ()

    def __init__(self, *_) -> None:
        object.__setattr__(self, "_heard", {})
        for name, value in {"enabled": True, "toolTip": "", **self._has}.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        if name not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no property {name}")
        object.__setattr__(self, name, value)

    def connect(self, signal: str, heard) -> None:
        assert signal in self._says, f"{type(self).__name__} has no signal {signal}"
        self._heard[signal] = heard

    def emit(self, signal: str, *values) -> None:
        if self.enabled:
            self._heard[signal](*values)


class QPushButton(Widget):
    _has, _says = {"text": ""}, ("clicked(bool)",)

    def __init__(self, text: str = "") -> None:
        super().__init__()
        self.text = text

    def click(self) -> None:
        self.emit("clicked(bool)", False)


class QLabel(Widget):
    _has = {"text": "", "wordWrap": False}


class QLineEdit(Widget):
    _has = {"text": ""}

    def __init__(self, text: str = "") -> None:
        super().__init__()
        self.text = text


class QComboBox(Widget):
    _has = {"currentText": "", "items": []}

    def addItems(self, items: list) -> None:
        self.items, self.currentText = list(items), items[0]


class QSpinBox(Widget):
    _has = {"value": 0, "specialValueText": "", "minimum": 0, "maximum": 99}

    def setRange(self, low: int, high: int) -> None:
        self.minimum, self.maximum = low, high


class QProgressBar(QSpinBox):
    _has = {"value": 0, "minimum": 0, "maximum": 100}


class QPlainTextEdit(Widget):
    _has = {"readOnly": False, "plainText": ""}

    def appendPlainText(self, text: str) -> None:
        self.plainText += f"{text}\n"

    def clear(self) -> None:
        self.plainText = ""


class QTimer(Widget):
    _has, _says = {"running": False, "interval": 0}, ("timeout()",)

    def setInterval(self, interval: int) -> None:
        self.interval = interval

    def start(self) -> None:
        self.running = True

    def stop(self) -> None:
        self.running = False


class QSettings:
    kept: dict = {}

    def value(self, name: str, default: object) -> object:
        return self.kept.get(name, default)

    def setValue(self, name: str, value: object) -> None:
        self.kept[name] = value


class Layout:
    def __init__(self, *_) -> None:
        self.rows: list = []

    def addRow(self, text: str, widget: Widget) -> None:
        self.rows.append((text, widget))

    def addWidget(self, widget: Widget) -> None:
        self.rows.append(("", widget))

    def addStretch(self, _: int) -> None:
        pass


class Node:
    """A volume of the scene: a name, and the file that it was loaded from."""

    def __init__(self, name: str, path: Path, kind: str, parent: object = None) -> None:
        self.name, self.path, self.kind, self.parent = name, path, kind, parent

    def GetName(self) -> str:
        return self.name

    def SetName(self, name: str) -> None:
        self.name = name

    def GetParentTransformNode(self) -> object:
        return self.parent


class NodeComboBox(Widget):
    _has = {"nodeTypes": [], "addEnabled": True, "removeEnabled": True, "noneEnabled": False, "node": None}

    def setMRMLScene(self, scene: object) -> None:
        assert scene is not None

    def currentNode(self) -> Node | None:
        return self.node


class Module:
    def __init__(self, parent: types.SimpleNamespace) -> None:
        self.parent = parent


class ModuleWidget:
    def __init__(self, parent: object = None) -> None:
        self.layout = Layout()

    def setup(self) -> None:
        pass


class ModuleLogic:
    pass


def modules(temporary: Path) -> dict[str, types.ModuleType]:
    """slicer, qt, ctk, and slicer.ScriptedLoadableModule, for sys.modules; `slicer.scene` has what was loaded."""
    import os

    qt, ctk, slicer = (types.ModuleType(name) for name in ("qt", "ctk", "slicer"))
    for kind in (QPushButton, QLabel, QLineEdit, QComboBox, QSpinBox, QProgressBar, QPlainTextEdit, QTimer, QSettings):
        setattr(qt, kind.__name__, kind)
    qt.QFormLayout = Layout
    qt.opened = []
    qt.QUrl = types.SimpleNamespace(fromLocalFile=str)
    qt.QDesktopServices = types.SimpleNamespace(openUrl=qt.opened.append)
    ctk.ctkCollapsibleButton = QLabel
    slicer.qMRMLNodeComboBox, slicer.mrmlScene = NodeComboBox, object()
    slicer.app = types.SimpleNamespace(temporaryPath=str(temporary))
    slicer.scene, slicer.layers, slicer.errors, slicer.asked = [], {}, [], []

    def loaded(kind: str):
        def load(path: str, properties: dict | None = None) -> Node:
            assert Path(path).is_file(), path
            node = Node((properties or {}).get("name", Path(path).stem), Path(path), kind)
            slicer.scene.append(node)
            return node

        return load

    def save(node: Node, path: str) -> bool:
        shutil.copy(node.path, path)
        return True

    slicer.util = types.SimpleNamespace(
        saveNode=save,
        loadVolume=loaded("volume"),
        loadLabelVolume=loaded("label"),
        loadTransform=loaded("transform"),
        setSliceViewerLayers=lambda **layers: slicer.layers.update(layers),
        errorDisplay=slicer.errors.append,
        confirmOkCancelDisplay=lambda text: bool(slicer.asked.append(text)) or slicer.agrees,
        startupEnvironment=lambda: dict(os.environ),
    )
    slicer.agrees = True
    scripted = types.ModuleType("slicer.ScriptedLoadableModule")
    scripted.ScriptedLoadableModule = Module
    scripted.ScriptedLoadableModuleWidget = ModuleWidget
    scripted.ScriptedLoadableModuleLogic = ModuleLogic
    return {"qt": qt, "ctk": ctk, "slicer": slicer, "slicer.ScriptedLoadableModule": scripted}
