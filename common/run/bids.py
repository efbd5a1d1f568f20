"""A BIDS data set to one template: `monai-register bids BIDS_DIR OUT participant --fixed TEMPLATE`.

Every T1w scan is registered as a pair of one table, in OUT/pairs; the results then get their BIDS names.
"""

import csv
import json
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import common
from common import InputError
from common.run.door import register
from common.run.words import split
from common.space import io

BIDS_VERSION = "1.9.0"
OWN = ("participant_label", "space")
FOUND = ("moving", "pairs", "dataset_dir", "output_dir")  # options of `register` that are found here
HELP = """monai-register bids BIDS_DIR OUT participant --fixed TEMPLATE [--OPTION VALUE ...]

Registers every T1w scan of a BIDS data set to a template, and writes a BIDS derivative.

  --fixed               the template; a scan
  --space               its name in the files; by default that of the template's file: X of tpl-X_T1w.nii.gz
  --participant_label   the people, without sub-: 01 02; by default all

and every option of `monai-register`: monai-register --help. The same line again goes on where it was stopped.
More: common/run/README.md."""


class Scan(NamedTuple):
    """A T1w scan and the words of its name before the suffix, as sub-01_ses-a_run-1."""

    path: Path
    stem: str

    @property
    def person(self) -> str:
        return self.stem.partition("_")[0]


def bids(words: list[str]) -> str:
    """Register the T1w scans of a BIDS data set to a template; returns what there is to say.

    Raises:
        InputError: a word or an option that is wrong, no such scans, a pair that fails (the others have their names).
    """
    if {"--help", "-h"} & set(words):
        return HELP
    source, target, people, space, rest = _asked(words)
    scans = t1w_scans(source, people)
    template = next(word.partition("=")[2] for word in rest if word.startswith("--fixed="))
    if not os.path.exists(template):
        raise InputError(f"{template}: no such file")
    about = _description(source, space)
    folder = io.output_folder(target)
    io.output_folder(folder / "pairs")
    table = folder / "pairs" / "scans.csv"
    io.replaced(table, lambda path: _write_table(path, scans))
    _write_json(folder / "dataset_description.json", about)
    io.replaced(folder / ".bidsignore", lambda path: path.write_text("pairs/\n**/figures/\n"))
    try:
        register(["--pairs", str(table), "--output_dir", str(folder / "pairs"), *rest])
    finally:
        done = sum(_name(scan, source, folder, space) for scan in scans)
    pages = ("pairs/index.html", f"pairs/{scans[0].stem}/report.html")
    look = "".join([f"; look at {page}" for page in pages if (folder / page).is_file()][:1])
    return f"wrote {folder.absolute()}: {done} of {len(scans)} scans in the space {space}{look}"


def t1w_scans(source: Path, people: list[str]) -> list[Scan]:
    """Every sub-X/[ses-Y/]anat/*_T1w.nii[.gz], in order.

    Args:
        source: the data set.
        people: labels without sub-; empty for all.

    Raises:
        InputError: there are none, or none of one who is asked for.
    """
    if not source.is_dir():
        raise InputError(f"{source}: no such folder")
    found = [path for inside in ("", "ses-*/") for path in source.glob(f"sub-*/{inside}anat/sub-*_T1w.nii*")]
    scans = [Scan(path, path.name.partition("_T1w.nii")[0]) for path in sorted(found) if _is_image(path)]
    there = {scan.person.removeprefix("sub-") for scan in scans}
    for label in people:
        if label not in there:
            raise InputError(f"--participant_label {label}: {source} has no T1w scan of sub-{label}")
    if not scans:
        raise InputError(f"{source}: no T1w scan, sub-*/anat/*_T1w.nii.gz; is it a BIDS data set?")
    return [scan for scan in scans if not people or scan.person.removeprefix("sub-") in people]


def _is_image(path: Path) -> bool:
    return path.name.endswith(("_T1w.nii", "_T1w.nii.gz"))


