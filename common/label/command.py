"""python -m common label: the app folder of a label server."""

from typing import Any

from common import InputError


def label(action: str, folder: str, *more: str, bundles: Any = "", labels: str = "", spacing: float | None = None):
    """Write the folder of a MONAI Label app that offers label propagation and registration by our bundles.

    `label init DIR --bundles sacb_net samconvex`, then `monailabel start_server --app DIR --studies STUDIES`.

    Args:
        action: init.
        folder: new folder for the app.
        bundles: names of bundles of the repository, or folders of bundles; several may follow each other.
        labels: JSON file {name: number} with the names of the labels.
        spacing: voxel size in mm of the networks' grid, instead of that of the weights.
    """
    from common.label.folder import write_app  # and with it MONAI, which takes seconds

    if action != "init":
        raise InputError(f"label {action}: there is only `label init`")
    if spacing is not None and not (isinstance(spacing, (int, float)) and spacing >= 0):
        raise InputError(f"--spacing must be a number of mm, or 0 for that of the fixed scan, got {spacing}")
    given = [bundles, *more] if isinstance(bundles, str) else [*bundles, *more]
    options = {} if spacing is None else {"spacing": spacing}
    path = write_app(str(folder), [str(b) for b in given if b], labels=str(labels), options=options).absolute()
    return f"wrote {path}; start it with: monailabel start_server --app {path} --studies FOLDER --host 127.0.0.1"
