"""What a request to the label server asks for: ids become files, options become those of a bundle, or a sentence."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from common import InputError

FINAL = "final"  # the tag under which MONAI Label keeps labels that a person has approved
UPLOADED = "tmp"  # how the host's names of uploads begin: those of Python's tempfile
STEPS = 1000  # more steps of refinement than this are a mistake
PREALIGN = ("affine", "rigid", "none")
RETURNED = {  # what a registration can send back -> the file of the pair's folder
    "warped": "warped.nii.gz",
    "transform": "transform.h5",
    "displacement": "displacement.nii.gz",
    "inverse": "inverse_transform.h5",
    "picture": "report.png",
    "all": "",
}


class Studies(Protocol):
    """What is used of MONAI Label's datastores."""

    def list_images(self) -> list[str]: ...

    def get_image_uri(self, image_id: str) -> str: ...

    def get_label_uri(self, label_id: str, label_tag: str) -> str: ...

    def get_labels_by_image_id(self, image_id: str) -> dict[str, str]: ...


class Pair(NamedTuple):
    """The files that a request names by their ids."""

    fixed: str
    moving: str
    moving_label: str | None = None
    lesions: dict[str, str] = {}  # "fixed_lesion" and "moving_lesion", those that there are


def labelled(studies: Studies, tag: str = FINAL) -> list[str]:
    """Ids of the scans with a label of this tag, in alphabetical order: what can be propagated."""
    return sorted(image for image in studies.list_images() if tag in studies.get_labels_by_image_id(image))


def resolve(
    request: Mapping[str, Any],
    studies: Studies,
    *,
    label: bool,
    folder: Path | None = None,
    uploads: Path | None = None,
    sessions: Path | None = None,
) -> Pair:
    """The files of the scans that a request names: "image" is the fixed scan, "moving" the other one.

    Args:
        request: "image" is an id, or a file that the host keeps of an upload; "moving" an id.
        label: whether the moving scan's label is needed; "moving_tag" in the request says which, else the final one.
            "lesion_tag" is that of labels to leave out.
        folder: of the studies on this machine, to find a label that has no scan.
        uploads: private folder in which the host keeps the upload of a request, until it is answered.
        sessions: folder of the host's sessions: scans that a client has uploaded for more than one request.

    Raises:
        InputError: an id is missing or unknown, both are the same, the moving scan has no such label, or none of the
            two a lesion of that tag.
    """
    known = studies.list_images()
    image = request.get("image")
    uploaded = isinstance(image, str) and _is_upload(Path(image), uploads, sessions)
    if not uploaded and (not isinstance(image, str) or image not in known):
        raise InputError(_unknown("image", image, known, folder))
    tag = first(request.get("moving_tag")) or FINAL
    if not isinstance(tag, str):
        raise InputError(f"moving_tag: must be a word, got {tag!r}")
    moving = request.get("moving")
    if not isinstance(moving, str) or not moving:  # the whole drop-down comes back where nothing was chosen
        choice = labelled(studies, tag) if label else sorted(known)
        choice = [other for other in choice if other != image]
        if len(choice) != 1:
            kind = f"scans with a label {tag!r}" if label else "other scans"
            raise InputError(f"moving: choose the scan to register, there are {len(choice)} {kind}")
        moving = choice[0]
    if moving not in known:
        raise InputError(_unknown("moving", moving, known, folder))
    if moving == image:
        raise InputError(f"{moving}: is the fixed and the moving scan at once, choose another as moving")
    paths = [image if uploaded else studies.get_image_uri(image), studies.get_image_uri(moving)]
    lesions = _lesions(request, studies, {"fixed_lesion": None if uploaded else image, "moving_lesion": moving})
    if not label:
        return Pair(*paths, lesions=lesions)
    if tag not in (tags := studies.get_labels_by_image_id(moving)):
        found = f"only {', '.join(map(repr, tags))}" if tags else "none at all"
        raise InputError(f"{moving}: has no label {tag!r} to propagate, {found}")
    return Pair(*paths, studies.get_label_uri(moving, tag), lesions)


def _lesions(request: Mapping[str, Any], studies: Studies, scans: dict[str, str | None]) -> dict[str, str]:
    """Files of the labels that a registration leaves out: those with the tag "lesion_tag", if a request has one."""
    tag = first(request.get("lesion_tag"))
    if not tag:
        return {}
    tagged = {role: scan for role, scan in scans.items() if scan and tag in studies.get_labels_by_image_id(scan)}
    if not tagged:
        raise InputError(f"lesion_tag: neither of the two scans has a label {tag!r}")
    return {role: studies.get_label_uri(scan, tag) for role, scan in tagged.items()}


def _is_upload(path: Path, uploads: Path | None, sessions: Path | None) -> bool:
    """Other files of the server are nobody's to name."""
    try:
        whole = path.resolve()
        there = whole.exists()
    except (OSError, ValueError):  # no name that a file can have
        return False
    # results on their way to a client lie beside the uploads, under names that do not begin as the host's own
    single = uploads is not None and whole.parent == uploads.resolve() and whole.name.startswith(UPLOADED)
    return there and (single or (sessions is not None and sessions.resolve() in whole.parents))


def _unknown(role: str, name: Any, known: list[str], folder: Path | None) -> str:
    if not name:
        return f"{role}: no scan is named"
    labels = sorted(folder.glob("labels/*/*")) if folder else []
    if any(path.name.partition(".")[0] == str(name).partition(".")[0] for path in labels):
        return f"{role}: there is a label of {name!r} among the studies, but not the scan that it belongs to"
    return f"{role}: no scan of the studies has the id {repr(name)[:80]}; there are {len(known)}" + (
        f", as {sorted(known)[0]!r}" if known else ""
    )


def first(value: Any) -> Any:
    """An option as it was chosen; the first of the list that comes back where nothing was."""
    return (value[0] if value else None) if isinstance(value, (list, tuple)) else value


def bundle_options(request: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a run in a request: "prealign", "refine_steps", "lesion_margin". Clients send numbers as text.

    Nothing else of a request reaches the configs, whose strings MONAI may evaluate.

    Raises:
        InputError: a value that is none of those allowed.
    """
    prealign = first(request.get("prealign", "affine"))
    if prealign not in PREALIGN:
        raise InputError(f"prealign: must be one of {', '.join(PREALIGN)}, got {prealign!r}")
    steps, margin = first(request.get("refine_steps", 0)), first(request.get("lesion_margin"))
    number = _number(steps)
    if not (number.is_integer() and 0 <= number <= STEPS):
        raise InputError(f"refine_steps: must be a whole number from 0 to {STEPS}, got {steps!r}")
    if margin is not None and not 0 <= _number(margin) <= 1000:
        raise InputError(f"lesion_margin: must be a number of mm from 0 to 1000, got {margin!r}")
    given = {} if margin is None else {"lesion_margin": _number(margin)}
    return {"prealign": prealign, "refine_steps": int(number)} | given


def _number(value: Any) -> float:
    """-1 for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return -1.0


def label_names(label: np.ndarray, names: Mapping[str, int]) -> dict[str, int]:
    """Name -> number for the labels of a map, by number; those without a name are called label_NUMBER."""
    by_number = {number: name for name, number in names.items()}
    return {by_number.get(n, f"label_{n}"): n for n in np.unique(label).astype(int).tolist() if n}


def plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of results as JSON has it: without numbers that are not finite."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
