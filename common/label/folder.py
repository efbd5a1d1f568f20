"""The app folder of a label server: main.py of two lines, and which bundles it offers."""

import json
from pathlib import Path
from typing import Any

from common import InputError
from common.run.cli import bundle_folder
from common.run.registrar import Registrar
from common.space.io import output_folder, replaced

CONTENT = "registration.json"
MAIN = '''"""MONAI Label app that offers registration bundles; registration.json says which."""

from common.label.app import RegistrationApp

__all__ = ["RegistrationApp"]
'''


def write_app(folder: str, bundles: list[str], *, labels: str = "", options: dict[str, Any] | None = None) -> Path:
    """Write main.py and registration.json; the server adds its own folders to them.

    Args:
        folder: new or empty, or an app that this function wrote.
        bundles: folders of bundles, or names of those in the repository.
        labels: JSON file {name: number} of the label maps.
        options: of every run, by the names of inference.json, as {"spacing": 2}.

    Raises:
        InputError: no bundle, an unknown one or option, a faulty file, or a folder that holds something else.
    """
    if not bundles:
        raise InputError(f"{folder}: name the bundles to offer, --bundles sacb_net samconvex")
    found = {path.name: str(path) for path in map(bundle_folder, bundles)}
    for path in found.values():
        Registrar(path, **(options or {}))  # refuses an option that there is not
    content = {"bundles": found, "options": options or {}, "labels": _read_names(labels) if labels else {}}
    path = Path(folder)
    if path.is_dir() and any(path.iterdir()) and not (path / CONTENT).exists():
        raise InputError(f"{path}: is not empty, and no app of ours; name a new folder")
    output_folder(path)
    replaced(path / CONTENT, lambda file: file.write_text(json.dumps(content, indent=4) + "\n"))
    replaced(path / "main.py", lambda file: file.write_text(MAIN))
    return path


def read_app(folder: str | Path) -> dict[str, Any]:
    """registration.json of an app folder.

    Raises:
        InputError: it is missing, or not what `write_app` writes.
    """
    path = Path(folder) / CONTENT
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {name: dict(content[name]) for name in ("bundles", "options", "labels")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: not as `python -m common label init` writes it") from error


def _read_names(path: str) -> dict[str, int]:
    """{name: number}, or the other way round as in a dataset.json."""
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        pairs = [(name, value) if isinstance(value, int) else (value, name) for name, value in found.items()]
        names = {str(name): int(number) for name, number in pairs}
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{path}: must be JSON of the form {{name: number}}") from error
    return {name: number for name, number in names.items() if number > 0}