def _asked(words: list[str]) -> tuple[Path, Path, list[str], str, list[str]]:
    """Data set, target, labels of people, name of the space, and the words that are of `register`."""
    from common.run.options import FOR_INFERENCE

    options, others = split(words, {*FOR_INFERENCE, *OWN, "method", "config"})
    for name in FOUND:
        if name in options:
            raise InputError(f"--{name}: there is no such option here, the scans are those of the data set")
    if len(others) < 3:
        raise InputError("bids needs BIDS_DIR OUT participant; monai-register bids --help")
    source, target, level, *labels = others
    if level != "participant":
        raise InputError(f"{level}: is no level of analysis here, there is only participant")
    if labels and not options.get("participant_label"):
        raise InputError(f"{labels[0]}: is one word too many; monai-register bids --help")
    if not (fixed := options.get("fixed")):
        raise InputError("bids needs --fixed TEMPLATE; monai-register bids --help")
    given = [*(options.pop("participant_label", None) or "").split(","), *labels]
    people = [label.strip().removeprefix("sub-") for label in given if label.strip()]
    space = options.pop("space", None) or _space_of(fixed)
    if not re.fullmatch("[0-9a-zA-Z]+", space):
        raise InputError(f"--space must be of letters and digits, as MNI152NLin2009cAsym, got {space or 'nothing'}")
    rest = [f"--{name}" if value is None else f"--{name}={value}" for name, value in options.items()]
    return Path(source), Path(target), people, space, rest


def _space_of(template: str) -> str:
    """MNI152Lin of tpl-MNI152Lin_res-01_T1w.nii.gz; letters and digits of another name."""
    name = os.path.basename(template)
    if found := re.match("tpl-([0-9a-zA-Z]+)_", name):
        return found[1]
    return re.sub("[^0-9a-zA-Z]", "", name.partition(".")[0])


def _write_table(path: Path, scans: list[Scan]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["id", "moving"])
        lines.writerows([scan.stem, str(scan.path.absolute())] for scan in scans)


def _description(source: Path, space: str) -> dict:
    """What every derivative says of itself."""
    about, name = source / "dataset_description.json", ""
    if about.is_file():
        try:
            name = json.loads(about.read_text(encoding="utf-8")).get("Name", "")
        except (ValueError, AttributeError) as error:
            raise InputError(f"{about}: is not a JSON object ({error})") from error
    return {
        "Name": f"{name or source.absolute().name}, registered to {space}",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [{"Name": "monai-registration-bundles", "Version": common.__version__}],
        "DatasetLinks": {"raw": source.resolve().as_uri()},
        "SourceDatasets": [{"URL": source.resolve().as_uri()}],
    }


def _name(scan: Scan, source: Path, folder: Path, space: str) -> bool:
    """Give the results of a scan their BIDS names; whether there are any."""
    pair = folder / "pairs" / scan.stem
    if not (pair / "report.json").is_file():
        return False
    report = json.loads((pair / "report.json").read_text(encoding="utf-8"))
    inside = scan.path.relative_to(source)
    anat = folder / inside.parent
    sources = {"Sources": [f"bids:raw:{inside.as_posix()}"]}
    judged = {"SpatialReference": report["fixed"], "Verdict": report["verdict"], "Warnings": report["warnings"]}
    there, back = f"from-T1w_to-{space}_mode-image_xfm", f"from-{space}_to-T1w_mode-image_xfm"
    places = {
        "warped.nii.gz": (anat / f"{scan.stem}_space-{space}_T1w.nii.gz", sources | judged),
        "transform.h5": (anat / f"{scan.stem}_{there}.h5", sources),
        "inverse_transform.h5": (anat / f"{scan.stem}_{back}.h5", sources),
        "report.png": (anat.parent / "figures" / f"{scan.stem}_space-{space}_desc-registration_T1w.png", None),
    }
    for name, (place, about) in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        if (pair / name).is_file():
            _same_file(pair / name, place)
            if about:
                _write_json(place.with_name(f"{place.name.partition('.')[0]}.json"), about)
    return True


def _same_file(source: Path, place: Path) -> None:
    """A second name for a file, a copy where the disk has no such."""
    try:
        os.link(source, place)
    except OSError:
        io.replaced(place, lambda path: shutil.copyfile(source, path))


def _write_json(path: Path, content: dict) -> None:
    io.replaced(path, lambda partial: partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8"))
